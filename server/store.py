"""The coordinator's durable state: one checkpoint a completed round, and the attempt that is open.

Each is one file, replaced atomically, with its SHA-256 at the end: after a kill it is the old one or the new one. Neither
holds anything secret; a checkpoint restored from an old backup is noticed by the hospitals, who refuse attempts that lie
behind. Vectors go to disk and come back without being put together in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from medfed.advance import ModelState, parse_state, state_pieces
from medfed.errors import MedfedError, RemoteProtocolError
from medfed.seams import Files
from medfed.study import Study
from medfed.wire import pack_positions, read_positions
from medfed.witness import Witness

_LABEL = b"medfed/checkpoint/v4"
_DIGEST_BYTES = 32
_LIMIT_BYTES = 1 << 34

Part = Sequence[bytes | memoryview]  # one part of a file, itself in pieces


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One completed round, for report and journal: the attempt that completed it, what it took, which state it led to.

    ``survivors``: positions of the hospitals in its sum, ascending.
    """

    round: int
    attempt: int
    seconds: float
    upload_bytes: int
    state_sha256: str
    survivors: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """``state`` is ``previous`` advanced by ``total``; ``attestations`` are the hospitals' signatures over ``previous``.

    A hospital that lost its state is brought back with ``previous`` and its signatures, then advances by itself. In the
    coordinator's memory both may be missing (None and empty) although they are on disk: they are read when needed.
    """

    state: ModelState
    previous: ModelState | None
    total: bytes | memoryview
    attestations: tuple[bytes, ...]
    last_attempt: int
    records: tuple[RoundRecord, ...]


class Store:
    """The folder of one study at the coordinator."""

    def __init__(self, files: Files, folder: Path, study: Study, words: int) -> None:
        self._files = files
        self._folder = folder
        self._study = study
        self._words = words
        files.make_folder(folder)

    def load_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint, with views of the file's bytes; None before the first round. MF-403 if it was altered."""
        parts = self._load("checkpoint.bin")
        if parts is None:
            return None
        header = json.loads(bytes(parts[0]))
        previous = parse_state(parts[2], self._study, self._words) if len(parts[2]) else None
        records = tuple(
            RoundRecord(**(record | {"survivors": tuple(record["survivors"])})) for record in header["records"]
        )
        state = parse_state(parts[1], self._study, self._words)
        signed = tuple(bytes(part) for part in parts[4:])
        return Checkpoint(state, previous, parts[3], signed, header["last_attempt"], records)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raises nothing of its own; the checkpoint must be whole, ``previous`` and ``total`` included."""
        records = [asdict(record) for record in checkpoint.records]
        header = json.dumps({"last_attempt": checkpoint.last_attempt, "records": records}).encode()
        previous = tuple(state_pieces(checkpoint.previous)) if checkpoint.previous is not None else ()
        parts = ((header,), tuple(state_pieces(checkpoint.state)), previous, (checkpoint.total,))
        self._save("checkpoint.bin", (*parts, *((signed,) for signed in checkpoint.attestations)))

    def load_open_attempt(self) -> bytes | None:
        """The request frame of an attempt that was sent and not finished."""
        parts = self._load("attempt.bin")
        return None if parts is None else bytes(parts[0])

    def save_open_attempt(self, frame: bytes) -> None:
        """Before the first hospital is asked: the same bytes are asked again after a crash."""
        self._save("attempt.bin", ((frame,),))

    def clear_open_attempt(self) -> None:
        self._files.remove(self._folder / "attempt.bin")

    def save_survivors(self, nonce: bytes, survivors: Sequence[int]) -> None:
        """Before the first hospital is asked to help to open their sum: no other set is ever named under this ``nonce``."""
        self._save("survivors.bin", ((nonce,), (pack_positions(survivors),)))

    def load_survivors(self, nonce: bytes) -> tuple[int, ...]:
        """Those named for this attempt before a crash; empty where none were."""
        parts = self._load("survivors.bin")
        if parts is None or bytes(parts[0]) != nonce:
            return ()
        return read_positions(bytes(parts[1]))

    def witness(self) -> Witness:
        """The heads of hospitals' ledgers: one file for all studies, as a hospital has one ledger for all of its own."""
        return Witness(self._files, self._folder.parent / "witnesses.bin")

    def write(self, name: str, data: bytes) -> None:
        """A result file (model, result), written atomically."""
        self._files.write(self._folder / name, data)

    def _save(self, name: str, parts: Sequence[Part]) -> None:
        self._files.write(self._folder / name, _with_digest(((_LABEL,), *parts)))

    def _load(self, name: str) -> list[memoryview] | None:
        path = self._folder / name
        if not self._files.exists(path):
            return None
        data = memoryview(self._files.read(path, limit_bytes=_LIMIT_BYTES))
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            raise MedfedError(403, f"{name} of the coordinator was altered", "restore it from backup")
        parts = _split(body)
        if parts[0] != _LABEL:
            raise MedfedError(406, f"{name} is of another version of medfed", "use the version that wrote it")
        return parts[1:]


def _with_digest(parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    """``enc`` of the parts (medfed/wire.py), then the SHA-256 of it, piece by piece."""
    digest = hashlib.sha256()
    for part in parts:
        for piece in (sum(len(piece) for piece in part).to_bytes(4, "big"), *part):
            digest.update(piece)
            yield piece
    yield digest.digest()


def _split(body: memoryview) -> list[memoryview]:
    parts, at = [], 0
    while at < len(body):
        size = int.from_bytes(body[at : at + 4], "big")
        if at + 4 + size > len(body):
            raise RemoteProtocolError(103, "a file of the coordinator is cut short", "restore it from backup")
        parts.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return parts
