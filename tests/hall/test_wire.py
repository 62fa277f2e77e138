"""Everything that travels: frames read back as sent, and nothing a stranger sends does more than be refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed import wire
from medfed.errors import LocalProtocolError, MedfedError, RemoteProtocolError
from medfed.identity import Identity, verify
from medfed.wire import (
    FROM_COORDINATOR,
    FROM_HOSPITAL,
    Finish,
    Finished,
    Message,
    OfferReply,
    Refusal,
    Refused,
    Release,
    ReleaseRequest,
    RoundRequest,
    SetupRequest,
    StateAccepted,
    StateTransfer,
    Upload,
    Vote,
    VoteRequest,
    check_signature,
    decode,
    enc,
    encode,
    expect,
    state_statement,
    upload_size_bytes,
)

LIMIT = 4096
IDENTITY = Identity.from_seed(bytes(31) + b"\1")
OTHER = Identity.from_seed(bytes(31) + b"\2")

h16, h32, h64, h104 = bytes(range(16)), bytes(range(32)), bytes(range(64)), bytes(range(104))
HEADS = (b"\0\0" + h104, b"\0\1" + bytes(104))
EXAMPLES: dict[str, Message] = {
    "setup": SetupRequest(h32, h16, HEADS),
    "round": RoundRequest(
        h32, h16, h16[::-1], 7, 3, h32[::-1], (b"offer 0", b"", b"offer two"), HEADS, b"\0\1\0\2", b"\1\2\3\4"
    ),
    "vote request": VoteRequest(h32, h16, h16[::-1], 7, b"\0\1\0\2"),
    "release request": ReleaseRequest(h32, h16, h16[::-1], 7, b"\0\1\0\2", (b"\0\1" + h64,), (b"\0\2" + bytes(48),)),
    "transfer": StateTransfer(h32, h16, 9, b"state", (b"\0\1" + h64, b"\0\2" + h64)),
    "finish": Finish(h32, h16, 10, h32, HEADS, b"statement", h64, b"\0\1", b"total"),
    "offer": OfferReply(h32, h16, 2, 4, HEADS, b"signed offer"),
    "upload": Upload(h32, h16, 1, 5, 2, h64, h104, b"\xff" * 12),
    "vote": Vote(h32, h16, 1, 7, h64),
    "release": Release(h32, h16, 1, 7, b"shares and seeds"),
    "accepted": StateAccepted(h32, h16, 3, 8),
    "finished": Finished(h32, h16, 0, 10, 9, 1_234_567, h104, h64, h64[::-1]),
    "refusal": Refusal(h32, h16, wire.NO_POSITION, int(Refused.NO_SESSION)),
}

KINDS = {1, 2, 3, 4, 5, 6, *range(16, 23)}
FROZEN_FRAMES = "a9c160b5a286384e4d09d55eff5f4d4df215da6a688a01ae2e56f742a2f464fc"


def open_frame(frame: bytes) -> Message:
    return decode(frame, vector_limit_bytes=LIMIT)


def resigned(body: bytes) -> bytes:
    """``body`` with a signature that is right, so that only the layout can be at fault."""
    return body + IDENTITY.sign(enc(b"medfed/wire/v1", hashlib.sha256(body).digest()))


def refused(code: int, frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        open_frame(frame)
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- there and back

_STRATEGIES: dict[str, st.SearchStrategy[object]] = {
    "study_hash": st.binary(min_size=32, max_size=32),
    "state_hash": st.binary(min_size=32, max_size=32),
    "session": st.binary(min_size=16, max_size=16),
    "nonce": st.binary(min_size=16, max_size=16),
    "attestation": st.binary(min_size=64, max_size=64),
    "position": st.integers(0, 0xFFFF),
    "reason": st.integers(0, 0xFFFF),
    "attempt": st.integers(0, 0xFFFFFFFF),
    "round": st.integers(0, 0xFFFFFFFF),
    "highest_attempt": st.integers(0, 0xFFFFFFFF),
    "head": st.binary(min_size=104, max_size=104),
    "heads": st.lists(st.binary(max_size=106), max_size=128).map(tuple),
    "statement": st.binary(max_size=1000),
    "statement_signature": st.binary(min_size=64, max_size=64),
    "signature": st.binary(min_size=64, max_size=64),
    "attempts_charged": st.integers(0, 0xFFFFFFFF),
    "epsilon_spent_micro": st.integers(0, 0xFFFFFFFF),
    "offer": st.binary(max_size=1024),
    "offers": st.lists(st.binary(max_size=40), max_size=128).map(tuple),
    "attestations": st.lists(st.binary(max_size=66), max_size=128).map(tuple),
    "total": st.binary(max_size=LIMIT),
    "state": st.binary(max_size=LIMIT),
    "payload": st.binary(max_size=LIMIT),
    "survivors": st.binary(max_size=256),
    "votes": st.lists(st.binary(max_size=66), max_size=128).map(tuple),
    "boxes": st.lists(st.binary(max_size=50), max_size=127).map(tuple),
    "vote": st.binary(min_size=64, max_size=64),
    "released": st.binary(max_size=4000),
}


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    return st.builds(kind, *[_STRATEGIES[field.name] for field in dataclasses.fields(kind)])


@settings(max_examples=150, deadline=None)
@given(st.one_of([messages(kind) for kind in FROM_COORDINATOR + FROM_HOSPITAL]))
def test_message_sent_reads_back_the_same(message: Message) -> None:
    frame = encode(message, IDENTITY)
    check_signature(frame, IDENTITY.public)
    assert open_frame(frame) == message
    assert type(open_frame(frame)) is type(message)
    assert encode(open_frame(frame), IDENTITY) == frame


def test_examples_cover_every_kind() -> None:
    assert {type(message) for message in EXAMPLES.values()} == set(FROM_COORDINATOR + FROM_HOSPITAL)
    assert [kind.KIND for kind in FROM_COORDINATOR] == [1, 2, 5, 6, 3, 4]
    assert [kind.KIND for kind in FROM_HOSPITAL] == [16, 17, 21, 22, 18, 19, 20]


def test_frame_of_round_request_is_laid_out_as_documented() -> None:
    """Written from the module's description alone: a second implementation must get the same bytes."""
    body = b"MFW" + bytes([1, 2]) + h32 + h16 + h16[::-1] + struct.pack(">II", 7, 3) + h32[::-1]
    body += struct.pack(">H", 3) + b"".join(struct.pack(">I", len(o)) + o for o in (b"offer 0", b"", b"offer two"))
    body += struct.pack(">H", 2) + b"".join(struct.pack(">I", 106) + head for head in HEADS)
    body += struct.pack(">I", 4) + b"\0\1\0\2"  # the survivors: positions 1 and 2
    body += struct.pack(">I", 4) + b"\1\2\3\4"
    frame = encode(EXAMPLES["round"], IDENTITY)
    assert frame[:-64] == body
    label = b"medfed/wire/v1"
    signed = struct.pack(">I", len(label)) + label + struct.pack(">I", 32) + hashlib.sha256(body).digest()
    verify(IDENTITY.public, frame[-64:], signed)


