"""Which hospitals a setup does without for a while, in a study that can: those that spoilt what others paid for.

Blame is not always provable: a box that one hospital cannot open may be its sender's fault or its own word. So nobody is excluded
for good; each time a hospital is suspected it sits out four times as many attempts, and where more are suspected than a round can
do without they take turns.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable

log = logging.getLogger("medfed.server")

VAIN_ATTEMPTS = 3  # for so many attempts nobody waits for who was connected and made no offer
LONGEST = 256


class Standing:
    """``fewest``: of ``hospitals`` that must be left. ``name``: a hospital's, by position. Kept in memory only."""

    def __init__(self, hospitals: int, fewest: int, name: Callable[[int], str]) -> None:
        self._hospitals = hospitals
        self._spare = hospitals - fewest
        self._name = name
        self._strikes: Counter[int] = Counter()
        self._until: dict[int, int] = {}

    @property
    def is_robust(self) -> bool:
        """Whether the study can do without any."""
        return self._spare > 0

    def suspect(self, positions: Iterable[int], why: str, attempt: int) -> None:
        """``attempt``: the last one made."""
        for position in sorted(set(positions)) if self.is_robust else ():
            self._strikes[position] += 1
            out = min(LONGEST, 4 ** self._strikes[position])
            self._until[position] = attempt + out
            log.error("ALARM: %s is suspected (%s) and sits out %d attempts", self._name(position), why, out)

    def pass_over(self, positions: Iterable[int], attempt: int) -> None:
        """Nobody is to wait for these in the next few setups."""
        for position in positions:
            self._until[position] = max(self._until.get(position, 0), attempt + VAIN_ATTEMPTS)

    def left_out(self, attempt: int, present: int) -> frozenset[int]:
        """Who sits out the attempt after ``attempt``; never more than those ``present`` can do without."""
        out = [position for position, until in self._until.items() if attempt < until]
        # the same number of strikes: another one's turn at each attempt
        out.sort(key=lambda position: (-self._strikes[position], (position + attempt) % self._hospitals))
        return frozenset(out[: max(0, self._spare - self._hospitals + present)])
