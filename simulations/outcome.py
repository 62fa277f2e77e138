"""What a rehearsal came to: one federation's scores on the test patients, and the result of several splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from medfed import metrics
from medfed.client.outlook import some_attempts
from medfed.models import catalogue, parameters, tasks
from medfed.models.records import Records
from medfed.models.tasks.meaning import Scores as TaskScores
from medfed.privacy.statement import NOT_PRIVATE, SIMULATION
from medfed.server.assignment import Assignment
from medfed.server.ending import RunRecord, versions
from medfed.server.results import held_out_metrics
from medfed.server.store import Checkpoint
from medfed.simulations.extract import Cohort
from medfed.simulations.pooled import Pooled, pooled_records, score, train_pooled
from medfed.study import Study
from medfed.wording import asked_attempts

SIMULATED = SIMULATION
NO_NOISE = f"{NOT_PRIVATE}: no noise"
SEEDED = f"{NOT_PRIVATE}: seeded randomness"


@dataclass(frozen=True, slots=True)
class HospitalScore:
    """One hospital's test patients. ``metric``: the task's primary one; None where undefined, as AUC of one class."""

    name: str
    records: int
    metric: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A model on the test patients: all together, and hospital by hospital.

    ``primary``: the name of the metric that stands for the task; ``metrics``: all of them, on all test patients together.
    ``predictions``: float64[n, ...] and ``labels``: int64[n, ...] as ``models/tasks`` has them.
    """

    primary: str
    metrics: TaskScores
    hospitals: tuple[HospitalScore, ...]
    predictions: NDArray[np.float64]
    labels: NDArray[np.int64]

    @property
    def metric(self) -> float | None:
        return self.metrics[self.primary]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One federation's end, scored outside it.

    ``weights``: float32[d]; ``metric_by_round``: the primary one, all test patients together, after each of
    ``rounds_scored``; ``pooled``: the baseline, if one was trained; ``seconds``: from the first key to the final model;
    ``overhead_s``: of each round, what was not the slowest hospital's training; ``record``: what proves it, None where a
    coordinator of its own wrote that down.
    """

    cohort: Cohort
    assignment: Assignment
    checkpoint: Checkpoint
    weights: NDArray[np.float32]
    scores: Scores
    metric_by_round: tuple[float | None, ...]
    rounds_scored: tuple[int, ...]
    pooled: Pooled | None
    pooled_metric: float | None
    seconds: float
    overhead_s: tuple[float, ...]
    record: RunRecord | None

    def epsilon_by_attempt(self) -> dict[int, float]:
        """Epsilon of a patient who trains once so many attempts at training are spent: of some to the end of their list, of
        those that were used, and of none. Statistics are paid for with the first."""
        plan, training = self.assignment.plan, self.assignment.study.training
        shown = {*some_attempts(training.rounds, training.attempts), self.trained_attempts}
        return {0: 0.0} | {attempts: plan.trained_epsilon_after(attempts) for attempts in sorted(shown)}

    @property
    def trained_attempts(self) -> int:
        """Attempts at training that were used, lost ones among them: those after the statistics and before the metrics."""
        study, records = self.assignment.study, self.checkpoint.records
        before = 0 if study.statistics is None else records[0].attempt
        return records[study.sums_to_train - 1].attempt - before

    @property
    def attempts_asked(self) -> str:
        """``15 rounds, 3 spare attempts and 2 attempts at the metrics``: what every hospital approved."""
        study = self.assignment.study
        return asked_attempts(
            study.training.rounds,
            study.training.spare_attempts,
            0 if study.statistics is None else study.statistics.attempts,
            0 if study.metrics is None else study.metrics.attempts,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """``result.json``: the keys of every run. Means are over splits; seconds are of one federation.

    ``metric``: the name of the one that stands for the task, ``chance``: what guessing reaches of it. ``test_metric``: of
    all test patients together, ``test_metrics``: with all others; ``cross_validated_metric``: those of all folds together,
    each scored by the model that did not train on it, where the splits are folds.
    ``epsilon``: of the approved list of attempts, the largest over splits; None without noise.
    ``held_out_metrics``: of each split what the federation itself measured, through the masked sum, where it was asked to.
    ``rounds``: of training; ``released_sums``: those with statistics and metrics, where there are any.
    ``epsilon_spent``: of whoever has paid more, a patient who trains or one held out for the metrics.
    ``upload_bytes_per_round``: of one hospital. ``dropped``: how many uploads the released sums do without, over all rounds and
    splits. ``pooled_rounds``: the baseline's length, in rounds or, of ordinary training, in passes. ``training_patients``: of
    the first split, held-out ones among them. ``joint_sums``: whether hospitals' sums were worked out together, and so are
    those of hospital by hospital (``--exact``) to within one step of the grid only.
    """

    cohort: str
    hospitals: int
    rounds: int
    epsilon: float | None
    delta: float
    unit: str
    mode: str
    accountant: str
    colluders: int
    seconds: float
    seconds_per_round: float
    overhead_s_per_round: float
    upload_bytes_per_round: int
    dropped: int
    evaluation: str
    metric: str
    chance: float
    test_metric: float | None
    test_metric_sd: float | None
    test_metrics: dict[str, float | None]
    pooled_metric: float | None
    seeds: tuple[int | None, ...]
    test_metric_by_seed: tuple[float | None, ...]
    per_hospital: dict[str, float | None]
    epsilon_spent: float | None
    attempts: int
    attempts_approved: int
    released_sums: int
    pooled_rounds: tuple[int | None, ...]
    cross_validated_metric: float | None
    training_patients: int
    held_out_metrics: tuple[dict[str, object], ...]
    joint_sums: bool
    stamps: tuple[str, ...]
    versions: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """The dictionary of ``result.json``: with the names that runs of classifiers have always had, None of another task."""
        has_area = self.metric == "auc"
        values: dict[str, object] = asdict(self)
        known: dict[str, object] = {name: values.pop(name) for name in ("cohort", "hospitals", "rounds")}
        known["test_auc"] = self.test_metric if has_area else None
        known["test_auc_sd"] = self.test_metric_sd if has_area else None
        known["pooled_auc"] = self.pooled_metric if has_area else None
        values["test_auc_by_seed"] = self.test_metric_by_seed if has_area else None
        values["cross_validated_auc"] = self.cross_validated_metric if has_area else None
        others = {f"test_{name}": self.test_metrics.get(name) for name in ("accuracy", "f1_macro")}
        return known | values | others


def score_cohort(cohort: Cohort, study: Study, weights: NDArray[np.float32]) -> Scores:
    """A model's weights float32[d] on a public cohort's test patients, outside the federation."""
    return _score_parts(cohort, study, weights, [hospital.test.encode(study) for hospital in cohort.hospitals])


def _score_parts(cohort: Cohort, study: Study, weights: NDArray[np.float32], parts: Sequence[Records]) -> Scores:
    test = pooled_records(parts)
    model = catalogue.build(study)
    parameters.assign(model, weights)
    primary = tasks.meaning(study.task).primary
    predictions = tasks.predictions(model, study.task, test.inputs)
    hospitals, start = [], 0
    for hospital, part in zip(cohort.hospitals, parts, strict=True):
        mine = tasks.metrics(study.task, predictions[start : start + len(part.labels)], part.labels)
        hospitals.append(HospitalScore(hospital.name, len(part.labels), mine[primary]))
        start += len(part.labels)
    together = tasks.metrics(study.task, predictions, test.labels)
    return Scores(primary, together, tuple(hospitals), predictions, test.labels)


def make_outcome(
    cohort: Cohort,
    assignment: Assignment,
    checkpoint: Checkpoint,
    weights: NDArray[np.float32],
    history: Mapping[int, NDArray[np.float32]],
    train_seconds: Mapping[int, float],
    seconds: float,
    record: RunRecord | None,
    has_baseline: bool = True,
) -> Outcome:
    """Score a finished federation, and train and score the baseline on the same split."""
    study = assignment.study
    parts = [hospital.test.encode(study) for hospital in cohort.hospitals]
    test = pooled_records(parts)
    training = pooled_records([hospital.training.encode(study) for hospital in cohort.hospitals])
    pooled = train_pooled(study, assignment.first.weights.astype(np.float32), training) if has_baseline else None
    return Outcome(
        cohort=cohort,
        assignment=assignment,
        checkpoint=checkpoint,
        weights=weights,
        scores=_score_parts(cohort, study, weights, parts),
        metric_by_round=tuple(score(study, history[number], test) for number in sorted(history)),
        rounds_scored=tuple(sorted(history)),
        pooled=pooled,
        pooled_metric=None if pooled is None else score(study, pooled.weights, test),
        seconds=seconds,
        overhead_s=tuple(
            done.seconds - train_seconds[done.attempt] for done in checkpoint.records if done.attempt in train_seconds
        ),
        record=record,
    )


def stamps(cohort: Cohort, *, noise: bool, seeded: bool) -> tuple[str, ...]:
    """What a rehearsal on this cohort must not be mistaken for."""
    return (SIMULATED, *cohort.stamps, *[NO_NOISE] * (not noise), *[SEEDED] * seeded)


def summarize(outcomes: Sequence[Outcome], *, noise: bool, seeded: bool, joint: bool = False) -> Result:
    """One result for the same study on several splits."""
    first = outcomes[0]
    study, plan = first.assignment.study, first.assignment.plan
    values = [outcome.scores.metric for outcome in outcomes]
    records = [record for outcome in outcomes for record in outcome.checkpoint.records]
    overhead = [seconds for outcome in outcomes for seconds in outcome.overhead_s]
    return Result(
        cohort=first.cohort.name,
        hospitals=study.cohort.hospitals,
        rounds=study.training.rounds,
        metric=first.scores.primary,
        chance=tasks.meaning(study.task).chance,
        test_metric=mean(values),
        test_metric_sd=_deviation(values),
        test_metrics={
            name: mean([outcome.scores.metrics[name] for outcome in outcomes]) for name in first.scores.metrics
        },
        pooled_metric=mean([outcome.pooled_metric for outcome in outcomes]),
        epsilon=max(outcome.assignment.plan.epsilon for outcome in outcomes) if noise else None,
        delta=study.privacy.delta,
        unit=study.privacy.unit,
        mode=study.privacy.mode,
        accountant=plan.bounds.accountant,
        colluders=study.cohort.colluders,
        seconds=round(float(np.mean([outcome.seconds for outcome in outcomes])), 4),
        seconds_per_round=round(float(np.mean([record.seconds for record in records])), 4),
        overhead_s_per_round=round(float(np.mean(overhead)), 4) if overhead else 0.0,
        upload_bytes_per_round=max(record.upload_bytes for record in records),
        dropped=sum(study.cohort.hospitals - len(record.survivors) for record in records),
        evaluation=first.cohort.evaluation,
        seeds=tuple(outcome.cohort.seed for outcome in outcomes),
        test_metric_by_seed=tuple(values),
        per_hospital={
            hospital.name: mean([outcome.scores.hospitals[place].metric for outcome in outcomes])
            for place, hospital in enumerate(first.scores.hospitals)
        },
        epsilon_spent=max(spent(outcome) for outcome in outcomes) if noise else None,
        attempts=max(outcome.checkpoint.last_attempt for outcome in outcomes),
        attempts_approved=plan.attempts,
        released_sums=study.released_sums,
        pooled_rounds=tuple(None if outcome.pooled is None else outcome.pooled.rounds for outcome in outcomes),
        cross_validated_metric=_cross_validated(outcomes),
        training_patients=sum(len(set(hospital.training.patients)) for hospital in first.cohort.hospitals),
        held_out_metrics=tuple(
            found.to_json() for found in (measured(outcome, noised=noise) for outcome in outcomes) if found is not None
        ),
        joint_sums=joint,
        stamps=stamps(first.cohort, noise=noise, seeded=seeded),
        versions=versions(),
    )


def _cross_validated(outcomes: Sequence[Outcome]) -> float | None:
    """One metric over the test patients of all folds; None where the splits are not folds, or only one."""
    folds = {outcome.cohort.seed for outcome in outcomes if outcome.cohort.folds is not None}
    if len(folds) != len(outcomes) or len(folds) < 2:
        return None
    predictions = np.concatenate([outcome.scores.predictions for outcome in outcomes])
    labels = np.concatenate([outcome.scores.labels for outcome in outcomes])
    return tasks.metrics(outcomes[0].assignment.study.task, predictions, labels)[outcomes[0].scores.primary]


def spent(outcome: Outcome) -> float:
    """Epsilon of the attempts that were used."""
    return outcome.assignment.plan.epsilon_after(outcome.checkpoint.last_attempt)


def measured(outcome: Outcome, *, noised: bool) -> metrics.Metrics | None:
    """What the federation itself says of its model; None where it was not asked."""
    return held_out_metrics(outcome.assignment, outcome.checkpoint, noised=noised)


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _deviation(values: Sequence[float | None]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
