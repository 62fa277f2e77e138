"""From the files that ``[data]`` of ``hospital.toml`` names to a study's encoded records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medfed.client.policy import DataSection
from medfed.client.sources.csv_table import Table, plain, read_table
from medfed.client.sources.event_table import read_events
from medfed.client.sources.images import read_images
from medfed.client.sources.series_table import read_series
from medfed.client.sources.volumes import read_volumes
from medfed.errors import ConfigError, DataError
from medfed.models.event_records import CodedEvents
from medfed.models.image_records import Pixels, view_names
from medfed.models.mixed_records import names_image
from medfed.models.records import Records, columns_of, encode_records
from medfed.models.series_records import Measurements
from medfed.models.vocabulary import Vocabulary, read_vocabulary
from medfed.models.volume_records import Scan
from medfed.seams import Files
from medfed.study import Study

_VOCABULARY_BYTES = 1 << 26


def read_records(files: Files, folder: Path, data: DataSection, study: Study, *, labelled: bool = True) -> Records:
    """All records of a hospital, encoded by the study's contract; paths are relative to ``folder``. ``labelled``: False for
    records to predict for, whose table needs no column of labels.

    Raises: ``DataError`` MF-301 at the first fault, and what the readers raise; ``ConfigError`` MF-203 if ``data`` names
    no images or series and the study reads them.
    """
    contract = study.data
    local = {name: data.columns.get(name, name) for name in columns_of(study, labelled=labelled)}
    table = read_table(files, folder / data.path, data.patient_column, local, data.record_column)
    if contract.mixed is not None:
        shown = _shown(files, folder, data, study, table)
        series = None if contract.series is None else _read_series(files, folder, data, study, table)
        given = (table.patients, table.columns, table.rows)
        return encode_records(study, *given, images=shown, series=series, labelled=labelled)
    if contract.image is not None or contract.volume is not None:
        images = _read_images(files, folder / _named(data.images, "images", "folder of images", "images"), study, table)
        return encode_records(study, table.patients, table.columns, table.rows, images=images, labelled=labelled)
    if contract.series is not None:
        series = _read_series(files, folder, data, study, table)
        return encode_records(study, table.patients, table.columns, table.rows, series=series, labelled=labelled)
    events = None if contract.events is None else _read_events(files, folder, data, table)
    vocabulary = _vocabulary(files, folder, data, study)
    given = (table.patients, table.columns, table.rows)
    return encode_records(study, *given, events=events, vocabulary=vocabulary, labelled=labelled)


def _vocabulary(files: Files, folder: Path, data: DataSection, study: Study) -> Vocabulary | None:
    text = study.data.text
    if text is None or text.vocabulary_sha256 is None:
        return None
    path = folder / _named(data.vocabulary, "vocabulary", "vocabulary", "vocabulary.txt")
    return read_vocabulary(text, files.read(path, limit_bytes=_VOCABULARY_BYTES))


def _read_images(files: Files, place: Path, study: Study, table: Table) -> Iterator[Pixels | Scan]:
    image, volume = study.data.image, study.data.volume
    if volume is not None:
        yield from read_volumes(files, place, table.columns[volume.column], table.rows, volume.column)
    elif image is not None and image.views is not None:
        for row, cell in zip(table.rows, table.columns[image.column], strict=True):
            names = [name for name in view_names(image, cell, row) if name]
            yield from read_images(files, place, names, [row] * len(names), image.column)
    elif image is not None:
        yield from read_images(files, place, table.columns[image.column], table.rows, image.column)


def _shown(files: Files, folder: Path, data: DataSection, study: Study, table: Table) -> Iterator[Pixels]:
    """The images of those records that name one."""
    image = study.data.image
    if image is not None:
        place = folder / _named(data.images, "images", "folder of images", "images")
        named = [
            (cell, row) for cell, row in zip(table.columns[image.column], table.rows, strict=True) if names_image(cell)
        ]
        yield from read_images(files, place, [cell for cell, _ in named], [row for _, row in named], image.column)


def _named(path: str | None, key: str, what: str, example: str) -> str:
    if path is None:
        raise ConfigError(203, f"hospital.toml names no {what}", f'write {key} = "{example}" under [data]')
    return path


def _read_series(files: Files, folder: Path, data: DataSection, study: Study, table: Table) -> Measurements:
    path = folder / _named(data.series, "series", "table of measurements", "series.csv")
    variables = [] if study.data.series is None else study.data.series.variables
    column = data.record_column or data.patient_column
    local = {variable.name: data.columns.get(variable.name, variable.name) for variable in variables}
    return read_series(files, path, column, data.time_column, local, _places_of_records(table, data))


def _read_events(files: Files, folder: Path, data: DataSection, table: Table) -> CodedEvents:
    path = folder / _named(data.events, "events", "table of events", "events.csv")
    column = data.record_column or data.patient_column
    places = _places_of_records(table, data)
    return read_events(files, path, column, data.event_time_column, data.code_column, places)


def _places_of_records(table: Table, data: DataSection) -> dict[str, int]:
    """Each record's index by its id, which must be its own."""
    places: dict[str, int] = {}
    for index, (row, record) in enumerate(zip(table.rows, table.records, strict=True)):
        if record in places:
            column = plain(data.record_column or data.patient_column)
            what = f'row {row}, column "{column}": an earlier row has the same id'
            raise DataError(301, what, 'tell records apart: record_column = "COLUMN OF BOTH TABLES" under [data]')
        places[record] = index
    return places
