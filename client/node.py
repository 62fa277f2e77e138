"""The hospital's side of Flower: a long-lived node that carries bytes between the coordinator and one function.

It never fetches or executes an app bundle: the function is installed code and the same for every run. It owns its
retries, heartbeats and polling, because Flower's may end or signal the process that hosts them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from medfed.flower import FIELD, RECORD, hush

# isort: split
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from medfed.client.channel import GuardedTransport, name_fault, trust
from medfed.client.connection import Connection
from medfed.errors import EnvironmentFault, MedfedError, RemoteProtocolError, TransportError
from medfed.flower_pieces import BODY_LIMIT_BYTES, FRAMES_LIMIT_BYTES, PIECE_BYTES, Incoming, cut
from medfed.process import Collector
from medfed.seams import Files, Seams

hush()
log = logging.getLogger("medfed.client.node")

Request = TypeVar("Request")
Answer = TypeVar("Answer")

HEARTBEAT_S = 10
"""The least Flower takes. A silent node counts as offline after ``RUNS_OUT_S``."""
RUNS_OUT_S = 2 * HEARTBEAT_S
ACTIVATE_WITHIN_S = 2.5 * HEARTBEAT_S
"""Until then a refusal may mean that this hospital's last connection has not run out yet."""
POLL_S, POLL_FAST_S, FAST_FOR_S = 0.2, 0.05, 3.0
RETRY_FROM_S, RETRY_AT_MOST_S = 0.25, 5.0
OBJECT_WITHIN_S = 60.0
CLIENT_FAILED = 2  # Flower's code in replies
TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})


class _RunOver(Exception):
    """The coordinator answers 403: the run is no longer running."""


class _NotActive(Exception):
    """The coordinator answers 401: it does not know this node (any more)."""


class _Stopped(Exception):
    """Someone asked the node to stop."""


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Where the coordinator is and how to reach it, from ``hospital.toml``."""

    server: str
    """``host:port``"""
    certificate_authority: Path
    node_key: Path
    """EC P-384, OpenSSH form, mode 0600."""
    proxy: str | None = None
    """URL of an HTTP proxy; the environment's proxies are never used."""
    once: bool = False
    """Give up (MF-610) if the coordinator cannot be reached at first, instead of waiting for it."""
    limit_bytes: int = FRAMES_LIMIT_BYTES
    """Longest frame of the coordinator: it follows from the approved studies."""


def make_client_app(handle: Callable[[bytes], bytes]) -> ClientApp:
    """A Flower ClientApp that answers every query and train message with ``handle`` of its bytes."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        reply = handle(_payload(message.content))
        return Message(RecordDict({RECORD: ConfigRecord({FIELD: reply})}), reply_to=message)

    app.query()(answer)
    app.train()(answer)
    return app


def _payload(content: RecordDict) -> bytes:
    records = dict(content.items())
    record = records.get(RECORD)
    if set(records) == {RECORD} and isinstance(record, ConfigRecord) and set(record) == {FIELD}:
        payload: object = record[FIELD]
        if isinstance(payload, bytes):
            return payload
    raise RemoteProtocolError(103, "a Flower message does not carry medfed's bytes", "refused; ask the coordinator")


class _Versions:
    """Tells the coordinator our Flower version. Flower's own interceptor would end the process on its word."""

    def __init__(self) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(self._headers)
        response: httpx.Response = call_next(context)
        return response


class _Fleet(FleetHttpClient):  # type: ignore[misc]
    """Flower's client of the fleet interface over our transport.

    Flower's constructor is not called: it follows redirects and reads proxies from the environment.
    """

    def __init__(self, server: str, key: ec.EllipticCurvePrivateKey, transport: httpx.BaseTransport) -> None:
        self._base_url = f"https://{server}"
        self._interceptors = (_Versions(), NodeAuthHttpInterceptor(key, key.public_key()))
        self._retry_invoker = None
        timeout = httpx.Timeout(60.0, connect=10.0)
        self._client = httpx.Client(transport=transport, timeout=timeout, follow_redirects=False, trust_env=False)


