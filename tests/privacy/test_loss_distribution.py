"""The second bound against the divergence computed from the definition, other accountants, and the lemmas it rests on."""

import math
import random
import warnings

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from opacus.accountants.analysis import rdp as opacus_rdp
from opacus.accountants.prv import PRVAccountant

from medfed.privacy import loss_distribution
from medfed.privacy.accounting import Mechanism, bounds, compose, epsilon, gap
from medfed.privacy.filter import filter_epsilon
from medfed.privacy.loss_distribution import SMALLEST_DELTA, gaussian_delta, gaussian_epsilon

FINE = 2.0**20  # a grid so fine that integer noise is as good as continuous
DELTA = 1e-5
PRV_ERROR = 0.05

# privacy.md, section f: batches of 64 of N patients for 50 epochs, delta 1/(10 N) or 1e-4; dp-accounting 0.6.0
KNOWN = [
    (300, 250, 1e-4, 1, 23.7566, 26.6475),
    (300, 250, 1e-4, 2, 7.9286, 8.7153),
    (300, 250, 1e-4, 4, 3.2229, 3.5599),
    (3000, 2350, 1 / 30_000, 1, 6.1565, 6.7734),
    (3000, 2350, 1 / 30_000, 2, 2.0986, 2.3068),
    (3000, 2350, 1 / 30_000, 4, 0.9049, 1.0006),
    (30_000, 23_450, 1 / 300_000, 1, 1.8362, 1.9968),
    (30_000, 23_450, 1 / 300_000, 2, 0.6758, 0.7353),
    (30_000, 23_450, 1 / 300_000, 4, 0.3030, 0.3305),
]


def fine(rate: float, multiplier: float) -> Mechanism:
    return Mechanism(rate, multiplier * FINE, 1, FINE, 1)


@pytest.mark.parametrize(("patients", "events", "delta", "noise", "pld", "rdp"), KNOWN)
def test_known_answers_are_met_to_a_thousandth(patients, events, delta, noise, pld, rdp):
    found = bounds(fine(64 / patients, noise), events, delta)
    assert found.pld == pytest.approx(pld, abs=1e-3)
    assert rdp - 1e-3 <= found.rdp <= 1.01 * rdp  # the integers' bound is a chord between whole orders
    assert (found.epsilon, found.accountant) == (found.pld, "pld")


@pytest.mark.parametrize(
    ("rate", "noise", "events", "delta"),
    [
        (1e-6, 0.5, 100, 1e-5),
        (1e-9, 0.5, 1, 1e-5),
        (1.5e-4, 0.5, 3_000_000, 1e-5),
    ],
    ids=["rare", "rarest", "rare and often"],
)
def test_grid_of_losses_beyond_reason_is_never_made(monkeypatch, rate, noise, events, delta):
    """A study file may say anything: hospitals that read it must not run out of memory or patience."""

    def make(*_: object) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(loss_distribution, "_loss", make)
    found = bounds(fine(rate, noise), events, delta)
    assert (found.pld, found.accountant) == (None, "rdp")


def test_sum_of_losses_beyond_reason_is_never_made(monkeypatch):
    """One event's grid is short, that of so many is not."""
    found = []

    def compose(self: object, times: int, *_: object) -> None:
        found.append(times)
        raise AssertionError("composed")

    monkeypatch.setattr(PrivacyLossDistribution, "self_compose", compose)
    assert bounds(fine(1e-4, 1.0), 100_000_000, 1e-4).pld is None
    assert not found


# ------------------------------------------------------------------------------------------------- from the definition


def law(sigma: float, shares: int) -> np.ndarray:
    """The sum of ``shares`` discrete Gaussians, on -reach .. reach."""
    reach = math.ceil(11 * sigma)
    one = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    one /= one.sum()
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    return total


def divergence(first: np.ndarray, second: np.ndarray, epsilon: float) -> float:
    """The hockey-stick divergence at ``epsilon``: the least delta."""
    return float(np.maximum(first - math.exp(epsilon) * second, 0.0).sum())


