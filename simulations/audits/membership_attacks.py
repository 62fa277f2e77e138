"""The attacks of the membership audit, and how well one fared. Models attack each other: all others are one's shadow models.

*Source* Yeom et al. 2018 (arXiv:1709.01604) for the loss threshold; Carlini et al. 2022 (arXiv:2112.03570), algorithm 1 and
section VI on few shadow models, for LiRA; DeLong, DeLong, Clarke-Pearson 1988 (Biometrics 44:837) for the variance of an area.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

FALSE_POSITIVES = 0.001
GRID = np.linspace(0.0, 1.0, 41)
"""Shares of others taken for members, of a curve."""

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Attack = Callable[[Floats, Bools], Floats]
"""(confidences float[k, n] of k models in n patients, who trained them bool[k, n]) -> scores float[k, n], higher for members.

Of row i it uses the confidences, and of the other rows who trained, too.
"""


@dataclass(frozen=True, slots=True)
class Attacked:
    """How one attack fared. ``auc``: mean over the models, with its standard error; ``found``: share of members found at
    ``FALSE_POSITIVES``; ``curve``: the same at each of ``GRID``."""

    name: str
    auc: float
    error: float
    found: float
    curve: tuple[float, ...]


def attack(name: str, confidences: Floats, inside: Bools) -> Attacked:
    """One of ``ATTACKS`` on every model: ``confidences`` float[k, n] and ``inside`` bool[k, n] as in ``Attack``."""
    scores = ATTACKS[name](confidences, inside)
    found = [area(row[members], row[~members]) for row, members in zip(scores, inside, strict=True)]
    areas, variances = zip(*found, strict=True)
    members, others = np.sort(scores[inside]), np.sort(scores[~inside])[::-1]
    shares = np.append(GRID, FALSE_POSITIVES)
    # a threshold that no more than the wanted share of others exceeds; of all of them, none
    places = (shares * len(others)).astype(np.int64)
    thresholds = np.append(others, -np.inf)[places]
    caught = 1 - np.searchsorted(members, thresholds, side="right") / len(members)
    error = math.sqrt(sum(variances)) / len(variances)
    return Attacked(name, float(np.mean(areas)), error, float(caught[-1]), tuple(caught[:-1].tolist()))


def area(positive: Floats, negative: Floats) -> tuple[float, float]:
    """Area under the ROC curve of two groups' scores, ties counted half, and its variance by DeLong."""
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[: len(positive)] - rankdata(positive)) / len(negative)
    below = (ranks[len(positive) :] - rankdata(negative)) / len(positive)
    variance = float(above.var(ddof=1)) / len(positive) + float(below.var(ddof=1)) / len(negative)
    return float(above.mean()), variance


# -------------------------------------------------------------------------------------------------------- the attacks


def _loss_threshold(confidences: Floats, inside: Bools) -> Floats:
    """The loss of a label falls with the logit of its probability: no shadow models are asked."""
    return confidences


def _lira(confidences: Floats, inside: Bools) -> Floats:
    """Likelihood ratio of normal logits: every patient has a mean of her own in and out, all have the same two deviations."""
    scores = np.zeros_like(confidences)
    for row, others in _shadows(len(confidences)):
        logs = []
        for where in (inside[others], ~inside[others]):
            mean = _mean(confidences[others], where)
            logs.append(norm.logpdf(confidences[row], mean, _deviation(confidences[others], mean, where)))
        ratio = logs[0] - logs[1]
        # of a patient who was in all of the shadow models, or in none, nothing is known
        scores[row] = np.where(np.isnan(ratio), 0.0, ratio)
    return scores


def _lira_common_shift(confidences: Floats, inside: Bools) -> Floats:
    """The same with one shift between in and out for all patients: less to estimate where shadow models are few."""
    scores = np.zeros_like(confidences)
    for row, others in _shadows(len(confidences)):
        values, members = confidences[others], inside[others]
        shift = float(np.nanmean(_mean(values, members) - _mean(values, ~members)))
        scores[row] = confidences[row] - (values - shift * members).mean(0)
    return scores


ATTACKS: dict[str, Attack] = {
    "loss threshold": _loss_threshold,
    "LiRA": _lira,
    "LiRA, common shift": _lira_common_shift,
}


def _shadows(models: int) -> list[tuple[int, Bools]]:
    return [(row, np.arange(models) != row) for row in range(models)]


def _mean(values: Floats, where: Bools) -> Floats:
    """Over the models where it holds, float[n]; not a number where it never does."""
    counts = where.sum(0)
    return np.where(counts > 0, (values * where).sum(0) / np.maximum(counts, 1), np.nan)


def _deviation(values: Floats, mean: Floats, where: Bools) -> float:
    """About each patient's own mean, of all patients together."""
    freedom = int(np.maximum(where.sum(0) - 1, 0).sum())
    return math.sqrt(float(np.nansum((values - mean) ** 2 * where)) / max(1, freedom))
