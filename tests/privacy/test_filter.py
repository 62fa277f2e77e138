"""The lifetime filter: never below the account, nothing lost for Gaussian noise, its order fixed beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import ConfigError
from medfed.privacy.accounting import ORDERS, Mechanism, compose, epsilon
from medfed.privacy.filter import conversion, filter_epsilon, filter_order


def gaussian(noise_multiplier: float, sampling_rate: float = 1.0) -> Mechanism:
    return Mechanism(sampling_rate, noise_multiplier * 1e5, 1, 1e5, 10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(0.5, 50.0),
    st.integers(1, 200),
    st.floats(0.1, 20.0),
    st.sampled_from([1e-3, 1e-5, 1e-8]),
    st.sampled_from([1.0, 0.2, 0.01]),
)
def test_filter_never_says_less_than_the_account(
    noise: float, count: int, cap: float, delta: float, rate: float
) -> None:
    total = compose(gaussian(noise, rate), count)
    assert filter_epsilon(total, cap, delta) >= epsilon(total, delta) * (1 - 1e-12)


@pytest.mark.parametrize(("noise", "count"), [(8.0, 30), (2.0, 10), (30.0, 10_000), (1.0, 1)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_filter_stops_gaussian_noise_exactly_at_the_cap(noise: float, count: int, delta: float) -> None:
    """q = 1: the filter of cap = what the events cost admits them, and the filter of a little less does not."""
    total = compose(gaussian(noise), count)
    cost = epsilon(total, delta)
    assert filter_epsilon(total, cost, delta) == pytest.approx(cost, rel=1e-12)
    assert filter_epsilon(total, cost * 0.999, delta) > cost * 0.999
    assert filter_epsilon(compose(gaussian(noise), count + 1), cost, delta) > cost


@pytest.mark.parametrize(
    ("rate", "noise", "count", "delta"),
    [(64 / 3000, 1.0, 2350, 1 / 30_000), (64 / 3000, 4.0, 2350, 1 / 30_000), (64 / 300, 2.0, 250, 1e-4)],
)
def test_filter_stops_sampled_noise_within_three_percent(rate: float, noise: float, count: int, delta: float) -> None:
    total = compose(gaussian(noise, rate), count)
    cost = epsilon(total, delta)
    assert cost <= filter_epsilon(total, cost, delta) <= 1.03 * cost


@pytest.mark.parametrize(("cap", "delta"), [(0.5, 1e-5), (8.0, 1e-5), (3.0, 1e-3), (1.0, 1e-9)])
def test_order_admits_as_many_gaussian_events_as_any_other(cap: float, delta: float) -> None:
    event = gaussian(100.0).rdp()
    admitted = np.floor((cap - conversion(delta)) / event)
    assert admitted[filter_order(cap, delta)] == admitted.max() > 0


@pytest.mark.parametrize("at_most", [1e-2, 1e-5, 1e-7])
def test_delta_of_today_moves_the_figure_up_only_and_never_the_order(at_most: float) -> None:
    total = compose(gaussian(20.0), 10)
    order = filter_order(8.0, 1e-5)
    figure = filter_epsilon(total, 8.0, 1e-5, at_most=at_most)
    assert figure == pytest.approx(total[order] + conversion(min(1e-5, at_most))[order], rel=1e-8)
    assert figure >= filter_epsilon(total, 8.0, 1e-5)


def test_conversion_is_that_of_the_account() -> None:
    """One order at a time, against dp_accounting through ``accounting.epsilon``."""
    for index in (0, 10, 60, 120, len(ORDERS) - 1):
        total = np.full(len(ORDERS), np.inf)
        total[index] = 40.0
        assert total[index] + conversion(1e-5)[index] == pytest.approx(epsilon(total, 1e-5), rel=1e-8)


@pytest.mark.parametrize(
    ("cap", "delta"), [(0.0, 1e-5), (float("nan"), 1e-5), (float("inf"), 1e-5), (1.0, 0.0), (1.0, 1.0)]
)
def test_cap_or_delta_without_meaning_is_refused(cap: float, delta: float) -> None:
    with pytest.raises(ConfigError):
        filter_epsilon(np.ones(len(ORDERS)), cap, delta)
