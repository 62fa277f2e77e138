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


def equiprobable_bins(draws, sigma, bins=64):
    """p-value of a chi-square test against the normal law, which a large scale cannot be told from: int64[n]."""
    edges = stats.norm.ppf(np.linspace(0, 1, bins + 1))
    counts = np.histogram(draws / sigma, np.concatenate([[-1e9], edges[1:-1], [1e9]]))[0]
    return stats.chisquare(counts).pvalue


def moment_scores(draws, sigma):
    """Mean, variance and fourth moment in standard errors from their exact values: float64[3]."""
    reach = math.ceil(12 * sigma)
    support = np.arange(-reach, reach + 1.0) if sigma < 1000 else np.linspace(-12, 12, 4001) * sigma
    chances = np.exp(-((support / sigma) ** 2) / 2)
    chances /= chances.sum()
    scaled, support = draws / sigma, support / sigma
    scores = []
    for power in (1, 2, 4):
        expected, square = (chances @ support ** (times * power) for times in (1, 2))
        scores.append((np.mean(scaled**power) - expected) / math.sqrt((square - expected**2) / len(draws)))
    return np.array(scores)


@pytest.mark.parametrize("sigma", SCALES)
def test_noise_small_scale_has_the_exact_distribution_and_five_percent_off_fails(sigma):
    assert goodness_of_fit(discrete_gaussian(b"\x11" * 32, sigma, DRAWS), sigma) > FALSE_ALARM
    for wrong in (0.95, 1.05):
        # the planted fault: a sampler of the wrong scale (0.5 is the least there is: the claim is off instead)
        draws = discrete_gaussian(b"\x11" * 32, max(0.5, wrong * sigma), DRAWS)
        assert goodness_of_fit(draws, sigma if wrong * sigma >= 0.5 else sigma / wrong) < 1e-12


@pytest.mark.parametrize("sigma", LARGE_SCALES)
def test_noise_large_scale_fits_the_normal_law_and_five_percent_off_fails(sigma):
    assert equiprobable_bins(discrete_gaussian(b"\x12" * 32, sigma, DRAWS), sigma) > FALSE_ALARM
    for wrong in (0.95, 1.05):
        draws = discrete_gaussian(b"\x12" * 32, min(2.0**40, wrong * sigma), DRAWS)
        assert equiprobable_bins(draws, sigma if wrong * sigma <= 2.0**40 else sigma / wrong) < 1e-12


@pytest.mark.parametrize("sigma", [*SCALES, *LARGE_SCALES])
def test_noise_has_its_exact_moments_and_five_percent_off_fails(sigma):
    """Each within 4.4 standard errors of the truth (two-sided false alarm 1e-5, three a scale); the variance of a scale that is
    5 % off lies 30 of them away."""
    draws = discrete_gaussian(b"\x15" * 32, sigma, DRAWS)
    assert (np.abs(moment_scores(draws, sigma)) < 4.4).all()
    for claimed in (sigma / 0.95, sigma / 1.05):
        assert abs(moment_scores(draws, claimed)[1]) > 20


SHAPE_DRAWS = 1 << 20


def rounded_gaussian(sd):
    return np.rint(np.random.default_rng(6).normal(0, sd, SHAPE_DRAWS)).astype(np.int64)


def drawn_from(weights):
    """Draws of an integer law by its weights over -20 to 20."""
    return np.random.default_rng(6).choice(np.arange(-20, 21), SHAPE_DRAWS, p=weights / weights.sum())


SMALL = 0.7
INTEGERS = np.arange(-20, 21)
LAW = np.exp(-(INTEGERS**2) / (2 * SMALL**2))
VARIANCE = float(LAW @ INTEGERS**2 / LAW.sum())
# r such that 2r / (1-r)^2, the variance of a discrete Laplace law of ratio r, is the noise's
RATIO = 1 + 1 / VARIANCE - math.sqrt((1 + 1 / VARIANCE) ** 2 - 1)
WRONG_SHAPES = {
    "a float Gaussian, rounded": lambda: rounded_gaussian(SMALL),
    "a float Gaussian, rounded, of the same variance": lambda: rounded_gaussian(0.6372),
    "Laplace of the same variance": lambda: drawn_from(RATIO ** np.abs(INTEGERS)),
    "zero counted twice": lambda: drawn_from(np.where(INTEGERS == 0, 2 * LAW, LAW)),
    "tails cut at three standard deviations": lambda: drawn_from(np.where(np.abs(INTEGERS) > 2, 0, LAW)),
    "one value in fifty not noised": lambda: drawn_from(LAW / LAW.sum() + (INTEGERS == 0) / 50),
}


