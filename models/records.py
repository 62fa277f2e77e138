"""Raw columns -> encoded records, by a study's data contract. Names rows and columns in errors, never values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import CategoryFeature, NumericFeature
from medfed.errors import DataError
from medfed.study import Study

MISSING = frozenset({"", "?", "NA", "N/A", "na", "n/a", "nan", "NaN", "NAN", "null", "NULL", "None"})


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Encoded records. ``inputs`` float32[n, p]; ``labels`` int64[n]; ``patients``: the id of each record's patient."""

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    patients: tuple[str, ...]

    def subset(self, keep: NDArray[np.bool_]) -> Records:
        """The records where ``keep`` bool[n] holds."""
        chosen = tuple(patient for patient, kept in zip(self.patients, keep, strict=True) if kept)
        return Records(self.inputs[keep], self.labels[keep], chosen)


def encode_records(
    study: Study,
    patients: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    rows: Sequence[int] | None = None,
) -> Records:
    """Encode raw text columns; ``DataError`` MF-301 for a missing column, a missing, unreadable or out-of-range value.

    ``rows[i]``: what record i is called in an error, the line of its file; without it records count from 1.
    """
    for name in [feature.name for feature in study.data.features] + [study.task.label]:
        if name not in columns:
            remedy = f'write {name} = "YOUR COLUMN" under [data.columns] in hospital.toml'
            raise DataError(301, f"column {name} is missing", remedy)
    named = range(1, len(patients) + 1) if rows is None else rows
    blocks = [
        _numbers(feature, columns[feature.name], named)
        if isinstance(feature, NumericFeature)
        else _indicators(feature, columns[feature.name], named)
        for feature in study.data.features
    ]
    inputs = np.concatenate(blocks, axis=1).astype(np.float32) if blocks else np.zeros((len(patients), 0), np.float32)
    return Records(inputs, _labels(study, columns[study.task.label], named), tuple(patients))


def _numbers(feature: NumericFeature, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.float64]:
    values = np.empty((len(cells), 1))
    for index, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        values[index, 0] = _number(feature, cell.strip(), row)
    return (values - feature.center) / feature.scale


def _number(feature: NumericFeature, cell: str, row: int) -> float:
    if cell in MISSING:
        if feature.missing is None:
            raise _fault(row, feature.name, "is missing", "the study names no value for missing ones; drop the row")
        return feature.missing
    try:
        value = float(cell)
    except ValueError:
        raise _fault(row, feature.name, "is not a number", "write numbers with a decimal point") from None
    if not math.isfinite(value):
        raise _fault(row, feature.name, "is not finite", "leave the cell empty or drop the row")
    if feature.minimum <= value <= feature.maximum:
        return value
    if feature.outside == "clip":
        return min(max(value, feature.minimum), feature.maximum)
    limits = f"[{feature.minimum:g}, {feature.maximum:g}] {feature.unit}"
    raise _fault(row, feature.name, f"is outside {limits}", "check the unit of the column")


def _indicators(feature: CategoryFeature, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.float64]:
    place = {_canonical(level): index for index, level in enumerate(feature.levels)}
    indicators = np.zeros((len(cells), feature.width))
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        text = cell.strip()
        if text in MISSING and text not in place:
            if feature.missing is None:
                raise _fault(row, feature.name, "is missing", "the study names no level for missing ones; drop the row")
            text = feature.missing
        index = place.get(_canonical(text))
        if index is None:
            raise _fault(row, feature.name, "is none of the study's levels", "see the levels in study.toml")
        if index > 0:
            indicators[record, index - 1] = 1.0
    return (indicators - feature.center) / feature.scale


def _canonical(text: str) -> str:
    """A level written as 2, 2.0 or 02 is the same level."""
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value == int(value) else repr(value)


def _labels(study: Study, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.int64]:
    labels = np.empty(len(cells), np.int64)
    allowed = {str(value): value for value in range(study.task.classes)}
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        try:
            labels[record] = allowed[_canonical(cell.strip())]
        except (KeyError, OverflowError, ValueError):
            limit = study.task.classes - 1
            raise _fault(row, study.task.label, f"is not a class 0..{limit}", "drop rows without a label") from None
    return labels


def _fault(row: int, column: str, what: str, remedy: str) -> DataError:
    return DataError(301, f"row {row}, column {column}: value {what}", remedy)
