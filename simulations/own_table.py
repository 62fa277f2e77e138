"""A table of one's own as a cohort: ``medfed-simulate run --data my.csv --label died``.

Where nobody has written a task file, one is made from the table: which columns are numbers and which are categories, and
the constants by which they are scaled. In a real study such constants are public and typed by a person; here they are
computed from the very patients, which the run says on everything it leaves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.client.sources.csv_table import read_header, read_lines
from medfed.client.sources.patient_ids import one_spelling
from medfed.data_contract import CategoryFeature, DataContract, Feature, NumericFeature
from medfed.display import shown
from medfed.errors import ConfigError, DataError
from medfed.model_choice import LogisticRegression
from medfed.models.cells import MISSING, canonical
from medfed.models.table_records import encode_features
from medfed.models.tasks import meaning
from medfed.seams import Files
from medfed.server.planning import TaskFile
from medfed.simulations.extract import PATIENT_COLUMN, Cohort, Extract, Hospital
from medfed.simulations.partition import Partition, divide
from medfed.study import Deadlines, Momentum, Study, Training
from medfed.task_choice import Classification, Task

CONSTANTS_FROM_DATA = "CONSTANTS FROM THE DATA: not part of the privacy guarantee"
EVALUATION = "own-table"
HOSPITALS = 5
_RECORDS_A_LEVEL = 3  # fewer on average are no category
_MOST_LEVELS = 64
_MOST_CLASSES = 100
_ROUNDS = 20

Columns = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class OwnTable:
    """What ``--data`` and its options say.

    ``task``: a task file, or the study to rehearse; None: it is made from the table. ``patient_column`` None: each row is a
    patient. ``test_share``: of each hospital's patients.
    """

    path: Path
    label: str | None
    partition: Partition
    hospitals: int | None = None
    patient_column: str | None = None
    leave_out: tuple[str, ...] = ()
    test_share: float = 0.2
    task: TaskFile | Study | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """The table as it stands: ``patients[i]`` and ``rows[i]``, the line of the file, of record i."""

    columns: Columns
    patients: tuple[str, ...]
    rows: tuple[int, ...]


def own_cohorts(files: Files, table: OwnTable, seeds: Sequence[int]) -> list[Cohort]:
    """The table split once for each seed.

    Raises: ``ConfigError`` MF-203 for options that do not fit each other or the table, ``DataError`` MF-301 for what the
    task cannot use, with the file's own row, and what the CSV reader raises.
    """
    if not 0.0 < table.test_share < 1.0:
        raise ConfigError(203, "the share of test patients lies between 0 and 1", "write --test 0.2")
    read = _read(files, table)
    for name in (*_predicted(table), *_used(table)):
        if name not in read.columns:
            raise DataError(301, f"column {shown(name)} is not in the table", "see its first row")
    if table.task is None:
        task, columns = _made_task(read, table, _predicted(table)[0])
        return [_cohort(table, read, task, columns, (CONSTANTS_FROM_DATA,), seed) for seed in seeds]
    _check(read, table.task.data, table.task.task)
    return [_cohort(table, read, table.task, read.columns, (), seed) for seed in seeds]


def _predicted(table: OwnTable) -> list[str]:
    """Columns that the labels are made of."""
    if table.task is None:
        if table.label is None:
            raise ConfigError(203, "nobody said what is to be predicted", "name its column: --label COLUMN")
        return [table.label]
    columns = table.task.task.columns
    if table.label not in (None, *columns):
        raise ConfigError(203, f"the task predicts {', '.join(columns)}", "leave --label out")
    return columns


def _used(table: OwnTable) -> list[str]:
    """Columns that the options name."""
    site = [table.partition.column] if table.partition.kind == "column" else []
    return [*site, *table.leave_out]


def _read(files: Files, table: OwnTable) -> _Read:
    names = read_header(files, table.path)
    if table.patient_column is not None and table.patient_column not in names:
        raise DataError(301, f"column {shown(table.patient_column)} is not in the table", "see its first row")
    lines = read_lines(files, table.path, names)
    records = list(lines.cells)
    if not records:
        raise DataError(310, "the file has a header and no record", "name the right file")
    columns = {name: tuple(cells[place].strip() for _, cells in records) for name, place in lines.places.items()}
    rows = tuple(row for row, _ in records)
    if table.patient_column is None:
        return _Read(columns, tuple(f"row-{row}" for row in rows), rows)
    patients = tuple(one_spelling(cell) for cell in columns.pop(table.patient_column))
    if "" in patients:
        raise _fault(rows[patients.index("")], table.patient_column, "holds no patient id", "every record needs one")
    return _Read(columns, patients, rows)


def _check(read: _Read, contract: DataContract, task: Task) -> None:
    """All rows fit a given task: said now, with the file's own rows, not by a hospital or after the training."""
    if contract.kind != "table":
        raise ConfigError(203, "this task does not take a table alone", "--data is for tables")
    for feature in contract.features:
        if feature.name not in read.columns:
            raise DataError(301, f"column {feature.name} is not in the table", "rename the column to the task's name")
    encode_features(contract.features, read.columns, read.rows)
    meaning(task).labels(contract, read.columns, read.rows)


