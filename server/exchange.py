"""What the coordinator's rounds need of a network: who is there, send these bytes, what came back.

``server/rounds.py`` knows this and nothing of Flower. Delivery is neither certain nor unique nor in order, and the
position in a reply is where Flower says it came from, which proves nothing: whoever receives checks signatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Kind(Enum):
    """What a message asks of a hospital; the value is Flower's message type."""

    QUERY = "query"
    """Answer from what is there: readiness, offers, state."""
    TRAIN = "train"
    """Take part in a round."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of the hospital at ``position`` of the roster: its bytes, or the name of what went wrong.

    Exactly one of ``payload`` and ``fault`` is set. ``fault`` is a short word: the class name of an exception at the
    hospital, "expired" when the time to live ran out, "malformed" for content that is not ours.
    """

    position: int
    payload: bytes | None
    fault: str | None


class Exchange(Protocol):
    """One hospital a position; calls come from one thread and do not wait for hospitals."""

    def online(self) -> frozenset[int]:
        """Positions in the roster whose node is connected now."""
        ...

    def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
        """Queue ``payload`` for one hospital; it is void ``timeout_s`` seconds from now.

        The next ``receive`` sends what is queued. A message that cannot be delivered comes back as a fault.
        """
        ...

    def receive(self) -> list[Reply]:
        """Send what is queued; return every answer that came since the last call, without waiting for more.

        Ask again every 0.02 to 0.1 seconds: each call is a request or more to the SuperLink.
        """
        ...
