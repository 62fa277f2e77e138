"""The process in which the coordinator's training logic runs as a Flower ServerApp: ``python -m`` this module.

Flower stops a run by sending SIGINT to the process that executes it, so the SuperLink itself must not be it. The
parent writes one line of JSON to standard input and keeps it open: no secret is on a command line or in the
environment, and when the parent dies, in whatever way, the end of that input ends the child. (Left alive, it would
knock at the next server's door with a token of the last.)
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
from pydantic import BaseModel, ConfigDict

from medfed.flower import FIELD, RECORD, hush

# isort: split
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from medfed.errors import ExitStatus, MedfedError, RemoteProtocolError
from medfed.flower_pieces import FRAMES_LIMIT_BYTES, Incoming, cut
from medfed.process import Collector, give_large_memory_back
from medfed.server.exchange import Exchange
from medfed.server.link.grid import make_server_app, payload_of

hush()
log = logging.getLogger("medfed.server.link")

STDIN = 0


class Orders(BaseModel):
    """What the parent tells the child."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    admin: str
    """``host:port`` of the SuperLink's administrative port."""
    token: str
    node_ids: dict[str, int]
    """Flower's node id by position; JSON keys are text."""
    task: str
    """``module:function`` of installed code, called with an ``Exchange`` and ``config_path``."""
    config_path: str
    frame_bytes: int = FRAMES_LIMIT_BYTES
    """Longest frame of a hospital: it follows from the study."""


class RunGrid(HttpGrid):  # type: ignore[misc]
    """Flower's grid, except that one hospital can neither block nor break the reading of the others' replies.

    Flower shows a reply before its objects are stored and then waits for them, up to two hours; and it lets an
    exception over one reply's content out of the loop over all. Here a reply is taken up again at the next call until
    its frame is there, and one that cannot be read becomes an error message. In the other direction a hospital may
    confirm a message, and so delete its objects, before all of them are pushed: Flower's own pushing fails then.

    Of frames in pieces at most one is in memory: it is fetched when the hospital has stored the last of it, and nothing
    else is returned with it. What has been fetched is confirmed, and so deleted at the SuperLink, at once.
    """

    def __init__(self, admin: str, token: str, frame_bytes: int = FRAMES_LIMIT_BYTES) -> None:
        super().__init__(admin, insecure=True, token=token)
        self._frame_bytes = frame_bytes
        self._collector = Collector()
        self._unfinished: dict[str, tuple[MessageProto, Incoming | None]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        protos, trees = [], []
        objects: dict[str, InflatableObject] = {}
        contents: dict[int, RecordDict] = {}  # one frame for all hospitals is cut and hashed once
        with no_object_id_recompute():
            for message in messages:
                frame = payload_of(message) or b""
                if id(frame) not in contents:
                    contents[id(frame)] = cut(frame)
                message.content = contents[id(frame)]
                message.metadata.__dict__["_message_id"] = message.object_id
                protos.append(message_to_proto(remove_content_from_message(message)))
                trees.append(get_object_tree(message))
                objects.update(get_all_nested_objects(message))
            request = PushAppMessagesRequest(messages_list=protos, message_object_trees=trees)
            pushed = self._runtime_client.PushMessages(request)
            wanted = set(pushed.objects_to_push)
            # the records first and in order: they are what hospitals wait for
            for name in sorted(wanted & objects.keys(), key=list(objects).index):
                part = PushObjectRequest(
                    node=self.node,
                    run_id=self.run.run_id,
                    session_id=pushed.session_id,
                    object_id=name,
                    object_content=objects[name].deflate(),
                )
                self._runtime_client.PushObject(part)  # stored, or no longer wanted
        if len(objects) > 2 * len(protos) + 1:  # pieces were sent: garbage in circles
            self._collector.collect()
        ids: list[str] = list(pushed.message_ids)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [i for i in message_ids if i not in self._unfinished]
        if asked:
            pulled = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
            for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                self._unfinished[proto.metadata.reply_to_message_id] = (proto, self._incoming(proto, tree))
        return self._short_replies() or self._long_reply()

    def _incoming(self, proto: MessageProto, tree: ObjectTree) -> Incoming | None:
        """Where the reply's frame will arrive; None for one that has no readable content."""
        if message_from_proto(proto).has_error():
            return None
        try:
            return Incoming(tree, self._frame_bytes)
        except RemoteProtocolError as error:
            log.warning("a reply could not be read: %s", error)
            return None

    def _short_replies(self) -> list[Message]:
        short = [i for i, (_, incoming) in self._unfinished.items() if incoming is None or incoming.is_one]
        return [reply for i in short if (reply := self._finish(i)) is not None]

    def _long_reply(self) -> list[Message]:
        """The next frame in pieces that has come completely, if it is its turn: one is looked at in each call."""
        for message_id in list(self._unfinished)[:1]:
            proto, incoming = self._unfinished.pop(message_id)
            self._unfinished[message_id] = (proto, incoming)  # the last in turn now
            if incoming is not None and self._is_stored(incoming.root):
                reply = self._finish(message_id)
                self._collector.collect()  # its pieces are garbage in circles
                return [] if reply is None else [reply]
        return []

    def _is_stored(self, name: str) -> bool:
        try:
            return self._object(name) is not None
        except LookupError:  # deleted: the reading will say so
            return True

    def _finish(self, message_id: str) -> Message | None:
        """The reply if it is all there. Its metadata are the store's, which knows who answered what."""
        proto, incoming = self._unfinished[message_id]
        message = message_from_proto(proto)
        try:
            if not message.has_error():
                frame = self._frame(incoming)
                if frame is None:
                    return None
                message.content = RecordDict({RECORD: ConfigRecord({FIELD: frame})})
        except httpx.HTTPError:
            raise
        except Exception as error:  # whatever a hospital's bytes can raise in Flower's parsers
            log.warning("a reply could not be read: %s", type(error).__name__)
            message.__dict__.update(_content=None, _error=Error(ErrorCode.UNKNOWN, "malformed"))
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.node, run_id=self.run.run_id, message_object_id=proto.metadata.message_id
            )
        )
        del self._unfinished[message_id]
        return message

    def _frame(self, incoming: Incoming | None) -> bytes | None:
        """The frame of a reply, None while it is on its way."""
        if incoming is None:
            raise ValueError
        frame = incoming.take(self._object)
        if frame is None and not incoming.is_one:
            raise LookupError  # a hospital stores the pieces before the message's own object
        return frame

    def _object(self, name: str) -> bytes | None:
        """One object's content, None while it is on its way; LookupError if there is none of this name."""
        request = PullObjectRequest(node=self.node, run_id=self.run.run_id, object_id=name)
        got = self._runtime_client.PullObject(request)
        if not got.object_found:
            raise LookupError
        content: bytes = got.object_content
        return content if got.object_available else None