# ------------------------------------------------------------------------------------------------------ splits of a table


def _cohort(
    table: OwnTable, read: _Read, task: TaskFile | Study, columns: Columns, stamps: tuple[str, ...], seed: int
) -> Cohort:
    ids = list(dict.fromkeys(read.patients))
    place = {patient: number for number, patient in enumerate(ids)}
    owner = np.array([place[patient] for patient in read.patients], np.int64)
    known = meaning(task.task)
    labels = _patients_labels(owner, len(ids), known.strata(known.labels(task.data, columns, read.rows)))
    sites = _patients_sites(table, read, owner, len(ids))
    generator = np.random.default_rng(seed)
    count = HOSPITALS if table.hospitals is None else table.hospitals
    if table.partition.kind == "column" and table.hospitals is not None:
        raise ConfigError(203, "the column says how many hospitals there are", "leave --hospitals out")
    extract = Extract({PATIENT_COLUMN: read.patients, **columns})
    hospitals = []
    for name, mine in divide(table.partition, labels, sites, count, generator).items():
        test = _test(mine, labels, table.test_share, generator)
        is_mine, is_test = np.isin(owner, mine), np.isin(owner, test)
        training = extract.rows(np.flatnonzero(is_mine & ~is_test))
        hospitals.append(Hospital(name, training, extract.rows(np.flatnonzero(is_test))))
    whose = "each row counts as a patient" if table.patient_column is None else f"patients by {table.patient_column}"
    return Cohort(
        name=_name(table.path.stem),
        task=task if isinstance(task, TaskFile) else "",
        delta=_delta(len(ids)),
        hospitals=tuple(hospitals),
        split=f"{table.test_share:.0%} of each hospital's patients, by class, from seed {seed}; {table.partition}; {whose}",
        source=f"a table of your own, {table.path.name}",
        seed=seed,
        stamps=stamps,
        evaluation=EVALUATION,
    )


def _patients_labels(owner: NDArray[np.int64], count: int, strata: NDArray[np.int64]) -> NDArray[np.int64]:
    """The highest class among each patient's records, int64[count]."""
    labels = np.zeros(count, np.int64)
    np.maximum.at(labels, owner, strata)
    return labels


def _patients_sites(table: OwnTable, read: _Read, owner: NDArray[np.int64], count: int) -> list[str]:
    if table.partition.kind != "column":
        return []
    sites = [""] * count
    for row, patient, site in zip(read.rows, owner.tolist(), read.columns[table.partition.column], strict=True):
        if not site:
            raise _fault(row, table.partition.column, "names no hospital", "fill it, or drop the row")
        if sites[patient] not in ("", site):
            what = "puts a patient at a second hospital"
            raise _fault(row, table.partition.column, what, "a patient counts once: choose one hospital")
        sites[patient] = site
    return sites


