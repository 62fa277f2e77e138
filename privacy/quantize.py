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
from medfed.privacy.keystream import Keystream

RING_BITS = (16, 32)
FLOAT32_EXACT = 2**24 - 1
BLOCK = 1 << 15  # numbers worked on at once: a quarter of a megabyte an array, so two stay in the second-level cache
_EXPONENTS = range(-512, 513)
# Added to |x| < 2^51 it leaves no room below the ones in a float64's 52 bits: the processor rounds, ties to even, and the
# integer stands in the low bits. Faster than rint and a conversion, which numpy does one number at a time.
_ROUNDER = 1.5 * 2.0**52
_ROUNDER_BITS = int(np.float64(_ROUNDER).view(np.int64))

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


def quantize(
    vector: NDArray[np.float64], exponent: int, bound: int, out: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """``rint(clip(x 2^e, -L, L))``, ties to even; ``exponent`` is that of ``grid_exponent``, ``bound`` ``limit(...)`` or less.

    ``out``: int64[d], contiguous, to write to instead of new memory; ``vector.view(np.int64)`` overwrites the vector itself.
    Scratch memory is 32 KiB.

    *Guarantees* Unsaturated values err by at most 2^-(e+1); values out of range saturate and never wrap; vectors that
    differ by y come out at most \\|y\\| 2^e + sqrt(d) apart. Raises ``LocalProtocolError`` (MF-184) for NaN or infinity;
    ``out`` then holds nothing of use.
    """
    words = _buffer(vector, out)
    for start in range(0, vector.size, BLOCK):
        _round_block(vector[start : start + BLOCK], exponent, bound, words[start : start + BLOCK])
    return words


def quantize_stochastic(
    vector: NDArray[np.float64], exponent: int, bound: int, key: bytes, out: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """``clip(x 2^e, -L, L)`` rounded up with the probability of its fraction, to 1/256 of a step: right in the mean.

    For what has its noise already, and little of it: numbers far below a step that ``quantize`` makes 0 in every round, so that
    they never add up, here do. Where noise is half a step or more ``quantize`` is all but right in the mean too, and errs by 0.29
    steps in the root mean square instead of 0.41.
    ``key``: 32 fresh bytes, of this vector only. ``out`` and errors as ``quantize``. The sensitivity that
    ``privacy.mechanism`` charges for rounding before noise is not proven for this one.

    *Guarantees* Unsaturated values err by less than 2^-e, and values out of range saturate.

    *Source* design, section 8: ``(rint(x 2^e 256) + byte of AES keystream) >> 8``.
    """
    words, coins = _buffer(vector, out), Keystream(key)
    for start in range(0, vector.size, BLOCK):
        block = words[start : start + BLOCK]
        _round_block(vector[start : start + BLOCK], exponent + 8, bound << 8, block)
        np.add(block, coins.words(-(-block.size // 8)).view(np.uint8)[: block.size], out=block)
        np.right_shift(block, 8, out=block)
    return words


def _buffer(vector: NDArray[np.float64], out: NDArray[np.int64] | None) -> NDArray[np.int64]:
    words = np.empty(vector.size, np.int64) if out is None else out
    if words.shape != vector.shape:
        raise LocalProtocolError(180, "vector and buffer differ in length", "report this as a defect")
    return words


def _round_block(values: NDArray[np.float64], exponent: int, bound: int, words: NDArray[np.int64]) -> None:
    """Scaled, saturated, rounded: into ``words``, which may be the memory of ``values``."""
    if not np.isfinite(values).all():
        raise LocalProtocolError(184, "the vector to send is not finite", "check the records and the learning rate")
    scaled = words.view(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        np.multiply(values, math.ldexp(1.0, exponent), out=scaled)
    np.clip(scaled, -bound, bound, out=scaled)
    np.add(scaled, _ROUNDER, out=scaled)
    np.subtract(words, _ROUNDER_BITS, out=words)


def dequantize(total: NDArray[np.int64], exponent: int) -> NDArray[np.float64]:
    """The real value of a sum on the grid, exactly: float64[d]."""
    values = total.astype(np.float64)
    values *= 2.0**-exponent  # a power of two: no digit is lost
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
