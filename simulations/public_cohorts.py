"""The public cohorts that are tables, images and texts, split into hospitals and into training and test patients."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, DataError
from medfed.seams import Files
from medfed.simulations.datasets import DATASETS, find, read_arrays
from medfed.simulations.extract import PATIENT_COLUMN, Cohort, Extract, Hospital

BREAST_SOURCE = (
    "Wolberg, Mangasarian, Street, Street 1995, UCI 10.24432/C5DW2B, CC BY 4.0, as bundled with scikit-learn"
)
_HEART_COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
_DEALT = 5  # hospitals, where the patients' own are not known
_TEST_SHARE = 0.2


def breast_cancer(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """Wisconsin Diagnostic Breast Cancer: 569 patients, dealt to hospitals by the seed."""
    _require_scikit_learn()
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    data = load_breast_cancer()
    malignant = (data.target == 0).astype(np.int64)
    count = _DEALT if hospitals is None else hospitals
    columns = {PATIENT_COLUMN: tuple(f"wdbc-{row}" for row in range(len(malignant)))}
    for index, name in enumerate(data.feature_names):
        columns[str(name).replace(" ", "_")] = tuple(repr(float(value)) for value in data.data[:, index])
    columns["malignant"] = tuple(str(value) for value in malignant)
    training, test = train_test_split(
        np.arange(len(malignant)), train_size=0.8, random_state=seed, shuffle=True, stratify=malignant
    )
    return Cohort(
        "breast-cancer",
        "breast-cancer",
        5e-4,
        deal(Extract(columns), training, test, count, seed),
        f"80/20, stratified, random_state={seed}; patients dealt to {count} hospitals by the same seed",
        BREAST_SOURCE,
        seed,
    )


def deal(
    extract: Extract, training: NDArray[np.int64], test: NDArray[np.int64], count: int, seed: int
) -> tuple[Hospital, ...]:
    """Rows ``training`` and ``test``, int64 each, dealt in turn to ``count`` hospitals in the order that the seed gives."""
    generator = np.random.default_rng(seed)
    training, test = generator.permutation(training), generator.permutation(test)
    return tuple(
        Hospital(f"hospital-{i + 1}", extract.rows(training[i::count]), extract.rows(test[i::count]))
        for i in range(count)
    )


# ---------------------------------------------------------------------------------------------------------------- tables


def heart_disease(files: Files, seed: int) -> Cohort:
    """UCI Heart Disease: the 740 rows that are complete in ten findings, at the four hospitals they come from."""
    _require_scikit_learn()
    return Cohort(
        "heart-disease",
        "heart-disease",
        3e-4,
        tuple(_heart_hospital(files, path, seed) for path in find(files, "heart-disease")),
        f"66/34 inside each hospital, stratified where both classes have more than two rows, random_state={seed}",
        DATASETS["heart-disease"].source,
        seed,
    )


def _heart_hospital(files: Files, path: Path, seed: int) -> Hospital:
    from sklearn.model_selection import train_test_split

    name = path.name.split(".")[1]
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
    extract = Extract(columns)
    return Hospital(name, extract.rows(training), extract.rows(test))


# ---------------------------------------------------------------------------------------------------------------- images


def pneumonia(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """PneumoniaMNIST: its training films train, its validation films are the test patients; both dealt by the seed.

    The films are put in the order of their hashes first, so that every copy of the set gives the same cohort.
    """
    (path,) = find(files, "pneumonia")
    arrays = read_arrays(files, path, ("train_images", "train_labels", "val_images", "val_labels"))
    train, test = (_films(arrays[f"{part}_images"], arrays[f"{part}_labels"], path) for part in ("train", "val"))
    seen = set(test[0])
    kept = [row for row, digest in enumerate(train[0]) if digest not in seen]
    digests, films, labels = (
        [train[0][row] for row in kept] + test[0],
        np.concatenate([train[1][kept], test[1]]),
        np.concatenate([train[2][kept], test[2]]),
    )
    names = tuple(f"{place:04d}-{digest[:8]}" for place, digest in enumerate(digests))
    columns = {
        PATIENT_COLUMN: names,
        "film": tuple(f"{name}.png" for name in names),
        "pneumonia": tuple(str(label) for label in labels.tolist()),
    }
    count = _DEALT if hospitals is None else hospitals
    rows = np.arange(len(names))
    return Cohort(
        "pneumonia",
        "pneumonia",
        1e-5,
        deal(Extract(columns, films, "film"), rows[: len(kept)], rows[len(kept) :], count, seed),
        f"the set's own validation films; {len(train[0]) - len(kept)} training films that are also validation films, pixel "
        f"by pixel, are left out; films dealt to {count} hospitals by seed {seed}. Each film counts as a patient: the set "
        "does not say whose it is",
        DATASETS["pneumonia"].source,
        seed,
    )


def _films(
    images: NDArray[np.generic], labels: NDArray[np.generic], path: Path
) -> tuple[list[str], NDArray[np.uint8], NDArray[np.int64]]:
    """(SHA-256, films uint8[n, 28, 28], labels int64[n]) in the order of the hashes."""
    if images.dtype != np.uint8 or images.ndim != 3 or labels.size != len(images):
        raise DataError(301, f"{path.name} is not the file it should be", "medfed-simulate fetch pneumonia")
    films = np.ascontiguousarray(images).view(np.uint8)
    flat = labels.reshape(-1).astype(np.int64)
    digests = [hashlib.sha256(film.tobytes()).hexdigest() for film in films]
    order = sorted(range(len(films)), key=lambda row: (digests[row], int(flat[row])))
    return [digests[row] for row in order], films[order], flat[order]


# ----------------------------------------------------------------------------------------------------------------- texts


def medical_abstracts(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """2,888 abstracts in five classes; abstracts of the same wording stay on one side of the split."""
    (path,) = find(files, "medical-abstracts")
    rows = list(csv.reader(io.StringIO(files.read(path).decode("utf-8", "replace"), newline="")))
    if not rows or rows[0] != ["condition_label", "medical_abstract"] or any(len(row) != 2 for row in rows):
        raise DataError(301, f"{path.name} is not the file it should be", "medfed-simulate fetch medical-abstracts")
    conditions, abstracts = zip(*rows[1:], strict=True)
    columns = {
        PATIENT_COLUMN: tuple(f"abstract-{row:04d}" for row in range(len(abstracts))),
        "abstract": tuple(" ".join(abstract.split()) for abstract in abstracts),
        "condition": tuple(str(int(condition) - 1) for condition in conditions),
    }
    wording = {text: place for place, text in enumerate(dict.fromkeys(columns["abstract"]))}
    group = np.array([wording[text] for text in columns["abstract"]], np.int64)
    order = np.random.default_rng(seed).permutation(len(wording))
    is_test = np.isin(group, order[: round(_TEST_SHARE * len(wording))])
    count = _DEALT if hospitals is None else hospitals
    return Cohort(
        "medical-abstracts",
        "medical-abstracts",
        1e-5,
        deal(Extract(columns), np.flatnonzero(~is_test), np.flatnonzero(is_test), count, seed),
        f"80/20 by seed {seed}, abstracts of the same wording on one side; dealt to {count} hospitals by the same seed. Each "
        "abstract counts as a patient",
        DATASETS["medical-abstracts"].source,
        seed,
    )


def _require_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "scikit-learn is not installed", "pip install 'medfed[sim]'") from error