def composed(law: np.ndarray, times: int) -> np.ndarray:
    """The joint law of ``times`` independent draws, flat."""
    total = law
    for _ in range(times - 1):
        total = np.multiply.outer(total, law).ravel()
    return total


def exact_delta(mechanism: Mechanism, events: int, epsilon: float) -> float:
    """delta of ``events`` outputs seen together, the patient shifting each by the whole sensitivity; both directions."""
    noise, shift = law(mechanism.sigma, mechanism.shares), int(mechanism.sensitivity)
    without, moved = np.pad(noise, (0, shift)), np.pad(noise, (shift, 0))
    mixed = (1 - mechanism.sampling_rate) * without + mechanism.sampling_rate * moved
    # outcomes of one likelihood ratio are one outcome; the rarest, of mass 1e-13, are left out of all
    keep = without + mixed > 1e-13
    pair = [composed(side[keep], events) for side in (without, mixed)]
    return max(divergence(*pair, epsilon), divergence(*reversed(pair), epsilon))


CASES = [
    (Mechanism(1.0, 3.5, 1, 2.0, 1), 1),
    (Mechanism(1.0, 3.5, 1, 5.0, 1), 2),
    (Mechanism(0.3, 3.5, 1, 3.0, 1), 1),
    (Mechanism(0.3, 3.5, 1, 3.0, 1), 3),
    (Mechanism(1.0, 3.5, 3, 4.0, 1), 2),
    (Mechanism(0.3, 4.0, 2, 5.0, 1), 2),
    (Mechanism(0.3, 8.0, 1, 8.0, 1), 2),
    (Mechanism(1.0, 8.0, 1, 4.0, 1), 1),
    (Mechanism(1.0, 3.5, 1, 2.0, 1), 3),
    (Mechanism(0.3, 8.0, 3, 20.0, 1), 2),
]


@pytest.mark.parametrize(("mechanism", "events"), CASES)
def test_bound_is_never_below_the_divergence_of_the_integers_themselves(mechanism, events):
    for delta in (1e-2, 1e-4, 1e-6):
        claimed = bounds(mechanism, events, delta).pld
        assert claimed is not None
        assert exact_delta(mechanism, events, claimed) <= delta


def test_bound_of_five_percent_more_noise_than_there_is_is_caught_by_the_definition():
    """The control: the test above fails where the noise is overstated."""
    caught = 0
    for mechanism, events in CASES:
        louder = Mechanism(
            mechanism.sampling_rate, mechanism.sigma * FINE * 1.05, mechanism.shares, mechanism.sensitivity * FINE, 1
        )
        claimed = bounds(louder, events, 1e-4).pld
        caught += exact_delta(mechanism, events, claimed) > 1e-4
    assert caught == len(CASES)


def test_bound_holds_for_shifts_in_two_dimensions():
    """A patient moves (3, 4): L2 norm 5, and nothing is lost on one who moves one coordinate by 5."""
    mechanism = Mechanism(0.3, 5.0, 1, 5.0, 2)
    noise = law(5.0, 1)
    without = np.multiply.outer(np.pad(noise, (0, 3)), np.pad(noise, (0, 4)))
    moved = np.multiply.outer(np.pad(noise, (3, 0)), np.pad(noise, (4, 0)))
    mixed = 0.7 * without + 0.3 * moved
    for delta in (1e-2, 1e-5):
        claimed = bounds(mechanism, 1, delta).pld
        assert max(divergence(mixed, without, claimed), divergence(without, mixed, claimed)) <= delta


# --------------------------------------------------------------------------------------------------------- the lemmas


