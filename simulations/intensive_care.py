"""PhysioNet / CinC Challenge 2012, set A: 4,000 stays in four intensive care units, 37 irregular variables over 48 hours.

Read from ``set_a_hourly.npz`` where somebody made it, else from the official archive of text files; both give the same
hourly means. Five folds, stratified by unit and outcome, are fixed: split seed s is fold s.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, DataError
from medfed.seams import Files
from medfed.simulations.datasets import DATASETS, find, read_arrays
from medfed.simulations.extract import PATIENT_COLUMN, Cohort, Extract, Hospital, SeriesRows

VARIABLES = (
    "Albumin",
    "ALP",
    "ALT",
    "AST",
    "Bilirubin",
    "BUN",
    "Cholesterol",
    "Creatinine",
    "DiasABP",
    "FiO2",
    "GCS",
    "Glucose",
    "HCO3",
    "HCT",
    "HR",
    "K",
    "Lactate",
    "Mg",
    "MAP",
    "MechVent",
    "Na",
    "NIDiasABP",
    "NIMAP",
    "NISysABP",
    "PaCO2",
    "PaO2",
    "pH",
    "Platelets",
    "RespRate",
    "SaO2",
    "SysABP",
    "Temp",
    "TroponinI",
    "TroponinT",
    "Urine",
    "WBC",
    "Weight",
)
STATIC = ("Age", "Gender", "Height", "ICUType", "Weight")
UNITS = {1: "coronary-care", 2: "cardiac-surgery", 3: "medical", 4: "surgical"}
FOLDS = 5
HOURS = 48
_MEMBER = re.compile(r"(?:\./)?(?:set-a/)?(\d{6})\.txt")
_MOST_MEMBERS = 20_000
_MEMBER_BYTES = 1 << 20
_ARCHIVE_BYTES = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class Stays:
    """``hourly``: float32[n, 48, 37], NaN where nothing was observed; ``static``: float32[n, 5]; ``died``: int64[n]."""

    ids: NDArray[np.int64]
    hourly: NDArray[np.float32]
    static: NDArray[np.float32]
    died: NDArray[np.int64]


def intensive_care(files: Files, seed: int) -> Cohort:
    """One fold of five, each unit a hospital."""
    if not 1 <= seed <= FOLDS:
        raise ConfigError(203, f"icu-mortality has no split {seed}", f"its splits are the folds 1 to {FOLDS}")
    stays = read_stays(files)
    extract, unit, fold = _extract(stays), stays.static[:, STATIC.index("ICUType")], _folds(stays)
    hospitals = tuple(
        Hospital(
            name,
            extract.rows(np.flatnonzero((unit == number) & (fold != seed))),
            extract.rows(np.flatnonzero((unit == number) & (fold == seed))),
        )
        for number, name in UNITS.items()
    )
    return Cohort(
        "icu-mortality",
        "icu-mortality",
        1e-5,
        hospitals,
        f"fold {seed} of {FOLDS} fixed folds, stratified by unit and outcome; split seeds 1-{FOLDS} are the cross-validation",
        DATASETS["icu-mortality"].source,
        seed,
        folds=FOLDS,
    )


def read_stays(files: Files) -> Stays:
    """All stays by ascending record id. Raises MF-320 if the files are not here, MF-301 if they are not what they should be."""
    found = find(files, "icu-mortality")
    if found[0].suffix == ".npz":
        names = ("record_id", "x", "static", "in_hospital_death", "variables")
        arrays = read_arrays(files, found[0], names)
        if tuple(str(name) for name in arrays["variables"]) != VARIABLES:
            raise _fault(found[0])
        ids, hourly, static, died = (arrays[name] for name in names[:4])
        stays = Stays(ids.astype(np.int64), hourly.astype(np.float32), static.astype(np.float32), died.astype(np.int64))
    else:
        stays = _from_texts(files, *found)
    order = np.argsort(stays.ids)
    return Stays(stays.ids[order], stays.hourly[order], stays.static[order], stays.died[order])


def _extract(stays: Stays) -> Extract:
    """The table of static findings and outcome, and hourly rows with what was observed."""
    seen = ~np.isnan(stays.hourly).all(2)
    owner, hour = np.nonzero(seen)
    columns = {PATIENT_COLUMN: tuple(f"stay-{number}" for number in stays.ids.tolist())}
    for place, name in enumerate(("age", "gender", "height", "icu_type", "weight")):
        columns[name] = tuple("" if value != value else f"{value:.7g}" for value in stays.static[:, place].tolist())
    columns["died"] = tuple(str(value) for value in stays.died.tolist())
    series = SeriesRows(owner.astype(np.int64), hour.astype(np.float64), stays.hourly[owner, hour], VARIABLES)
    return Extract(columns, series=series)


def _folds(stays: Stays) -> NDArray[np.int64]:
    """The fold of each stay, 1 to 5, int64[n]: dealt in turn by the hash of the id, within unit and outcome."""
    unit = stays.static[:, STATIC.index("ICUType")]
    keys = [
        (ward, dead, hashlib.sha256(b"fold" + str(number).encode()).digest())
        for ward, dead, number in zip(unit.tolist(), stays.died.tolist(), stays.ids.tolist(), strict=True)
    ]
    fold = np.empty(len(keys), np.int64)
    for place, row in enumerate(sorted(range(len(keys)), key=keys.__getitem__)):
        fold[row] = 1 + place % FOLDS
    return fold


# -------------------------------------------------------------------------------------------------- the official files


def _from_texts(files: Files, archive: Path, outcomes: Path) -> Stays:
    died = _outcomes(files, outcomes)
    ids, hourly, static = [], [], []
    for number, text in _members(files, archive):
        values, fixed = _stay(text, archive)
        ids.append(number)
        hourly.append(values)
        static.append(fixed)
    if set(ids) != set(died) or len(ids) != len(died):
        raise _fault(archive)
    return Stays(
        np.array(ids, np.int64),
        np.stack(hourly).astype(np.float32),
        np.stack(static).astype(np.float32),
        np.array([died[number] for number in ids], np.int64),
    )


def _members(files: Files, archive: Path) -> Iterator[tuple[int, str]]:
    """Record id and text of each stay. Nothing is unpacked to disk; an unexpected member ends the reading."""
    data = io.BytesIO(files.read(archive, limit_bytes=_ARCHIVE_BYTES))
    try:
        with tarfile.open(fileobj=data, mode="r|*") as tar:
            for count, member in enumerate(tar):
                if member.isdir():
                    continue
                named = _MEMBER.fullmatch(member.name)
                file = tar.extractfile(member) if member.isreg() else None
                if named is None or file is None or member.size > _MEMBER_BYTES or count > _MOST_MEMBERS:
                    raise _fault(archive)
                yield int(named[1]), file.read().decode("ascii")
    except (tarfile.TarError, EOFError, UnicodeDecodeError, OSError) as error:
        raise _fault(archive) from error


def _stay(text: str, archive: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hourly means float64[48, 37] and the findings at admission float64[5] of one text file; -1 means not known."""
    sums, counts = np.zeros((HOURS, len(VARIABLES))), np.zeros((HOURS, len(VARIABLES)))
    static = np.full(len(STATIC), np.nan)
    place = {name: index for index, name in enumerate(VARIABLES)}
    for row in list(csv.reader(io.StringIO(text)))[1:]:
        try:
            (time, name, cell), at_admission = row, row[0] == "00:00"
            hours, minutes = time.split(":")
            value, hour = float(cell), int(hours) + int(minutes) // 60
        except ValueError as error:
            raise _fault(archive) from error
        if at_admission and name in STATIC and np.isnan(static[STATIC.index(name)]):
            static[STATIC.index(name)] = np.nan if value < 0 else value
        if name in place and (value >= 0 or name == "Temp"):
            hour = min(hour, HOURS - 1)
            sums[hour, place[name]] += value
            counts[hour, place[name]] += 1
    with np.errstate(invalid="ignore"):
        return sums / counts, static


def _outcomes(files: Files, path: Path) -> dict[int, int]:
    """Record id -> died in hospital (0 or 1)."""
    rows = csv.DictReader(io.StringIO(files.read(path, limit_bytes=1 << 24).decode("ascii", "replace")))
    try:
        return {int(row["RecordID"]): int(row["In-hospital_death"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise _fault(path) from error


def _fault(path: Path) -> DataError:
    return DataError(
        301, f"{path.name} is not the file it should be", "fetch it again: medfed-simulate fetch icu-mortality"
    )
