"""What a study does to its patients' data, one attempt at a time, and its Renyi differential privacy (RDP).

The unit is the patient (or the record where a study says so), neighbors differ by one of them being in or out. All
figures are upper bounds; nothing here is an approximation.

*One step.* The clipped sum of one hospital is saturated and rounded to integers once, so one patient moves it by an
integer vector of L2 norm at most ``sensitivity(...)``. Integer noise Z is added and everybody sees at most sum + Z.

*q = 1.* For Z discrete Gaussian: D_a(Z || Z + v) <= a |v|^2 / (2 sigma^2) (Canonne, Kamath, Steinke 2020,
arXiv:2004.00010, Proposition 5, summed over coordinates). For the sum of n of them, Kairouz, Liu, Steinke 2021
(arXiv:2102.06387, Proposition 14): the same with n sigma^2 plus a gap made of tau, charged below.

*q < 1.* With P the law of sum + Z without the patient, Q with it, and M = (1-q) P + q Q, both directions matter:

- E_P[(M/P)^a] = sum_l C(a,l) (1-q)^(a-l) q^l E_P[(Q/P)^l] for an integer a, exactly, and the last factor is
  exp((l-1) D_l(Q||P)). This is the general bound of Zhu, Wang 2019 (ICML, Theorem 5) without its factor 3.
- D_a(P||M) <= D_a(M||P), for symmetric noise, which is why that factor is not needed (Mironov, Talwar, Zhang 2019,
  arXiv:1908.10530, Theorem 5). On the integers: x -> v - x swaps P and Q, so with r = Q/P it is enough that, for
  every r >= 1, s = 1-q+qr and t = q+(1-q)r,  s^a + r (t/r)^a >= s^(1-a) + r (t/r)^(1-a). With u = r/t this reads
  s^a - s^(1-a) >= t (u^a - u^(1-a)). At a = 1 both sides are r - t, since s + t = 1 + r; and the ratio of the two
  brackets is sqrt(s/u) sinh((a-1/2) ln s) / sinh((a-1/2) ln u), which does not fall in a because s >= u >= 1. QED.
- Between integers (a-1) D_a is convex in a, so the chord lies above it.

Mixtures over the other patients' coins are covered by joint quasi-convexity of D_a.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError

MAX_SHARES = 100_000
MAX_REPEATS = 10_000

# Renyi orders: fine where a large epsilon finds its best order, sparse where a small one does. At every order the bound
# holds, so the choice costs tightness only. dp_accounting's conversion wants more than 1.01.
ORDERS: tuple[float, ...] = (
    1.02,
    1.05,
    *(float(order) / 10 for order in range(11, 110)),
    *map(float, range(11, 65)),
    *(
        72.0,
        80.0,
        88.0,
        96.0,
        112.0,
        128.0,
        160.0,
        192.0,
        224.0,
        256.0,
        320.0,
        384.0,
        448.0,
        512.0,
        640.0,
        768.0,
        1024.0,
    ),
)


def need(holds: bool, what: str, remedy: str) -> None:
    """``ConfigError`` (MF-203) unless ``holds``."""
    if not holds:
        raise ConfigError(203, what, remedy)


@dataclass(frozen=True, slots=True)
class Mechanism:
    """One attempt: ``repeats`` events, each a Poisson-sampled, clipped, rounded sum plus integer noise, as one observer
    sees it; later ones may depend on earlier ones.

    ``sampling_rate`` q in (0, 1]. ``sigma``: parameter of ONE discrete Gaussian share, in grid units, at least 0.5.
    ``shares``: how many independent shares stand between this patient and the observer (1: the hospital's own noise;
    m - c in distributed mode). ``sensitivity``: L2, grid units. ``dimensions``: length d of the vector. ``repeats``: the
    local steps of a round, 1 where a round is one sum.
    ``once``: what the first attempt costs on top, in full: the statistics before round 1. ``aside``: what it costs patients
    who are in nothing else, in full: nobody is in both, so a patient's cost is the larger. ``most``: how many attempts can be
    of this mechanism itself, where others stand beside it; somebody must refuse one more.
    Raises ``ConfigError`` (MF-203) for values out of range.
    """

    sampling_rate: float
    sigma: float
    shares: int
    sensitivity: float
    dimensions: int
    repeats: int = 1
    once: tuple[Mechanism, ...] = ()
    aside: tuple[Mechanism, ...] = ()
    most: int | None = None

    def __post_init__(self) -> None:
        need(0.0 < self.sampling_rate <= 1.0, f"sampling rate {self.sampling_rate} is outside (0, 1]", "correct it")
        need(0.5 <= self.sigma <= 2.0**40, f"sigma {self.sigma} grid steps is outside 0.5 to 2^40", "change the grid")
        need(1 <= self.shares <= MAX_SHARES, f"{self.shares} noise shares", f"use 1 to {MAX_SHARES}")
        need(0.0 < self.sensitivity <= 2.0**64, f"sensitivity {self.sensitivity} is outside (0, 2^64]", "correct it")
        need(self.dimensions >= 1, f"a vector of {self.dimensions} dimensions", "correct it")
        plain = all(not other.once and not other.aside and other.most is None for other in self.once + self.aside)
        need(plain, "a mechanism within a mechanism within another", "restore the file it stands in")
        need(self.most is None or self.most >= 1, f"at most {self.most} attempts", "correct it")
        need(1 <= self.repeats <= MAX_REPEATS, f"{self.repeats} events an attempt", f"use 1 to {MAX_REPEATS}")

    def to_json(self) -> str:
        """Canonical text: sorted keys, no blanks, shortest exact floats. Equal mechanisms give equal text.

        ``repeats`` is left out where it is 1, ``once``, ``aside`` and ``most`` where there are none.
        """
        values: dict[str, object] = {
            "dimensions": self.dimensions,
            "sampling_rate": float(self.sampling_rate),
            "sensitivity": float(self.sensitivity),
            "shares": self.shares,
            "sigma": float(self.sigma),
        }
        if self.repeats != 1:
            values["repeats"] = self.repeats
        for name, others in (("once", self.once), ("aside", self.aside)):
            if others:
                values[name] = [json.loads(other.to_json()) for other in others]
        if self.most is not None:
            values["most"] = self.most
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Mechanism:
        """The mechanism that ``to_json`` wrote; ``ConfigError`` (MF-203) for any other text."""
        try:
            mechanism = cls._read(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(203, "mechanism is malformed", "restore the file it stands in") from error
        need(mechanism.to_json() == text, "mechanism is not in canonical form", "restore the file it stands in")
        return mechanism

    @classmethod
    def _read(cls, values: dict[str, Any]) -> Mechanism:
        most = values.get("most")
        return cls(
            sampling_rate=float(values["sampling_rate"]),
            sigma=float(values["sigma"]),
            shares=int(values["shares"]),
            sensitivity=float(values["sensitivity"]),
            dimensions=int(values["dimensions"]),
            repeats=int(values.get("repeats", 1)),
            once=tuple(cls._read(other) for other in values.get("once", ())),
            aside=tuple(cls._read(other) for other in values.get("aside", ())),
            most=None if most is None else int(most),
        )

    def rdp(self) -> NDArray[np.float64]:
        """Upper bound on the RDP of one attempt at every order of ``ORDERS``, in both directions: float64[len(ORDERS)]."""
        orders = np.asarray(ORDERS)
        if self.sampling_rate == 1.0:
            return self.repeats * self._whole(orders)
        return self.repeats * np.minimum(self._sampled(), self._whole(orders))

    def _whole(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """RDP without sampling (Kairouz, Liu, Steinke 2021, Proposition 14: the least of its three bounds)."""
        scale = self.sensitivity / (math.sqrt(self.shares) * self.sigma)
        tau = gap(self.sigma, self.shares)
        # an integer vector has |x| <= x^2 in every coordinate, hence L1 <= L2^2 beside L1 <= sqrt(d) L2
        taxicab = self.sensitivity * min(math.sqrt(self.dimensions), self.sensitivity)
        taxicab_scale = taxicab / (math.sqrt(self.shares) * self.sigma)
        added = orders / 2 * scale**2 + tau * self.dimensions
        mixed = orders / 2 * (scale**2 + 2 * taxicab_scale * tau + tau**2 * self.dimensions)
        stretched = orders / 2 * (scale + tau * math.sqrt(self.dimensions)) ** 2
        least: NDArray[np.float64] = np.minimum(np.minimum(added, mixed), stretched)
        return least

    def _sampled(self) -> NDArray[np.float64]:
        """RDP with Poisson sampling: the binomial sum at integer orders, the chord of (a-1) D_a between them."""
        needed = sorted({math.floor(order) for order in ORDERS} | {math.ceil(order) for order in ORDERS})
        whole = np.arange(2.0, needed[-1] + 1)
        moments = (whole - 1) * self._whole(whole)  # log E_P[(Q/P)^l] for l = 2, 3, ...
        log_moment = {1: 0.0} | {
            order: _log_sampled_moment(order, self.sampling_rate, moments) for order in needed if order >= 2
        }
        bound = np.empty(len(ORDERS))
        for index, order in enumerate(ORDERS):
            low, part = math.floor(order), order - math.floor(order)
            chord = (1 - part) * log_moment[low] + (part * log_moment[low + 1] if part else 0.0)
            bound[index] = chord / (order - 1)
        return bound


def gap(sigma: float, shares: int) -> float:
    """tau: how far a sum of ``shares`` discrete Gaussians is from one (Kairouz, Liu, Steinke 2021, Theorem 1).

    10 sum_{k=1}^{n-1} exp(-2 pi^2 sigma^2 k/(k+1)); zero for one share, and below 1e-37 from sigma = 3 on.
    """
    steps = np.arange(1, shares, dtype=np.float64)
    return float(10.0 * np.exp(-2 * math.pi**2 * sigma**2 * steps / (steps + 1)).sum())


def _log_sampled_moment(order: int, rate: float, moments: NDArray[np.float64]) -> float:
    """log E_P[(M/P)^a] at integer a, given log E_P[(Q/P)^l] for l = 2, 3, ...

    The binomial weights sum to 1, so 1 is taken out of every term: what is left is positive and nothing cancels.
    """
    chosen = np.arange(2, order + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, order + 1)))])
    log_weight = log_factorial[order] - log_factorial[chosen] - log_factorial[order - chosen]
    log_weight = log_weight + chosen * math.log(rate) + (order - chosen) * math.log1p(-rate)
    power = moments[: order - 1]
    terms = log_weight + power + np.log(-np.expm1(-power))
    peak = float(terms.max())
    return float(np.logaddexp(0.0, peak + math.log(float(np.exp(terms - peak).sum()))))


def sensitivity(clipping_norm: float, exponent: int, dimensions: int) -> float:
    """L2 sensitivity in grid units of a clipped sum that is rounded to the grid once: C 2^e + sqrt(d).

    Each coordinate of rint(x + y) - rint(x) is within 1 of y; saturation only shrinks differences.
    """
    need(0.0 < clipping_norm < math.inf, f"clipping norm {clipping_norm} is not positive", "correct it")
    return math.ldexp(clipping_norm, exponent) + math.sqrt(dimensions)
