"""What the coordinator knows of hospitals' ledgers: it keeps the newest head of each, and relays what their peers keep."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from medfed.errors import PrivacyError, RemoteProtocolError
from medfed.roster import Roster
from medfed.witness import Head, Witness, checked, item, newest, read_heads

log = logging.getLogger("medfed.server")


class LedgerHeads:
    """The heads of one study's hospitals. A hospital judges itself by them: only it knows what led to which row."""

    def __init__(self, witness: Witness, roster: Roster) -> None:
        self._witness = witness
        self._roster = roster
        self._told: set[bytes] = set()  # in this session, by any hospital
        self._shown: dict[int, Head] = {}  # the newest of each hospital in the request it answers

    def known(self) -> tuple[bytes, ...]:
        """For a setup or the end: one entry a hospital, in the roster's order."""
        return self._witness.items(self._roster.identities)

    def begin(self) -> tuple[bytes, ...]:
        """For a new session's setup."""
        self._told = set()
        return self._show(self.known())

    def for_round(self) -> tuple[bytes, ...]:
        """For a round: every head that was told in this session, not the newest alone.

        An old ledger that went on has newer heads, and only the older ones speak against it.
        """
        return self._show(sorted(self._told.union(self.known())))

    def resume(self, items: Iterable[bytes]) -> None:
        """The coordinator was restarted within a session, whose last request held ``items``."""
        self._told = set(items)
        self._keep(read_heads(self._show(items), self._roster.identities))

    def take_told(self, position: int, items: Sequence[bytes]) -> None:
        """What a hospital answers to a setup: the head of its own ledger, and those it keeps of its peers.

        Raises ``RemoteProtocolError`` MF-103 if its own is missing or forged; ``PrivacyError`` MF-192 if that is older
        than the one it was shown, or another: then it should have refused.
        """
        found = read_heads(items, self._roster.identities)
        own = newest(found).get(position)
        if own is None or len(items) != len(self._roster.identities):
            raise RemoteProtocolError(103, "a setup reply without the head of a ledger", "refused")
        shown = self._shown.get(position)
        if shown is not None and (own.seq < shown.seq or (own.seq == shown.seq and own.hash != shown.hash)):
            name = self._roster.hospitals[position].hospital
            raise PrivacyError(
                192, f"{name} goes on with an old or a second ledger", "ask it to restore the newest one"
            )
        self._told.update(item(place, head) for place, head in found)
        self._keep(found)

    def take_upload(self, position: int, data: bytes) -> None:
        """The head that a hospital's upload names. ``RemoteProtocolError`` unless its own and newer than it was shown."""
        head = checked(data, self._roster.identities[position])
        shown = self._shown.get(position)
        if shown is not None and head.seq <= shown.seq:
            raise RemoteProtocolError(405, "an upload that no new row of the ledger covers", "refused")
        self._keep(((position, head),))

    def save(self) -> None:
        """On disk when this returns."""
        self._witness.save()

    def _show(self, items: Iterable[bytes]) -> tuple[bytes, ...]:
        shown = tuple(items)
        self._shown = newest(read_heads(shown, self._roster.identities))
        return shown

    def _keep(self, found: Iterable[tuple[int, Head]]) -> None:
        for position, head in found:
            try:
                self._witness.keep(self._roster.identities[position], head)
            except RemoteProtocolError as error:
                log.error("ALARM: %s: %s", self._roster.hospitals[position].hospital, error)
