"""Epsilon of a fixed list of events by privacy loss distributions (PLD), proven for integer noise on vectors.

An event: coins with chance q for every patient, a clipped sum on the integers in d dimensions, to which one patient adds an
integer vector of L2 norm at most s, and the sum of n shares of discrete Gaussian noise N_Z(0, sigma^2). PLDs are known for
continuous noise. What takes a bound over from there:

1. *Integer noise is continuous noise, post-processed.* Draw y from N(x, v - r^2), v = n sigma^2, then z from N_Z(y, r^2), which
   knows nothing of x. With rho_w(t) = exp(-t^2 / 2 w^2): P(z) = integral of N(y; x, v - r^2) rho_r(z - y) / rho_r(Z - y) dy.
   Poisson summation gives rho_w(Z - y) = w sqrt(2 pi) (1 +- e_w) for every real y, e_w = 2 sum_k exp(-2 pi^2 w^2 k^2), and the
   rest of the integral is exactly r sqrt(2 pi) N(z; x, v). For integer x, N_Z(x, v)(z) = N(z; x, v) / (1 +- e). So the two laws
   are within a factor exp(+-2 atanh(e_r)) of each other at every z (cf. Peikert 2010, "An efficient and parallel Gaussian
   sampler for lattices", CRYPTO, Theorem 3.1).
2. *Shares.* The sum of n discrete Gaussians is within exp(+-tau) of N_Z(0, v) at every z: the sum of two, of variances a and b,
   has at z the mass N_Z(0, a + b)(z) times a ratio rho_w(Z - y) / rho_w(Z - y'), w^2 = a b / (a + b), and so on by induction
   (Kairouz, Liu, Steinke 2021, arXiv:2102.06387, Theorem 1: the same ``accounting.gap``).
3. *Everything else keeps such factors.* They multiply over the d coordinates; mixing over the patients' coins keeps them; given
   what was seen before, they hold for the next event, so over T events the factor is exp(+-eta), eta = T d (2 atanh(e_r) + tau).
4. *Conclusion.* If P <= e^eta P', Q' <= e^eta Q and P'(S) <= e^epsilon Q'(S) + delta, then P(S) <= e^(epsilon + 2 eta) Q(S) +
   e^eta delta. So epsilon(delta) is that of continuous noise of variance v - r^2 at delta e^-eta, plus 2 eta.

Continuous noise: a pair of one-dimensional laws dominates each event in each direction (a patient added, or removed), and lists
compose whatever the earlier results led to (Zhu, Dong, Wang 2022, arXiv:2106.08567, Theorems 10 and 11). Nor does it matter in
which order the events come, or if some never do: each is a post-processing of a draw from its own pair, made beforehand. Without
sampling a list is one Gaussian of mu = sqrt(sum (s_i / sd_i)^2), whose delta(epsilon) is a formula (Balle, Wang 2018,
arXiv:1805.06530, Theorem 8). With sampling, dp_accounting discretises the loss upwards (Doroshenko et al. 2022,
arXiv:2207.04380). The central limit (GDP) is an approximation and never used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import PLDPmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

SMALLEST_DELTA = 1e-10  # below it, rounding in the Fourier transforms is not small any more
LEAST_SD = 3.0  # of one share, in grid steps: below it tau and e_r are not negligible, and RDP stands alone
_SMOOTHING = 2.0  # r of the docstring: e_r < 1.1e-34
_INTERVAL = 1e-4
# of a grid step over the standard deviation of one event's loss: it widens the sum's variance by 1/12 of its square, about .03%
_INTERVALS_PER_SD = 16
_LEAST_MULTIPLIER = 0.3  # least noise sampled events may have: with less the grid of the loss grows beyond reason
_MOST_CELLS, _MOST_COMPOSED = 1 << 20, 1 << 22  # of a grid of losses, of one event and of many: seconds, and half a GiB
_TRUNCATED = 1e-15  # what dp_accounting moves of a composed list's mass to an infinite loss
_CUT_OFF = 1e-4  # of delta: what all events' noise beyond the grid may add to it
_TINY = 1e-300
_ROUNDING = 1e-9  # relative: covers float64, so that figures come out rounded up
_FLAT_NOISE, _NOISE_PER_EVENT = (
    1e-12,
    1e-14,
)  # of delta: covers the transforms' rounding, which grows with the power taken


@dataclass(frozen=True, slots=True)
class Events:
    """``count`` equal events, as in the module's docstring.

    ``sd``: of the summed noise, sqrt(n) sigma; ``share_sd``: of one share, sigma; both, and the L2 ``sensitivity``, in grid
    steps. ``gap``: tau of the shares, a coordinate.
    """

    sampling_rate: float
    sd: float
    share_sd: float
    sensitivity: float
    dimensions: int
    gap: float
    count: int

    @property
    def multiplier(self) -> float:
        """Noise over sensitivity of the continuous Gaussian that stands in; not above 0 where the noise is too fine."""
        return math.sqrt(max(0.0, self.sd**2 - _SMOOTHING**2)) / self.sensitivity

    @property
    def eta(self) -> float:
        """All these events' factor, as a logarithm."""
        square = (math.pi * _SMOOTHING) ** 2
        # the series' later terms are below 1e-100 of its first
        return self.count * self.dimensions * (2 * math.atanh(2.0000001 * math.exp(-2 * square)) + self.gap)


