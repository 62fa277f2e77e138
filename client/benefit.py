"""``medfed-client benefit``: what joining is worth here. The released model, one trained at this hospital alone, and the
released one trained on at this hospital, on the patients that it held out, who were in no training.

Each figure comes with a 95 % confidence interval: percentiles over bootstrap samples of patients, all records of a patient
together, the same samples for every model, so that differences are judged pair by pair (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from medfed import display
from medfed.client.approval import MODEL_NAME as FIRST_MODEL_NAME
from medfed.client.local_calibration import held_out
from medfed.client.local_folder import local_folder, require_released
from medfed.client.personalize import Ticks, tuned_from
from medfed.client.site import Site
from medfed.client.subgroups import ALL, subgroups
from medfed.models import catalogue, parameters, tasks
from medfed.models.calibration import Floats, calibrated
from medfed.models.fine_tuning import looks, tune
from medfed.models.loading import TrainedModel, load
from medfed.models.records import Records
from medfed.models.tasks import meaning
from medfed.privacy.keystream import Keystream
from medfed.progress import Progress
from medfed.seams import Files
from medfed.study import Study
from medfed.wording import counted

FOLDER_NAME = "benefit"
SAMPLES = 1000
FEWEST_IN_GROUP = 10  # patients; of fewer no figure is given
GLOBAL, LOCAL_ONLY, PERSONALIZED = "global", "local only", "personalized"
MODELS = (GLOBAL, LOCAL_ONLY, PERSONALIZED)
DIFFERENCES = ((GLOBAL, LOCAL_ONLY), (PERSONALIZED, GLOBAL), (PERSONALIZED, LOCAL_ONLY))
_FEWEST_DEFINED = 0.9  # share of samples in which a metric must be defined for an interval


class Figure(TypedDict):
    """A metric and its 95 % interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


class Group(TypedDict):
    """All held-out patients, or those of one level of a category. ``models``: metric by metric; ``differences``: of the
    primary metric, as ``global - local only``; both empty of fewer than ``FEWEST_IN_GROUP`` patients."""

    group: str
    patients: int
    records: int
    models: dict[str, dict[str, Figure]]
    differences: dict[str, Figure]


class Benefit(TypedDict):
    """``benefit.json``. ``passes``: of the two models trained here, chosen among the training patients."""

    format: str
    study: str
    study_sha256: str
    model_sha256: str
    stamps: list[str]
    primary: str
    training_patients: int
    held_out_patients: int
    samples: int
    passes: dict[str, int]
    groups: list[Group]


def benefit(site: Site, run: Path) -> tuple[Benefit, Path]:
    """Train the two others, judge all three, write table, plot and JSON. Raises MF-310 where nobody is held out."""
    from medfed.client.benefit_page import page, picture
    from medfed.client.explanation_pictures import require_matplotlib

    require_matplotlib()
    trained = load(run, site.seams.files, site.config.policy.admit_code)
    require_released(trained, "judged as a released one")
    training, aside = held_out(site, trained.study)
    weights, passes = _three(site, run, trained, training)
    predicted = {name: _predicted(trained.study, each, aside) for name, each in weights.items()}
    found = _judged(trained, training, aside, predicted, passes)
    folder = local_folder(site.folder, trained) / FOLDER_NAME
    files = site.seams.files
    for place in (site.folder / "local", folder.parent, folder):
        files.make_folder(place, private=True)
    files.write(folder / "benefit.json", (json.dumps(found, indent=1) + "\n").encode(), private=True)
    files.write(folder / "benefit.md", page(found).encode(), private=True)
    files.write(folder / "benefit.png", picture(found), private=True)
    return found, folder


def _three(
    site: Site, run: Path, trained: TrainedModel, training: Records
) -> tuple[dict[str, NDArray[np.float32]], dict[str, int]]:
    """The weights of each of ``MODELS``, and how long the two were trained here."""
    personal = tuned_from(trained, training, "personalized model")
    first = _first_weights(site.seams.files, [run, site.study_folder(trained.study.hash())], trained.study)
    with Progress("local model", looks(), sys.stderr) as bar:
        alone = tune(trained.study, first, training, Ticks(bar))
    weights = {
        GLOBAL: parameters.flatten(trained.model),
        LOCAL_ONLY: alone.weights,
        PERSONALIZED: personal.weights,
    }
    return weights, {LOCAL_ONLY: alone.passes, PERSONALIZED: personal.passes}


def _first_weights(files: Files, folders: Sequence[Path], study: Study) -> NDArray[np.float32]:
    """Where the study began, if its first model is here; else fresh weights of the same model."""
    model = catalogue.build(study)
    for folder in folders:
        if files.exists(folder / FIRST_MODEL_NAME):
            data = files.read(folder / FIRST_MODEL_NAME)
            if parameters.file_hash(data) == study.model.first_model_sha256:
                return parameters.from_safetensors(model, data)
    return parameters.flatten(model)


