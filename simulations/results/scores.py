"""A model's figures on the test patients: all together, hospital by hospital, subgroup by subgroup."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.models import catalogue, parameters, tasks
from medfed.models.cells import canonical
from medfed.models.records import Records
from medfed.simulations.extract import Cohort
from medfed.simulations.pooled import pooled_records
from medfed.simulations.results.cells import GroupFigure
from medfed.simulations.results.protocol import Row
from medfed.study import Study

DECIMALS = 6


@dataclass(frozen=True, slots=True)
class Figures:
    """``classes``: how many test records each class has; see ``Cell`` for the others."""

    metrics: dict[str, float | None]
    hospitals: dict[str, GroupFigure]
    subgroups: dict[str, GroupFigure]
    classes: list[int]


def scores_of(study: Study, weights: NDArray[np.float32], records: Records) -> dict[str, float | None]:
    """The task's metrics by name, of weights float32[d]: the one place where this package asks for them."""
    model = catalogue.build(study)
    parameters.assign(model, weights)
    return {
        name: None if value is None else round(value, DECIMALS)
        for name, value in tasks.evaluate(model, study.task, records).items()
    }


def figures(
    row: Row, cohort: Cohort, study: Study, parts: tuple[Records, ...], weights: NDArray[np.float32]
) -> Figures:
    """``parts``: the test records of each hospital of the cohort, encoded."""
    test = pooled_records(parts)
    counts = _classes(study, test)
    hospitals = {
        hospital.name: _group(row, study, part, weights, len(counts))
        for hospital, part in zip(cohort.hospitals, parts, strict=True)
    }
    return Figures(
        scores_of(study, weights, test), hospitals, _subgroups(row, cohort, study, test, weights, len(counts)), counts
    )


def _subgroups(
    row: Row, cohort: Cohort, study: Study, test: Records, weights: NDArray[np.float32], classes: int
) -> dict[str, GroupFigure]:
    if row.subgroup is None:
        return {}
    raw = [cell for one in cohort.hospitals for cell in one.test.columns[row.subgroup.feature]]
    cells = np.array([canonical(cell.strip()) if cell.strip() else "" for cell in raw], np.str_)
    return {
        level: _group(row, study, test.subset(cells == level), weights, classes)
        for level in row.subgroup.levels
        if (cells == level).any()
    }


def _group(row: Row, study: Study, records: Records, weights: NDArray[np.float32], classes: int) -> GroupFigure:
    if not len(records.labels):
        return GroupFigure(value=None, records=0, fewest=0)
    counts = _classes(study, records, classes)
    return GroupFigure(
        value=scores_of(study, weights, records)[row.metric], records=len(records.labels), fewest=min(counts)
    )


def _classes(study: Study, records: Records, least: int = 1) -> list[int]:
    """Records of each class, or of whatever else the task keeps in balance (of survival: whether it was observed)."""
    strata = tasks.meaning(study.task).strata(records.labels)
    return [int(count) for count in np.bincount(strata, minlength=least)]
