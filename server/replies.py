"""What hospitals' refusals mean for a run, and how hospitals are named."""

from __future__ import annotations

from collections.abc import Mapping

from medfed.errors import PrivacyError
from medfed.roster import Roster
from medfed.wire import Refusal, Refused

FATAL = {
    Refused.BUDGET: "its budget does not cover the attempt",
    Refused.STATE_MISMATCH: "it computed another model state",
    Refused.SIGNATURES: "it refuses the signatures over the model state",
    Refused.OFFERS_REFUSED: "it refuses the peers' keys",
    Refused.LEDGER_BEHIND: "its ledger is older than others saw it, or a second copy (MF-405), and locked",
    Refused.HEADS_MISSING: "it misses what hospitals told of each other's ledgers",
}


AWAITED = {
    Refused.NOT_APPROVED: "has not approved the study",
    Refused.OTHER_ROSTER: "has not approved the new roster",
    Refused.OUT_OF_HOURS: "outside its hours of the day",
}
STOPS = {Refused.NOT_APPROVED, *FATAL}  # where every hospital is needed
_NOBODY: Mapping[int, Refused] = {}


def reason_of(refusal: Refusal) -> Refused:
    """A reason that this version does not know is a fault at the hospital like any other."""
    try:
        return Refused(refusal.reason)
    except ValueError:
        return Refused.INTERNAL


def stop(name: str, reason: Refused) -> PrivacyError:
    """Why a study that needs every hospital cannot go on with this one; ``reason`` is one of ``STOPS``."""
    if reason is Refused.NOT_APPROVED:
        return PrivacyError(192, f"{name} does not take part any more", "ask it; plan a new study without it")
    return PrivacyError(192, f"{name} stops the study: {FATAL[reason]}", "ask it; its own log says more")


class Names:
    """Hospitals' names by position."""

    def __init__(self, roster: Roster) -> None:
        self._names = [each.hospital for each in roster.hospitals]

    def one(self, position: int) -> str:
        return self._names[position]

    def several(self, positions: frozenset[int], refused: Mapping[int, Refused] = _NOBODY) -> str:
        """In the roster's order, with what keeps those away that have said so."""
        named = ((self._names[position], refused.get(position)) for position in sorted(positions))
        return ", ".join(name if why is None else f"{name} ({AWAITED.get(why, why.name)})" for name, why in named)
