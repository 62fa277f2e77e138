"""Signed heads of hospitals' ledgers, and who keeps them, so that an old or a second copy is noticed at first contact.

A head is the number and hash of a ledger's last row under its hospital's signature. The coordinator and every hospital keep
the newest one of each peer. Whoever is shown a head of its own ledger looks it up: a row that is missing or has another hash
means that this ledger is an older one, or took another way since. Nobody but the hospital can make such a head, so that a
liar can withhold but not accuse.

A head tells nothing about patients. Its number counts rows, which follow from approvals and attempts. Its hash is over the
whole chain, and with the first approval that holds a digest of patient ids under the hospital's secret key: without the key
nobody can compute what any data would have led to, and so nothing can be tried out against it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medfed.errors import MedfedError, RemoteProtocolError
from medfed.identity import PUBLIC_BYTES, verify
from medfed.seams import Files
from medfed.wire import HEAD_BYTES, enc

log = logging.getLogger("medfed.witness")

NO_HEAD = bytes(HEAD_BYTES)
"""Stands where none is known, so that a message's length does not tell."""
_SEQ_BYTES, _HASH_BYTES, _POSITION_BYTES = 8, 32, 2
_LABEL = b"medfed/heads/v1\n"
_LIMIT_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Head:
    """A ledger's last row: its number = 1, 2, ..., its hash (32 bytes), the hospital's signature over both."""

    seq: int
    hash: bytes
    signature: bytes

    def check(self, public: bytes) -> None:
        """Raise ``RemoteProtocolError`` (MF-110) unless the holder of ``public`` signed this head."""
        verify(public, self.signature, signed_bytes(self.seq, self.hash))

    def to_bytes(self) -> bytes:
        """``BE64 seq ‖ hash ‖ signature``: ``HEAD_BYTES``."""
        return self.seq.to_bytes(_SEQ_BYTES, "big") + self.hash + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> Head:
        """The inverse. Raises ``RemoteProtocolError`` (MF-103); the signature is not checked."""
        if len(data) != HEAD_BYTES or data == NO_HEAD:
            raise RemoteProtocolError(103, "no head of a ledger", "refused; both sides need the same medfed")
        hash_end = _SEQ_BYTES + _HASH_BYTES
        return cls(int.from_bytes(data[:_SEQ_BYTES], "big"), data[_SEQ_BYTES:hash_end], data[hash_end:])


def signed_bytes(seq: int, digest: bytes) -> bytes:
    """What the signature of a head, and so of every row, is over."""
    return enc(b"medfed/ledger/head/v1", seq.to_bytes(_SEQ_BYTES, "big"), digest)


@functools.lru_cache(maxsize=1 << 15)  # as many as a round may hold, and more
def checked(data: bytes, public: bytes) -> Head:
    """The head in ``data``, signed by ``public``; else ``RemoteProtocolError`` MF-103, MF-110.

    Remembered: the same heads come with every round, and to every hospital of a rehearsal. What is refused is not.
    """
    head = Head.from_bytes(data)
    head.check(public)
    return head


# ------------------------------------------------------------------------------------------------------------ in messages


def item(position: int, head: Head | None) -> bytes:
    """One entry of a message's ``heads``: ``BE16 position ‖ head``."""
    return position.to_bytes(_POSITION_BYTES, "big") + (head.to_bytes() if head else NO_HEAD)


def position_of(each: bytes) -> int:
    """Whose head an entry of a message's ``heads`` holds, or would hold."""
    return int.from_bytes(each[:_POSITION_BYTES], "big")


def read_heads(items: Iterable[bytes], identities: Sequence[bytes]) -> tuple[tuple[int, Head], ...]:
    """Position and head of every entry that holds one; what is malformed or forged is left out, and logged.

    ``identities``: Ed25519 keys by position in the roster.
    """
    found, forged = [], 0
    for each in items:
        position, data = position_of(each), each[_POSITION_BYTES:]
        if data == NO_HEAD:
            continue
        try:
            if position >= len(identities):
                raise RemoteProtocolError(111, "a head of nobody in the roster", "refused")
            found.append((position, checked(data, identities[position])))
        except RemoteProtocolError:
            forged += 1
    if forged:
        log.warning("%d heads of ledgers do not verify: ignored, they prove nothing", forged)
    return tuple(found)


def newest(found: Iterable[tuple[int, Head]]) -> dict[int, Head]:
    """By position the head with the highest number."""
    latest: dict[int, Head] = {}
    for position, head in found:
        if position not in latest or head.seq > latest[position].seq:
            latest[position] = head
    return latest


def with_heads(task: bytes, heads: Sequence[bytes]) -> bytes:
    """What an attempt's pads are bound to, 32 bytes: the ``task`` (``medfed.advance.task_hash``) and the heads shown.

    Hospitals that were shown different heads make pads that do not cancel, so that nobody can be shown less than others.
    """
    return hashlib.sha256(enc(b"medfed/secagg/v1/heads", task, *heads)).digest()


# ---------------------------------------------------------------------------------------------------------------- on disk


class Witness:
    """Keeps the newest head of each hospital in one file, by the hospital's key; over studies and restarts.

    Each entry is its own proof: one that does not verify is left out at the next start and never believed.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._heads = self._load()
        self._is_saved = True

    def head(self, public: bytes) -> Head | None:
        return self._heads.get(public)

    def items(self, identities: Sequence[bytes]) -> tuple[bytes, ...]:
        """What is known of each hospital of a roster, in its order: one entry each, ``NO_HEAD`` where nothing is."""
        return tuple(item(position, self._heads.get(public)) for position, public in enumerate(identities))

    def keep(self, public: bytes, head: Head) -> None:
        """Remember ``head``, whose signature was checked, unless a newer one is known. ``save`` makes it last.

        Raises ``RemoteProtocolError`` (MF-405) if it contradicts the one that is known, which then stays.
        """
        known = self._heads.get(public)
        if known is not None and known.seq == head.seq and known.hash != head.hash:
            raise RemoteProtocolError(405, f"two ledgers with another row {head.seq} each", "ask what runs there")
        if known is None or head.seq > known.seq:
            self._heads[public] = head
            self._is_saved = False

    def save(self) -> None:
        """Write what changed, atomically; nothing if nothing did."""
        if not self._is_saved:
            entries = (public + head.to_bytes() for public, head in sorted(self._heads.items()))
            self._files.write(self._path, b"".join((_LABEL, *entries)), private=True)
            self._is_saved = True

    def _load(self) -> dict[bytes, Head]:
        if not self._files.exists(self._path):
            return {}
        data = self._files.read(self._path, limit_bytes=_LIMIT_BYTES)
        if not data.startswith(_LABEL):
            raise MedfedError(406, f"{self._path.name} is of another version of medfed", "use the one that wrote it")
        heads: dict[bytes, Head] = {}
        for start in range(len(_LABEL), len(data), PUBLIC_BYTES + HEAD_BYTES):
            entry = data[start : start + PUBLIC_BYTES + HEAD_BYTES]
            try:
                heads[entry[:PUBLIC_BYTES]] = checked(entry[PUBLIC_BYTES:], entry[:PUBLIC_BYTES])
            except RemoteProtocolError as error:
                log.warning("an entry of %s is not usable and left out: %s", self._path.name, error)
        return heads