def test_frame_of_upload_is_laid_out_as_documented() -> None:
    body = (
        b"MFW"
        + bytes([1, 17])
        + h32
        + h16
        + struct.pack(">HII", 1, 5, 2)
        + h64
        + h104
        + struct.pack(">I", 12)
        + b"\xff" * 12
    )
    assert encode(EXAMPLES["upload"], IDENTITY)[:-64] == body


def test_frame_of_release_request_is_laid_out_as_documented() -> None:
    body = b"MFW" + bytes([1, 6]) + h32 + h16 + h16[::-1] + struct.pack(">I", 7)
    body += struct.pack(">I", 4) + b"\0\1\0\2"
    body += struct.pack(">HI", 1, 66) + b"\0\1" + h64
    body += struct.pack(">HI", 1, 50) + b"\0\2" + bytes(48)
    assert encode(EXAMPLES["release request"], IDENTITY)[:-64] == body


def test_frames_of_every_kind_are_the_ones_published() -> None:
    """A change of this hash is a change of the protocol: raise VERSION."""
    frames = [encode(EXAMPLES[name], IDENTITY) for name in sorted(EXAMPLES)]
    assert wire.VERSION == 1
    assert hashlib.sha256(enc(*frames)).hexdigest() == FROZEN_FRAMES