@pytest.mark.parametrize(("smoothing", "sigma"), [(0.5, 0.8), (0.6, 1.0), (0.7, 0.8)])
def test_integer_noise_is_within_the_stated_factor_of_smoothed_continuous_noise(smoothing, sigma):
    """Step 1 of the proof, by quadrature, with r so small that the factor can be seen."""
    wide = math.sqrt(sigma**2 - smoothing**2)
    points = np.linspace(-14 * sigma, 14 * sigma, 20_001)
    density = np.exp(-(points**2) / (2 * wide**2)) / (wide * math.sqrt(2 * math.pi))
    whole = np.arange(-40, 41)[:, None]
    spread = np.exp(-((whole - points) ** 2) / (2 * smoothing**2))
    smoothed = (density * spread / spread.sum(axis=0)).sum(axis=1) * (points[1] - points[0])
    direct = np.exp(-(whole[:, 0] ** 2) / (2 * sigma**2))
    seen = slice(40 - int(5 * sigma), 41 + int(5 * sigma))
    apart = np.abs(np.log(smoothed[seen]) - np.log((direct / direct.sum())[seen])).max()
    series = 2 * sum(math.exp(-2 * (math.pi * smoothing * k) ** 2) for k in range(1, 9))
    assert 1e-7 < apart <= 2 * math.atanh(series)


@pytest.mark.parametrize(("sigma", "shares"), [(0.5, 2), (0.6, 2), (0.7, 3), (0.6, 5)])
def test_sum_of_shares_is_within_the_gap_of_one_discrete_gaussian_at_every_point(sigma, shares):
    """Step 2, in both directions: a maximal divergence, not an average one."""
    summed = law(sigma, shares)
    at = np.arange(len(summed)) - len(summed) // 2
    one = np.exp(-(at**2) / (2 * shares * sigma**2))
    seen = np.abs(at) <= 5 * sigma * math.sqrt(shares)
    apart = np.abs(np.log(summed / summed.sum()) - np.log(one / one.sum()))[seen].max()
    assert 1e-6 < apart <= gap(sigma, shares)


def test_gaussian_delta_is_that_of_the_definition():
    points = np.linspace(-30, 30, 400_001)
    for mu, at in ((0.05, 0.1), (0.7, 1.0), (3.0, 9.0)):
        first, second = (np.exp(-((points - shift) ** 2) / 2) / math.sqrt(2 * math.pi) for shift in (0.0, mu))
        numeric = np.maximum(first - math.exp(at) * second, 0).sum() * (points[1] - points[0])
        assert gaussian_delta(mu, at) == pytest.approx(numeric, rel=1e-5)
    for mu in (1e-3, 0.3, 5.0, 60.0):
        solved = gaussian_epsilon(mu, DELTA)
        assert gaussian_delta(mu, solved) <= DELTA < gaussian_delta(mu, solved * (1 - 1e-6)) or solved == 0.0


# ------------------------------------------------------------------------------------------------- against each other


def agrees(rate: float, noise: float, events: int, delta: float) -> None:
    """Our two bounds with Opacus's two accountants."""
    found = bounds(fine(rate, noise), events, delta)
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, events)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their grids of orders and of losses
        spent = opacus_rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=events, orders=orders)
        theirs, _ = opacus_rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
        above = accountant.get_epsilon(delta=delta, eps_error=PRV_ERROR)
    assert 0.98 * theirs <= found.rdp <= 1.10 * theirs  # what the chord between whole orders costs; more orders gain
    # what they return is their estimate and its error on top
    assert found.pld == pytest.approx(above - PRV_ERROR, rel=1e-3, abs=1e-3)
    assert found.epsilon == found.pld <= found.rdp


def points(count: int, seed: int) -> list[tuple[float, float, int, float]]:
    """Where PRV neither hangs nor loses its grid: epsilons between about 0.05 and 15."""
    draw = random.Random(seed)
    chosen: list[tuple[float, float, int, float]] = []
    while len(chosen) < count:
        rate, noise = 10 ** draw.uniform(-2, -0.3), draw.uniform(0.8, 6.0)
        events = draw.randint(5, 300)
        if 0.05 < rate * math.sqrt(events) / noise < 1.0:
            chosen.append((rate, noise, events, 10 ** draw.uniform(-6, -3)))
    return chosen


def test_hundred_points_agree_with_opacus():
    for point in points(100, 4):
        agrees(*point)


