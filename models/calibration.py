"""From what a model says to how likely it is: first by the study's public constants, then, if a hospital wants, by its own.

A loss with public constants is least where the model says something else than the chance p_k of class k. With class weights w
(cross-entropy), focusing gamma (focal loss) and priors pi (logit adjustment), and q the softmax of the logits plus log pi, it is
least where

    p_k w_k phi(q_k) / q_k  is the same for every k,   phi(q) = (1 - q)^gamma - gamma (1 - q)^(gamma - 1) q log q

so that p_k is q_k / (w_k phi(q_k)), normalised: without gamma q_k / w_k, the training classes' weights taken back. A model
that clipping and noise kept from that minimum is calibrated only about so; and a hospital whose patients differ from the
federation's may want the two numbers that ``fit_local`` finds on its own labelled records.

*Source* class weights as a change of priors: Elkan 2001 (IJCAI, theorem 2); focal loss: Charoenphakdee et al. 2021
(arXiv:2011.09172, theorem 11); Platt 1999 with smoothed targets; temperature: Guo et al. 2017 (arXiv:1706.04599).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, DataError
from medfed.models.rowwise import softmax
from medfed.task_choice import Classification, MultiLabel, Task

Floats = NDArray[np.float64]

FEWEST_OF_A_CLASS = 10  # labelled records that a hospital needs of each of at least two classes
_SMALLEST = 1e-12  # a chance below this counts as this
_STEPS = 100


def calibrated(task: Task, predictions: Floats) -> Floats:
    """What ``tasks.predictions`` gave, with the effect of the study's public constants on it taken back: of the same shape.

    Kinds of task whose predictions are no chances of classes stay as they are.
    """
    match task:
        case Classification():
            return _of_classes(task, predictions)
        case MultiLabel() if task.positive_weights is not None:
            weighted = predictions / np.array(task.positive_weights)
            return np.asarray(weighted / (weighted + 1.0 - predictions))
    return predictions


def _of_classes(task: Classification, chances: Floats) -> Floats:
    if task.class_weights is None and task.priors is None and task.focusing is None:
        return chances
    logs = np.log(np.clip(chances, _SMALLEST, 1.0))
    if task.priors is not None:
        logs = logs + np.log(np.array(task.priors))
    if task.focusing is not None:
        seen = np.clip(np.asarray(softmax(logs), np.float64), _SMALLEST, 1.0 - _SMALLEST)
        logs = np.log(seen) - np.log(_focus(seen, task.focusing))
    if task.class_weights is not None:
        logs = logs - np.log(np.array(task.class_weights))
    return np.asarray(softmax(logs), np.float64)


def _focus(chances: Floats, gamma: float) -> Floats:
    """phi of the module's docstring."""
    wrong = 1.0 - chances
    return np.asarray(wrong**gamma - gamma * wrong ** (gamma - 1.0) * chances * np.log(chances))


# ------------------------------------------------------------------------------------------------ a hospital's own part


@dataclass(frozen=True, slots=True)
class LocalCalibration:
    """Two numbers learned on one hospital's labelled records, for use there. They are not private and stay on site.

    The log-chances of the classes are multiplied by ``slope`` (1 / temperature), and ``offset`` is added to the log-odds of class
    1 of a binary task; 0 of a multiclass task.
    """

    kind: Literal["platt", "temperature"]
    slope: float
    offset: float

    def apply(self, chances: Floats) -> Floats:
        """Chances float64[n, classes] -> the same shape."""
        logs = self.slope * np.log(np.clip(chances, _SMALLEST, 1.0))
        logs[:, 1] += self.offset
        return np.asarray(softmax(logs), np.float64)


def fit_local(task: Task, chances: Floats, labels: NDArray[np.int64]) -> LocalCalibration:
    """The calibration with the least cross-entropy on ``labels`` int64[n]; ``chances``: of ``calibrated``.

    Of a binary task slope and offset (Platt, his smoothed targets), else one temperature. The slope is positive: the order of
    records stays. Raises ``ConfigError`` MF-203 for a task without classes, ``DataError`` MF-310 for too few labelled records.
    """
    if not isinstance(task, Classification):
        raise ConfigError(203, f"a {task.kind} task has no chances of classes to calibrate", "use the model as it is")
    counts = np.bincount(labels, minlength=task.classes)
    enough = int((counts >= FEWEST_OF_A_CLASS).sum())
    if enough < 2:
        what = f"fewer than {FEWEST_OF_A_CLASS} labelled records of each of two classes"
        raise DataError(310, what, "label more records, or use the model as it is")
    logs = np.log(np.clip(chances, _SMALLEST, 1.0))
    if task.kind == "binary":
        positives, negatives = int(counts[1]), int(counts[0])
        wanted = np.where(labels == 1, (positives + 1.0) / (positives + 2.0), 1.0 / (negatives + 2.0))
        slope, offset = _platt(logs[:, 1] - logs[:, 0], wanted)
        return LocalCalibration("platt", slope, offset)
    return LocalCalibration("temperature", _temperature(logs, labels), 0.0)


def _platt(odds: Floats, wanted: Floats) -> tuple[float, float]:
    """Slope and offset by damped Newton steps on the cross-entropy, which is convex in both."""
    at = np.array([1.0, 0.0])
    columns = np.stack([odds, np.ones_like(odds)], 1)
    loss = _cross_entropy(columns @ at, wanted)
    for _ in range(_STEPS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(columns @ at, -500.0, 500.0)))
        gradient = columns.T @ (chance - wanted)
        curvature = (columns * (chance * (1.0 - chance))[:, None]).T @ columns + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6:
            tried = at - size * step
            if tried[0] > 0 and (found := _cross_entropy(columns @ tried, wanted)) < loss:
                at, loss = tried, found
                break
            size /= 2
        else:
            break
    return float(at[0]), float(at[1])


def _cross_entropy(odds: Floats, wanted: Floats) -> float:
    return float((np.logaddexp(0.0, odds) - wanted * odds).sum())


def _temperature(logs: Floats, labels: NDArray[np.int64]) -> float:
    """1 / temperature between 1/20 and 20 by golden sections: the cross-entropy is convex in it."""

    def loss(slope: float) -> float:
        scaled = slope * logs
        top = scaled.max(1)
        total = top + np.log(np.exp(scaled - top[:, None]).sum(1))
        return float((total - scaled[np.arange(len(labels)), labels]).sum())

    low, high, ratio = 0.05, 20.0, (5.0**0.5 - 1.0) / 2.0
    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return (low + high) / 2.0
