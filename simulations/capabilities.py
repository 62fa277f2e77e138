"""What medfed can train, row by row: the catalogue's table, from which ``docs/capabilities.md`` and the contract test are made.

A row exists only with a reader, a study under ``studies/``, a private federated run, a metric above what guessing reaches,
and predictions with an explanation: ``tests/simulations/test_capabilities.py`` runs every one of them (experimental ones in
`make soak`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["works", "experimental"]


@dataclass(frozen=True, slots=True)
class Quick:
    """A private federated run that takes seconds: enough to see that a row learns, not what it can reach.

    ``above``: what the test metric must exceed, at least what guessing reaches. ``patients``: of each synthetic hospital; of
    a real one at most so many to train and to test on.
    """

    above: float
    epsilon: float = 8.0
    rounds: int | None = None
    hospitals: int | None = None
    patients: int | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Capability:
    """A row. ``study``: of ``studies/``; ``cohort``: of ``medfed-simulate cohorts``; ``baseline``: the trivial one, in words.

    ``extras``: of medfed that it needs. ``experimental`` rows need ``--experimental`` and stay out of the README.
    """

    name: str
    family: str
    what: str
    study: str
    cohort: str
    baseline: str
    quick: Quick
    status: Status = "works"
    extras: tuple[str, ...] = field(default=())


_GUESSING = "guessing: AUC .5"

CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        "Tables: logistic regression",
        "Tables",
        "heart disease at four hospitals",
        "heart-disease",
        "heart-disease",
        _GUESSING,
        Quick(above=0.75),
    ),
    Capability(
        "Images: standardised convolutions",
        "Images",
        "pneumonia on chest films of children",
        "pneumonia",
        "pneumonia",
        _GUESSING,
        Quick(above=0.7, rounds=8, patients=300),
    ),
    Capability(
        "Images: residual network",
        "Images",
        "pneumonia on chest films of children",
        "pneumonia-resnet",
        "pneumonia",
        _GUESSING,
        Quick(above=0.65, rounds=6, patients=150),
    ),
    Capability(
        "Several views or tiles of a patient: attention pooling",
        "Images",
        "which invented patient has a lesion in one of four films",
        "synthetic-views",
        "synthetic-views",
        _GUESSING,
        Quick(above=0.7, rounds=16, hospitals=3),
    ),
    Capability(
        "Volumes (CT, MR): convolutions in three dimensions",
        "Images",
        "which invented volume holds a nodule among vessels",
        "synthetic-volumes",
        "synthetic-volumes",
        _GUESSING,
        Quick(above=0.6, rounds=30, hospitals=3),
        extras=("nifti",),
    ),
    Capability(
        "Nodules: a detector of patches that slides over a scan",
        "Images",
        "which patch of an invented scan holds a nodule",
        "synthetic-nodules",
        "synthetic-nodules",
        _GUESSING,
        Quick(above=0.55, rounds=16, hospitals=3),
        extras=("nifti",),
    ),
    Capability(
        "Series: summaries of a stay",
        "Records and vitals",
        "death in intensive care from 48 hours of measurements",
        "icu-mortality",
        "icu-mortality",
        _GUESSING,
        Quick(above=0.65, rounds=8, patients=300),
    ),
    Capability(
        "Series: recurrent network",
        "Records and vitals",
        "the same by a GRU beside the summaries",
        "icu-recurrent",
        "icu-mortality",
        _GUESSING,
        Quick(above=0.65, rounds=5, patients=150),
    ),
    Capability(
        "Series: recurrent network that knows the gaps",
        "Records and vitals",
        "the same, where a measurement fades with the time since it was made (after GRU-D)",
        "icu-gru-d",
        "icu-mortality",
        _GUESSING,
        Quick(above=0.6, rounds=5, patients=120),
    ),
    Capability(
        "Series: both ways, with what holds for the whole stay",
        "Records and vitals",
        "stays that end badly by a day's vital signs and the age, bidirectional LSTM",
        "synthetic-series-both-ways",
        "synthetic-series",
        _GUESSING,
        Quick(above=0.6, hospitals=3, rounds=15),
    ),
    Capability(
        "Events: Transformer over codes",
        "Records and vitals",
        "who will be admitted, by diagnoses, drugs and procedures of some years",
        "synthetic-events",
        "synthetic-events",
        _GUESSING,
        Quick(above=0.65, hospitals=3, rounds=15),
    ),
    Capability(
        "Several parts: early, late and hybrid fusion",
        "Multimodal",
        "a row, vital signs, a picture, a note and a thousand expression values together, some parts missing",
        "synthetic-fusion",
        "synthetic-fusion",
        _GUESSING,
        Quick(above=0.6, hospitals=3, rounds=15),
    ),
    Capability(
        "Molecules: fingerprints",
        "Molecules",
        "which molecules pass the blood-brain barrier, scaffold split",
        "bbbp",
        "bbbp",
        _GUESSING,
        Quick(above=0.55, rounds=20, patients=200),
        extras=("molecules",),
    ),
    Capability(
        "Molecules: message-passing graph network",
        "Molecules",
        "the same by atoms and bonds",
        "bbbp-graph",
        "bbbp",
        _GUESSING,
        Quick(above=0.55),
        extras=("molecules",),
        status="experimental",
    ),
    Capability(
        "Molecules: sequence model of SMILES",
        "Molecules",
        "the same by the characters of the SMILES, Transformer",
        "bbbp-smiles",
        "bbbp",
        _GUESSING,
        Quick(above=0.5, rounds=8, patients=150),
        extras=("molecules",),
    ),
    Capability(
        "Molecules: several findings at once",
        "Molecules",
        "whether a drug was approved, and whether a trial of it failed for toxicity",
        "clintox",
        "clintox",
        "guessing: mean AUC .5",
        Quick(above=0.55, rounds=20),
        extras=("molecules",),
    ),
    Capability(
        "Texts: classes",
        "Text",
        "five kinds of condition from an abstract",
        "medical-abstracts",
        "medical-abstracts",
        "guessing: mean AUC .5",
        Quick(above=0.55, rounds=8, patients=300),
    ),
    Capability(
        "Texts: classes by convolutions",
        "Text",
        "which organ a short note is about; public word vectors may begin it",
        "synthetic-notes-cnn",
        "synthetic-notes",
        "guessing: mean AUC .5",
        Quick(above=0.7, hospitals=3, rounds=30),
    ),
    Capability(
        "Texts: entities, word by word",
        "Text",
        "drugs and problems in notes; names of diseases in abstracts ([ncbi-disease](../studies/ncbi-disease.toml))",
        "synthetic-mentions",
        "synthetic-mentions",
        "finding nothing: F1 0",
        Quick(above=0.5, hospitals=3, rounds=20),
    ),
    Capability(
        "Texts: relations between marked entities",
        "Text",
        "whether a drug treats a problem, caused it, or has nothing to do with it",
        "synthetic-relations",
        "synthetic-relations",
        "guessing: mean AUC .5",
        Quick(above=0.7, hospitals=3, rounds=30),
    ),
    Capability(
        "Survival: Weibull times",
        "Survival and prognosis",
        "how long patients live with breast cancer, six regions",
        "brca-survival",
        "brca-survival",
        "guessing: C-index .5",
        Quick(above=0.6, rounds=10),
    ),
    Capability(
        "Survival: discrete-time hazards",
        "Survival and prognosis",
        "the same by the chance to die in each of several years",
        "brca-survival-hazard",
        "brca-survival",
        "guessing: C-index .5",
        Quick(above=0.6, rounds=10),
    ),
    Capability(
        "Autoencoder: the unusual, and a reduced representation",
        "Without labels",
        "malignant tumors, by a model of benign ones alone",
        "breast-anomaly",
        "breast-anomaly",
        "guessing: AUC .5; the distance from the public centers: .72",
        Quick(above=0.72, rounds=15),
    ),
    Capability(
        "Variational autoencoder",
        "Without labels",
        "the same, with sigma points in place of random draws",
        "breast-anomaly-variational",
        "breast-anomaly",
        "guessing: AUC .5; the distance from the public centers: .72",
        Quick(above=0.72, rounds=15),
        status="experimental",
    ),
    Capability(
        "Treatment effect: two arms",
        "Treatment effect",
        "whom an invented treatment in intensive care helps, semi-synthetic",
        "icu-effect",
        "icu-effect",
        "one effect for everybody, the unadjusted difference: rank correlation 0",
        Quick(above=0.5, rounds=15),
    ),
)
"""In the order of the page. At most ``MOST_EXPERIMENTAL`` rows are experimental."""

MOST_EXPERIMENTAL = 5


def page() -> str:
    """``docs/capabilities.md``."""
    lines = [
        "# What can be trained",
        "",
        "Every row has a reader for hospitals' files, a study, private federated training, a metric above the trivial",
        "baseline, and predictions with an explanation. One test runs all of them, of experimental ones in `make soak`. What",
        "each reaches stands in [results](results.md). Made by `make docs`.",
    ]
    for family in dict.fromkeys(row.family for row in CAPABILITIES):
        lines += ["", f"## {family}", "", "| row | example | study | cohort | must beat | status |", "|-|-|-|-|-|-|"]
        for row in (row for row in CAPABILITIES if row.family == family):
            needs = "".join(f", needs `medfed[{extra}]`" for extra in row.extras)
            cells = (
                row.name,
                row.what,
                f"[{row.study}](../studies/{row.study}.toml)",
                row.cohort,
                row.baseline,
                row.status + needs,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_refused()]) + "\n"


REFUSED: dict[str, str] = {
    "mixup, CutMix and other mixing of records": "a mixed record belongs to two patients: neither has a gradient of its own "
    "that could be clipped",
    "Cox's partial likelihood": "it compares each patient with all others at risk; discrete-time hazards and Weibull say the "
    "same record by record",
    "BatchNorm and other statistics of a batch": "what comes out for one patient depends on the others; GroupNorm, LayerNorm "
    "and standardised weights take their place",
    "contrastive losses over a batch": "every patient's loss holds the others'",
    "association rules and topic models on raw notes": "their counts have no bound for one patient, and rare words name people",
    "generative adversarial networks": "two networks spend two budgets, and what they show is no better than what the budget "
    "of a classifier buys; no use here was worth it",
    "dropout in private training": "a record would have another gradient in every batch; the noise regularizes. Own models "
    "may carry it for use without privacy",
    "vocabularies or normalisations learned from patients without a debit": "they leave the hospital unpaid for; secure "
    "statistics are debited, hashed words and public files cost nothing",
}
"""What is refused under privacy, and why."""


def _refused() -> list[str]:
    rows = (f"| {what} | {why} |" for what, why in REFUSED.items())
    return ["## Refused under privacy", "", "| what | why |", "|-|-|", *rows]
