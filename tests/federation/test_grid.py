"""The exchange over a local grid, and the grid that no hospital can block."""

import gc
import hashlib
import threading
import weakref
from types import SimpleNamespace

import pytest
from medfed_test_federation import until

from medfed.client.node import make_client_app
from medfed.flower import FIELD, RECORD
from medfed.server.exchange import Kind, Reply
from medfed.server.link.child import RunGrid
from medfed.server.link.grid import GridExchange, make_server_app
from medfed.simulations.grid import LocalGrid, run_local

# isort: split
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree


def all_replies(exchange, count: int) -> list[Reply]:
    replies: list[Reply] = []
    until(lambda: replies.extend(exchange.receive()) or len(replies) >= count)
    return sorted(replies, key=lambda reply: reply.position)


@pytest.fixture
def local():
    grids = []

    def make(*handles, workers=2):
        grid = LocalGrid([make_client_app(handle) for handle in handles], workers)
        grids.append(grid)
        return GridExchange(grid, grid.node_ids), grid

    yield make
    for grid in grids:
        grid.close()


def test_exchange_over_a_local_grid_carries_bytes_of_both_kinds(local):
    exchange, _ = local(lambda data: b"0" + data, lambda data: b"1" + data)
    assert exchange.online() == {0, 1}
    payload = bytes(range(256)) * 300
    for kind in Kind:
        for position in (0, 1):
            exchange.send(position, kind, payload, 5.0)
        assert all_replies(exchange, 2) == [Reply(0, b"0" + payload, None), Reply(1, b"1" + payload, None)]
    assert exchange.receive() == []


def test_exchange_names_a_failure_by_its_class_only(local):
    def fail(data: bytes) -> bytes:
        raise LookupError("patient 17")

    exchange, _ = local(fail)
    exchange.send(0, Kind.TRAIN, b"x", 5.0)
    assert all_replies(exchange, 1) == [Reply(0, None, "LookupError")]


def test_local_grid_keeps_no_reply_that_was_taken(local):
    """Of a hundred hospitals' uploads of a large model the grid would otherwise hold all until the next request."""
    _, grid = local(lambda data: data)
    message = Message(RecordDict({RECORD: ConfigRecord({FIELD: b"x"})}), grid.node_ids[0], "train")
    reply = weakref.ref(next(iter(grid.send_and_receive([message], timeout=5.0))))
    gc.collect()
    assert reply() is None


def test_messages_for_one_hospital_are_answered_in_order_one_at_a_time(local):
    seen, inside, overlap = [], threading.Lock(), []

    def handle(data: bytes) -> bytes:
        if not inside.acquire(blocking=False):
            overlap.append(data)
            return data
        threading.Event().wait(0.001)  # long enough for another worker to come in between
        seen.append(data)
        inside.release()
        return data

    exchange, _ = local(handle, workers=4)
    sent = [bytes([i]) for i in range(20)]
    for data in sent:
        exchange.send(0, Kind.QUERY, data, 5.0)
    all_replies(exchange, 20)
    assert seen == sent
    assert overlap == []


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"other": ConfigRecord({"m": b"x"})}),
        RecordDict({"medfed": ConfigRecord({"m": "text"})}),
        RecordDict({"medfed": ConfigRecord({"m": b"x", "more": 1})}),
        RecordDict({"medfed": ConfigRecord({"m": b"x"}), "more": ConfigRecord({})}),
    ],
)
def test_content_of_another_shape_is_malformed_on_both_sides(local, content):
    exchange, grid = local(lambda data: data)
    grid._apps[grid.node_ids[0]] = lambda message, context: Message(content, reply_to=message)
    exchange.send(0, Kind.TRAIN, b"x", 5.0)
    assert all_replies(exchange, 1) == [Reply(0, None, "malformed")]
    (reply,) = grid.send_and_receive([Message(RecordDict(dict(content)), grid.node_ids[0], "train")])
    assert reply.has_content(), "the planted app answers"
    app = make_client_app(lambda data: data)
    with pytest.raises(Exception, match="MF-103"):
        app(Message(content, grid.node_ids[0], "train"), None)


def test_server_app_runs_its_training_in_a_local_grid(local):
    _, grid = local(bytes.upper, bytes.upper)
    got = []

    def train(exchange) -> None:
        for position in exchange.online():
            exchange.send(position, Kind.TRAIN, b"abc", 5.0)
        got.extend(all_replies(exchange, 2))

    run_local(make_server_app(train, grid.node_ids), grid)
    assert got == [Reply(0, b"ABC", None), Reply(1, b"ABC", None)]


