"""What the slots of one batch hold, to be compared bit by bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """``parts``: [slots, ...] each, all that a slot's share of a sum is made of; ``squared_norms``: float64[slots] of the
    gradient. They hold until the engine's next pass."""

    parts: list[Tensor]
    squared_norms: Tensor

    def copy(self) -> Slots:
        return Slots([part.clone() for part in self.parts], self.squared_norms.clone())

    def tells(self) -> bool:
        """Whether the gradients of all slots are finite, and none is zero altogether."""
        return bool((torch.isfinite(self.squared_norms) & (self.squared_norms > 0)).all())

    def same_bits(self, reference: Slots, slots: Tensor) -> bool:
        """Whether slot i holds what slot ``slots[i]`` of the reference held; -1: nobody asks."""
        asked = torch.nonzero(slots >= 0)[:, 0].to(self.squared_norms.device)
        known = slots.to(asked.device)[asked]
        for part, other in zip(
            [*self.parts, self.squared_norms], [*reference.parts, reference.squared_norms], strict=True
        ):
            as_bits = torch.int64 if part.dtype == torch.float64 else torch.int32
            if not torch.equal(part[asked].view(as_bits), other[known].view(as_bits)):
                return False
        return True
