"""What is measured: a closed table of real cohorts, each with its splits, its floors and what others published of it.

Floors are those of issue 7: of the federation in ``distributed`` mode with one colluder, the mean over splits. Anchors are
figures of others, without privacy unless they say so; where they come from stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medfed.errors import ConfigError

Arm = Literal["pooled", "single", "federation", "opacus-choice", "opacus"]
Mode = Literal["local", "distributed"]

ARMS: tuple[Arm, ...] = ("pooled", "single", "federation", "opacus-choice", "opacus")
EPSILONS = (8.0, 3.0, 1.0)
MODES: tuple[Mode, ...] = ("distributed", "local")
COLLUDERS = 1
CHOICE_EPSILON = 3.0  # at which Opacus's setting is chosen, once a cohort

_LISTED = "README of the shared data"
_CHE = "published, Che et al. 2018, Scientific Reports 8:6085"


@dataclass(frozen=True, slots=True)
class Anchor:
    """A figure to compare with. ``comparable``: why it may not be."""

    what: str
    figure: str
    source: str
    comparable: str = ""


@dataclass(frozen=True, slots=True)
class Floors:
    """The least mean that the issue asks for, by epsilon (None: without privacy), of ``what``."""

    what: str
    least: Mapping[float | None, float]


@dataclass(frozen=True, slots=True)
class Subgroup:
    """A category feature of the contract whose levels are scored apart; ``levels``: what each stands for."""

    feature: str
    levels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Seconds:
    """What one cell of each arm takes, roughly, on one core: until a measured one says better."""

    pooled: float
    single: float
    federation: float
    opacus: float

    def of(self, arm: Arm) -> float:
        if arm == "opacus-choice":
            return 4.0 * self.opacus  # as many settings are tried
        return {"pooled": self.pooled, "single": self.single, "federation": self.federation, "opacus": self.opacus}[arm]


@dataclass(frozen=True, slots=True)
class Row:
    """A cohort's part of the page.

    ``cohort``: its name in ``COHORTS``; ``study``: a template of ``studies/``, None for the one of the cohort's name;
    ``metric``: the key of the task's metrics that floors are about, ``metric_name`` what people call it. ``opacus_splits``: on
    how many of the splits Opacus is measured, None for all. ``note``: what a reader must know.
    """

    name: str
    cohort: str
    metric: str
    metric_name: str
    delta: float
    seeds: tuple[int, ...]
    splits: str
    floors: tuple[Floors, ...]
    anchors: tuple[Anchor, ...]
    seconds: Seconds
    epsilons: tuple[float, ...] = EPSILONS
    subgroup: Subgroup | None = None
    study: str | None = None
    opacus_splits: int | None = None
    note: str = ""

    @property
    def task(self) -> str:
        """The template that is trained, or a task file's path."""
        return self.study or self.cohort


@dataclass(frozen=True, slots=True)
class Key:
    """One cell: what is trained, at which epsilon (None: no noise), in which mode, on which split."""

    arm: Arm
    epsilon: float | None
    mode: Mode | None
    seed: int

    def in_words(self) -> str:
        epsilon = "no noise" if self.epsilon is None else f"epsilon {self.epsilon:g}"
        return ", ".join([self.arm, epsilon, *([self.mode] if self.mode else []), f"split {self.seed}"])


def keys(row: Row) -> list[Key]:
    """Every cell of a cohort, split by split; Opacus's setting is chosen on the first."""
    found: list[Key] = []
    for place, seed in enumerate(row.seeds):
        found += [Key("pooled", None, None, seed), Key("single", None, None, seed)]
        found.append(Key("federation", None, "distributed", seed))
        found += [Key("federation", epsilon, mode, seed) for epsilon in row.epsilons for mode in MODES]
        if place == 0 and row.opacus_splits != 0:
            found.append(Key("opacus-choice", CHOICE_EPSILON, None, seed))
        if seed in row.seeds[: row.opacus_splits]:
            found += [Key("opacus", epsilon, None, seed) for epsilon in row.epsilons]
    return found


_FIVE = (1, 2, 3, 4, 5)
_DEALT = "5 splits, each dealing the patients to 5 hospitals anew"
_SEX = {"0": "women", "1": "men"}

