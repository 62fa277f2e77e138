"""Exact discrete Gaussian noise, for hospitals: integers that leak nothing through their low bits.

N_Z(0, sigma^2) gives an integer x with probability proportional to exp(-x^2 / (2 sigma^2)).

*Source* Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), Algorithms 1 to 3: a discrete Laplace proposal of scale
t = floor(sigma) + 1, kept with probability exp(-(|y| - sigma^2/t)^2 / (2 sigma^2)).

*Exact although fast.* Every coin is the comparison of a uniform U in [0, 1) with exp(-g), g rational. Its first 63
bits are compared with a float64 value of exp(-g); only if the two are within ``BAND`` is the comparison done again
with exact fractions, directed decimal bounds and as many further bits of U as it takes. The float value is within
2^-48 of the truth: with x = |y|/sigma and z = x - sigma/t, three roundings put z off by at most 2^-53 (2x + 3), and
exp(-g) by at most 2^-53 e^{-z^2/2} (|z| (2x+3) + 2 z^2 + 4) < 2^-53 * 12, plus 2^-53 for the truncated U; the other
two kinds of coin are simpler. ``BAND`` leaves a factor of 256, and is met about once in 2^39 coins.

Time depends on the values drawn (rejection): draw in bulk, before the slot in which the upload is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError
from medfed.privacy.keystream import Keystream

SIGMA_LEAST = 0.5
SIGMA_MOST = 2.0**40
BAND = 2.0**-40

_UNIFORM_BITS = 63
_BATCH = 1 << 14
# exp(-k): the chance that a geometric count reaches k; beyond the table every uniform is within BAND of zero anyway
_TAIL = np.exp(-np.arange(46.0))


def discrete_gaussian(key: bytes, sigma: float, size: int) -> NDArray[np.int64]:
    """``size`` independent draws of N_Z(0, sigma^2): int64[size].

    ``key``: 32 fresh secret bytes, used for nothing else. ``sigma``: in grid units, 0.5 to 2^40; its float64 value is
    taken as an exact rational. Raises ``ConfigError`` (MF-203) outside that range.

    *Guarantees* The distribution is exact, given a uniform keystream; equal arguments give equal draws anywhere
    (only coins inside ``BAND`` could differ between math libraries, and those are decided exactly).
    """
    if not SIGMA_LEAST <= sigma <= SIGMA_MOST or size < 0:
        raise ConfigError(203, f"{size} draws of noise of sigma {sigma}", "use sigma from 0.5 to 2^40 grid units")
    stream = Keystream(key)
    sampler = _Sampler(stream, sigma)
    draws = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        batch = sampler.batch(min(_BATCH, 3 * (size - filled) + 64))[: size - filled]
        draws[filled : filled + len(batch)] = batch
        filled += len(batch)
    return draws


class _Sampler:
    """The rejection loop of Algorithm 3, a batch of proposals at a time."""

    __slots__ = ("_exact_sigma", "_fair_below", "_scale", "_sigma", "_stream")

    def __init__(self, stream: Keystream, sigma: float) -> None:
        self._stream = stream
        self._sigma = sigma
        self._exact_sigma = Fraction(sigma)
        self._scale = math.floor(sigma) + 1
        self._fair_below = 2**64 - 2**64 % self._scale

    def batch(self, proposals: int) -> NDArray[np.int64]:
        """The accepted ones of ``proposals`` proposals, in order."""
        proposed = self._laplace(proposals)
        distance = np.abs(proposed)
        offset = distance / self._sigma - self._sigma / self._scale
        kept = _coins(self._stream, offset * offset / 2, lambda index: self._exponent(int(distance[index])))
        return np.compress(kept, proposed)

    def _exponent(self, distance: int) -> Fraction:
        """(|y| - sigma^2/t)^2 / (2 sigma^2), exactly."""
        square = self._exact_sigma**2
        return (distance - square / self._scale) ** 2 / (2 * square)

    def _laplace(self, proposals: int) -> NDArray[np.int64]:
        """Discrete Laplace of scale t (Algorithm 2): remainder + t * quotient with a fair sign, zero halved."""
        words = self._stream.words(proposals)
        if self._fair_below < 2**64:
            words = np.compress(words < np.uint64(self._fair_below), words)
        scale = np.uint64(self._scale)
        # numpy divides by one number several at a time, and takes remainders one by one
        remainder = (words - words // scale * scale).view(np.int64)
        taken = _coins(
            self._stream, remainder / self._scale, lambda index: Fraction(int(remainder[index]), self._scale)
        )
        remainder = np.compress(taken, remainder)
        quotient, negative = _geometric(self._stream, len(remainder))
        magnitude = remainder + self._scale * quotient
        signed = magnitude * (1 - 2 * negative)
        return np.compress((magnitude | 1 - negative) != 0, signed)


def _coins(
    stream: Keystream,
    exponents: NDArray[np.float64],
    exact: Callable[[int], Fraction],
    band: float = BAND,
) -> NDArray[np.bool_]:
    """One coin of chance exp(-g) for each g: bool[n]. ``exact(i)`` gives the i-th g as a fraction."""
    words = _halved(stream.words(len(exponents)))
    excess = np.exp(-exponents) - words * 2.0**-_UNIFORM_BITS
    heads: NDArray[np.bool_] = excess > 0
    for index in np.flatnonzero(np.abs(excess) <= band).tolist():
        heads[index] = _Uniform(int(words[index]), stream).is_below_exp(exact(index))
    return heads


def _halved(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The upper 63 bits, as signed numbers: those a processor turns into floats at once."""
    return (words >> np.uint64(64 - _UNIFORM_BITS)).view(np.int64)


