"""Wisconsin Diagnostic Breast Cancer as a search for the unusual: hospitals train on benign tumors alone."""

from __future__ import annotations

import numpy as np

from medfed.seams import Files
from medfed.simulations.extract import Cohort, Extract, Hospital
from medfed.simulations.public_cohorts import BREAST_SOURCE, breast_cancer

_LABEL = "malignant"


def breast_anomaly(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """The cohort ``breast-cancer``; its malignant tumors are test patients, those that would have trained too."""
    whole = breast_cancer(files, seed, hospitals)
    return Cohort(
        "breast-anomaly",
        "breast-anomaly",
        whole.delta,
        tuple(_benign_to_train(hospital) for hospital in whole.hospitals),
        f"{whole.split}; only benign tumors train, and all malignant ones are test patients of their hospital",
        BREAST_SOURCE,
        seed,
    )


def _benign_to_train(hospital: Hospital) -> Hospital:
    malignant = np.array(hospital.training.columns[_LABEL]) == "1"
    moved = hospital.training.rows(np.flatnonzero(malignant))
    return Hospital(hospital.name, hospital.training.rows(np.flatnonzero(~malignant)), _joined(hospital.test, moved))


def _joined(first: Extract, second: Extract) -> Extract:
    return Extract({name: cells + second.columns[name] for name, cells in first.columns.items()})
