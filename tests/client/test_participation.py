"""A hospital and its promises: debit before use, one vector an attempt, nothing outside the envelope.

Hospitals are real (folders, keys, ledger, data, training); the test speaks for the coordinator.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.advance import ModelState, state_bytes, state_hash, task_hash
from medfed.client.hospital import Hospital
from medfed.client.ledger import Ledger
from medfed.errors import EnvironmentFault, MedfedError, PrivacyError, RemoteProtocolError
from medfed.identity import Identity
from medfed.models import tasks
from medfed.privacy.accounting import micro
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.sampling import poisson_mask
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.transitions import AggregatorPhase
from medfed.privacy.statement import (
    Ending,
    PrivacyFile,
    SignedByHospital,
    canonical,
    hospital_statement,
    parse_statement,
    statement,
)
from medfed.seams import Entropy, SystemFiles
from medfed.server.ending import model_file
from medfed.simulations.entropy import SeededEntropy
from medfed.wire import (
    FROM_HOSPITAL,
    NO_POSITION,
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
    encode,
    numbered,
    pack_positions,
    release_size_bytes,
    state_statement,
    upload_size_bytes,
)
from medfed.witness import NO_HEAD, Head, item, newest, read_heads, with_heads

STRANGER = Identity.from_seed(b"\x99" * 32)
EVERYBODY = range(4)


def zeros(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
    return np.zeros(size, np.int64)


def nonce_of(attempt: int) -> bytes:
    return hashlib.sha256(b"nonce" + attempt.to_bytes(4, "big")).digest()[:16]


class Desk:
    """The coordinator as a hand that writes requests; every frame that leaves a hospital is kept."""

    def __init__(self, world) -> None:
        self.world = world
        self.it = world.assignment
        self.state: ModelState = self.it.first
        self.previous: ModelState | None = None
        self.total = b""
        self.survivors: tuple[int, ...] = ()
        self.attempt = 0
        self.session = bytes(16)
        self.offers: tuple[bytes, ...] = ()
        self.told: set[bytes] = set()
        self.heads: dict[int, Head] = {}
        self.attestations: dict[int, bytes] = {}
        self.frames: list[bytes] = []
        self.limit = 1 << 16

    # --- talking -----------------------------------------------------------------------------------------------------

    def send(self, position: int, frame: bytes) -> Message:
        reply = self.world.hospitals[position].handle(frame)
        self.frames.append(reply)
        message = decode(reply, vector_limit_bytes=self.limit)
        check_signature(reply, self.it.roster.identities[position])
        return message

    def sign(self, message: Message) -> bytes:
        return encode(message, self.it.identity)

    def ask(self, position: int, message: Message) -> Message:
        return self.send(position, self.sign(message))

    # --- a run -------------------------------------------------------------------------------------------------------

    @property
    def everybody(self) -> range:
        return range(len(self.it.roster.hospitals))

    def set_up(self, session: bytes | None = None) -> None:
        """All hospitals' offers."""
        self.session = session or hashlib.sha256(self.session).digest()[:16]
        replies = [self.ask(position, self.setup(self.session)) for position in self.everybody]
        self.offers = tuple(reply.offer for reply in replies)
        self.told = {each for reply in replies for each in reply.heads if not each.endswith(NO_HEAD)}
        self.note(read_heads(self.told, self.it.roster.identities))
        self.attempt = max(self.attempt, *(reply.highest_attempt for reply in replies))

    def setup(self, session: bytes, heads: tuple[bytes, ...] = ()) -> SetupRequest:
        return SetupRequest(self.world.study_hash, session, heads)

    def note(self, heads: Iterable[tuple[int, Head]]) -> None:
        """Remember the newest head of each ledger."""
        self.heads = newest([*self.heads.items(), *heads])

    def known(self) -> set[bytes]:
        """The newest head of each ledger."""
        return {item(position, head) for position, head in self.heads.items()}

    def request(self, attempt: int | None = None, **changes: object) -> RoundRequest:
        attempt = self.attempt + 1 if attempt is None else attempt
        plain = RoundRequest(
            self.world.study_hash,
            self.session,
            nonce_of(attempt),
            attempt,
            self.state.completed_rounds,
            state_hash(self.world.study_hash, self.state),
            self.offers,
            tuple(sorted(self.told | self.known())),
            pack_positions(self.survivors),
            self.total,
        )
        return replace(plain, **changes)

    def sum_of(self, request: RoundRequest, uploads: list[Upload]) -> Aggregator:
        """All uploads in one sum; raises if one of them does not belong."""
        aggregator = Aggregator.from_offers(self.it.secagg_config(), request.offers)
        task = task_hash(self.world.study_hash, self.state)
        aggregator.open_round(request.attempt, with_heads(task, request.heads))
        for upload in uploads:
            aggregator.add_upload(upload.payload)
        return aggregator

    def add_up(self, request: RoundRequest, uploads: list[Upload]) -> bytes:
        """The sum of all uploads, opened with the help of those who sent them."""
        aggregator = self.sum_of(request, uploads)
        if not aggregator.cohort.is_strict:
            self.collect_votes(aggregator, request.attempt)
            for position in aggregator.survivors:
                reply = self.ask(position, self.release_request(aggregator, position, request.attempt))
                assert isinstance(reply, Release), reply
                aggregator.add_release(position, reply.released)
        return aggregator.total().tobytes()

    def collect_votes(self, aggregator: Aggregator, attempt: int) -> None:
        survivors = aggregator.freeze()
        for position in survivors if aggregator.phase is AggregatorPhase.VOTING else ():
            reply = self.ask(position, self.vote_request(survivors, attempt))
            assert isinstance(reply, Vote), reply
            aggregator.add_vote(position, reply.vote)

    def vote_request(self, survivors: Iterable[int], attempt: int) -> VoteRequest:
        named = pack_positions(survivors)
        return VoteRequest(self.world.study_hash, self.session, nonce_of(attempt), attempt, named)

    def release_request(self, aggregator: Aggregator, position: int, attempt: int) -> ReleaseRequest:
        return ReleaseRequest(
            self.world.study_hash,
            self.session,
            nonce_of(attempt),
            attempt,
            pack_positions(aggregator.survivors),
            numbered(aggregator.certificate()),
            numbered(aggregator.boxes_for(position)),
        )

    def upload_all(self, request: RoundRequest) -> list[Upload]:
        """Everybody's upload of a new attempt."""
        uploads = [self.ask(position, request) for position in self.everybody]
        assert all(isinstance(upload, Upload) for upload in uploads), uploads
        self.attempt = request.attempt
        return uploads

    def round(self, lost: Iterable[int] = ()) -> list[Upload]:
        """One whole round; what ``lost`` hospitals send never arrives."""
        request = self.request()
        uploads = [upload for upload in self.upload_all(request) if upload.position not in lost]
        self.attestations = {upload.position: upload.attestation for upload in uploads}
        self.note((upload.position, Head.from_bytes(upload.head)) for upload in uploads)
        self.total = self.add_up(request, uploads)
        self.survivors = tuple(upload.position for upload in uploads)
        self.previous, self.state = self.state, self.it.advance(self.state, self.total, self.survivors)
        return uploads

    def transfer(self, signers: list[tuple[int, bytes]] | None = None, **changes: object) -> StateTransfer:
        """The state before the last sum, with the signatures of its hospitals (or those given)."""
        state = self.previous
        if signers is None:
            signers = sorted(self.attestations.items())[:2]
        signed = tuple(position.to_bytes(2, "big") + signature for position, signature in signers)
        return replace(
            StateTransfer(self.world.study_hash, b"t" * 16, state.completed_rounds, state_bytes(state), signed),
            **changes,
        )

    def finish(self, **changes: object) -> Finish:
        digest = state_hash(self.world.study_hash, self.state)
        model = hashlib.sha256(model_file(self.it.study, self.state)).digest()
        ending = Ending(self.attempt, digest, model, bytes(32), (), {})
        said = statement(self.it.study, self.it.roster, self.it.plan, ending)
        plain = Finish(
            study_hash=self.world.study_hash,
            nonce=b"f" * 16,
            round=self.state.completed_rounds,
            state_hash=digest,
            heads=tuple(sorted(self.known())),
            statement=canonical(said),
            statement_signature=said.sign(self.it.identity),
            survivors=pack_positions(self.survivors),
            total=self.total,
        )
        return replace(plain, **changes)


