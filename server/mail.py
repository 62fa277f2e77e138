"""One request to every hospital until each has answered: repeats, faults, false signatures and the deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medfed.errors import EnvironmentFault, MedfedError, RemoteProtocolError
from medfed.seams import Clock
from medfed.server.exchange import Exchange, Kind
from medfed.wire import (
    FROM_HOSPITAL,
    NO_POSITION,
    Message,
    check_signature,
    decode,
)

log = logging.getLogger("medfed.server")

POLL_S = 0.02
# A message in a killed hospital's hands is lost; hospitals answer repeats with identical bytes. One that was seen away is
# asked again when it is back. One that was not may just be busy: it is asked ever more rarely, as every repeat waits at it.
RESEND_S = 15.0
RESEND_AT_MOST_S = 240.0
LOOK_S = 2.0
RETRY_S = 2.0  # after a fault, or while a hospital has not approved yet


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a reply must bear: the study, and the signature of the hospital it is said to come from."""

    study_hash: bytes
    identities: tuple[bytes, ...]
    vector_limit_bytes: int

    def open(self, position: int, frame: bytes) -> Message:
        """The checked reply of the hospital at ``position``. Raises ``RemoteProtocolError``."""
        message = decode(frame, vector_limit_bytes=self.vector_limit_bytes)
        if not isinstance(message, FROM_HOSPITAL):
            raise RemoteProtocolError(104, "a reply of a kind that hospitals do not send", "refused")
        if message.study_hash != self.study_hash:
            raise RemoteProtocolError(112, "a reply about another study", "refused")
        check_signature(frame, self.identities[position])
        if getattr(message, "position", None) not in (position, NO_POSITION):
            raise RemoteProtocolError(111, "a reply in another hospital's name", "refused")
        return message


Frames = Callable[[Sequence[int]], Mapping[int, bytes]]
"""Requests by position, made when they are sent."""


def same(frame: Callable[[], bytes]) -> Frames:
    """One request for all."""
    return lambda positions: dict.fromkeys(positions, frame())


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The request: ``frames`` gives the bytes by position, the same for every repeat; asked for when they are sent."""

    frames: Frames
    kind: Kind
    timeout_s: float


class Mail:
    """Sends ``outgoing`` to whoever is waited for, and repeats it until they answer or the deadline passes."""

    def __init__(
        self,
        exchange: Exchange,
        clock: Clock,
        envelope: Envelope,
        outgoing: Outgoing,
        name: Callable[[int], str],
    ) -> None:
        self._exchange = exchange
        self._clock = clock
        self._envelope = envelope
        self._outgoing = outgoing
        self._name = name
        self._end = clock.monotonic() + outgoing.timeout_s
        self._due: dict[int, float] = {}
        self._pauses: dict[int, float] = {}  # by position: how long the next repeat waits
        self._away: frozenset[int] = frozenset()
        self._look = 0.0

    def away(self, position: int) -> bool:
        """Whether that hospital was not connected at the last look."""
        return position in self._away

    def again(self, position: int, after_s: float) -> None:
        """Send once more, soon."""
        self._due[position] = self._clock.monotonic() + after_s

    def gather(self, waiting: frozenset[int], too_late: str) -> list[tuple[int, Message, int]]:
        """One turn: send what is due, take what came. Returns (position, checked message, its length in bytes).

        Raises ``EnvironmentFault`` (MF-191) after the deadline.
        """
        now = self._clock.monotonic()
        if now > self._end:
            raise EnvironmentFault(191, too_late, "see that every hospital runs, then start again")
        self._send_due(waiting, now)
        messages = [
            opened for reply in self._exchange.receive() if (opened := self._read(reply.position, reply.payload))
        ]
        if not messages:
            self._clock.sleep(POLL_S)
        return messages

    def _send_due(self, waiting: frozenset[int], now: float) -> None:
        due = {position for position in waiting if self._due.get(position, 0.0) <= now}
        if not due and now < self._look:
            return
        online = self._exchange.online()
        self._look = now + LOOK_S
        due |= waiting & self._away & online
        self._away = waiting - online
        if ready := sorted(due & online):
            frames = self._outgoing.frames(ready)
            for position in ready:
                left = min(self._outgoing.timeout_s, self._end - now + 1)
                self._exchange.send(position, self._outgoing.kind, frames[position], left)
                pause = self._pauses.get(position, RESEND_S)
                self._due[position], self._pauses[position] = now + pause, min(2 * pause, RESEND_AT_MOST_S)
        for position in due - online:
            self._due[position] = now + 0.25

    def _read(self, position: int, payload: bytes | None) -> tuple[int, Message, int] | None:
        if payload is None:
            self.again(position, RETRY_S)
            return None
        try:
            return position, self._envelope.open(position, payload), len(payload)
        except MedfedError as error:
            log.error("ALARM: a reply in the name of %s is refused: %s", self._name(position), error)
            return None
