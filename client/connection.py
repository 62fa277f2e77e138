"""Whether this hospital is connected to its coordinator: written by the node's threads, read by probes and people."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from medfed.seams import Clock


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """``since_s``: seconds since 1970 of the last change; ``why_not``: one line with a code, empty while it is up."""

    is_up: bool
    since_s: float
    why_not: str


class Connection:
    """The latest that is known of one connection; ``tell`` hears every change, in order."""

    def __init__(self, clock: Clock, tell: Callable[[bool], None] = lambda is_up: None) -> None:
        self._clock = clock
        self._tell = tell
        self._lock = threading.Lock()
        self._state = ConnectionState(False, clock.wall(), "not connected yet")

    @property
    def state(self) -> ConnectionState:
        return self._state

    def up(self) -> None:
        """The coordinator has answered this hospital's node."""
        self._change(True, "")

    def down(self, why_not: str) -> None:
        """A call failed, or the coordinator does not know this hospital's node."""
        self._change(False, why_not)

    def _change(self, is_up: bool, why_not: str) -> None:
        with self._lock:
            before = self._state
            since = before.since_s if before.is_up == is_up else self._clock.wall()
            self._state = ConnectionState(is_up, since, why_not)
            if before.is_up != is_up:
                self._tell(is_up)
