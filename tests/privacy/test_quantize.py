"""The grid and the ring: exactness, saturation, overflow bounds."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import ConfigError, LocalProtocolError
from medfed.privacy.accounting import sensitivity
from medfed.privacy.quantize import dequantize, grid_exponent, limit, quantize, unwrap, wrap, wrap_probability

RINGS = st.sampled_from([16, 32])
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30)


def test_limit_known_answers():
    assert limit(32, 1) == limit(32, 128) == 2**24 - 1
    assert limit(32, 129) == (2**31 - 1) // 129
    assert limit(16, 10) == 3276


@given(RINGS, st.integers(1, 2000))
def test_limit_times_parties_stays_in_the_ring(ring_bits, parties):
    assert limit(ring_bits, parties) * parties <= 2 ** (ring_bits - 1) - 1


@given(RINGS, st.integers(1, 500), st.floats(1e-30, 1e30))
def test_grid_exponent_is_the_finest_that_does_not_saturate(ring_bits, parties, value_range):
    bound, exponent = limit(ring_bits, parties), grid_exponent(ring_bits, parties, value_range)
    assert (
        Fraction(value_range) * Fraction(2) ** exponent <= bound < Fraction(value_range) * Fraction(2) ** (exponent + 1)
    )


@pytest.mark.parametrize("power", range(-40, 41, 8))
def test_grid_exponent_exact_at_powers_of_two(power):
    # the ratio L / R is exactly a power of two here, where a rounded logarithm is most likely to miss
    assert grid_exponent(16, 1, math.ldexp(32767, power)) == -power


@given(VALUES, st.integers(-10, 20), RINGS)
def test_quantize_agrees_with_exact_arithmetic(values, exponent, ring_bits):
    bound = limit(ring_bits, 4)
    expected = [max(-bound, min(bound, round(Fraction(value) * Fraction(2) ** exponent))) for value in values]
    words = quantize(np.array(values), exponent, bound)
    assert words.dtype == np.int64
    assert words.tolist() == expected  # round() of a Fraction takes ties to even


@given(VALUES, st.integers(0, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_quantize_moves_no_further_than_the_sensitivity(values, exponent, seed):
    generator = np.random.default_rng(seed)
    shift = generator.normal(size=len(values))
    shift *= generator.uniform(0, 2) / np.linalg.norm(shift)
    first = quantize(np.array(values), exponent, 2000)
    second = quantize(np.array(values) + shift, exponent, 2000)
    assert np.linalg.norm(first - second) <= sensitivity(
        float(np.linalg.norm(shift)) * (1 + 1e-9) + 1e-9, exponent, len(values)
    )


def test_quantize_huge_values_saturate_and_never_wrap():
    assert quantize(np.array([1e308, -1e308, 1e-320]), 300, 100).tolist() == [100, -100, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantize_not_finite_is_refused(bad):
    with pytest.raises(LocalProtocolError, match="MF-184"):
        quantize(np.array([0.0, bad]), 0, 100)


@given(RINGS, st.data())
def test_ring_sum_of_wrapped_words_reads_the_exact_sum(ring_bits, data):
    parties = data.draw(st.integers(1, 8))
    bound = limit(ring_bits, parties)
    vectors = [
        np.array(data.draw(st.lists(st.integers(-bound, bound), min_size=3, max_size=3)), dtype=np.int64)
        for _ in range(parties)
    ]
    total = wrap(vectors[0], ring_bits)
    for vector in vectors[1:]:
        total = total + wrap(vector, ring_bits)
    assert np.array_equal(unwrap(total), sum(vectors))


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=10), RINGS)
def test_wrap_is_reduction_modulo_the_ring(values, ring_bits):
    words = wrap(np.array(values, dtype=np.int64), ring_bits)
    assert words.dtype == (np.uint16 if ring_bits == 16 else np.uint32)
    assert words.tolist() == [value % 2**ring_bits for value in values]
    half = 2 ** (ring_bits - 1)
    assert unwrap(words).tolist() == [(value + half) % 2**ring_bits - half for value in values]


def test_unwrap_other_types_are_refused():
    with pytest.raises(LocalProtocolError, match="MF-180"):
        unwrap(np.zeros(3, dtype=np.int64))


def test_dequantize_is_exact():
    assert dequantize(np.array([3, -5]), 3).tolist() == [0.375, -0.625]
    assert dequantize(np.array([3, -5]), -2).tolist() == [12.0, -20.0]


def test_wrap_probability_bounds_what_is_seen():
    # 16 bits, headroom 2768, noise of sd 1000: wraps are common enough to count
    noise = np.rint(np.random.default_rng(5).normal(0, 1000, size=400_000)).astype(np.int64)
    sums = 10 * 3000 + noise
    seen = float((unwrap(wrap(sums, 16)) != sums).mean())
    bound = wrap_probability(10, 3000, 1000.0, 1, 16)
    assert 0.001 < seen <= bound < 0.05
    assert wrap_probability(10, 3000, 1000.0, 50, 16) == min(1.0, 50 * bound)


def test_wrap_probability_without_headroom_or_noise():
    assert wrap_probability(10, 3276, 1.0, 1, 16) < 1.0  # eight steps of headroom
    assert wrap_probability(1, 2**15, 1.0, 1, 16) == 1.0
    assert wrap_probability(10, 3000, 0.0, 10**6, 16) == 0.0


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: limit(24, 3), 203),
        (lambda: limit(16, 0), 145),
        (lambda: limit(16, 40_000), 145),
        (lambda: grid_exponent(32, 3, 0.0), 203),
        (lambda: grid_exponent(32, 3, float("nan")), 203),
        (lambda: grid_exponent(32, 3, 1e-300), 203),
        (lambda: wrap(np.zeros(1, dtype=np.int64), 8), 203),
    ],
)
def test_ring_and_range_out_of_bounds_are_refused(call, code):
    with pytest.raises(ConfigError, match=f"MF-{code}"):
        call()
