"""The discrete Gaussian sampler against its definition; a scale wrong by 5 % must fail every test of distribution."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medfed.errors import ConfigError
from medfed.privacy import noise
from medfed.privacy.keystream import Keystream
from medfed.privacy.noise import discrete_gaussian

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "discrete_gaussian.json").read_text())
DRAWS = 200_000
FALSE_ALARM = 1e-4
SCALES = [0.5, 0.8, 1.0, 2.0, 3.7, 17.3]
LARGE_SCALES = [1000.3, 2.0**18, 2.0**40]


def mass(sigma, support):
    """The probability of each integer of ``support``, from the definition."""
    reach = math.ceil(40 * sigma)
    everything = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2)).sum()
    return np.exp(-(support.astype(float) ** 2) / (2 * sigma**2)) / everything


def goodness_of_fit(draws, sigma):
    """p-value of a chi-square test; bins with fewer than 10 expected draws are joined to the tails."""
    reach = math.ceil(6 * sigma) + 1
    support = np.arange(-reach, reach + 1)
    expected = mass(sigma, support) * len(draws)
    inner = support[expected >= 10]
    low, high = inner[0], inner[-1]
    seen = np.array([(draws == value).sum() for value in inner])
    wanted = expected[expected >= 10]
    tail = (draws < low).sum() + (draws > high).sum()
    rest = len(draws) - wanted.sum()
    return stats.chisquare([*seen, tail], [*wanted, rest]).pvalue


@pytest.mark.parametrize("sigma", SCALES)
def test_noise_small_scale_has_the_exact_distribution_and_five_percent_off_fails(sigma):
    draws = discrete_gaussian(b"\x11" * 32, sigma, DRAWS)
    assert goodness_of_fit(draws, sigma) > FALSE_ALARM
    assert goodness_of_fit(draws, sigma * 1.05) < 1e-12
    assert goodness_of_fit(draws, sigma * 0.95) < 1e-12


@pytest.mark.parametrize("sigma", LARGE_SCALES)
def test_noise_large_scale_fits_the_normal_law_and_five_percent_off_fails(sigma):
    draws = discrete_gaussian(b"\x12" * 32, sigma, DRAWS)
    edges = stats.norm.ppf(np.linspace(0, 1, 65))
    for factor, lawful in [(1.0, True), (1.05, False), (0.95, False)]:
        counts = np.histogram(draws / (sigma * factor), np.concatenate([[-1e9], edges[1:-1], [1e9]]))[0]
        p_value = stats.chisquare(counts).pvalue
        assert p_value > FALSE_ALARM if lawful else p_value < 1e-12


@pytest.mark.parametrize("sigma", LARGE_SCALES)
def test_noise_large_scale_has_uniform_low_bits(sigma):
    draws = discrete_gaussian(b"\x13" * 32, sigma, DRAWS)
    assert stats.chisquare(np.bincount(draws & 15, minlength=16)).pvalue > FALSE_ALARM


def test_noise_neighbors_are_uncorrelated():
    draws = discrete_gaussian(b"\x14" * 32, 50.0, DRAWS).astype(float)
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 4 / math.sqrt(DRAWS)


@pytest.mark.parametrize("vector", VECTORS["draws"], ids=lambda vector: str(vector["sigma"]))
def test_noise_fixed_key_gives_the_recorded_draws(vector):
    draws = discrete_gaussian(bytes.fromhex(vector["key"]), vector["sigma"], len(vector["values"]))
    assert draws.dtype == np.int64
    assert draws.tolist() == vector["values"]


def test_coins_decided_exactly_equal_coins_decided_fast():
    exponents = [Fraction(numerator, 37) for numerator in range(400)]
    floats = np.array([float(exponent) for exponent in exponents])
    fast = noise._coins(Keystream(b"\x21" * 32), floats, exponents.__getitem__)
    exact = noise._coins(Keystream(b"\x21" * 32), floats, exponents.__getitem__, band=2.0)
    assert np.array_equal(fast, exact)
    # the control: exact fractions that are a little off decide some coins otherwise
    skewed = noise._coins(Keystream(b"\x21" * 32), floats, lambda index: exponents[index] * Fraction(3, 2), band=2.0)
    assert not np.array_equal(fast, skewed)


def test_sampler_exponent_in_floats_is_within_the_proven_error():
    for sigma in (0.5, 0.77, 3.7, 1000.3, 2.0**18 + 0.1, 2.0**40):
        sampler = noise._Sampler(Keystream(bytes(32)), sigma)
        distances = np.unique(np.linspace(0, 8 * sigma, 200).astype(np.int64))
        offset = distances / sigma - sigma / (math.floor(sigma) + 1)
        for value, distance in zip(np.exp(-offset * offset / 2).tolist(), distances.tolist(), strict=True):
            low, high = noise._exp_bounds(sampler._exponent(distance), 40)
            assert low - Fraction(12, 2**53) <= Fraction(value) <= high + Fraction(12, 2**53)


def test_geometric_decided_exactly_equals_fast_and_has_its_law():
    fast, bits = noise._geometric(Keystream(b"\x22" * 32), 500)
    exact, _ = noise._geometric(Keystream(b"\x22" * 32), 500, band=2.0)
    assert np.array_equal(fast, exact)
    counts, bits = noise._geometric(Keystream(b"\x23" * 32), DRAWS)
    law = np.exp(-np.arange(9.0)) * (1 - math.exp(-1))
    seen = np.bincount(np.minimum(counts, 9), minlength=10)
    assert stats.chisquare(seen, np.append(law, 1 - law.sum()) * DRAWS).pvalue > FALSE_ALARM
    assert stats.binomtest(int(bits.sum()), DRAWS, 0.5).pvalue > FALSE_ALARM


class Scripted:
    """Keystream words written down beforehand."""

    def __init__(self, *words):
        self._words = list(words)

    def word(self):
        return self._words.pop(0)


@pytest.mark.parametrize(("further", "below"), [(0, True), (2**64 - 1, False)])
def test_uniform_that_ties_draws_further_bits(further, below):
    # the first 63 bits of exp(-1) themselves: only what follows can tell
    low, _ = noise._exp_bounds(Fraction(1), 60)
    head = math.floor(low * 2**63)
    assert noise._Uniform(head, Scripted(further)).is_below_exp(Fraction(1)) is below
    assert noise._Uniform(head - 1, Scripted()).is_below_exp(Fraction(1))
    assert not noise._Uniform(head + 1, Scripted()).is_below_exp(Fraction(1))


def test_exp_bounds_enclose_a_series_with_remainder():
    for exponent in (Fraction(1, 3), Fraction(1), Fraction(7, 2), Fraction(123456789, 7654321)):
        # e^g from below by its series, from above by adding twice the first term left out
        term, below, count = Fraction(1), Fraction(1), 0
        while count < 200:
            count += 1
            term = term * exponent / count
            below += term
        low, high = noise._exp_bounds(exponent, 30)
        assert low < 1 / (below + 2 * term) and 1 / below < high
        assert high - low < Fraction(3, 10**30) * high


@given(st.floats(0.5, 2.0**40), st.integers(0, 200), st.binary(min_size=32, max_size=32))
@settings(max_examples=60, deadline=None)
def test_noise_any_scale_is_repeatable_and_in_reach(sigma, size, key):
    draws = discrete_gaussian(key, sigma, size)
    assert draws.shape == (size,)
    assert (np.abs(draws) <= 12 * sigma + 12).all()  # beyond: probability below 1e-30 a draw
    assert np.array_equal(draws, discrete_gaussian(key, sigma, size))


@pytest.mark.parametrize("sigma", [0.0, 0.49, 2.0**41, float("nan"), float("inf"), -1.0])
def test_noise_scale_out_of_range_is_refused(sigma):
    with pytest.raises(ConfigError, match="MF-203"):
        discrete_gaussian(bytes(32), sigma, 10)
