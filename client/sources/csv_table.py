"""CSV files as hospitals export them -> columns of text. Errors name rows and columns, never what a cell holds.

Strict on structure (one header, every row as long as it, quotes that close), lenient on form: UTF-8 with or without a
byte order mark, comma, semicolon or tab, any line ending. What the text means is judged against the study's data
contract, not here; no cell is ever evaluated.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
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

    ``patients[i]``: id of record i in its one spelling, never empty. ``columns[name][i]``: its text under the study's
    name of the column, blanks at both ends removed, empty where nothing stands. ``rows[i]``: the line in the file where
    record i begins (the header is line 1), for errors. ``repr`` shows no content.
    """

    patients: tuple[str, ...] = field(repr=False)
    columns: Mapping[str, tuple[str, ...]] = field(repr=False)
    rows: tuple[int, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.patients)


def read_table(files: Files, path: Path, patient_column: str, columns: Mapping[str, str]) -> Table:
    """Read the patient ids and ``columns`` (study's name -> name in the file) of a CSV file; other columns are ignored.

    Raises: ``DataError`` 301 (empty, not UTF-8, no or doubled column, ragged row, open quote, NUL, no patient id), 310
    without a record; what ``files.read`` raises (606, 609 over 1 GiB).
    """
    text = _decode(files.read(path, limit_bytes=LIMIT_BYTES))
    lines = _records(text)
    _, header = next(lines, (1, []))
    names = [name.strip() for name in header]
    if not any(names):
        raise _fault("row 1 is no header", "the first row names the columns")
    places = _places(names, patient_column, columns)
    patients: list[str] = []
    rows: list[int] = []
    cells: dict[str, list[str]] = {name: [] for name in columns}
    for row, record in lines:
        if len(record) != len(names):
            raise _fault(f"row {row} has {len(record)} cells, the header {len(names)}", "correct the row")
        patient = one_spelling(record[places[patient_column]])
        if not patient:
            raise _fault(f'row {row}, column "{_plain(patient_column)}" holds no patient id', "every record needs one")
        patients.append(patient)
        rows.append(row)
        for name, local in columns.items():
            cells[name].append(record[places[local]].strip())
    if not patients:
        raise DataError(310, "the file has a header and no record", "name the right file")
    return Table(tuple(patients), {name: tuple(values) for name, values in cells.items()}, tuple(rows))


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


def _places(names: list[str], patient_column: str, columns: Mapping[str, str]) -> dict[str, int]:
    """Index of each wanted column; each must be there once."""
    places: dict[str, int] = {}
    for wanted in (patient_column, *columns.values()):
        found = [index for index, name in enumerate(names) if name == wanted]
        if not found:
            remedy = (
                'add it, or write its name here as STUDY_NAME = "YOUR COLUMN" under [data.columns] in hospital.toml'
            )
            raise _fault(f'column "{_plain(wanted)}" is missing', remedy)
        if len(found) > 1:
            raise _fault(f'column "{_plain(wanted)}" is there {len(found)} times', "rename or remove one")
        places[wanted] = found[0]
    return places


def _plain(name: str) -> str:
    """A column's name for a terminal; it comes from the configuration, not from the file."""
    return name.encode("ascii", "backslashreplace").decode()[:64]


def _fault(what: str, remedy: str) -> DataError:
    return DataError(301, what, remedy)
