"""``medfed-simulate evaluate``: the model that a run left, scored again on the public cohort's test patients.

Only for public cohorts: in a real federation exact metrics never leave a hospital.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.errors import ConfigError
from medfed.models import catalogue, parameters
from medfed.seams import Seams
from medfed.simulations.cohorts import COHORTS, load_cohort
from medfed.simulations.outcome import score_cohort
from medfed.simulations.run_folder import RESULT_NAME
from medfed.simulations.runs import MODEL_NAME, STUDY_NAME
from medfed.study import load_study

LIMIT_BYTES = 1 << 24


class _Recorded(BaseModel):
    """The keys of ``result.json`` that say which split the model belongs to; the others are not needed here."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    cohort: str
    hospitals: Annotated[int, Field(ge=1)]
    seeds: list[int | None]
    test_metric_by_seed: list[float | None]
    training_patients: int
    stamps: list[str]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model on its run's first split. ``as_recorded``: whether ``result.json`` says the same, to the last digit."""

    cohort: str
    split_seed: int
    test_records: int
    metric: str
    test_metric: float | None
    test_metrics: dict[str, float | None]
    per_hospital: dict[str, float | None]
    recorded_test_metric: float | None
    as_recorded: bool
    evaluation: str
    stamps: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The dictionary of ``medfed-simulate evaluate --json``."""
        accuracy, has_area = self.test_metrics.get("accuracy"), self.metric == "auc"
        return {**asdict(self), "test_auc": self.test_metric if has_area else None, "test_accuracy": accuracy}


def evaluate_run(folder: Path, seams: Seams) -> Evaluation:
    """Score ``model.safetensors`` of a run. Raises MF-606 if files are missing, MF-201 or MF-203 if it is no run of ours."""
    recorded = _recorded(folder, seams)
    seed = recorded.seeds[0]
    if seed is None or recorded.cohort not in COHORTS:
        raise ConfigError(203, "this run was made from a cohort of your own", "score it where its patients are")
    study = load_study(seams.files, folder / STUDY_NAME)
    model_file = seams.files.read(folder / MODEL_NAME)
    weights = parameters.from_safetensors(catalogue.build(study), model_file)
    is_synthetic = COHORTS[recorded.cohort].is_synthetic
    patients = recorded.training_patients // recorded.hospitals if is_synthetic else None
    cohort = load_cohort(seams.files, recorded.cohort, seed, recorded.hospitals, patients)
    scores = score_cohort(cohort, study, weights)
    return Evaluation(
        cohort=cohort.name,
        split_seed=seed,
        test_records=sum(hospital.records for hospital in scores.hospitals),
        metric=scores.primary,
        test_metric=scores.metric,
        test_metrics=scores.metrics,
        per_hospital={hospital.name: hospital.metric for hospital in scores.hospitals},
        recorded_test_metric=recorded.test_metric_by_seed[0],
        as_recorded=scores.metric == recorded.test_metric_by_seed[0],
        evaluation=cohort.evaluation,
        stamps=tuple(recorded.stamps),
    )


def _recorded(folder: Path, seams: Seams) -> _Recorded:
    data = seams.files.read(folder / RESULT_NAME, limit_bytes=LIMIT_BYTES)
    try:
        recorded = _Recorded.model_validate_json(data)
    except ValidationError:
        raise ConfigError(201, f"{RESULT_NAME} is not what medfed-simulate run writes", "name a run's folder") from None
    if not recorded.seeds or len(recorded.seeds) != len(recorded.test_metric_by_seed):
        raise ConfigError(203, f"{RESULT_NAME} names no split", "name a run's folder")
    return recorded
