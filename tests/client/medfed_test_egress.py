"""All that leaves a hospital in answer to given requests, taken off the wire, and the names of what differs between two.

The hospital's own node (client/node.py) runs over Flower's fleet interface without a network: each HTTP request that it sends
is kept, with the time at which it left. What differs is named part by part (Flower's metadata, each field of our message);
whatever belongs to no named part is compared as ``rest``, so that no byte escapes.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flwr.app.message.message import Message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from medfed.client.node import Node, NodeSettings
from medfed.flower_pieces import Incoming, cut
from medfed.privacy.secagg.protocol import HEADER_BYTES
from medfed.seams import Seams
from medfed.wire import decode

LIMIT = 1 << 20
_UNREPEATABLE = ("flwr-signature",)  # ECDSA over the time, with randomness of the library's own

COVERED = {
    "words": "an upload's vector itself: clipped, noised, masked",
    "payload signature": "is over the vector",
    "payload tail": "shares of a fresh key, closed under keys that are bound to the heads of ledgers",
    "opening": "of a sum: seeds and signatures that are bound to the heads of ledgers, and shares of other hospitals' keys",
    "head hashes": "of ledgers: rows hold a digest of the patients under the hospital's secret key, and that of vectors",
    "signature": "of the statement: is over a head",
    "frame signature": "is over the whole message",
    "flower.message_id": "the SHA-256 of the objects below it",
    "flower.names": "the SHA-256 of the objects",
}
"""What may differ for another patient, and why that tells nothing beside the vector."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One HTTP request of the node: the call, when it left (seconds after medfed's request was there to be taken), its bytes."""

    call: str
    after_s: float
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Exchange:
    """Everything the node sent from taking one of our requests to being done with it; ``asked``: the request's names."""

    asked: tuple[str, ...]
    sent: tuple[Sent, ...]


def stop_flowers_clock(monkeypatch: pytest.MonkeyPatch, clock: object) -> None:
    """Flower stamps messages by the machine's clock: let it look at ``clock``."""

    def now() -> datetime.datetime:
        return datetime.datetime.fromtimestamp(clock.wall(), datetime.UTC)

    monkeypatch.setattr("flwr.app.message.message.now", now)
    monkeypatch.setattr("flwr.supernode.node_auth_http_interceptor.now", now)


class Coordinator:
    """Flower's fleet interface: hands the node a request, keeps whatever the node sends."""

    def __init__(self, folder: Path, handle: Callable[[bytes], bytes], seams: Seams) -> None:
        self._clock = seams.clock
        settings = NodeSettings(
            server="localhost:8443",
            certificate_authority=folder.parent / "coordinator" / "tls" / "ca.crt",
            node_key=folder / "node.key",
        )
        self._node = Node(settings, handle, dataclasses.replace(seams, network=self))
        self._sent: list[Sent] = []

    def transport(self, tls: object, proxy: str | None) -> httpx.BaseTransport:
        return httpx.MockTransport(self._answer)

    def ask(self, frame: bytes) -> Exchange:
        """What the node sends when ``frame`` lies ready for it."""
        metadata = Metadata(7, "", 1, 2, "", "", self._clock.wall(), 3600.0, "train")
        message = Message(content=cut(frame), metadata=metadata)
        metadata.__dict__["_message_id"] = message.object_id
        self._objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
        self._pulled = PullMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
        )
        self._sent, self._began_s = [], self._clock.monotonic()
        assert self._node._one_message()
        return Exchange(tuple(self._objects), tuple(self._sent))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        call = request.url.path.rpartition("/")[2]
        headers = tuple((name, value) for name, value in request.headers.items() if name not in _UNREPEATABLE)
        self._sent.append(Sent(call, self._clock.monotonic() - self._began_s, headers, request.content))
        body = self._reply(call, request.content).SerializeToString()
        return httpx.Response(200, stream=httpx.ByteStream(body))

    def _reply(self, call: str, body: bytes) -> object:
        if call == "pull-messages":
            return self._pulled
        if call == "pull-object":
            content = self._objects[PullObjectRequest.FromString(body).object_id]
            return PullObjectResponse(object_found=True, object_available=True, object_content=content)
        if call == "push-messages":
            names = _names(PushMessagesRequest.FromString(body).message_object_trees[0])
            return PushMessagesResponse(objects_to_push=names, session_id="session")
        return {"confirm-message-received": ConfirmMessageReceivedResponse, "push-object": PushObjectResponse}[call]()


