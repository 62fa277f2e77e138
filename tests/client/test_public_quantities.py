"""Nothing but the noised, masked vector may depend on who the patients are, or on how many.

A real hospital (approved study, ledger, training, node) goes through the same run twice, with N and with N + 1 patients and the
same entropy; all that leaves it is compared byte by byte. A patient who is not sampled may change nothing at all, the vector
included; one who is may change the vector and what covers it (``COVERED``). Planted leaks must be noticed by the same
comparisons.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.client import local_steps, participation, trainer
from medfed.client.approval import approve, review
from medfed.client.approved import Approved
from medfed.client.ledger import Ledger
from medfed.client.node import Node
from medfed.client.refusal import Refuse
from medfed.client.trainer import Patients
from medfed.errors import RemoteProtocolError
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.sampling import poisson_mask
from medfed.simulations.entropy import SeededEntropy
from medfed.wire import Refusal, Refused, StateAccepted, decode

sys.path.insert(0, str(Path(__file__).parent))

from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from medfed_test_egress import COVERED, LIMIT, Coordinator, Exchange, differing, reply_of, stop_flowers_clock
from test_participation import Desk

N = 5  # patients of the hospital that is looked at, as it declared; the newcomer comes last in the order of ids
MOST = N + 3
NEWCOMER = ("Ahaus-p9,71,4.5,yes,1", "Ahaus-p9,72,2.0,no,0", "Ahaus-p9,73,1.5,yes,1")
MORE = (*NEWCOMER, "Ahaus-q1,33,0.5,no,0", "Ahaus-q2,51,1.5,no,1")
STATISTICS = ("[training]", "[statistics]\nnoise_multiplier = 6.0\nattempts = 2\nleast_scale = 0.01\n[training]")
METRICS = ("[deadlines]", "[metrics]\nbins = 4\nattempts = 2\nnoise_multiplier = 6.0\n[deadlines]")
LOCAL = """aggregate = "update"
local = { steps = 3, learning_rate = 0.5, proximal = 0.25 }"""
UPDATE = (('aggregate = "gradient"', LOCAL), ("momentum = 0.9", "momentum = 0.0"))
SLOTS = ("round_s = 60.0", "round_s = 60.0\nslot_s = 7.0")

Coins = Callable[[NDArray[np.bool_]], bool]


def newcomer_is_out(mask: NDArray[np.bool_]) -> bool:
    return not mask[N:].any() and bool(mask[:N].any())


def newcomer_is_in(mask: NDArray[np.bool_]) -> bool:
    return bool(mask[N] and mask[:N].any())


def newcomer_is_alone(mask: NDArray[np.bool_]) -> bool:
    """An empty batch at N, a batch of one at N + 1."""
    return bool(mask[N] and not mask[:N].any())


def nobody_is_in(mask: NDArray[np.bool_]) -> bool:
    return not mask.any()


class Scripted:
    """Entropy that repeats, whose sampling keys give coins of the wanted kind."""

    def __init__(self, owner: str, rate: float, wanted: Coins) -> None:
        self._inner, self._rate, self._wanted = SeededEntropy(5, owner), rate, wanted

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        fresh = self._inner.draw(purpose, size_bytes)
        if purpose != "sampling":
            return fresh
        tries = (hashlib.sha256(fresh + number.to_bytes(4, "big")).digest() for number in range(10_000))
        return next(key for key in tries if self._wanted(poisson_mask(key, MOST, self._rate))) + fresh[32:]


@dataclass
class Noise:
    """The production noise, and a fault on demand."""

    fails: bool = False

    def __call__(self, key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        if self.fails:
            raise RuntimeError("patient 17")
        return discrete_gaussian(key, sd, size)


class RelayedDesk(Desk):
    """A coordinator that relays given sums, so that two runs go through the same states; without them it notes its own."""

    def __init__(self, world, totals: list[bytes] | None) -> None:
        super().__init__(world)
        self.totals = [] if totals is None else totals
        self._is_first, self._relayed = totals is None, 0

    def add_up(self, request, uploads) -> bytes:
        total = super().add_up(request, uploads)
        if self._is_first:
            self.totals.append(total)
        self._relayed += 1
        return self.totals[self._relayed - 1]


@dataclass(frozen=True)
class Case:
    """What a run is made of. ``changes``: of the task; ``spoil``: what becomes of the patients in memory; ``slow``: training
    takes 0.4 s a record; ``drop_outs``: how many more hospitals there are, whose uploads get lost."""

    coins: Coins
    changes: tuple[tuple[str, str], ...] = ()
    spoil: Callable[[Patients], Patients] | None = None
    slow: bool = False
    drop_outs: int = 0


class Watched:
    """Hospital 0 of a federation, behind its node, whose every word is kept."""

    def __init__(self, world, case: Case, totals: list[bytes] | None) -> None:
        self.world, self.case, self.noise = world, case, Noise()
        self.exchanges: list[Exchange] = []
        self.starts = 0
        world.start_all()
        self.start()
        self.desk = RelayedDesk(world, totals)

    def start(self) -> None:
        self.starts += 1
        entropy = Scripted(f"0/{self.starts}", self.world.study.privacy.sampling_rate, self.case.coins)
        hospital = self.world.start(0, self.noise, entropy=entropy)
        if self.case.spoil is not None:
            (part,) = hospital.participations
            part.approved = replace(part.approved, patients=self.case.spoil(part.approved.patients))
        self.coordinator = Coordinator(self.world.folder / "Ahaus", hospital.handle, self.world.base)
        self.world.hospitals[0] = self

    def handle(self, frame: bytes) -> bytes:
        self.exchanges.append(self.coordinator.ask(frame))
        reply = reply_of(self.exchanges[-1])
        if reply is None:
            raise RemoteProtocolError(104, "Flower's error instead of an answer", "see the exchange")
        return reply

    def play(self) -> Watched:
        """A whole run, in which this hospital also meets every kind of refusal and loses its state."""
        desk, world = self.desk, self.world
        with pytest.raises(RemoteProtocolError):
            self.handle(b"no message" * 20)
        desk.ask(0, desk.request())  # NO_SESSION
        desk.set_up()
        desk.ask(0, desk.request(state_hash=bytes(32)))
        used = desk.request()
        desk.round()
        desk.ask(0, used)
        desk.ask(0, replace(used, nonce=b"x" * 16))
        desk.ask(0, desk.request(attempt=99))
        desk.ask(0, desk.request(offers=(*desk.offers[1:], desk.offers[0])))
        desk.round()
        (self.world.place(0) / "state.bin").unlink()
        self.start()
        desk.ask(0, desk.transfer())
        desk.set_up()
        self.noise.fails = True
        failed = desk.request()
        desk.ask(0, failed)  # INTERNAL
        self.noise.fails = False
        desk.ask(0, failed)  # ATTEMPT_SPENT
        desk.attempt += 1
        desk.ask(0, desk.finish())
        while desk.state.completed_rounds < world.study.released_sums:
            desk.round(lost=range(4, 4 + self.case.drop_outs))
        desk.ask(0, desk.finish())
        desk.ask(0, desk.finish())
        desk.ask(0, used)  # NOT_APPROVED any more
        return self

    def run(self) -> Run:
        return Run(self.exchanges, self.desk.totals, 4 * self.world.assignment.plan.ring_words)


@dataclass(frozen=True)
class Run:
    """All that left hospital 0 in a run, and the sums that the coordinator relayed."""

    exchanges: list[Exchange]
    totals: list[bytes]
    vector_bytes: int

    def kinds(self) -> list[str]:
        """What it answered, refusals by their reason."""
        found = []
        for exchange in self.exchanges:
            frame = reply_of(exchange)
            message = None if frame is None else decode(frame, vector_limit_bytes=LIMIT)
            name = Refused(message.reason).name if isinstance(message, Refusal) else type(message).__name__
            found.append("error of Flower" if message is None else name)
        return found


def lay_patients(world, approved: tuple[str, ...], rows: tuple[str, ...]) -> None:
    """Hospital 0 as if its table had held ``approved`` besides when it approved the study, and holds ``rows`` besides now."""
    site = world.site(0)
    table = site.folder / "patients.csv"
    plain = table.read_text()
    for path in site.folder.glob("ledger.db*"):
        path.unlink()
    shutil.rmtree(site.folder / "studies")
    Ledger.create(site.seams.files, site.ledger_path, site.identity()).close()
    table.write_text("\n".join([plain.rstrip("\n"), *approved, ""]))
    peers = [world.folder / name / "enrolment.json" for name in world.names[1:]]
    reviewed = review(site, world.folder / "coordinator" / "study" / "study.toml", peers)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        approve(site, reviewed, ledger)
    table.write_text("\n".join([plain.rstrip("\n"), *rows, ""]))


Compare = Callable[..., tuple[Run, Run, list[set[str]]]]


@pytest.fixture(scope="module")
def first_runs() -> dict[object, Run]:
    """With N patients nothing that is planted below changes anything: those runs are made once."""
    return {}


@pytest.fixture
def compare(make_world, clock, first_runs, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """``compare(case)``: the run with N patients, the one with N + 1, and the names of what differs in each answer.

    ``same_ledger``: both approved with N + 1 patients, and one of them is gone since; else each with those it has.
    """
    stop_flowers_clock(monkeypatch, clock)

    def run(case: Case, rows: tuple[str, ...], approved: tuple[str, ...], totals: list[bytes] | None) -> Run:
        clock.now_s = 0.0
        world = make_world(*case.changes, hospitals=4 + case.drop_outs, drop_outs=case.drop_outs)
        lay_patients(world, approved, rows)
        with monkeypatch.context() as patched:
            if case.slow:
                slow_training(patched, clock)
            run = Watched(world, case, totals).play().run()
        for position in range(len(world.names)):
            world.kill(position)
        return run

    def both(
        case: Case, *, same_ledger: bool, newcomer: tuple[str, ...] = NEWCOMER, other: Case | None = None
    ) -> tuple[Run, Run, list[set[str]]]:
        approved = newcomer if same_ledger else ()
        if (case, approved) not in first_runs:
            first_runs[case, approved] = run(case, (), approved, None)
        one = first_runs[case, approved]
        two = run(other or case, newcomer, newcomer, one.totals)
        return one, two, differing(one.exchanges, two.exchanges, one.vector_bytes)

    return both


def slow_training(patched: pytest.MonkeyPatch, clock) -> None:
    true = trainer.Engine.clipped_sums

    def slow(self, inputs, *rest, **named):
        clock.now_s += 0.4 * len(inputs)
        return true(self, inputs, *rest, **named)

    patched.setattr(trainer.Engine, "clipped_sums", slow)


ANSWERS = [
    "error of Flower",
    "NO_SESSION",
    "OfferReply",
    "STATE_MISMATCH",
    "Upload",
    "Upload",
    "OUT_OF_ORDER",
    "BUDGET",
    "OFFERS_REFUSED",
    "Upload",
    "StateAccepted",
    "OfferReply",
    "INTERNAL",
    "ATTEMPT_SPENT",
    "OUT_OF_ORDER",
    *["Upload"] * 1,
    "Finished",
    "Finished",
    "NOT_APPROVED",
]


@pytest.mark.parametrize(("changes", "newcomer"), [((), NEWCOMER), (UPDATE, MORE)], ids=["gradient", "update, three"])
def test_patient_who_is_not_sampled_changes_no_bit_of_what_leaves(compare: Compare, changes, newcomer) -> None:
    """Divisor, noise, sampling rate, steps and lengths come from the study and declared numbers: else the vector would tell."""
    one, two, found = compare(Case(newcomer_is_out, changes), same_ledger=True, newcomer=newcomer)
    assert one.kinds() == two.kinds() == ANSWERS
    assert set().union(*found) == set()


@pytest.mark.parametrize(
    ("coins", "changes"),
    [(newcomer_is_in, (STATISTICS, METRICS)), (newcomer_is_alone, ()), (newcomer_is_in, UPDATE)],
    ids=["statistics, gradient, metrics", "batch of none and of one", "update"],
)
def test_patient_who_is_sampled_changes_the_vector_and_what_covers_it(compare: Compare, coins: Coins, changes) -> None:
    """Messages, their number, lengths, order, times, codes, every other field, Flower's metadata: all the same."""
    one, two, found = compare(Case(coins, changes), same_ledger=False)
    assert one.kinds() == two.kinds()
    for kind, names in zip(one.kinds(), found, strict=True):
        assert names <= COVERED.keys()
        assert ("words" in names) == (kind == "Upload"), "that the patient is there is seen where it should be"


