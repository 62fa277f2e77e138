"""Rounds that go on without a hospital: five real hospitals, of which any four make a sum (n = 5, c = 1, m = 4). Virtual time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
from medfed_test_post import Coordinator, Killed, Post, opened
from numpy.typing import NDArray

from medfed.advance import state_bytes
from medfed.errors import EnvironmentFault, MedfedError
from medfed.server.exchange import Reply
from medfed.wire import (
    Finish,
    Finished,
    Message,
    Refusal,
    Refused,
    Release,
    ReleaseRequest,
    RoundRequest,
    SetupRequest,
    StateTransfer,
    Upload,
    Vote,
    VoteRequest,
    pack_positions,
)

EVERYBODY = range(5)
ROUNDS = 3


class Line(Post):
    """The exchange of five hospitals; ``cut(position, request)``: whether a request is lost on its way."""

    def __init__(self, world, cut: Callable[[int, Message], bool] = lambda *_: False) -> None:
        super().__init__(world)
        self.cut = cut
        self.answers: list[tuple[int, Message]] = []

    def deliver(self, position: int, payload: bytes) -> list[Reply]:
        if position in self.offline or self.cut(position, opened(payload)):
            return []
        replies = super().deliver(position, payload)
        self.answers += [(position, opened(reply.payload)) for reply in replies if reply.payload]
        return replies

    def asked(self, kind: type[Message]) -> list[int]:
        return [position for position, _, payload in self.sent if isinstance(opened(payload), kind)]


@pytest.fixture
def five(make_world):
    """Five hospitals at work, one of which a round can do without."""
    world = make_world(hospitals=5, drop_outs=1)
    world.start_all()
    return world


@pytest.fixture
def vectors(make_world) -> tuple[object, list[dict[int, NDArray[np.int64]]]]:
    """Five hospitals whose noise is known, and what each of them masked in each attempt: ``[attempt - 1][position]``."""
    world = make_world(hospitals=5, drop_outs=1)
    masked: dict[int, list[NDArray[np.int64]]] = {position: [] for position in EVERYBODY}
    for position in EVERYBODY:
        hospital = world.start(position)
        part = hospital._studies[world.study_hash]
        honest = part._noised_vector

        def noted(position: int = position, honest: Callable[[], NDArray[np.int64]] = honest) -> NDArray[np.int64]:
            masked[position].append(honest())
            return masked[position][-1]

        part._noised_vector = noted
    return world, masked


def same_model(world, positions) -> bool:
    return len({(world.place(position) / "model.safetensors").read_bytes() for position in positions}) == 1


def test_all_there_takes_two_trips_a_round(five) -> None:
    line = Line(five)
    checkpoint = Coordinator(five, line).run()
    assert [record.survivors for record in checkpoint.records] == [(0, 1, 2, 3, 4)] * ROUNDS
    kinds = [type(opened(payload)) for _, _, payload in line.sent]
    assert kinds == [SetupRequest] * 5 + ([RoundRequest] * 5 + [ReleaseRequest] * 5) * ROUNDS + [Finish] * 5
    assert same_model(five, EVERYBODY)


def test_hospital_cut_off_in_a_round_is_dropped_and_the_sum_is_the_survivors(vectors) -> None:
    """The released integers are the plain sum of the survivors' own, bit for bit."""
    world, masked = vectors
    line = Line(
        world, lambda position, request: position == 2 and isinstance(request, RoundRequest) and request.round == 1
    )
    totals: list[NDArray[np.int64]] = []
    coordinator = Coordinator(world, line)

    def note(checkpoint, what: str) -> None:
        if what.endswith("done"):
            totals.append(world.assignment.plan.read_total(checkpoint.total).astype(np.int64))

    coordinator.observe = note
    checkpoint = coordinator.run()
    assert [record.survivors for record in checkpoint.records] == [(0, 1, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 3, 4)]
    assert checkpoint.last_attempt == ROUNDS
    assert (totals[0] == sum(masked[position][0] for position in EVERYBODY)).all()
    assert (totals[1] == sum(masked[position][1] for position in (0, 1, 3, 4))).all()
    assert (totals[2] == sum(masked[position][1 if position == 2 else 2] for position in EVERYBODY)).all()
    assert same_model(world, EVERYBODY)
    assert [world.charged(position) for position in EVERYBODY] == [3, 3, 2, 3, 3]
    assert line.asked(VoteRequest) == [0, 1, 3, 4]


