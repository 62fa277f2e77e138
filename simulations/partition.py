"""One table -> many hospitals: patients dealt alike, with labels skewed, or by a column that says where they were.

A patient is whole: all records go to one hospital.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, DataError, PrivacyError

FEWEST_PATIENTS = 2  # of a hospital
FEWEST_HOSPITALS = 3
MOST_HOSPITALS = 128

Shares = dict[str, NDArray[np.int64]]
"""Each hospital's patients, int64[k] each, by the hospital's name."""


@dataclass(frozen=True, slots=True)
class Partition:
    """``alpha``: of ``dirichlet``; ``column``: of ``column``."""

    kind: Literal["iid", "dirichlet", "column"]
    alpha: float = 0.0
    column: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "iid":
                return "patients dealt alike to all hospitals"
            case "dirichlet":
                return f"hospitals with skewed labels, Dirichlet {self.alpha:g} (Hsu, Qi, Brown 2019)"
            case "column":
                return f"hospitals by the column {self.column}"


def parse_partition(text: str) -> Partition:
    """``iid``, ``dirichlet:0.3`` or ``column:site``. Raises ``ConfigError`` MF-203 for anything else."""
    kind, _, rest = text.partition(":")
    if text == "iid":
        return Partition("iid")
    if kind == "column" and rest:
        return Partition("column", column=rest)
    if kind == "dirichlet":
        try:
            alpha = float(rest)
        except ValueError:
            alpha = math.nan
        if 0.001 <= alpha <= 1e6:
            return Partition("dirichlet", alpha=alpha)
        raise ConfigError(203, "a Dirichlet partition needs an alpha from 0.001 to 1000000", "write dirichlet:0.3")
    raise ConfigError(203, "this is no partition", "write iid, dirichlet:0.3 or column:NAME")


def require_hospitals(count: int) -> None:
    """Raise unless so many can train together: ``PrivacyError`` MF-140 for too few, ``ConfigError`` MF-203 for too many."""
    if count < FEWEST_HOSPITALS:
        raise PrivacyError(140, f"there would be {count} hospitals", f"a sum needs at least {FEWEST_HOSPITALS}")
    if count > MOST_HOSPITALS:
        raise ConfigError(203, f"there would be {count} hospitals", f"a study has at most {MOST_HOSPITALS}")


def divide(
    partition: Partition,
    labels: NDArray[np.int64],
    sites: Sequence[str],
    hospitals: int,
    generator: np.random.Generator,
) -> Shares:
    """Hospitals of the patients 0 to n - 1, at least two patients each.

    ``labels``: each patient's class, int64[n]; ``sites``: of ``column``, what that column says of each patient;
    ``hospitals``: how many, not for ``column``. Raises: ``ConfigError`` MF-203 where there are too few patients,
    what ``require_hospitals`` raises, ``DataError`` MF-301 for a site that has too few patients or none.
    """
    if partition.kind == "column":
        return _by_site(sites)
    require_hospitals(hospitals)
    if len(labels) < hospitals * FEWEST_PATIENTS:
        raise ConfigError(
            203, f"{len(labels)} patients are too few for {hospitals} hospitals", "choose fewer hospitals"
        )
    if partition.kind == "iid":
        order = generator.permutation(len(labels))
        parts = [order[number::hospitals] for number in range(hospitals)]
    else:
        parts = _by_dirichlet(labels, hospitals, partition.alpha, generator)
    return {f"hospital-{number + 1}": part for number, part in enumerate(parts)}


def _by_dirichlet(
    labels: NDArray[np.int64], hospitals: int, alpha: float, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Hospitals of equal size, each with class shares of its own from a Dirichlet around the shares of all.

    *Source*: Hsu, Qi, Brown 2019 (arXiv:1909.06335), section 3.1: q ~ Dir(alpha p) for each client, which then takes its
    examples by q. Drawn here without replacement, hospital by hospital in turn; a class that is used up has its share
    given to the others.
    """
    classes, counts = np.unique(labels, return_counts=True)
    stock = [generator.permutation(np.flatnonzero(labels == name)).tolist() for name in classes]
    shares = generator.dirichlet(alpha * counts / counts.sum(), hospitals)
    parts: list[list[int]] = [[] for _ in range(hospitals)]
    for turn in range(len(labels)):
        mine = turn % hospitals
        left = np.array([len(rest) for rest in stock])
        wish = np.where(left > 0, shares[mine], 0.0)
        # a hospital whose classes are all used up takes of what is left
        wish = wish if wish.sum() > 0.0 else left.astype(np.float64)
        parts[mine].append(stock[int(generator.choice(len(stock), p=wish / wish.sum()))].pop())
    return [np.array(part, np.int64) for part in parts]


def _by_site(sites: Sequence[str]) -> Shares:
    found: dict[str, list[int]] = {}
    for patient, site in enumerate(sites):
        if not site:
            raise DataError(301, "a patient has no hospital", "fill the column, or drop the rows without")
        found.setdefault(site, []).append(patient)
    small = sum(len(part) < FEWEST_PATIENTS for part in found.values())
    if small:
        raise DataError(301, f"{small} hospitals have fewer than two patients", "merge them, or drop their rows")
    require_hospitals(len(found))
    named = _names(sorted(found))
    return {named[site]: np.array(part, np.int64) for site, part in sorted(found.items())}


def _names(sites: Sequence[str]) -> dict[str, str]:
    """A name for a hospital and its folder, none twice: ``site-`` and what of the column's text may stand in one."""
    names: dict[str, str] = {}
    for place, site in enumerate(sites):
        name = "site-" + re.sub(r"[^A-Za-z0-9._-]+", "_", site)[:40]
        names[site] = name if name.lower() not in {each.lower() for each in names.values()} else f"{name}-{place + 1}"
    return names
