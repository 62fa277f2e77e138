"""What a study costs: epsilon of a fixed list of attempts, the smaller of two proven upper bounds.

RDP of every event adds up (``mechanism``) and turns into epsilon at the best order; a privacy loss distribution (PLD) of the
whole list (``loss_distribution``) is about a tenth below it where it applies. Over studies that are chosen after seeing results
of earlier ones, RDP totals go to ``privacy.filter``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, PrivacyError
from medfed.privacy import loss_distribution
from medfed.privacy.mechanism import ORDERS, Mechanism, gap, need, sensitivity

__all__ = [
    "ORDERS",
    "Bounds",
    "Mechanism",
    "bounds",
    "calibrate",
    "compose",
    "epsilon",
    "gap",
    "micro",
    "running",
    "sensitivity",
]

# relative slack that covers float64 rounding in rdp() and in the conversion: epsilons come out rounded up
_ROUNDING = 1e-9
_MULTIPLIER_STEPS = 10_000
_MULTIPLIER_LIMIT = 10_000_000 * _MULTIPLIER_STEPS
_SECANTS = 12
_PLD_BELOW = 64.0  # RDP epsilon: above it, loss distributions take many seconds and say nothing of use


@dataclass(frozen=True, slots=True)
class Bounds:
    """Epsilon of a fixed list at a delta: ``epsilon`` is the smaller of ``rdp`` and ``pld``, and ``accountant`` says which.

    ``pld`` is None where that bound has none to offer.
    """

    epsilon: float
    rdp: float
    pld: float | None
    accountant: Literal["pld", "rdp"]


def compose(mechanism: Mechanism, count: int) -> NDArray[np.float64]:
    """RDP of ``count`` such attempts: float64[len(ORDERS)]. Totals of different mechanisms add up."""
    need(count >= 0, f"{count} attempts", "correct it")
    if not count:
        return np.zeros(len(ORDERS))
    total = own_attempts(mechanism, count) * _rdp(mechanism)
    for other in mechanism.once:
        total = total + _rdp(other)
    for other in mechanism.aside:
        total = np.maximum(total, _rdp(other))
    return total


@functools.lru_cache(maxsize=256)
def _rdp(mechanism: Mechanism) -> NDArray[np.float64]:
    return mechanism.rdp()


def own_attempts(mechanism: Mechanism, count: int) -> int:
    """How many of ``count`` attempts can be of the mechanism itself, and not of those beside it."""
    return count if mechanism.most is None else min(count, mechanism.most)


def epsilon(rdp_total: NDArray[np.float64], delta: float) -> float:
    """The epsilon at ``delta`` that a total RDP over ``ORDERS`` implies, rounded up.

    For a list of events fixed beforehand: the best order is picked afterwards, so for events chosen after seeing
    earlier results use ``privacy.filter``. *Source* Canonne, Kamath, Steinke 2020, Proposition 12, by dp_accounting.
    """
    from dp_accounting.rdp import rdp_privacy_accountant

    need(0.0 < delta < 1.0, f"delta {delta} is outside (0, 1)", "correct it")
    if np.isnan(rdp_total).any() or (rdp_total < 0).any():
        raise PrivacyError(900, "RDP total is not a number or negative", "report this as a fault of medfed")
    value, _ = rdp_privacy_accountant.compute_epsilon(ORDERS, rdp_total.tolist(), delta)
    return float(value) * (1 + _ROUNDING)


@functools.lru_cache(maxsize=4096)
def bounds(mechanism: Mechanism, attempts: int, delta: float) -> Bounds:
    """Both upper bounds on epsilon of a fixed list of ``attempts``, which may depend on each other's results.

    Kept for the life of the process: with sampling a list takes 0.1 to 1 s, without less than 1 ms.
    """
    if mechanism.aside:  # nobody is in two of these, so each has the smaller bound for itself
        groups = [bounds(replace(mechanism, aside=()), attempts, delta)]
        groups += [bounds(other, min(attempts, 1), delta) for other in mechanism.aside]
        return max(groups, key=lambda group: group.epsilon)
    rdp = epsilon(compose(mechanism, attempts), delta)
    pld = _pld(mechanism, attempts, delta) if rdp < _PLD_BELOW else None
    if pld is None or pld >= rdp:
        return Bounds(rdp, rdp, pld, "rdp")
    return Bounds(pld, rdp, pld, "pld")


def _pld(mechanism: Mechanism, attempts: int, delta: float) -> float | None:
    if not attempts:
        return 0.0
    listed = [_events(mechanism, own_attempts(mechanism, attempts)), *(_events(other, 1) for other in mechanism.once)]
    return loss_distribution.epsilon(listed, delta)


def _events(mechanism: Mechanism, attempts: int) -> loss_distribution.Events:
    return loss_distribution.Events(
        sampling_rate=mechanism.sampling_rate,
        sd=math.sqrt(mechanism.shares) * mechanism.sigma,
        share_sd=mechanism.sigma,
        sensitivity=mechanism.sensitivity,
        dimensions=mechanism.dimensions,
        gap=gap(mechanism.sigma, mechanism.shares),
        count=attempts * mechanism.repeats,
    )


def running(mechanism: Mechanism, attempts: int, listed: float, delta: float) -> float:
    """An upper bound on epsilon after ``attempts``, at once: RDP, or ``listed``, the bound on the whole list they are from."""
    return min(epsilon(compose(mechanism, attempts), delta), listed) if attempts else 0.0


def micro(value: float) -> int:
    """Epsilon as whole millionths, rounded up: the ledger's money."""
    if not 0.0 <= value < math.inf:
        raise PrivacyError(501, f"epsilon {value} is not finite", "add noise or use fewer rounds")
    return math.ceil(Fraction(value) * 1_000_000)