def test_empty_batches_leave_like_any_other(compare: Compare) -> None:
    """A run in which nobody is ever sampled against one with patients in every batch: told apart by the vector alone."""
    one, two, found = compare(Case(nobody_is_in), same_ledger=True, other=Case(newcomer_is_in))
    assert one.kinds() == two.kinds() == ANSWERS
    assert set().union(*found) <= COVERED.keys()


OPENED = ["Upload", "Release", "Upload", "Upload", "Release", "Upload", "Vote", "Release"]
"""Round 1, its upload again, round 2, round 3 without a hospital."""


def test_sum_is_opened_in_the_same_words_whoever_the_patients_are(compare: Compare) -> None:
    """Votes and releases: as many, as long, at the same times; the same bytes unless the vectors, and so the ledgers, differ."""
    for coins, is_sampled in ((newcomer_is_out, False), (newcomer_is_in, True)):
        one, two, found = compare(Case(coins, drop_outs=1), same_ledger=not is_sampled)
        assert one.kinds() == two.kinds()
        assert [kind for kind in one.kinds() if kind in {"Upload", "Vote", "Release"}] == OPENED
        for kind, names in zip(one.kinds(), found, strict=True):
            assert names <= (COVERED.keys() if is_sampled else set())
            assert ("words" in names) == (is_sampled and kind == "Upload")
            assert ("opening" in names) == (is_sampled and kind in {"Vote", "Release"})


