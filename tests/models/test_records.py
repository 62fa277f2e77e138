"""Raw columns to numbers by the study's contract: faults named by row and column, never by value."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import DataError
from medfed.models.cells import MISSING
from medfed.models.records import Records, encode_records
from medfed.study import Study

MakeStudy = Callable[..., Study]
Columns = dict[str, list[str]]


def columns(**changes: list[str]) -> Columns:
    good = {
        "age": ["60", "80.0", "0"],
        "lactate": ["2", "30", "4"],
        "ventilated": ["no", "yes", "no"],
        "ill": ["0", "1", "1"],
    }
    return good | changes


def refused(study: Study, table: Columns) -> str:
    with pytest.raises(DataError) as caught:
        encode_records(study, ["a", "b", "c"], table)
    assert caught.value.code == 301
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_records_are_encoded_by_the_contract(make_study: MakeStudy) -> None:
    records = encode_records(make_study(), ["a", "b", "b"], columns())
    # (age - 60) / 20, (lactate - 2) / 2, ([yes] - 0.25) / 0.5
    expected = [[0.0, 0.0, -0.5], [1.0, 14.0, 1.5], [-3.0, 1.0, -0.5]]
    assert records.inputs.dtype == np.float32
    assert records.inputs.tolist() == expected
    assert records.labels.dtype == np.int64
    assert records.labels.tolist() == [0, 1, 1]
    assert records.patients == ("a", "b", "b")


def test_levels_after_the_first_get_an_indicator_each(make_study: MakeStudy) -> None:
    study = make_study({"data.features.2.levels": ["low", "mid", "high"], "data.features.2.center": 0.0})
    records = encode_records(study, ["a", "b", "c"], columns(ventilated=["low", "high", "mid"]))
    assert records.inputs[:, 2:].tolist() == [[0.0, 0.0], [0.0, 2.0], [2.0, 0.0]]


@pytest.mark.parametrize("cell", ["2", "2.0", "02", " 2 ", "2e0", "+2"])
def test_numeric_level_is_known_in_any_spelling(make_study: MakeStudy, cell: str) -> None:
    study = make_study({"data.features.2.levels": ["1", "2", "3"], "data.features.2.center": 0.0})
    records = encode_records(study, ["a", "b", "c"], columns(ventilated=["1", cell, "3.0"]))
    assert records.inputs[:, 2:].tolist() == [[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]


def test_class_label_is_known_in_any_spelling(make_study: MakeStudy) -> None:
    assert encode_records(make_study(), ["a", "b", "c"], columns(ill=["0.0", " 1", "01"])).labels.tolist() == [0, 1, 1]


# ----------------------------------------------------------------------------------------------------------- missing


@pytest.mark.parametrize("cell", sorted(MISSING))
def test_missing_value_is_the_public_one_or_an_error(make_study: MakeStudy, cell: str) -> None:
    records = encode_records(make_study(), ["a", "b", "c"], columns(lactate=["2", cell, "4"]))
    assert records.inputs[1, 1] == -0.5  # missing = 1, (1 - 2) / 2
    assert "row 2, column age" in refused(make_study(), columns(age=["60", cell, "0"]))
    assert "row 3, column ventilated" in refused(make_study(), columns(ventilated=["no", "yes", cell]))


def test_missing_category_is_the_level_named_for_it(make_study: MakeStudy) -> None:
    study = make_study({"data.features.2.missing": "yes"})
    records = encode_records(study, ["a", "b", "c"], columns(ventilated=["no", "?", "yes"]))
    assert records.inputs[:, 2].tolist() == [-0.5, 1.5, 1.5]


def test_level_that_is_spelled_like_a_missing_value_is_a_level(make_study: MakeStudy) -> None:
    study = make_study({"data.features.2.levels": ["None", "some"], "data.features.2.center": 0.0})
    records = encode_records(study, ["a", "b", "c"], columns(ventilated=["None", "some", "None"]))
    assert records.inputs[:, 2].tolist() == [0.0, 2.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ ranges


@pytest.mark.parametrize("cell", ["-0.0001", "120.5", "-7", "1e9"])
def test_value_outside_its_range_is_refused_or_clipped(make_study: MakeStudy, cell: str) -> None:
    line = refused(make_study(), columns(age=["60", cell, "0"]))
    assert "row 2, column age: value is outside [0, 120] years" in line
    records = encode_records(make_study(), ["a", "b", "c"], columns(lactate=["2", cell, "4"]))
    assert records.inputs[1, 1] in (-1.0, 14.0)


@pytest.mark.parametrize("cell", ["0", "120", "120.0"])
def test_value_on_the_bound_is_taken(make_study: MakeStudy, cell: str) -> None:
    encode_records(make_study(), ["a", "b", "c"], columns(age=["60", cell, "0"]))


@pytest.mark.parametrize("cell", ["inf", "-inf", "Infinity", "1e999"])
def test_infinite_value_is_refused_even_where_values_are_clipped(make_study: MakeStudy, cell: str) -> None:
    assert "row 1, column lactate" in refused(make_study(), columns(lactate=[cell, "2", "4"]))


@pytest.mark.parametrize("cell", ["1,5", "twelve", "0x10", "1_0 0", "=1+1", "12 %", "\u0661x", "--1"])
def test_value_that_is_no_number_is_refused(make_study: MakeStudy, cell: str) -> None:
    assert "row 2, column lactate: value is not a number" in refused(make_study(), columns(lactate=["2", cell, "4"]))


@pytest.mark.parametrize("cell", ["2", "-1", "0.5", "yes", "", "nan", "inf", "1e400", "NA"])
def test_label_out_of_range_is_refused(make_study: MakeStudy, cell: str) -> None:
    assert "row 3, column ill: value is not a class 0..1" in refused(make_study(), columns(ill=["0", "1", cell]))


def test_first_fault_in_the_table_is_the_one_named(make_study: MakeStudy) -> None:
    assert "row 1, column age" in refused(make_study(), columns(age=["x", "y", "0"], lactate=["x", "2", "4"]))


@pytest.mark.parametrize("name", ["age", "ventilated", "ill"])
def test_missing_column_is_named(make_study: MakeStudy, name: str) -> None:
    table = columns()
    del table[name]
    assert f"column {name} is missing" in refused(make_study(), table)


def test_columns_the_study_does_not_name_are_not_looked_at(make_study: MakeStudy) -> None:
    plain = encode_records(make_study(), ["a", "b", "c"], columns())
    more = encode_records(make_study(), ["a", "b", "c"], columns(name=["x", "y", "z"]))
    assert np.array_equal(plain.inputs, more.inputs)


# --------------------------------------------------------------------------------------------------------- no values

MARKER = "Qz"
secrets = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=6).map(lambda text: MARKER + text)
numbers_out = st.integers(1_000_000, 9_999_999).map(lambda number: f"{number}.25")


@settings(max_examples=80, deadline=None)
@given(
    column=st.sampled_from(["age", "lactate", "ventilated", "ill"]), row=st.integers(0, 2), cell=secrets | numbers_out
)
def test_error_text_never_holds_a_value_or_a_patient(column: str, row: int, cell: str, make_study: MakeStudy) -> None:
    """Whatever stands in a cell, the error names its row and column and repeats nothing of it."""
    study = make_study({"data.features.1.outside": "refuse"})
    table = columns()
    table[column][row] = cell
    with pytest.raises(DataError) as caught:
        encode_records(study, [f"{MARKER}-patient-{n}" for n in range(3)], table)
    texts = [str(caught.value), repr(caught.value), str(caught.value.__cause__ or ""), str(caught.value.args)]
    assert not any(MARKER in text or cell in text for text in texts)
    assert re.search(rf"row {row + 1}, column {column}: ", str(caught.value))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


# ------------------------------------------------------------------------------------------------------------ subset


def test_subset_keeps_records_labels_and_patients_together() -> None:
    records = Records(np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 1, 0]), ("a", "b", "c"))
    part = records.subset(np.array([True, False, True]))
    assert part.inputs.tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert part.labels.tolist() == [0, 0]
    assert part.patients == ("a", "c")
    assert records.subset(np.zeros(3, np.bool_)).patients == ()


def test_records_that_memory_cannot_hold_are_refused_before_it_is_taken(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medfed.models.records.MOST_BYTES", 3 * 3 * 4 - 1)
    assert "encoded" in refused(make_study(), columns())
    monkeypatch.setattr("medfed.models.records.MOST_BYTES", 3 * 3 * 4)
    encode_records(make_study(), ["a", "b", "c"], columns())