def epsilon(events: Sequence[Events], delta: float) -> float | None:
    """Upper bound on epsilon at ``delta`` of the whole list, rounded up; None where it has none to offer (too little noise,
    too small a delta, figures out of reach): then RDP stands alone."""
    listed = [each for each in events if each.count]
    if not listed:
        return 0.0
    if delta < SMALLEST_DELTA or any(each.share_sd < LEAST_SD for each in listed):
        return None
    eta = sum(each.eta for each in listed)
    if eta > 1.0:
        return None
    shrunk = delta * math.exp(-eta) * (1 - _ROUNDING)
    whole = [each for each in listed if each.sampling_rate == 1.0]
    sampled = [each for each in listed if each.sampling_rate < 1.0]
    mu = math.sqrt(sum(each.count / each.multiplier**2 for each in whole))
    value = _sampled_epsilon(sampled, mu, shrunk) if sampled else gaussian_epsilon(mu, shrunk)
    if value is None or not math.isfinite(value):
        return None
    return (value + 2 * eta) * (1 + _ROUNDING)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon at which Gaussian noise of sensitivity / sd = ``mu`` is (epsilon, delta)-private, rounded up."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2.0
    low = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta of Gaussian noise of sensitivity / sd = ``mu`` at ``epsilon``, rounded up."""
    return float(_gaussian_deltas(mu, np.asarray(epsilon))) * (1 + _ROUNDING)


def _gaussian_deltas(mu: float, epsilons: NDArray[np.float64]) -> NDArray[np.float64]:
    """Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu), in logarithms (Balle, Wang 2018, Theorem 8)."""
    from scipy.special import log_ndtr

    first = log_ndtr(mu / 2 - epsilons / mu)
    second = epsilons + log_ndtr(-mu / 2 - epsilons / mu)
    deltas: NDArray[np.float64] = -np.exp(first) * np.expm1(np.minimum(0.0, second - first))
    return deltas


def _sampled_epsilon(sampled: Sequence[Events], mu: float, delta: float) -> float | None:
    """The same where some are sampled; ``mu``: of those that are not."""
    if min(each.multiplier for each in sampled) < _LEAST_MULTIPLIER or mu > 1 / _LEAST_MULTIPLIER:
        return None
    count = sum(each.count for each in sampled) + 1
    left = delta - _FLAT_NOISE - _NOISE_PER_EVENT * count
    if left < delta / 2:
        return None
    interval = min(_interval(each) for each in sampled)
    reach = math.ceil(math.sqrt(2 * math.log(count / (_CUT_OFF * delta))))
    events = [(each.multiplier, each.sampling_rate, each.count) for each in sampled]
    if mu:
        events.append((1 / mu, 1.0, 1))
    if any(_cells(multiplier, rate, interval, reach) > _MOST_CELLS for multiplier, rate, _ in events):
        return None
    total = None
    for multiplier, rate, times in events:
        many = _composed(_loss(multiplier, rate, interval, reach), times)
        if many is None:
            return None
        total = many if total is None else total.compose(many)
    return None if total is None else float(total.get_epsilon_for_delta(left))


def _cells(multiplier: float, rate: float, interval: float, reach: int) -> float:
    """How many cells the grid of an event's loss has: known before it is made."""
    low, high = _ends(multiplier, rate, reach)
    return (high - low) / interval