BROKEN = {"nan": np.nan, "huge": 1e38}


def with_broken_newcomer(value: float) -> Callable[[Patients], Patients]:
    """As no reader would let through: the last patient's numbers are ``value``."""

    def spoil(patients: Patients) -> Patients:
        inputs = patients.records.inputs.copy()
        inputs[patients.unit == N] = value
        return replace(patients, records=replace(patients.records, inputs=inputs))

    return spoil


@pytest.mark.parametrize("name", BROKEN)
def test_patient_who_is_not_a_number_changes_no_code_and_no_message(compare: Compare, name: str) -> None:
    """In the statistics, in a gradient: such a patient adds nothing, a huge one what clipping leaves of it."""
    broken = Case(newcomer_is_in, (STATISTICS,), with_broken_newcomer(BROKEN[name]))
    one, two, found = compare(Case(newcomer_is_in, (STATISTICS,)), same_ledger=True, other=broken)
    assert one.kinds() == two.kinds()
    words = [names for kind, names in zip(one.kinds(), found, strict=True) if kind == "Upload"]
    assert set().union(*found) <= (set() if name == "nan" else COVERED.keys())
    assert len(words) > 3


# ------------------------------------------------------------------------------------------------------------------- slots


def test_uploads_leave_at_slot_time_however_long_training_took(compare: Compare) -> None:
    one, two, found = compare(Case(newcomer_is_in, (SLOTS,), slow=True), same_ledger=True)
    assert set().union(*found) <= COVERED.keys()
    for run in (one, two):
        left = [(kind, each.sent[-1].after_s) for kind, each in zip(run.kinds(), run.exchanges, strict=True)]
        # 0: the upload that is asked for again
        assert {time for kind, time in left if kind == "Upload"} == {0.0, 7.0}
        assert ("INTERNAL", 7.0) in left