_ICU_ANCHORS = (
    Anchor("logistic regression on summaries of the series", "5-fold AUROC .835", _LISTED),
    Anchor("gradient boosting on them", "5-fold AUROC .857", _LISTED),
    Anchor("LSTM with mean imputation", "AUROC .803", _CHE, "other splits"),
    Anchor("GRU-D", "AUROC .842", _CHE, "other splits"),
)

ROWS: tuple[Row, ...] = (
    Row(
        name="heart-disease",
        cohort="heart-disease",
        metric="auc",
        metric_name="AUC",
        delta=3e-4,
        seeds=tuple(range(43, 53)),
        splits="10 splits, 66/34 inside each of the 4 hospitals",
        floors=(Floors("any model", {None: 0.88, 8.0: 0.88, 3.0: 0.88, 1.0: 0.875}),),
        anchors=(
            Anchor(
                "logistic regression on everybody's data, shared normalisation",
                "AUC .881, accuracy .795",
                _LISTED,
                "split 43 alone",
            ),
            Anchor(
                "the same, each hospital's own normalisation",
                "AUC .800, accuracy .724",
                _LISTED,
                "split 43 alone",
            ),
            Anchor("FedAvg", "accuracy .748", "published; README of the shared data"),
            Anchor(
                "DP-FedAvg at a claimed epsilon of 1 (none: .71)",
                "accuracy .685, mean of 4 centres",
                "published; README of the shared data",
                "mean over centres, not over patients",
            ),
        ),
        seconds=Seconds(pooled=1.0, single=4.0, federation=1.3, opacus=1.5),
        subgroup=Subgroup("sex", _SEX),
        note="Nearly all test patients of Switzerland are ill: its own AUC is void, and it cannot be the worst hospital here.",
    ),
    Row(
        name="breast-cancer",
        cohort="breast-cancer",
        metric="auc",
        metric_name="AUC",
        delta=5e-4,
        seeds=_FIVE,
        splits=_DEALT,
        floors=(),
        anchors=(),
        seconds=Seconds(pooled=2.0, single=8.0, federation=2.5, opacus=1.5),
        note="A bundled set that needs no download; nobody set a floor for it.",
    ),
    Row(
        name="pneumonia",
        cohort="pneumonia",
        metric="auc",
        metric_name="AUC on the validation films",
        delta=1e-5,
        seeds=_FIVE,
        splits=_DEALT + "; the test films are the set's own validation films in every split",
        floors=(Floors("CNN", {None: 0.99, 8.0: 0.985, 3.0: 0.98, 1.0: 0.96}),),
        anchors=(
            Anchor(
                "ResNet-18",
                "AUC .944, accuracy .854",
                "published, Yang et al., Scientific Data 10:41 (2023)",
                "on the test films, which differ from training films more than the validation films do",
            ),
            Anchor("random forest", "AUC .950, accuracy .856", _LISTED, "on the test films"),
        ),
        seconds=Seconds(pooled=15.0, single=28.0, federation=13.0, opacus=14.0),
        note="The test films are the same in every split: the deviation shown leaves out what other films would change.",
    ),
    Row(
        name="icu-mortality",
        cohort="icu-mortality",
        metric="auc",
        metric_name="AUROC",
        delta=1e-5,
        seeds=_FIVE,
        splits="5 folds of one cross-validation; each of the 4 units is a hospital",
        floors=(Floors("best model", {None: 0.845, 8.0: 0.825, 3.0: 0.81, 1.0: 0.79}),),
        anchors=_ICU_ANCHORS,
        seconds=Seconds(pooled=20.0, single=35.0, federation=30.0, opacus=17.0),
        subgroup=Subgroup("gender", _SEX),
    ),
    Row(
        name="icu-recurrent",
        cohort="icu-mortality",
        study="icu-recurrent",
        metric="auc",
        metric_name="AUROC",
        delta=1e-5,
        seeds=_FIVE,
        splits="5 folds of one cross-validation; each of the 4 units is a hospital",
        floors=(Floors("best recurrent or Transformer", {None: 0.835, 8.0: 0.81, 3.0: 0.79, 1.0: 0.76}),),
        anchors=_ICU_ANCHORS,
        seconds=Seconds(pooled=40.0, single=60.0, federation=60.0, opacus=40.0),
        subgroup=Subgroup("gender", _SEX),
        opacus_splits=1,
    ),
    Row(
        name="medical-abstracts",
        cohort="medical-abstracts",
        metric="accuracy",
        metric_name="accuracy",
        delta=1e-5,
        seeds=_FIVE,
        splits=_DEALT,
        epsilons=(8.0, 3.0),
        floors=(Floors("from scratch", {None: 0.60}),),
        anchors=(Anchor("TF-IDF and logistic regression", "5-fold accuracy .589, macro-F1 .584", _LISTED),),
        seconds=Seconds(pooled=60.0, single=60.0, federation=30.0, opacus=110.0),
        opacus_splits=1,
        note="The 11,550 training texts of published figures are not in the set: those cannot be compared. Opacus trains for "
        "minutes here, and is asked for on one split only.",
    ),
    Row(
        name="brca-survival",
        cohort="brca-survival",
        metric="c_index",
        metric_name="C-index of all test patients",
        delta=1e-5,
        seeds=_FIVE,
        splits="the set's own split into 6 regions; 5 seeds draw first weights and noise",
        floors=(Floors("any model", {None: 0.75}),),
        anchors=(
            Anchor(
                "everybody's data in one place",
                "C-index .704",
                "published for Fed-TCGA-BRCA; README of the shared data",
            ),
            Anchor("FedAvg", "C-index .735", "published for Fed-TCGA-BRCA; README of the shared data"),
            Anchor("FedAdam", "C-index .842", "published for Fed-TCGA-BRCA; README of the shared data"),
            Anchor("Cox", "C-index .840", _LISTED),
        ),
        seconds=Seconds(pooled=5.0, single=30.0, federation=3.5, opacus=2.5),
        note="The test patients of the six regions have 14, 4, 8, 3, 2 and 1 events: a region's own C-index says little.",
    ),
    Row(
        name="ncbi-disease",
        cohort="ncbi-disease",
        metric="f1_entity",
        metric_name="entity F1",
        delta=1e-5,
        seeds=_FIVE,
        splits=_DEALT + "; the test sentences are the corpus's own in every split",
        epsilons=(8.0, 3.0),
        opacus_splits=0,
        note="Each sentence counts as a patient: the files do not say which abstract it is of. Plain Opacus is not measured: one "
        "training would take it many minutes of a core.",
        floors=(Floors("from scratch", {None: 0.75}),),
        anchors=(
            Anchor("logistic regression on a window of words", "entity F1 .721", _LISTED),
            Anchor("LSTM-CRF", "entity F1 .844", "published; README of the shared data"),
            Anchor("BioBERT, pretrained", "entity F1 .891", "published; README of the shared data"),
        ),
        seconds=Seconds(pooled=60.0, single=60.0, federation=60.0, opacus=300.0),
    ),
    Row(
        name="bbbp",
        cohort="bbbp",
        metric="auc",
        metric_name="AUC, scaffold split",
        delta=1e-5,
        seeds=_FIVE,
        splits="one scaffold split; 5 seeds deal the molecules to 5 hospitals and draw first weights and noise",
        epsilons=(8.0, 3.0),
        floors=(Floors("any model", {None: 0.70}),),
        anchors=(
            Anchor("random forest", "AUC .719", "published, scaffold split; README of the shared data"),
            Anchor("graph convolution", "AUC .676", "published, scaffold split; README of the shared data"),
            Anchor("logistic regression", "AUC .712, random split .913", _LISTED),
        ),
        seconds=Seconds(pooled=10.0, single=30.0, federation=5.0, opacus=3.0),
    ),
)


def row_named(name: str) -> Row:
    """Raises ``ConfigError`` MF-203 for a name that is not in the table."""
    for row in ROWS:
        if row.name == name:
            return row
    raise ConfigError(203, f"there are no results for {name}", f"name one of {', '.join(row.name for row in ROWS)}")