class FakeRuntime:
    """Flower's runtime interface as far as RunGrid uses it, holding what hospitals pushed."""

    def __init__(self) -> None:
        self.replies, self.objects, self.confirmed, self.pulled = [], {}, [], []

    def add(self, message_id: str, message: Message, keep=lambda name, data: data) -> None:
        message.metadata.__dict__["_message_id"] = message.object_id
        for name, part in get_all_nested_objects(message).items():
            self.objects[name] = keep(part, part.deflate())
        tree = get_object_tree(message)
        proto = message_to_proto(remove_content_from_message(message))
        proto.metadata.reply_to_message_id = message_id
        self.replies.append((proto, tree))

    def PullMessages(self, request):
        found = [r for r in self.replies if r[0].metadata.reply_to_message_id in request.message_ids]
        self.replies = [r for r in self.replies if r not in found]
        return SimpleNamespace(messages_list=[p for p, _ in found], message_object_trees=[t for _, t in found])

    def PullObject(self, request):
        self.pulled.append(request.object_id)
        content = self.objects.get(request.object_id)
        return SimpleNamespace(
            object_found=request.object_id in self.objects, object_available=content is not None, object_content=content
        )

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def run_grid(monkeypatch, local):
    local()  # sets Flower's task identity, as the child does
    runtime = FakeRuntime()
    monkeypatch.setattr(RunGrid, "_runtime_client", runtime)
    monkeypatch.setattr(RunGrid, "run", SimpleNamespace(run_id=1))
    return RunGrid("127.0.0.1:1", "token", frame_bytes=1 << 20), runtime


def ours(data: bytes) -> Message:
    return Message(RecordDict({"medfed": ConfigRecord({"m": data})}), 7, "train")


def payload(message: Message) -> bytes:
    return message.content["medfed"]["m"]


def test_grid_with_one_unfinished_reply_returns_the_others_and_later_that_one(run_grid):
    grid, runtime = run_grid
    runtime.add("late", ours(b"late"), keep=lambda part, data: None if isinstance(part, ConfigRecord) else data)
    runtime.add("whole", ours(b"whole"))
    assert [payload(m) for m in grid.pull_messages(["late", "whole"])] == [b"whole"]
    assert list(grid.pull_messages(["late"])) == []
    record = ConfigRecord({"m": b"late"})
    runtime.objects[record.object_id] = record.deflate()
    (message,) = grid.pull_messages(["late"])
    assert payload(message) == b"late"
    assert message.metadata.reply_to_message_id == "late"
    assert len(runtime.confirmed) == 2


@pytest.mark.parametrize("content", [b"", b"junk", b"Message  5\x00abcde", b"os.system  1\x00x", bytes(1000)])
def test_grid_with_one_unreadable_reply_makes_it_an_error_and_returns_the_others(run_grid, content):
    grid, runtime = run_grid
    runtime.add("bad", ours(b"bad"), keep=lambda part, data: content)
    runtime.add("good", ours(b"good"))
    replies = {m.metadata.reply_to_message_id: m for m in grid.pull_messages(["bad", "good"])}
    assert replies["bad"].error.reason == "malformed"
    assert payload(replies["good"]) == b"good"


def test_grid_refuses_a_reply_of_many_objects_unseen(run_grid):
    grid, runtime = run_grid
    many = RecordDict({hashlib.sha256(bytes([i])).hexdigest(): ConfigRecord({"i": i}) for i in range(20)})
    runtime.add("many", Message(many, 7, "train"))
    (message,) = grid.pull_messages(["many"])
    assert message.error.reason == "malformed"
    assert runtime.pulled == []


def test_grid_push_survives_a_hospital_that_confirms_before_all_is_pushed(run_grid):
    """A confirmed message's objects are deleted; Flower's own push raises when the rest is not taken."""
    grid, runtime = run_grid
    pushed = []

    def push_messages(request):
        names = [node.object_id for tree in request.message_object_trees for node in iterate_object_tree(tree)]
        return SimpleNamespace(objects_to_push=sorted(names), session_id="s", message_ids=["m"])

    def push_object(request):
        pushed.append(request.object_content)
        return SimpleNamespace(stored=False)

    runtime.PushMessages, runtime.PushObject = push_messages, push_object
    assert grid.push_messages([ours(b"data")]) == ["m"]
    assert len(pushed) == 3
    assert pushed[0] == ConfigRecord({"m": b"data"}).deflate(), "the record, which hospitals wait for, comes first"
