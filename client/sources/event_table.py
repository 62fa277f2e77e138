"""A table of coded events -> codes and days. Errors name rows and columns, never what a cell holds.

One row an event: the record's id, the time as a date (2024-03-31) or a number of days, and a code. Rows may stand in any order.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import numpy as np

from medfed.client.sources.csv_table import plain, read_lines
from medfed.client.sources.patient_ids import one_spelling
from medfed.errors import DataError
from medfed.models.cells import MISSING, fault
from medfed.models.event_records import CodedEvents
from medfed.seams import Files

_LONGEST = 64  # characters of a code


def read_events(
    files: Files, path: Path, record_column: str, time_column: str, code_column: str, records: Mapping[str, int]
) -> CodedEvents:
    """Read the events of ``records`` (id in its one spelling -> index).

    A row of an unknown record is refused, as in ``series_table``. Raises: as ``read_table``; ``DataError`` 301 for an unknown
    record, a time that is neither date nor number, a missing or overlong code, times of both kinds.
    """
    try:
        return _read(files, path, record_column, time_column, code_column, records)
    except DataError as error:
        raise DataError(error.code, f"in the events, {error.what}", error.remedy) from None


def _read(
    files: Files, path: Path, record_column: str, time_column: str, code_column: str, records: Mapping[str, int]
) -> CodedEvents:
    lines = read_lines(files, path, [record_column, time_column, code_column])
    record_place, time_place, code_place = (lines.places[name] for name in (record_column, time_column, code_column))
    indices, days, codes = array("q"), array("d"), []
    are_dates: bool | None = None
    for row, cells in lines.cells:
        index = records.get(one_spelling(cells[record_place]))
        if index is None:
            what = f'row {row}, column "{plain(record_column)}": its record is in no row of the table with the patients'
            raise DataError(301, what, "write ids alike in both files; remove rows of other records")
        day, is_date = _day(cells[time_place].strip(), row, time_column)
        if are_dates not in (None, is_date):
            raise fault(row, f'"{plain(time_column)}"', "is of another kind than those above", "write all as dates")
        are_dates = is_date
        indices.append(index)
        days.append(day)
        codes.append(_code(cells[code_place].strip(), row, code_column))
    if not codes:
        raise DataError(310, "the file has a header and no record", "name the right file")
    return CodedEvents(np.frombuffer(indices, np.int64), np.frombuffer(days, np.float64), tuple(codes))


def _day(cell: str, row: int, column: str) -> tuple[float, bool]:
    """Days, and whether they were a date."""
    name = f'"{plain(column)}"'
    if cell in MISSING:
        raise fault(row, name, "is missing", "every event has its time")
    try:
        return float(date.fromisoformat(cell).toordinal()), True
    except ValueError:
        pass
    try:
        days = float(cell)
    except ValueError:
        raise fault(row, name, "is neither a date nor a number of days", "write dates as 2024-03-31") from None
    if not math.isfinite(days) or abs(days) > 1e7:
        raise fault(row, name, "is no number of days", "write dates as 2024-03-31")
    return days, False


def _code(cell: str, row: int, column: str) -> str:
    name = f'"{plain(column)}"'
    if cell in MISSING:
        raise fault(row, name, "is missing", "every event has its code")
    if len(cell) > _LONGEST:
        raise fault(row, name, f"has more than {_LONGEST} characters", "name the column of codes, not of descriptions")
    return cell
