"""What a hospital's files hold -> encoded records, by a study's data contract. Names rows and columns in errors, never values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import DataError
from medfed.models.cells import canonical, fault
from medfed.models.image_records import Pixels, encode_images
from medfed.models.series_records import Measurements, encode_series
from medfed.models.table_records import encode_features
from medfed.models.text_records import encode_texts
from medfed.study import Study

Inputs = NDArray[np.float32] | NDArray[np.int64]
MOST_BYTES = 16 << 30  # of all encoded records together: they lie in memory


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Encoded records.

    ``inputs``: float32[n, *shape], shape that of the data contract (of texts: int64 tokens); ``labels``: int64[n];
    ``patients``: the id of each record's patient.
    """

    inputs: Inputs
    labels: NDArray[np.int64]
    patients: tuple[str, ...]

    def subset(self, keep: NDArray[np.bool_]) -> Records:
        """The records where ``keep`` bool[n] holds."""
        chosen = tuple(patient for patient, kept in zip(self.patients, keep, strict=True) if kept)
        return Records(self.inputs[keep], self.labels[keep], chosen)


def columns_of(study: Study) -> list[str]:
    """The columns of the table with the patients that a study reads, by the study's names."""
    data = study.data
    named = [part.column for part in (data.image, data.text) if part is not None]
    return [*(feature.name for feature in data.features), *named, study.task.label]


def encode_records(
    study: Study,
    patients: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    rows: Sequence[int] | None = None,
    *,
    images: Iterable[Pixels] = (),
    series: Measurements | None = None,
) -> Records:
    """Encode raw text columns, and what belongs to each record beside them; one record a row of the table.

    ``rows[i]``: what record i is called in an error, the line of its file; without it records count from 1. ``images``:
    of an image study, one a record in the same order, decoded as they are asked for; ``series``: of a series study.
    Raises: ``DataError`` MF-301 for a missing column, a missing, unreadable or out-of-range value, or more records than fit
    ``MOST_BYTES`` in the study's shape.
    """
    size = len(patients) * math.prod(study.data.shape) * (8 if study.data.kind == "text" else 4)
    if size > MOST_BYTES:
        what = f"{len(patients)} records take {size / 2**30:.0f} GiB encoded, at most {MOST_BYTES >> 30}"
        raise DataError(301, what, "give fewer records, or ask for a study of smaller ones")
    for name in columns_of(study):
        if name not in columns:
            remedy = f'write {name} = "YOUR COLUMN" under [data.columns] in hospital.toml'
            raise DataError(301, f"column {name} is missing", remedy)
    named = range(1, len(patients) + 1) if rows is None else rows
    labels = _labels(study, columns[study.task.label], named)
    return Records(_inputs(study, columns, named, images, series), labels, tuple(patients))


def _inputs(
    study: Study,
    columns: Mapping[str, Sequence[str]],
    rows: Sequence[int],
    images: Iterable[Pixels],
    series: Measurements | None,
) -> Inputs:
    data = study.data
    if data.image is not None:
        return encode_images(data.image, images, rows)
    if data.text is not None:
        return encode_texts(data.text, columns[data.text.column], rows)
    features = encode_features(data.features, columns, rows)
    if data.series is None:
        return features.astype(np.float32)
    if series is None:
        raise ValueError("a study of series is encoded from measurements")
    return encode_series(data.series, features, series)


def _labels(study: Study, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.int64]:
    labels = np.empty(len(cells), np.int64)
    allowed = {str(value): value for value in range(study.task.classes)}
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        try:
            labels[record] = allowed[canonical(cell.strip())]
        except (KeyError, OverflowError, ValueError):
            limit = study.task.classes - 1
            raise fault(row, study.task.label, f"is not a class 0..{limit}", "drop rows without a label") from None
    return labels
