"""The table that discrete Gaussian noise is drawn by: equal cells that hide the curve exp(-x^2 / (2 sigma^2)).

The integers are cut into bins of w = 2^k, bin b from b w - w/2 on. Over each bin stand cells, w integers wide and 1/C high,
as many as it takes to hide the curve. There are 2^14 cells in all: a uniform word picks one by 14 of its bits and an integer
of it by k others. *Full* cells lie wholly under the curve, *cut* ones partly; what is left over of the 2^14 lies above it.

*The tail* From bin T on, where the curve is at most half a cell high, J bins on each side get one cell each. Copies of them
follow without end, at distances of J w, the j-th at 2^-(j+1) of a cell's height: together again one cell each. The curve
falls to half or less over every J w from there on (it does so over the first, and its logarithm is concave), so each copy
hides it.

*Bounds* Heights of the curve at the borders of bins are computed with 40 decimal digits from three exponentials by products
alone; what the steps add up to is below 10^-30, relatively. They become floats 2^-50 above or below the truth, where
conversion and the product with C round by 2^-52 at most: whether a cell is needed or full is never claimed wrongly. Decimal
arithmetic, products and comparisons of floats are the same on every machine, hence so is the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CELL_BITS = 14
CELLS = 1 << CELL_BITS

_BINS_BITS = 5  # from 32 to 63 bins a standard deviation: about as many cut cells by bins as by levels
_REACH = (
    6  # standard deviations; C < CELLS, so the curve is half a cell high before 4.7, and the tail's bins end before 5.2
)
_DIGITS = 40
_SLACK = 2.0**-50


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells for one sigma, in this order: the tail's, cut ones, those left over (level 2C), full ones.

    ``starts``: the first integer of each, int64[CELLS]. ``levels``: how many cells stand below it, int64[unsure], for all that
    are not full. ``tail``: how many belong to the tail. ``width``: w. ``per_unit``: C. ``jump``: J w.
    """

    starts: NDArray[np.int64]
    levels: NDArray[np.int64]
    tail: int
    width: int
    per_unit: int
    jump: int


@lru_cache(maxsize=16)
def cells(sigma: float) -> Cells:
    """The table for ``sigma``, 0.5 to 2^40, its float64 value taken as exact. Kept, as a study has one sigma."""
    width = 1 << max(0, math.frexp(sigma)[1] - 1 - _BINS_BITS)
    highest, lowest = _bin_heights(sigma, width)
    per_unit = CELLS
    while (needed := _cells_needed(highest, per_unit)) > CELLS:
        per_unit = per_unit * CELLS // needed
    tail, jump = _tail(highest, per_unit)
    bins = np.arange(1 - tail, tail)
    stacked = np.ceil(per_unit * highest).astype(np.int64)[np.abs(bins)]
    below = np.floor(per_unit * lowest).astype(np.int64)[np.abs(bins)]
    owners = np.repeat(bins, stacked)
    levels = np.arange(len(owners)) - np.repeat(np.cumsum(stacked) - stacked, stacked)
    full = levels < np.repeat(below, stacked)
    outer = np.arange(tail, tail + jump)
    spare = np.zeros(CELLS - 2 * jump - len(owners), dtype=np.int64)
    starts = np.concatenate([outer, -outer, owners[~full], spare, owners[full]]) * width - width // 2
    unsure = np.concatenate([0 * outer, 0 * outer, levels[~full], spare + 2 * per_unit])
    starts.setflags(write=False)
    unsure.setflags(write=False)
    return Cells(starts, unsure, 2 * jump, width, per_unit, jump * width)


def _bin_heights(sigma: float, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds of the curve over bins 0, 1, 2, ... (and their mirror images): never above the first, never below the second."""
    context = Context(prec=_DIGITS, rounding=ROUND_HALF_EVEN)
    square, half = Fraction(sigma) ** 2, width // 2
    # at half + i width: each step falls by a factor that itself falls by one and the same factor
    height = exp_minus(half**2 / (2 * square), context)
    factor = exp_minus((width**2 + 2 * width * half) / (2 * square), context)
    fall = exp_minus(width**2 / square, context)
    heights = []
    for _ in range(math.ceil(_REACH * sigma / width) + 2):
        heights.append(float(height))
        height, factor = context.multiply(height, factor), context.multiply(factor, fall)
    borders = np.array(heights)
    nearest = borders if width == 1 else np.concatenate([[1.0], borders[:-1]])
    return np.minimum(nearest * (1 + _SLACK), 1.0), borders * (1 - _SLACK)


def _tail(highest: NDArray[np.float64], per_unit: int) -> tuple[int, int]:
    """T and J, a power of two."""
    first = int(np.count_nonzero(per_unit * highest > 0.5))
    jump = 1
    while highest[first + jump] > 0.5 * (1 - 4 * _SLACK) * highest[first]:
        jump *= 2
    return first, jump


def _cells_needed(highest: NDArray[np.float64], per_unit: int) -> int:
    first, jump = _tail(highest, per_unit)
    stacked = np.ceil(per_unit * highest[:first])
    return int(2 * stacked.sum() - stacked[0]) + 2 * jump


def exp_minus(exponent: Fraction, context: Context) -> Decimal:
    """exp(-exponent), from two operations that round correctly: of the fraction and of its exponential."""
    # every operation through this context: operators such as unary minus would round to the ambient 28 digits
    return context.exp(context.divide(Decimal(-exponent.numerator), Decimal(exponent.denominator)))
