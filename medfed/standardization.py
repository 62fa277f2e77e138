"""Mean and scale of a table's numeric features from one noised sum over patients, and what they do to inputs and weights.

A value v enters the sum as z = (v - middle) / half of its public range [minimum, maximum], so |z| <= 1. A patient adds the
mean of z and of z^2 over their records, for each of f features, and 1: a vector of L2 norm at most sqrt(2f + 1). From the
released sum everybody computes mean and standard deviation alike, bit for bit (see ``medfed/advance.py`` for the rules of
that), and trains on x' = (x - shift) / stretch of the encoded inputs x. The model that is released takes x again:
``on_plain_inputs`` puts shift and stretch into its first layer, which is linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import NumericFeature
from medfed.study import Study

Floats = NDArray[np.float64]


def numeric(study: Study) -> Iterator[tuple[int, NumericFeature]]:
    """Each numeric feature with its column of the encoded inputs."""
    column = 0
    for feature in study.data.features:
        if isinstance(feature, NumericFeature):
            yield column, feature
        column += feature.width


def count(study: Study) -> int:
    """f, how many features are standardised: 0 for a study that asks for no statistics."""
    return sum(1 for _ in numeric(study)) if study.statistics is not None else 0


def words(study: Study) -> int:
    """Length of the sum that statistics take: f means, f squares, and the number of patients; 0 without statistics."""
    return 2 * count(study) + 1 if study.statistics is not None else 0


def most_of_one_patient(study: Study) -> float:
    """L2 norm that no patient's share of the sum exceeds."""
    return math.sqrt(words(study))


def _columns(study: Study) -> NDArray[np.int64]:
    return np.array([column for column, _ in numeric(study)], np.int64)


def _box(study: Study) -> tuple[Floats, Floats]:
    """middle and half of each feature's range, in units of the encoded inputs: float64[f] each."""
    features = [feature for _, feature in numeric(study)]
    low = np.array([(feature.minimum - feature.center) / feature.scale for feature in features])
    high = np.array([(feature.maximum - feature.center) / feature.scale for feature in features])
    return low / 2.0 + high / 2.0, high / 2.0 - low / 2.0


def shares(study: Study, inputs: NDArray[np.float32], unit: NDArray[np.int64], patients: int) -> Floats:
    """Each patient's share of the sum: float64[patients, 2f + 1]. ``inputs``: float32[n, p] encoded records, ``unit``:
    int64[n], whose each is; every patient has a record."""
    middle, half = _box(study)
    values = np.clip((inputs[:, _columns(study)].astype(np.float64) - middle) / half, -1.0, 1.0)
    both = np.concatenate([values, values * values], axis=1)
    total = np.zeros((patients, both.shape[1]))
    np.add.at(total, unit, both)
    means = total / np.bincount(unit, minlength=patients)[:, None]
    return np.concatenate([np.clip(means, -1.0, 1.0), np.ones((patients, 1))], axis=1)


def neutral(study: Study) -> NDArray[np.float32]:
    """Before the sum is known: shifts of 0 and stretches of 1, float32[2f]."""
    features = count(study)
    return np.concatenate([np.zeros(features, np.float32), np.ones(features, np.float32)])


def from_sum(study: Study, total: Floats) -> NDArray[np.float32]:
    """f shifts and f stretches of the encoded inputs: float32[2f], from the released sum float64[2f + 1].

    Noise may make any of it absurd: the number of patients counts as at least 1, a mean lies inside its range, and no
    standard deviation is below ``least_scale`` halves of it.
    """
    features = count(study)
    patients = np.maximum(total[2 * features], 1.0)
    mean = np.minimum(np.maximum(total[:features] / patients, -1.0), 1.0)
    variance = total[features : 2 * features] / patients - mean * mean
    least = study.statistics.least_scale if study.statistics is not None else 1.0
    spread = np.sqrt(np.minimum(np.maximum(variance, least * least), 1.0))
    middle, half = _box(study)
    found: NDArray[np.float32] = np.concatenate([middle + mean * half, spread * half]).astype(np.float32)
    return found


def standardized(study: Study, statistics: NDArray[np.float32], inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Encoded records float32[n, p] as the model in training takes them, each by itself."""
    columns, features = _columns(study), count(study)
    shift, stretch = statistics[:features].astype(np.float64), statistics[features:].astype(np.float64)
    changed = inputs.copy()
    with np.errstate(over="ignore"):  # whatever became of one patient's numbers, clipping bounds it
        changed[:, columns] = (inputs[:, columns].astype(np.float64) - shift) / stretch
    return changed


def on_plain_inputs(study: Study, statistics: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same model for plain encoded inputs: float32[d]. Its first layer is W [h, p] and bias [h], in this order."""
    columns, features, inputs = _columns(study), count(study), study.data.inputs
    outputs = first_layer_outputs(study)
    shift, stretch = statistics[:features].astype(np.float64), statistics[features:].astype(np.float64)
    matrix = weights[: outputs * inputs].reshape(outputs, inputs).astype(np.float64)
    bias = weights[outputs * inputs : outputs * inputs + outputs].astype(np.float64)
    for place, column in enumerate(columns):
        matrix[:, column] = matrix[:, column] / stretch[place]
        bias = bias - matrix[:, column] * shift[place]
    plain = weights.copy()
    plain[: outputs * inputs] = matrix.ravel()
    plain[outputs * inputs : outputs * inputs + outputs] = bias
    return plain


def first_layer_outputs(study: Study) -> int:
    """h of the first layer of a table's model."""
    hidden = getattr(study.model, "hidden", [])
    return int(hidden[0]) if hidden else study.task.outputs
