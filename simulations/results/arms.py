"""One cell: a training of one arm on one split, by the code that every other run uses, and its figures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.models.records import Records
from medfed.seams import Seams
from medfed.server.assignment import Assignment
from medfed.server.daemon import load_assignment
from medfed.server.setup import CONFIG_NAME, load_office
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.extract import Cohort
from medfed.simulations.pooled import pooled_records, train_pooled
from medfed.simulations.quiet import quiet_parties
from medfed.simulations.rehearsal import Rehearsal, lay_out, rehearse
from medfed.simulations.results import opacus_peer
from medfed.simulations.results.cells import GroupFigure
from medfed.simulations.results.protocol import COLLUDERS, Arm, Key, Mode, Row
from medfed.simulations.results.scores import Figures, figures, scores_of
from medfed.simulations.threads import one_torch_thread
from medfed.study import Study


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A cohort split once, its study and first weights float32[d] as the federation without noise would have them."""

    row: Row
    cohort: Cohort
    study: Study
    first: NDArray[np.float32]
    training: tuple[Records, ...]
    test: tuple[Records, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What one training came to; see ``Cell``."""

    figures: Figures | None
    study: str
    spent: float | None = None
    setting: str | None = None
    tried: dict[str, float | None] | None = None
    failed: str | None = None


def open_split(row: Row, seed: int, seams: Seams) -> Split:
    """The cohort on split ``seed``, with the row's study and delta, and every record encoded."""
    cohort = replace(load_cohort(seams.files, row.cohort, seed, None), delta=row.delta, task=row.task, seed=seed)
    with tempfile.TemporaryDirectory() as place, quiet_parties():
        lay_out(Path(place), cohort, _plan(None, "distributed", seed), seams)
        assignment = load_assignment(load_office(seams, Path(place) / "coordinator" / CONFIG_NAME))
    study = assignment.study
    return Split(
        row,
        cohort,
        study,
        assignment.first.weights.astype(np.float32),
        tuple(hospital.training.encode(study) for hospital in cohort.hospitals),
        tuple(hospital.test.encode(study) for hospital in cohort.hospitals),
    )


def measure_cell(split: Split, key: Key, seams: Seams, setting: str | None = None) -> Found:
    """Train and score one cell. ``setting``: Opacus's, by name, where the arm is ``opacus``."""
    if key.arm == "opacus":
        return _opacus(split, key, setting)
    arms: dict[Arm, Callable[[Split, Key, Seams], Found]] = {
        "pooled": _pooled,
        "single": _single,
        "federation": _federation,
        "opacus-choice": _choose,
    }
    return arms[key.arm](split, key, seams)


def _pooled(split: Split, key: Key, seams: Seams) -> Found:
    trained = train_pooled(split.study, split.first, pooled_records(split.training))
    unit = "passes of Adam" if trained.is_ordinary else "rounds of the recipe"
    return Found(_score(split, trained.weights), _hash(split.study), setting=f"{trained.rounds} {unit}")


def _single(split: Split, key: Key, seams: Seams) -> Found:
    """Each hospital trains alone as the pooled baseline does; its model is scored on everybody's test patients."""
    row, test = split.row, pooled_records(split.test)
    weights = {
        hospital.name: train_pooled(split.study, split.first, records).weights
        for hospital, records in zip(split.cohort.hospitals, split.training, strict=True)
    }
    values = {name: scores_of(split.study, each, test)[row.metric] for name, each in weights.items()}
    best = max(values, key=lambda name: _or_worst(values[name]))
    found = _score(split, weights[best])
    size = len(test.labels)
    by_trainer = {
        name: GroupFigure(value=value, records=size, fewest=min(found.classes)) for name, value in values.items()
    }
    return Found(replace(found, hospitals=by_trainer), _hash(split.study), setting=f"best: {best}")


def _federation(split: Split, key: Key, seams: Seams) -> Found:
    plan = _plan(key.epsilon, key.mode or "distributed", key.seed)
    with tempfile.TemporaryDirectory() as place, quiet_parties(), one_torch_thread():
        done = rehearse(Path(place), split.cohort, plan, seams)
    found = figures(split.row, split.cohort, done.assignment.study, split.test, done.weights)
    spent = None if key.epsilon is None else _spent(done.assignment, done.checkpoint.last_attempt)
    return Found(found, _hash(done.assignment.study), spent=spent)


def _choose(split: Split, key: Key, seams: Seams) -> Found:
    """Every setting on four fifths of the training patients, scored on the fifth that was held out."""
    records = pooled_records(split.training)
    held = opacus_peer.held_out(records)
    tried: dict[str, float | None] = {}
    failed = None
    for setting in opacus_peer.SETTINGS:
        try:
            trained = _train_by_opacus(split, key, records.subset(~held), setting)
            tried[setting.name] = scores_of(split.study, trained.weights, records.subset(held))[split.row.metric]
        except opacus_peer.Refused as error:
            failed = str(error)
            break
    best = max(tried, key=lambda name: _or_worst(tried[name])) if failed is None else None
    return Found(None, _hash(split.study), setting=best, tried=tried, failed=failed)


def _opacus(split: Split, key: Key, setting: str | None) -> Found:
    if setting is None:
        return Found(None, _hash(split.study), failed="its setting could not be chosen")
    try:
        trained = _train_by_opacus(split, key, pooled_records(split.training), opacus_peer.setting_named(setting))
    except opacus_peer.Refused as error:
        return Found(None, _hash(split.study), failed=str(error))
    return Found(_score(split, trained.weights), _hash(split.study), spent=trained.epsilon, setting=setting)


def _train_by_opacus(split: Split, key: Key, records: Records, setting: opacus_peer.Setting) -> opacus_peer.Trained:
    if key.epsilon is None:
        raise ValueError("Opacus is compared at an epsilon")
    return opacus_peer.train_by_opacus(
        split.study, split.first, records, key.epsilon, split.row.delta, setting, key.seed
    )


def _plan(epsilon: float | None, mode: Mode, seed: int) -> Rehearsal:
    """Seeded, so that a figure can be measured again."""
    return Rehearsal(epsilon=epsilon, mode=mode, colluders=COLLUDERS, seed=seed)


def _score(split: Split, weights: NDArray[np.float32]) -> Figures:
    return figures(split.row, split.cohort, split.study, split.test, weights)


def _spent(assignment: Assignment, attempts: int) -> float:
    return assignment.plan.epsilon_after(attempts)


def _or_worst(value: float | None) -> float:
    return -np.inf if value is None else value


def _hash(study: Study) -> str:
    return study.hash().hex()
