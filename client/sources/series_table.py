"""A table of measurements over time -> numbers. Errors name rows and columns, never what a cell holds.

One row a record and time: the record's id, the time in hours since the record's beginning, one column a variable, empty
where it was not observed. Rows may stand in any order.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.client.sources.csv_table import Lines, plain, read_lines
from medfed.client.sources.patient_ids import one_spelling
from medfed.errors import DataError
from medfed.models.cells import MISSING, fault
from medfed.models.series_records import Measurements, in_series
from medfed.seams import Files


def read_series(
    files: Files,
    path: Path,
    record_column: str,
    time_column: str,
    variables: Mapping[str, str],
    records: Mapping[str, int],
) -> Measurements:
    """Read ``variables`` (study's name -> name in the file) of ``records`` (id in its one spelling -> index).

    A row of an unknown record is refused, not passed over: ids that are spelled in two ways (001 and 1) would otherwise
    leave every series empty, and train, without a word.
    Raises: as ``read_table``; ``DataError`` 301 for an unknown record, a time or value that is no number.
    """
    try:
        lines = read_lines(files, path, [record_column, time_column, *variables.values()])
        return _read(lines, record_column, time_column, variables, records)
    except DataError as error:
        raise in_series(error) from None


def _read(
    lines: Lines, record_column: str, time_column: str, variables: Mapping[str, str], records: Mapping[str, int]
) -> Measurements:
    record_place, time_place = lines.places[record_column], lines.places[time_column]
    names, places = list(variables), [lines.places[local] for local in variables.values()]
    # one column gives a cell, several a tuple: the id is asked for too, and dropped
    pick = itemgetter(record_place, *places)
    rows, indices, hours, values = array("q"), array("q"), array("d"), array("d")
    for row, cells in lines.cells:
        index = records.get(one_spelling(cells[record_place]))
        if index is None:
            what = f'row {row}, column "{plain(record_column)}": its record is in no row of the table with the patients'
            raise DataError(301, what, "write ids alike in both files; remove rows of other records")
        rows.append(row)
        indices.append(index)
        hours.append(_hours(cells[time_place].strip(), row, time_column))
        values.extend(_numbers(pick(cells)[1:], row, names))
    if not rows:
        raise DataError(310, "the file has a header and no record", "name the right file")
    return Measurements(
        np.frombuffer(indices, np.int64),
        np.frombuffer(hours, np.float64),
        _table(values, len(names)),
        np.frombuffer(rows, np.int64),
    )


def _table(values: array[float], columns: int) -> NDArray[np.float64]:
    return np.frombuffer(values, np.float64).reshape(-1, columns)


def _numbers(cells: Sequence[str], row: int, names: Sequence[str]) -> list[float]:
    """A number a cell, NaN where nothing was observed."""
    try:
        return [math.nan if cell in MISSING else float(cell) for cell in cells]
    except ValueError:
        return [_number(cell.strip(), row, name) for cell, name in zip(cells, names, strict=True)]


def _number(cell: str, row: int, name: str) -> float:
    try:
        return math.nan if cell in MISSING else float(cell)
    except ValueError:
        raise fault(row, name, "is not a number", "write numbers with a decimal point") from None


def _hours(cell: str, row: int, column: str) -> float:
    name = f'"{plain(column)}"'
    if cell in MISSING:
        raise fault(row, name, "is missing", "every measurement has its time in hours")
    hours = _number(cell, row, name)
    if not math.isfinite(hours):
        raise fault(row, name, "is not finite", "every measurement has its time in hours")
    return hours
