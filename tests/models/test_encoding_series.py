"""Measurements at irregular times to regular steps: exact values, a slow oracle, each record by itself."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medfed.data_contract import Series
from medfed.errors import DataError
from medfed.models.series_records import Measurements, encode_series

NAN = math.nan
Row = tuple[int, float, list[float]]  # record, hours, a value a variable
PULSE = {"name": "pulse", "unit": "1/min", "minimum": 0.0, "maximum": 300.0, "center": 80.0, "scale": 20.0}
LACTATE = {"name": "lactate", "unit": "mmol/l", "minimum": 0.0, "maximum": 30.0, "center": 2.0, "scale": 2.0}


def contract(**changes: object) -> Series:
    plain = {
        "steps": 4,
        "step_hours": 1.0,
        "variables": [PULSE | {"outside": "refuse"}, LACTATE | {"outside": "clip"}],
        "fill": "center",
    }
    return Series.model_validate(plain | changes)


def measured(rows: list[Row], variables: int = 2) -> Measurements:
    return Measurements(
        np.array([record for record, _, _ in rows], np.int64),
        np.array([hours for _, hours, _ in rows], np.float64),
        np.array([values for _, _, values in rows], np.float64).reshape(-1, variables),
        np.arange(2, 2 + len(rows)),
    )


def encode(
    rows: list[Row], records: int = 1, features: NDArray[np.float64] | None = None, **changes: object
) -> NDArray[np.float32]:
    held = np.zeros((records, 0)) if features is None else features
    return encode_series(contract(**changes), held, measured(rows))


def test_channels_are_values_observed_inside_and_features_in_this_order() -> None:
    encoded = encode([(0, 0.5, [100.0, NAN]), (0, 2.0, [NAN, 6.0])], features=np.array([[7.0, -1.5]]))
    assert encoded.dtype == np.float32
    assert encoded.tolist() == [
        [
            [1.0, 0.0, 1.0, 0.0, 1.0, 7.0, -1.5],
            [0.0, 0.0, 0.0, 0.0, 1.0, 7.0, -1.5],
            [0.0, 2.0, 0.0, 1.0, 1.0, 7.0, -1.5],
            [0.0, 0.0, 0.0, 0.0, 0.0, 7.0, -1.5],
        ]
    ]


def test_last_value_is_carried_forward() -> None:
    encoded = encode([(0, 1.0, [100.0, NAN]), (0, 3.9, [60.0, 4.0])], fill="forward")
    assert encoded[0, :, 0].tolist() == [0.0, 1.0, 1.0, -1.0]
    assert encoded[0, :, 1].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert encoded[0, :, 2].tolist() == [0.0, 1.0, 0.0, 1.0]  # observed is what was observed


def test_nothing_is_carried_from_one_record_to_the_next() -> None:
    encoded = encode([(0, 3.0, [100.0, 4.0]), (1, 2.0, [60.0, NAN])], records=2, fill="forward")
    assert encoded[1, :, 0].tolist() == [0.0, 0.0, -1.0, -1.0]
    assert encoded[1, :, 1].tolist() == [0.0] * 4


def test_measurements_of_one_step_are_averaged_after_the_bounds() -> None:
    rows = [(0, 0.0, [90.0, 2.0]), (0, 0.25, [70.0, 100.0]), (0, 0.75, [NAN, NAN]), (0, 0.99, [80.0, NAN])]
    encoded = encode(rows)
    assert encoded[0, 0].tolist() == [0.0, (16.0 - 2.0) / 2.0, 1.0, 1.0, 1.0]  # (2 + 30) / 2


@pytest.mark.parametrize("hours", [-0.001, -5.0, 4.0, 1e300, -1e300])
def test_what_was_measured_outside_the_steps_is_left_out_unjudged(hours: float) -> None:
    assert np.array_equal(encode([(0, hours, [1e9, 5.0])], step_hours=1e-9), encode([]))


@pytest.mark.parametrize(("hours", "step"), [(0.0, 0), (-0.0, 0), (0.999, 0), (1.0, 1), (3.999, 3)])
def test_step_holds_its_beginning_and_not_its_end(hours: float, step: int) -> None:
    assert encode([(0, hours, [80.0, NAN])])[0, :, 2].tolist() == [float(step == place) for place in range(4)]


def test_stay_reaches_to_its_last_measurement_and_has_one_step_at_least() -> None:
    rows = [(0, 1.0, [80.0, NAN]), (0, 3.0, [NAN, NAN]), (2, 3.5, [NAN, 1.0])]
    inside = encode(rows, records=4)[:, :, 4]
    assert inside.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("value", [-0.1, 300.1, 1e9])
def test_value_outside_its_range_is_refused_by_row_and_column(value: float) -> None:
    rows = [(0, 1.0, [80.0, 1.0]), (0, 2.0, [80.0, 1.0]), (0, 1.5, [value, 1.0]), (0, 0.0, [-1.0, 1.0])]
    with pytest.raises(DataError) as caught:
        encode(rows)
    assert caught.value.code == 301
    line = "in the series, row 4, column pulse: value is outside [0, 300] 1/min"
    assert str(caught.value).startswith(f"MF-301 {line}")


@pytest.mark.parametrize(("value", "bound"), [(-3.0, 0.0), (31.0, 30.0), (1e12, 30.0)])
def test_value_outside_its_range_is_clipped_where_the_contract_says_so(value: float, bound: float) -> None:
    assert encode([(0, 0.0, [NAN, value])])[0, 0, 1] == (bound - 2.0) / 2.0


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_value_is_refused_even_where_values_are_clipped(value: float) -> None:
    with pytest.raises(DataError, match=r"in the series, row 2, column lactate: value is not finite") as caught:
        encode([(0, 0.0, [NAN, value])])
    assert caught.value.code == 301


# ---------------------------------------------------------------------------------------------------------- the oracle


def slow(series: Series, count: int, features: NDArray[np.float64], rows: list[Row]) -> list[list[list[np.float32]]]:
    """The docstring of ``Series``, word by word, one record, step and variable at a time."""
    width = len(series.variables)
    result = []
    for record in range(count):
        steps, last_step, last = [], 0, [0.0] * width
        for step in range(series.steps):
            values, observed = [], []
            for place, variable in enumerate(series.variables):
                found = [
                    min(max(row[2][place], variable.minimum), variable.maximum)
                    for row in rows
                    if row[0] == record and row[1] // series.step_hours == step and not math.isnan(row[2][place])
                ]
                if found:
                    # every sum of these few values is exact in doubles, so a mean has one right value
                    mean = float(sum(map(Fraction, found)) / len(found))
                    last[place], last_step = (mean - variable.center) / variable.scale, step
                carried = last[place] if series.fill == "forward" else 0.0
                values.append(last[place] if found else carried)
                observed.append(float(bool(found)))
            steps.append([*values, *observed])
        result.append(
            [
                [np.float32(value) for value in [*row, float(step <= last_step), *features[record]]]
                for step, row in enumerate(steps)
            ]
        )
    return result


eighths = st.integers(-40, 320).map(lambda number: number / 8)
cell = st.one_of(st.just(NAN), eighths)
some_rows = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-8, 40).map(lambda n: n / 8), st.lists(cell, min_size=2, max_size=2)),
    max_size=25,
)
CLIPPED = [PULSE | {"outside": "clip"}, LACTATE | {"outside": "clip"}]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(rows=some_rows, fill=st.sampled_from(["center", "forward"]), step_hours=st.sampled_from([0.5, 0.75, 1.0]))
def test_series_are_encoded_as_the_contract_says(rows: list[Row], fill: str, step_hours: float) -> None:
    features = np.arange(8.0).reshape(4, 2)
    changes = {"fill": fill, "step_hours": step_hours, "variables": CLIPPED}
    expected = slow(contract(**changes), 4, features, rows)
    assert np.array_equal(encode(rows, 4, features, **changes), np.array(expected, np.float32))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 3), st.floats(-1, 5), st.lists(st.floats(allow_infinity=False), min_size=2, max_size=2)
        ),
        max_size=20,
    ),
    fill=st.sampled_from(["center", "forward"]),
    record=st.integers(0, 3),
)
def test_record_is_the_same_bits_in_any_company(rows: list[Row], fill: str, record: int) -> None:
    features = np.array([[0.1], [0.2], [0.3], [0.4]])
    together = encode(rows, 4, features, fill=fill, variables=CLIPPED)
    own = [(0, hours, values) for owner, hours, values in rows if owner == record]
    alone = encode(own, 1, features[[record]], fill=fill, variables=CLIPPED)
    assert together[record].tobytes() == alone[0].tobytes()


def test_measurements_show_no_content() -> None:
    assert "80" not in repr(measured([(0, 80.0, [80.0, 80.0])]))
