"""The features of a record: raw text columns -> float64[n, p], by the study's contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import CategoryFeature, Feature, NumericFeature
from medfed.models.cells import MISSING, canonical, fault


def encode_features(
    features: Sequence[Feature], columns: Mapping[str, Sequence[str]], rows: Sequence[int]
) -> NDArray[np.float64]:
    """float64[n, p], p the widths of ``features`` together; ``DataError`` MF-301 for a missing, unreadable or wrong value."""
    blocks = [
        _numbers(feature, columns[feature.name], rows)
        if isinstance(feature, NumericFeature)
        else _indicators(feature, columns[feature.name], rows)
        for feature in features
    ]
    return np.concatenate(blocks, axis=1) if blocks else np.zeros((len(rows), 0))


def _numbers(feature: NumericFeature, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.float64]:
    values = np.empty((len(cells), 1))
    for index, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        values[index, 0] = _number(feature, cell.strip(), row)
    return (values - feature.center) / feature.scale


def _number(feature: NumericFeature, cell: str, row: int) -> float:
    if cell in MISSING:
        if feature.missing is None:
            raise fault(row, feature.name, "is missing", "the study names no value for missing ones; drop the row")
        return feature.missing
    try:
        value = float(cell)
    except ValueError:
        raise fault(row, feature.name, "is not a number", "write numbers with a decimal point") from None
    if not math.isfinite(value):
        raise fault(row, feature.name, "is not finite", "leave the cell empty or drop the row")
    if feature.minimum <= value <= feature.maximum:
        return value
    if feature.outside == "clip":
        return min(max(value, feature.minimum), feature.maximum)
    limits = f"[{feature.minimum:g}, {feature.maximum:g}] {feature.unit}"
    raise fault(row, feature.name, f"is outside {limits}", "check the unit of the column")


def _indicators(feature: CategoryFeature, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.float64]:
    place = {canonical(level): index for index, level in enumerate(feature.levels)}
    indicators = np.zeros((len(cells), feature.width))
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        text = cell.strip()
        if text in MISSING and text not in place:
            if feature.missing is None:
                raise fault(row, feature.name, "is missing", "the study names no level for missing ones; drop the row")
            text = feature.missing
        index = place.get(canonical(text))
        if index is None:
            raise fault(row, feature.name, "is none of the study's levels", "see the levels in study.toml")
        if index > 0:
            indicators[record, index - 1] = 1.0
    return (indicators - feature.center) / feature.scale