@pytest.fixture
def desk(world) -> Desk:
    """Everybody started, keys exchanged."""
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    return desk


def refused(reply: Message, reason: Refused) -> None:
    assert isinstance(reply, Refusal), reply
    assert Refused(reply.reason) is reason


def everything_in(folder: Path) -> dict[str, str]:
    """Names and hashes of all files of a hospital. SQLite's shared memory is scratch and left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("-shm")
    }


class unchanged:
    """The block leaves every byte of a hospital's folder as it was."""

    def __init__(self, world, position: int = 0) -> None:
        self.folder = world.folder / ("Ahaus", "Bonn", "Celle", "Daun")[position]

    def __enter__(self) -> None:
        self.before = everything_in(self.folder)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            assert everything_in(self.folder) == self.before


# ------------------------------------------------------------------------------------------------- order of a round


class SpyEntropy:
    """Tells what is drawn, when it is drawn."""

    def __init__(self, inner: Entropy, tell: Callable[[str], None]) -> None:
        self.inner, self.tell = inner, tell

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        self.tell(purpose)
        return self.inner.draw(purpose, size_bytes)


class SpyFiles(SystemFiles):
    """Tells what is written, before it is; ``tell`` may raise."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def write(self, path: Path, data: bytes, *, private: bool = False) -> None:
        self.tell(path.name)
        super().write(path, data, private=private)


APPROVED = [("BEGUN", 0), ("APPROVED", 0)]


def test_debit_is_on_disk_before_records_are_used(world) -> None:
    """At every step the ledger's file, read by a second reader, already says what the next step rests on."""
    world.start_all()
    seen: list[tuple[str, list[tuple[str, int]]]] = []

    def tell(what: str) -> None:
        seen.append((what, world.rows(0)[2:]))

    world.start(0, entropy=SpyEntropy(SeededEntropy(3, "spied"), tell), files=SpyFiles(tell))
    desk = Desk(world)
    desk.set_up()
    desk.ask(0, desk.request())
    debited = [("RESERVED", 1)]
    assert seen == [
        ("secagg/offer", []),
        ("witnesses.bin", debited),
        ("sampling", debited),
        ("noise", debited),
        ("outbox.bin", debited),
    ]
    assert world.rows(0) == [*APPROVED, ("RESERVED", 1), ("SEALED", 1), ("RELEASED", 1)]


def test_ledger_tells_a_run_in_order(desk: Desk) -> None:
    for _ in range(3):
        desk.round()
    assert isinstance(desk.ask(2, desk.finish()), Finished)
    attempts = [[("RESERVED", n), ("SEALED", n), ("RELEASED", n), ("ACKED", n)] for n in (1, 2, 3)]
    assert desk.world.rows(2) == [*APPROVED, *attempts[0], *attempts[1], *attempts[2], ("CLOSED", 0)]


def test_debit_that_cannot_be_written_means_that_nothing_leaves(world) -> None:
    """The planted fault: the ledger's file refuses the row."""
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    drawn: list[str] = []
    hospital = world.hospitals[0]
    part = hospital._studies[world.study_hash]
    part._seams = replace(part._seams, entropy=SpyEntropy(part._seams.entropy, drawn.append))
    part._ledger._store._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(EnvironmentFault, match="MF-602"):
        hospital.handle(desk.sign(desk.request()))
    assert drawn == []
    assert world.rows(0) == APPROVED


def test_upload_is_made_of_the_noised_vector_alone(world) -> None:
    """Four known vectors in, their exact sum out: neither more nor less than clipped sum plus noise."""
    known = [np.array([7, -3, 0, 2**20]), np.array([1, 1, 1, 1]), np.array([0, 0, -5, 0]), np.array([2, 0, 0, 9])]
    nobody = ScriptedSampling(empty=True)
    for position in EVERYBODY:
        vector = known[position]
        entropy = nobody.of(SeededEntropy(5, str(position)), world.study.privacy.sampling_rate)
        world.start(position, lambda key, sd, size, vector=vector: vector, entropy=entropy)
    desk = Desk(world)
    desk.set_up()
    desk.round()
    assert desk.it.plan.read_total(desk.total).tolist() == sum(known).tolist()


class ScriptedSampling:
    """Entropy whose sampling keys take nobody."""

    def __init__(self, empty: bool) -> None:
        self.empty = empty

    def of(self, inner: Entropy, rate: float) -> Entropy:
        key = next(
            key
            for number in range(100_000)
            if not poisson_mask(key := hashlib.sha256(number.to_bytes(4, "big")).digest(), 8, rate).any()
        )

        class Scripted:
            def draw(self, purpose: str, size_bytes: int) -> bytes:
                fresh = inner.draw(purpose, size_bytes)
                return key + fresh[32:] if purpose == "sampling" else fresh

        return Scripted()


