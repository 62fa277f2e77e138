"""What a simulated hospital is given: a table, and with it images or series, in the files that a real hospital would have.

A cohort is a list of hospitals, each with an extract of its training patients and one of its test patients, which never
reach the simulated hospital.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import Series
from medfed.models.event_records import CodedEvents
from medfed.models.records import Records, encode_records
from medfed.models.series_records import Measurements
from medfed.models.volume_records import Scan
from medfed.seams import Files
from medfed.study import Study

if TYPE_CHECKING:
    from medfed.server.planning import TaskFile

PUBLIC = "public-benchmark"
PATIENT_COLUMN = "patient"
TIME_COLUMN = "hours"
TABLE_NAME = "patients.csv"
IMAGES_NAME = "images"
NIFTI = ".nii"
SERIES_NAME = "series.csv"
EVENTS_NAME = "events.csv"


@dataclass(frozen=True, slots=True, eq=False)
class SeriesRows:
    """Rows of a series, sorted by owner.

    ``owner``: int64[m], the row of the table that they belong to; ``hours``: float64[m]; ``values``: float32[m, v], NaN
    where nothing was observed; ``variables``: the v columns' names.
    """

    owner: NDArray[np.int64]
    hours: NDArray[np.float64]
    values: NDArray[np.float32]
    variables: tuple[str, ...]

    def of(self, chosen: NDArray[np.int64], count: int) -> SeriesRows:
        """Those of the table's rows ``chosen`` int64[k] out of ``count``, which become the rows 0 to k - 1."""
        place = np.full(count, -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        owner = place[self.owner]
        order = np.argsort(owner, kind="stable")[(owner < 0).sum() :]
        return SeriesRows(owner[order], self.hours[order], self.values[order], self.variables)

    def measured(self, contract: Series) -> Measurements:
        """In the order of the study's variables, as the encoder takes them; a variable that is not here was not observed."""
        values = np.full((len(self.owner), len(contract.variables)), np.nan)
        for place, variable in enumerate(contract.variables):
            if variable.name in self.variables:
                # through the text that stands in the file, so that both ways give the same bits
                values[:, place] = self.values[:, self.variables.index(variable.name)].astype(str).astype(np.float64)
        return Measurements(self.owner, self.hours, values, np.arange(len(self.owner), dtype=np.int64))

    def columns(self) -> dict[str, tuple[str, ...]]:
        """The time and each variable as text, an empty cell where nothing was observed."""
        cells = {TIME_COLUMN: tuple(f"{hour:.10g}" for hour in self.hours.tolist())}
        for place, name in enumerate(self.variables):
            cells[name] = tuple("" if value == "nan" else value for value in self.values[:, place].astype(str).tolist())
        return cells


@dataclass(frozen=True, slots=True, eq=False)
class EventRows:
    """Coded events: ``owner`` int64[m], ascending, the row of the table that they belong to; ``days``: int64[m]; ``codes``: m."""

    owner: NDArray[np.int64]
    days: NDArray[np.int64]
    codes: tuple[str, ...]

    def of(self, chosen: NDArray[np.int64], count: int) -> EventRows:
        """As ``SeriesRows.of``."""
        place = np.full(count, -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        owner = place[self.owner]
        order = np.argsort(owner, kind="stable")[(owner < 0).sum() :]
        return EventRows(owner[order], self.days[order], tuple(self.codes[row] for row in order.tolist()))

    def coded(self) -> CodedEvents:
        return CodedEvents(self.owner, self.days.astype(np.float64), self.codes)


@dataclass(frozen=True, slots=True, eq=False)
class Extract:
    """Raw text columns of equal length, by name, with the patient's id in ``PATIENT_COLUMN``, and what goes with them.

    ``images``: uint8[n, height, width], one a row, under the file names of ``image_column``; with several views a row uint8[n,
    views, height, width], under names parted by ";", an empty one for a view that is absent; of volumes int16[n, depth, height,
    width].
    ``series``: of each row.
    """

    columns: dict[str, tuple[str, ...]]
    images: NDArray[np.uint8] | NDArray[np.int16] | None = None
    image_column: str = ""
    series: SeriesRows | None = None
    events: EventRows | None = None

    @property
    def patients(self) -> tuple[str, ...]:
        return self.columns[PATIENT_COLUMN]

    def rows(self, chosen: NDArray[np.int64]) -> Extract:
        return Extract(
            {name: tuple(cells[int(row)] for row in chosen) for name, cells in self.columns.items()},
            None if self.images is None else self.images[chosen],
            self.image_column,
            None if self.series is None else self.series.of(chosen, len(self.patients)),
            None if self.events is None else self.events.of(chosen, len(self.patients)),
        )

    def encode(self, study: Study) -> Records:
        """The records as a hospital would encode them, for scoring outside the federation."""
        contract = study.data.series
        return encode_records(
            study,
            self.patients,
            self.columns,
            images=[Scan(image) if name.endswith(NIFTI) else _pixels(image) for name, image in self._pictures()],
            series=None if contract is None or self.series is None else self.series.measured(contract),
            events=None if self.events is None else self.events.coded(),
        )

    def write(self, files: Files, folder: Path) -> None:
        """The files of this extract into a hospital's folder.

        Images are not synced to disk one by one: they are copies, and there may be tens of thousands.
        """
        files.write(folder / TABLE_NAME, _csv(self.columns), private=True)
        if self.images is not None:
            files.make_folder(folder / IMAGES_NAME, private=True)
            for name, image in self._pictures():
                (folder / IMAGES_NAME / name).write_bytes(_nifti(image) if name.endswith(NIFTI) else _png(image))
        if self.series is not None:
            files.write(folder / SERIES_NAME, _csv(self._series_columns(self.series)), private=True)
        if self.events is not None:
            files.write(folder / EVENTS_NAME, _csv(self._event_columns(self.events)), private=True)

    def _pictures(self) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Name and content of each file of images."""
        for cell, held in (
            zip(self.columns[self.image_column], self.images, strict=True) if self.images is not None else ()
        ):
            if not cell:
                continue
            if held.ndim == 2 or cell.endswith(NIFTI):
                yield cell, held
            else:
                yield from ((name, view) for name, view in zip(cell.split(";"), held, strict=False) if name)

    def _event_columns(self, events: EventRows) -> dict[str, tuple[str, ...]]:
        return {
            PATIENT_COLUMN: tuple(self.patients[row] for row in events.owner.tolist()),
            "days": tuple(str(day) for day in events.days.tolist()),
            "code": events.codes,
        }

    def _series_columns(self, series: SeriesRows) -> dict[str, tuple[str, ...]]:
        return {PATIENT_COLUMN: tuple(self.patients[row] for row in series.owner.tolist()), **series.columns()}


@dataclass(frozen=True, slots=True)
class Hospital:
    """One simulated hospital: its training patients, and its test patients, which stay outside the federation."""

    name: str
    training: Extract
    test: Extract


@dataclass(frozen=True, slots=True)
class Cohort:
    """A cohort split for one seed. ``split`` says in words how test patients were chosen.

    ``task``: a template's name, a task file's path, or the task itself. ``seed``: the split's, if it was made from one; of
    the catalogue the same name, seed and numbers of hospitals and patients give the same cohort. ``folds``: of how many
    folds of one cross-validation this split is one; None for a random split. ``stamps``: what a run on it must not be
    mistaken for.
    ``evaluation``: what its test patients are.
    """

    name: str
    task: str | TaskFile
    delta: float
    hospitals: tuple[Hospital, ...]
    split: str
    source: str
    seed: int | None = None
    folds: int | None = None
    stamps: tuple[str, ...] = ()
    evaluation: str = PUBLIC


def _csv(columns: dict[str, tuple[str, ...]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue().encode()


def _pixels(image: NDArray[np.generic]) -> NDArray[np.uint8]:
    return image.astype(np.uint8, copy=False)


def _nifti(volume: NDArray[np.generic]) -> bytes:
    """A NIfTI file of a volume [depth, height, width] that lies as ``volume_records.Scan`` has it, of voxels of 1 mm."""
    from nibabel.nifti1 import Nifti1Image

    return bytes(Nifti1Image(volume.transpose(2, 1, 0), np.eye(4)).to_bytes())


def _png(image: NDArray[np.generic]) -> bytes:
    """A grey PNG of 8 bits, barely compressed: it is read again within the minute."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, format="png", compress_level=1)
    return out.getvalue()
