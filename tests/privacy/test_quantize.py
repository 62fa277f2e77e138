"""The grid and the ring: exactness, saturation, overflow bounds."""

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import ConfigError, LocalProtocolError
from medfed.privacy.accounting import sensitivity
from medfed.privacy.keystream import Keystream
from medfed.privacy.quantize import (
    BLOCK,
    dequantize,
    grid_exponent,
    limit,
    quantize,
    quantize_stochastic,
    unwrap,
    wrap,
    wrap_probability,
)

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


def test_quantize_ties_go_to_even_across_blocks():
    values = np.arange(-(2 * BLOCK + 3), 2 * BLOCK + 3) / 2
    assert np.array_equal(quantize(values, 0, 2**24 - 1), np.rint(values).astype(np.int64))


@given(VALUES, st.integers(-10, 20), st.booleans())
def test_quantize_into_a_buffer_or_in_place_is_the_same(values, exponent, in_place):
    vector = np.array(values)
    want = quantize(vector, exponent, 1000)
    out = vector.view(np.int64) if in_place else np.full(len(values), 7, np.int64)
    assert quantize(vector, exponent, 1000, out=out) is out
    assert out.tolist() == want.tolist()


def test_quantize_in_place_takes_no_memory_of_the_vectors_size():
    vector = np.full(1_000_000, 0.25)
    tracemalloc.start()
    try:
        quantize(vector, 3, 100, out=vector.view(np.int64))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_quantize_buffer_of_other_length_is_refused():
    with pytest.raises(LocalProtocolError, match="MF-180"):
        quantize(np.zeros(3), 0, 100, out=np.zeros(4, np.int64))


@given(VALUES, st.integers(-10, 20), st.binary(min_size=32, max_size=32), st.booleans())
def test_stochastic_rounding_is_the_formula_of_the_design(values, exponent, key, in_place):
    vector, bound = np.array(values), 1000
    coins = Keystream(key).words(len(values) // 8 + 1).view(np.uint8).tolist()
    fine = [
        max(-256 * bound, min(256 * bound, round(Fraction(value) * Fraction(2) ** (exponent + 8)))) for value in values
    ]
    out = vector.view(np.int64) if in_place else None
    words = quantize_stochastic(vector, exponent, bound, key, out=out)
    assert words.tolist() == [(number + coin) >> 8 for number, coin in zip(fine, coins, strict=False)]


def test_stochastic_rounding_is_right_in_the_mean_where_nearest_is_not():
    size = 4 * BLOCK
    vector = np.repeat([0.3, -0.125, 7.0, 1e9], size // 4)
    words = quantize_stochastic(vector, 0, 1000, bytes(32))
    means = words.reshape(4, -1).mean(axis=1)
    assert np.abs(means[:2] - [0.3, -0.125]).max() < 0.015  # five standard deviations, and 1/512 of a step
    assert means[2:].tolist() == [7.0, 1000.0]
    assert not quantize(vector, 0, 1000)[: size // 2].any()


def test_stochastic_rounding_does_not_repeat_its_coins_from_block_to_block():
    words = quantize_stochastic(np.full(2 * BLOCK, 0.5), 0, 1000, bytes(32))
    assert not np.array_equal(words[:BLOCK], words[BLOCK:])


def test_stochastic_rounding_not_finite_is_refused():
    with pytest.raises(LocalProtocolError, match="MF-184"):
        quantize_stochastic(np.array([np.nan]), 0, 100, bytes(32))


def test_quantize_huge_values_saturate_and_never_wrap():
    assert quantize(np.array([1e308, -1e308, 1e-320]), 300, 100).tolist() == [100, -100, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, BLOCK - 1, BLOCK])
def test_quantize_not_finite_is_refused(bad, position):
    vector = np.zeros(BLOCK + 1)
    vector[position] = bad
    with pytest.raises(LocalProtocolError, match="MF-184"):
        quantize(vector, 0, 100)


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