def calibrate(target_epsilon: float, delta: float, attempts: int, make: Callable[[float], Mechanism]) -> float:
    """The least noise multiplier, in steps of 1/10000 and rounded up, at which ``attempts`` attempts cost <= the target.

    ``make(noise_multiplier)`` builds the mechanism; its cost must fall as the multiplier grows. Values it refuses
    (``ConfigError``) count as too small. Raises ``ConfigError`` (MF-203) where no multiplier up to 10^7 will do.
    """
    need(0.0 < target_epsilon < math.inf, f"target epsilon {target_epsilon} is not positive", "correct it")
    need(attempts >= 1, f"{attempts} attempts", "correct it")

    def excess(steps: int, figure: Callable[[Mechanism], float]) -> float:
        """Above 0: too little noise."""
        try:
            mechanism = make(steps / _MULTIPLIER_STEPS)
        except ConfigError:
            return math.inf
        return math.log(max(figure(mechanism), 1e-300) / target_epsilon)

    def by_rdp(steps: int) -> float:
        return excess(steps, lambda mechanism: epsilon(compose(mechanism, attempts), delta))

    def by_both(steps: int) -> float:
        return excess(steps, lambda mechanism: bounds(mechanism, attempts, delta).epsilon)

    high = _MULTIPLIER_STEPS
    while by_rdp(high) > 0:
        need(high < _MULTIPLIER_LIMIT, f"epsilon {target_epsilon} is out of reach", "ask for less privacy or rounds")
        high *= 2
    high = _least(by_rdp, high, 1.0)
    # what RDP admits, the smaller bound admits: a few loss distributions are enough below that
    return _least(by_both, high, 1.5) / _MULTIPLIER_STEPS


def _least(excess: Callable[[int], float], high: int, power: float) -> int:
    """The least whole number up to ``high`` without excess, where it falls about as number^-power and ``high`` has none.

    Secants through the last two points, as log excess is nearly straight in log number, and bisection should they not settle.
    """
    low, tried, last = 0, 0, (high, excess(high))
    root = high * math.exp(last[1] / power)
    while high - low > 1:
        # the root's own whole number first, then the one below it, which must have excess
        guess = math.ceil(root) if tried < _SECANTS and math.isfinite(root) else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        value, tried = excess(guess), tried + 1
        low, high = (guess, high) if value > 0 else (low, guess)
        if math.isfinite(value) and value != last[1] and guess != last[0]:
            slope = (value - last[1]) / math.log(guess / last[0])
            root = guess * math.exp(min(-value / slope, 1.0)) if slope < 0 else math.inf
            last = guess, value
        else:
            root = math.inf
    return high
