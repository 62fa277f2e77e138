"""The discrete Gaussian sampler against its definition; a scale wrong by 5 % must fail every test of distribution."""

import dataclasses
import hashlib
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
from medfed.privacy import noise, noise_cells
from medfed.privacy.keystream import Keystream
from medfed.privacy.noise import discrete_gaussian

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "discrete_gaussian.json").read_text())
DRAWS = 200_000
FALSE_ALARM = 1e-4
# the cells are one integer wide up to 64, and the bins finest (63 a standard deviation) just below a power of two
SCALES = [0.5, 0.8, 1.0, 2.0, 3.7, 17.3, 63.9, 64.0]
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
    seen = np.bincount(np.clip(draws, low - 1, high + 1) - low + 1, minlength=len(inner) + 2)[1:-1]
    wanted = expected[expected >= 10]
    tail = (draws < low).sum() + (draws > high).sum()
    rest = len(draws) - wanted.sum()
    return stats.chisquare([*seen, tail], [*wanted, rest]).pvalue


def equiprobable_bins(draws, sigma, bins=64):
    """p-value of a chi-square test against the normal law, which a large scale cannot be told from: int64[n]."""
    edges = np.ceil(stats.norm.ppf(np.linspace(0, 1, bins + 1)[1:-1]) * sigma)
    counts = np.bincount(np.searchsorted(edges, draws, side="right"), minlength=bins)
    # halfway between two integers: the sum up to there is the integral to there, but for its curvature, 1/(24 sigma^2)
    below = stats.norm.cdf((edges - 0.5) / sigma)
    return stats.chisquare(counts, np.diff(below, prepend=0, append=1) * len(draws)).pvalue


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


MANY = 1 << 21


@pytest.mark.parametrize("sigma", [*SCALES, *LARGE_SCALES, 3e5])
def test_noise_one_percent_off_fails(sigma):
    """Two million draws; of large scales over 1024 bins, finer than the table's, false alarm 1e-4."""
    fit = goodness_of_fit if sigma < 1000 else lambda draws, sd: equiprobable_bins(draws, sd, 1024)
    draws = discrete_gaussian(b"\x17" * 32, sigma, MANY)
    assert fit(draws, sigma) > FALSE_ALARM
    for claimed in (sigma * 1.01, sigma / 1.01):
        assert fit(draws, claimed) < 1e-12


@pytest.mark.parametrize("sigma", [1.0, 17.3, *LARGE_SCALES])
def test_noise_is_symmetric(sigma):
    """Signs, and sizes on either side alike: false alarm 1e-4 each."""
    draws = discrete_gaussian(b"\x18" * 32, sigma, MANY)
    positive, negative = draws[draws > 0], -draws[draws < 0]
    assert stats.binomtest(len(positive), len(positive) + len(negative), 0.5).pvalue > FALSE_ALARM
    edges = np.unique(np.ceil(np.arange(0.25, 3.75, 0.25) * sigma))[1:]

    def alike(negative):
        sides = [np.bincount(np.digitize(side, edges), minlength=len(edges) + 1) for side in (positive, negative)]
        return stats.chi2_contingency(sides).pvalue

    assert alike(negative) > FALSE_ALARM
    # the planted fault: one negative value in fifty is one standard deviation further out
    assert alike(np.where(np.arange(len(negative)) % 50 == 0, negative + math.ceil(sigma), negative)) < 1e-9


@pytest.mark.parametrize("sigma", LARGE_SCALES)
def test_noise_tail_has_its_mass(sigma):
    """Four million draws: 1951, 266 and 28 expected beyond; false alarm 1e-4 each. The tail's cells begin at 3.3 or so."""
    sizes = np.abs(discrete_gaussian(b"\x19" * 32, sigma, 1 << 22)) / sigma
    for reach in (3.5, 4.0, 4.5):
        chance = math.erfc(reach / math.sqrt(2))
        assert stats.binomtest(int((sizes > reach).sum()), 1 << 22, chance).pvalue > FALSE_ALARM
        assert stats.binomtest(int((sizes * 1.05 > reach).sum()), 1 << 22, chance).pvalue < 0.05