def _names(tree: ObjectTree) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in _names(child))]


def _pushed(exchange: Exchange) -> PushMessagesRequest:
    return next(PushMessagesRequest.FromString(sent.body) for sent in exchange.sent if sent.call == "push-messages")


def reply_of(exchange: Exchange) -> bytes | None:
    """Our own frame in what left; None where Flower's error was sent instead."""
    pushed = _pushed(exchange)
    objects = [PushObjectRequest.FromString(sent.body) for sent in exchange.sent if sent.call == "push-object"]
    contents = {each.object_id: each.object_content for each in objects}
    if not pushed.message_object_trees[0].children:
        return None
    return Incoming(pushed.message_object_trees[0], LIMIT).take(contents.get)


def parts(exchange: Exchange, vector_bytes: int) -> dict[str, object]:
    """What left, by name; ``rest`` is all of it with the named bytes blanked."""
    pushed = _pushed(exchange)
    proto = pushed.messages_list[0]
    found: dict[str, object] = {
        f"flower.{field.name}": getattr(proto.metadata, field.name) for field in proto.metadata.DESCRIPTOR.fields
    }
    # it repeats the request's name, which is a hash of what the coordinator asked
    found["flower.reply_to_message_id"] = found["flower.reply_to_message_id"] in exchange.asked
    found["flower.names"] = tuple(_names(pushed.message_object_trees[0]))
    found["flower.error"] = (proto.error.code, proto.error.reason)
    frame = reply_of(exchange)
    if frame is not None:
        found |= _fields(frame, vector_bytes)
    found["frames"] = frame is not None
    found["calls"] = tuple(sent.call for sent in exchange.sent)
    found["sizes"] = tuple(len(sent.body) for sent in exchange.sent)
    found["headers"] = tuple(sent.headers for sent in exchange.sent)
    found["times"] = tuple(round(sent.after_s, 6) for sent in exchange.sent)
    known = [value for name in COVERED if name in found for value in _each(found[name])]
    found["rest"] = tuple(_blanked(sent.body, [*known, *exchange.asked]) for sent in exchange.sent)
    return found


def _fields(frame: bytes, vector_bytes: int) -> dict[str, object]:
    """The kind of our message, each of its fields and its signature; an upload's payload and heads of ledgers in their parts."""
    message = decode(frame, vector_limit_bytes=LIMIT)
    named: dict[str, object] = {"kind": type(message).__name__, "frame signature": frame[-64:]}
    heads: list[bytes] = []
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if field.name == "payload":
            payload = bytes(value)
            named["payload head"] = payload[:HEADER_BYTES]
            named["words"] = payload[HEADER_BYTES : HEADER_BYTES + vector_bytes]
            named["payload tail"] = payload[HEADER_BYTES + vector_bytes : -64]
            named["payload signature"] = payload[-64:]
        elif field.name in {"vote", "released"}:
            named["opening"] = value
        elif field.name == "head":
            heads = [bytes(2) + value]
        elif field.name == "heads":
            heads = list(value)
        else:
            named[field.name] = value
    # an item: the position in 2 bytes, the row's number in 8, its hash in 32 and a signature in 64
    named["head numbers"] = tuple(each[:10] for each in heads)
    named["head hashes"] = tuple(each[10:] for each in heads)
    return named


def _each(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _blanked(body: bytes, known: Sequence[object]) -> bytes:
    for value in known:
        text = value.encode() if isinstance(value, str) else value
        if isinstance(text, bytes) and text:
            body = body.replace(text, bytes(len(text)))
    return body


def differing(ours: Sequence[Exchange], theirs: Sequence[Exchange], vector_bytes: int) -> list[set[str]]:
    """For each request, the names of what differs in the two hospitals' answers; the lists must be of one length."""
    found = []
    for one, other in zip(ours, theirs, strict=True):
        left, right = parts(one, vector_bytes), parts(other, vector_bytes)
        found.append({name for name in left.keys() | right.keys() if left.get(name) != right.get(name)})
    return found
