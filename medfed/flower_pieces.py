"""A frame as Flower's objects: whole where it is short, else in pieces that Flower's store holds and names one by one.

A frame of at most ``PIECE_BYTES`` is one config record with one entry, its bytes. A longer one is cut into pieces of that
size, the last one shorter, each a config record whose bytes are ``"MFP" ‖ version ‖ BE16 index ‖ BE16 count ‖ piece``; the
index keeps equal pieces of one frame apart, and equal frames to several hospitals are the same objects, held once. The
records hang in order below one record dict below one message.

Whoever receives knows this shape and takes no other: as many records as the limit of the study's frames allows, pulled in
order, each one's bytes with the SHA-256 that names it, all pieces full but the last. That a piece belongs to this frame is
for the frame's own signature to say. Flower's parsers are not asked: a record has one encoding only, which is compared.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable

from medfed.flower import FIELD, RECORD

# isort: split
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree

from medfed.errors import RemoteProtocolError

PIECE_BYTES = 2 << 20
BODY_LIMIT_BYTES = PIECE_BYTES + (1 << 20)
"""Largest HTTP body between a hospital and the coordinator: one piece, or a list of names and trees."""
FRAMES_LIMIT_BYTES = 0xFFFF * PIECE_BYTES

_MARK = b"MFP\x01"
_HEAD_BYTES = len(_MARK) + 4


class Piece(ConfigRecord):  # type: ignore[misc]
    """The config record of one piece; made without the five copies that Flower's own encoding takes."""

    def __init__(self, head: bytes, body: memoryview) -> None:
        super().__init__()
        size = len(head) + len(body)
        self.__dict__["_parts"] = (_record_prefix(size), head, body)
        digest = hashlib.sha256()
        for part in self.__dict__["_parts"]:
            digest.update(part)
        self.__dict__["_name"] = digest.hexdigest()

    @property
    def object_id(self) -> str:
        name: str = self.__dict__["_name"]
        return name

    def deflate(self) -> bytes:
        """What Flower would make of ``ConfigRecord({FIELD: head + body})``."""
        return b"".join(self.__dict__["_parts"])


def cut(frame: bytes) -> RecordDict:
    """The content of a Flower message that carries ``frame``; to be pushed, not read."""
    view = memoryview(frame)
    if len(frame) <= PIECE_BYTES:
        return RecordDict({RECORD: Piece(b"", view)})
    starts = range(0, len(frame), PIECE_BYTES)
    count = len(starts).to_bytes(2, "big")
    return RecordDict(
        {
            f"{RECORD}.{index}": Piece(_MARK + index.to_bytes(2, "big") + count, view[start : start + PIECE_BYTES])
            for index, start in enumerate(starts)
        }
    )


class Incoming:
    """A frame on its way in: pulls its records in order, holds what came. Raises ``RemoteProtocolError`` only."""

    def __init__(self, tree: ObjectTree, limit_bytes: int) -> None:
        """``limit_bytes``: the longest frame. Raises MF-103 for a tree of another shape, MF-101 for too many pieces."""
        if len(tree.children) != 1 or not tree.children[0].children:
            raise RemoteProtocolError(103, "a Flower message does not have medfed's shape", "refused; ask the sender")
        leaves = tree.children[0].children
        if len(leaves) > max(1, math.ceil(limit_bytes / PIECE_BYTES)):
            raise RemoteProtocolError(101, f"a message of {len(leaves)} pieces", "the limit follows from the study")
        if any(leaf.children for leaf in leaves):
            raise RemoteProtocolError(103, "a Flower message does not have medfed's shape", "refused; ask the sender")
        self._names: list[str] = [leaf.object_id for leaf in leaves]
        self._root: str = tree.object_id
        self._taken = 0
        self._frame = io.BytesIO()  # grows in place, and gives its bytes away without a copy

    @property
    def is_one(self) -> bool:
        """Whether the frame is short: one record."""
        return len(self._names) == 1

    @property
    def root(self) -> str:
        """The name of the message's own object, which senders push last."""
        return self._root

    def take(self, pull: Callable[[str], bytes | None]) -> bytes | None:
        """The frame, once all of it is there; ``pull`` gives one object's content, None while it is on its way."""
        while self._taken < len(self._names):
            name = self._names[self._taken]
            content = pull(name)
            if content is None:
                return None
            if hashlib.sha256(content).hexdigest() != name:
                raise RemoteProtocolError(103, "a part of a Flower message is not what it is named", "refused")
            self._frame.write(self._body(_read_record(content)))
            self._taken += 1
        return self._frame.getvalue()

    def _body(self, value: memoryview) -> memoryview:
        """The piece in a record's bytes, if it is the one whose turn it is."""
        if self.is_one:
            if len(value) > PIECE_BYTES:
                raise _malformed()
            return value
        index, count = self._taken, len(self._names)
        if value[:_HEAD_BYTES] != _MARK + index.to_bytes(2, "big") + count.to_bytes(2, "big"):
            raise _malformed()
        body = value[_HEAD_BYTES:]
        is_last = index == count - 1
        if not (0 < len(body) <= PIECE_BYTES if is_last else len(body) == PIECE_BYTES):
            raise _malformed()
        return body


def _malformed() -> RemoteProtocolError:
    return RemoteProtocolError(103, "a piece of a message is malformed", "refused; both sides need the same medfed")


# Flower's encoding of ConfigRecord({FIELD: value}): a line of text, a zero byte, then protobuf (field 1 of the record: an
# item; of the item 1: key, 2: value; of the value 6: bytes)


def _record_prefix(size: int) -> bytes:
    """All of the record's encoding that precedes its ``size`` bytes."""
    value = b"\x32" + _varint(size)
    item = b"\x0a" + _varint(len(FIELD)) + FIELD.encode() + b"\x12" + _varint(len(value) + size) + value
    body = b"\x0a" + _varint(len(item) + size) + item
    return b"ConfigRecord  %d\x00" % (len(body) + size) + body


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_OVERHEADS = range(len(_record_prefix(0)), len(_record_prefix(BODY_LIMIT_BYTES)) + 1)


def _read_record(content: bytes) -> memoryview:
    """The bytes in a record, as a view; MF-103 for anything that is not exactly such a record."""
    for overhead in _OVERHEADS:
        size = len(content) - overhead
        if size >= 0 and content.startswith(_record_prefix(size)) and len(_record_prefix(size)) == overhead:
            return memoryview(content)[overhead:]
    raise RemoteProtocolError(103, "a Flower message does not carry medfed's bytes", "refused; ask the sender")
