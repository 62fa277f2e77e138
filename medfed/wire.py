"""Versioned, size-bounded, signed messages <-> bytes. Nothing leaves a hospital that is not listed here.

A frame is ``"MFW" ‖ version ‖ kind ‖ fields ‖ signature``. Integers are big-endian of fixed width, byte strings of fixed
width stand as they are, all others carry a 4-byte length, lists a 2-byte count. The 64-byte Ed25519 signature covers the
SHA-256 of everything before it. A frame that is longer, shorter, of another version or kind, or that has a byte left over
is refused with a code; no other exception leaves ``decode``.

What a hospital may send (the whole list): ``OfferReply``, ``Upload``, ``Vote``, ``Release``, ``StateAccepted``,
``Finished``, ``Refusal``.
Their lengths depend on the study alone, never on patients. Flower carries them and adds its own: node id, times, and, where
a request could not be answered at all, the class name of the exception instead of a frame (docs/trust.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Annotated, ClassVar, TypeVar, get_args, get_type_hints

from medfed.errors import LocalProtocolError, RemoteProtocolError
from medfed.identity import SIGNATURE_BYTES, Identity, verify

MAGIC = b"MFW"
VERSION = 1
_HEADER_BYTES = len(MAGIC) + 2
_OVERHEAD_BYTES = 1 << 21  # all fields but the vector of the largest message: 128 offers, MOST_HEADS heads of ledgers

HEAD_BYTES = 8 + 32 + SIGNATURE_BYTES  # of a ledger: number, hash, signature (medfed/witness.py)

MOST_HEADS = 128 * 128 + 128
"""In a round: 128 hospitals may each keep another head of every peer, and the coordinator one more of each."""

NO_POSITION = 0xFFFF  # a hospital that has not approved the study has no position in it


def enc(*parts: bytes) -> bytes:
    """Unambiguous encoding of byte strings: for each part its length as 4 bytes big-endian, then the part."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


class Refused(IntEnum):
    """Why a hospital does not answer a request with what was asked: the only error text that leaves it."""

    NOT_APPROVED = 1  # this hospital's people have not approved this study, or have withdrawn it
    NO_SESSION = 2  # the keys of this session are gone (a restart): set up again
    NEED_STATE = 3  # the model state before this round is not here: transfer it, with signatures
    ATTEMPT_SPENT = 4  # this attempt was begun here and cannot be finished: take the next
    STATE_MISMATCH = 5  # the state named is not the one this hospital computed
    OFFERS_REFUSED = 6  # peers' keys do not verify against the approved roster
    BUDGET = 7  # this hospital's budget does not cover the attempt
    OUT_OF_ORDER = 8  # wrong round, attempt or session
    INTERNAL = 9  # a fault at the hospital; its own log says which
    SIGNATURES = 10  # too few or wrong signatures over a transferred state
    LEDGER_BEHIND = 11  # this hospital's ledger is older than others saw it, or a second copy: it is locked
    HEADS_MISSING = 12  # heads of ledgers that this hospital told are not relayed, or did not grow with the rounds
    STATEMENT = 13  # the privacy statement is not the one this hospital works out
    OUT_OF_HOURS = 14  # this hospital takes part at other times of the day: ask again later
    SURVIVORS = 15  # this hospital does not vote on these survivors, or does not release for them
    OTHER_ROSTER = 16  # the request counts hospitals that are not in the roster approved here


@dataclass(frozen=True, slots=True)
class _Unsigned:
    width: int


@dataclass(frozen=True, slots=True)
class _Fixed:
    size: int


@dataclass(frozen=True, slots=True)
class _Variable:
    limit: int | None  # None: bounded by the caller's limit for vectors


@dataclass(frozen=True, slots=True)
class _Items:
    item_limit: int
    count_limit: int


