"""From a task and a few decisions to a study: calibrated, pinned to its roster and first model, with comments to read."""

from __future__ import annotations

import importlib.resources
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from medfed.coupling import refuse_coupling
from medfed.data_contract import DataContract
from medfed.display import shown
from medfed.errors import ConfigError, PrivacyError
from medfed.model_choice import ModelChoice
from medfed.models import catalogue, parameters
from medfed.models.warm_start import WarmStart, take_over
from medfed.privacy import plan as plans
from medfed.roster import Roster
from medfed.seams import Files
from medfed.study import (
    Cohort,
    Deadlines,
    Header,
    LocalSteps,
    Metrics,
    Privacy,
    Quantization,
    Statistics,
    Study,
    Training,
    least_survivors,
)
from medfed.task_choice import Task
from medfed.toml_files import StrictModel, first_fault, read_values, validate

TEMPLATES = Path(str(importlib.resources.files("medfed.studies")))
FEWEST_HOSPITALS = 3


class TaskFile(StrictModel):
    """The part of a study that is medicine and optimisation: what is predicted from what, by which model.

    What carries the guarantee (epsilon, delta, mode, unit, colluders) is not in it: it is decided for each study.
    """

    purpose: Annotated[str, Field(min_length=1, max_length=500)]
    task: Task
    data: DataContract
    model: ModelChoice
    statistics: Statistics | None = None
    training: Training
    metrics: Metrics | None = None
    sampling_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    clipping_norm: Annotated[float, Field(gt=0.0, le=1000.0)]
    ring_bits: Literal[16, 32] = 32
    rounding: Literal["nearest", "stochastic"] = "nearest"
    deadlines: Deadlines


def template_names() -> list[str]:
    """Tasks that come with medfed."""
    return sorted(path.stem for path in TEMPLATES.glob("*.toml"))


def load_task(files: Files, name: str) -> TaskFile:
    """A task file by path, or one of ``template_names``. MF-203 if it is neither."""
    path = TEMPLATES / f"{name}.toml" if name in template_names() else Path(name)
    if not files.exists(path):
        raise ConfigError(
            203, f"task {shown(name)} is not known", f"name a file, or one of {', '.join(template_names())}"
        )
    values = read_values(files, path)
    refuse_coupling(values, path.name)
    return validate(values, path.name, TaskFile)


def template_text(files: Files, name: str) -> str:
    """A template as it is, comments and all: to copy and change. MF-203 if there is none of this name."""
    if name not in template_names():
        raise ConfigError(203, f"no task is called {shown(name)}", f"name one of {', '.join(template_names())}")
    return files.read(TEMPLATES / f"{name}.toml").decode()


@dataclass(frozen=True, slots=True)
class Decisions:
    """What the coordinator decides for one study. ``epsilon`` holds for all attempts together.

    ``drop_outs``: how many hospitals a round can do without; each takes a trip or two more of every round, and in
    ``distributed`` mode noise: shares are then sized for fewer. ``most_hospitals``: the most that may ever be in a sum, those
    who join later included; None for as many as are enrolled.
    """

    name: str
    expires: str
    epsilon: float
    delta: float
    mode: Literal["local", "distributed"]
    unit: Literal["patient", "record"]
    colluders: int
    drop_outs: int = 0
    most_hospitals: int | None = None


def plan_study(
    task: TaskFile, decisions: Decisions, roster: Roster, start: WarmStart | None = None
) -> tuple[Study, bytes]:
    """The study and its first model's safetensors file. The noise is calibrated for rounds and spares together.

    A model with random first weights takes them from torch's generator, seeded by the operating system: first weights
    are public and carry no secret. ``start``: first weights from a file instead, which are as public as it.

    Raises: ``ConfigError`` MF-151..153 for a file that does not fit, MF-203 for values no study may have, ``PrivacyError`` MF-140
    for fewer than 3 hospitals, MF-142 for too many drop-outs, MF-145 for a ring too narrow.
    """
    if len(roster.hospitals) < FEWEST_HOSPITALS:
        raise PrivacyError(
            140, f"{len(roster.hospitals)} hospitals are enrolled", "a sum needs at least 3: enroll more"
        )
    largest = max(entry.nominal_patients for entry in roster.hospitals)
    sum_range = _sum_range(task, largest)
    try:
        draft = Study(
            study=Header(format=1, name=decisions.name, purpose=task.purpose, expires=decisions.expires),
            task=task.task,
            data=task.data,
            model=task.model.model_copy(update={"first_model_sha256": "0" * 64}),
            statistics=_with_range(task.statistics, largest),
            training=_completed(task.training, sum_range),
            metrics=_metrics(task.metrics, largest),
            privacy=Privacy(
                unit=decisions.unit,
                adjacency="add-remove",
                mode=decisions.mode,
                sampling_rate=task.sampling_rate,
                clipping_norm=task.clipping_norm,
                noise_multiplier=1.0,
                delta=decisions.delta,
                epsilon=decisions.epsilon,
            ),
            quantization=Quantization(ring_bits=task.ring_bits, range=sum_range, rounding=task.rounding),
            cohort=_cohort(decisions, roster),
            deadlines=task.deadlines,
        )
    except ValidationError as error:
        raise ConfigError(
            203, f"these decisions make no study: {first_fault(error)}", "see medfed-server study new -h"
        ) from error
    model = catalogue.build(draft)
    if start is not None:
        take_over(model, start)
    model_file = parameters.to_safetensors(model, parameters.flatten(model))
    pinned = draft.model.model_copy(update={"first_model_sha256": parameters.file_hash(model_file)})
    if task.metrics is not None and task.metrics.noise_multiplier is None:
        draft = plans.calibrate_metrics(draft, decisions.epsilon)
    study = plans.calibrate(draft.model_copy(update={"model": pinned}), parameters.count(model), decisions.epsilon)
    if study.training.local is not None:
        study = _with_update_range(study, study.training.local, parameters.count(model), roster)
    plans.make_plan(study, parameters.count(model))
    return study, model_file


