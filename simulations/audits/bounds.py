"""From counts of an audit to lower bounds on epsilon that hold with a stated confidence.

One event of noise multiplier 1/mu and sampling rate q is, seen along one patient's direction and in units of the noise,
N(0, 1) without the patient against (1-q) N(0, 1) + q N(mu, 1) with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom

MOST_MU = 30.0  # more is no privacy at all, and its epsilon above 500
_MOST_EPSILON = 700.0
_BISECTIONS = 60


def gaussian_epsilon(mu: float, delta: float, sampling_rate: float = 1.0) -> float:
    """The exact epsilon at ``delta`` of one such event, the larger of both directions; 0 where there is none.

    *Source* The hockey-stick divergence of the two laws in closed form; at q = 1 it is that of Balle, Wang 2018
    (arXiv:1805.06530, Theorem 8).
    """
    if mu <= 0.0:
        return 0.0
    mu = min(mu, MOST_MU)
    return _least(
        lambda epsilon: max(_removed(epsilon, mu, sampling_rate), _added(epsilon, mu, sampling_rate)) <= delta
    )


def _removed(epsilon: float, mu: float, rate: float) -> float:
    """sup over sets of P_with - e^epsilon P_without."""
    excess = 1.0 + math.expm1(epsilon) / rate  # where exp(mu x - mu^2 / 2) passes this
    cut = math.log(excess) / mu + mu / 2
    with_it = (1 - rate) * ndtr(-cut) + rate * ndtr(mu - cut)
    return float(with_it - np.exp(epsilon + np.log(max(ndtr(-cut), 1e-320))))


def _added(epsilon: float, mu: float, rate: float) -> float:
    """sup over sets of P_without - e^epsilon P_with."""
    left = (math.exp(-epsilon) - (1 - rate)) / rate
    if left <= 0.0:
        return 0.0
    cut = math.log(left) / mu + mu / 2
    with_it = (1 - rate) * ndtr(cut) + rate * ndtr(cut - mu)
    return float(ndtr(cut) - np.exp(epsilon + np.log(max(with_it, 1e-320))))


def highest_rate(count: int, draws: int, confidence: float) -> float:
    """Upper confidence bound on a probability of which ``count`` of ``draws`` were seen (Clopper, Pearson 1934)."""
    return 1.0 if count >= draws else float(beta.ppf(confidence, count + 1, draws - count))


def mu_lower_bound(false_alarms: int, misses: int, draws: int, confidence: float, sampling_rate: float = 1.0) -> float:
    """Lower confidence bound on mu from a test of ``draws`` draws a side, with a threshold fixed before they were seen.

    Both error rates are bounded, each at half of 1 - confidence. *Source* Nasr et al. 2023 (arXiv:2302.07956, section 4.2),
    here with the sampling's trade-off as well; it takes the laws' shape for granted, which ``any_shape_lower_bound`` does
    not.
    """
    each = (1 + confidence) / 2
    alarms, missed = highest_rate(false_alarms, draws, each), highest_rate(misses, draws, each)
    found = (1 - missed - (1 - sampling_rate) * alarms) / sampling_rate
    if found <= 0.0:
        return 0.0
    if found >= 1.0:
        return MOST_MU
    return float(min(max(0.0, ndtri(found) - ndtri(alarms)), MOST_MU))


def any_shape_lower_bound(false_alarms: int, misses: int, draws: int, confidence: float, delta: float) -> float:
    """Lower confidence bound on epsilon from the same counts, whatever the noise: ln((1 - delta - misses) / alarms).

    *Source* Kairouz, Oh, Viswanath 2015 (arXiv:1311.0776, Theorem 2.1): what a test can reach against (epsilon, delta).
    """
    each = (1 + confidence) / 2
    alarms, missed = highest_rate(false_alarms, draws, each), highest_rate(misses, draws, each)
    return max(0.0, math.log(max(1 - delta - missed, 1e-300) / alarms))


def best_threshold(mu: float, draws: int, sampling_rate: float, bound: Callable[[int, int], float]) -> float:
    """The threshold, in units of the noise, whose expected false alarms and misses give the highest ``bound``: fixed before
    any draw."""

    def expected(threshold: float) -> float:
        alarms, found = ndtr(-threshold), ndtr(mu - threshold)
        misses = 1 - (1 - sampling_rate) * alarms - sampling_rate * found
        return bound(round(draws * alarms), round(draws * misses))

    return float(max(np.arange(0.0, mu + 5.0, 0.05), key=expected))


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Chance, under (epsilon, delta), of ``correct`` right among ``guesses`` about ``canaries`` independent fair coins; an
    upper bound.

    *Source* Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846, Theorem 5.2 and Appendix D).
    """
    right = 1 / (1 + math.exp(-epsilon))
    certain = float(binom.sf(correct - 1, guesses, right))
    if delta == 0.0 or correct == 0:
        return min(1.0, certain)
    # P[correct - i <= W < correct] for i = 1, 2, ...: what a failure of probability delta could add, an i-th each
    short = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    worst = float((short / np.arange(1, correct + 1)).max())
    return min(1.0, certain + 2 * canaries * delta * worst)


def one_run_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon that ``correct`` right guesses refute with this confidence; 0 where they refute none."""
    return _least(lambda epsilon: one_run_p_value(canaries, guesses, correct, epsilon, delta) >= 1 - confidence)


def _least(holds: Callable[[float], bool]) -> float:
    """Where a condition on epsilon that holds from some point on begins to hold; 0 at least."""
    if holds(0.0):
        return 0.0
    low, high = 0.0, _MOST_EPSILON
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low