def test_uploads_without_slots_tell_how_long_training_took(compare: Compare) -> None:
    """The control, and what docs/trust.md says of studies without slots."""
    one, _, found = compare(Case(newcomer_is_in, slow=True), same_ledger=True)
    told = [kind for kind, names in zip(one.kinds(), found, strict=True) if "times" in names]
    assert set(told) == {"Upload", "INTERNAL"}


# ------------------------------------------------------------------------------------------------------------ planted leaks


def leak_count(monkeypatch: pytest.MonkeyPatch, plant: Callable[[Callable[[], int]], None]) -> None:
    """``plant`` is given how to look up by how many patients the hospital that is answering has more than it declared."""
    now = [0]
    true = participation.Participation.answer

    def answer(self, message):
        now[0] = self.approved.patients.count - self.approved.nominal_patients
        return true(self, message)

    monkeypatch.setattr(participation.Participation, "answer", answer)
    plant(lambda: now[0])


def in_a_field(monkeypatch: pytest.MonkeyPatch, count: Callable[[], int]) -> None:
    true = participation.encode

    def encode(message, identity):
        if isinstance(message, StateAccepted):
            message = replace(message, round=message.round + count())
        return true(message, identity)

    monkeypatch.setattr(participation, "encode", encode)


def in_flowers_metadata(monkeypatch: pytest.MonkeyPatch, count: Callable[[], int]) -> None:
    true = Node._answer

    def answer(self, message):
        reply = true(self, message)
        reply.metadata.__dict__["_group_id"] = str(count())
        return reply

    monkeypatch.setattr(Node, "_answer", answer)