@pytest.mark.soak
def test_two_thousand_points_agree_with_opacus():
    for point in points(2000, 5):
        agrees(*point)


# ------------------------------------------------------------------------------------------------------------ its form


def pld(rate: float, noise: float, events: int, delta: float = DELTA) -> float:
    found = bounds(fine(rate, noise), events, delta).pld
    assert found is not None
    return found


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_bound_grows_with_events_and_rate_and_falls_with_noise_and_delta(rate):
    here = pld(rate, 2.0, 30)
    assert pld(rate, 2.0, 31) > here > pld(rate, 2.02, 30)
    assert pld(rate * 0.95, 2.0, 30) < here
    assert pld(rate, 2.0, 30, DELTA / 2) > here > pld(rate, 2.0, 30, DELTA * 2)


def test_bound_of_a_rate_next_to_one_is_that_of_no_sampling():
    assert pld(1 - 1e-9, 3.0, 10) == pytest.approx(pld(1.0, 3.0, 10), rel=1e-5)


def test_lists_of_several_kinds_cost_no_less_than_each_and_no_more_than_their_sum():
    statistics, training = fine(1.0, 8.0), fine(0.2, 2.0)
    both = Mechanism(0.2, 2 * FINE, 1, FINE, 1, once=(statistics,), most=20)
    joined = bounds(both, 20, DELTA).pld
    parts = bounds(training, 20, DELTA).pld, bounds(statistics, 1, DELTA).pld
    assert max(parts) < joined < sum(parts)
    assert bounds(both, 25, DELTA) == bounds(both, 20, DELTA), "of 25 attempts no more than 20 can be training's"
    whole = Mechanism(1.0, 2 * FINE, 1, FINE, 1, once=(fine(1.0, 2.0),))
    assert bounds(whole, 3, DELTA).pld == pytest.approx(pld(1.0, 2.0, 4), rel=1e-9)
    aside = Mechanism(0.2, 2 * FINE, 1, FINE, 1, aside=(fine(1.0, 0.5),))
    assert bounds(aside, 20, DELTA).pld == bounds(fine(1.0, 0.5), 1, DELTA).pld > parts[0]
    assert bounds(aside, 20, DELTA).rdp == pytest.approx(bounds(fine(1.0, 0.5), 1, DELTA).rdp)
    quiet = Mechanism(0.2, 2 * FINE, 1, FINE, 1, aside=(fine(1.0, 8.0),))
    assert bounds(quiet, 20, DELTA).pld == parts[0]


@pytest.mark.parametrize(
    ("mechanism", "delta"),
    [
        (Mechanism(1.0, 2.9, 1, 2.0, 1), DELTA),  # noise too fine for the grid
        (Mechanism(1.0, 2.9, 50, 2.0, 1), DELTA),  # each share, though not their sum
        (fine(0.5, 0.2), DELTA),  # a grid of losses without end
        (fine(0.5, 2.0), SMALLEST_DELTA / 2),
    ],
)
def test_where_nothing_is_proven_renyi_stands_alone(mechanism, delta):
    found = bounds(mechanism, 3, delta)
    assert found.pld is None
    assert (found.epsilon, found.accountant) == (found.rdp, "rdp")


def test_bounds_are_refused_or_zero_at_the_edges():
    assert bounds(fine(0.5, 1.0), 0, DELTA).epsilon == 0.0
    loud = bounds(Mechanism(1.0, 0.5, 1, 2.0**60, 10), 1, DELTA)
    assert (loud.pld, loud.accountant) == (None, "rdp")


@pytest.mark.parametrize("rate", [1.0, 0.2])
@pytest.mark.parametrize("cap", [1.0, 8.0])
def test_filter_is_never_below_the_figure_of_the_list(rate, cap):
    mechanism = fine(rate, 5.0)
    for events in (1, 10, 40):
        listed = bounds(mechanism, events, DELTA)
        total = compose(mechanism, events)
        assert listed.epsilon <= listed.rdp == epsilon(total, DELTA) <= filter_epsilon(total, cap, DELTA) * (1 + 1e-9)