def test_hospital_killed_after_its_upload_still_counts(five) -> None:
    """Its keys are gone, so it releases nothing; the shares of the other four open its self mask."""

    def cut(position: int, request: Message) -> bool:
        if position == 1 and isinstance(request, ReleaseRequest) and five.hospitals[1] is not None and not killed:
            killed.append(True)
            five.start(1)
        return False

    killed: list[bool] = []
    line = Line(five, cut)
    checkpoint = Coordinator(five, line).run()
    assert [record.survivors for record in checkpoint.records] == [(0, 1, 2, 3, 4)] * ROUNDS
    reasons = [(position, reply.reason) for position, reply in line.answers if isinstance(reply, Refusal)]
    assert reasons == [(1, int(Refused.NO_SESSION))]
    assert checkpoint.last_attempt == ROUNDS


def test_hospital_killed_in_a_round_is_back_in_the_next_setup(five) -> None:
    """kill -9 while it trains: the round ends with the survivors, then keys are made anew and it takes part again."""
    killed: list[int] = []

    def cut(position: int, request: Message) -> bool:
        if position == 3 and isinstance(request, RoundRequest) and request.round == 0 and not killed:
            killed.append(request.attempt)
            five.start(3)
        return False

    line = Line(five, cut)
    checkpoint = Coordinator(five, line).run()
    assert [record.survivors for record in checkpoint.records] == [(0, 1, 2, 4), tuple(EVERYBODY), tuple(EVERYBODY)]
    assert len(line.asked(SetupRequest)) == 10
    assert same_model(five, EVERYBODY)


def test_hospital_away_for_good_costs_one_grace_and_no_attempt(five) -> None:
    """Four of five make every sum; the run ends without the fifth's signature, and says so."""
    line = Line(five)
    coordinator = Coordinator(five, line)

    def leave(checkpoint, what: str) -> None:
        if what == "round 1 done":
            five.kill(4)
            line.offline.add(4)

    coordinator.observe = leave
    checkpoint = coordinator.run()
    assert [record.survivors for record in checkpoint.records] == [(0, 1, 2, 3, 4)] + [(0, 1, 2, 3)] * 2
    assert checkpoint.last_attempt == ROUNDS
    assert sorted(coordinator.rounds.record.signed) == [0, 1, 2, 3]
    assert same_model(five, range(4))


def test_hospital_away_for_a_round_gets_the_state_from_its_peers(five) -> None:
    """It may not advance by a sum that it paid nothing for: c + 1 of the others sign the state, in the next round already."""
    line = Line(five)
    coordinator = Coordinator(five, line)

    def leave(checkpoint, what: str) -> None:
        if what == "round 1 done":
            line.offline.add(0)
        elif what == "round 2 done":
            line.offline.discard(0)

    coordinator.observe = leave
    checkpoint = coordinator.run()
    assert [record.survivors for record in checkpoint.records] == [tuple(EVERYBODY), (1, 2, 3, 4), tuple(EVERYBODY)]
    assert line.asked(StateTransfer) == [0]
    assert same_model(five, EVERYBODY)


def test_hospital_that_missed_the_last_round_gets_the_final_model(five) -> None:
    line = Line(five)
    coordinator = Coordinator(five, line)

    def leave(checkpoint, what: str) -> None:
        if what == "round 2 done":
            line.offline.add(2)
        elif what == "round 3 done":
            line.offline.discard(2)

    coordinator.observe = leave
    checkpoint = coordinator.run()
    assert checkpoint.records[-1].survivors == (0, 1, 3, 4)
    assert sorted(coordinator.rounds.record.signed) == list(EVERYBODY)
    assert same_model(five, EVERYBODY)


