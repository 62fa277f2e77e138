"""Rehearsals on one machine: the production client and server code under a simulated network.

From Python, the whole of ``medfed-simulate run``::

    from medfed.simulations import Rehearsal, simulate

    run = simulate(None, "heart-disease", Rehearsal(epsilon=1.0, mode="distributed"))
    run.result.test_metric, run.folder

Names are imported when they are first used: importing this package is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medfed.simulations.cohorts import Cohort, load_cohort
    from medfed.simulations.outcome import Result
    from medfed.simulations.rehearsal import Rehearsal
    from medfed.simulations.runs import Simulation, simulate

__all__ = ["Cohort", "Rehearsal", "Result", "Simulation", "load_cohort", "simulate"]

_HOMES = {
    "Cohort": "cohorts",
    "Rehearsal": "rehearsal",
    "Result": "outcome",
    "Simulation": "runs",
    "load_cohort": "cohorts",
    "simulate": "runs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
