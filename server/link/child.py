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

from medfed.flower import OBJECTS_AT_MOST, hush

# isort: split
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, message_from_proto, run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from medfed.errors import ExitStatus, MedfedError
from medfed.server.exchange import Exchange
from medfed.server.link.grid import make_server_app

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


class _UnfinishedReply:
    """A reply whose objects are still on their way from the hospital."""

    def __init__(self, proto: MessageProto, tree: ObjectTree) -> None:
        self.proto = proto
        self.id: str = proto.metadata.message_id
        self.wanted: list[str] = [node.object_id for node in iterate_object_tree(tree)]
        self.contents: dict[str, bytes] = {}


class RunGrid(HttpGrid):  # type: ignore[misc]
    """Flower's grid, except that one hospital can neither block nor break the reading of the others' replies.

    Flower shows a reply before its objects are stored and then waits for them, up to two hours; and it lets an
    exception over one reply's content out of the loop over all. Here a reply is taken up again at the next call until
    it is whole, and one that cannot be read becomes an error message.
    """

    def __init__(self, admin: str, token: str) -> None:
        super().__init__(admin, insecure=True, token=token)
        self._unfinished: dict[str, _UnfinishedReply] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [i for i in message_ids if i not in self._unfinished]
        if asked:
            pulled = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
            for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                self._unfinished[proto.metadata.reply_to_message_id] = _UnfinishedReply(proto, tree)
        return [reply for i in list(self._unfinished) if (reply := self._finish(i)) is not None]

    def _finish(self, message_id: str) -> Message | None:
        reply = self._unfinished[message_id]
        try:
            if len(reply.wanted) > OBJECTS_AT_MOST:
                raise ValueError
            if not self._fetch(reply):
                return None
            whole = inflate_object_from_contents(reply.id, reply.contents)
            if not isinstance(whole, Message):
                raise TypeError
            parts = (whole.content if whole.has_content() else None, whole.error if whole.has_error() else None)
        except httpx.HTTPError:
            raise
        except Exception as error:  # whatever a hospital's bytes can raise in Flower's parsers
            log.warning("a reply could not be read: %s", type(error).__name__)
            parts = (None, Error(ErrorCode.UNKNOWN, "malformed"))
        # the metadata are the store's, which knows what was answered by whom; those in the content are the sender's
        message = message_from_proto(reply.proto)
        message.__dict__["_content"], message.__dict__["_error"] = parts
        del self._unfinished[message_id]
        return message

    def _fetch(self, reply: _UnfinishedReply) -> bool:
        """Read what is there; True once all is."""
        run_id = self.run.run_id
        for object_id in reply.wanted:
            if object_id in reply.contents:
                continue
            request = PullObjectRequest(node=self.node, run_id=run_id, object_id=object_id)
            got = self._runtime_client.PullObject(request)
            if not got.object_found:
                raise LookupError
            if not got.object_available:
                return False
            reply.contents[object_id] = got.object_content
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=reply.id)
        )
        return True


def run(orders: Orders) -> None:
    """Take the task, run it, report its end to Flower. Lets through what the task raises."""
    grid = RunGrid(orders.admin, orders.token)
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