def load_node_key(files: Files, path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the node key; MF-210 if others can read the file, MF-211 if it is no EC P-384 key in OpenSSH form."""
    try:
        key = load_ssh_private_key(files.read_private(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EnvironmentFault(211, f"{path.name} is not a usable private key", "restore it from backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise EnvironmentFault(211, f"{path.name} is not of curve P-384", "restore it from backup")
    return key


def _refusal(error: Exception, server: str) -> TransportError:
    """Why the coordinator did not let this node in; Flower does not tell an unknown key from one in use."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 404:
        return TransportError(610, f"there is no medfed coordinator at {server}", "check the address")
    return TransportError(
        616, "the coordinator does not take this node key", "is this hospital enrolled, is this machine's clock right?"
    )


class Node:
    """One hospital's connection. ``run_forever`` blocks; all else is internal."""

    def __init__(
        self,
        settings: NodeSettings,
        handle: Callable[[bytes], bytes],
        seams: Seams,
        connection: Connection | None = None,
    ) -> None:
        """Read key and authority. Raises ``EnvironmentFault`` (MF-210, MF-211, MF-606); connects to nothing.

        ``connection`` is told whether the coordinator answers this node.
        """
        self._connection = connection or Connection(seams.clock)
        key = load_node_key(seams.files, settings.node_key)
        self._public_key: bytes = public_key_to_bytes(key.public_key())
        tls = trust(seams.files, settings.certificate_authority)
        try:
            inner = seams.network.transport(tls, settings.proxy)
        except ValueError as error:
            raise TransportError(613, "the proxy's address is not a URL", "write http://host:port") from error
        self._fleet = _Fleet(settings.server, key, GuardedTransport(inner, BODY_LIMIT_BYTES))
        self._app = make_client_app(handle)
        self._settings = settings
        self._clock, self._entropy = seams.clock, seams.entropy
        self._node = NodeProto()
        self._was_active = False
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._collector = Collector()

    def run_forever(self, stop: threading.Event) -> None:
        """Connect, answer messages, connect again whenever needed, until ``stop``; sets ``stop`` when it ends.

        Before the first connection has worked, what only a person can repair ends it: MF-611 name, MF-612
        certificate, MF-613 proxy, MF-616 key, MF-617 redirect. Afterwards everything is retried.

        Guarantee: a fault in a message or in ``handle`` costs that message only; of an exception nothing but its
        class name goes out.
        """
        self._stop = stop
        heartbeats = threading.Thread(target=self._heartbeats, daemon=True)
        try:
            self._activate()
            heartbeats.start()
            self._serve()
        except _Stopped:
            pass
        finally:
            stop.set()
            self._leave()
            if heartbeats.is_alive():
                heartbeats.join(HEARTBEAT_S)
            self._fleet.close()  # not earlier: a heartbeat may be about to be sent

    def _serve(self) -> None:
        fast_until = 0.0
        while not self._stop.is_set():
            try:
                if self._lost.is_set():
                    raise _NotActive
                if self._one_message():
                    fast_until = self._clock.monotonic() + FAST_FOR_S
                    continue
            except _NotActive:
                self._connection.down("the coordinator does not know this hospital's connection")
                log.warning("the coordinator does not know this hospital's connection: connecting again")
                self._pause(0)
                self._activate()
            except _RunOver:
                log.info("the run is over; message dropped")
            except _Stopped:
                raise
            except Exception as error:  # whatever bytes from outside can raise in Flower's parsers
                log.warning("a message was dropped (%s)", type(error).__name__)
                log.debug("dropped", exc_info=True)
                self._pause(1)
            fast = self._clock.monotonic() < fast_until
            self._clock.sleep(POLL_FAST_S if fast else POLL_S, self._stop)

    def _one_message(self) -> bool:
        """Take one message, answer it; False if there is none."""
        pulled = self._call(self._fleet.PullMessages, PullMessagesRequest(node=self._node))
        if not pulled.messages_list:
            return False
        message = message_from_proto(pulled.messages_list[0])
        run_id: int = message.metadata.run_id
        message.content = self._receive(run_id, pulled.message_object_trees[0])
        confirm = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=message.metadata.message_id
        )
        self._call(self._fleet.ConfirmMessageReceived, confirm)
        is_long = len(_payload(message.content)) > PIECE_BYTES
        if is_long:
            self._collector.collect()  # the pieces' requests are garbage in circles
        reply = self._answer(message)
        del message
        self._send(run_id, reply)
        if is_long:
            self._collector.collect()
        return True

    def _answer(self, message: Message) -> Message:
        context = Context(
            run_id=message.metadata.run_id,
            node_id=self._node.node_id,
            node_config={},
            state=RecordDict(),
            run_config={},
        )
        try:
            return self._app(message, context)
        except MedfedError as error:
            log.warning("%s", error)
            reason = type(error).__name__
        except Exception as error:  # the class name only: an exception's text may hold patients' data
            log.error("internal error (%s) while answering a message", type(error).__name__)
            log.debug("internal error", exc_info=True)
            reason = type(error).__name__
        return Message(Error(CLIENT_FAILED, reason), reply_to=message)

    def _receive(self, run_id: int, tree: ObjectTree) -> RecordDict:
        """The message's frame as one config record, in however many pieces it came (medfed/flower_pieces.py)."""
        frame = Incoming(tree, self._settings.limit_bytes).take(lambda name: self._object(run_id, name))
        return RecordDict({RECORD: ConfigRecord({FIELD: frame})})

    def _object(self, run_id: int, object_id: str) -> bytes:
        """One object; it may become available a little after its message."""
        deadline = self._clock.monotonic() + OBJECT_WITHIN_S
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        while self._clock.monotonic() < deadline:
            got = self._call(self._fleet.PullObject, request)
            if got.object_found and got.object_available:
                content: bytes = got.object_content
                return content
            if not got.object_found:
                break
            self._clock.sleep(POLL_FAST_S, self._stop)
        raise RemoteProtocolError(103, "a part of a Flower message is missing", "dropped; the coordinator sends again")

    def _send(self, run_id: int, reply: Message) -> None:
        if reply.has_content():
            reply.content = cut(_payload(reply.content))
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
            )
            pushed = self._call(self._fleet.PushMessages, request)
            wanted = set(pushed.objects_to_push)
            # in this order: when the message's own object is there, the coordinator knows that all of it is
            for object_id in [each for each in objects if each in wanted]:
                part = PushObjectRequest(
                    node=self._node,
                    run_id=run_id,
                    session_id=pushed.session_id,
                    object_id=object_id,
                    object_content=objects[object_id].deflate(),
                )
                self._call(self._fleet.PushObject, part)

    def _activate(self) -> None:
        """Make this node known; Flower refuses while an earlier connection of the same key has not run out."""
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_S)
        since = self._clock.monotonic()
        refused = False
        while True:
            try:
                self._node = NodeProto(node_id=self._call(self._fleet.ActivateNode, request).node_id)
                break
            except (_NotActive, _RunOver, httpx.HTTPStatusError) as error:
                fault = _refusal(error, self._settings.server)
                self._connection.down(str(fault))
                if not self._was_active and self._clock.monotonic() - since >= ACTIVATE_WITHIN_S:
                    raise fault from error
                if not refused and fault.code == 616:
                    log.warning(
                        "not let in yet: a connection lost before has to run out first, %d s; trying on", RUNS_OUT_S
                    )
                    log.warning("if that lasts: %s", fault)
                elif not refused:
                    log.warning("%s; trying on", fault)
                refused = True
                self._pause(2)
        self._lost.clear()
        self._was_active = True
        self._connection.up()
        log.info("connected to %s", self._settings.server)

    def _call(self, method: Callable[[Request], Answer], request: Request) -> Answer:
        """Call the coordinator; a fault is told once, then retried until it works or someone stops us."""
        tries = 0
        while not self._stop.is_set():
            try:
                answer = method(request)
                if self._was_active:
                    self._connection.up()
                if tries:
                    log.info("the coordinator answers again")
                return answer
            except httpx.TransportError as error:
                fault = name_fault(error, self._settings.server, self._settings.proxy)
            except RemoteProtocolError as error:
                fault = error
            except ValueError as error:
                raise RemoteProtocolError(
                    103, "the coordinator's answer cannot be read", "check the address"
                ) from error
            except httpx.HTTPStatusError as error:
                fault = self._temporary(error)
            self._connection.down(str(fault))
            self._end_if_hopeless(fault)
            if tries == 0:
                log.warning("%s; trying on", fault)
            tries += 1
            self._pause(tries)
        raise _Stopped

    @staticmethod
    def _temporary(error: httpx.HTTPStatusError) -> MedfedError:
        status = error.response.status_code
        if status == 403:
            raise _RunOver from error
        if status == 401:
            raise _NotActive from error
        if status not in TEMPORARY:
            raise error
        return TransportError(610, f"the coordinator answered HTTP {status}", "wait, or ask its operator")

    def _end_if_hopeless(self, fault: MedfedError) -> None:
        """Raise what waiting cannot repair. After a first success every fault may pass, a wrong answer as well."""
        if isinstance(fault, RemoteProtocolError) and fault.code != 617:
            raise fault
        if not self._was_active and (self._settings.once or fault.code != 610):
            raise fault

    def _pause(self, tries: int) -> None:
        """Back off exponentially with jitter, so that hospitals do not return to a restarted server in step."""
        share = int.from_bytes(self._entropy.draw("node/backoff", 4), "big") / (1 << 32)
        pause = min(RETRY_FROM_S * 2 ** min(tries, 10), RETRY_AT_MOST_S)
        self._clock.sleep(pause * (0.5 + share / 2), self._stop)

    def _heartbeats(self) -> None:
        """Background: say that we live, notice when we are forgotten. Never activates by itself."""
        while not self._stop.is_set():
            self._clock.sleep(HEARTBEAT_S * 0.6, self._stop)
            try:
                request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
                if self._stop.is_set():
                    continue
                if self._fleet.SendNodeHeartbeat(request).success:
                    self._connection.up()
                else:
                    self._lost.set()
                    self._connection.down("the coordinator does not know this hospital's connection")
            except (httpx.HTTPError, RemoteProtocolError, ValueError) as error:
                self._connection.down(f"no heartbeat reaches the coordinator ({type(error).__name__})")
                log.debug("heartbeat failed: %s", type(error).__name__)

    def _leave(self) -> None:
        """Say goodbye, once: the coordinator then knows at once, and this key may connect again at once."""
        try:
            if self._was_active:
                self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, RemoteProtocolError, ValueError) as error:
            log.debug("not deactivated: %s", type(error).__name__)