def run(orders: Orders) -> None:
    """Take the task, run it, report its end to Flower. Lets through what the task raises."""
    give_large_memory_back()
    grid = RunGrid(orders.admin, orders.token, orders.frame_bytes)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    heartbeat.start()
    status = "failed"
    try:
        task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        flower_run, context = run_from_proto(task.run), context_from_proto(task.context)
        grid.set_run(flower_run)
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, flower_run.run_id
        TaskIdentity.node_id = context.node_id
        train = _load(orders.task)
        node_ids = {int(position): node_id for position, node_id in orders.node_ids.items()}
        make_server_app(lambda exchange: train(exchange, Path(orders.config_path)), node_ids)(grid, context)
        status = "completed"
    finally:
        _report(grid, status)
        heartbeat.stop()
        grid.close()


def _report(grid: RunGrid, status: str) -> None:
    try:
        grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
    except (httpx.HTTPError, RunNotRunningException) as error:  # a stopped run takes no output
        log.debug("task output not taken: %s", type(error).__name__)


def _load(reference: str) -> Callable[[Exchange, Path], None]:
    module, _, name = reference.partition(":")
    task: Callable[[Exchange, Path], None] = getattr(importlib.import_module(module), name)
    return task


def _read_orders() -> Orders:
    """One line of standard input, unbuffered: a buffered reader's lock would block the interpreter's end."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(STDIN, 65536)
        if not piece:
            raise SystemExit(ExitStatus.ENVIRONMENT)
        line += piece
    return Orders.model_validate_json(line)


def _end_with_parent() -> None:
    while os.read(STDIN, 1):
        pass
    os._exit(ExitStatus.ENVIRONMENT)


def _on_signal(number: int, frame: FrameType | None) -> NoReturn:
    # once: a terminal's Ctrl-C arrives here and, through the parent, a second time
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Exit status: that of the error the task raised, 130 when stopped, 0 when the task returned."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    hush()
    try:
        orders = _read_orders()
        threading.Thread(target=_end_with_parent, daemon=True).start()
        run(orders)
    except MedfedError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    except (KeyboardInterrupt, RunNotRunningException):
        return ExitStatus.INTERRUPTED
    except Exception as error:
        log.debug("internal error", exc_info=True)
        sys.stderr.write(f"MF-900 internal error ({type(error).__name__}): start again; report it if it stays\n")
        return ExitStatus.INTEGRITY
    return ExitStatus.HANDLED


if __name__ == "__main__":
    sys.exit(main())