def _composed(loss: PrivacyLossDistribution, times: int) -> PrivacyLossDistribution | None:
    """So many of these events; None where the grid of their sum, whose length dp_accounting bounds as here, is too long."""
    from dp_accounting.pld.common import compute_self_convolve_bounds

    if times == 1:
        return loss
    for pmf in (loss._pmf_remove, loss._pmf_add):
        if pmf.size * times > _MOST_COMPOSED:
            low, high = compute_self_convolve_bounds(pmf.to_dense_pmf()._probs, times, _TRUNCATED)
            if high - low > _MOST_COMPOSED:
                return None
    return loss.self_compose(times, _TRUNCATED)


def _interval(events: Events) -> float:
    """1e-4, or finer where an event's own loss is small beside it: a list of very many events hangs on it."""
    sd = events.sampling_rate * math.sqrt(math.expm1(min(events.multiplier**-2, 1.0)))
    # a power of two below: lists of nearly equal noise share a grid
    return min(_INTERVAL, 2.0 ** math.floor(math.log2(sd / _INTERVALS_PER_SD)))


@functools.lru_cache(maxsize=4)
def _loss(multiplier: float, rate: float, interval: float, reach: int) -> PrivacyLossDistribution:
    """One event on a grid of losses as far out as ``reach`` standard deviations of its noise; beyond it, losses count as
    infinite at the upper end, and as the lowest of the grid at the lower.

    dp_accounting's own constructor solves for every point in Python; these are the same deltas in closed form. With u the
    loss without sampling, removing a patient has the loss log(1 - q + q e^u), adding one minus that; and an event's delta is a
    part of the unsampled one's.
    """
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    mu = 1 / multiplier
    ends = _ends(multiplier, rate, reach)

    def pmf(low: float, high: float, deltas: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> PLDPmf:
        first, last = math.floor(low / interval), math.ceil(high / interval)
        at = np.clip(deltas(np.arange(first, last + 1, dtype=np.float64) * interval), 0.0, 1.0)
        return create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, at)

    def removed(epsilons: NDArray[np.float64]) -> NDArray[np.float64]:
        part = (np.expm1(epsilons) + rate) / rate
        whole = _gaussian_deltas(mu, np.log(np.maximum(part, _TINY)))
        return np.where(part > _TINY, rate * whole, -np.expm1(epsilons))

    def added(epsilons: NDArray[np.float64]) -> NDArray[np.float64]:
        part = (np.expm1(-epsilons) + rate) / rate
        whole = _gaussian_deltas(mu, -np.log(np.maximum(part, _TINY)))
        return np.where(part > _TINY, rate * part * np.exp(epsilons) * whole, 0.0)

    return PrivacyLossDistribution(pmf(ends[0], ends[1], removed), pmf(-ends[1], -ends[0], added))


def _ends(multiplier: float, rate: float, reach: int) -> tuple[float, float]:
    """Least and greatest loss on the grid, of removing a patient."""
    far = reach / multiplier + multiplier**-2 / 2
    return _sampled_loss(-far, rate), _sampled_loss(far, rate)


def _sampled_loss(loss: float, rate: float) -> float:
    return float(np.logaddexp(math.log1p(-rate), math.log(rate) + loss)) if rate < 1.0 else loss
