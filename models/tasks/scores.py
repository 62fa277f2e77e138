"""Metrics by their definitions, for any kind of task."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CALIBRATION_BINS = 10


def auc(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve by ranks (Mann-Whitney; ties count half); None when one class is absent."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the precision-recall curve, as a sum of steps over the distinct scores; None without a positive."""
    positives = int(positive.sum())
    if positives == 0:
        return None
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.diff(scores[order]) != 0, True)  # of records with equal scores, all or none
    found, named = hits[last], np.flatnonzero(last) + 1
    return float((np.diff(found, prepend=0) * found / named).sum() / positives)


def f1_macro(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> float | None:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), over the classes that occur or are predicted; None without records."""
    scores = []
    for index in np.union1d(labels, predicted):
        actual, named = labels == index, predicted == index
        scores.append(2 * int((actual & named).sum()) / (int(actual.sum()) + int(named.sum())))
    return sum(scores) / len(scores) if scores else None


def calibration_error(right: NDArray[np.bool_], sure: NDArray[np.float64]) -> float | None:
    """Mean distance between how sure and how often right, over equal parts of 0 .. 1 weighted by their records.

    *Source* expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3), ``CALIBRATION_BINS`` parts.
    """
    if not len(right):
        return None
    place = np.clip((sure * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(place, weights=right - sure, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(right))


def mean_known(values: list[float | None]) -> float | None:
    """Mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
