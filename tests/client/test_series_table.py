"""A table of measurements over time: read in every order and form; faults name row and column, never a value."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.client.sources.series_table import read_series
from medfed.errors import DataError, MedfedError
from medfed.models.cells import MISSING
from medfed.models.series_records import Measurements
from medfed.seams import SystemFiles

SECRET = "Erika Mustermann"
RECORDS = {"p1": 0, "p2": 1, "Müller": 2}
VARIABLES = {"pulse": "Puls", "lactate": "lactate"}


def read(folder: Path, data: str | bytes, variables: dict[str, str] | None = None) -> Measurements:
    path = folder / "series.csv"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_series(SystemFiles(), path, "id", "hours", VARIABLES if variables is None else variables, RECORDS)


def numbers(found: Measurements) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in found.values.tolist()]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_rows_may_stand_in_any_order_and_common_form(tmp_path: Path, delimiter: str, ending: str) -> None:
    rows = [
        ["lactate", "hours", "other", "id", "Puls"],
        ["", "1.5", SECRET, "p2", " 80 "],
        ["2.5", " -3", "", "p1", "NA"],
        ["1e0", "0", "x", "Mu\u0308ller\u200b", "070"],
        ["?", "2", "x", "p2", ""],
    ]
    found = read(tmp_path, "\ufeff" + ending.join(delimiter.join(row) for row in rows) + ending)
    assert found.records.tolist() == [1, 0, 2, 1]
    assert found.hours.tolist() == [1.5, -3.0, 0.0, 2.0]
    assert numbers(found) == [[80.0, None], [None, 2.5], [70.0, 1.0], [None, None]]
    assert found.rows.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("cell", sorted(MISSING))
@pytest.mark.parametrize("blanks", ["", "  "])
def test_missing_cell_is_not_observed(tmp_path: Path, cell: str, blanks: str) -> None:
    assert numbers(read(tmp_path, f"id,hours,Puls,lactate\np1,0,{blanks}{cell}{blanks},1\n")) == [[None, 1.0]]


def test_one_variable_is_read_too(tmp_path: Path) -> None:
    found = read(tmp_path, "id,hours,Puls\np1,0,80\np2,1,\n", {"pulse": "Puls"})
    assert numbers(found) == [[80.0], [None]]


def test_infinite_values_are_left_to_the_contract(tmp_path: Path) -> None:
    assert read(tmp_path, "id,hours,Puls,lactate\np1,0,inf,1\n").values[0, 0] == np.inf


HEAD = "id,hours,Puls,lactate\n"


@pytest.mark.parametrize(
    ("data", "code", "place"),
    [
        ("", 301, "the file is empty"),
        (HEAD, 310, "no record"),
        (",,,\n1,2,3,4\n", 301, "row 1"),
        (f"id,hours,Puls\n{SECRET},0,1\n", 301, 'column "lactate" is missing'),
        (f"id,time,Puls,lactate\n{SECRET},0,1,1\n", 301, 'column "hours" is missing'),
        (f"stay,hours,Puls,lactate\n{SECRET},0,1,1\n", 301, 'column "id" is missing'),
        (f"id,hours,Puls,lactate,Puls\n{SECRET},0,1,1,1\n", 301, 'column "Puls" is there 2 times'),
        (f"{HEAD}p1,0,1,1\n{SECRET},0,1,1\n", 301, 'row 3, column "id": its record is in no row'),
        (f"{HEAD}P1,0,1,1\n", 301, 'row 2, column "id": its record is in no row'),
        (f"{HEAD},0,1,1\n", 301, 'row 2, column "id": its record is in no row'),
        (f"{HEAD}p1,0,1,1\n\np1,,1,1\n", 301, 'row 4, column "hours": value is missing'),
        (f"{HEAD}p1,nan,1,1\n", 301, 'row 2, column "hours": value is missing'),
        (f"{HEAD}p1,{SECRET},1,1\n", 301, 'row 2, column "hours": value is not a number'),
        (f"{HEAD}p1,00:07,1,1\n", 301, 'row 2, column "hours": value is not a number'),
        (f"{HEAD}p1,inf,1,1\n", 301, 'row 2, column "hours": value is not finite'),
        (f"{HEAD}p1,0,1,1\np1,1,1,{SECRET}\n", 301, "row 3, column lactate: value is not a number"),
        (f"{HEAD}p1,0,1,1\np1,1,{SECRET},{SECRET}\n", 301, "row 3, column pulse: value is not a number"),
        (f'{HEAD}p1,0,"1,5",1\n', 301, "row 2, column pulse: value is not a number"),
        (f"{HEAD}p1,0,1\n", 301, "row 2 has 3 cells, the header 4"),
        (f"{HEAD}p1,0,1,1,{SECRET}\n", 301, "row 2 has 5 cells, the header 4"),
        (f'{HEAD}p1,0,1,"{SECRET}\n', 301, "row 2 is not CSV"),
        (HEAD.encode() + b"p1,0,1,M\xfcller\n", 301, "row 2 is not UTF-8"),
        (f"{HEAD}p1,0,1,\0\n", 301, "row 2 holds a NUL"),
    ],
)
def test_fault_names_row_and_column_and_no_value(tmp_path: Path, data: str | bytes, code: int, place: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, data)
    line = str(caught.value)
    assert caught.value.code == code
    assert line.startswith(f"MF-{code} in the series, ") and place in line
    assert "\n" not in line and "Mustermann" not in line and "ller" not in line
    assert caught.value.__cause__ is None


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedfedError) as caught:
        read_series(SystemFiles(), tmp_path / "none.csv", "id", "hours", VARIABLES, RECORDS)
    assert caught.value.code == 606


@settings(max_examples=80, deadline=None, derandomize=True)
@given(noise=st.binary(max_size=20), place=st.integers(0, 50))
def test_any_bytes_give_measurements_or_one_line(
    noise: bytes, place: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = b"id;hours;Puls;lactate\np1;0;80;1\np2;1.5;;2\n"
    try:
        found = read(tmp_path_factory.mktemp("csv"), data[:place] + noise + data[place:])
    except MedfedError as error:
        assert str(error).isprintable()
    else:
        assert found.values.shape == (len(found.records), 2)
        assert np.isfinite(found.hours).all()
        assert set(found.records.tolist()) <= set(RECORDS.values())
