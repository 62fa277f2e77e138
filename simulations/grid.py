"""An in-process grid: the same ServerApp and ClientApp objects as over TLS, without sockets, Ray or child process."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Protocol

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


class Meeting(Protocol):
    """What a grid tells of the hospitals that have messages to answer: ``simulations/gathering.py``."""

    most: int
    """Threads to run hospitals on."""

    def came(self, count: int) -> None: ...

    def went(self) -> None: ...

    def turn(self) -> contextlib.AbstractContextManager[None]: ...


class LocalGrid(Grid):  # type: ignore[misc]
    """Runs each message on a thread pool and hands on bytes only, as a network would.

    Records are made anew in both directions, so that the two sides share no object but immutable ones: bytes, text and
    numbers. One client app a hospital, one message a hospital at a time, in order: so does the real node.
    """

    def __init__(self, apps: Sequence[ClientApp], workers: int = 2, meeting: Meeting | None = None) -> None:
        """``workers``: threads. ``meeting``: where hospitals wait for each other; then it says how many threads there are."""
        self.node_ids: Mapping[int, int] = {position: position + FIRST_NODE_ID for position in range(len(apps))}
        """Flower's node id by position in the roster."""
        self._apps = {self.node_ids[position]: app for position, app in enumerate(apps)}
        self._meeting = meeting
        threads = workers if meeting is None else max(1, min(len(apps), meeting.most))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hospital")
        self._lock = threading.Lock()
        self._queues: dict[int, deque[tuple[Message, Future[Message]]]] = defaultdict(deque)
        """By node: its messages that are not answered; the first is under way."""
        self._is_closed = False
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
        ids, idle = [], []
        with self._lock:
            for message in messages:
                message_id = f"m{next(self._sequence)}"
                message.metadata.__dict__["_message_id"] = message_id
                node_id, reply = message.metadata.dst_node_id, Future[Message]()
                if not self._queues[node_id]:
                    idle.append(node_id)
                self._queues[node_id].append((message, reply))
                self._pending[message_id] = reply
                ids.append(message_id)
            if self._meeting is not None:
                self._meeting.came(len(idle))
            for node_id in idle:
                self._pool.submit(self._work, node_id)
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
        with self._lock:
            self._is_closed = True
            for queue in self._queues.values():
                while len(queue) > 1:  # the first may be under way
                    queue.pop()[1].cancel()
        self._pool.shutdown()

    def _work(self, node_id: int) -> None:
        """Answer the first of a hospital's messages; with more to answer, it goes to the end of the line."""
        queue = self._queues[node_id]
        message, reply = queue[0]
        answer: Message | BaseException
        try:
            with self._turn():
                answer = CancelledError() if self._is_closed else self._answer(message)
        except BaseException as error:  # as of a thread that ends
            answer = error
        with self._lock:
            queue.popleft()
            is_idle = not queue
            if not is_idle:
                self._pool.submit(self._work, node_id)
        if is_idle and self._meeting is not None:
            self._meeting.went()
        if isinstance(answer, BaseException):
            reply.set_exception(answer)
        else:
            reply.set_result(answer)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._meeting is None else self._meeting.turn()

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
