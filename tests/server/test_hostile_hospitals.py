"""One hospital that lies, refuses, restarts or floods: a study that can do without one goes on, and errors have their names.

Five real hospitals, of which any four make a sum (c = 1). The hostile one is at position 1 and holds its own keys, so that all it
says is signed. Virtual time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable

import pytest
from medfed_test_post import Coordinator, Killed, Post, opened

from medfed.errors import MedfedError
from medfed.privacy.secagg.messages import Offer, upload_signature_input
from medfed.server.exchange import Reply
from medfed.wire import (
    Finish,
    Finished,
    Message,
    OfferReply,
    Refusal,
    Refused,
    ReleaseRequest,
    RoundRequest,
    SetupRequest,
    StateAccepted,
    StateTransfer,
    Upload,
    VoteRequest,
    encode,
)
from medfed.witness import Head, item, signed_bytes

EVERYBODY, ROUNDS = range(5), 3
HONEST = [0, 2, 3, 4]

Warp = Callable[[object, Message, Message], Message | None]


class Line(Post):
    """``cut(position, request)``: lost on its way. ``warp(world, request, reply)``: what hospital 1 says instead."""

    def __init__(self, world, cut=lambda *_: False, warp: Warp = lambda *_: None, hostile: int = 1) -> None:
        super().__init__(world)
        self.cut, self.warp, self.hostile = cut, warp, hostile

    def deliver(self, position: int, payload: bytes) -> list[Reply]:
        if position in self.offline or self.cut(position, opened(payload)):
            return []
        replies = super().deliver(position, payload)
        if position != self.hostile or not replies or not replies[0].payload:
            return replies
        said = self.warp(self.world, opened(payload), opened(replies[0].payload))
        identity = self.world.hospitals[position]._identity
        return replies if said is None else [Reply(position, encode(said, identity), None)]

    def asked(self, kind: type[Message]) -> list[int]:
        return [position for position, _, payload in self.sent if isinstance(opened(payload), kind)]


@pytest.fixture
def five(make_world):
    world = make_world(hospitals=5, drop_outs=1)
    world.start_all()
    return world


def party_state(world):
    return world.hospitals[1]._studies[world.study_hash]._party._state


def claims(attempt: int) -> Warp:
    def warp(world, request, reply):
        return dataclasses.replace(reply, highest_attempt=attempt) if isinstance(reply, OfferReply) else None

    return warp


def small_order_key(world, request, reply):
    if not isinstance(reply, OfferReply):
        return None
    body = Offer(1, b"n" * 32, bytes(32)).encode(party_state(world).config.shared)
    return dataclasses.replace(reply, offer=body + world.hospitals[1]._identity.sign(body))


def resigned(world, upload: Upload, boxes: bytes | None = None, commitment: bytes | None = None) -> Upload:
    payload = bytes(upload.payload)
    start = len(payload) - 64 - 200
    words, said, closed = payload[52 : start - 32], payload[start - 32 : start], payload[start:-64]
    said, closed = commitment or said, boxes or closed
    context = party_state(world).context
    signed = upload_signature_input(context, 1, hashlib.sha256(words).digest(), closed, said)
    signature = world.hospitals[1]._identity.sign(signed)
    return dataclasses.replace(upload, payload=payload[: start - 32] + said + closed + signature)


def broken_boxes(world, request, reply):
    if not isinstance(reply, Upload):
        return None
    boxes = bytearray(bytes(reply.payload)[-64 - 200 : -64])
    for start in range(0, 200, 50):
        boxes[start + 10] ^= 0x55
    return resigned(world, reply, boxes=bytes(boxes))


def wrong_commitment(world, request, reply):
    return resigned(world, reply, commitment=b"x" * 32) if isinstance(reply, Upload) else None


def refuses(kind: type[Message], reason: Refused) -> Warp:
    def warp(world, request, reply):
        if not isinstance(request, kind):
            return None
        nonce = request.session if isinstance(request, SetupRequest) else request.nonce
        return Refusal(world.study_hash, nonce, 1, int(reason))

    return warp


def finishes_with(**fields: object) -> Warp:
    def warp(world, request, reply):
        return dataclasses.replace(reply, **fields) if isinstance(reply, Finished) else None

    return warp


def older_head(world, request, reply):
    """The ledger of a restored backup, told without the lock."""
    if isinstance(request, RoundRequest):
        return Refusal(world.study_hash, request.nonce, 1, int(Refused.NO_SESSION))
    if not isinstance(reply, OfferReply):
        return None
    world.told = getattr(world, "told", 11) - 1
    identity, hashed = world.hospitals[1]._identity, b"h" * 32
    heads = list(reply.heads)
    heads[1] = item(1, Head(world.told, hashed, identity.sign(signed_bytes(world.told, hashed))))
    return dataclasses.replace(reply, heads=tuple(heads))


def floods(world, request, reply):
    if isinstance(request, RoundRequest) and request.round >= 1:
        return Refusal(world.study_hash, request.nonce, 1, int(Refused.NEED_STATE))
    if isinstance(request, StateTransfer):
        return StateAccepted(world.study_hash, request.nonce, 1, request.round)
    return None


HOSTILE = {
    "claims all attempts": claims(5),
    "claims all but one": claims(4),
    "claims more than there are": claims(4_000_000_000),
    "key of small order": small_order_key,
    "boxes that do not open": broken_boxes,
    "a commitment to something else": wrong_commitment,
    "its ledger is behind, at setup": refuses(SetupRequest, Refused.LEDGER_BEHIND),
    "an older head than before": older_head,
    "another state, in every round": refuses(RoundRequest, Refused.STATE_MISMATCH),
    "no session, in every round": refuses(RoundRequest, Refused.NO_SESSION),
    "an internal fault at the end": refuses(Finish, Refused.INTERNAL),
    "its budget at the end": refuses(Finish, Refused.BUDGET),
    "a wrong signature at the end": finishes_with(signature=bytes(64)),
    "absurd charges at the end": finishes_with(attempts_charged=2**32 - 1),
    "no head at the end": finishes_with(head=bytes(104)),
    "asks for the state without end": floods,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_hospital_does_not_stop_the_others(five, name: str) -> None:
    line = Line(five, warp=HOSTILE[name])
    coordinator = Coordinator(five, line)
    checkpoint = coordinator.run()
    assert checkpoint.state.completed_rounds == ROUNDS
    assert checkpoint.last_attempt <= ROUNDS + 1
    assert set(HONEST) <= set(coordinator.rounds.record.signed)
    assert all(five.charged(position) <= ROUNDS + 1 for position in HONEST)
    assert len(line.asked(StateTransfer)) <= ROUNDS


def test_hostile_claim_does_no_harm_after_the_hospital_has_left(five) -> None:
    line = Line(five, warp=claims(4))
    with contextlib.suppress(MedfedError):
        Coordinator(five, line).run()
    honest = Coordinator(five, Line(five))
    assert honest.run().state.completed_rounds == ROUNDS


def test_upload_in_another_hospitals_name_is_not_summed(five) -> None:
    """Hospitals 1 and 2 conspire: 1 sends what 2 signed, 2 sends nothing. It used to end in a KeyError at every restart."""
    held: list[Upload] = []

    class Two(Line):
        def deliver(self, position: int, payload: bytes) -> list[Reply]:
            replies = super().deliver(position, payload)
            answer = opened(replies[0].payload) if replies and replies[0].payload else None
            if position == 2 and isinstance(answer, Upload):
                held.append(answer)
                return []
            if position == 1 and isinstance(answer, Upload) and held:
                foreign = dataclasses.replace(answer, payload=held[-1].payload)
                return [Reply(1, encode(foreign, five.hospitals[1]._identity), None)]
            return replies

        def receive(self) -> list[Reply]:
            self.queue.sort(key=lambda each: each[0] != 2)
            return super().receive()

    with pytest.raises(MedfedError) as caught:
        Coordinator(five, Two(five)).run()
    assert caught.value.code == 190  # two of five are more than the study can do without


def test_hospital_that_missed_a_round_after_a_lost_one_is_brought_back(five) -> None:
    """All honest. It voted in attempt 3, which was lost, and was away in attempt 4: the sum it is shown is of others."""

    def cut(position: int, request: Message) -> bool:
        if isinstance(request, RoundRequest):
            return (position == 2 and request.attempt == 3) or (position == 0 and request.attempt == 4)
        return position == 0 and isinstance(request, ReleaseRequest) and request.attempt == 3

    coordinator = Coordinator(five, Line(five, cut))
    checkpoint = coordinator.run()
    assert checkpoint.records[-1].attempt == 4
    assert sorted(coordinator.rounds.record.signed) == list(EVERYBODY)


def test_refusal_in_a_session_of_the_fewest_costs_an_attempt_and_not_the_study(five) -> None:
    """Hospital 4 is away at the setup, so that this session needs every one; it may be back for the next."""

    def once(world, request, reply):
        if isinstance(request, RoundRequest) and request.attempt == 1:
            line.offline.discard(4)
            return Refusal(world.study_hash, request.nonce, 1, int(Refused.STATE_MISMATCH))
        return None

    line = Line(five, warp=once)
    line.offline.add(4)
    checkpoint = Coordinator(five, line).run()
    assert checkpoint.records[0].attempt == 2


def test_attempt_frozen_before_a_crash_is_never_frozen_otherwise(five) -> None:
    """The coordinator dies when two hospitals have released; after the restart one survivor is away."""

    class Dying(Line):
        released = 0

        def deliver(self, position: int, payload: bytes) -> list[Reply]:
            replies = super().deliver(position, payload)
            if isinstance(opened(payload), ReleaseRequest):
                self.released += 1
                if self.released == 2:
                    raise Killed
            return replies

    first = Dying(five)
    coordinator = Coordinator(five, first)
    with contextlib.suppress(Killed):
        coordinator.run()
    second = Line(five)
    second.offline.add(4)
    coordinator.post = second
    checkpoint = coordinator.start().run()
    named = {
        request.survivors
        for line in (first, second)
        for _, _, payload in line.sent
        if isinstance(request := opened(payload), VoteRequest | ReleaseRequest) and request.attempt == 1
    }
    assert len(named) == 1
    assert checkpoint.records[0].attempt == 2


def test_two_hospitals_with_one_key_do_not_crash_the_coordinator(five) -> None:
    """The second to come is refused; whoever shares its key has conspired with it."""
    held: dict[int, bytes] = {}

    class Twins(Line):
        def deliver(self, position: int, payload: bytes) -> list[Reply]:
            replies = super().deliver(position, payload)
            answer = opened(replies[0].payload) if replies and replies[0].payload else None
            if position in (1, 2) and isinstance(answer, OfferReply):
                hospital = five.hospitals[position]
                config = hospital._studies[five.study_hash]._party._state.config.shared
                from medfed.privacy.secagg.keys import public_key

                body = Offer(position, bytes([position]) * 32, public_key(bytes([7]) * 32)).encode(config)
                said = dataclasses.replace(answer, offer=body + hospital._identity.sign(body))
                held[position] = said.offer
                return [Reply(position, encode(said, hospital._identity), None)]
            return replies

    with pytest.raises(MedfedError):
        Coordinator(five, Twins(five)).run()
    assert set(held) == {1, 2}
