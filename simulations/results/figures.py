"""What the cells of a cohort come to: means over splits, floors met or missed, how far chance alone may move a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medfed.simulations.results.cells import Cell, GroupFigure, Measured
from medfed.simulations.results.protocol import Arm, Floors, Mode, Row

FEWEST_OF_A_CLASS = 10  # a hospital or subgroup with fewer test patients of a class, on average, is not compared


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean and sample standard deviation (None of one value) of a figure over the splits that were measured."""

    value: float
    deviation: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Judged:
    """A floor and what was reached; ``reached`` None: not measured on every split."""

    floors: Floors
    epsilon: float | None
    least: float
    reached: float | None

    @property
    def is_met(self) -> bool:
        """Of the unrounded mean."""
        return self.reached is not None and self.reached >= self.least


def cells_of(measured: Measured, row: Row, arm: Arm, epsilon: float | None, mode: Mode | None) -> list[Cell]:
    """By split, those that have figures. Without privacy the modes are one and the same."""
    mode = "distributed" if arm == "federation" and epsilon is None else mode
    return [
        cell
        for cell in measured.cells
        if (cell.arm, cell.epsilon, cell.mode) == (arm, epsilon, mode)
        and cell.seed in row.seeds
        and cell.failed is None
    ]


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """Of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Mean(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, len(known))


def metric(cells: Sequence[Cell], name: str) -> Mean | None:
    return mean_of(cell.metrics.get(name) for cell in cells)


def mean_single(cells: Sequence[Cell]) -> Mean | None:
    """The mean over hospitals of models trained alone, then over splits."""
    return mean_of(
        None if (found := mean_of(one.value for one in cell.hospitals.values())) is None else found.value
        for cell in cells
    )


def judge(row: Row, measured: Measured) -> list[Judged]:
    """Every floor of a cohort, beside the federation in distributed mode."""
    found = []
    for floors in row.floors:
        for epsilon, least in floors.least.items():
            mean = metric(cells_of(measured, row, "federation", epsilon, "distributed"), row.metric)
            reached = mean.value if mean is not None and mean.count == len(row.seeds) else None
            found.append(Judged(floors, epsilon, least, reached))
    return found


def groups(cells: Sequence[Cell], kind: str) -> dict[str, Mean]:
    """Mean over splits of each hospital's or subgroup's figure, of those with enough test patients of every class."""
    by_name: dict[str, list[GroupFigure]] = {}
    for cell in cells:
        for name, figure in (cell.hospitals if kind == "hospitals" else cell.subgroups).items():
            by_name.setdefault(name, []).append(figure)
    found: dict[str, Mean] = {}
    for name, figures in by_name.items():
        mean = mean_of(figure.value for figure in figures)
        if mean is not None and np.mean([figure.fewest for figure in figures]) >= FEWEST_OF_A_CLASS:
            found[name] = mean
    return found


def left_out(cells: Sequence[Cell]) -> list[str]:
    """Hospitals with too few test patients of some class to be compared."""
    named = {name for cell in cells for name in cell.hospitals}
    return sorted(named - set(groups(cells, "hospitals")))


def worst(cells: Sequence[Cell]) -> tuple[str, Mean] | None:
    """The hospital whose own test patients fare worst."""
    found = groups(cells, "hospitals")
    if not found:
        return None
    name = min(found, key=lambda each: found[each].value)
    return name, found[name]


def standard_error(row: Row, cell: Cell) -> float | None:
    """Of one split's figure, from the size of its test set alone: of AUC by Hanley and McNeil (1982), of accuracy binomial.

    None for other metrics, and of AUC over more than two classes.
    """
    value = cell.metrics.get(row.metric)
    if value is None or not cell.classes:
        return None
    if row.metric == "accuracy":
        return math.sqrt(value * (1.0 - value) / sum(cell.classes))
    if row.metric != "auc" or len(cell.classes) != 2 or min(cell.classes) == 0:
        return None
    negatives, positives = cell.classes
    both_positive, both_negative = value / (2.0 - value), 2.0 * value * value / (1.0 + value)
    variance = value * (1.0 - value)
    variance += (positives - 1) * (both_positive - value * value) + (negatives - 1) * (both_negative - value * value)
    return math.sqrt(max(0.0, variance) / (positives * negatives))
