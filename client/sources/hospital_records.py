"""From the files that ``[data]`` of ``hospital.toml`` names to a study's encoded records."""

from __future__ import annotations

from pathlib import Path

from medfed.client.policy import DataSection
from medfed.client.sources.csv_table import Table, plain, read_table
from medfed.client.sources.images import read_images
from medfed.client.sources.series_table import read_series
from medfed.errors import ConfigError, DataError
from medfed.models.records import Records, columns_of, encode_records
from medfed.models.series_records import Measurements
from medfed.seams import Files
from medfed.study import Study


def read_records(files: Files, folder: Path, data: DataSection, study: Study) -> Records:
    """All records of a hospital, encoded by the study's contract; paths are relative to ``folder``.

    Raises: ``DataError`` MF-301 at the first fault, and what the readers raise; ``ConfigError`` MF-203 if ``data`` names
    no images or series and the study reads them.
    """
    contract = study.data
    local = {name: data.columns.get(name, name) for name in columns_of(study)}
    table = read_table(files, folder / data.path, data.patient_column, local, data.record_column)
    if contract.image is not None:
        place = folder / _named(data.images, "images", "folder of images", "images")
        images = read_images(files, place, table.columns[contract.image.column], table.rows, contract.image.column)
        return encode_records(study, table.patients, table.columns, table.rows, images=images)
    if contract.series is not None:
        series = _read_series(files, folder, data, study, table)
        return encode_records(study, table.patients, table.columns, table.rows, series=series)
    return encode_records(study, table.patients, table.columns, table.rows)


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
