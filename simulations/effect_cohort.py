"""A treatment whose effect is known: real patients of intensive care, an invented treatment and an invented outcome.

Findings are those of the first day of the 4,000 stays of PhysioNet 2012, set A. Who is treated, and what comes of it, are
drawn with one fixed seed by the public formulas of ``_chances``: no such treatment was ever given. Sicker patients are treated
more often (confounding, by findings that are all in the table), nobody surely or surely not (overlap), and the effect differs:
it helps those with a poor coma score and much lactate, and harms the old with failing kidneys. On the whole the treatment
spares one in six the outcome, and yet the treated fare no better than the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.seams import Files
from medfed.simulations.datasets import DATASETS
from medfed.simulations.extract import PATIENT_COLUMN, Cohort, Extract, Hospital
from medfed.simulations.intensive_care import STATIC, UNITS, VARIABLES, Stays, read_stays

SEMI_SYNTHETIC = "SEMI-SYNTHETIC: real findings, invented treatment and outcome"
FIRST_HOURS = 24
_FORMULA_SEED = 2012
_TEST_SHARE = 0.2
_EXTREME = 3.0  # a finding counts as so many scales from its center at most

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Finding:
    """``summary``: of the hourly values float32[n, 24], NaN where nothing was observed. ``center`` and ``scale``: public round
    numbers, of the formulas; a finding that is missing counts as ``center``."""

    variable: str
    summary: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    center: float
    scale: float


def _mean(hours: NDArray[np.float32]) -> NDArray[np.float32]:
    seen = ~np.isnan(hours)
    total = np.where(seen, hours, 0.0).sum(1, dtype=np.float64)
    return np.asarray(np.where(seen.any(1), total / np.maximum(seen.sum(1), 1), np.nan), np.float32)


def _least(hours: NDArray[np.float32]) -> NDArray[np.float32]:
    found = np.where(np.isnan(hours), np.inf, hours).min(1)
    return np.asarray(np.where(np.isinf(found), np.nan, found), np.float32)


def _most(hours: NDArray[np.float32]) -> NDArray[np.float32]:
    return -_least(-hours)


FINDINGS: dict[str, Finding] = {
    "heart_rate": Finding("HR", _mean, 85.0, 18.0),
    "least_pressure": Finding("MAP", _least, 65.0, 15.0),
    "temperature": Finding("Temp", _mean, 37.0, 1.0),
    "coma_score": Finding("GCS", _least, 11.0, 4.0),
    "urea": Finding("BUN", _mean, 20.0, 15.0),
    "creatinine": Finding("Creatinine", _mean, 1.0, 1.0),
    "lactate": Finding("Lactate", _most, 2.0, 2.0),
    "white_cells": Finding("WBC", _mean, 11.0, 6.0),
    "platelets": Finding("Platelets", _mean, 200.0, 100.0),
    "sodium": Finding("Na", _mean, 139.0, 5.0),
    "urine": Finding("Urine", _mean, 100.0, 100.0),
    "glucose": Finding("Glucose", _mean, 130.0, 60.0),
}
_AGE_CENTER, _AGE_SCALE = 65.0, 15.0


def intensive_care_effect(files: Files, seed: int) -> Cohort:
    """Each unit a hospital; a fifth of its stays, drawn by ``seed``, are test patients. Treatment and outcome do not depend on
    the seed."""
    stays = read_stays(files)
    extract, unit = _extract(stays), stays.static[:, STATIC.index("ICUType")]
    order = np.random.default_rng(seed).permutation(len(unit))
    is_test = np.zeros(len(unit), np.bool_)
    is_test[order[: round(_TEST_SHARE * len(unit))]] = True
    hospitals = tuple(
        Hospital(
            name,
            extract.rows(np.flatnonzero((unit == number) & ~is_test)),
            extract.rows(np.flatnonzero((unit == number) & is_test)),
        )
        for number, name in UNITS.items()
    )
    return Cohort(
        "icu-effect",
        "icu-effect",
        1e-5,
        hospitals,
        f"a fifth of all stays by seed {seed}; treatment and outcome are invented by one public formula, the same for all seeds",
        f"{DATASETS['icu-mortality'].source}; treatment and outcome: medfed, by public formulas",
        seed,
        stamps=(SEMI_SYNTHETIC,),
    )


def _extract(stays: Stays) -> Extract:
    """``treated`` and ``complication``, 0 or 1, and its chance without and with the treatment, ``chance_0`` and ``chance_1``."""
    columns = {PATIENT_COLUMN: tuple(f"stay-{number}" for number in stays.ids.tolist())}
    for name in ("age", "gender", "icu_type"):
        place = ("age", "gender", "height", "icu_type").index(name)
        columns[name] = _cells(stays.static[:, place])
    for name, finding in FINDINGS.items():
        columns[name] = _cells(_found(stays, finding))
    chance, drawn = _chances(stays), np.random.default_rng(_FORMULA_SEED).random((len(stays.ids), 2))
    treated = (drawn[:, 0] < chance.treated).astype(np.int64)
    outcome = (drawn[:, 1] < np.where(treated == 1, chance.with_it, chance.without)).astype(np.int64)
    columns["treated"] = tuple(str(value) for value in treated.tolist())
    columns["complication"] = tuple(str(value) for value in outcome.tolist())
    columns["chance_0"] = tuple(f"{value:.6f}" for value in chance.without.tolist())
    columns["chance_1"] = tuple(f"{value:.6f}" for value in chance.with_it.tolist())
    return Extract(columns)


@dataclass(frozen=True, slots=True, eq=False)
class Chances:
    """float64[n] each: of being treated, and of the outcome without and with the treatment."""

    treated: Floats
    without: Floats
    with_it: Floats


def _chances(stays: Stays) -> Chances:
    """The public formulas, of findings in scales from their centers, 0 where one is missing."""
    z = {name: _scaled(_found(stays, finding), finding.center, finding.scale) for name, finding in FINDINGS.items()}
    age = _scaled(stays.static[:, STATIC.index("Age")], _AGE_CENTER, _AGE_SCALE)
    sick = 0.5 * age - 0.5 * z["coma_score"] - 0.4 * z["least_pressure"] + 0.4 * z["lactate"] + 0.3 * z["urea"]
    treated = np.clip(_sigmoid(-0.2 + 1.2 * sick), 0.1, 0.9)
    risk = -0.3 + 1.0 * sick + 0.2 * z["heart_rate"]
    gain = -0.4 + 0.9 * z["coma_score"] - 0.6 * z["lactate"] + 0.6 * age + 0.4 * z["creatinine"]
    return Chances(treated, _sigmoid(risk), _sigmoid(risk + gain))


def _found(stays: Stays, finding: Finding) -> NDArray[np.float32]:
    return finding.summary(stays.hourly[:, :FIRST_HOURS, VARIABLES.index(finding.variable)])


def _scaled(values: NDArray[np.float32], center: float, scale: float) -> Floats:
    scaled = np.clip((values.astype(np.float64) - center) / scale, -_EXTREME, _EXTREME)
    return np.asarray(np.where(np.isnan(scaled), 0.0, scaled))


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-values)))


def _cells(values: NDArray[np.float32]) -> tuple[str, ...]:
    return tuple("" if value != value else f"{value:.7g}" for value in values.tolist())