# -------------------------------------------------------------------------------------------------------- signatures


def test_signature_covers_every_bit_of_a_frame() -> None:
    frame = encode(EXAMPLES["setup"], IDENTITY)
    check_signature(frame, IDENTITY.public)
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError) as caught:
            check_signature(bytes(flipped), IDENTITY.public)
        assert caught.value.code == 110


@pytest.mark.parametrize("name", EXAMPLES)
def test_signature_covers_every_byte_of_every_kind(name: str) -> None:
    frame = encode(EXAMPLES[name], IDENTITY)
    for place in range(len(frame)):
        flipped = frame[:place] + bytes([frame[place] ^ 0x40]) + frame[place + 1 :]
        with pytest.raises(RemoteProtocolError, match="MF-110"):
            check_signature(flipped, IDENTITY.public)


@pytest.mark.parametrize("public", [OTHER.public, bytes(32), b"", b"\1" * 31, b"\xff" * 33])
def test_signature_of_another_key_is_refused(public: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="MF-110"):
        check_signature(encode(EXAMPLES["setup"], IDENTITY), public)


def test_signature_over_a_statement_is_none_over_a_frame() -> None:
    """No label is shared: a hospital that signs a state signs no message with it."""
    body = encode(EXAMPLES["accepted"], IDENTITY)[:-64]
    for signed in (body, hashlib.sha256(body).digest(), enc(b"medfed/state/v1", hashlib.sha256(body).digest())):
        with pytest.raises(RemoteProtocolError, match="MF-110"):
            check_signature(body + IDENTITY.sign(signed), IDENTITY.public)


# -------------------------------------------------------------------------------------------------------- bad frames


@pytest.mark.parametrize("size", [0, 1, 5, 64, 69, LIMIT + (1 << 21) + 1])
def test_frame_of_a_wrong_length_is_refused(size: int) -> None:
    refused(101, (b"MFW\1\1" + bytes(size))[:size])


def test_frame_of_another_program_is_refused() -> None:
    refused(103, b"GET" + encode(EXAMPLES["setup"], IDENTITY)[3:])


@pytest.mark.parametrize("version", [0, 2, 3, 255])
def test_frame_of_another_version_is_refused(version: int) -> None:
    frame = bytearray(encode(EXAMPLES["setup"], IDENTITY))
    frame[3] = version
    refused(102, resigned(bytes(frame[:-64])))


def test_frame_of_an_unknown_kind_is_refused() -> None:
    frame = bytearray(encode(EXAMPLES["setup"], IDENTITY))
    for kind in set(range(256)) - KINDS:
        frame[4] = kind
        refused(104, bytes(frame))


@pytest.mark.parametrize("name", EXAMPLES)
def test_frame_cut_anywhere_or_with_a_byte_over_is_refused(name: str) -> None:
    body = encode(EXAMPLES[name], IDENTITY)[:-64]
    for size in range(6, len(body)):
        refused(103, resigned(body[:size]))
    refused(103, resigned(body + b"\0"))
    refused(103, resigned(body[:40] + b"\0" + body[40:]))


