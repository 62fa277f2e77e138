"""Exact discrete Gaussian noise, for hospitals: integers that leak nothing through their low bits.

N_Z(0, sigma^2) gives an integer x with probability proportional to exp(-x^2 / (2 sigma^2)).

*Source* Rejection from a staircase above the curve, the idea of the ziggurat (Marsaglia, Tsang 2000; for integers Buchmann
et al. 2013, "Discrete Ziggurat"), here with cells of one size (``noise_cells``).

*Exact* A proposal is a uniform cell and a uniform integer x in it, by disjoint bits of one word, at a uniform height
(level + U)/C in the cell; it is kept if that is below the curve at x. As the cells hide the curve, every x is kept with
probability proportional to exp(-x^2 / (2 sigma^2)). Cells wholly under the curve, 97 % and more of what is kept, need no U.
In the tail's cells a fair coin, thrown for as long as it shows heads, first says which copy of them it is.

*Although fast* The first 63 bits of U decide, by a float64 value of exp(-g) beside one of the height; only if the two are
within ``BAND`` is the comparison done again with exact fractions, directed decimal bounds and as many further bits of U as it
takes. With u = 2^-53: three roundings put g off by 3u g, hence exp(-g) by 3u/e at most; the math library may add 4u;
conversion, sum and quotient put the height, at most 1, off by 3u; the bits of U left out are 2^-63. ``BAND`` is more than 512
times the sum, and is met by fewer than one proposal in 2^30.

Time depends on the values drawn (rejection): draw in bulk, before the slot in which the upload is sent.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError
from medfed.privacy.keystream import Keystream
from medfed.privacy.noise_cells import CELL_BITS, cells, exp_minus

SIGMA_LEAST = 0.5
SIGMA_MOST = 2.0**40
BAND = 2.0**-40

_UNIFORM_BITS = 63
_FLOAT_BITS = 53
# part of what a key's draws are: coins are taken from the stream batch by batch. An array of them fits the second-level cache
_BATCH = 1 << 15


def discrete_gaussian(key: bytes, sigma: float, size: int) -> NDArray[np.int64]:
    """``size`` independent draws of N_Z(0, sigma^2): int64[size].

    ``key``: 32 fresh secret bytes, used for nothing else. ``sigma``: in grid units, 0.5 to 2^40; its float64 value is
    taken as an exact rational. Raises ``ConfigError`` (MF-203) outside that range.

    *Guarantees* The distribution is exact, given a uniform keystream; equal arguments give equal draws anywhere
    (only coins inside ``BAND`` could differ between math libraries, and those are decided exactly).
    """
    if not SIGMA_LEAST <= sigma <= SIGMA_MOST or size < 0:
        raise ConfigError(203, f"{size} draws of noise of sigma {sigma}", "use sigma from 0.5 to 2^40 grid units")
    sampler = _Sampler(Keystream(key), sigma)
    draws = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        missing = size - filled
        batch = sampler.batch(min(_BATCH, missing + missing // 32 + 32))[:missing]
        draws[filled : filled + len(batch)] = batch
        filled += len(batch)
    return draws


class _Sampler:
    """The rejection loop, a batch of proposals at a time."""

    __slots__ = ("_cells", "_sigma", "_stream")

    def __init__(self, stream: Keystream, sigma: float) -> None:
        self._stream = stream
        self._sigma = float(sigma)
        self._cells = cells(self._sigma)

    def batch(self, proposals: int, band: float = BAND) -> NDArray[np.int64]:
        """The accepted ones of ``proposals`` proposals, in order."""
        words = self._stream.words(proposals)
        cell = (words >> np.uint64(64 - CELL_BITS)).view(np.int64)
        proposed = self._cells.starts.take(cell)
        proposed += (words & np.uint64(self._cells.width - 1)).view(np.int64)
        unsure = np.flatnonzero(cell < len(self._cells.levels))
        cell = cell[unsure]
        per_unit = np.full(len(unsure), self._cells.per_unit, dtype=np.float64)
        tail = np.flatnonzero(cell < self._cells.tail)
        jumps = _heads_in_a_row(self._stream, len(tail))
        per_unit[tail] = np.ldexp(per_unit[tail], jumps + 1)
        proposed[unsure[tail]] += np.sign(self._cells.starts[cell[tail]]) * self._cells.jump * jumps
        below = self._below(proposed[unsure], self._cells.levels[cell], per_unit, band)
        kept = np.ones(proposals, dtype=np.bool_)
        kept[unsure[~below]] = False
        return proposed[kept]

    def _below(
        self, values: NDArray[np.int64], levels: NDArray[np.int64], per_unit: NDArray[np.float64], band: float
    ) -> NDArray[np.bool_]:
        """Whether heights drawn uniformly from level/per_unit to (level + 1)/per_unit are below the curve: bool[n]."""
        # the upper 63 bits, as signed numbers: those a processor turns into floats at once
        words = (self._stream.words(len(values)) >> np.uint64(64 - _UNIFORM_BITS)).view(np.int64)
        scaled = values / self._sigma
        excess = np.exp(-(scaled * scaled) / 2) - (levels + words * 2.0**-_UNIFORM_BITS) / per_unit
        below: NDArray[np.bool_] = excess > 0
        for index in np.flatnonzero(np.abs(excess) <= band).tolist():
            height = _Height(int(levels[index]), int(words[index]), int(per_unit[index]), self._stream)
            below[index] = height.is_below_exp(self._exponent(int(values[index])))
        return below

    def _exponent(self, value: int) -> Fraction:
        """x^2 / (2 sigma^2), exactly."""
        return value**2 / (2 * Fraction(self._sigma) ** 2)


def _heads_in_a_row(stream: Keystream, count: int) -> NDArray[np.int64]:
    """How often a fair coin shows heads before it shows tails: int64[count], P(V >= v) = 2^-v."""
    # leading zeros of as many bits as a float holds, by its exponent
    words = (stream.words(count) >> np.uint64(64 - _FLOAT_BITS)).view(np.int64)
    heads = _FLOAT_BITS - np.frexp(words.astype(np.float64))[1].astype(np.int64)
    for index in np.flatnonzero(words == 0).tolist():
        while (word := stream.word()) == 0:
            heads[index] += 64
        heads[index] += 64 - word.bit_length()
    return heads


class _Height:
    """A uniform number of [level, level + 1) / per_unit, known to as many bits as anybody asked for."""

    __slots__ = ("_bits", "_head", "_per_unit", "_stream")

    def __init__(self, level: int, head: int, per_unit: int, stream: Keystream) -> None:
        self._head = level << _UNIFORM_BITS | head
        self._bits = _UNIFORM_BITS
        self._per_unit = per_unit
        self._stream = stream

    def is_below_exp(self, exponent: Fraction) -> bool:
        """Whether it is below exp(-exponent), exactly; ends with probability 1 (exp of a rational is irrational but at 0)."""
        if exponent == 0:
            return self._head < self._per_unit << self._bits
        while True:
            low, high = _exp_bounds(exponent, self._bits // 3 + 10)
            if Fraction(self._head + 1, self._per_unit << self._bits) <= low:
                return True
            if Fraction(self._head, self._per_unit << self._bits) >= high:
                return False
            self._head = self._head << 64 | self._stream.word()
            self._bits += 64


def _exp_bounds(exponent: Fraction, digits: int) -> tuple[Fraction, Fraction]:
    """Fractions below and above exp(-exponent), about 10^-digits apart, relatively.

    ``Decimal.exp`` rounds correctly, and so does the division: with p = digits + 10 and g < 10^4, both together are
    within (g + 1) 10^(1-p) < 10^-digits / 2 of the truth, relatively.
    """
    value = Fraction(exp_minus(exponent, Context(prec=digits + 10, rounding=ROUND_HALF_EVEN)))
    slack = value / 10**digits
    return value - slack, value + slack
