"""Our exchange of bytes over any Flower grid: the one of a SuperLink or the simulation's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from medfed.flower import FIELD, RECORD, hush

# isort: split
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from medfed.server.exchange import Exchange, Kind, Reply

hush()
log = logging.getLogger("medfed.server.link")

_FAULTS = {
    ErrorCode.MESSAGE_UNAVAILABLE: "expired",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "expired",
    ErrorCode.NODE_UNAVAILABLE: "offline",
}


class GridExchange:
    """``Exchange`` over ``grid``; ``node_ids`` gives Flower's node id by position in the roster."""

    def __init__(self, grid: Grid, node_ids: Mapping[int, int]) -> None:
        self._grid = grid
        self._node_ids = dict(node_ids)
        self._positions = {node_id: position for position, node_id in node_ids.items()}
        self._queue: list[tuple[int, Message]] = []
        self._waiting: dict[str, int] = {}
        self._faults: list[Reply] = []

    def online(self) -> frozenset[int]:
        return frozenset(self._positions[node] for node in self._grid.get_node_ids() if node in self._positions)

    def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
        content = RecordDict({RECORD: ConfigRecord({FIELD: payload})})
        self._queue.append((position, Message(content, self._node_ids[position], kind.value, ttl=timeout_s)))

    def _flush(self) -> None:
        """Push the queue in one call: what is the same for all hospitals goes to the SuperLink once."""
        queue, self._queue = self._queue, []
        ids = list(self._grid.push_messages([message for _, message in queue])) or [None] * len(queue)
        for (position, _), message_id in zip(queue, ids, strict=True):
            if message_id:
                self._waiting[message_id] = position
            else:
                self._faults.append(Reply(position, None, "not accepted"))

    def receive(self) -> list[Reply]:
        if self._queue:
            self._flush()
        replies, self._faults = self._faults, []
        if not self._waiting:
            return replies
        for message in self._grid.pull_messages(list(self._waiting)):
            position = self._waiting.pop(message.metadata.reply_to_message_id, None)
            if position is not None:
                replies.append(_reply(position, message))
        return replies


def _reply(position: int, message: Message) -> Reply:
    if message.has_error():
        fault = _FAULTS.get(message.error.code) or str(message.error.reason)[:80]
        return Reply(position, None, fault)
    payload = payload_of(message)
    return Reply(position, payload, "malformed" if payload is None else None)


def payload_of(message: Message) -> bytes | None:
    """Our bytes, or None for content of any other shape."""
    records = dict(message.content.items())
    record = records.get(RECORD)
    if set(records) != {RECORD} or not isinstance(record, ConfigRecord) or set(record) != {FIELD}:
        return None
    payload: object = record[FIELD]
    return payload if isinstance(payload, bytes) else None


def make_server_app(train: Callable[[Exchange], None], node_ids: Mapping[int, int]) -> ServerApp:
    """A Flower ServerApp whose main is ``train``."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        train(GridExchange(grid, node_ids))

    app.main()(main)
    return app
