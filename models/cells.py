"""What the cells of a hospital's tables mean, and the fault that names a cell by row and column, never by its content."""

from __future__ import annotations

import math

from medfed.errors import DataError

MISSING = frozenset({"", "?", "NA", "N/A", "na", "n/a", "nan", "NaN", "NAN", "null", "NULL", "None"})


def canonical(text: str) -> str:
    """A level written as 2, 2.0 or 02 is the same level."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value):
        return text
    return str(int(value)) if value == int(value) else repr(value)


def fault(row: int, column: str, what: str, remedy: str) -> DataError:
    """MF-301 for one cell: ``row`` as its file counts, ``column`` as the study names it."""
    return DataError(301, f"row {row}, column {column}: value {what}", remedy)
