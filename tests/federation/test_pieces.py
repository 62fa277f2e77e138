"""Long frames: how they are cut into Flower's objects, what is refused on the way in, and a middle-sized model over TLS."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from medfed_test_federation import running, until

from medfed.errors import RemoteProtocolError
from medfed.flower_pieces import BODY_LIMIT_BYTES, PIECE_BYTES, Incoming, Piece, cut
from medfed.seams import system_seams
from medfed.server.link.guard import WholeBody
from medfed.server.link.spool import SLOT_BYTES, SPOOL_FROM_BYTES, SpoolingStore

# isort: split
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

LIMIT = 4 * PIECE_BYTES


def frame_of(size: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def on_the_way(content: RecordDict) -> tuple[ObjectTree, dict[str, bytes]]:
    """A message's tree and its records' contents by name, as Flower holds them."""
    records = get_all_nested_objects(content)
    tree = ObjectTree(object_id="root", children=[get_object_tree(content)])
    return tree, {name: record.deflate() for name, record in records.items()}


def taken(tree: ObjectTree, objects: dict[str, bytes], limit_bytes: int = LIMIT) -> bytes | None:
    return Incoming(tree, limit_bytes).take(objects.get)


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 20_000, 70_000, PIECE_BYTES - 1, PIECE_BYTES])
def test_piece_is_the_config_record_that_flower_makes(size: int) -> None:
    data = frame_of(size)
    piece, flowers = Piece(b"", memoryview(data)), ConfigRecord({"m": data})
    assert piece.deflate() == flowers.deflate()
    assert piece.object_id == flowers.object_id == hashlib.sha256(flowers.deflate()).hexdigest()
    assert ConfigRecord.inflate(piece.deflate())["m"] == data


@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (1, 1),
        (PIECE_BYTES, 1),
        (PIECE_BYTES + 1, 2),
        (2 * PIECE_BYTES, 2),
        (2 * PIECE_BYTES + 1, 3),
        (4 * PIECE_BYTES, 4),
    ],
)
def test_frame_cut_and_put_together_is_the_same(size: int, pieces: int) -> None:
    frame = frame_of(size)
    tree, objects = on_the_way(cut(frame))
    assert len(tree.children[0].children) == pieces
    assert taken(tree, objects) == frame
    assert all(len(content) <= BODY_LIMIT_BYTES for content in objects.values())


def test_equal_pieces_of_one_frame_stay_apart_and_equal_frames_share_all() -> None:
    zeros = bytes(3 * PIECE_BYTES)
    tree, objects = on_the_way(cut(zeros))
    assert len(tree.children[0].children) == 3
    assert taken(tree, objects) == zeros
    assert on_the_way(cut(bytes(3 * PIECE_BYTES)))[0] == tree


def test_frame_whose_pieces_come_late_is_taken_up_where_it_stopped() -> None:
    frame = frame_of(2 * PIECE_BYTES + 5)
    tree, objects = on_the_way(cut(frame))
    names = [leaf.object_id for leaf in tree.children[0].children]
    there: dict[str, bytes] = {}
    asked: list[str] = []

    def pull(name: str) -> bytes | None:
        asked.append(name)
        return there.get(name)

    incoming = Incoming(tree, LIMIT)
    for name in names:
        assert incoming.take(pull) is None
        there[name] = objects[name]
    assert incoming.take(pull) == frame
    assert asked == [names[0], names[0], names[1], names[1], names[2], names[2]]


def refused(code: int, tree: ObjectTree, objects: dict[str, bytes], limit_bytes: int = LIMIT) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        taken(tree, objects, limit_bytes)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def reshaped(contents: list[bytes]) -> tuple[ObjectTree, dict[str, bytes]]:
    """A message whose records have these contents, each under its true name."""
    objects = {hashlib.sha256(content).hexdigest(): content for content in contents}
    leaves = [ObjectTree(object_id=hashlib.sha256(content).hexdigest()) for content in contents]
    return ObjectTree(object_id="root", children=[ObjectTree(object_id="dict", children=leaves)]), objects


@pytest.fixture(scope="module")
def three() -> list[bytes]:
    """The records of a frame of three pieces, in order."""
    tree, objects = on_the_way(cut(frame_of(2 * PIECE_BYTES + 500)))
    return [objects[leaf.object_id] for leaf in tree.children[0].children]


def record(head: bytes, body: bytes) -> bytes:
    return Piece(head, memoryview(body)).deflate()


def test_pieces_as_they_were_cut_are_taken(three) -> None:
    """The positive control of all that follow."""
    assert len(taken(*reshaped(three))) == 2 * PIECE_BYTES + 500


HEAD = b"MFP\x01\x00"


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("the last is missing", lambda a, b, c: [a, b]),
        ("the first is missing", lambda a, b, c: [b, c]),
        ("reordered", lambda a, b, c: [b, a, c]),
        ("doubled", lambda a, b, c: [a, a, c]),
        ("one more", lambda a, b, c: [a, b, c, c]),
        ("a piece of a frame of four", lambda a, b, c: [a, record(HEAD + b"\1\0\4", bytes(PIECE_BYTES)), c]),
        ("a short piece inside", lambda a, b, c: [a, record(HEAD + b"\1\0\3", bytes(PIECE_BYTES - 1)), c]),
        ("a long piece inside", lambda a, b, c: [a, record(HEAD + b"\1\0\3", bytes(PIECE_BYTES + 1)), c]),
        ("an empty last piece", lambda a, b, c: [a, b, record(HEAD + b"\2\0\3", b"")]),
        ("a long last piece", lambda a, b, c: [a, b, record(HEAD + b"\2\0\3", bytes(PIECE_BYTES + 1))]),
        ("another mark", lambda a, b, c: [a, record(b"MFW\x01\x00\1\0\3", bytes(PIECE_BYTES)), c]),
        ("no head", lambda a, b, c: [a, record(b"", b"MFP"), c]),
        ("a single frame beyond a piece", lambda a, b, c: [record(b"", bytes(PIECE_BYTES + 1))]),
        ("a text in the record", lambda a, b, c: [ConfigRecord({"m": "text"}).deflate()]),
        ("two entries", lambda a, b, c: [ConfigRecord({"m": b"x", "n": b"y"}).deflate()]),
        ("another key", lambda a, b, c: [ConfigRecord({"n": b"x"}).deflate()]),
        ("another class", lambda a, b, c: [ConfigRecord({"m": b"x"}).deflate().replace(b"Config", b"Metric")]),
        ("a byte over", lambda a, b, c: [ConfigRecord({"m": b"x"}).deflate() + b"\0"]),
        ("nothing at all", lambda a, b, c: [b""]),
    ],
)
def test_records_of_another_shape_are_refused(three, fault: str, change) -> None:
    refused(103, *reshaped(change(*three)))


def test_object_that_is_not_what_its_name_says_is_refused(three) -> None:
    tree, objects = reshaped(three)
    name = tree.children[0].children[1].object_id
    for change in (objects[name][:-1] + bytes([objects[name][-1] ^ 1]), three[0], b""):
        refused(103, tree, objects | {name: change})


@pytest.mark.parametrize("shape", ["none", "two dicts", "no leaves", "deeper"])
def test_tree_of_another_shape_is_refused_before_anything_is_fetched(shape: str) -> None:
    leaf = ObjectTree(object_id="leaf")
    records = ObjectTree(object_id="dict", children=[leaf])
    tree = {
        "none": ObjectTree(object_id="root"),
        "two dicts": ObjectTree(object_id="root", children=[records, records]),
        "no leaves": ObjectTree(object_id="root", children=[ObjectTree(object_id="dict")]),
        "deeper": ObjectTree(
            object_id="root",
            children=[ObjectTree(object_id="dict", children=[ObjectTree(object_id="x", children=[leaf])])],
        ),
    }[shape]
    refused(103, tree, {})


def test_more_pieces_than_the_study_has_a_use_for_are_refused_before_any_is_fetched() -> None:
    tree, objects = on_the_way(cut(frame_of(3 * PIECE_BYTES)))
    assert taken(tree, objects, 3 * PIECE_BYTES) is not None
    refused(101, tree, {}, 2 * PIECE_BYTES)
    refused(101, tree, {}, 1)


def test_refused_pieces_cost_no_more_memory_than_was_taken(three) -> None:
    """The frame is not made room for in advance: a hundred pieces may be promised."""
    promised = [three[0], *(record(HEAD + bytes([i]) + b"\0\x64", b"x") for i in range(1, 100))]
    tree, objects = reshaped(promised)
    tracemalloc.start()
    try:
        refused(103, tree, objects, 100 * PIECE_BYTES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * PIECE_BYTES, peak


# ---------------------------------------------------------------------------------------------------------- the store


@pytest.fixture
def store(tmp_path):
    scratch = system_seams().files.scratch(tmp_path)
    yield SpoolingStore(scratch, 6 * SLOT_BYTES)
    scratch.close()


def message_of(frame: bytes, node: int) -> Message:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(cut(frame), node, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def keep(store: SpoolingStore, message: Message) -> None:
    """What a sender does: register, then push what is missing."""
    objects = get_all_nested_objects(message)
    for name in store.preregister(1, get_object_tree(message)):
        store.put(name, objects[name].deflate())


def read(store: SpoolingStore, message: Message) -> bytes | None:
    return Incoming(get_object_tree(message), LIMIT).take(store.get)


def in_memory(store: SpoolingStore) -> int:
    return sum(len(entry.content) for entry in store.store.values())


def test_store_keeps_pieces_on_disk_and_shares_what_is_equal(store, tmp_path) -> None:
    frame = frame_of(2 * PIECE_BYTES + 7)
    first, second = message_of(frame, 5), message_of(frame, 6)
    keep(store, first)
    assert len(store.preregister(1, get_object_tree(second))) == 1, "only the message itself is new"
    assert read(store, first) == read(store, second) == frame
    assert in_memory(store) < SPOOL_FROM_BYTES
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    store.delete(first.object_id)
    assert read(store, second) == frame, "somebody still needs it"
    store.delete(second.object_id)
    assert len(store) == 0
    assert store.get(first.object_id) is None


def test_store_uses_its_slots_again_and_refuses_more_than_there_are(store) -> None:
    for number in range(4):  # three slots each
        message = message_of(frame_of(3 * PIECE_BYTES, number), 5)
        keep(store, message)
        assert read(store, message) == frame_of(3 * PIECE_BYTES, number)
        store.delete(message.object_id)
    keep(store, message_of(frame_of(3 * PIECE_BYTES, 5), 5))
    keep(store, message_of(frame_of(3 * PIECE_BYTES, 6), 5))
    with pytest.raises(ValueError, match="more than their study needs"):
        keep(store, message_of(frame_of(PIECE_BYTES, 7), 5))
    store.delete_objects_in_run(1)
    assert len(store) == 0
    keep(store, message_of(frame_of(3 * PIECE_BYTES, 8), 5))


def test_store_refuses_a_message_of_more_objects_than_a_frame_has(store) -> None:
    """Short objects are kept in memory: their number must be bounded before any is stored."""
    allowed = message_of(frame_of(6 * PIECE_BYTES), 5)
    store.preregister(1, get_object_tree(allowed))
    before = len(store)
    longer = message_of(frame_of(20 * PIECE_BYTES, 3), 5)
    with pytest.raises(ValueError, match="more objects"):
        store.preregister(1, get_object_tree(longer))
    assert len(store) == before


def test_store_refuses_what_is_not_named_by_its_hash_or_not_announced(store) -> None:
    message = message_of(frame_of(PIECE_BYTES), 5)
    objects = get_all_nested_objects(message)
    name = next(iter(objects))
    content = objects[name].deflate()
    with pytest.raises(Exception, match="not pre-registered"):
        store.put(name, content)
    store.preregister(1, get_object_tree(message))
    for wrong in (content[:-1] + b"\0", content + bytes(SLOT_BYTES)):
        with pytest.raises(ValueError, match="not what it is named"):
            store.put(name, wrong)
    assert store.get(name) == b"", "still on its way"
    store.put(name, content)
    store.put(name, content)
    assert store.get(name) == content


# ---------------------------------------------------------------------------------------------------------- the guard


def asked(limit_bytes: int, events: list[dict]) -> tuple[list[bytes], list[dict]]:
    """What an application behind ``WholeBody`` is given, and what is answered."""
    import asyncio

    given: list[bytes] = []
    answers: list[dict] = []

    async def app(scope, receive, send) -> None:
        event = await receive()
        assert event["more_body"] is False
        given.append(event["body"])
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> dict:
        return events.pop(0) if events else {"type": "http.disconnect"}

    async def send(event) -> None:
        answers.append(event)

    asyncio.run(WholeBody(app, limit_bytes)({"type": "http"}, receive, send))
    return given, answers


def part(body: bytes, *, more: bool) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


def test_body_is_handed_on_in_one_piece() -> None:
    assert asked(10, [part(b"abc", more=True), part(b"", more=True), part(b"de", more=False)]) == ([b"abcde"], [])
    assert asked(10, [{"type": "http.request"}]) == ([b""], [])


def test_body_beyond_the_limit_or_of_a_peer_that_left_never_reaches_the_application() -> None:
    given, answers = asked(4, [part(b"abc", more=True), part(b"de", more=True), part(b"f", more=False)])
    assert given == []
    assert answers[0]["status"] == 413
    assert asked(10, [part(b"abc", more=True)]) == ([], [])


# ------------------------------------------------------------------------------------------------------- over the link


def test_frames_of_several_pieces_travel_over_tls_in_both_directions(place) -> None:
    """1.5 million words up and down, three hospitals with other bytes each: 6 MB in three pieces."""
    size = 6_000_000
    place_limit = BODY_LIMIT_BYTES
    place.limit_bytes = place_limit

    def upload(position: int):
        return lambda data: hashlib.sha256(data).hexdigest().encode()[:40] + frame_of(size, position)

    server = place.serve("long_rounds", hospitals=2, rounds=2, size=size)
    nodes = [place.node(position, upload(position)) for position in range(2)]
    with running(server, *nodes):
        assert server.result() == 0
    result = place.result()
    for number in range(2):
        down = hashlib.sha256(b"round %d" % number + bytes(size)).hexdigest()[:40]
        up = [hashlib.sha256(down.encode() + frame_of(size, position)).hexdigest() for position in range(2)]
        assert result["answers"][number] == [[0, up[0]], [1, up[1]]]


def test_long_frame_beyond_the_study_s_is_dropped_by_the_node_and_the_next_is_answered(place) -> None:
    place.limit_bytes = BODY_LIMIT_BYTES
    seen = []
    server = place.serve("too_long_then_right", size=3 * PIECE_BYTES)
    node = place.node(0, lambda data: seen.append(len(data)) or b"ok", limit_bytes=2 * PIECE_BYTES)
    with running(server, node):
        assert server.result() == 0
    assert seen == [2 * PIECE_BYTES]
    until(lambda: place.result()["answer"] == "ok")
