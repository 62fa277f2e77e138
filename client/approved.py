"""What this hospital's people approved, checked again at start-up, and what it works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from medfed.advance import ModelState
from medfed.client.compute import Compute
from medfed.client.trainer import Patients
from medfed.models.records import Records
from medfed.privacy.plan import Plan
from medfed.roster import Roster
from medfed.study import Study


@dataclass(frozen=True, slots=True, eq=False)
class Approved:
    """One approved study. ``first``: the state before round 1; ``holdout``: records that never train."""

    study: Study
    roster: Roster
    position: int
    plan: Plan
    model: nn.Module
    first: ModelState
    patients: Patients
    holdout: Records
    folder: Path
    compute: Compute

    @property
    def nominal_patients(self) -> int:
        """What this hospital declared: public, and never exactly what it has."""
        return self.roster.hospitals[self.position].nominal_patients
