"""What a hospital's files hold -> encoded records, by a study's data contract. Names rows and columns in errors, never values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import DataError
from medfed.models.event_records import CodedEvents, encode_events
from medfed.models.image_records import Pixels, encode_images, encode_views
from medfed.models.mixed_records import encode_mixed
from medfed.models.molecule_records import encode_fingerprints, encode_graphs
from medfed.models.series_records import Measurements, encode_series
from medfed.models.table_records import encode_features
from medfed.models.tasks import meaning
from medfed.models.text_records import encode_texts
from medfed.models.vocabulary import Vocabulary
from medfed.models.volume_records import Scan, encode_volumes
from medfed.study import Study

Inputs = NDArray[np.float32] | NDArray[np.int64]
MOST_BYTES = 16 << 30  # of all encoded records together: they lie in memory


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Encoded records.

    ``inputs``: float32[n, *shape], shape that of the data contract (of texts: int64 tokens); ``labels``: int64[n, ...], as
    ``models/tasks`` makes them; ``patients``: the id of each record's patient.
    """

    inputs: Inputs
    labels: NDArray[np.int64]
    patients: tuple[str, ...]

    def subset(self, keep: NDArray[np.bool_]) -> Records:
        """The records where ``keep`` bool[n] holds."""
        chosen = tuple(patient for patient, kept in zip(self.patients, keep, strict=True) if kept)
        return Records(self.inputs[keep], self.labels[keep], chosen)


def columns_of(study: Study, *, labelled: bool = True) -> list[str]:
    """The columns of the table with the patients that a study reads, by the study's names; without ``labelled`` only those
    that a prediction needs."""
    data = study.data
    named = [
        part.column
        for part in (data.image, data.volume, data.text, data.molecule, data.fingerprint)
        if part is not None
    ]
    named += [] if data.block is None else data.block.columns
    return [*(feature.name for feature in data.features), *named, *(study.task.columns if labelled else [])]


def encode_records(
    study: Study,
    patients: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    rows: Sequence[int] | None = None,
    *,
    images: Iterable[Pixels | Scan] = (),
    series: Measurements | None = None,
    events: CodedEvents | None = None,
    vocabulary: Vocabulary | None = None,
    labelled: bool = True,
) -> Records:
    """Encode raw text columns, and what belongs to each record beside them; one record a row of the table.

    ``rows[i]``: what record i is called in an error, the line of its file; without it records count from 1. ``images``:
    of an image study, in the same order, decoded as they are asked for: one a record, of several views all that a record names,
    or of volumes a ``Scan`` a record; ``series``: of a series study; ``events``: of a study of events;
    ``vocabulary``: of one that names a public vocabulary.
    ``labelled``: False for records to predict for, which need no label; theirs mean nothing then.
    Raises: ``DataError`` MF-301 for a missing column, a missing, unreadable or out-of-range value, or more records than fit
    ``MOST_BYTES`` in the study's shape.
    """
    size = len(patients) * math.prod(study.data.shape) * (8 if study.data.is_tokens else 4)
    if size > MOST_BYTES:
        what = f"{len(patients)} records take {size / 2**30:.0f} GiB encoded, at most {MOST_BYTES >> 30}"
        raise DataError(301, what, "give fewer records, or ask for a study of smaller ones")
    for name in columns_of(study, labelled=labelled):
        if name not in columns:
            remedy = f'write {name} = "YOUR COLUMN" under [data.columns] in hospital.toml'
            raise DataError(301, f"column {name} is missing", remedy)
    named, task = range(1, len(patients) + 1) if rows is None else rows, meaning(study.task)
    labels = task.labels(study.data, columns, named) if labelled else task.unlabelled(study.data, len(patients))
    found = _inputs(study, columns, named, images, series, events, vocabulary)
    return Records(found, labels, tuple(patients))


def _inputs(
    study: Study,
    columns: Mapping[str, Sequence[str]],
    rows: Sequence[int],
    images: Iterable[Pixels | Scan],
    series: Measurements | None,
    events: CodedEvents | None,
    vocabulary: Vocabulary | None,
) -> Inputs:
    data = study.data
    if data.events is not None:
        if events is None:
            raise ValueError("a study of events is encoded from events")
        return encode_events(data.events, len(rows), events)
    if data.mixed is not None:
        shown = (image for image in images if not isinstance(image, Scan))
        return encode_mixed(data, encode_features(data.features, columns, rows), columns, rows, shown, series)
    if data.volume is not None:
        return encode_volumes(data.volume, (scan for scan in images if isinstance(scan, Scan)), rows)
    if data.image is not None:
        pixels = (image for image in images if not isinstance(image, Scan))
        if data.image.views is not None:
            return encode_views(data.image, columns[data.image.column], pixels, rows)
        return encode_images(data.image, pixels, rows)
    if data.molecule is not None:
        return encode_graphs(data.molecule, columns[data.molecule.column], rows)
    if data.fingerprint is not None:
        return encode_fingerprints(data.fingerprint, columns[data.fingerprint.column], rows)
    if data.text is not None:
        if (vocabulary is None) != (data.text.vocabulary_sha256 is None):
            raise ValueError("a study of a public vocabulary is encoded with it, and no other")
        return encode_texts(data.text, columns[data.text.column], rows, vocabulary)
    features = encode_features(data.features, columns, rows)
    if data.series is None:
        return features.astype(np.float32)
    if series is None:
        raise ValueError("a study of series is encoded from measurements")
    return encode_series(data.series, features, series)