U16 = Annotated[int, _Unsigned(2)]
U32 = Annotated[int, _Unsigned(4)]
Bytes16 = Annotated[bytes, _Fixed(16)]
Bytes32 = Annotated[bytes, _Fixed(32)]
Bytes64 = Annotated[bytes, _Fixed(64)]
Offer = Annotated[bytes, _Variable(1024)]
Pieces = tuple[bytes | memoryview, ...]
Vector = Annotated[bytes | memoryview, _Variable(None)]  # read from a frame: a view of it, never a copy
VectorInPieces = Annotated[bytes | memoryview | Pieces, _Variable(None)]  # to be sent; read as a vector
Document = Annotated[bytes, _Variable(1 << 15)]
Offers = Annotated[tuple[bytes, ...], _Items(1024, 128)]
Attestations = Annotated[tuple[bytes, ...], _Items(2 + SIGNATURE_BYTES, 128)]  # BE16 position ‖ signature
HeadBytes = Annotated[bytes, _Fixed(HEAD_BYTES)]
Positions = Annotated[bytes, _Variable(2 * 128)]  # BE16 each, ascending
Votes = Annotated[tuple[bytes, ...], _Items(2 + SIGNATURE_BYTES, 128)]  # BE16 voter ‖ signature
Boxes = Annotated[tuple[bytes, ...], _Items(2 + 48, 127)]  # BE16 sender ‖ box
ReleaseBytes = Annotated[bytes, _Variable(35 * 127 + SIGNATURE_BYTES)]
Heads = Annotated[tuple[bytes, ...], _Items(2 + HEAD_BYTES, 128)]  # BE16 position ‖ head, zero where none is known
AllHeads = Annotated[tuple[bytes, ...], _Items(2 + HEAD_BYTES, MOST_HEADS)]


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages. Every one names the study it belongs to."""

    KIND: ClassVar[int]
    study_hash: Bytes32


@dataclass(frozen=True, slots=True)
class SetupRequest(Message):
    """Coordinator -> hospital: begin a session, send your key offer.

    ``heads``: the newest the coordinator keeps of every hospital's ledger, one entry a position.
    """

    KIND: ClassVar[int] = 1
    session: Bytes16
    heads: Heads


@dataclass(frozen=True, slots=True)
class RoundRequest(Message):
    """Coordinator -> hospital: train at state ``round`` (rounds completed) and upload.

    ``total`` is the released ring sum that leads from state round - 1 to state round, over the uploads of ``survivors``; both
    are empty for round 0. The same attempt keeps its nonce, so that a request repeated after a crash is answered with
    identical bytes. ``heads``: every one that a hospital told in this session, and the newest of each ledger; the pads are
    bound to them.
    """

    KIND: ClassVar[int] = 2
    session: Bytes16
    nonce: Bytes16
    attempt: U32
    round: U32
    state_hash: Bytes32
    offers: Offers
    heads: AllHeads
    survivors: Positions
    total: Vector


@dataclass(frozen=True, slots=True)
class StateTransfer(Message):
    """Coordinator -> hospital: a state with the signatures of hospitals that computed it."""

    KIND: ClassVar[int] = 3
    nonce: Bytes16
    round: U32
    state: Vector
    attestations: Attestations


@dataclass(frozen=True, slots=True)
class Finish(Message):
    """Coordinator -> hospital: the last released sum; compute and keep the final model, and sign what is said of it.

    ``heads``: as at the setup. ``statement``: canonical bytes of the privacy statement (docs/privacy_statement.md), under the
    coordinator's signature.
    """

    KIND: ClassVar[int] = 4
    nonce: Bytes16
    round: U32
    state_hash: Bytes32
    heads: Heads
    statement: Document
    statement_signature: Bytes64
    survivors: Positions
    total: Vector


@dataclass(frozen=True, slots=True)
class VoteRequest(Message):
    """Coordinator -> hospital: these uploaded in the attempt, others did not; sign that you will help to open their sum alone."""

    KIND: ClassVar[int] = 5
    session: Bytes16
    nonce: Bytes16
    attempt: U32
    survivors: Positions


@dataclass(frozen=True, slots=True)
class ReleaseRequest(Message):
    """Coordinator -> hospital: release what opens the sum over ``survivors``.

    ``votes``: of survivors, none where the whole cohort uploaded. ``boxes``: those that the other survivors closed for this
    hospital.
    """

    KIND: ClassVar[int] = 6
    session: Bytes16
    nonce: Bytes16
    attempt: U32
    survivors: Positions
    votes: Votes
    boxes: Boxes


@dataclass(frozen=True, slots=True)
class OfferReply(Message):
    """Hospital -> coordinator: a signed key offer, and the highest attempt number this hospital has used.

    ``heads``: one entry a position: of its own ledger the last row, of the peers' the newest it keeps.
    """

    KIND: ClassVar[int] = 16
    session: Bytes16
    position: U16
    highest_attempt: U32
    heads: Heads
    offer: Offer


@dataclass(frozen=True, slots=True)
class Upload(Message):
    """Hospital -> coordinator: one masked vector and this hospital's signature over the state it trained at.

    ``head``: of its ledger, at the row that charged this attempt.
    """

    KIND: ClassVar[int] = 17
    nonce: Bytes16
    position: U16
    attempt: U32
    round: U32
    attestation: Bytes64
    head: HeadBytes
    payload: VectorInPieces


@dataclass(frozen=True, slots=True)
class StateAccepted(Message):
    """Hospital -> coordinator: the transferred state is in place."""

    KIND: ClassVar[int] = 18
    nonce: Bytes16
    position: U16
    round: U32


@dataclass(frozen=True, slots=True)
class Finished(Message):
    """Hospital -> coordinator: what its signed statement (docs/privacy_statement.md) says beyond the study's: its own ledger.

    ``head``: the row that ended the study. ``signature`` covers the whole statement: study, final state, model and the
    coordinator's statement included; ``attestation`` the final state alone, for hospitals that took no part in the last round.
    """

    KIND: ClassVar[int] = 19
    nonce: Bytes16
    position: U16
    round: U32
    attempts_charged: U32
    epsilon_spent_micro: U32
    head: HeadBytes
    signature: Bytes64
    attestation: Bytes64


@dataclass(frozen=True, slots=True)
class Refusal(Message):
    """Hospital -> coordinator: a reason from the fixed list, bound to the request by its nonce or session."""

    KIND: ClassVar[int] = 20
    nonce: Bytes16
    position: U16
    reason: U16


@dataclass(frozen=True, slots=True)
class Vote(Message):
    """Hospital -> coordinator: the one survivor set of this attempt, signed."""

    KIND: ClassVar[int] = 21
    nonce: Bytes16
    position: U16
    attempt: U32
    vote: Bytes64


@dataclass(frozen=True, slots=True)
class Release(Message):
    """Hospital -> coordinator: shares of survivors' self masks, seeds shared with drop-outs; never both of one peer."""

    KIND: ClassVar[int] = 22
    nonce: Bytes16
    position: U16
    attempt: U32
    released: ReleaseBytes