def in_a_code(monkeypatch: pytest.MonkeyPatch, count: Callable[[], int]) -> None:
    true = Refuse.__init__

    def refuse(self, reason, cause):
        true(self, Refused.INTERNAL if count() and reason is Refused.OUT_OF_ORDER else reason, cause)

    monkeypatch.setattr(Refuse, "__init__", refuse)


def in_the_number_of_calls(monkeypatch: pytest.MonkeyPatch, count: Callable[[], int]) -> None:
    true = Node._call

    def call(self, method, request):
        for _ in range(count() if isinstance(request, ConfirmMessageReceivedRequest) else 0):
            true(self, method, request)
        return true(self, method, request)

    monkeypatch.setattr(Node, "_call", call)


@pytest.mark.parametrize("leak", [in_a_field, in_flowers_metadata, in_a_code, in_the_number_of_calls])
def test_number_of_patients_that_leaks_is_noticed(compare: Compare, monkeypatch: pytest.MonkeyPatch, leak) -> None:
    leak_count(monkeypatch, lambda count: leak(monkeypatch, count))
    _, _, found = compare(Case(newcomer_is_in), same_ledger=False)
    assert not set().union(*found) <= COVERED.keys()


def divisor_from_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Approved, "nominal_patients", property(lambda self: self.patients.count))


def rate_from_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one gets by asking for batches of so many patients."""
    true = trainer.poisson_mask
    monkeypatch.setattr(trainer, "poisson_mask", lambda key, count, rate: true(key, count, min(1.0, rate * N / count)))


def noise_from_data(monkeypatch: pytest.MonkeyPatch) -> None:
    true = local_steps.noised_sum

    def noised_sum(approved, *rest):
        scaled = replace(approved.plan, noise_sd=approved.plan.noise_sd * approved.patients.count / N)
        return true(replace(approved, plan=scaled), *rest)

    for module in (local_steps, participation):
        monkeypatch.setattr(module, "noised_sum", noised_sum)


def steps_from_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is as long as there are patients."""
    true = local_steps.local_steps

    def steps(approved):
        local = true(approved)
        return local.model_copy(update={"steps": local.steps + approved.patients.count - N})

    monkeypatch.setattr(local_steps, "local_steps", steps)


@pytest.mark.parametrize("plant", [divisor_from_data, rate_from_data, noise_from_data, steps_from_data])
def test_public_number_taken_from_the_data_is_noticed(compare: Compare, monkeypatch, plant) -> None:
    """Nobody who is sampled differs, so the vector may not: what differs can only be a number made of N."""
    plant(monkeypatch)
    one, _, found = compare(Case(newcomer_is_out, UPDATE), same_ledger=True)
    told = [kind for kind, names in zip(one.kinds(), found, strict=True) if "words" in names]
    assert set(told) == {"Upload"}
