"""What others saw of this hospital's ledger, and what this hospital saw of theirs.

An old or a second copy of a ledger verifies: all that it lacks is what came later. Others have seen that. The coordinator
shows what it keeps with every setup and end; what the peers keep comes with every round, and cannot be held back: each of
them refuses a round in which its own word is missing, and the pads of a round are bound to all that was shown in it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from medfed.client.ledger import LedgerView, lock
from medfed.client.refusal import Refuse
from medfed.errors import MedfedError, PrivacyError, RemoteProtocolError
from medfed.seams import Files
from medfed.wire import Refused
from medfed.witness import NO_HEAD, Head, Witness, item, newest

log = logging.getLogger("medfed.client")

WITNESS_NAME = "witnesses.bin"


class Witnesses:
    """One for all studies of a hospital, as it has one ledger."""

    def __init__(self, files: Files, ledger_path: Path, public: bytes, ledger: LedgerView) -> None:
        """``public``: this hospital's identity. The peers' heads lie beside the ledger."""
        self._files = files
        self._ledger_path = ledger_path
        self._public = public
        self._ledger = ledger
        self._peers = Witness(files, ledger_path.with_name(WITNESS_NAME))
        self._why_locked = ""

    @property
    def is_locked(self) -> bool:
        return bool(self._why_locked)

    def face(self, seen: Iterable[Head]) -> None:
        """Hold the ledger against heads of it that others saw, whose signatures were checked.

        Raises ``Refuse`` if a row is missing or was another, and then for good: nothing more leaves this hospital, also
        after a restart, until a person restores a ledger that has the row. Later rows than those seen are in order.
        """
        for head in () if self.is_locked else seen:
            try:
                self._ledger.check_witness(head, self._public)
            except PrivacyError as error:
                self._lock(head, error)
                break
        if self.is_locked:
            raise Refuse(Refused.LEDGER_BEHIND, self._why_locked)

    def _lock(self, head: Head, error: PrivacyError) -> None:
        self._why_locked = str(error)
        log.error("LOCKED, nothing more leaves this hospital: %s", error)
        try:
            lock(self._files, self._ledger_path, head)
        except MedfedError as fault:  # this process is locked; the next one will be shown the head again
            log.error("the lock was not written: %s", fault)

    def told(self, identities: Sequence[bytes]) -> tuple[bytes, ...]:
        """One entry a position, own ledger included: how many and how long follows from the roster."""
        return tuple(
            item(position, self._ledger.head()) if public == self._public else item(position, self._peers.head(public))
            for position, public in enumerate(identities)
        )

    def keep(self, heads: Iterable[tuple[int, Head]], identities: Sequence[bytes]) -> None:
        """Remember the newest heads of the peers, on disk when this returns if the disk will have them.

        Where it will not, they are still told as long as this process lives, and written with the next ones.
        """
        for position, head in newest(heads).items():
            if identities[position] != self._public:
                try:
                    self._peers.keep(identities[position], head)
                except RemoteProtocolError as error:
                    log.error("ALARM: hospital %d of the roster: %s", position, error)
        try:
            self._peers.save()
        except MedfedError as error:
            log.warning("the peers' heads were not written: %s", error)


class HeadsOfSession:
    """What the coordinator has to relay in one session: all that this hospital told, and heads that grow with the rounds."""

    def __init__(self, told: Iterable[bytes]) -> None:
        self._told = {each for each in told if not each.endswith(NO_HEAD)}
        self._last: tuple[int, dict[int, Head]] | None = None

    def require(
        self,
        completed_rounds: int,
        items: Sequence[bytes],
        latest: dict[int, Head],
        members: Iterable[int],
        survivors: Iterable[int],
    ) -> None:
        """Raise ``Refuse`` unless every head that was told is among ``items``, and every one of the cohort's ``members`` has one.

        A round is completed with an upload of each of its ``survivors``, which names the row it was charged in: after it their
        ledgers must have newer heads than at the last ``accept``. ``latest``: the newest of ``items`` by position.
        """
        if not self._told.issubset(items) or not set(members) <= set(latest):
            raise Refuse(Refused.HEADS_MISSING, "heads of ledgers that were told are not relayed")
        if self._last is not None:
            before, heads = self._last
            grown = set(survivors) if completed_rounds > before else set()
            if any(
                position not in latest or latest[position].seq < head.seq + (position in grown)
                for position, head in heads.items()
            ):
                raise Refuse(Refused.HEADS_MISSING, "the heads relayed are not those of the last round")

    def accept(self, completed_rounds: int, latest: dict[int, Head]) -> None:
        """An attempt is made on these heads."""
        self._last = completed_rounds, latest
