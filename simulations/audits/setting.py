"""What every audit is given: the machine, how thorough to be, and whom to tell how far it has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medfed.seams import Entropy, Seams
from medfed.simulations.entropy import SeededEntropy


def tell_nobody(share_done: float, what: str) -> None:
    """For audits that nobody watches."""


@dataclass(frozen=True, slots=True)
class Setting:
    """``seed`` None: all randomness is the operating system's; else everything repeats, and nothing is secret.

    ``quick``: fewer draws and shadow models. ``tell(share_done, what)``: share in [0, 1].
    """

    seams: Seams
    seed: int | None = None
    quick: bool = False
    tell: Callable[[float, str], None] = tell_nobody

    def entropy(self, owner: str) -> Entropy:
        """Where one party's keys come from; the same stream for the same owner where there is a seed."""
        return self.seams.entropy if self.seed is None else SeededEntropy(self.seed, owner)

    def generator(self, purpose: str) -> np.random.Generator:
        """Randomness of the attacker (canaries, shadow models), never of a hospital."""
        return np.random.default_rng(int.from_bytes(self.entropy(purpose).draw(purpose, 32)))