def test_too_few_end_the_attempt_by_name_the_spend_stays_and_the_next_works(five, caplog) -> None:
    line = Line(
        five,
        lambda position, request: position in (0, 4) and isinstance(request, RoundRequest) and request.attempt == 2,
    )
    checkpoint = Coordinator(five, line).run()
    assert [(record.round, record.attempt) for record in checkpoint.records] == [(1, 1), (2, 3), (3, 4)]
    assert "attempt 2 is lost: deadline passed" in caplog.text
    assert [five.charged(position) for position in EVERYBODY] == [3, 4, 4, 4, 3]


@pytest.mark.parametrize("kind", [VoteRequest, ReleaseRequest])
def test_survivor_that_dies_before_it_answered_voids_a_slow_round(five, caplog, kind: type[Message]) -> None:
    """Only it knows the seeds it shared with the drop-out: the round is lost by name, and the next one works."""

    def cut(position: int, request: Message) -> bool:
        if isinstance(request, RoundRequest):
            return position == 2 and request.attempt == 1
        return position == 0 and isinstance(request, kind) and request.attempt == 1

    checkpoint = Coordinator(five, Line(five, cut)).run()
    assert "attempt 1 is lost: deadline passed while" in caplog.text
    assert checkpoint.records[0].attempt == 2


def test_refusal_of_one_hospital_does_not_stop_the_others(five) -> None:
    """Its budget is used up, it withdrew, it failed: four are enough."""

    class Refusing(Line):
        def deliver(self, position: int, payload: bytes) -> list[Reply]:
            request = opened(payload)
            if position == 1 and isinstance(request, RoundRequest) and request.round == 1:
                identity = five.hospitals[1]._identity
                from medfed.wire import encode

                refusal = Refusal(five.study_hash, request.nonce, 1, int(Refused.BUDGET))
                return [Reply(1, encode(refusal, identity), None)]
            return super().deliver(position, payload)

    checkpoint = Coordinator(five, Refusing(five)).run()
    assert [record.survivors for record in checkpoint.records] == [tuple(EVERYBODY), (0, 2, 3, 4), tuple(EVERYBODY)]


class Dying(Line):
    """The coordinator's process is gone at the ``last``-th message it would send."""

    def __init__(self, world, last: int, cut: Callable[[int, Message], bool]) -> None:
        super().__init__(world, cut)
        self.last = last

    def send(self, position, kind, payload, timeout_s) -> None:
        if self.last == 0:
            raise Killed
        self.last -= 1
        super().send(position, kind, payload, timeout_s)


@pytest.mark.parametrize("last", range(5, 20))
def test_coordinator_killed_anywhere_in_a_slow_round_goes_on_with_the_same_survivors(make_world, last: int) -> None:
    """Hospital 2 is away when the round is frozen and back after the crash: it stays out of this attempt, and nobody is asked
    for two survivor sets."""
    world = make_world(hospitals=5, drop_outs=1)
    world.start_all()
    is_cut = [True]

    def cut(position: int, request: Message) -> bool:
        return is_cut[0] and position == 2 and isinstance(request, RoundRequest) and request.attempt == 1

    first = Dying(world, last, cut)
    coordinator = Coordinator(world, first)
    with contextlib.suppress(Killed):
        coordinator.run()
    was_frozen = bool(first.asked(VoteRequest))
    is_cut[0] = False
    second = Line(world, cut)
    coordinator.post = second
    checkpoint = coordinator.start().run()
    assert checkpoint.records[0].attempt == 1
    if was_frozen:
        assert checkpoint.records[0].survivors == (0, 1, 3, 4)
    named = {
        request.survivors
        for line in (first, second)
        for _, _, payload in line.sent
        if isinstance(request := opened(payload), VoteRequest | ReleaseRequest) and request.attempt == 1
    }
    assert len(named) == 1
    assert same_model(world, EVERYBODY)


def test_strict_study_is_never_asked_to_open_anything(make_world) -> None:
    world = make_world()
    world.start_all()
    post = Post(world)
    Coordinator(world, post).run()
    assert not {VoteRequest, ReleaseRequest} & {type(opened(payload)) for _, _, payload in post.sent}