FROM_COORDINATOR: tuple[type[Message], ...] = (
    SetupRequest,
    RoundRequest,
    VoteRequest,
    ReleaseRequest,
    StateTransfer,
    Finish,
)
FROM_HOSPITAL: tuple[type[Message], ...] = (
    OfferReply,
    Upload,
    Vote,
    Release,
    StateAccepted,
    Finished,
    Refusal,
)
_KINDS = {kind.KIND: kind for kind in FROM_COORDINATOR + FROM_HOSPITAL}

MessageT = TypeVar("MessageT", bound=Message)
_Layout = tuple[tuple[str, _Unsigned | _Fixed | _Variable | _Items], ...]


def _layout(kind: type[Message]) -> _Layout:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((field.name, get_args(hints[field.name])[1]) for field in fields(kind))


_LAYOUTS = {kind: _layout(kind) for kind in _KINDS.values()}


def upload_size_bytes(payload_bytes: int) -> int:
    """Length of an ``Upload`` with such a payload, whoever sends it and whatever it holds."""
    return _HEADER_BYTES + sum(_empty_width(rule) for _, rule in _LAYOUTS[Upload]) + payload_bytes + SIGNATURE_BYTES


def release_size_bytes(payload_bytes: int) -> int:
    """Length of a ``Release`` with such a payload."""
    return _HEADER_BYTES + sum(_empty_width(rule) for _, rule in _LAYOUTS[Release]) + payload_bytes + SIGNATURE_BYTES


