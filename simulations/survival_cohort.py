"""Fed-TCGA-BRCA of FLamby: overall survival with breast cancer, six regions, a fixed split into training and test patients."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from medfed.errors import DataError
from medfed.seams import Files
from medfed.simulations.datasets import DATASETS, find
from medfed.simulations.extract import PATIENT_COLUMN, Cohort, Extract, Hospital

REGIONS = ("northeast", "south", "west", "midwest", "europe", "canada")
FEATURES = 39
_TRAINING = (248, 156, 164, 129, 129, 40)  # patients of each region, as FLamby has them
_TEST = (63, 40, 42, 33, 33, 11)


def brca_survival(files: Files, seed: int) -> Cohort:
    """1,088 patients; ``seed`` changes nothing here, as the split is FLamby's own: it only varies a run's other randomness."""
    table, parts = find(files, "brca-survival")
    header, *rows = _rows(files, table)
    if header[0] != "pid" or header[-2:] != ["E", "T"] or len(header) != FEATURES + 3:
        raise _fault(table)
    by_patient = {row[0]: row for row in rows}
    hospitals = []
    for number, region in enumerate(REGIONS):
        training, test = (_patients(files, parts, f"{part}_{number}") for part in ("train", "test"))
        if (len(training), len(test)) != (_TRAINING[number], _TEST[number]):
            raise _fault(parts)
        try:
            chosen = [_extract(header, [by_patient[patient] for patient in group]) for group in (training, test)]
        except KeyError:
            raise _fault(table) from None
        hospitals.append(Hospital(region, *chosen))
    return Cohort(
        "brca-survival",
        "brca-survival",
        1e-5,
        tuple(hospitals),
        "FLamby's fixed split, 866 patients to train on and 222 to test on; seeds vary first weights and noise alone",
        DATASETS["brca-survival"].source,
        seed,
    )


def column_name(name: str) -> str:
    """A column's name as a study may write it: ``morphology_8500/3`` becomes ``morphology_8500_3``."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _extract(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Extract:
    """``event`` 1 where the patient died, and ``days`` until then or until last seen."""
    columns = {PATIENT_COLUMN: tuple(row[0] for row in rows)}
    for place, name in enumerate(header[1 : FEATURES + 1], 1):
        columns[column_name(name)] = tuple(row[place] for row in rows)
    columns["died"], columns["days"] = (tuple(row[place] for row in rows) for place in (-2, -1))
    if len(columns) != FEATURES + 3:
        raise DataError(301, "two columns have one name", "fetch it again: medfed-simulate fetch brca-survival")
    return Extract(columns)


def _patients(files: Files, path: Path, group: str) -> list[str]:
    header, *rows = _rows(files, path)
    if header != ["pid", "fold", "fold2"]:
        raise _fault(path)
    return [row[0] for row in rows if row[2] == group]


def _rows(files: Files, path: Path) -> list[list[str]]:
    text = files.read(path, limit_bytes=1 << 24).decode("ascii", "replace")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise _fault(path)
    return rows


def _fault(path: Path) -> DataError:
    return DataError(301, f"{path.name} is not the file it should be", "medfed-simulate fetch brca-survival")