def use_few_cells(monkeypatch, bits):
    monkeypatch.setattr(noise, "CELL_BITS", bits)
    monkeypatch.setattr(noise_cells, "CELLS", 1 << bits)
    monkeypatch.setattr(noise, "cells", noise_cells.cells.__wrapped__)


@pytest.mark.parametrize(("sigma", "bits"), [(1.0, 4), (3.7, 6), (3.7, 7), (17.3, 9)])
def test_noise_of_few_cells_has_the_same_law(monkeypatch, sigma, bits):
    """Where every path of the rare rest is a common one: up to a fifth of all draws come from the tail's copies."""
    use_few_cells(monkeypatch, bits)
    assert goodness_of_fit(discrete_gaussian(b"\x1a" * 32, sigma, SHAPE_DRAWS), sigma) > FALSE_ALARM


@pytest.mark.parametrize("fault", ["jumps too seldom", "no jumps", "jumps to the wrong side", "copies too tall"])
def test_noise_of_a_wrong_tail_fails(monkeypatch, fault):
    use_few_cells(monkeypatch, 6)
    right = noise_cells.cells(3.7)
    changes = {"no jumps": {"jump": 0}, "jumps to the wrong side": {"jump": -right.jump}}.get(fault, {})
    monkeypatch.setattr(noise, "cells", lambda sigma: dataclasses.replace(right, **changes))
    heads = noise._heads_in_a_row
    if fault == "jumps too seldom":
        monkeypatch.setattr(noise, "_heads_in_a_row", lambda stream, count: heads(stream, count) // 2)
    if fault == "copies too tall":
        ldexp = np.ldexp
        monkeypatch.setattr(noise.np, "ldexp", lambda value, power: ldexp(value, power - 1))
    assert goodness_of_fit(discrete_gaussian(b"\x1a" * 32, 3.7, SHAPE_DRAWS), 3.7) < 1e-9


EXACTLY = 40


def curve(sigma, value):
    """Fractions below and above exp(-x^2 / (2 sigma^2)), 10^-40 apart relatively."""
    return noise._exp_bounds(Fraction(value) ** 2 / (2 * Fraction(sigma) ** 2), EXACTLY)


def faults_of(table, sigma):
    """What is wrong with a table, by exact fractions: list[str]. At every integer of narrow bins, else at the ends and zero."""
    faults, width, unit = [], table.width, table.per_unit
    unsure = len(table.levels)
    tail, cut, full = np.split(table.starts, [table.tail, unsure])
    levels = table.levels[table.tail :]
    cut, levels = cut[levels < unit], levels[levels < unit]
    if len(table.starts) != noise_cells.CELLS or table.levels[: table.tail].any():
        faults.append("cells of the tail or number of cells")
    bins = np.unique(np.concatenate([cut, full]))
    everywhere = np.sort(np.concatenate([tail, bins]))
    side = table.tail // 2
    if (np.diff(everywhere) != width).any() or not np.array_equal(everywhere[side:-side], bins):
        faults.append("bins overlap or leave gaps")
    if table.jump != side * width:
        faults.append("copies overlap or leave gaps")
    for start in bins.tolist():
        under, over = int((full == start).sum()), np.sort(levels[cut == start]).tolist()
        height = under + len(over)
        if over != list(range(under, height)):
            faults.append(f"levels at {start}")
        inside = (
            range(start, start + width)
            if width <= 4
            else [start, start + width - 1, *([0] if start < 0 < start + width else [])]
        )
        for value in inside:
            low, high = curve(sigma, value) if value else (1, 1)
            if Fraction(under, unit) > low:
                faults.append(f"full cell above the curve at {value}")
            if Fraction(height, unit) < high:
                faults.append(f"curve above all cells at {value}")
    for start in tail.tolist():
        nearest = start if start > 0 else -(start + width - 1)
        faults += [
            f"curve above copy {copy} of the tail at {nearest}"
            for copy in range(8)
            if curve(sigma, nearest + copy * table.jump)[1] > Fraction(1, unit << copy + 1)
        ]
    # all further copies: halved or less from one to the next, and ever more so
    nearest = min(int(bins[-1]) + width, 1 - int(bins[0]))
    if 2 * curve(sigma, nearest + table.jump)[1] > curve(sigma, nearest)[0]:
        faults.append("copies fall too slowly")
    return faults


TABLES = [*SCALES, 31.999, 64.1, 127.9, *LARGE_SCALES, 3e5, 2.0**40 * 0.501]


@pytest.mark.parametrize("sigma", TABLES)
def test_cells_hide_the_curve_and_full_ones_lie_under_it(sigma):
    table = noise_cells.cells(sigma)
    assert faults_of(table, sigma) == []
    accepted = (
        (math.sqrt(2 * math.pi) * sigma if sigma > 1 else 1 / mass(sigma, np.array([0]))[0])
        * table.per_unit
        / table.width
    )
    assert accepted / noise_cells.CELLS > 0.97  # few proposals wasted
    assert len(table.levels) < 0.05 * noise_cells.CELLS  # and few that need a height


def test_cells_faults_are_found():
    table = noise_cells.cells(17.3)
    cut = table.levels.copy()
    cut[table.tail] += 1
    assert any("levels" in fault for fault in faults_of(dataclasses.replace(table, levels=cut), 17.3))
    gone = table.levels.copy()
    gone[np.flatnonzero((table.starts[: len(gone)] == 5) & (gone < table.per_unit))[-1]] = 2 * table.per_unit
    assert any("above all cells" in fault for fault in faults_of(dataclasses.replace(table, levels=gone), 17.3))
    for wrong, words in ((17.4, "curve above"), (17.2, "full cell above")):
        assert any(words in fault for fault in faults_of(table, wrong))
    assert faults_of(dataclasses.replace(table, jump=table.jump + 1), 17.3) == ["copies overlap or leave gaps"]
    for tail in (table.tail - 2, table.tail + 2):
        assert faults_of(dataclasses.replace(table, tail=tail), 17.3) != []


@given(st.floats(math.log(0.5), 40 * math.log(2)).map(math.exp))
@settings(max_examples=25, deadline=None)
def test_cells_of_any_scale_are_right(sigma):
    sigma = min(max(sigma, 0.5), 2.0**40)
    assert faults_of(noise_cells.cells.__wrapped__(sigma), sigma) == []


def test_cells_are_the_same_on_every_machine():
    """Recorded on an x86-64 processor with AVX-512."""
    digest = hashlib.sha256()
    for sigma in TABLES:
        table = noise_cells.cells(sigma)
        digest.update(table.starts.astype("<i8").tobytes() + table.levels.astype("<i8").tobytes())
        digest.update(f"{table.tail} {table.width} {table.per_unit} {table.jump}".encode())
    assert digest.hexdigest() == "ef06dc91a6ca8daee0df40478eb21179f9d1afd68803d34a5937969d6ac576ec"


def test_cells_are_kept_and_cannot_be_changed():
    table = noise_cells.cells(1000.3)
    assert noise_cells.cells(1000.3) is table
    for values in (table.starts, table.levels):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


@pytest.mark.parametrize("sigma", [0.5, 3.7, 63.9, 1000.3, 2.0**40])
def test_noise_decided_exactly_equals_noise_decided_fast(sigma, monkeypatch):
    """Every height compared by fractions: the same draws, tail included."""
    proposals = 1 << 14
    fast = noise._Sampler(Keystream(b"\x21" * 32), sigma).batch(proposals)
    exact = noise._Sampler(Keystream(b"\x21" * 32), sigma).batch(proposals, band=4.0)
    assert np.array_equal(fast, exact)
    # the control: exact fractions that are a little off decide some otherwise
    right = noise._Sampler._exponent
    monkeypatch.setattr(noise._Sampler, "_exponent", lambda self, value: right(self, value) * Fraction(3, 2))
    skewed = noise._Sampler(Keystream(b"\x21" * 32), sigma).batch(proposals, band=4.0)
    assert not np.array_equal(fast, skewed) or sigma == 0.5  # there the two integers cut are hardly ever met


def test_noise_heights_in_floats_are_within_the_proven_error():
    for sigma in (0.5, 0.77, 3.7, 1000.3, 2.0**18 + 0.1, 2.0**40):
        sampler = noise._Sampler(Keystream(bytes(32)), sigma)
        values = np.unique(np.linspace(0, 8 * sigma, 200).astype(np.int64))
        scaled = values / sigma
        for height, value in zip(np.exp(-(scaled * scaled) / 2).tolist(), values.tolist(), strict=True):
            low, high = noise._exp_bounds(sampler._exponent(value), 40)
            assert low - Fraction(6, 2**53) <= Fraction(height) <= high + Fraction(6, 2**53)
    # and the heights they are compared with
    words = Keystream(b"\x22" * 32).words(200) >> np.uint64(1)
    for unit in (100, 176, 12884):
        levels = np.arange(200) * unit // 200
        heights = (levels + words.view(np.int64) * 2.0**-63) / unit
        for height, level, word in zip(heights.tolist(), levels.tolist(), words.tolist(), strict=True):
            assert abs(Fraction(height) - (level + Fraction(word, 2**63)) / unit) <= Fraction(3, 2**53)


def test_heads_in_a_row_have_their_law():
    heads = noise._heads_in_a_row(Keystream(b"\x23" * 32), DRAWS)
    law = 0.5 ** np.arange(1, 13)
    seen = np.bincount(np.minimum(heads, 12), minlength=13)
    assert stats.chisquare(seen, np.append(law, law[-1]) * DRAWS).pvalue > FALSE_ALARM


class Scripted:
    """Keystream words written down beforehand."""

    def __init__(self, *words):
        self._words = list(words)

    def word(self):
        return self._words.pop(0)

    def words(self, count):
        return np.array([self.word() for _ in range(count)], np.uint64)


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        ([2**63], [0]),
        ([2**62, 2**64 - 1], [1, 0]),
        ([2**11], [52]),
        ([2**11 - 1, 2**63, 2**63], [53, 0]),  # the lower 11 bits are not looked at
        ([0, 0, 1], [53 + 64 + 63]),
    ],
)
def test_heads_in_a_row_are_leading_zeros(words, heads):
    assert noise._heads_in_a_row(Scripted(*words), len(heads)).tolist() == heads


@pytest.mark.parametrize(("level", "unit"), [(0, 1), (36, 100), (4, 12)])
@pytest.mark.parametrize(("further", "below"), [(0, True), (2**64 - 1, False)])
def test_height_that_ties_draws_further_bits(level, unit, further, below):
    # the first 63 bits of the height at which the curve cuts the cell: only what follows can tell
    low, _ = noise._exp_bounds(Fraction(1), 60)
    head = math.floor((low * unit - level) * 2**63)
    assert 0 < head < 2**63
    assert noise._Height(level, head, unit, Scripted(further)).is_below_exp(Fraction(1)) is below
    assert noise._Height(level, head - 1, unit, Scripted()).is_below_exp(Fraction(1))
    assert not noise._Height(level, head + 1, unit, Scripted()).is_below_exp(Fraction(1))


def test_height_at_zero_is_below_one_but_for_cells_left_over():
    assert noise._Height(99, 2**63 - 1, 100, Scripted()).is_below_exp(Fraction(0))
    assert not noise._Height(100, 0, 100, Scripted()).is_below_exp(Fraction(0))


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
