"""Measurements at irregular times -> float32[n, steps, channels], by the study's contract."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import Series, Variable
from medfed.errors import DataError
from medfed.models.cells import fault


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """What was measured, one row a record and time, in any order.

    ``records`` int64[m]: the index of the record that a row belongs to; ``hours`` float64[m]: finite, since the record's
    beginning; ``values`` float64[m, V]: in the order of the contract's variables, NaN where not observed; ``rows``
    int64[m]: what a row is called in an error, the line of its file. ``repr`` shows no content.
    """

    records: NDArray[np.int64] = field(repr=False)
    hours: NDArray[np.float64] = field(repr=False)
    values: NDArray[np.float64] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)


def encode_series(contract: Series, features: NDArray[np.float64], measurements: Measurements) -> NDArray[np.float32]:
    """float32[n, steps, 2V + 1 + p] as ``medfed.data_contract.Series`` documents; ``features``: float64[n, p], encoded.

    Raises: ``DataError`` MF-301 for a value outside its variable's range or infinite. Only rows within the steps are judged.

    *Guarantees*: a record's encoding depends on its own rows and their order alone.
    """
    count, steps, variables = len(features), contract.steps, len(contract.variables)
    with np.errstate(over="ignore"):  # of absurd times, which lie behind the last step
        step = np.floor(measurements.hours / contract.step_hours)
    taken = (step >= 0) & (step < steps)
    places = measurements.records[taken] * steps + step[taken].astype(np.int64)
    rows = measurements.rows[taken]
    encoded = np.zeros((count, steps, contract.channels(features.shape[1])), np.float32)
    for index, variable in enumerate(contract.variables):
        values = measurements.values[taken, index]
        seen = np.flatnonzero(~np.isnan(values))
        inside = _in_range(variable, values[seen], rows[seen])
        observed, means = _means(places[seen], inside, count * steps)
        scaled = np.where(observed, (means - variable.center) / variable.scale, 0.0).reshape(count, steps)
        seen_steps = observed.reshape(count, steps)
        encoded[:, :, index] = _carried_forward(scaled, seen_steps) if contract.fill == "forward" else scaled
        encoded[:, :, variables + index] = seen_steps
    encoded[:, :, 2 * variables] = _inside_the_stay(encoded[:, :, variables : 2 * variables])
    encoded[:, :, 2 * variables + 1 :] = features[:, None, :]
    return encoded


def _in_range(variable: Variable, values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    infinite = np.isinf(values)
    if infinite.any():
        raise _series_fault(rows, infinite, variable, "is not finite", "leave the cell empty")
    outside = (values < variable.minimum) | (values > variable.maximum)
    if variable.outside == "refuse" and outside.any():
        limits = f"[{variable.minimum:g}, {variable.maximum:g}] {variable.unit}"
        raise _series_fault(rows, outside, variable, f"is outside {limits}", "check the unit of the column")
    return np.clip(values, variable.minimum, variable.maximum)


def _series_fault(
    rows: NDArray[np.int64], wrong: NDArray[np.bool_], variable: Variable, what: str, remedy: str
) -> DataError:
    return in_series(fault(int(rows[wrong].min()), variable.name, what, remedy))


def in_series(found: DataError) -> DataError:
    """The same fault, told apart from one of the table with the patients."""
    return DataError(found.code, f"in the series, {found.what}", found.remedy)


def _means(
    places: NDArray[np.int64], values: NDArray[np.float64], size: int
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which of ``size`` places hold a value, and the mean there: summed in the order of the rows, each place for itself."""
    counts = np.bincount(places, minlength=size)
    sums = np.bincount(places, weights=values, minlength=size)
    return counts > 0, sums / np.maximum(counts, 1)


def _carried_forward(values: NDArray[np.float64], observed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Each step's last observed value so far, 0 before the first."""
    last = np.maximum.accumulate(np.where(observed, np.arange(values.shape[1]), -1), axis=1)
    return np.where(last >= 0, np.take_along_axis(values, np.maximum(last, 0), axis=1), 0.0)


def _inside_the_stay(observed: NDArray[np.float32]) -> NDArray[np.bool_]:
    """bool[n, steps]: up to and including the last step with a measurement; the first step always."""
    steps = np.arange(observed.shape[1])
    last = np.where(observed.any(axis=2), steps, 0).max(axis=1)
    return np.asarray(steps <= last[:, None])