def _geometric(stream: Keystream, count: int, band: float = BAND) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts with P(V >= k) = exp(-k), by inversion, and a fair bit beside each: int64[count], int64[count] of 0 and 1."""
    whole = stream.words(count)
    bits = (whole & np.uint64(1)).view(np.int64)
    words = _halved(whole)
    uniform = words * 2.0**-_UNIFORM_BITS
    # a first guess; the guard below does not rely on the logarithm's last place
    guess = np.minimum(-np.log(np.maximum(uniform, 2.0**-64)), 44.0).astype(np.int64)
    unsure = (uniform - _TAIL[guess + 1] <= band) | (_TAIL[guess] - uniform <= band)
    for index in np.flatnonzero(unsure).tolist():
        guess[index] = _Uniform(int(words[index]), stream).count_exp()
    return guess, bits


class _Uniform:
    """A uniform number in [0, 1) known to as many bits as anybody asked for."""

    __slots__ = ("_bits", "_head", "_stream")

    def __init__(self, head: int, stream: Keystream) -> None:
        self._head = head
        self._bits = _UNIFORM_BITS
        self._stream = stream

    def is_below_exp(self, exponent: Fraction) -> bool:
        """Whether U < exp(-exponent), exactly; ends with probability 1 (exp of a rational is irrational but at 0)."""
        if exponent == 0:
            return True
        while True:
            low, high = _exp_bounds(exponent, self._bits // 3 + 10)
            if Fraction(self._head + 1, 1 << self._bits) <= low:
                return True
            if Fraction(self._head, 1 << self._bits) >= high:
                return False
            self._head = self._head << 64 | self._stream.word()
            self._bits += 64

    def count_exp(self) -> int:
        """The largest k with U < exp(-k)."""
        count = 0
        while self.is_below_exp(Fraction(count + 1)):
            count += 1
        return count


def _exp_bounds(exponent: Fraction, digits: int) -> tuple[Fraction, Fraction]:
    """Fractions below and above exp(-exponent), about 10^-digits apart, relatively.

    ``Decimal.exp`` rounds correctly, and so does the division: with p = digits + 10 and g < 10^4, both together are
    within (g + 1) 10^(1-p) < 10^-digits / 2 of the truth, relatively.
    """
    # every operation through this context: operators such as unary minus would round to the ambient 28 digits
    context = Context(prec=digits + 10, rounding=ROUND_HALF_EVEN)
    ratio = context.divide(Decimal(-exponent.numerator), Decimal(exponent.denominator))
    value = Fraction(context.exp(ratio))
    slack = value / 10**digits
    return value - slack, value + slack
