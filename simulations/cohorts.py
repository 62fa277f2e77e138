"""Example patients for rehearsals: public cohorts, split into hospitals and into training and test patients.

Each cohort says where it comes from, under which licence, and how test patients are set aside. Test patients never reach
a simulated hospital. Downloadable sets are looked for in the folder that ``MEDFED_DATA`` names.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, DataError
from medfed.models.records import Records, encode_records
from medfed.seams import Files
from medfed.study import Study

PATIENT_COLUMN = "patient"


@dataclass(frozen=True, slots=True)
class Table:
    """Raw text columns of equal length, by name, with the patient's id in ``PATIENT_COLUMN``."""

    columns: dict[str, tuple[str, ...]]

    @property
    def patients(self) -> tuple[str, ...]:
        return self.columns[PATIENT_COLUMN]

    def rows(self, chosen: NDArray[np.int64]) -> Table:
        return Table({name: tuple(cells[int(row)] for row in chosen) for name, cells in self.columns.items()})

    def to_csv(self) -> bytes:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*self.columns.values(), strict=True))
        return out.getvalue().encode()

    def encode(self, study: Study) -> Records:
        return encode_records(study, self.patients, self.columns)


@dataclass(frozen=True, slots=True)
class Hospital:
    """One simulated hospital: its training patients, and its test patients, which stay outside the federation."""

    name: str
    training: Table
    test: Table


@dataclass(frozen=True, slots=True)
class Cohort:
    """A cohort split for one seed. ``split`` says in words how test patients were chosen.

    ``seed`` is the split's if the catalogue made it: the same name, seed and number of hospitals give the same cohort.
    """

    name: str
    task: str
    delta: float
    hospitals: tuple[Hospital, ...]
    split: str
    source: str
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class CohortInfo:
    """A row of the catalogue: how to load it, the split seeds of its protocol, how many hospitals, source and licence."""

    load: Callable[[Files, int, int | None], Cohort]
    protocol_seeds: tuple[int, ...]
    hospitals: str
    source: str


_BREAST_SOURCE = (
    "Wolberg, Mangasarian, Street, Street 1995, UCI 10.24432/C5DW2B, CC BY 4.0, as bundled with scikit-learn"
)
_HEART_SOURCE = "Janosi, Steinbrunn, Pfisterer, Detrano 1988, UCI 10.24432/C52P4X, CC BY 4.0"


def _breast_cancer(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """Wisconsin Diagnostic Breast Cancer: 569 patients, dealt to hospitals by the seed."""
    _require_scikit_learn()
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    data = load_breast_cancer()
    malignant = (data.target == 0).astype(np.int64)
    count = 5 if hospitals is None else hospitals
    columns = {PATIENT_COLUMN: tuple(f"wdbc-{row}" for row in range(len(malignant)))}
    for index, name in enumerate(data.feature_names):
        columns[str(name).replace(" ", "_")] = tuple(repr(float(value)) for value in data.data[:, index])
    columns["malignant"] = tuple(str(value) for value in malignant)
    table = Table(columns)
    training, test = train_test_split(
        np.arange(len(malignant)), train_size=0.8, random_state=seed, shuffle=True, stratify=malignant
    )
    deal = np.random.default_rng(seed)
    order_training, order_test = deal.permutation(training), deal.permutation(test)
    return Cohort(
        "breast-cancer",
        "breast-cancer",
        5e-4,
        tuple(
            Hospital(f"hospital-{i + 1}", table.rows(order_training[i::count]), table.rows(order_test[i::count]))
            for i in range(count)
        ),
        f"80/20, stratified, random_state={seed}; patients dealt to {count} hospitals by the same seed",
        _BREAST_SOURCE,
        seed,
    )


_HEART_FILES = ("cleveland", "hungarian", "switzerland", "va")
_HEART_COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")


def _heart_disease(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """UCI Heart Disease: the 740 rows that are complete in ten findings, at the four hospitals they come from."""
    _require_scikit_learn()
    if hospitals not in (None, len(_HEART_FILES)):
        raise ConfigError(203, "heart-disease has four real hospitals", "leave --hospitals out, or take breast-cancer")
    folder = data_folder() / "heart_disease_uci"
    return Cohort(
        "heart-disease",
        "heart-disease",
        3e-4,
        tuple(_heart_hospital(files, folder, name, seed) for name in _HEART_FILES),
        f"66/34 inside each hospital, stratified where both classes have more than two rows, random_state={seed}",
        _HEART_SOURCE,
        seed,
    )


def _heart_hospital(files: Files, folder: Path, name: str, seed: int) -> Hospital:
    from sklearn.model_selection import train_test_split

    path = folder / f"processed.{name}.data"
    if not files.exists(path):
        raise DataError(320, f"the heart-disease data are not in {folder.name}", "set MEDFED_DATA to the data folder")
    lines = files.read(path).decode("ascii").splitlines()
    rows = [cells for cells in csv.reader(lines) if len(cells) == 14 and "?" not in cells[: len(_HEART_COLUMNS)]]
    disease = [str(int(float(cells[13]) > 0)) for cells in rows]
    columns = {PATIENT_COLUMN: tuple(f"{name}-{row}" for row in range(len(rows)))}
    for index, column in enumerate(_HEART_COLUMNS):
        columns[column] = tuple(cells[index] for cells in rows)
    columns["disease"] = tuple(disease)
    counts = [disease.count("0"), disease.count("1")]
    training, test = train_test_split(
        np.arange(len(rows)),
        train_size=0.66,
        random_state=seed,
        shuffle=True,
        stratify=disease if min(counts) > 2 else None,
    )
    table = Table(columns)
    return Hospital(name, table.rows(training), table.rows(test))


COHORTS: dict[str, CohortInfo] = {
    "breast-cancer": CohortInfo(
        _breast_cancer,
        (1, 2, 3, 4, 5),
        "5 hospitals, or as many as --hospitals says, dealt by the seed",
        _BREAST_SOURCE,
    ),
    "heart-disease": CohortInfo(
        _heart_disease, tuple(range(43, 53)), "4 hospitals, where the patients really were", _HEART_SOURCE
    ),
}


def load_cohort(files: Files, name: str, seed: int, hospitals: int | None) -> Cohort:
    """A cohort of the catalogue, split by ``seed``. Raises MF-320 if its data are not on this machine."""
    if name not in COHORTS:
        raise ConfigError(203, f"cohort {name} is not known", f"choose one of {', '.join(COHORTS)}")
    return COHORTS[name].load(files, seed, hospitals)


def data_folder() -> Path:
    """The folder that ``MEDFED_DATA`` names. Raises ``DataError`` MF-320 if it names none."""
    named = os.environ.get("MEDFED_DATA", "")
    if not named:
        raise DataError(
            320,
            "this cohort's data are not bundled with medfed",
            "set MEDFED_DATA to a folder with heart_disease_uci/processed.*.data (UCI data set 45, archive.ics.uci.edu)",
        )
    return Path(named)


def _require_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "scikit-learn is not installed", "pip install 'medfed[sim]'") from error