def _test(
    patients: NDArray[np.int64], labels: NDArray[np.int64], share: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Test patients of one hospital: spread evenly over its classes, at least one, and two are left to train on."""
    order = generator.permutation(patients)
    order = order[np.argsort(labels[order], kind="stable")]
    count = min(max(1, round(share * len(order))), len(order) - 2) if len(order) > 2 else 0
    places = np.floor((np.arange(count) + generator.random()) * len(order) / max(count, 1)).astype(np.int64)
    return order[places]


def _delta(patients: int) -> float:
    """At most a tenth of one patient's share, rounded down to a power of ten; never above a thousandth."""
    return min(1e-3, 10.0 ** -math.ceil(math.log10(10 * patients)))


def _name(text: str) -> str:
    """A name as a study may have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:48]
    return f"own-{name}" if name else "own-table"


# --------------------------------------------------------------------------------------------------- a task from a table


def _made_task(read: _Read, table: OwnTable, label: str) -> tuple[TaskFile, Columns]:
    """The task, and the columns under names that a contract may have, labels as 0 to K - 1."""
    ignored = {label, *_used(table)}
    columns: Columns = {}
    features: list[Feature] = []
    for name, cells in read.columns.items():
        if name in ignored or len({cell for cell in cells if cell not in MISSING}) < 2:
            continue  # what is the same for everybody tells nothing
        plain = _column_name(name, {*columns, PATIENT_COLUMN})
        features.append(_feature(plain, name, cells))
        columns[plain] = cells
    if not features:
        raise DataError(301, "no column is left to predict from", "name the right table")
    classes = _classes(read, label)
    outcome = _column_name(label, {*columns, PATIENT_COLUMN})
    columns[outcome] = tuple(str(classes[canonical(cell)]) for cell in read.columns[label])
    meaning = ", ".join(f"{number} = {shown(name)}" for name, number in classes.items())
    purpose = f"Predict {shown(label)} ({meaning}) from {len(features)} columns of {table.path.name}."
    most = max(np.unique(np.array(read.patients), return_counts=True)[1])
    task = TaskFile(
        purpose=purpose if len(purpose) <= 500 else f"Predict {shown(label)} from {len(features)} columns.",
        task=Classification(kind="binary" if len(classes) == 2 else "multiclass", label=outcome, classes=len(classes)),
        data=DataContract(max_records_per_patient=int(most), features=features),
        model=LogisticRegression(name="logistic-regression", hidden=[]),
        training=Training(
            aggregate="gradient",
            rounds=_ROUNDS,
            spare_attempts=3,
            learning_rates=[[1, 0.3]],
            average_last_rounds=5,
            server_step=Momentum(kind="momentum", momentum=0.9),
        ),
        sampling_rate=1.0,
        clipping_norm=1.0,
        deadlines=Deadlines(setup_s=3600.0, round_s=600.0),
    )
    return task, columns


def _column_name(name: str, taken: set[str]) -> str:
    """A name of letters that no other column has: studies are typed and read by people in many countries."""
    plain = re.sub(r"[^A-Za-z0-9_ .-]", "_", name)[:56]
    plain = plain if re.match(r"[A-Za-z_]", plain) else f"x_{plain}"
    number, unique = 1, plain
    while unique in taken:
        number += 1
        unique = f"{plain}_{number}"
    return unique


def _feature(name: str, local: str, cells: Sequence[str]) -> Feature:
    known = [cell for cell in cells if cell not in MISSING]
    try:
        numbers = np.array([float(cell) for cell in known])
    except ValueError:
        return _category(name, local, cells, known)
    if not np.isfinite(numbers).all() or np.abs(numbers).max() > 1e12:
        raise DataError(301, f"column {shown(local)} holds numbers beyond 1e12", "leave it out: --leave-out COLUMN")
    return NumericFeature(
        name=name,
        kind="number",
        unit="as in the table",
        minimum=float(numbers.min()),
        maximum=float(numbers.max()),
        center=_rounded(float(numbers.mean())),
        scale=max(_rounded(float(numbers.std())), 1e-9),
        outside="clip",
        missing=float(np.median(numbers)) if len(known) < len(cells) else None,
    )


def _category(name: str, local: str, cells: Sequence[str], known: Sequence[str]) -> CategoryFeature:
    counts: dict[str, int] = {}
    for cell in known:
        counts[canonical(cell)] = counts.get(canonical(cell), 0) + 1
    if len(counts) > 2 and len(counts) * _RECORDS_A_LEVEL > len(known):
        # levels are written into the study's file, where names of patients must never stand
        what = (
            f"column {shown(local)} holds {len(counts)} different texts in {len(known)} records: it may name patients"
        )
        raise DataError(301, what, "leave it out with --leave-out, or name it with --patient-column")
    if len(counts) > _MOST_LEVELS or max(map(len, counts)) > 64:
        what = f"column {shown(local)} holds {len(counts)} different texts: neither numbers nor a category"
        raise DataError(301, what, "leave it out with --leave-out, or make categories of it")
    return CategoryFeature(
        name=name,
        kind="category",
        levels=sorted(counts),
        center=_rounded(1.0 / len(counts)),
        scale=0.5,
        missing=max(sorted(counts), key=counts.__getitem__) if len(known) < len(cells) else None,
    )


def _classes(read: _Read, label: str) -> Mapping[str, int]:
    """Each text of the label's column, in its one spelling, and the class that it becomes; numbers ascend."""
    for row, cell in zip(read.rows, read.columns[label], strict=True):
        if cell in MISSING:
            raise _fault(row, label, "is missing", "drop rows without a label")
    found = {canonical(cell) for cell in read.columns[label]}
    if not 2 <= len(found) <= _MOST_CLASSES:
        what = f"column {shown(label)} holds {len(found)} different values"
        raise DataError(
            301, what, f"a label has 2 to {_MOST_CLASSES} classes: choose another column, or make classes of it"
        )
    try:
        order = sorted(found, key=float)
    except ValueError:
        order = sorted(found)
    return {name: number for number, name in enumerate(order)}


def _rounded(value: float) -> float:
    """Three digits, as a person would type it."""
    return float(f"{value:.3g}")


def _fault(row: int, column: str, what: str, remedy: str) -> DataError:
    return DataError(301, f"row {row}, column {shown(column)}: value {what}", remedy)
