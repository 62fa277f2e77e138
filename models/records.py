"""Raw columns -> encoded records, by a study's data contract. Names rows and columns in errors, never values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import DataError
from medfed.study import CategoryFeature, NumericFeature, Study

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


def encode_records(study: Study, patients: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Records:
    """Encode raw text columns; ``DataError`` MF-301 for a missing column, a missing, unreadable or out-of-range value.

    Rows are counted from 1, the header not included.
    """
    for name in [feature.name for feature in study.data.features] + [study.task.label]:
        if name not in columns:
            raise DataError(301, f"column {name} is missing", "add it, or map it under [data.columns] in hospital.toml")
    blocks = [
        _numbers(feature, columns[feature.name])
        if isinstance(feature, NumericFeature)
        else _indicators(feature, columns[feature.name])
        for feature in study.data.features
    ]
    inputs = np.concatenate(blocks, axis=1).astype(np.float32) if blocks else np.zeros((len(patients), 0), np.float32)
    return Records(inputs, _labels(study, columns[study.task.label]), tuple(patients))


def _numbers(feature: NumericFeature, cells: Sequence[str]) -> NDArray[np.float64]:
    values = np.empty((len(cells), 1))
    for row, cell in enumerate(cells, 1):
        values[row - 1, 0] = _number(feature, cell.strip(), row)
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


def _indicators(feature: CategoryFeature, cells: Sequence[str]) -> NDArray[np.float64]:
    place = {_canonical(level): index for index, level in enumerate(feature.levels)}
    indicators = np.zeros((len(cells), feature.width))
    for row, cell in enumerate(cells, 1):
        text = cell.strip()
        if text in MISSING and text not in place:
            if feature.missing is None:
                raise _fault(row, feature.name, "is missing", "the study names no level for missing ones; drop the row")
            text = feature.missing
        index = place.get(_canonical(text))
        if index is None:
            raise _fault(row, feature.name, "is none of the study's levels", "see the levels in study.toml")
        if index > 0:
            indicators[row - 1, index - 1] = 1.0
    return (indicators - feature.center) / feature.scale


def _canonical(text: str) -> str:
    """A level written as 2, 2.0 or 02 is the same level."""
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value == int(value) else repr(value)


def _labels(study: Study, cells: Sequence[str]) -> NDArray[np.int64]:
    labels = np.empty(len(cells), np.int64)
    allowed = {str(value): value for value in range(study.task.classes)}
    for row, cell in enumerate(cells, 1):
        try:
            labels[row - 1] = allowed[_canonical(cell.strip())]
        except (KeyError, OverflowError, ValueError):
            limit = study.task.classes - 1
            raise _fault(row, study.task.label, f"is not a class 0..{limit}", "drop rows without a label") from None
    return labels


def _fault(row: int, column: str, what: str, remedy: str) -> DataError:
    return DataError(301, f"row {row}, column {column}: value {what}", remedy)
