"""All that one run at the coordinator is about, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medfed.advance import ModelState, advance, state_size_bytes
from medfed.identity import Identity
from medfed.privacy.plan import Plan
from medfed.privacy.secagg.protocol import AggregatorConfig
from medfed.roster import Roster
from medfed.study import Study


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """All that one run is about."""

    study: Study
    roster: Roster
    plan: Plan
    first: ModelState
    identity: Identity
    stamps: tuple[str, ...] = ()  # what the run must not be mistaken for: of rehearsals only

    def without_first(self) -> Assignment:
        """The same for the rounds after the first, without the first model's memory."""
        nothing = np.zeros(0, np.float32)
        return replace(self, first=ModelState(0, nothing, nothing, nothing, nothing))

    @property
    def vector_limit_bytes(self) -> int:
        """The longest vector that travels: a state or an upload."""
        return max(state_size_bytes(self.study, self.plan.words), self.secagg_config().longest_upload_bytes)

    def secagg_config(self) -> AggregatorConfig:
        return AggregatorConfig.of(self.study, self.roster, self.plan.ring_words)

    def advance(self, state: ModelState, total: bytes | memoryview, survivors: Sequence[int]) -> ModelState:
        integers = self.plan.read_total(total)
        nominal = self.roster.patients_of(survivors)
        exponent = self.plan.grid_exponent(state.completed_rounds)
        everybody = self.roster.patients_at_start(self.study)
        return advance(
            state,
            integers,
            self.study,
            grid_exponent=exponent,
            nominal_patients=nominal,
            roster_patients=everybody,
            noise_variance=self.plan.noise_variance(len(survivors)),
        )