def _completed(training: Training, sum_range: float) -> Training:
    """With the bound of a local step's sum, where there are local steps and the task leaves it open."""
    if training.local is None or training.local.sum_range is not None:
        return training
    return training.model_copy(update={"local": training.local.model_copy(update={"sum_range": sum_range})})


def _with_range(statistics: Statistics | None, largest_hospital: int) -> Statistics | None:
    if statistics is None or statistics.range is not None:
        return statistics
    return statistics.model_copy(update={"range": _patients_at_most(largest_hospital)})


def _metrics(metrics: Metrics | None, largest_hospital: int) -> Metrics | None:
    """With what the task left open; the noise is calibrated afterwards."""
    if metrics is None:
        return None
    bound = _patients_at_most(largest_hospital) if metrics.range is None else metrics.range
    return metrics.model_copy(update={"range": bound, "noise_multiplier": metrics.noise_multiplier or 1.0})


def _patients_at_most(largest_hospital: int) -> float:
    """The bound of a hospital's sum of patients: none exceeds it that has at most an eighth more than it said."""
    return 2.0 ** math.ceil(math.log2(largest_hospital * 1.125))


def _with_update_range(study: Study, local: LocalSteps, words: int, roster: Roster) -> Study:
    """The study with a ring that holds the largest hospital's weighted update, with room to spare.

    All public: steps x learning rate x (what a step's mean clipped gradient can be, and eight standard deviations of the
    noise in it) x how much longer the local rule may step x that hospital's share of the patients. Four times that leaves room
    for training without clipping.
    """
    privacy, plan = study.privacy, plans.make_plan(study, words)
    largest = max(entry.nominal_patients for entry in roster.hospitals)
    expected = privacy.sampling_rate * largest
    most_patients = min(float(largest), expected + 6.0 * math.sqrt(expected))
    noise = 8.0 * math.sqrt(local.steps) * plan.noise_sd * 2.0**-plan.noise_exponent
    way = (
        local.learning_rate
        * local.longest_step
        * (local.steps * most_patients * privacy.clipping_norm + noise)
        / expected
    )
    bound = 4.0 * way * largest / roster.nominal_patients
    quantization = study.quantization.model_copy(update={"range": _power_of_two_above(bound)})
    return study.model_copy(update={"quantization": quantization})


def _cohort(decisions: Decisions, roster: Roster) -> Cohort:
    """Who is summed. Raises MF-142 for more drop-outs than the hospitals and colluders allow."""
    hospitals = len(roster.hospitals)
    most = hospitals - least_survivors(hospitals, decisions.colluders)
    if not 0 <= decisions.drop_outs <= most:
        raise PrivacyError(
            142,
            f"{decisions.drop_outs} drop-outs of {hospitals} hospitals with {decisions.colluders} colluders",
            f"a round of them can do without {most} at most",
        )
    return Cohort(
        hospitals=hospitals,
        colluders=decisions.colluders,
        fewest_survivors=hospitals - decisions.drop_outs,
        most_hospitals=hospitals if decisions.most_hospitals is None else decisions.most_hospitals,
        roster_sha256=roster.hash().hex(),
    )


def _sum_range(task: TaskFile, largest_hospital: int) -> float:
    """A power of two that no coordinate of a hospital's clipped sum exceeds if its size is as declared."""
    expected = task.sampling_rate * largest_hospital * task.clipping_norm
    spread = 6.0 * math.sqrt(task.sampling_rate * largest_hospital) * task.clipping_norm
    return _power_of_two_above(min(largest_hospital * task.clipping_norm, expected + spread))


def _power_of_two_above(bound: float) -> float:
    """MF-203 for what no study may have as a range: absurd rates and norms lead there."""
    if not 1e-300 < bound <= 2.0**29:  # a study's ranges end at 1e9
        raise ConfigError(203, f"a range of {bound:g} follows from the task", "correct its rates and its clipping norm")
    return 2.0 ** math.ceil(math.log2(bound))
