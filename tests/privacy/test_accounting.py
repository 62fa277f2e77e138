"""The accountant against published figures, a second engine, and the divergence itself computed from the definition."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import ConfigError, PrivacyError
from medfed.privacy.accounting import (
    ORDERS,
    Mechanism,
    bounds,
    calibrate,
    compose,
    epsilon,
    gap,
    micro,
    sensitivity,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "rdp_epsilon.json").read_text())
FINE = 2.0**18  # a grid so fine that integer noise is as good as continuous


def gaussian_like(rate, multiplier):
    return Mechanism(rate, multiplier * FINE, 1, FINE, 1)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: f"{case['patients']}-{case['noise_multiplier']}")
def test_epsilon_known_answer_is_bounded_from_above_within_one_percent(case):
    mechanism = gaussian_like(64 / case["patients"], float(case["noise_multiplier"]))
    value = epsilon(compose(mechanism, case["events"]), case["delta"])
    assert case["epsilon"] - 5e-5 <= value <= 1.01 * case["epsilon"]


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("multiplier", [0.7, 2.0, 9.0])
@pytest.mark.parametrize("events", [1, 30])
def test_epsilon_is_at_least_that_of_the_second_engine_and_near(rate, multiplier, events):
    accountant = RdpAccountant(orders=ORDERS)
    accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(multiplier)), events)
    oracle = accountant.get_epsilon(1e-5)
    value = epsilon(compose(gaussian_like(rate, multiplier), events), 1e-5)
    assert oracle <= value <= 1.12 * oracle + 1e-12


@pytest.mark.parametrize("order", [2, 3, 7, 20, 64, 512])
def test_rdp_at_integer_orders_equals_the_gaussian_value(order):
    accountant = RdpAccountant(orders=[order])
    accountant.compose(dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(3.0)))
    assert gaussian_like(0.1, 3.0).rdp()[ORDERS.index(order)] == pytest.approx(accountant._rdp[0], rel=1e-6)


def divergence(first, second, order):
    """D_order(first || second) of two distributions given as arrays."""
    seen = (first > 0) & (second > 0)
    logs = order * np.log(first[seen]) + (1 - order) * np.log(second[seen])
    return (logs.max() + math.log(np.exp(logs - logs.max()).sum())) / (order - 1)


def laws(mechanism, shift):
    """The law of the summed noise, and of it moved by ``shift``, on a common support."""
    one_reach = math.ceil(14 * mechanism.sigma)
    one = np.exp(-(np.arange(-one_reach, one_reach + 1.0) ** 2) / (2 * mechanism.sigma**2))
    one /= one.sum()
    law = one
    for _ in range(mechanism.shares - 1):
        law = np.convolve(law, one)
    return np.pad(law, (0, shift)), np.pad(law, (shift, 0))


CASES = [
    Mechanism(1.0, 2.0, 1, 1.0, 1),
    Mechanism(0.3, 2.0, 1, 1.0, 1),
    Mechanism(0.05, 1.0, 1, 1.0, 1),
    Mechanism(0.9, 3.3, 1, 4.0, 1),
    Mechanism(1.0, 0.5, 2, 1.0, 1),
    Mechanism(1.0, 0.6, 3, 1.0, 1),
    Mechanism(0.2, 0.7, 4, 2.0, 1),
    Mechanism(0.5, 2.0, 5, 3.0, 1),
]


@pytest.mark.parametrize("mechanism", CASES, ids=Mechanism.to_json)
def test_rdp_bounds_the_divergence_computed_from_the_definition_in_both_directions(mechanism):
    without, moved = laws(mechanism, int(mechanism.sensitivity))
    rate = mechanism.sampling_rate
    mixed = (1 - rate) * without + rate * moved
    bound = mechanism.rdp()
    for order in (1.1, 1.5, 2.0, 2.5, 3.0, 4.7, 8.0, 12.0):
        exact = max(divergence(mixed, without, order), divergence(without, mixed, order))
        assert exact <= bound[ORDERS.index(order)] * (1 + 1e-6)


def test_rdp_of_five_percent_less_noise_is_caught_by_the_definition():
    mechanism = Mechanism(0.3, 2.0, 1, 1.0, 1)
    claimed = Mechanism(0.3, 2.1, 1, 1.0, 1).rdp()
    without, moved = laws(mechanism, 1)
    for order in (2.0, 3.0, 8.0):
        assert divergence(0.7 * without + 0.3 * moved, without, order) > claimed[ORDERS.index(order)]


@given(st.floats(1.0, 60.0), st.floats(0.0, 1.0), st.floats(1e-9, 20.0))
@settings(max_examples=300)
def test_direction_inequality_of_the_docstring_holds(order, rate, log_ratio):
    ratio = math.exp(log_ratio)
    low, high = 1 - rate + rate * ratio, rate + (1 - rate) * ratio
    logs = [math.log(ratio), math.log(low), math.log(high)]
    left = np.logaddexp(order * logs[1], (1 - order) * logs[0] + order * logs[2])
    right = np.logaddexp((1 - order) * logs[1], order * logs[0] + (1 - order) * logs[2])
    assert left >= right - 1e-9 * max(1.0, abs(right))


def test_epsilon_without_sampling_is_that_of_zero_concentrated_privacy():
    # ten events of rho = C^2 / (2 sigma^2) each: the least over all orders, found by a fine search of its own
    rho, delta = 10 / (2 * 5.0**2), 3e-4
    orders = np.linspace(1.5, 200, 400_000)
    least = (rho * orders + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)).min()
    value = epsilon(compose(gaussian_like(1.0, 5.0), 10), delta)
    assert least <= value <= 1.0005 * least


def test_epsilon_five_percent_less_noise_costs_more():
    right, low = (epsilon(compose(gaussian_like(0.2, noise), 50), 1e-4) for noise in (2.0, 1.9))
    assert low > 1.03 * right


def test_gap_of_one_share_is_zero_and_of_fine_grids_vanishes():
    assert gap(0.5, 1) == 0.0
    assert gap(3.0, 100) < 1e-35
    assert gap(0.5, 2) == pytest.approx(10 * math.exp(-(math.pi**2) / 4))


def test_shares_summed_cost_as_one_share_of_their_variance():
    one, four = Mechanism(1.0, 2000.0, 1, 500.0, 50), Mechanism(1.0, 1000.0, 4, 500.0, 50)
    assert four.rdp() == pytest.approx(one.rdp(), rel=1e-12)


RATES, NOISES = st.floats(0.001, 1.0), st.floats(0.5, 50.0)


@given(RATES, NOISES, st.integers(1, 6), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_epsilon_grows_with_rate_and_events_and_falls_with_noise(rate, noise, shares, events):
    def cost(rate, noise, events):
        return epsilon(compose(Mechanism(rate, noise * 100, shares, 100.0, 10), events), 1e-5)

    here = cost(rate, noise, events)
    slack = 1e-9 * (1 + here)
    assert cost(rate * 0.9, noise, events) <= here + slack
    assert cost(rate, noise * 1.05, events) <= here + slack
    assert cost(rate, noise, events + 1) >= here - slack


@given(RATES, st.floats(0.5, 2.0**40), st.integers(1, 100), st.floats(1e-3, 1e9), st.integers(1, 10**9))
def test_mechanism_json_round_trips(rate, sigma, shares, norm, dimensions):
    mechanism = Mechanism(rate, sigma, shares, norm, dimensions)
    assert Mechanism.from_json(mechanism.to_json()) == mechanism


def test_mechanism_json_is_canonical():
    text = '{"dimensions":14,"sampling_rate":1.0,"sensitivity":131.5,"shares":2,"sigma":1024.25}'
    assert Mechanism(1, 1024.25, 2, 131.5, 14).to_json() == text
    assert Mechanism.from_json(text) == Mechanism(1.0, 1024.25, 2, 131.5, 14)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"dimensions":14,"sampling_rate":1.0,"sensitivity":131.5,"shares":2,"sigma":1024.25,"x":1}',
        '{"dimensions":14, "sampling_rate":1.0,"sensitivity":131.5,"shares":2,"sigma":1024.25}',
        '{"dimensions":14,"sampling_rate":1.0,"sensitivity":131.5,"shares":2.5,"sigma":1024.25}',
        '{"dimensions":14,"sampling_rate":1.0,"sensitivity":131.5,"shares":2,"sigma":NaN}',
        '{"dimensions":14,"sampling_rate":"1.0","sensitivity":131.5,"shares":2,"sigma":1024.25}',
        '{"dimensions":1e999,"sampling_rate":1.0,"sensitivity":131.5,"shares":2,"sigma":1024.25}',
    ],
)
def test_mechanism_json_malformed_is_refused(text):
    with pytest.raises(ConfigError, match="MF-203"):
        Mechanism.from_json(text)


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1.0, 1, 1.0, 1),
        (1.1, 1.0, 1, 1.0, 1),
        (0.5, 0.4, 1, 1.0, 1),
        (0.5, math.inf, 1, 1.0, 1),
        (0.5, math.nan, 1, 1.0, 1),
        (0.5, 1.0, 0, 1.0, 1),
        (0.5, 1.0, 1, 0.0, 1),
        (0.5, 1.0, 1, math.nan, 1),
        (0.5, 1.0, 1, 1.0, 0),
    ],
)
def test_mechanism_out_of_range_is_refused(values):
    with pytest.raises(ConfigError, match="MF-203"):
        Mechanism(*values)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_epsilon_delta_out_of_range_is_refused(delta):
    with pytest.raises(ConfigError, match="MF-203"):
        epsilon(gaussian_like(1.0, 1.0).rdp(), delta)


def test_epsilon_of_a_damaged_total_is_refused():
    with pytest.raises(PrivacyError, match="MF-900"):
        epsilon(np.full(len(ORDERS), np.nan), 1e-5)


def test_epsilon_of_nothing_is_zero():
    assert epsilon(compose(gaussian_like(0.5, 1.0), 0), 1e-5) == 0.0


@pytest.mark.parametrize(("rate", "target", "events"), [(1.0, 1.0, 11), (0.25, 3.0, 60), (0.01, 0.5, 500)])
def test_calibrate_gives_the_least_multiplier_that_suffices(rate, target, events):
    def cost(multiplier):
        return bounds(gaussian_like(rate, multiplier), events, 3e-4).epsilon

    multiplier = calibrate(target, 3e-4, events, lambda noise: gaussian_like(rate, noise))
    assert cost(multiplier) <= target < cost(multiplier - 1e-4)
    assert round(multiplier, 4) == multiplier


def test_calibrate_out_of_reach_is_refused():
    with pytest.raises(ConfigError, match="MF-203"):
        calibrate(1.0, 1e-5, 1, lambda noise: Mechanism(1.0, 1.0, 1, 100.0, 1))


@given(st.floats(0, 1e6))
def test_micro_rounds_up_by_less_than_one(value):
    exact = Fraction(value) * 1_000_000
    assert exact <= micro(value) < exact + 1


def test_micro_of_infinity_is_refused():
    with pytest.raises(PrivacyError, match="MF-501"):
        micro(math.inf)


def test_sensitivity_charges_the_rounding_once():
    assert sensitivity(0.5, 10, 9) == 512 + 3
