"""A hospital as one function: request frame -> reply frame. Knows studies, keys and the ledger, nothing of networks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from medfed.advance import state_size_bytes
from medfed.client.participation import Participation
from medfed.client.refusal import Refuse
from medfed.errors import RemoteProtocolError
from medfed.identity import Identity
from medfed.wire import (
    FROM_COORDINATOR,
    NO_POSITION,
    Finish,
    Message,
    Refusal,
    Refused,
    SetupRequest,
    check_signature,
    decode,
    encode,
    frame_limit_bytes,
)

log = logging.getLogger("medfed.client")


class Hospital:
    """Answers every request with a frame that ``medfed/wire.py`` lists, or raises ``RemoteProtocolError``.

    Guarantee: a request that is not signed by the coordinator of an approved study's pinned roster changes nothing.
    """

    def __init__(self, identity: Identity, participations: Iterable[Participation]) -> None:
        """``on_lock`` is called whenever a request is refused because the ledger is locked."""
        self.on_lock: Callable[[], None] = lambda: None
        self._identity = identity
        self._said = ""
        self._studies = {part.study_hash: part for part in participations}
        known = [part.approved for part in self._studies.values()]
        self._vector_limit = max((state_size_bytes(each.study, each.plan.words) for each in known), default=0)

    @property
    def frame_limit_bytes(self) -> int:
        """Longest request that a study approved here has a use for."""
        return frame_limit_bytes(self._vector_limit)

    @property
    def participations(self) -> tuple[Participation, ...]:
        """Its part in every study it answers for."""
        return tuple(self._studies.values())

    @property
    def is_locked(self) -> bool:
        """Whether its ledger is an old or a second copy (MF-405): then it refuses everything."""
        return any(part.is_locked for part in self._studies.values())

    @property
    def studies(self) -> list[str]:
        """Names of the studies this hospital answers for."""
        return [part.approved.study.study.name for part in self._studies.values()]

    @property
    def open_studies(self) -> list[str]:
        """Names of those that are not finished."""
        return [part.approved.study.study.name for part in self._studies.values() if part.is_open]

    def read(self, frame: bytes) -> Message:
        """A request, its signature not yet checked. Raises ``RemoteProtocolError``."""
        message = decode(frame, vector_limit_bytes=self._vector_limit)
        if not isinstance(message, FROM_COORDINATOR):
            raise RemoteProtocolError(104, "a request of a kind that hospitals do not take", "refused")
        return message

    def handle(self, frame: bytes) -> bytes:
        """Check and answer one request."""
        message = self.read(frame)
        part = self._studies.get(message.study_hash)
        if part is None:
            self._say(logging.WARNING, "MF-123 asked for a study that is not approved here: run medfed-client approve")
            return self._refusal(message, Refused.NOT_APPROVED, NO_POSITION)
        check_signature(frame, bytes.fromhex(part.approved.roster.coordinator))
        if part.is_expired and not isinstance(message, Finish):
            self._say(logging.WARNING, f"MF-120 study {part.approved.study.study.name} expired")
            return self._refusal(message, Refused.NOT_APPROVED, part.approved.position)
        try:
            reply = part.answer(message)
            self._said = ""
            return reply
        except Refuse as refusal:
            own_fault = refusal.reason in (Refused.INTERNAL, Refused.LEDGER_BEHIND)
            level = logging.WARNING if own_fault else logging.INFO
            self._say(level, f"refused {type(message).__name__}: {refusal.reason.name} ({refusal.cause})")
            if refusal.reason is Refused.LEDGER_BEHIND:
                self.on_lock()
            return self._refusal(message, refusal.reason, part.approved.position)

    def refuse(self, message: Message, reason: Refused) -> bytes:
        """The reply that says ``reason`` to a request about a study that is approved here."""
        return self._refusal(message, reason, self._studies[message.study_hash].approved.position)

    def _say(self, level: int, refused: str) -> None:
        """Once in a row: a coordinator that waits asks again every few seconds."""
        log.log(logging.DEBUG if refused == self._said else level, "%s", refused)
        self._said = refused

    def _refusal(self, message: Message, reason: Refused, position: int) -> bytes:
        nonce = message.session if isinstance(message, SetupRequest) else getattr(message, "nonce", bytes(16))
        return encode(Refusal(message.study_hash, nonce, position, int(reason)), self._identity)
