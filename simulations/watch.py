"""Why a simulated hospital fails, said aloud; and an end to a rehearsal in which it fails again and again.

A real hospital keeps an exception's text to its own log, and a real coordinator waits for it to be mended. In a rehearsal
both are the same person, at the same terminal, with patients of a public cohort or of their own.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence

from medfed.errors import EnvironmentFault, MedfedError
from medfed.server.exchange import Exchange, Kind, Reply

log = logging.getLogger("medfed.simulations")

FAILURES_IN_A_ROW = 3


class Watch:
    """Stands between the coordinator and the hospitals of a rehearsal, whose names are given by position."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._lock = threading.Lock()
        self._failures = dict.fromkeys(range(len(names)), 0)
        self._told: set[str] = set()
        self._end: str | None = None

    def telling(self, position: int, handle: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        """``handle`` of the hospital at ``position``; what it raises is logged once as a warning, and raised."""

        def tell(frame: bytes) -> bytes:
            try:
                reply = handle(frame)
            except Exception as error:
                self.failed(
                    position, str(error) if isinstance(error, MedfedError) else f"{type(error).__name__}: {error}"
                )
                raise
            self.worked(position)
            return reply

        return tell

    def ending(self, exchange: Exchange) -> Exchange:
        """``exchange``, whose ``receive`` raises MF-192 once a hospital has failed ``FAILURES_IN_A_ROW`` times."""
        return _Ending(exchange, self)

    def check(self) -> None:
        """Raise ``EnvironmentFault`` MF-192 if a hospital fails again and again."""
        if self._end is not None:
            raise EnvironmentFault(192, self._end, "see the warning above; --debug shows where")

    def worked(self, position: int) -> None:
        """A hospital answered."""
        self._failures[position] = 0

    def failed(self, position: int, why: str) -> None:
        """A hospital did not answer; ``why`` is said once."""
        line = f"{self._names[position]} failed: {why}"
        with self._lock:
            if line not in self._told:
                self._told.add(line)
                log.warning("%s", line, exc_info=log.isEnabledFor(logging.DEBUG) and sys.exception() is not None)
            self._failures[position] += 1
            if self._failures[position] >= FAILURES_IN_A_ROW:
                self._end = f"{self._names[position]} failed {FAILURES_IN_A_ROW} times in a row"


class _Ending:
    """An ``Exchange`` that passes everything on and asks the watch at every turn."""

    def __init__(self, exchange: Exchange, watch: Watch) -> None:
        self._exchange = exchange
        self._watch = watch

    def online(self) -> frozenset[int]:
        return self._exchange.online()

    def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
        self._exchange.send(position, kind, payload, timeout_s)

    def receive(self) -> list[Reply]:
        self._watch.check()
        return self._exchange.receive()