def test_empty_poisson_batch_is_still_a_charged_and_noisy_step(world) -> None:
    """Nobody is sampled at hospital 0: it draws noise of the full scale, pays, and sends a vector like any other."""
    noises: list[tuple[float, int]] = []

    def noted(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        noises.append((sd, size))
        return discrete_gaussian(key, sd, size)

    world.start_all(zeros)
    rate = world.study.privacy.sampling_rate
    world.start(0, noted, entropy=ScriptedSampling(empty=True).of(SeededEntropy(5, "0"), rate))
    desk = Desk(world)
    desk.set_up()
    request = desk.request()
    upload = desk.ask(0, request)
    usual = desk.ask(1, request)
    assert isinstance(upload, Upload)
    assert len(upload.payload) == len(usual.payload)
    assert noises == [(world.assignment.plan.noise_sd, world.assignment.plan.words)]
    assert world.rows(0)[2:] == [("RESERVED", 1), ("SEALED", 1), ("RELEASED", 1)]


# ------------------------------------------------------------------------------------------------ the same, and other


def test_same_request_gets_the_same_bytes_for_free(desk: Desk) -> None:
    frame = desk.sign(desk.request())
    first = desk.world.hospitals[0].handle(frame)
    with unchanged(desk.world):
        assert [desk.world.hospitals[0].handle(frame) for _ in range(3)] == [first] * 3
    assert desk.world.charged(0) == 1


def test_same_request_gets_the_same_bytes_after_a_restart(desk: Desk) -> None:
    """Keys are gone with the old process: what is sent is the sealed reply from disk, not a new one."""
    frame = desk.sign(desk.request())
    first = desk.world.hospitals[0].handle(frame)
    desk.world.start(0)
    assert desk.world.hospitals[0].handle(frame) == first
    assert desk.world.charged(0) == 1


@pytest.mark.parametrize("field", ["nonce", "session", "state_hash", "offers", "round"])
def test_other_request_for_a_used_attempt_is_refused(desk: Desk, field: str) -> None:
    """One attempt answers one request: other bytes would need another vector under the same debit."""
    request = desk.request()
    desk.ask(0, request)
    other = {
        "nonce": b"x" * 16,
        "session": b"x" * 16,
        "state_hash": b"x" * 32,
        "offers": (*desk.offers[1:], desk.offers[0]),
        "round": 1,
    }
    with unchanged(desk.world):
        refused(desk.ask(0, replace(request, **{field: other[field]})), Refused.OUT_OF_ORDER)


def test_attempt_that_lies_behind_is_refused(desk: Desk) -> None:
    """The coordinator may skip attempts, never go back to one."""
    assert isinstance(desk.ask(0, desk.request(attempt=3)), Upload)
    with unchanged(desk.world):
        for attempt in (0, 1, 2):
            refused(desk.ask(0, desk.request(attempt=attempt)), Refused.OUT_OF_ORDER)
    assert isinstance(desk.ask(0, desk.request(attempt=4)), Upload)
    assert desk.world.charged(0) == 2


def test_attempts_beyond_the_approved_list_are_refused(desk: Desk) -> None:
    with unchanged(desk.world):
        refused(desk.ask(0, desk.request(attempt=6)), Refused.BUDGET)
    assert isinstance(desk.ask(0, desk.request(attempt=5)), Upload)


def test_two_attempts_at_one_state_have_independent_noise(desk: Desk) -> None:
    """T10: a repeated round is another vector under another debit; the difference of both is noise, not an update."""
    drawn: list[NDArray[np.int64]] = []

    def noted(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        drawn.append(discrete_gaussian(key, sd, size))
        return drawn[-1]

    desk.world.start(0, noted)
    desk.set_up()
    first, second = desk.ask(0, desk.request(attempt=1)), desk.ask(0, desk.request(attempt=2))
    assert first.payload != second.payload
    assert not np.array_equal(drawn[0], drawn[1])
    assert desk.world.charged(0) == 2


def test_altered_outbox_is_not_sent(desk: Desk) -> None:
    """A torn or edited outbox does not match what the ledger sealed."""
    request = desk.request()
    desk.ask(0, request)
    path = desk.world.place(0) / "outbox.bin"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", whole[:-70] + bytes([whole[-70] ^ 1]) + whole[-69:]):
        path.write_bytes(damaged)
        refused(desk.ask(0, request), Refused.ATTEMPT_SPENT)
    path.write_bytes(whole)
    assert isinstance(desk.ask(0, request), Upload)


def test_lost_outbox_is_an_answer_not_a_fault(desk: Desk) -> None:
    request = desk.request()
    desk.ask(0, request)
    (desk.world.place(0) / "outbox.bin").unlink()
    refused(desk.ask(0, request), Refused.ATTEMPT_SPENT)


# ------------------------------------------------------------------------------------------------ faults in the middle


def failing(error: BaseException) -> Callable[[bytes, float, int], NDArray[np.int64]]:
    calls: list[int] = []

    def noise(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return discrete_gaussian(key, sd, size)

    return noise


def test_fault_with_a_name_abandons_the_attempt_and_keeps_the_charge(desk: Desk) -> None:
    desk.world.start(0, failing(EnvironmentFault(630, "out of memory", "buy some")))
    desk.set_up()
    request = desk.request()
    refused(desk.ask(0, request), Refused.INTERNAL)
    assert desk.world.rows(0)[2:] == [("RESERVED", 1), ("ABANDONED", 1)]
    refused(desk.ask(0, request), Refused.ATTEMPT_SPENT)
    assert isinstance(desk.ask(0, desk.request(attempt=2)), Upload)
    assert desk.world.charged(0) == 2


@pytest.mark.parametrize("error", [RuntimeError("patient 17"), MemoryError()], ids=repr)
def test_fault_without_a_name_abandons_the_attempt_and_keeps_the_charge(desk, caplog, error: Exception) -> None:
    desk.world.start(0, failing(error))
    desk.set_up()
    request = desk.request()
    refused(desk.ask(0, request), Refused.INTERNAL)
    assert desk.world.rows(0)[2:] == [("RESERVED", 1), ("ABANDONED", 1)]
    assert "patient 17" not in caplog.text
    refused(desk.ask(0, request), Refused.ATTEMPT_SPENT)
    assert isinstance(desk.ask(0, desk.request(attempt=2)), Upload)
    assert desk.world.charged(0) == 2


def test_attempt_cut_by_a_kill_is_abandoned_and_stays_charged(desk: Desk) -> None:
    """RESERVED and nothing more on disk, then a new process."""
    desk.world.start(0, failing(KeyboardInterrupt()))
    desk.set_up()
    request = desk.request()
    with pytest.raises(KeyboardInterrupt):
        desk.ask(0, request)
    desk.world.start(0)
    refused(desk.ask(0, request), Refused.ATTEMPT_SPENT)
    assert desk.world.rows(0)[2:] == [("RESERVED", 1), ("ABANDONED", 1)]


@pytest.mark.parametrize("error", [EnvironmentFault(603, "the disk is full", "free some space"), OSError(5, "I/O")])
def test_reply_that_cannot_be_stored_is_not_sent(world, error: Exception) -> None:
    """The vector is masked, the outbox cannot be written: charged, abandoned, and the pad is never used again."""
    failures = [error]

    def tell(name: str) -> None:
        if name == "outbox.bin" and failures:
            raise failures.pop()

    world.start_all()
    world.start(0, files=SpyFiles(tell))
    desk = Desk(world)
    desk.set_up()
    try:
        refused(desk.ask(0, desk.request()), Refused.INTERNAL)
    except OSError:
        assert isinstance(error, OSError)
    assert not any(isinstance(message, Upload) for message in opened(desk))
    assert ("SEALED", 1) not in world.rows(0)
    assert isinstance(desk.ask(0, desk.request(attempt=2)), Upload), "the session still works"
    assert world.charged(0) == 2


def opened(desk: Desk) -> list[Message]:
    return [decode(frame, vector_limit_bytes=desk.limit) for frame in desk.frames]


def test_fault_text_never_leaves(world) -> None:
    """The coordinator gets a number from a list; the words go to this hospital's own log."""
    secret = "what only this hospital may know"
    world.start_all()
    world.start(0, failing(EnvironmentFault(608, secret, secret)))
    desk = Desk(world)
    desk.set_up()
    desk.ask(0, desk.request())
    assert not any(secret.encode() in frame for frame in desk.frames)


# -------------------------------------------------------------------------------------------- refused before the debit


def test_other_state_is_refused_before_the_debit(desk: Desk) -> None:
    with unchanged(desk.world):
        refused(desk.ask(0, desk.request(state_hash=bytes(32))), Refused.STATE_MISMATCH)
    assert isinstance(desk.ask(0, desk.request()), Upload)


@pytest.mark.parametrize("change", ["short", "long", "other"])
def test_other_sum_is_refused_before_the_debit(desk: Desk, change: str) -> None:
    """The next state is computed here: a sum that does not lead to the state named changes nothing."""
    desk.round()
    total = {
        "short": desk.total[:-1],
        "long": desk.total + b"\0",
        "other": bytes([desk.total[0] ^ 1]) + desk.total[1:],
    }[change]
    with unchanged(desk.world):
        refused(desk.ask(0, desk.request(total=total)), Refused.STATE_MISMATCH)
    assert isinstance(desk.ask(0, desk.request()), Upload)


def test_hospital_led_to_another_model_cannot_be_added_up(desk: Desk) -> None:
    """T5: one hospital gets another sum with its fitting hash. It trains, but its masks cancel with nobody's."""
    desk.round()
    other_total = bytes([desk.total[0] ^ 1]) + desk.total[1:]
    other_state = desk.it.advance(desk.previous, other_total, desk.survivors)
    request = desk.request()
    misled = replace(request, total=other_total, state_hash=state_hash(desk.world.study_hash, other_state))
    uploads = [desk.ask(position, misled if position == 0 else request) for position in EVERYBODY]
    assert all(isinstance(upload, Upload) for upload in uploads)
    with pytest.raises(RemoteProtocolError, match="MF-110"):
        desk.add_up(request, uploads)


def test_hospitals_led_to_one_model_are_added_up(desk: Desk) -> None:
    """The positive control of the test above."""
    desk.round()
    request = desk.request()
    assert desk.add_up(request, [desk.ask(position, request) for position in EVERYBODY])


def test_round_out_of_order_is_refused_before_the_debit(desk: Desk) -> None:
    desk.round()
    desk.round()
    with unchanged(desk.world):
        refused(desk.ask(0, desk.request(round=0)), Refused.OUT_OF_ORDER)
        refused(desk.ask(0, desk.request(round=3)), Refused.OUT_OF_ORDER)
    assert isinstance(desk.ask(0, desk.request()), Upload)


def test_round_after_the_last_is_refused_before_the_debit(desk: Desk) -> None:
    for _ in range(3):
        desk.round()
    charged = desk.world.charged(0)
    refused(desk.ask(0, desk.request()), Refused.OUT_OF_ORDER)
    assert desk.world.charged(0) == charged


def test_other_session_is_refused_before_the_debit(desk: Desk) -> None:
    with unchanged(desk.world):
        refused(desk.ask(0, desk.request(session=b"x" * 16)), Refused.NO_SESSION)
        desk.world.start(0)
        refused(desk.ask(0, desk.request()), Refused.NO_SESSION)


def test_offers_that_do_not_verify_are_refused_before_the_debit(desk: Desk) -> None:
    """Peers' keys count only under the signatures of the approved roster; own offer present; all of them."""
    own, *others = desk.offers
    flipped = others[0][:-1] + bytes([others[0][-1] ^ 1])
    with unchanged(desk.world):
        for offers in (
            (),
            tuple(others),
            (own, *others[1:]),
            (own, flipped, *others[1:]),
            (own, own, *others[1:]),
            (own, *others, others[-1]),
            (b"", *others),
        ):
            refused(desk.ask(0, desk.request(offers=offers)), Refused.OFFERS_REFUSED)
    assert isinstance(desk.ask(0, desk.request()), Upload)


def test_own_offer_of_an_earlier_process_asks_for_a_new_setup(desk: Desk) -> None:
    """Restarted, then asked by a late copy of the same session's setup: its first offer's keys are gone."""
    desk.world.start(0)
    desk.ask(0, desk.setup(desk.session))
    with unchanged(desk.world):
        refused(desk.ask(0, desk.request()), Refused.NO_SESSION)
    desk.set_up()
    assert isinstance(desk.ask(0, desk.request()), Upload)


def test_offers_that_change_within_a_session_are_refused(desk: Desk) -> None:
    """A hospital that restarted has another key: the old session's pads must not be mixed with it."""
    desk.round()
    desk.world.start(3)
    newer = desk.ask(3, desk.setup(desk.session)).offer
    refused(desk.ask(0, desk.request(offers=(*desk.offers[:3], newer))), Refused.OFFERS_REFUSED)
    assert desk.world.charged(0) == 1


def test_budget_that_was_lowered_since_approval_is_kept(desk: Desk) -> None:
    config = desk.world.folder / "Ahaus" / "hospital.toml"
    text = config.read_text()
    assert "max_epsilon_study = 1000.0" in text
    config.write_text(text.replace("max_epsilon_study = 1000.0", "max_epsilon_study = 0.001"))
    desk.world.start(0)
    desk.set_up()
    with unchanged(desk.world):
        refused(desk.ask(0, desk.request()), Refused.BUDGET)


# ----------------------------------------------------------------------------------------------------- who may ask


def requests(desk: Desk) -> list[Message]:
    return [
        desk.setup(b"new session here"),
        desk.request(),
        desk.vote_request(EVERYBODY, desk.attempt),
        ReleaseRequest(desk.world.study_hash, desk.session, bytes(16), desk.attempt, bytes(2), (), ()),
        desk.transfer(),
        desk.finish(),
    ]


def test_request_that_the_coordinator_did_not_sign_changes_nothing(desk: Desk) -> None:
    desk.round()
    hospital: Hospital = desk.world.hospitals[0]
    bonn = desk.world.site(1).identity()
    with unchanged(desk.world):
        for message in requests(desk):
            good = desk.sign(message)
            forged = [good[:-1] + bytes([good[-1] ^ 1]), good[:-64] + bytes(64)]
            forged += [good[:40] + bytes([good[40] ^ 1]) + good[41:]]
            forged += [encode(message, identity) for identity in (STRANGER, bonn)]
            for frame in forged:
                with pytest.raises(RemoteProtocolError) as caught:
                    hospital.handle(frame)
                assert caught.value.code == 110
    assert isinstance(desk.ask(0, desk.request()), Upload)


def test_message_that_hospitals_do_not_take_changes_nothing(desk: Desk) -> None:
    reply = desk.frames[0]
    with unchanged(desk.world):
        for frame in (reply, b"", bytes(100), b"MFW\2" + bytes(100)):
            with pytest.raises(RemoteProtocolError) as caught:
                desk.world.hospitals[1].handle(frame)
            assert caught.value.code in {101, 102, 103, 104}


def test_unknown_study_is_refused_and_says_nothing(desk: Desk) -> None:
    desk.round()
    with unchanged(desk.world):
        for message in requests(desk):
            reply = desk.ask(0, replace(message, study_hash=bytes(32)))
            refused(reply, Refused.NOT_APPROVED)
            assert reply.position == NO_POSITION


def test_withdrawn_study_is_refused(desk: Desk) -> None:
    world = desk.world
    world.kill(0)
    site = world.site(0)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        ledger.withdraw(world.study_hash, "changed our mind")
    world.start(0)
    for message in (desk.setup(bytes(16)), desk.request()):
        refused(desk.ask(0, message), Refused.NOT_APPROVED)
    assert world.charged(0) == 0


def test_expired_study_is_refused(desk: Desk) -> None:
    desk.world.clock.wall_from_s = 4_102_444_800.0  # 2100-01-01
    with unchanged(desk.world):
        for message in (desk.setup(bytes(16)), desk.request()):
            reply = desk.ask(0, message)
            refused(reply, Refused.NOT_APPROVED)
            assert reply.position == 0


def test_study_may_still_be_finished_after_its_last_day(desk: Desk) -> None:
    """All is trained and paid for: the last sum is only computed and signed."""
    for _ in range(3):
        desk.round()
    desk.world.clock.wall_from_s = 4_102_444_800.0
    assert isinstance(desk.ask(0, desk.finish()), Finished)


def test_new_patients_since_approval_stop_the_start(desk: Desk) -> None:
    path = desk.world.folder / "Ahaus" / "patients.csv"
    path.write_text(path.read_text() + "new-patient,50,1.0,no,0\n")
    with pytest.raises(PrivacyError) as caught:
        desk.world.start(0)
    assert caught.value.code == 340
    assert "new-patient" not in str(caught.value)


@pytest.mark.parametrize("name", ["study.json", "roster.json", "first_model.safetensors"])
def test_pinned_file_changed_on_disk_stops_the_start(desk: Desk, name: str) -> None:
    path = desk.world.place(0) / name
    data = path.read_bytes()
    at = len(data) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(MedfedError) as caught:
        desk.world.start(0)
    assert caught.value.code in {110, 124, 201}
    path.write_bytes(data)
    desk.world.start(0)


# --------------------------------------------------------------------------------------------------- state transfer


@pytest.fixture
def behind(desk: Desk) -> Desk:
    """Two rounds are done; hospital 0 lost its state and starts from the first model again."""
    desk.round()
    desk.round()
    (desk.world.place(0) / "state.bin").unlink()
    desk.world.start(0)
    desk.set_up()
    refused(desk.ask(0, desk.request()), Refused.NEED_STATE)
    return desk


def test_state_with_signatures_of_c_plus_one_hospitals_is_taken(behind: Desk) -> None:
    accepted = behind.ask(0, behind.transfer())
    assert isinstance(accepted, StateAccepted)
    assert (accepted.round, accepted.nonce) == (1, b"t" * 16)
    behind.round()
    assert behind.world.charged(0) == 3


def bad_transfers(desk: Desk) -> dict[str, StateTransfer]:
    signed = sorted(desk.attestations.items())
    state = desk.previous
    altered = replace(state, weights=state.weights + 1.0)
    digest = state_hash(desk.world.study_hash, state)
    statement = state_statement(desk.world.study_hash, state.completed_rounds, digest)
    later = replace(state, completed_rounds=2)
    liar = desk.world.site(1).identity()

    def signed_by_liar(changed: ModelState) -> tuple[int, bytes]:
        told = state_hash(desk.world.study_hash, changed)
        return 1, liar.sign(state_statement(desk.world.study_hash, changed.completed_rounds, told))

    other_study = liar.sign(state_statement(bytes(32), state.completed_rounds, digest))
    own = desk.world.site(0).identity().sign(statement)
    transfer = desk.transfer
    return {
        "no signature": transfer([]),
        "c signatures": transfer(signed[1:2]),
        "one signer twice": transfer([signed[1], signed[1]]),
        "one signer three times": transfer([signed[2]] * 3),
        "one of them a stranger": transfer([signed[1], (2, STRANGER.sign(statement))]),
        "one beyond the roster": transfer([signed[1], (4, STRANGER.sign(statement))]),
        "one under another's number": transfer([signed[1], (2, signed[3][1])]),
        "good ones beside a bad one": transfer([*signed, (2, bytes(64))]),
        "cut signature": transfer([signed[1], (2, signed[2][1][:63])]),
        "other state": transfer(signed, state=state_bytes(altered)),
        "c liars about another state": transfer([signed_by_liar(altered)], state=state_bytes(altered)),
        "other round in the state": transfer(signed, state=state_bytes(later), round=2),
        "other round named": transfer(signed, round=2),
        "other study": transfer([signed[0], (1, other_study)]),
        "own signature twice": transfer([(0, own), (0, own)]),
        "cut state": transfer(signed, state=state_bytes(state)[:-8]),
        "not finite": transfer(signed, state=state_bytes(replace(state, first=state.first * np.nan))),
        "empty": transfer(signed, state=b""),
    }


def test_state_without_enough_signatures_is_refused(behind: Desk) -> None:
    """At least c + 1 different hospitals, so at least one that does not lie; each over this state of this study."""
    for name, transfer in bad_transfers(behind).items():
        with unchanged(behind.world):
            reply = behind.ask(0, transfer)
        assert isinstance(reply, Refusal) and Refused(reply.reason) is Refused.SIGNATURES, name
        assert reply.nonce == transfer.nonce, name
    refused(behind.ask(0, behind.request()), Refused.NEED_STATE)
    assert isinstance(behind.ask(0, behind.transfer()), StateAccepted)


def test_state_that_lies_behind_is_refused(desk: Desk) -> None:
    desk.round()
    early = desk.transfer()
    desk.round()
    desk.ask(0, desk.request())  # hospital 0 is now after round 2
    with unchanged(desk.world):
        refused(desk.ask(0, early), Refused.OUT_OF_ORDER)


def test_state_file_that_was_altered_is_not_trained_on_and_comes_back_with_signatures(desk: Desk, caplog) -> None:
    """The state this hospital signed itself: a flipped bit is noticed; a torn file costs a transfer, not the study."""
    desk.round()
    desk.round()
    path = desk.world.place(0) / "state.bin"
    data = path.read_bytes()
    for damaged in (data[:20] + bytes([data[20] ^ 1]) + data[21:], data[:-1], b"", data[:-64] + bytes(64)):
        path.write_bytes(damaged)
        desk.world.start(0)
        assert "not usable" in caplog.text
        caplog.clear()
        desk.set_up()
        refused(desk.ask(0, desk.request()), Refused.NEED_STATE)
    assert isinstance(desk.ask(0, desk.transfer()), StateAccepted)
    assert isinstance(desk.ask(0, desk.request()), Upload)


# ------------------------------------------------------------------------------------------------- sums out of thin air


def forged(desk: Desk) -> bytes:
    return np.full(desk.it.plan.words, 2**20, "<i4").tobytes()


def walked(desk: Desk) -> tuple[bytes, bytes]:
    """A sum of the coordinator's invention, and the hash of the state it would lead to from the first model."""
    total = forged(desk)
    return total, state_hash(desk.world.study_hash, desk.it.advance(desk.it.first, total, EVERYBODY))


def test_sum_without_an_upload_of_this_hospital_moves_nothing(desk: Desk) -> None:
    """A coordinator alone cannot walk a hospital through the rounds: each step costs it an attempt."""
    total, digest = walked(desk)
    with unchanged(desk.world):
        refused(desk.ask(0, desk.request(round=1, total=total, state_hash=digest)), Refused.NEED_STATE)
        refused(desk.ask(0, desk.finish(round=1, total=total, state_hash=digest)), Refused.OUT_OF_ORDER)
        refused(desk.ask(0, desk.finish(round=3, total=total, state_hash=digest)), Refused.NEED_STATE)


def test_finish_beyond_the_last_round_moves_nothing(desk: Desk) -> None:
    for _ in range(3):
        desk.round()
    finish = desk.finish()
    assert isinstance(desk.ask(0, finish), Finished)
    with unchanged(desk.world):
        refused(desk.ask(0, desk.finish(round=4, total=forged(desk))), Refused.OUT_OF_ORDER)
    assert isinstance(desk.ask(0, finish), Finished)


def test_note_that_cannot_be_written_does_not_void_a_sealed_attempt(desk: Desk) -> None:
    class NoNotes(SystemFiles):
        def append(self, path: Path, data: bytes) -> None:
            raise EnvironmentFault(603, "the disk is full", "free some space")

    desk.world.start(0, files=NoNotes())
    desk.set_up()
    assert isinstance(desk.ask(0, desk.request()), Upload)
    assert desk.world.rows(0)[2:] == [("RESERVED", 1), ("SEALED", 1), ("RELEASED", 1)]


# -------------------------------------------------------------------------------------------------------- the end


def signed_by(desk: Desk, position: int, finish: Finish, message: Finished) -> SignedByHospital:
    """What the hospital's signature is over, put together as the coordinator does."""
    charged = (message.attempts_charged, message.epsilon_spent_micro)
    said, head = parse_statement(finish.statement), Head.from_bytes(message.head)
    mine = hospital_statement(said, desk.it.roster, position, charged, head)
    return SignedByHospital(**mine.model_dump(), signature=message.signature.hex())


def trained(desk: Desk) -> Desk:
    for _ in range(3):
        desk.round()
    return desk


def test_finish_is_answered_with_a_signature_over_model_and_statement(desk: Desk) -> None:
    """The same bytes for the same question, also of another process, and whatever the ledger did since."""
    finish = trained(desk).finish()
    frame = desk.sign(finish)
    first = desk.world.hospitals[0].handle(frame)
    message = decode(first, vector_limit_bytes=desk.limit)
    assert isinstance(message, Finished)
    mine = signed_by(desk, 0, finish, message)
    mine.check()
    assert mine.attempts_charged == 3
    assert mine.epsilon_spent_micro == micro(desk.it.plan.epsilon_after(3))
    assert desk.world.rows(0)[mine.ledger_seq - 1] == ("CLOSED", 0)
    with unchanged(desk.world):
        assert desk.world.hospitals[0].handle(frame) == first
    desk.world.start(0)
    assert desk.world.hospitals[0].handle(frame) == first
    refused(desk.ask(0, desk.request()), Refused.NOT_APPROVED)
    refused(desk.ask(0, desk.setup(b"x" * 16)), Refused.NOT_APPROVED)


def test_finished_hospital_keeps_statement_and_page_beside_its_model(desk: Desk) -> None:
    finish = trained(desk).finish()
    message = desk.ask(1, finish)
    file = PrivacyFile.model_validate_json((desk.world.place(1) / "privacy.json").read_bytes())
    assert canonical(file.statement) == finish.statement
    assert file.hospitals == [signed_by(desk, 1, finish, message)]
    assert hashlib.sha256((desk.world.place(1) / "model.safetensors").read_bytes()).hexdigest() == file.model_sha256
    assert "Bonn | 3 |" in (desk.world.place(1) / "privacy.md").read_text()


def test_attempt_that_reached_one_hospital_is_in_its_statement_only(desk: Desk) -> None:
    assert isinstance(desk.ask(2, desk.request()), Upload)
    desk.attempt = 1
    finish = trained(desk).finish()
    charged = {position: desk.ask(position, finish).attempts_charged for position in EVERYBODY}
    assert charged == {0: 3, 1: 3, 2: 4, 3: 3}


LIES = {
    "epsilon": 0.5,
    "epsilon_rdp": 0.5,
    "epsilon_pld": None,
    "epsilon_spent": 0.5,
    "epsilon_own_noise_alone": 0.5,
    "delta": 1e-9,
    "noise_multiplier": 9.0,
    "unit": "record",
    "mode": "distributed",
    "attempts_used": 2,
    "attempts_approved": 9,
    "colluders": 3,
    "excess_noise": 9.0,
    "wrap_probability": 0.5,
    "parameters": 2,
    "holds_against": "everyone",
    "not_claimed": "nothing",
    "roster_sha256": "00" * 32,
    "model_sha256": "00" * 32,
    "state_sha256": "00" * 32,
}


@pytest.mark.parametrize("field", LIES)
def test_statement_that_a_hospital_does_not_work_out_itself_is_not_signed(desk: Desk, field: str) -> None:
    """The coordinator signs what it likes; a hospital only what follows from study, model and its own ledger."""
    said = parse_statement(trained(desk).finish().statement)
    lie = said.model_copy(update={field: LIES[field]})
    finish = desk.finish(statement=canonical(lie), statement_signature=lie.sign(desk.it.identity))
    refused(desk.ask(0, finish), Refused.STATEMENT)
    assert ("CLOSED", 0) not in desk.world.rows(0)
    assert isinstance(desk.ask(0, desk.finish()), Finished)


@pytest.mark.parametrize("statement", [b"", b"{}", b"[" * 5000, b"\xff"])
def test_statement_that_cannot_be_read_is_not_signed(desk: Desk, statement: bytes) -> None:
    refused(desk.ask(0, trained(desk).finish(statement=statement)), Refused.STATEMENT)


def test_statement_that_the_coordinator_did_not_sign_is_not_signed(desk: Desk) -> None:
    finish = trained(desk).finish()
    said = parse_statement(finish.statement)
    refused(desk.ask(0, replace(finish, statement_signature=said.sign(STRANGER))), Refused.STATEMENT)
    spaced = replace(finish, statement=finish.statement.replace(b":", b": ", 1))
    refused(desk.ask(0, spaced), Refused.STATEMENT)


def test_finish_before_the_last_round_is_refused(desk: Desk) -> None:
    desk.round()
    refused(desk.ask(0, desk.finish()), Refused.OUT_OF_ORDER)
    assert ("CLOSED", 0) not in desk.world.rows(0)
    assert isinstance(desk.ask(0, desk.request()), Upload)


def test_finish_with_another_model_is_refused(desk: Desk) -> None:
    for _ in range(3):
        desk.round()
    with unchanged(desk.world):
        refused(desk.ask(0, desk.finish(state_hash=bytes(32))), Refused.STATE_MISMATCH)
    assert isinstance(desk.ask(0, desk.finish()), Finished)


# ------------------------------------------------------------------------------------------------------ what leaves


def whole_run(make_world, missing_patient: bool, drop_outs: int) -> list[bytes]:
    """Every frame that leaves the hospitals in a whole run with a refusal and a transfer in it, and a drop-out if one may be."""
    world = make_world(hospitals=4 + drop_outs, drop_outs=drop_outs)
    if missing_patient:
        path = world.folder / "Ahaus" / "patients.csv"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith("Ahaus-p2,")))
        assert len(path.read_text().splitlines()) == len(lines) - 3
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    for _ in range(2):
        desk.round()
    (world.place(0) / "state.bin").unlink()
    world.start(0)
    desk.ask(0, desk.request())
    desk.set_up()
    desk.ask(0, desk.request())
    desk.ask(0, desk.transfer())
    desk.round(lost=range(4, 4 + drop_outs))
    for position in desk.everybody:
        desk.ask(position, desk.finish())
    return desk.frames


PRIVATE = {"payload", "attestation", "head", "heads", "signature", "vote", "released"}
"""The masked vector, the signature over a state that all vectors went into, and heads of ledgers: over a keyed digest. What a
sum is opened with is bound to those heads, as the pads are."""


@pytest.mark.parametrize("drop_outs", [0, 1])
def test_egress_allowlist(make_world, drop_outs: int) -> None:
    """Every byte that leaves is a listed message; with a patient more or less only the masked vectors differ (I11)."""
    runs = [
        [decode(frame, vector_limit_bytes=1 << 16) for frame in whole_run(make_world, missing, drop_outs)]
        for missing in (False, True)
    ]
    frames = whole_run(make_world, False, drop_outs)
    opening = set() if drop_outs else {Vote, Release}
    assert {type(message) for message in runs[0]} == set(FROM_HOSPITAL) - opening
    uploads = 0
    for one, other, frame in zip(*runs, frames, strict=True):
        assert type(one) is type(other)
        for field in fields(one):
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            if field.name in PRIVATE:
                assert len(mine) == len(theirs)
                uploads += field.name == "payload" and mine != theirs
            else:
                assert mine == theirs, field.name
        if isinstance(one, Upload):
            assert len(frame) == upload_size_bytes(len(one.payload))
        if isinstance(one, Release):
            assert len(frame) == release_size_bytes(len(one.released))
    assert uploads >= 9, "the two runs did not differ at all: the comparison would see nothing"


def test_offer_tells_the_attempts_that_the_coordinator_knows_anyway(desk: Desk) -> None:
    desk.round()
    reply = desk.ask(0, desk.setup(b"x" * 16))
    assert isinstance(reply, OfferReply)
    assert reply.highest_attempt == 1


def test_same_session_is_answered_with_the_same_offer(desk: Desk) -> None:
    frame = desk.sign(desk.setup(desk.session))
    with unchanged(desk.world):
        assert desk.world.hospitals[0].handle(frame) == desk.frames[0]
    assert desk.world.hospitals[0].handle(desk.sign(desk.setup(b"x" * 16))) != desk.frames[0]


def test_refusals_are_logged_for_this_hospital(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "medfed.client"):
        desk.ask(0, desk.request(state_hash=bytes(32)))
    assert "refused RoundRequest: STATE_MISMATCH" in caplog.text


# ------------------------------------------------------------------------------------------------ scores of the final model


def with_held_out(world) -> Desk:
    """A trained federation, whose first hospital has patients set aside."""
    config = world.site(0).folder / "hospital.toml"
    config.write_text(config.read_text().replace("holdout = 0.0", "holdout = 0.5"))
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    return trained(desk)


@pytest.fixture
def scored(clock, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When held-out patients were scored; it takes as long as ``[0]`` says."""
    true, times = tasks.evaluate, [0.0]

    def slow(model, task, records):
        assert len(records.labels)
        clock.now_s += times[0]
        times.append(clock.now_s)
        return true(model, task, records)

    monkeypatch.setattr(tasks, "evaluate", slow)
    return times


def test_final_model_is_scored_once_however_often_and_badly_the_end_is_asked_for(world, scored) -> None:
    """Else a coordinator could time it, for nothing and without limit; another model on the folder's disk is another matter."""
    desk = with_held_out(world)
    finish = desk.finish()
    refused(desk.ask(0, desk.finish(statement=b"{}")), Refused.STATEMENT)
    for _ in range(3):
        assert isinstance(desk.ask(0, finish), Finished)
    world.start(0)
    assert isinstance(desk.ask(0, finish), Finished)
    assert len(scored) == 2
    path = world.place(0) / "evaluation.json"
    digest = hashlib.sha256((world.place(0) / "model.safetensors").read_bytes()).hexdigest()
    kept = path.read_text()
    assert digest in kept and "auc" in kept
    path.write_text(kept.replace(digest, "0" * 64))
    assert isinstance(desk.ask(0, finish), Finished)
    assert len(scored) == 3 and path.read_text() == kept


@pytest.mark.parametrize("takes_s", [0.0, 3.0, 6.9])
def test_answers_about_the_final_model_leave_on_a_slot_whatever_scoring_took(make_world, scored, takes_s) -> None:
    world = make_world(("round_s = 60.0", "round_s = 60.0\nslot_s = 7.0"))
    desk = with_held_out(world)
    scored[0] = takes_s
    for finish, kind in ((desk.finish(statement=b"{}"), Refusal), (desk.finish(), Finished), (desk.finish(), Finished)):
        started = world.clock.now_s
        assert isinstance(desk.ask(0, finish), kind)
        assert world.clock.now_s - started == pytest.approx(7.0)
    assert len(scored) == 2


# ---------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize(("takes_s", "leaves_s"), [(0.0, 7.0), (3.0, 7.0), (6.9, 7.0), (9.5, 14.0), (20.0, 21.0)])
def test_upload_leaves_on_a_slot_whatever_training_took(make_world, takes_s: float, leaves_s: float) -> None:
    world = make_world(("round_s = 60.0", "round_s = 60.0\nslot_s = 7.0"))

    def slow(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        world.clock.now_s += takes_s
        return discrete_gaussian(key, sd, size)

    world.start_all(slow)
    desk = Desk(world)
    desk.set_up()
    started = world.clock.now_s
    desk.ask(0, desk.request())
    assert world.clock.now_s - started == pytest.approx(leaves_s)


def test_upload_without_slots_leaves_at_once(desk: Desk) -> None:
    desk.ask(0, desk.request())
    assert desk.world.clock.slept == []


def test_sealed_reply_is_on_disk_before_the_slot_is_waited_for(make_world) -> None:
    """A kill while waiting costs nothing: the reply is sealed already."""
    world = make_world(("round_s = 60.0", "round_s = 60.0\nslot_s = 7.0"))
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    request = desk.request()
    sleep = world.clock.sleep

    def killed(seconds: float, wake: object = None) -> None:
        raise KeyboardInterrupt

    world.clock.sleep = killed
    with pytest.raises(KeyboardInterrupt):
        desk.ask(0, request)
    world.clock.sleep = sleep
    world.start(0)
    assert isinstance(desk.ask(0, request), Upload)
    assert world.charged(0) == 1


def test_outside_its_hours_a_hospital_asks_to_be_asked_later_and_spends_nothing(world) -> None:
    """By its own clock, in setup and in a round; within them it goes on."""
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    part = world.hospitals[0].participations[0]
    part._is_time = lambda wall_s: False
    refused(desk.ask(0, desk.setup(b"another session!")), Refused.OUT_OF_HOURS)
    refused(desk.ask(0, desk.request()), Refused.OUT_OF_HOURS)
    assert world.charged(0) == 0
    part._is_time = lambda wall_s: True
    assert isinstance(desk.ask(0, desk.request()), Upload)


def test_hours_of_the_policy_hold_at_the_hospital(world, caplog) -> None:
    config = world.site(0).folder / "hospital.toml"
    now = time.localtime(world.clock.wall())
    hour = (now.tm_hour + 2) % 24
    config.write_text(config.read_text().replace("[policy]", f'[policy]\nhours = "{hour:02}:00-{hour:02}:30"'))
    world.start_all()
    desk = Desk(world)
    caplog.set_level(logging.INFO)
    for _ in range(3):  # a coordinator that waits asks every few seconds; the log says it once
        refused(desk.ask(0, desk.setup(bytes(16))), Refused.OUT_OF_HOURS)
    assert [record.levelname for record in caplog.records if "OUT_OF_HOURS" in record.message] == ["INFO"]
    assert isinstance(desk.ask(1, desk.setup(bytes(16))), OfferReply)
