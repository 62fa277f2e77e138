"""CSV files as hospitals export them -> columns of text. Errors name rows and columns, never what a cell holds.

Strict on structure (one header, every row as long as it, quotes that close), lenient on form: UTF-8 with or without a
byte order mark, comma, semicolon or tab, any line ending. What the text means is judged against the study's data
contract, not here; no cell is ever evaluated.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medfed.client.sources.patient_ids import one_spelling
from medfed.errors import DataError
from medfed.seams import Files

LIMIT_BYTES = 1 << 30
_HEADER_LIMIT = 1 << 20
_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True, slots=True)
class Table:
    """Records by column, in the order of the file.

    ``patients[i]``: id of record i in its one spelling, never empty. ``records[i]``: the id of the record itself, likewise;
    the patient's where the file has no column for it. ``columns[name][i]``: its text under the study's name of the column,
    blanks at both ends removed, empty where nothing stands. ``rows[i]``: the line in the file where record i begins (the
    header is line 1), for errors. ``repr`` shows no content.
    """

    patients: tuple[str, ...] = field(repr=False)
    columns: Mapping[str, tuple[str, ...]] = field(repr=False)
    rows: tuple[int, ...] = field(repr=False)
    records: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.patients)


def read_table(
    files: Files, path: Path, patient_column: str, columns: Mapping[str, str], record_column: str | None = None
) -> Table:
    """Read the patient ids, the record ids and ``columns`` (study's name -> name in the file); other columns are ignored.

    Raises: ``DataError`` 301 (empty, not UTF-8, no or doubled column, ragged row, open quote, NUL, no patient id), 310
    without a record; what ``files.read`` raises (606, 609 over 1 GiB).
    """
    own_ids = [] if record_column is None else [record_column]
    lines = read_lines(files, path, [patient_column, *own_ids, *columns.values()])
    patients: list[str] = []
    records: list[str] = []
    rows: list[int] = []
    cells: dict[str, list[str]] = {name: [] for name in columns}
    for row, record in lines.cells:
        patient = _id(record, lines.places, patient_column, row, "patient")
        patients.append(patient)
        records.append(patient if record_column is None else _id(record, lines.places, record_column, row, "record"))
        rows.append(row)
        for name, local in columns.items():
            cells[name].append(record[lines.places[local]].strip())
    if not patients:
        raise DataError(310, "the file has a header and no record", "name the right file")
    return Table(tuple(patients), {name: tuple(values) for name, values in cells.items()}, tuple(rows), tuple(records))


@dataclass(frozen=True, slots=True)
class Lines:
    """A file behind its header: ``places`` of the wanted columns, and (line where it begins, cells) of every record."""

    places: Mapping[str, int]
    cells: Iterator[tuple[int, list[str]]] = field(repr=False)


def read_lines(files: Files, path: Path, wanted: Sequence[str]) -> Lines:
    """Begin to read a CSV file that has each ``wanted`` column once; raises as ``read_table``, at a record when it comes."""
    names, lines = _begin(files, path)
    return Lines(_places(names, wanted), _as_long_as(len(names), lines))


def read_header(files: Files, path: Path) -> list[str]:
    """The names of all columns of a CSV file; raises as ``read_table``."""
    return _begin(files, path)[0]


def _begin(files: Files, path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    lines = _records(_decode(files.read(path, limit_bytes=LIMIT_BYTES)))
    _, header = next(lines, (1, []))
    names = [name.strip() for name in header]
    if not any(names):
        raise _fault("row 1 is no header", "the first row names the columns")
    return names, lines


def _as_long_as(width: int, lines: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    for row, record in lines:
        if len(record) != width:
            raise _fault(f"row {row} has {len(record)} cells, the header {width}", "correct the row")
        yield row, record


def _id(record: list[str], places: Mapping[str, int], column: str, row: int, whose: str) -> str:
    identity = one_spelling(record[places[column]])
    if not identity:
        raise _fault(f'row {row}, column "{plain(column)}" holds no {whose} id', "every record needs one")
    return identity


def _decode(data: bytes) -> str:
    if not data.strip(b"\xef\xbb\xbf \t\r\n"):
        raise _fault("the file is empty", "name the right file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise _fault(f"row {row} is not UTF-8", "export the table as UTF-8") from None
    if "\0" in text:
        row = text.count("\n", 0, text.index("\0")) + 1
        raise _fault(f"row {row} holds a NUL character", "export the table as plain text")
    return text


def _delimiter(text: str) -> str:
    """The separator that splits the header most often, quoted parts left out; a comma if none does."""
    header: list[str] = []
    in_quotes = False
    for character in text[:_HEADER_LIMIT]:
        if character == '"':
            in_quotes = not in_quotes
        elif character in "\r\n" and not in_quotes and header:
            break
        elif not in_quotes:
            header.append(character)
    return max(_DELIMITERS, key=header.count)


def _records(text: str) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, cells) of every record; wholly empty lines are left out, as spreadsheets append them."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    begin = 1
    try:
        for record in reader:
            if record:
                yield begin, record
            begin = reader.line_num + 1
    except csv.Error:
        # the reader's own message is dropped: it may quote the cell
        raise _fault(f"row {begin} is not CSV, a quote stands wrong or is left open", "correct the row") from None


def _places(names: list[str], all_wanted: Sequence[str]) -> dict[str, int]:
    """Index of each wanted column; each must be there once."""
    places: dict[str, int] = {}
    for wanted in all_wanted:
        found = [index for index, name in enumerate(names) if name == wanted]
        if not found:
            remedy = (
                'add it, or name yours in hospital.toml: STUDY_NAME = "YOUR COLUMN" under [data.columns]; the columns of '
                "patient, record and time under [data]"
            )
            raise _fault(f'column "{plain(wanted)}" is missing', remedy)
        if len(found) > 1:
            raise _fault(f'column "{plain(wanted)}" is there {len(found)} times', "rename or remove one")
        places[wanted] = found[0]
    return places


def plain(name: str) -> str:
    """A column's name for a terminal, on one line; it comes from the configuration, not from the file."""
    return name.encode("unicode_escape").decode()[:64]


def _fault(what: str, remedy: str) -> DataError:
    return DataError(301, what, remedy)