def _empty_width(rule: _Unsigned | _Fixed | _Variable | _Items) -> int:
    if isinstance(rule, _Unsigned):
        return rule.width
    if isinstance(rule, _Fixed):
        return rule.size
    return 4 if isinstance(rule, _Variable) else 2  # the length or the count


def frame_limit_bytes(vector_limit_bytes: int) -> int:
    """Longest frame that ``decode`` takes with this limit."""
    return vector_limit_bytes + _OVERHEAD_BYTES


def encode(message: Message, identity: Identity) -> bytes:
    """The signed frame of ``message``. A vector is copied once, into the frame."""
    parts: list[bytes | memoryview] = [MAGIC, bytes([VERSION, message.KIND])]
    for name, rule in _LAYOUTS[type(message)]:
        parts += _pack(name, rule, getattr(message, name))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    parts.append(identity.sign(_signed(digest.digest())))
    return b"".join(parts)


def _pack(
    name: str,
    rule: _Unsigned | _Fixed | _Variable | _Items,
    value: int | bytes | memoryview | tuple[bytes, ...],
) -> tuple[bytes | memoryview, ...]:
    if isinstance(rule, _Unsigned) and isinstance(value, int) and 0 <= value < 1 << (8 * rule.width):
        return (value.to_bytes(rule.width, "big"),)
    if isinstance(rule, _Fixed) and isinstance(value, bytes) and len(value) == rule.size:
        return (value,)
    if isinstance(rule, _Variable) and isinstance(value, bytes | memoryview) and _fits(rule, value):
        return len(value).to_bytes(4, "big"), value
    if isinstance(rule, _Variable) and rule.limit is None and isinstance(value, tuple):
        return sum(map(len, value)).to_bytes(4, "big"), *value
    if (
        isinstance(rule, _Items)
        and isinstance(value, tuple)
        and len(value) <= rule.count_limit
        and all(len(item) <= rule.item_limit for item in value)
    ):
        return (len(value).to_bytes(2, "big") + enc(*value),)
    raise LocalProtocolError(103, f"field {name} cannot be sent", "this is a fault of medfed: please report it")


def _fits(rule: _Variable, value: bytes | memoryview) -> bool:
    is_plain = isinstance(value, bytes) or (value.format == "B" and value.contiguous)
    return is_plain and len(value) <= (0xFFFFFFFF if rule.limit is None else rule.limit)


def decode(frame: bytes, *, vector_limit_bytes: int) -> Message:
    """Parse a frame without checking its signature (``check_signature`` does, once the sender is known).

    A vector is a view of ``frame``: whoever keeps it keeps the whole frame.

    Raises ``RemoteProtocolError``: MF-101 length, MF-102 version, MF-103 layout, MF-104 unknown kind.
    """
    if not _HEADER_BYTES + SIGNATURE_BYTES < len(frame) <= frame_limit_bytes(vector_limit_bytes):
        raise RemoteProtocolError(101, f"message of {len(frame)} bytes", "the limit follows from the study")
    if frame[:3] != MAGIC:
        raise RemoteProtocolError(103, "not a medfed message", "refused")
    if frame[3] != VERSION:
        raise RemoteProtocolError(
            102, f"protocol version {frame[3]}, this side speaks {VERSION}", "update the older side"
        )
    kind = _KINDS.get(frame[4])
    if kind is None:
        raise RemoteProtocolError(104, f"message of unknown kind {frame[4]}", "refused")
    reader = _Reader(memoryview(frame)[_HEADER_BYTES:-SIGNATURE_BYTES], vector_limit_bytes)
    values = {name: reader.take(rule) for name, rule in _LAYOUTS[kind]}
    reader.end()
    make: Callable[..., Message] = kind
    return make(**values)


