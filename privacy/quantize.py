"""Real vectors to integers of the masking ring and back, for hospitals (to) and everybody (back).

Order under differential privacy: ``quantize`` (saturates, rounds once), add integer noise, ``wrap`` modulo 2^k, mask.
Nothing is clipped after the noise. A sum that leaves the ring spoils the model, never privacy; ``wrap_probability``
bounds that when a study is checked.

*Source* design of the secure aggregation, section 8. Vectors: float64[d] -> int64[d] -> uint16/uint32[d].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, LocalProtocolError

RING_BITS = (16, 32)
FLOAT32_EXACT = 2**24 - 1
BLOCK = 1 << 16  # numbers worked on at once: half a megabyte an array, which stays in the processor's cache
_EXPONENTS = range(-512, 513)

RingWords = NDArray[np.uint16] | NDArray[np.uint32]
RingIntegers = NDArray[np.int16] | NDArray[np.int32]


def _ring(ring_bits: int) -> None:
    if ring_bits not in RING_BITS:
        raise ConfigError(203, f"a ring of {ring_bits} bits", "use 16 or 32")


def limit(ring_bits: int, parties: int) -> int:
    """L: the largest absolute value of one hospital's word, such that ``parties`` of them sum without overflow.

    L = min(2^24 - 1, floor((2^(k-1) - 1) / n)). Raises ``ConfigError`` (MF-145) where no integer is left.
    """
    _ring(ring_bits)
    if parties < 1 or (2 ** (ring_bits - 1) - 1) // parties < 1:
        raise ConfigError(145, f"{parties} hospitals in a ring of {ring_bits} bits", "use a wider ring")
    return int(min(FLOAT32_EXACT, (2 ** (ring_bits - 1) - 1) // parties))


def grid_exponent(ring_bits: int, parties: int, value_range: float) -> int:
    """e = floor(log2(L / R)): the finest power-of-two grid on which values up to ``value_range`` do not saturate."""
    bound = limit(ring_bits, parties)
    if not 0.0 < value_range < math.inf:
        raise ConfigError(203, f"range {value_range} is not a positive number", "correct it")
    exponent = math.floor(math.log2(bound) - math.log2(value_range))
    # the logarithms may be off by one in the last place: settle it with exact products
    while math.ldexp(value_range, exponent) > bound:
        exponent -= 1
    while math.ldexp(value_range, exponent + 1) <= bound:
        exponent += 1
    if exponent not in _EXPONENTS:
        raise ConfigError(203, f"range {value_range} is far from any gradient's size", "correct it")
    return exponent


def quantize(vector: NDArray[np.float64], exponent: int, bound: int) -> NDArray[np.int64]:
    """``rint(clip(x 2^e, -L, L))``, ties to even; ``bound`` is ``limit(...)`` or less.

    *Guarantees* Unsaturated values err by at most 2^-(e+1); values out of range saturate and never wrap; vectors that
    differ by y come out at most \\|y\\| 2^e + sqrt(d) apart. Raises ``LocalProtocolError`` (MF-184) for NaN or infinity.
    """
    words = np.empty(vector.size, np.int64)
    for start in range(0, vector.size, BLOCK):
        part = vector[start : start + BLOCK]
        if not np.isfinite(part).all():
            raise LocalProtocolError(184, "the vector to send is not finite", "check the records and the learning rate")
        with np.errstate(over="ignore", under="ignore"):
            scaled = np.ldexp(part, exponent)
        np.clip(scaled, -bound, bound, out=scaled)
        words[start : start + BLOCK] = np.rint(scaled, out=scaled)
    return words


def dequantize(total: NDArray[np.int64], exponent: int) -> NDArray[np.float64]:
    """The real value of a sum on the grid, exactly: float64[d]."""
    values: NDArray[np.float64] = np.ldexp(total.astype(np.float64), -exponent)
    return values


def wrap(words: NDArray[np.int64], ring_bits: int) -> RingWords:
    """Integers modulo 2^k, as uint16 or uint32."""
    _ring(ring_bits)
    if ring_bits == 16:
        return (words & 0xFFFF).astype(np.uint16)
    return (words & 0xFFFFFFFF).astype(np.uint32)


def unwrap(words: RingWords) -> RingIntegers:
    """The two's complement reading of ring words, as a view: exact wherever the true sum lies in [-2^(k-1), 2^(k-1) - 1]."""
    if words.dtype == np.uint16:
        return words.view(np.int16)
    if words.dtype == np.uint32:
        return words.view(np.int32)
    raise LocalProtocolError(180, f"ring words of type {words.dtype}", "use uint16 or uint32")


def wrap_probability(parties: int, bound: int, sigma_total: float, words: int, ring_bits: int) -> float:
    """Upper bound on the chance that noise carries any of ``words`` sums out of the ring, whatever the data.

    ``sigma_total``: square root of the summed variance parameters of all parties' noise, in grid units. Data reach
    ``parties * bound`` at worst, so noise must reach 2^(k-1) minus that. Discrete Gaussians are subgaussian with their
    parameter (Canonne, Kamath, Steinke 2020, section 2.5), hence 2 exp(-h^2 / (2 sigma^2)) a word, union over words.
    """
    _ring(ring_bits)
    headroom = 2 ** (ring_bits - 1) - parties * bound
    if headroom <= 0:
        return 1.0
    if sigma_total <= 0:
        return 0.0
    return min(1.0, 2.0 * words * math.exp(-(headroom**2) / (2 * sigma_total**2)))
