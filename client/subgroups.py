"""Groups of records that a study's own categories make: by sex, by site, by ward."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import CategoryFeature
from medfed.models.attribution import decoded
from medfed.models.records import Records
from medfed.study import Study

ALL = "all"


def subgroups(study: Study, records: Records) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """(name, bool[n]): all records, then each level of each category of the contract that occurs, as ``sex = f``."""
    yield ALL, np.ones(len(records.patients), np.bool_)
    features = _encoded_features(study, records)
    at = 0
    for feature in study.data.features:
        if isinstance(feature, CategoryFeature):
            levels = np.array([decoded(feature, row) for row in features[:, at : at + feature.width]], np.str_)
            for level in feature.levels:
                if (levels == level).any():
                    yield f"{feature.name} = {level}", levels == level
        at += feature.width


def _encoded_features(study: Study, records: Records) -> NDArray[np.float64]:
    """float[n, p]: of a table its values, of a series what stands at the end of each step."""
    inputs = np.asarray(records.inputs, np.float64)
    if study.data.kind == "table":
        return inputs
    if study.data.kind == "series" and study.data.inputs:
        return inputs[:, 0, -study.data.inputs :]
    return np.zeros((len(inputs), study.data.inputs))
