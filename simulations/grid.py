"""An in-process grid: the same ServerApp and ClientApp objects as over TLS, without sockets, Ray or child process."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from medfed.flower import hush

# isort: split
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

hush()
log = logging.getLogger("medfed.simulations")

CLIENT_FAILED = 2  # Flower's code for "the client app raised"
FIRST_NODE_ID = 2  # 1 is the coordinator


class LocalGrid(Grid):  # type: ignore[misc]
    """Runs each message on a thread pool and hands on bytes only, as a network would.

    Records are made anew in both directions, so that the two sides share no object but immutable ones: bytes, text and
    numbers. One client app a hospital, one message a hospital at a time: the real node handles them in order as well.
    """

    def __init__(self, apps: Sequence[ClientApp], workers: int = 2) -> None:
        self.node_ids: Mapping[int, int] = {position: position + FIRST_NODE_ID for position in range(len(apps))}
        """Flower's node id by position in the roster."""
        self._apps = {self.node_ids[position]: app for position, app in enumerate(apps)}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="hospital")
        self._last: dict[int, threading.Event] = {}  # by node: set once its last message is answered
        self._pending: dict[str, Future[Message]] = {}
        self._sequence = itertools.count(1)
        # Message() stamps run and node ids from here
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: object) -> None:
        """Flower's interface; there is one run only."""

    @property
    def run(self) -> object:
        raise NotImplementedError("there is no Flower run in a local grid")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"m{next(self._sequence)}"
            message.metadata.__dict__["_message_id"] = message_id
            node_id = message.metadata.dst_node_id
            before, self._last[node_id] = self._last.get(node_id), threading.Event()
            self._pending[message_id] = self._pool.submit(self._in_turn, message, before, self._last[node_id])
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        done = [i for i in message_ids if i in self._pending and self._pending[i].done()]
        return [self._pending.pop(i).result() for i in done]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        wait([self._pending[i] for i in ids], timeout)
        return self.pull_messages(ids)

    def close(self) -> None:
        """Let the messages under way end, drop those that wait."""
        self._pool.shutdown(cancel_futures=True)

    def _in_turn(self, message: Message, before: threading.Event | None, done: threading.Event) -> Message:
        if before is not None:
            before.wait()  # the pool starts tasks in order, so the one before is running or done: no deadlock
        try:
            return self._answer(message)
        finally:
            done.set()

    def _answer(self, message: Message) -> Message:
        try:
            message.content = _copied(message.content)
            reply = self._apps[message.metadata.dst_node_id](message, _context(message))
            if reply.has_content():
                reply.content = _copied(reply.content)
        except Exception as error:  # the class name only, as the real node: text may hold data
            log.error("internal error (%s) while answering a message", type(error).__name__)
            log.debug("internal error", exc_info=True)
            return Message(Error(CLIENT_FAILED, type(error).__name__), reply_to=message)
        return reply


def _copied(content: RecordDict) -> RecordDict:
    """The same in new records; lists, the one kind of value that can change, are copied."""
    return RecordDict({name: _copied_record(record) for name, record in content.items()})


def _copied_record(record: ConfigRecord) -> ConfigRecord:
    if type(record) is not ConfigRecord:
        raise TypeError("a record that is no config record")
    return ConfigRecord({key: list(value) if isinstance(value, list) else value for key, value in record.items()})


def _context(message: Message) -> Context:
    node_id = message.metadata.dst_node_id
    return Context(run_id=1, node_id=node_id, node_config={}, state=RecordDict(), run_config={})


def run_local(server_app: ServerApp, grid: LocalGrid) -> None:
    """Run the coordinator's app in this thread until it returns; closes the grid."""
    try:
        server_app(grid=grid, context=Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    finally:
        grid.close()