@pytest.mark.parametrize("shape", WRONG_SHAPES)
def test_noise_of_a_wrong_shape_fails(shape):
    """What a test by variance alone would pass."""
    assert goodness_of_fit(WRONG_SHAPES[shape](), SMALL) < 1e-9


def test_noise_of_the_wrong_shapes_scale_passes():
    """The control of the test above, and that two of its shapes have the variance they say."""
    assert goodness_of_fit(discrete_gaussian(b"\x16" * 32, SMALL, SHAPE_DRAWS), SMALL) > FALSE_ALARM
    assert goodness_of_fit(drawn_from(LAW), SMALL) > FALSE_ALARM
    for shape in ("a float Gaussian, rounded, of the same variance", "Laplace of the same variance"):
        assert WRONG_SHAPES[shape]().var() == pytest.approx(VARIANCE, rel=0.01)


@pytest.mark.parametrize("sigma", LARGE_SCALES)
def test_noise_large_scale_has_uniform_low_bits(sigma):
    draws = discrete_gaussian(b"\x13" * 32, sigma, DRAWS)
    assert stats.chisquare(np.bincount(draws & 15, minlength=16)).pvalue > FALSE_ALARM


def largest_autocorrelation(draws):
    """Over all lags up to half the length, in standard errors: so that no period goes unseen."""
    spectrum = np.fft.rfft(draws - draws.mean(), 2 * len(draws))
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[1 : len(draws) // 2]
    pairs = len(draws) - np.arange(1, len(draws) // 2)
    return float((np.abs(correlation) / np.sqrt(pairs)).max() / draws.var())


def test_noise_words_are_independent_at_every_lag():
    """6.3 standard errors: false alarm 3e-5 over 100,000 lags. The values, and their sizes without the sign."""
    draws = discrete_gaussian(b"\x14" * 32, 50.0, DRAWS).astype(float)
    assert largest_autocorrelation(draws) < 6.3
    assert largest_autocorrelation(np.abs(draws)) < 6.3
    # the planted fault: a stream that begins anew after two batches of proposals
    assert largest_autocorrelation(np.resize(draws[:31_000], DRAWS)) > 100


def test_noise_neighbors_are_independent():
    """Not only uncorrelated: a table of sixteen equally likely bins by sixteen; false alarm 1e-4."""
    draws = discrete_gaussian(b"\x14" * 32, 2.0**18, DRAWS)
    edges = stats.norm.ppf(np.linspace(0, 1, 17))[1:-1] * 2.0**18
    bins = np.digitize(draws, edges)
    for lag in (1, 2):
        table = np.histogram2d(bins[:-lag], bins[lag:], bins=16)[0]
        assert stats.chi2_contingency(table).pvalue > FALSE_ALARM
    shared = np.where(np.arange(DRAWS) % 50 == 0, np.roll(draws, 1), draws)  # one in fifty repeats the one before
    table = np.histogram2d(np.digitize(shared[:-1], edges), np.digitize(shared[1:], edges), bins=16)[0]
    assert stats.chi2_contingency(table).pvalue < 1e-12


def test_noise_of_different_keys_is_independent():
    """Sixty-four keys that differ in two bits: all pairs within 5.5 standard errors, false alarm 8e-5."""
    keys = [bytes([1 << (number % 8) if place == number // 8 else 0 for place in range(32)]) for number in range(64)]
    draws = np.array([discrete_gaussian(key, 50.0, 4096) for key in keys], float)
    pairs = np.abs(np.corrcoef(draws)[np.triu_indices(64, 1)])
    assert pairs.max() < 5.5 / math.sqrt(4096)
    draws[7] = draws[3]  # the planted fault: one key used twice
    assert np.abs(np.corrcoef(draws)[np.triu_indices(64, 1)]).max() > 0.99


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