def test_answers_have_one_length_each_whoever_survived(five) -> None:
    line = Line(
        five, lambda position, request: position == 2 and isinstance(request, RoundRequest) and request.round == 1
    )
    Coordinator(five, line).run()
    for kind in (Upload, Vote, Release, Finished):
        lengths = {
            len(getattr(reply, "payload", b"")) + len(getattr(reply, "released", b""))
            for _, reply in line.answers
            if isinstance(reply, kind)
        }
        assert len(lengths) == 1, kind


def test_sum_named_over_others_than_released_for_is_refused(five) -> None:
    """A coordinator that says fewer, or others, were in the sum would change the divisor of the mean."""
    from medfed.wire import encode

    class Lying(Line):
        def deliver(self, position: int, payload: bytes) -> list[Reply]:
            request = opened(payload)
            if isinstance(request, RoundRequest) and request.round == 1:
                import dataclasses

                lie = dataclasses.replace(request, survivors=pack_positions((0, 1, 2, 3)))
                payload = encode(lie, five.assignment.identity)
            return super().deliver(position, payload)

    line = Lying(five)
    with pytest.raises((EnvironmentFault, MedfedError)):
        Coordinator(five, line).run()
    refusals = {reply.reason for _, reply in line.answers if isinstance(reply, Refusal)}
    assert int(Refused.STATE_MISMATCH) in refusals
    assert all(five.charged(position) == 1 for position in EVERYBODY)


def test_run_without_loss_ends_as_a_strict_one(five, make_world) -> None:
    """The same seeds, the same sums: recovery changes what travels, never the model."""
    recovered = Coordinator(five, Line(five)).run()
    strict = make_world(hospitals=5)
    strict.start_all()
    again = Coordinator(strict, Line(strict)).run()
    assert [record.survivors for record in again.records] == [tuple(EVERYBODY)] * ROUNDS
    assert len(state_bytes(recovered.state)) == len(state_bytes(again.state))


def test_wrong_release_of_one_hospital_costs_nothing_where_the_others_are_enough(five, caplog) -> None:
    """Its signature is right and its share is not its own: the shares of the other four open every self mask."""
    import hashlib

    from medfed.privacy.secagg.messages import release_signature_input
    from medfed.wire import encode

    class Spoiling(Line):
        def deliver(self, position: int, payload: bytes) -> list[Reply]:
            replies = super().deliver(position, payload)
            answer = opened(replies[0].payload) if replies and replies[0].payload else None
            if position == 1 and isinstance(answer, Release):
                hospital = five.hospitals[1]
                part = hospital._studies[five.study_hash]
                body = bytearray(answer.released[:-64])
                body[3:35] = hashlib.sha256(b"a wrong share").digest()
                signed = release_signature_input(part._party._state.context, 1, bytes(body))
                released = bytes(body) + hospital._identity.sign(signed)
                wrong = Release(answer.study_hash, answer.nonce, 1, answer.attempt, released)
                return [Reply(1, encode(wrong, hospital._identity), None)]
            return replies

    checkpoint = Coordinator(five, Spoiling(five)).run()
    assert checkpoint.last_attempt == ROUNDS
    assert [record.survivors for record in checkpoint.records] == [tuple(EVERYBODY)] * ROUNDS


def test_forged_release_is_an_alarm_and_done_without(five, caplog) -> None:
    from medfed.wire import encode

    class Forging(Line):
        def deliver(self, position: int, payload: bytes) -> list[Reply]:
            replies = super().deliver(position, payload)
            answer = opened(replies[0].payload) if replies and replies[0].payload else None
            if position == 3 and isinstance(answer, Release):
                wrong = Release(answer.study_hash, answer.nonce, 3, answer.attempt, bytes(len(answer.released)))
                return [Reply(3, encode(wrong, five.hospitals[3]._identity), None)]
            return replies

    checkpoint = Coordinator(five, Forging(five)).run()
    assert checkpoint.last_attempt == ROUNDS
    assert "ALARM: answer of Daun refused" in caplog.text