@pytest.mark.parametrize("size", [LIMIT + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_vector_longer_than_the_study_allows_is_refused(size: int) -> None:
    body = encode(Finish(h32, h16, 1, h32, (), b"", h64, b"", b""), IDENTITY)[:-68]
    refused(103, resigned(body + struct.pack(">I", size) + bytes(min(size, LIMIT + 1))))


def test_vector_at_the_limit_is_taken() -> None:
    """The positive control of the bound."""
    message = Finish(h32, h16, 1, h32, (), b"", h64, b"", bytes(LIMIT))
    assert open_frame(encode(message, IDENTITY)) == message


@pytest.mark.parametrize("count", [129, 1000, 0xFFFF])
def test_list_of_too_many_items_is_refused(count: int) -> None:
    body = encode(StateTransfer(h32, h16, 1, b"", ()), IDENTITY)[:-66]
    refused(103, resigned(body + struct.pack(">H", count) + struct.pack(">I", 0) * count))


def test_list_item_that_is_too_long_is_refused() -> None:
    body = encode(StateTransfer(h32, h16, 1, b"", ()), IDENTITY)[:-66]
    item = bytes(67)
    refused(103, resigned(body + struct.pack(">H", 1) + struct.pack(">I", len(item)) + item))


def test_offer_that_is_too_long_is_refused() -> None:
    body = encode(OfferReply(h32, h16, 1, 0, (), b""), IDENTITY)[:-68]
    refused(103, resigned(body + struct.pack(">I", 1025) + bytes(1025)))


@pytest.mark.parametrize(
    "message",
    [
        SetupRequest(h32, h16 + b"\0", ()),
        SetupRequest(h32[:31], h16, ()),
        SetupRequest("x" * 32, h16, ()),  # type: ignore[arg-type]
        SetupRequest(h32, h16, (bytes(107),)),
        SetupRequest(h32, h16, (HEADS[0],) * 4097),
        StateAccepted(h32, h16, 1 << 16, 1),
        StateAccepted(h32, h16, -1, 1),
        StateAccepted(h32, h16, 1.0, 1),  # type: ignore[arg-type]
        StateAccepted(h32, h16, 1, 1 << 32),
        OfferReply(h32, h16, 1, 0, (), bytes(1025)),
        StateTransfer(h32, h16, 1, b"", (b"x",) * 129),
        StateTransfer(h32, h16, 1, b"", (bytes(67),)),
        StateTransfer(h32, h16, 1, b"", [b"x"]),  # type: ignore[arg-type]
    ],
)
def test_message_that_does_not_fit_is_not_sent(message: Message) -> None:
    with pytest.raises(LocalProtocolError, match="MF-103"):
        encode(message, IDENTITY)


# ---------------------------------------------------------------------------------------------------------- mutations

_LENGTHS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\x10\1", b"\xff\xff", b"\0\x81")


def mutate(rng: random.Random, frames: list[bytes]) -> bytes:
    """One to four blind or informed changes of a good frame."""
    frame = bytearray(rng.choice(frames))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(frame) + 1)
        match rng.randrange(7):
            case 0:
                frame[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del frame[at : at + rng.randint(1, 40)]
            case 2:
                frame[at:at] = rng.randbytes(rng.randint(1, 40))
            case 3:
                other = rng.choice(frames)
                frame[at:] = other[rng.randrange(len(other)) :]
            case 4:
                change = rng.choice(_LENGTHS)
                frame[at : at + len(change)] = change
            case 5:
                frame[3:5] = bytes([1, rng.choice(sorted(KINDS))])
            case _:
                frame[at : at + 1] = bytes([frame[at] ^ 1 << rng.randrange(8)]) if at < len(frame) else b""
    return bytes(frame)


def refuse_mutations(count: int, seed: int) -> tuple[int, int]:
    """How many of ``count`` were taken and refused. Any other exception fails the test."""
    rng = random.Random(seed)
    frames = [encode(message, IDENTITY) for message in EXAMPLES.values()]
    taken = 0
    for _ in range(count):
        frame = mutate(rng, frames)
        try:
            message = open_frame(frame)
        except RemoteProtocolError as error:
            assert error.code in {101, 102, 103, 104}
        else:
            taken += 1
            assert encode(message, IDENTITY)[:-64] == frame[:-64]  # one value has one encoding
    return taken, count - taken


def test_mutated_frames_raise_medfed_errors_only() -> None:
    """100 000 generated frames; both outcomes must occur, else the generator tests nothing."""
    taken, turned_away = refuse_mutations(100_000, seed=11)
    assert taken > 5_000
    assert turned_away > 20_000


@pytest.mark.soak
def test_mutated_frames_raise_medfed_errors_only_for_long() -> None:
    for seed in range(100):
        refuse_mutations(100_000, seed)


def test_mutated_frame_never_keeps_its_signature() -> None:
    rng = random.Random(5)
    frames = [encode(message, IDENTITY) for message in EXAMPLES.values()]
    for _ in range(3_000):
        frame = mutate(rng, frames)
        if frame in frames or len(frame) < 70:
            continue
        with pytest.raises(MedfedError):
            check_signature(frame, IDENTITY.public)


def test_hostile_lengths_cost_no_memory() -> None:
    """A frame that promises gigabytes costs no more than the frame itself."""
    rng = random.Random(3)
    frames = [encode(message, IDENTITY) for message in EXAMPLES.values()]
    hostile = [mutate(rng, frames) for _ in range(1_000)]
    for frame in frames:
        hostile += [frame[:at] + b"\xff\xff\xff\xff" + frame[at + 4 :] for at in range(5, len(frame) - 68)]
    tracemalloc.start()
    try:
        for frame in hostile:
            with contextlib.suppress(RemoteProtocolError):
                open_frame(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18, peak


def test_round_request_holds_all_heads_that_128_hospitals_can_keep() -> None:
    """Each may keep another head of every peer, and the coordinator one more; with as many offers, and room for the rest."""
    heads = tuple((number % 128).to_bytes(2, "big") + number.to_bytes(104, "big") for number in range(wire.MOST_HEADS))
    whole = dataclasses.replace(EXAMPLES["round"], heads=heads, offers=(bytes(1024),) * 128, survivors=bytes(256))
    assert open_frame(encode(whole, IDENTITY)) == whole
    with pytest.raises(LocalProtocolError, match="MF-103 field heads"):
        encode(dataclasses.replace(whole, heads=(*heads, heads[0])), IDENTITY)


# ------------------------------------------------------------------------------------------------------- what is told


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_length_of_what_leaves_a_hospital_depends_on_the_study_only(data: st.DataObject) -> None:
    """Two replies of one kind about one study differ in content, never in length."""
    for kind in FROM_HOSPITAL:
        # one head a hospital, known or not; one entry a peer, whatever is in it
        fixed = {"offer": bytes(231), "payload": bytes(116), "heads": HEADS, "released": bytes(2 * 35 + 64)}
        strategies = [
            st.just(fixed[field.name]) if field.name in fixed else _STRATEGIES[field.name]
            for field in dataclasses.fields(kind)
        ]
        first, second = data.draw(st.tuples(st.builds(kind, *strategies), st.builds(kind, *strategies)))
        assert len(encode(first, IDENTITY)) == len(encode(second, OTHER))


def test_hospital_tells_nothing_but_the_listed_fields() -> None:
    """The whole allow-list of what leaves; a new field must be put here by a person who thought about it."""
    told = {kind.__name__: [field.name for field in dataclasses.fields(kind)] for kind in FROM_HOSPITAL}
    assert told == {
        "OfferReply": ["study_hash", "session", "position", "highest_attempt", "heads", "offer"],
        "Upload": ["study_hash", "nonce", "position", "attempt", "round", "attestation", "head", "payload"],
        "Vote": ["study_hash", "nonce", "position", "attempt", "vote"],
        "Release": ["study_hash", "nonce", "position", "attempt", "released"],
        "StateAccepted": ["study_hash", "nonce", "position", "round"],
        "Finished": [
            *("study_hash", "nonce", "position", "round"),
            *("attempts_charged", "epsilon_spent_micro", "head", "signature", "attestation"),
        ],
        "Refusal": ["study_hash", "nonce", "position", "reason"],
    }


def test_message_of_another_kind_is_not_expected() -> None:
    assert expect(EXAMPLES["setup"], SetupRequest) is EXAMPLES["setup"]
    with pytest.raises(RemoteProtocolError, match="MF-104"):
        expect(EXAMPLES["setup"], Finish)


def test_state_statement_binds_study_round_and_state() -> None:
    statements = {
        state_statement(study, completed, state)
        for study in (bytes(32), h32)
        for completed in (0, 1, 1 << 31)
        for state in (bytes(32), h32)
    }
    assert len(statements) == 12
    assert state_statement(h32, 5, bytes(32)) == enc(b"medfed/state/v1", h32, b"\0\0\0\5", bytes(32))


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_encoding_of_parts_is_unambiguous(one: list[bytes], other: list[bytes]) -> None:
    assert (enc(*one) == enc(*other)) == (one == other)


@given(st.binary(max_size=LIMIT))
def test_stated_size_of_an_upload_is_its_length(payload: bytes) -> None:
    assert upload_size_bytes(len(payload)) == len(encode(Upload(h32, h16, 1, 5, 2, h64, h104, payload), IDENTITY))