def _predicted(study: Study, weights: NDArray[np.float32], records: Records) -> Floats:
    model = catalogue.build(study)
    parameters.assign(model, weights)
    return calibrated(study.task, tasks.predictions(model, study.task, records.inputs))


def _judged(
    trained: TrainedModel,
    training: Records,
    aside: Records,
    predicted: Mapping[str, Floats],
    passes: dict[str, int],
) -> Benefit:
    study = trained.study
    groups = [_group(study, name, chosen, aside, predicted) for name, chosen in subgroups(study, aside)]
    return Benefit(
        format="medfed-benefit-1",
        study=study.study.name,
        study_sha256=study.hash().hex(),
        model_sha256=trained.sha256,
        stamps=list(trained.stamps),
        primary=meaning(study.task).primary,
        training_patients=len(set(training.patients)),
        held_out_patients=len(set(aside.patients)),
        samples=SAMPLES,
        passes=passes,
        groups=groups,
    )


def _group(
    study: Study, name: str, chosen: NDArray[np.bool_], aside: Records, predicted: Mapping[str, Floats]
) -> Group:
    records = aside.subset(chosen)
    patients = len(set(records.patients))
    group = Group(group=name, patients=patients, records=len(records.patients), models={}, differences={})
    if patients < FEWEST_IN_GROUP:
        return group
    score = _scorer(study, records, {model: each[chosen] for model, each in predicted.items()})
    whole = score(np.arange(len(records.patients)))
    samples = [score(rows) for rows in resampled(records.patients, SAMPLES)]
    # subgroups show the primary metric alone: of more figures some differ by chance
    metrics = [meaning(study.task).primary] if name != ALL else list(next(iter(whole.values())))
    for model in MODELS:
        group["models"][model] = {
            metric: _figure(whole[model][metric], [each[model][metric] for each in samples]) for metric in metrics
        }
    primary = meaning(study.task).primary
    for one, other in DIFFERENCES:
        many = [_minus(each[one][primary], each[other][primary]) for each in samples]
        group["differences"][f"{one} - {other}"] = _figure(_minus(whole[one][primary], whole[other][primary]), many)
    return group


_Scored = dict[str, dict[str, float | None]]


def _scorer(study: Study, records: Records, predicted: Mapping[str, Floats]) -> Callable[[NDArray[np.int64]], _Scored]:
    task = meaning(study.task)
    return lambda rows: {model: task.metrics(each[rows], records.labels[rows]) for model, each in predicted.items()}


def resampled(patients: Sequence[str], samples: int) -> Iterator[NDArray[np.int64]]:
    """Rows int64[...] of as many patients as there are, drawn with replacement, all records of each: the same draws at every
    call."""
    ids, patient = np.unique(np.array(patients, np.str_), return_inverse=True)
    order = np.argsort(patient, kind="stable")
    own = np.split(order, np.cumsum(np.bincount(patient))[:-1])
    # a public key: there is no secret in which patients are drawn, and the same data give the same intervals
    stream = Keystream(hashlib.sha256(b"medfed/bootstrap/v1").digest())
    for _ in range(samples):
        drawn = (stream.words(len(ids)) % np.uint64(len(ids))).astype(np.int64)
        yield np.concatenate([own[place] for place in drawn])


def _figure(value: float | None, many: Sequence[float | None]) -> Figure:
    known = [each for each in many if each is not None]
    if value is None or len(known) < _FEWEST_DEFINED * len(many):
        return Figure(value=value, low=None, high=None)
    low, high = np.quantile(np.array(known), [0.025, 0.975]).tolist()
    return Figure(value=value, low=low, high=high)


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def in_words(found: Benefit, folder: Path) -> Iterator[str]:
    from medfed.client.benefit_page import shown

    for stamp in found["stamps"]:
        yield f"[{display.shown(stamp)}]"
    every = found["groups"][0]
    yield (
        f"{display.shown(found['study'])} on {counted(found['held_out_patients'], 'held-out patient')} of this hospital "
        f"({found['training_patients']} train), {found['primary']} with its 95 % interval:"
    )
    for model, figures in every["models"].items():
        yield f"  {model:<14} {shown(figures[found['primary']])}"
    for name, figure in every["differences"].items():
        yield f"  {name:<28} {shown(figure, signed=True)}"
    if not every["models"]:
        yield f"  fewer than {FEWEST_IN_GROUP} held-out patients: no figures"
    yield "Held-out patients judge fairly only if holdout in hospital.toml was the same while the study ran."
    yield f"Subgroups, all metrics and a plot: {folder}. They are about this hospital's patients: keep them here."