def check_signature(frame: bytes, public: bytes) -> None:
    """Raise MF-110 unless the holder of ``public`` signed this frame."""
    body = memoryview(frame)[:-SIGNATURE_BYTES]
    verify(public, frame[-SIGNATURE_BYTES:], _signed(hashlib.sha256(body).digest()))


def _signed(body_hash: bytes) -> bytes:
    """What the signature is over; ``body_hash``: SHA-256 of the frame up to the signature."""
    return enc(b"medfed/wire/v1", body_hash)


class _Reader:
    """Takes fields off a buffer; every shortage is MF-103."""

    def __init__(self, buffer: memoryview, vector_limit_bytes: int) -> None:
        self._buffer = buffer
        self._at = 0
        self._vector_limit = vector_limit_bytes

    def take(self, rule: _Unsigned | _Fixed | _Variable | _Items) -> int | bytes | memoryview | tuple[bytes, ...]:
        if isinstance(rule, _Unsigned):
            return self._integer(rule.width)
        if isinstance(rule, _Fixed):
            return self._bytes(rule.size)
        if isinstance(rule, _Variable):
            return self._vector() if rule.limit is None else self._string(rule.limit)
        count = self._integer(2)
        if count > rule.count_limit:
            raise _malformed()
        return tuple(self._string(rule.item_limit) for _ in range(count))

    def end(self) -> None:
        if self._at != len(self._buffer):
            raise _malformed()

    def _integer(self, width: int) -> int:
        return int.from_bytes(self._bytes(width), "big")

    def _string(self, limit: int) -> bytes:
        size = self._integer(4)
        if size > limit:
            raise _malformed()
        return self._bytes(size)

    def _vector(self) -> memoryview:
        size = self._integer(4)
        if size > self._vector_limit:
            raise _malformed()
        return self._view(size)

    def _bytes(self, size: int) -> bytes:
        return bytes(self._view(size))

    def _view(self, size: int) -> memoryview:
        if size > len(self._buffer) - self._at:
            raise _malformed()
        taken = self._buffer[self._at : self._at + size]
        self._at += size
        return taken


def _malformed() -> RemoteProtocolError:
    return RemoteProtocolError(103, "message malformed", "refused; both sides need the same medfed")


def expect(message: Message, kind: type[MessageT]) -> MessageT:
    """``message`` as a ``kind``, else MF-104."""
    if not isinstance(message, kind):
        raise RemoteProtocolError(104, f"{type(message).__name__} instead of {kind.__name__}", "refused")
    return message


def pack_positions(positions: Iterable[int]) -> bytes:
    """``Positions`` as they travel."""
    return b"".join(position.to_bytes(2, "big") for position in positions)


def read_positions(data: bytes) -> tuple[int, ...]:
    """``Positions``, strictly ascending; MF-103 if they are not."""
    found = tuple(int.from_bytes(data[start : start + 2], "big") for start in range(0, len(data), 2))
    if len(data) % 2 or list(found) != sorted(set(found)):
        raise _malformed()
    return found


def one_piece(vector: bytes | memoryview | Pieces) -> bytes | memoryview:
    """A ``VectorInPieces`` as it is once it was read."""
    return b"".join(vector) if isinstance(vector, tuple) else vector


def numbered(items: Iterable[tuple[int, bytes]]) -> tuple[bytes, ...]:
    """``Votes`` or ``Boxes`` as they travel: BE16 position ‖ bytes."""
    return tuple(position.to_bytes(2, "big") + data for position, data in items)


def read_numbered(items: tuple[bytes, ...], size: int) -> tuple[tuple[int, bytes], ...]:
    """``Votes`` or ``Boxes`` of ``size`` bytes each; MF-103 for another length."""
    if any(len(item) != 2 + size for item in items):
        raise _malformed()
    return tuple((int.from_bytes(item[:2], "big"), item[2:]) for item in items)


def state_statement(study_hash: bytes, completed_rounds: int, state_hash: bytes) -> bytes:
    """What a hospital signs to say: after ``completed_rounds`` rounds I computed this state."""
    return enc(b"medfed/state/v1", study_hash, completed_rounds.to_bytes(4, "big"), state_hash)
