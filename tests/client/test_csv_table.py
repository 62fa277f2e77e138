"""CSV as hospitals export it: read in every common form; faults name row and column, never what a cell holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.client.sources.csv_table import Table, read_table
from medfed.errors import DataError, EnvironmentFault, ExitStatus, MedfedError
from medfed.seams import SystemFiles

SECRET = "Erika Mustermann"
COLUMNS = {"age": "Alter", "ill": "ill"}


def read(folder: Path, data: str | bytes, columns: dict[str, str] | None = None) -> Table:
    path = folder / "patients.csv"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_table(SystemFiles(), path, "id", COLUMNS if columns is None else columns)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_table_is_read_in_every_common_form(tmp_path: Path, mark: str, delimiter: str, ending: str) -> None:
    rows = [["id", "Alter", "other", "ill"], ["p1", " 61 ", "x", "1"], ['"p 2"', "", '"a;b,c\td"', "0"]]
    table = read(tmp_path, mark + ending.join(delimiter.join(row) for row in rows) + ending)
    assert table.patients == ("p1", "p 2")
    assert table.columns == {"age": ("61", ""), "ill": ("1", "0")}
    assert table.rows == (2, 3)
    assert len(table) == 2


def test_quoted_header_with_other_separators_is_split_rightly(tmp_path: Path) -> None:
    table = read(tmp_path, '"id";"a,b,c,d";"x"\n1;2;3\n', {"odd": "a,b,c,d"})
    assert table.columns == {"odd": ("2",)}


def test_row_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    table = read(tmp_path, '\nid,Alter,ill\n\np1,"6\n1",1\n\np2,62,0\n\n')
    assert table.rows == (4, 7)


def test_one_patient_may_have_many_records(tmp_path: Path) -> None:
    assert read(tmp_path, "id,Alter,ill\np,1,0\np,1,0\n").patients == ("p", "p")


ONE_PERSON = {
    "composed": "Müller",
    "decomposed": "Mu\u0308ller",
    "blanks": "\u00a0 Müller\u2003",
    "byte order mark": "\ufeffMüller",
    "zero-width": "M\u200bu\u0308ll\u200der\u2060",
    "accent behind a joiner": "Mu\u200d\u0308ller",
    "direction marks": "\u200eMüller\u202c",
    "soft hyphen": "Mül\u00adler",
}


@pytest.mark.parametrize("spelling", ONE_PERSON)
def test_one_person_is_one_patient_in_every_invisible_spelling(tmp_path: Path, spelling: str) -> None:
    table = read(tmp_path, f"id,Alter,ill\n{ONE_PERSON[spelling]},61,1\nMüller,62,0\n")
    assert table.patients == ("Müller", "Müller")


def test_ids_that_look_different_are_different_people(tmp_path: Path) -> None:
    ids = ("001", "1", "p7", "P7", "Muller", "Müller", "a b", "ab", "\uff11")
    table = read(tmp_path, "id,Alter,ill\n" + "".join(f"{each},61,1\n" for each in ids))
    assert table.patients == ids


def test_id_of_invisible_characters_is_no_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 2") as caught:
        read(tmp_path, "id,Alter,ill\n\u200b\u2060,61,1\n")
    assert caught.value.code == 301


def test_cells_are_text_and_nothing_else(tmp_path: Path) -> None:
    table = read(tmp_path, "id,Alter,ill\np,=1+1,@SUM(A1)\n")
    assert table.columns == {"age": ("=1+1",), "ill": ("@SUM(A1)",)}


def test_table_shows_no_patient_in_its_repr(tmp_path: Path) -> None:
    assert SECRET not in repr(read(tmp_path, f"id,Alter,ill\n{SECRET},61,1\n"))


@pytest.mark.parametrize(
    ("data", "code", "place"),
    [
        ("", 301, "empty"),
        ("\ufeff \r\n", 301, "empty"),
        (",,\n1,2,3\n", 301, "row 1"),
        ("id,Alter,ill\n", 310, "no record"),
        (f"id,Alter\n{SECRET},61\n", 301, 'column "ill" is missing'),
        (f"ID,Alter,ill\n{SECRET},61,1\n", 301, 'column "id" is missing'),
        (f"id,Alter,ill,Alter\n{SECRET},61,1,62\n", 301, 'column "Alter" is there 2 times'),
        (f"id,Alter,ill\np,1,0\n{SECRET},61\n", 301, "row 3 has 2 cells, the header 3"),
        (f"id,Alter,ill\np,1,0\n{SECRET},61,1,1\n", 301, "row 3 has 4 cells, the header 3"),
        (f"id,Alter,ill\n  ,{SECRET},1\n", 301, 'row 2, column "id" holds no patient id'),
        (f'id,Alter,ill\np,1,0\n"{SECRET},61,1\n', 301, "row 3 is not CSV"),
        (f'id,Alter,ill\n"p"{SECRET},61,1\n', 301, "row 2 is not CSV"),
        (f"id,Alter,ill\n{SECRET},6\0,1\n", 301, "row 2 holds a NUL"),
        (b"id,Alter,ill\np,1,0\nM\xfcller,61,1\n", 301, "row 3 is not UTF-8"),
        ("id,Alter,ill\n" + SECRET * 20_000 + ",61,1\n", 301, "row 2 is not CSV"),
    ],
)
def test_fault_names_row_and_column_and_no_value(tmp_path: Path, data: str | bytes, code: int, place: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, data)
    line = str(caught.value)
    assert caught.value.code == code
    assert place in line
    assert "\n" not in line and "Mustermann" not in line and "ller" not in line
    assert caught.value.exit_status is (ExitStatus.USAGE if code == 301 else ExitStatus.POLICY)
    assert caught.value.__cause__ is None  # a chained error could carry the cell into a log


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        read_table(SystemFiles(), tmp_path / "none.csv", "id", COLUMNS)
    assert caught.value.code == 606


@settings(max_examples=80, deadline=None, derandomize=True)
@given(noise=st.binary(max_size=30), place=st.integers(0, 60))
def test_any_bytes_give_a_table_or_one_line(noise: bytes, place: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = b"id;Alter;ill\np1;61;1\np2;62;0\np3;63;1\n"
    try:
        table = read(tmp_path_factory.mktemp("csv"), data[:place] + noise + data[place:])
    except MedfedError as error:
        assert str(error).isprintable()
    else:
        assert len(table.patients) == len(table.rows) == len(table.columns["age"])
        assert all(table.patients)
