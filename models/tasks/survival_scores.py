"""How good survival curves are where some records are censored, by the definitions of Harrell and of Graf."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_AT_ONCE = 1 << 22  # comparisons


def concordance(times: Integers, events: Integers, risks: Floats) -> float | None:
    """Harrell's C: of the pairs of which it is known who had the event first, the share whose risks say so; equal count half.

    A record that is censored at the very time of another's event is known to have come through it; two events at one time are
    no such pair. None where there is no pair. *Source* Harrell et al. 1996, Statistics in Medicine 15:361, as lifelines counts.
    """
    right, pairs = 0.0, 0
    first = np.flatnonzero(events == 1)
    for start in range(0, len(first), max(1, _AT_ONCE // max(1, len(times)))):
        rows = first[start : start + max(1, _AT_ONCE // len(times))][:, None]
        later = (times > times[rows]) | ((times == times[rows]) & (events == 0))
        pairs += int(later.sum())
        right += float((later & (risks < risks[rows])).sum()) + 0.5 * float((later & (risks == risks[rows])).sum())
    return right / pairs if pairs else None


def censoring_curve(times: Integers, events: Integers) -> tuple[Integers, Floats]:
    """Kaplan and Meier's chance to be not yet censored: the distinct times ascending, and the chance after each.

    Of a time at which both happen, events come before censoring.
    """
    distinct, place = np.unique(times, return_inverse=True)
    gone = np.bincount(place, minlength=len(distinct))
    censored = np.bincount(place, weights=(events == 0).astype(np.float64), minlength=len(distinct))
    came = gone - censored
    at_risk = len(times) - np.cumsum(gone) + gone - came
    return distinct, np.asarray(np.cumprod(1.0 - censored / np.maximum(at_risk, 1.0)), np.float64)


def brier_scores(edges: Floats, curves: Floats, times: Integers, events: Integers) -> Floats:
    """float64[edges]: the mean squared distance of the curves float64[n, edges] from what happened by each edge.

    Records that are censored by then are made up for by those that stay, weighted by the inverse of the chance to be not yet
    censored, which these same records tell (``censoring_curve``). NaN at an edge that nobody reaches uncensored.
    *Source* Graf et al. 1999, Statistics in Medicine 18:2529, section 4.
    """
    distinct, chances = censoring_curve(times, events)
    padded = np.concatenate([[1.0], chances])
    before_own = padded[np.searchsorted(distinct, times, side="left")]  # just before a record's own time
    at_edge = padded[np.searchsorted(distinct, edges, side="right")]
    came = (times[:, None] <= edges) & (events[:, None] == 1)
    later = times[:, None] > edges
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(came, 1.0 / before_own[:, None], np.where(later, 1.0 / at_edge, 0.0))
        scores = (weights * (curves - later) ** 2).mean(0) if len(times) else np.full(len(edges), np.nan)
    return np.asarray(np.where((at_edge > 0.0) & (edges <= times.max(initial=-1)), scores, np.nan))


def integrated_brier(edges: Floats, curves: Floats, times: Integers, events: Integers) -> float | None:
    """The mean of ``brier_scores`` over the time from 0, where all curves are right, to the last edge at which it is known, by
    trapezoids; None where it is known at none. Less is better."""
    scores = brier_scores(edges, curves, times, events)
    known = np.isfinite(scores)
    if not known.any():
        return None
    ends = np.concatenate([[0.0], edges[known]])
    values = np.concatenate([[0.0], scores[known]])
    return float((np.diff(ends) * (values[1:] + values[:-1]) / 2.0).sum() / ends[-1])
