"""Figures for people: bounds never read smaller than they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed.wording import rounded_down, rounded_up, times


@pytest.mark.parametrize(
    ("value", "up", "down"),
    [
        (7.99925, "8", "7.999"),
        (8.0, "8", "8"),
        (0.1, "0.1", "0.1"),
        (3.00000000001, "3.001", "3"),
        (12.3456, "12.35", "12.34"),
        (0.0, "0", "0"),
        (2.5e-7, "2.5e-07", "2.5e-07"),
    ],
)
def test_four_digits_up_and_down(value: float, up: str, down: str) -> None:
    assert (rounded_up(value), rounded_down(value)) == (up, down)


@given(st.floats(0, 1e6))
def test_value_is_between_what_is_shown(value: float) -> None:
    assert float(rounded_down(value)) <= value <= float(rounded_up(value))
    assert float(rounded_up(value)) - float(rounded_down(value)) <= 1e-3 * value + 1e-300


@pytest.mark.parametrize(
    ("epsilon", "said"),
    [
        (0.0, "1.00"),
        (1.0, "2.72"),
        (8.0, "2,981"),
        (20.0, "485,165,196"),
        (20.7, "10^9"),
        (23.1, "10^11"),
        (100.0, "10^44"),
    ],
)
def test_factor_of_large_epsilon_is_a_power_of_ten_above_it(epsilon: float, said: str) -> None:
    assert times(epsilon) == said
