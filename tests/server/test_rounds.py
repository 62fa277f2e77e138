"""The coordinator's rounds over real hospitals, with a postman who loses, doubles, delays, forges and dies. Virtual time."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from medfed_test_post import Coordinator, Killed, Post, opened
from numpy.typing import NDArray

from medfed.advance import ModelState, released_weights, state_bytes, state_hash
from medfed.errors import EnvironmentFault, MedfedError, PrivacyError, ProtocolError, RemoteProtocolError
from medfed.identity import Identity, verify
from medfed.privacy.journal import check_journal
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.secagg.messages import upload_signature_input
from medfed.privacy.secagg.protocol import HEADER_BYTES
from medfed.privacy.statement import hospital_statement, parse_statement, sign_for_hospital
from medfed.seams import SystemFiles
from medfed.server.exchange import Kind, Reply
from medfed.server.store import Checkpoint
from medfed.wire import (
    Finish,
    Finished,
    Message,
    OfferReply,
    Refusal,
    Refused,
    RoundRequest,
    SetupRequest,
    StateTransfer,
    Upload,
    encode,
    state_statement,
)
from medfed.witness import Head

ROUNDS, ATTEMPTS = 3, 5
EVERYBODY = range(4)
STRANGER = Identity.from_seed(b"\x99" * 32)


Change = Callable[[int, Message, bytes], list[bytes] | None]


class Meddler(Post):
    """Passes replies through ``change(position, request, reply)``: other frames, or None to leave it alone."""

    def __init__(self, world, change: Change) -> None:
        super().__init__(world)
        self.change = change

    def deliver(self, position: int, payload: bytes) -> list[Reply]:
        replies = super().deliver(position, payload)
        changed: list[Reply] = []
        for reply in replies:
            frames = self.change(position, opened(payload), reply.payload) if reply.payload else None
            changed += [reply] if frames is None else [Reply(position, frame, None) for frame in frames]
        return changed


@pytest.fixture
def started(world):
    """The federation with every hospital started."""
    world.start_all()
    return world


@pytest.fixture(scope="module")
def calm() -> dict[str, bytes]:
    """Filled by the first happy run: what any run with the same noise must end with."""
    return {}


def check_end(world, checkpoint: Checkpoint, attempts: int = ROUNDS) -> None:
    """All rounds done, everybody has the same model, and nobody paid for more than the attempts that were used."""
    assert checkpoint.state.completed_rounds == ROUNDS
    assert checkpoint.last_attempt == attempts
    assert [record.round for record in checkpoint.records] == [1, 2, 3]
    models = {(world.place(position) / "model.safetensors").read_bytes() for position in EVERYBODY}
    assert len(models) == 1
    for position in EVERYBODY:
        rows = world.rows(position)
        reserved = [attempt for kind, attempt in rows if kind == "RESERVED"]
        assert len(reserved) == len(set(reserved)) <= attempts
        assert sum(kind == "RELEASED" for kind, _ in rows) <= len(reserved)
        assert rows[-1] == ("CLOSED", 0)
    assert world.store.load_open_attempt() is None


@pytest.fixture
def undisturbed(make_world, calm: dict[str, bytes]) -> dict[str, bytes]:
    """The state after round 1 and the final one of a run with the same seeds in which nothing happened."""

    def note(checkpoint: Checkpoint, what: str) -> None:
        calm[what.removesuffix(" done")] = state_bytes(checkpoint.state)

    if not calm:
        world = make_world()
        world.start_all()
        Coordinator(world, Post(world), note).run()
        calm["end"] = calm["round 3"]
    return calm


# -------------------------------------------------------------------------------------------------------- happy path


def test_run_takes_one_attempt_a_round(started, caplog: pytest.LogCaptureFixture) -> None:
    coordinator = Coordinator(started, Post(started))
    checkpoint = coordinator.run()
    check_end(started, checkpoint)
    sent = [type(opened(payload)) for _, _, payload in coordinator.post.sent]
    assert sent == [SetupRequest] * 4 + [RoundRequest] * 4 * ROUNDS + [Finish] * 4
    kinds = {type(opened(payload)): kind for _, kind, payload in coordinator.post.sent}
    assert kinds == {SetupRequest: Kind.QUERY, RoundRequest: Kind.TRAIN, Finish: Kind.QUERY}
    assert [what for what in coordinator.told if what.endswith("done")] == [f"round {n} done" for n in (1, 2, 3)]
    assert "ALARM" not in caplog.text
    sizes = {record.upload_bytes for record in checkpoint.records}
    assert len(sizes) == 1


def test_everybody_gets_the_same_bytes_in_a_round(started) -> None:
    """T5, T10: one request a round for all; a hospital that is asked apart would be asked otherwise."""
    coordinator = Coordinator(started, Post(started))
    coordinator.run()
    frames = [payload for _, _, payload in coordinator.post.sent]
    assert len(set(frames)) == 1 + ROUNDS + 1
    nonces = [opened(frame).nonce for frame in set(frames) if isinstance(opened(frame), RoundRequest)]
    assert len(set(nonces)) == ROUNDS


def test_model_is_the_exact_sum_of_the_noised_vectors(make_world) -> None:
    """Known noise, everybody's clipped sums recomputed apart: the checkpoint holds exactly their sum."""
    world = make_world()
    vectors: list[NDArray[np.int64]] = []

    def known(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        vectors.append(np.arange(size) * (len(vectors) + 1) * 1000)
        return vectors[-1]

    world.start_all(lambda key, sd, size: np.zeros(size, np.int64))
    without = Coordinator(world, Post(world))
    totals: list[NDArray[np.int64]] = []
    read = world.assignment.plan.read_total
    without.observe = lambda checkpoint, what: (
        totals.append(read(checkpoint.total).copy()) if what == "round 1 done" else None
    )
    without.run()
    other = make_world()
    other.start_all(known)
    again = Coordinator(other, Post(other))
    again.observe = lambda checkpoint, what: (
        totals.append(read(checkpoint.total).copy()) if what == "round 1 done" else None
    )
    again.run()
    assert (totals[1] - totals[0]).tolist() == sum(vectors[:4]).tolist()


def test_smallest_model_fits_the_limits_of_messages(make_world) -> None:
    """Two parameters: the envelope of an upload is larger than everything the limit was made for."""
    text = (Path(__file__).parent.parent / "tiny_task.toml").read_text()
    second = text.index('[[data.features]]\nname = "lactate"')
    world = make_world((text[second:], ""))
    assert world.assignment.plan.words == 2
    world.start_all()
    check_end(world, Coordinator(world, Post(world)).run())


def test_finished_run_is_finished_again_for_nothing(started) -> None:
    first = Coordinator(started, Post(started)).run()
    charged = [started.charged(position) for position in EVERYBODY]
    again = Coordinator(started, Post(started))
    second = again.run()
    assert state_bytes(second.state) == state_bytes(first.state)
    assert [started.charged(position) for position in EVERYBODY] == charged == [ROUNDS] * 4
    assert {type(opened(payload)) for _, _, payload in again.post.sent} == {Finish}


# -------------------------------------------------------------------------------------------------- a bad connection


class BadPost(Post):
    """Loses, doubles, delays and reorders requests and replies from one seed."""

    def __init__(self, world, seed: int) -> None:
        super().__init__(world)
        self.rng = random.Random(seed)
        self.late: list[Reply] = []
        self.lost = self.doubled = 0

    def receive(self) -> list[Reply]:
        self.calls += 1
        self.rng.shuffle(self.queue)
        waiting, batch = [], []
        for item in self.queue:
            (waiting if self.rng.random() < 0.2 else batch).append(item)
        self.queue = waiting
        arrived, self.late = self.late, []
        for position, payload in batch:
            copies = self.rng.choices([0, 1, 2], [3, 6, 2])[0]
            self.lost += copies == 0
            self.doubled += copies == 2
            for _ in range(copies):
                arrived += [reply for reply in self.deliver(position, payload) if self.rng.random() > 0.25]
        self.rng.shuffle(arrived)
        kept = []
        for reply in arrived:
            if self.rng.random() < 0.2:
                self.late.append(reply)
            else:
                kept += [reply] * self.rng.choice([1, 1, 2])
        if self.rng.random() < 0.05:
            kept.append(Reply(self.rng.randrange(4), None, "expired"))
        return kept


@pytest.mark.parametrize("seed", range(4))
def test_bad_connection_costs_time_and_nothing_else(make_world, undisturbed: dict[str, bytes], seed: int) -> None:
    """Lost, doubled, late and reordered messages: the same model bit for bit, no attempt more, no alarm."""
    world = make_world(("round_s = 60.0", "round_s = 3600.0"), ("setup_s = 120.0", "setup_s = 3600.0"))
    world.start_all()
    post = BadPost(world, seed)
    checkpoint = Coordinator(world, post).run()
    check_end(world, checkpoint)
    assert checkpoint.state.weights.tobytes() == undisturbed["end"][13 : 13 + 4 * checkpoint.state.weights.size]
    assert post.lost + post.doubled > 5


def test_lost_replies_are_asked_for_again_with_the_same_bytes(started) -> None:
    lost: set[int] = set()

    def lose(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if isinstance(request, RoundRequest) and position not in lost:
            lost.add(position)
            return []
        return None

    post = Meddler(started, lose)
    check_end(started, Coordinator(started, post).run())
    first_round = [payload for _, _, payload in post.sent if getattr(opened(payload), "attempt", 0) == 1]
    assert len(first_round) == 8
    assert len(set(first_round)) == 1


def test_hospital_that_joins_late_is_waited_for(started) -> None:
    post = Post(started)
    post.offline = {3}
    coordinator = Coordinator(started, post)

    def arrive(checkpoint: Checkpoint, what: str) -> None:
        if started.clock.now_s > 50:
            post.offline = set()

    coordinator.observe = arrive
    check_end(started, coordinator.run())
    assert "waiting for Daun" in coordinator.told


def test_hospital_that_approves_late_is_waited_for(started) -> None:
    asked = 0

    def not_yet(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        nonlocal asked
        if position != 2 or not isinstance(request, SetupRequest) or asked >= 3:
            return None
        asked += 1
        refusal = Refusal(started.study_hash, request.session, 0xFFFF, int(Refused.NOT_APPROVED))
        return [encode(refusal, started.site(2).identity())]

    coordinator = Coordinator(started, Meddler(started, not_yet))
    check_end(started, coordinator.run())
    assert asked == 3
    assert "waiting for Celle (has not approved the study)" in coordinator.told


# ----------------------------------------------------------------------------------------------------- hospitals die


def dying_noise(at: int, error: BaseException) -> Callable[[bytes, float, int], NDArray[np.int64]]:
    """Raises at its ``at``-th use."""
    uses = 0

    def noise(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        nonlocal uses
        uses += 1
        if uses == at:
            raise error
        return discrete_gaussian(key, sd, size)

    return noise


@pytest.mark.parametrize(("position", "after_round"), [(0, 1), (3, 2)])
def test_hospital_restarted_between_rounds_costs_one_spare(started, position: int, after_round: int) -> None:
    """Its session keys are gone, so the attempt under way is lost; a new setup, and on."""
    coordinator = Coordinator(started, Post(started))

    def restart(checkpoint: Checkpoint, what: str) -> None:
        if what == f"round {after_round} done":
            started.start(position)

    coordinator.observe = restart
    check_end(started, coordinator.run(), ROUNDS + 1)


@pytest.mark.parametrize(("position", "at"), [(0, 1), (3, 2), (0, 3)])
def test_hospital_killed_while_it_trains_costs_one_spare(started, position: int, at: int) -> None:
    started.start(position, dying_noise(at, Killed()))
    check_end(started, Coordinator(started, Post(started)).run(), ROUNDS + 1)
    assert ("ABANDONED", at) in started.rows(position)


class DyingFiles(SystemFiles):
    """Dies when it is to note a round: the reply is sealed, not yet sent."""

    def append(self, path: Path, data: bytes) -> None:
        raise Killed


def test_hospital_killed_between_seal_and_reply_costs_nothing(started, undisturbed: dict[str, bytes]) -> None:
    """The new process sends the sealed bytes: nothing is lost but time (round 2 then needs new keys)."""
    started.start(1, files=DyingFiles())
    coordinator = Coordinator(started, Post(started))
    first: list[int] = []
    coordinator.observe = lambda checkpoint, what: (
        first.append(checkpoint.last_attempt) if what == "round 1 done" else None
    )
    checkpoint = coordinator.run()
    assert first == [1]
    check_end(started, checkpoint, ROUNDS + 1)
    assert ("ABANDONED", 1) not in started.rows(1)


def test_fault_at_a_hospital_costs_one_spare(started) -> None:
    started.start(2, dying_noise(2, EnvironmentFault(630, "out of memory", "free some")))
    check_end(started, Coordinator(started, Post(started)).run(), ROUNDS + 1)


def test_hospital_that_restarts_during_setup_gets_a_new_setup(started) -> None:
    """Two different offers in one session: the second says that the first one's keys are gone."""
    twice = False

    def restart(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        nonlocal twice
        if position != 1 or not isinstance(request, SetupRequest) or twice:
            return None
        twice = True
        return [reply, started.start(1).handle(encode(request, started.assignment.identity))]

    check_end(started, Coordinator(started, Meddler(started, restart)).run())


def test_late_copy_of_a_setup_request_after_a_restart_costs_one_spare(started) -> None:
    """A hospital restarts, then gets the old session's request once more: it makes keys that nobody has."""
    coordinator = Coordinator(started, Post(started))

    def restart(checkpoint: Checkpoint, what: str) -> None:
        if what == "round 1 done":
            setup = next(p for position, _, p in coordinator.post.sent if isinstance(opened(p), SetupRequest))
            started.start(2).handle(setup)

    coordinator.observe = restart
    check_end(started, coordinator.run(), ROUNDS + 1)


@pytest.mark.parametrize("lost", [(0,), (1, 2), (0, 1, 2, 3)])
def test_hospital_that_lost_its_state_is_brought_back(started, lost: tuple[int, ...]) -> None:
    """Deleted state files after round 2: the signed state before the last sum is transferred, the rest computed."""
    coordinator = Coordinator(started, Post(started))

    def lose(checkpoint: Checkpoint, what: str) -> None:
        if what == "round 2 done":
            for position in lost:
                (started.place(position) / "state.bin").unlink()
                started.start(position)

    coordinator.observe = lose
    check_end(started, coordinator.run(), ROUNDS + 1)
    transfers = [
        position for position, _, payload in coordinator.post.sent if isinstance(opened(payload), StateTransfer)
    ]
    assert sorted(transfers) == list(lost)


def test_hospital_that_lost_its_state_before_the_end_is_brought_back(started) -> None:
    coordinator = Coordinator(started, Post(started))

    def lose(checkpoint: Checkpoint, what: str) -> None:
        if what == "round 3 done":
            (started.place(0) / "state.bin").unlink()
            started.start(0)

    coordinator.observe = lose
    check_end(started, coordinator.run())


# ---------------------------------------------------------------------------------------------------- ends with a name


def stops(coordinator: Coordinator, code: int, kind: type[MedfedError] = EnvironmentFault) -> MedfedError:
    with pytest.raises(kind) as caught:
        coordinator.run()
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    return caught.value


def always(error: MedfedError, from_use: int) -> Callable[[bytes, float, int], NDArray[np.int64]]:
    uses = 0

    def noise(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        nonlocal uses
        uses += 1
        if uses >= from_use:
            raise error
        return discrete_gaussian(key, sd, size)

    return noise


def test_attempts_used_up_end_with_the_last_good_model(started) -> None:
    started.start(2, always(EnvironmentFault(630, "out of memory", "free some"), from_use=2))
    coordinator = Coordinator(started, Post(started))
    stops(coordinator, 190)
    assert coordinator.rounds.checkpoint.state.completed_rounds == 1
    assert coordinator.rounds.checkpoint.last_attempt == ATTEMPTS
    kept = started.store.load_checkpoint()
    assert kept is not None
    assert kept.state.completed_rounds == 1
    assert np.isfinite(released_weights(kept.state, started.study)).all()
    assert [started.charged(position) for position in EVERYBODY] == [ATTEMPTS] * 4


def test_start_after_attempts_were_used_up_spends_nothing(started) -> None:
    started.start(2, always(EnvironmentFault(630, "out of memory", "free some"), from_use=2))
    coordinator = Coordinator(started, Post(started))
    stops(coordinator, 190)
    coordinator.post = Post(started)
    coordinator.start()
    stops(coordinator, 190)
    assert [started.charged(position) for position in EVERYBODY] == [ATTEMPTS] * 4
    asked = {type(opened(payload)) for _, _, payload in coordinator.post.sent}
    assert asked == {SetupRequest}, "the hospitals' own count is taken over: no round is asked for in vain"


def test_hospital_that_never_joins_ends_at_the_deadline(started) -> None:
    post = Post(started)
    post.offline = {3}
    error = stops(Coordinator(started, post), 191)
    assert "Daun did not join" in error.what
    assert 120 <= started.clock.now_s < 130
    assert [started.charged(position) for position in EVERYBODY] == [0] * 4


def test_hospital_lost_in_a_round_ends_at_the_deadline_with_the_last_good_model(started) -> None:
    post = Post(started)
    coordinator = Coordinator(started, post)

    def cut(checkpoint: Checkpoint, what: str) -> None:
        if what == "round 2 done":
            post.offline = {1}

    coordinator.observe = cut
    error = stops(coordinator, 191)
    assert "Bonn did not join" in error.what
    assert 180 <= started.clock.now_s < 190
    kept = started.store.load_checkpoint()
    assert kept is not None
    assert kept.state.completed_rounds == 2


def test_run_that_ended_at_the_deadline_goes_on_once_the_hospital_is_back(started) -> None:
    post = Post(started)
    coordinator = Coordinator(started, post)
    cut = [True]

    def away(checkpoint: Checkpoint, what: str) -> None:
        post.offline = {1} if cut[0] and checkpoint.state.completed_rounds == 2 else set()

    coordinator.observe = away
    stops(coordinator, 191)
    cut[0] = False
    post.offline = set()
    coordinator.start()
    check_end(started, coordinator.run(), ROUNDS + 1)


def refusing(world, position: int, reason: Refused, kind: type[Message] = RoundRequest) -> Change:
    """From now on this hospital refuses for ``reason``; a real signature under it."""
    identity = world.site(position).identity()

    def change(at: int, request: Message, reply: bytes) -> list[bytes] | None:
        if at != position or not isinstance(request, kind):
            return None
        return [encode(Refusal(world.study_hash, request.nonce, position, int(reason)), identity)]

    return change


FATAL = [
    Refused.BUDGET,
    Refused.STATE_MISMATCH,
    Refused.OFFERS_REFUSED,
    Refused.SIGNATURES,
    Refused.NOT_APPROVED,
]


@pytest.mark.parametrize("reason", FATAL)
def test_hospital_that_refuses_ends_the_run_with_its_name(started, reason: Refused) -> None:
    error = stops(Coordinator(started, Meddler(started, refusing(started, 1, reason))), 192, PrivacyError)
    assert "Bonn" in error.what


@pytest.mark.parametrize("reason", [Refused.ATTEMPT_SPENT, Refused.NO_SESSION, Refused.INTERNAL, Refused.OUT_OF_ORDER])
def test_hospital_that_keeps_refusing_uses_the_attempts_up(started, reason: Refused) -> None:
    stops(Coordinator(started, Meddler(started, refusing(started, 1, reason))), 190)


def test_reason_of_a_newer_version_is_a_fault_like_any_other(started) -> None:
    """A number that is not in this version's list must not end the coordinator's process."""
    refuse = refusing(started, 1, Refused.INTERNAL)
    identity, asked = started.site(1).identity(), []

    def change(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        frames = refuse(position, request, reply)
        if frames is None or asked:
            return None
        asked.append(1)
        return [encode(replace(opened(frames[0]), reason=999), identity)]

    check_end(started, Coordinator(started, Meddler(started, change)).run(), ROUNDS + 1)


def test_budget_that_does_not_cover_an_attempt_ends_the_run(started) -> None:
    config = started.folder / "Celle" / "hospital.toml"
    text = config.read_text()
    assert "max_epsilon_study = 1000.0" in text
    config.write_text(text.replace("max_epsilon_study = 1000.0", "max_epsilon_study = 0.001"))
    started.start(2)
    error = stops(Coordinator(started, Post(started)), 192, PrivacyError)
    assert "Celle" in error.what
    assert started.charged(2) == 0


def test_state_with_too_few_signatures_ends_the_run_with_a_reason(started) -> None:
    """The hospital refuses the transfer for good: waiting for the deadline would waste every spare."""
    coordinator = Coordinator(started, Post(started))

    def lose(checkpoint: Checkpoint, what: str) -> None:
        if what == "round 2 done":
            coordinator.rounds._checkpoint = replace(checkpoint, attestations=checkpoint.attestations[:1])
            (started.place(3) / "state.bin").unlink()
            started.start(3)

    coordinator.observe = lose
    error = stops(coordinator, 192, PrivacyError)
    assert "Daun" in error.what
    assert "signatures" in error.what


# ------------------------------------------------------------------------------------------------------------ forgery


def flipped(frame: bytes | memoryview, at: int) -> bytes:
    data = bytes(frame)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


FORGERIES: dict[str, Callable[[object, Message, bytes], list[bytes]]] = {
    "flipped bit": lambda world, request, reply: [flipped(reply, 50)],
    "flipped signature": lambda world, request, reply: [flipped(reply, len(reply) - 1)],
    "stranger's signature": lambda world, request, reply: [encode(opened(reply), STRANGER)],
    "garbage": lambda world, request, reply: [b"", b"\0" * 200, b"MFW\1\x11" + bytes(300)],
    "other study": lambda world, request, reply: [
        encode(replace(opened(reply), study_hash=bytes(32)), world.site(1).identity())
    ],
    "another's name": lambda world, request, reply: [
        encode(replace(opened(reply), position=2), world.site(1).identity())
    ],
    "the request itself": lambda world, request, reply: [encode(request, world.assignment.identity)],
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_reply_is_an_alarm_and_changes_nothing(
    started, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The forgery arrives first and the true reply later: the same model, no attempt more, a line in the log."""
    forged: set[type] = set()

    def forge(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position != 1 or type(request) in forged:
            return None
        forged.add(type(request))
        return FORGERIES[name](started, request, reply)

    checkpoint = Coordinator(started, Meddler(started, forge)).run()
    assert len(forged) == 3
    check_end(started, checkpoint)
    assert state_bytes(checkpoint.state) == undisturbed["end"]
    assert caplog.text.count("ALARM: a reply in the name of Bonn is refused") >= 3


def test_replayed_reply_of_an_earlier_attempt_is_ignored(started, undisturbed: dict[str, bytes]) -> None:
    """Rightly signed, but about another attempt: neither an alarm nor an upload."""
    old: list[bytes] = []

    def replay(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position == 1 and isinstance(opened(reply), Upload):
            old.append(reply)
            return [old[0], reply]
        return None

    checkpoint = Coordinator(started, Meddler(started, replay)).run()
    check_end(started, checkpoint)
    assert state_bytes(checkpoint.state) == undisturbed["end"]
    assert len(old) == ROUNDS


def test_second_upload_with_other_bytes_is_an_alarm_and_the_first_counts(
    started, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """A hospital (or its clone) signs two vectors for one attempt: the first counts, the next attempt needs new keys."""
    identity = started.site(1).identity()
    coordinator: Coordinator
    seen: list[bytes] = []
    after_first: list[bytes] = []

    def second(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position != 1 or seen or not isinstance(request, RoundRequest):
            return None
        seen.append(reply)
        upload = opened(reply)
        words = bytearray(upload.payload[HEADER_BYTES:-64])
        words[0] ^= 1
        context = coordinator.rounds._aggregator._state.context
        signed = upload_signature_input(context, 1, hashlib.sha256(words).digest())
        payload = bytes(upload.payload[:HEADER_BYTES]) + bytes(words) + identity.sign(signed)
        return [reply, encode(replace(upload, payload=payload), identity)]

    def note(checkpoint: Checkpoint, what: str) -> None:
        if what == "round 1 done":
            after_first.append(state_bytes(checkpoint.state))

    coordinator = Coordinator(started, Meddler(started, second), note)
    check_end(started, coordinator.run(), ROUNDS + 1)
    assert after_first == [undisturbed["round 1"]]
    assert "ALARM: upload of Bonn refused: MF-183" in caplog.text
    assert started.clock.now_s < 10, "nobody waits for a deadline"


@pytest.mark.parametrize("field", ["payload", "attestation"])
def test_upload_that_its_hospital_signed_wrongly_costs_the_attempt(
    started, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    """The frame is signed, what it holds is not: that hospital is at fault, the attempt cannot complete."""
    identity = started.site(1).identity()
    done: list[int] = []

    def spoil(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position != 1 or done or not isinstance(request, RoundRequest):
            return None
        done.append(1)
        upload = opened(reply)
        value = getattr(upload, field)
        return [encode(replace(upload, **{field: flipped(value, len(value) - 1)}), identity)]

    check_end(started, Coordinator(started, Meddler(started, spoil)).run(), ROUNDS + 1)
    assert "ALARM: upload of Bonn refused: MF-110" in caplog.text


def test_offer_in_another_hospitals_name_is_an_alarm_and_does_not_stand_for_it(
    started, caplog: pytest.LogCaptureFixture
) -> None:
    """Offers are relayed, so a hospital holds the others' old ones, rightly signed: it may not hand them in."""
    earlier = encode(SetupRequest(started.study_hash, b"earlier session!", ()), started.assignment.identity)
    old = opened(started.hospitals[2].handle(earlier)).offer
    identity, done = started.site(1).identity(), []

    def replay(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position != 1 or done:
            return None
        done.append(1)
        return [encode(replace(opened(reply), offer=old), identity)]

    check_end(started, Coordinator(started, Meddler(started, replay)).run())
    assert "ALARM: offer of Bonn refused: MF-111" in caplog.text


def test_offer_that_does_not_verify_is_an_alarm_and_asked_for_again(started, caplog: pytest.LogCaptureFixture) -> None:
    identity = started.site(1).identity()
    done: list[int] = []

    def spoil(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position != 1 or done or not isinstance(request, SetupRequest):
            return None
        done.append(1)
        offer = opened(reply).offer
        return [encode(replace(opened(reply), offer=flipped(offer, len(offer) - 1)), identity)]

    check_end(started, Coordinator(started, Meddler(started, spoil)).run())
    assert "ALARM" in caplog.text
    assert "Bonn" in caplog.text


# ------------------------------------------------------------------------------------------------------- final model


@pytest.mark.parametrize(
    "change",
    [
        {"signature": bytes(64)},
        {"attempts_charged": 2},
        {"attempts_charged": ATTEMPTS},
        {"epsilon_spent_micro": 1},
        {"head": bytes(104)},
        {"head": b"\0" * 7 + b"\1" + bytes(96)},
    ],
    ids=str,
)
def test_hospital_that_signed_something_else_ends_the_run(started, change: dict[str, object]) -> None:
    """Its signature is over another model, statement or ledger: nobody may say that all agree."""
    identity = started.site(2).identity()

    def disagree(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position != 2 or not isinstance(request, Finish):
            return None
        return [encode(replace(opened(reply), **change), identity)]

    error = stops(Coordinator(started, Meddler(started, disagree)), 193, RemoteProtocolError)
    assert "Celle" in error.what


@pytest.mark.parametrize("reason", [Refused.STATE_MISMATCH, Refused.OUT_OF_ORDER, Refused.INTERNAL])
def test_hospital_that_does_not_confirm_the_final_model_ends_the_run(started, reason: Refused) -> None:
    error = stops(
        Coordinator(started, Meddler(started, refusing(started, 0, reason, Finish))), 193, RemoteProtocolError
    )
    assert "Ahaus" in error.what


@pytest.mark.parametrize("micro", [1, 2**31])
def test_hospital_that_signs_figures_that_cannot_be_ends_the_run(started, micro: int) -> None:
    """Rightly signed, by a hospital that runs something else."""
    identity = started.site(2).identity()

    def lie(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position != 2 or not isinstance(request, Finish):
            return None
        message, said = opened(reply), parse_statement(request.statement)
        figures = (message.attempts_charged, micro)
        mine = hospital_statement(said, started.assignment.roster, 2, figures, Head.from_bytes(message.head))
        signature = bytes.fromhex(sign_for_hospital(mine, identity).signature)
        return [encode(replace(message, epsilon_spent_micro=micro, signature=signature), identity)]

    error = stops(Coordinator(started, Meddler(started, lie)), 193, RemoteProtocolError)
    assert "Celle" in error.what


def test_record_of_a_run_with_lost_attempts_tells_each_hospitals_own(started) -> None:
    """The coordinator counts four attempts; Celle, whose first one failed, and the others were all charged for each."""
    started.start(2, dying_noise(2, EnvironmentFault(630, "out of memory", "free some")))
    coordinator = Coordinator(started, Post(started))
    coordinator.run()
    record = coordinator.rounds.record
    assert (record.said.attempts_used, record.said.attempts_approved) == (ROUNDS + 1, ATTEMPTS)
    charged = [record.signed[position].attempts_charged for position in EVERYBODY]
    assert charged == [started.charged(position) for position in EVERYBODY]
    assert check_journal(record.journal, record.said, started.assignment.roster.identities).lost == 1
    lines = [json.loads(line)["kind"] for line in record.journal.splitlines()]
    assert lines == ["begin", "completed", "lost", "completed", "completed", "end"]


def test_record_is_the_same_when_the_coordinator_asks_again(started) -> None:
    first, second = (Coordinator(started, Post(started)) for _ in range(2))
    first.run()
    with pytest.raises(ProtocolError, match="not finished"):
        _ = second.rounds.record
    second.start()
    second.run()
    assert second.rounds.record.privacy_file == first.rounds.record.privacy_file
    assert second.rounds.record.journal == first.rounds.record.journal


def test_missing_signature_over_the_final_model_ends_at_the_deadline(started) -> None:
    def lose(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        return [] if position == 3 and isinstance(request, Finish) else None

    stops(Coordinator(started, Meddler(started, lose)), 191)
    kept = started.store.load_checkpoint()
    assert kept is not None
    assert kept.state.completed_rounds == ROUNDS
    check_end(started, Coordinator(started, Post(started)).run())


# ------------------------------------------------------------------------------------------------ the coordinator dies


class DeadlyPost(Post):
    """The coordinator dies at its ``at``-th call, before or after it acted."""

    def __init__(self, world, at: int, before: bool) -> None:
        super().__init__(world)
        self.at, self.before = at, before

    def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
        self._die(True)
        super().send(position, kind, payload, timeout_s)
        self._die(False)

    def receive(self) -> list[Reply]:
        self._die(True)
        replies = super().receive()
        self._die(False)
        return replies

    def _die(self, before: bool) -> None:
        if before is self.before and self.calls + before == self.at:
            self.at = 0
            self.queue = []  # what was not sent yet is gone with the process
            raise Killed


CALLS_OF_A_RUN = 4 + 1 + ROUNDS * (4 + 1) + 4 + 1


def test_calls_of_a_run_are_counted(started) -> None:
    post = Post(started)
    Coordinator(started, post).run()
    assert post.calls == CALLS_OF_A_RUN


# before the first message; then after one and after all requests of a phase, and after its replies
MOMENTS = [(1, True), *((5 * phase + call, False) for phase in range(ROUNDS + 2) for call in (1, 4, 5))]


@pytest.mark.parametrize(("at", "before"), MOMENTS)
def test_coordinator_killed_at_a_message_goes_on_and_spends_nothing(
    started, undisturbed: dict[str, bytes], at: int, before: bool
) -> None:
    """Hospitals kept their keys: the open attempt is asked again with the same bytes, and ends with the same model."""
    post = DeadlyPost(started, at, before)
    coordinator = Coordinator(started, post)
    with pytest.raises(Killed):
        coordinator.run()
    coordinator.start()
    checkpoint = coordinator.run()
    check_end(started, checkpoint)
    assert state_bytes(checkpoint.state) == undisturbed["end"]


def test_coordinator_killed_again_and_again_goes_on(started, undisturbed: dict[str, bytes]) -> None:
    """Dies after every seventh call of each life."""
    coordinator = Coordinator(started, Post(started))
    lives = 0
    while True:
        lives += 1
        coordinator.post = DeadlyPost(started, 7, before=False)
        coordinator.start()
        try:
            checkpoint = coordinator.run()
            break
        except Killed:
            assert lives < 30
    assert lives > 3
    check_end(started, checkpoint)
    assert state_bytes(checkpoint.state) == undisturbed["end"]


def test_both_sides_killed_in_one_round_cost_one_spare(started) -> None:
    started.start(2, dying_noise(2, Killed()))
    post = DeadlyPost(started, 4 + 1 + 5 + 5, before=False)
    coordinator = Coordinator(started, post)
    with pytest.raises(Killed):
        coordinator.run()
    coordinator.start()
    check_end(started, coordinator.run(), ROUNDS + 1)


# ------------------------------------------------------------------------------------------------------------- store


@pytest.fixture
def midway(started) -> Coordinator:
    """Killed in round 2: a checkpoint and an open attempt on disk."""
    coordinator = Coordinator(started, DeadlyPost(started, 4 + 1 + 5 + 5, before=False))
    with pytest.raises(Killed):
        coordinator.run()
    assert {path.name for path in started.run_folder.iterdir()} == {"checkpoint.bin", "attempt.bin"}
    return coordinator


@pytest.mark.parametrize("name", ["checkpoint.bin", "attempt.bin"])
def test_altered_file_of_the_coordinator_stops_the_start(midway: Coordinator, name: str) -> None:
    path = midway.world.run_folder / name
    data = path.read_bytes()
    rng = random.Random(1)
    damaged = [flipped(data, rng.randrange(len(data))) for _ in range(20)]
    damaged += [data[:-1], data[: len(data) // 2], data[:10], b"", data + b"\0", data[:-32]]
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(MedfedError) as caught:
            midway.start().run()
        assert caught.value.code == 403
    path.write_bytes(data)
    midway.start()
    check_end(midway.world, midway.run())


def test_checkpoint_reads_back_the_same(midway: Coordinator) -> None:
    store = midway.world.store
    one = store.load_checkpoint()
    assert one is not None
    store.save_checkpoint(one)
    other = store.load_checkpoint()
    assert other is not None
    assert state_bytes(other.state) == state_bytes(one.state)
    assert isinstance(one.previous, ModelState)
    assert isinstance(other.previous, ModelState)
    assert state_bytes(other.previous) == state_bytes(one.previous)
    assert (other.total, other.attestations, other.last_attempt, other.records) == (
        one.total,
        one.attestations,
        one.last_attempt,
        one.records,
    )


def test_checkpoint_holds_signatures_over_the_state_before(midway: Coordinator) -> None:
    """What brings a hospital back later is checked by that hospital: it must be right from the start."""
    checkpoint = midway.world.store.load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.previous is not None
    roster, study_hash = midway.world.assignment.roster, midway.world.study_hash
    previous = checkpoint.previous
    statement = state_statement(study_hash, previous.completed_rounds, state_hash(study_hash, previous))
    for item in checkpoint.attestations:
        verify(roster.identities[int.from_bytes(item[:2], "big")], item[2:], statement)
    assert len(checkpoint.attestations) == 4


def test_open_attempt_of_a_round_that_is_done_is_dropped(midway: Coordinator) -> None:
    """Killed between the checkpoint and the removal of the attempt's file."""
    store = midway.world.store
    frame = store.load_open_attempt()
    assert frame is not None
    midway.start()
    checkpoint = midway.run()
    store.save_open_attempt(frame)
    midway.start()
    assert state_bytes(midway.run().state) == state_bytes(checkpoint.state)
    assert store.load_open_attempt() is None


def test_coordinator_that_lost_its_checkpoint_spends_nothing_more(midway: Coordinator) -> None:
    """Restored from an old backup: hospitals are ahead, refuse, and are not charged."""
    charged = [midway.world.charged(position) for position in EVERYBODY]
    (midway.world.run_folder / "checkpoint.bin").unlink()
    (midway.world.run_folder / "attempt.bin").unlink()
    midway.start()
    stops(midway, 190)
    assert [midway.world.charged(position) for position in EVERYBODY] == charged


def test_finished_message_of_another_run_is_not_counted(started) -> None:
    """A Finished with another nonce (an old one) confirms nothing."""
    seen: list[bytes] = []

    def replay(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position == 0 and isinstance(opened(reply), Finished) and not seen:
            seen.append(reply)
            return [encode(replace(opened(reply), nonce=bytes(16)), started.site(0).identity())]
        return None

    post = Meddler(started, replay)
    check_end(started, Coordinator(started, post).run())
    assert sum(position == 0 and isinstance(opened(p), Finish) for position, _, p in post.sent) == 2


def test_setup_reply_of_another_session_is_not_counted(started) -> None:
    done: list[int] = []

    def replay(position: int, request: Message, reply: bytes) -> list[bytes] | None:
        if position == 0 and isinstance(opened(reply), OfferReply) and not done:
            done.append(1)
            return [encode(replace(opened(reply), session=bytes(16)), started.site(0).identity())]
        return None

    check_end(started, Coordinator(started, Meddler(started, replay)).run())


def test_log_names_hospitals_and_reasons(started, caplog: pytest.LogCaptureFixture) -> None:
    started.start(2, dying_noise(2, EnvironmentFault(630, "out of memory", "free some")))
    with caplog.at_level(logging.INFO, "medfed.server"):
        Coordinator(started, Post(started)).run()
    assert "attempt 2 is lost: Celle: INTERNAL" in caplog.text


# -------------------------------------------------------------------------------------------- statistics, local steps

STATISTICS = ("[training]", "[statistics]\nnoise_multiplier = 6.0\nattempts = 2\nleast_scale = 0.01\n[training]")
UPDATE = ('aggregate = "gradient"', 'aggregate = "update"\nlocal = { steps = 3, learning_rate = 0.5, proximal = 0.0 }')


def check_four(world, checkpoint: Checkpoint, attempts: int) -> None:
    """The statistics and three rounds: one model for all, nobody charged for more than was tried."""
    assert (checkpoint.state.completed_rounds, checkpoint.last_attempt) == (4, attempts)
    assert [record.round for record in checkpoint.records] == [1, 2, 3, 4]
    models = {(world.place(position) / "model.safetensors").read_bytes() for position in EVERYBODY}
    assert len(models) == 1
    released = released_weights(checkpoint.state, world.study)
    assert np.isfinite(released).all()
    assert all(world.charged(position) <= attempts for position in EVERYBODY)


@pytest.mark.parametrize("changes", [(STATISTICS,), (STATISTICS, UPDATE)], ids=["gradient", "update"])
def test_run_with_statistics_ends_and_survives_both_sides(make_world, changes) -> None:
    """A hospital dies at its first noise, another forgets its state, the coordinator dies after the statistics."""
    world = make_world(*changes)
    world.start_all()
    world.start(2, dying_noise(1, EnvironmentFault(630, "out of memory", "free some")))
    coordinator = Coordinator(world, DeadlyPost(world, 5 * 5, before=False))
    with pytest.raises(Killed):
        coordinator.run()
    world.kill(1)
    (world.place(1) / "state.bin").unlink()
    world.start(1)
    coordinator.start()
    checkpoint = coordinator.run()
    check_four(world, checkpoint, checkpoint.last_attempt)
    assert 5 <= checkpoint.last_attempt <= 6


def test_statistics_whose_attempts_are_all_lost_end_the_run(make_world) -> None:
    """No training attempt is spent on them, although seven are left."""
    world = make_world(STATISTICS)
    world.start_all()
    world.start(2, always(EnvironmentFault(630, "out of memory", "free some"), 1))
    stops(Coordinator(world, Post(world)), 190)
    assert [world.charged(position) for position in EVERYBODY] == [2, 2, 2, 2]
