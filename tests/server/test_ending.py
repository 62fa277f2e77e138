"""The end of a run: what hospitals may sign, who may be missing, and that no error goes untold. Real hospitals, virtual time."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from medfed_test_post import Coordinator, Post, opened

from medfed import metrics
from medfed.client.verify import in_words, verify
from medfed.errors import EnvironmentFault, RemoteProtocolError
from medfed.privacy.accounting import micro
from medfed.privacy.journal import Completed, Told, check_journal, journal_hash, write_journal
from medfed.privacy.page import page
from medfed.privacy.statement import PrivacyFile, Statement, hospital_statement, sign_for_hospital
from medfed.roster import load_roster
from medfed.seams import SystemFiles
from medfed.server.daemon import train_with
from medfed.server.ending import RunRecord
from medfed.server.exchange import Reply
from medfed.server.results import held_out_metrics, write_results
from medfed.wire import Finish, Finished, Message, RoundRequest
from medfed.witness import Head, signed_bytes

METRICS = ("[deadlines]", "[metrics]\nbins = 4\nattempts = 2\nnoise_multiplier = 3.0\n[deadlines]")
FILES = SystemFiles()
TESTS = Path(__file__).parent.parent

_spec = importlib.util.spec_from_file_location("second_verifier", TESTS / "verifier.py")
assert _spec is not None and _spec.loader is not None
second = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(second)


class Cut(Post):
    """``cut(position, request)``: whether a request is lost on its way."""

    def __init__(self, world, cut) -> None:
        super().__init__(world)
        self.cut = cut

    def deliver(self, position: int, payload: bytes) -> list[Reply]:
        return [] if self.cut(position, opened(payload)) else super().deliver(position, payload)


def celle_misses_last_round_and_end(position: int, request: Message) -> bool:
    return position == 2 and (isinstance(request, Finish) or (isinstance(request, RoundRequest) and request.round == 2))


@pytest.fixture
def without_celle(make_world, tmp_path):
    """A finished run of five of which one missed the last round and the end: its world and folder. Not strict: n = 5, m = 4."""
    world = make_world(hospitals=5, drop_outs=1)
    world.start_all()
    coordinator = Coordinator(world, Cut(world, celle_misses_last_round_and_end))
    checkpoint = coordinator.run()
    write_results(FILES, tmp_path / "run", world.assignment, checkpoint, coordinator.rounds.record)
    return world, tmp_path / "run"


def failed(folder: Path) -> set[str]:
    return {check["check"] for check in verify(FILES, folder, None)["checks"] if check["holds"] is False}


def rewritten(folder: Path, change) -> None:
    """``privacy.json`` with its list of hospitals changed, and the page that goes with it."""
    file = PrivacyFile.model_validate_json((folder / "privacy.json").read_bytes())
    file = file.model_copy(update={"hospitals": change(file.hospitals)})
    (folder / "privacy.json").write_bytes(file.to_bytes())
    (folder / "privacy.md").write_text(page(file, load_roster(FILES, folder / "roster.json")))


# ------------------------------------------------------------------------------------------------- who may be missing


def test_run_ends_without_a_hospital_and_both_verifiers_name_it(without_celle) -> None:
    _, run = without_celle
    found = verify(FILES, run, None)
    assert [check for check in found["checks"] if not check["holds"]] == []
    assert found["signed_by"] == ["Ahaus", "Bonn", "Daun", "Emden"]
    assert found["not_signed_by"] == ["Celle"]
    assert any("not signed by Celle" in line for line in in_words(found))
    assert second.faults(run) == []
    assert "**Not signed by Celle**" in (run / "privacy.md").read_text()
    *_, last, end = map(json.loads, (run / "journal.jsonl").read_bytes().splitlines())
    assert last["survivors"] == [0, 1, 3, 4]
    assert [bool(signature) for signature in end["signatures"]] == [True, True, False, True, True]
    assert json.loads((run / "result.json").read_bytes())["dropped"] == 1


def test_hospital_that_has_not_signed_still_checks_its_own_ledger(without_celle) -> None:
    world, run = without_celle
    world.kill(2)
    found = verify(FILES, run, world.site(2))
    assert found["verified"]
    assert found["checks"][-1]["detail"] == "this hospital has not signed; its ledger charged 2 attempts"


@pytest.mark.parametrize(
    "change",
    [
        lambda hospitals: hospitals[1:],
        lambda hospitals: [],
        lambda hospitals: [hospitals[1], hospitals[0], *hospitals[2:]],
        lambda hospitals: [hospitals[0], hospitals[0], *hospitals[1:]],
    ],
    ids=["fewer than a sum needs", "nobody", "another order", "one twice"],
)
def test_too_few_signatures_are_refused_by_both(without_celle, change) -> None:
    _, run = without_celle
    rewritten(run, change)
    assert "signatures" in failed(run)
    assert second.faults(run)


def test_hospital_states_fewer_charges_than_sums_it_is_in(without_celle) -> None:
    """Signed by its own key: only the journal tells."""
    world, run = without_celle

    def lie(hospitals):
        mine, identity = hospitals[0], world.site(0).identity()
        said = PrivacyFile.model_validate_json((run / "privacy.json").read_bytes()).statement
        charged = (2, micro(world.assignment.plan.epsilon_after(2)))
        unsigned = hospital_statement(said, world.assignment.roster, 0, charged, mine.head)
        return [sign_for_hospital(unsigned, identity), *hospitals[1:]]

    rewritten(run, lie)
    assert failed(run) == {"journal"}
    assert any("charged less than its sums" in fault for fault in second.faults(run))


def test_own_copy_of_one_of_many_says_nothing_of_the_others(without_celle) -> None:
    world, _ = without_celle
    world.kill(0)
    found = verify(FILES, world.place(0), world.site(0))
    assert found["verified"]
    assert found["not_signed_by"] is None
    assert "Not signed by" not in (world.place(0) / "privacy.md").read_text()


def test_noise_of_metrics_is_that_of_the_hospitals_in_their_sum(make_world) -> None:
    world = make_world(METRICS, hospitals=5, drop_outs=1)
    world.start_all()
    cut = Cut(
        world, lambda position, request: position == 2 and isinstance(request, RoundRequest) and request.round == 3
    )
    checkpoint = Coordinator(world, cut).run()
    assert len(checkpoint.records[-1].survivors) == 4
    found, plan = held_out_metrics(world.assignment, checkpoint), world.assignment.plan
    expected = metrics.noise_sd_of_cell(plan.metrics_noise_sd, plan.metrics_exponent, 4)
    assert found is not None and found.noise_sd_of_cell == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------- what is signed there


@pytest.fixture
def ended(make_world):
    """A finished strict run: its world, its record, and what Celle answered at the end."""
    world = make_world()
    world.start_all()
    answers: list[Finished] = []

    class Noting(Post):
        def deliver(self, position: int, payload: bytes) -> list[Reply]:
            replies = super().deliver(position, payload)
            answers.extend(
                message
                for reply in replies
                if position == 2 and isinstance(message := opened(reply.payload or b""), Finished)
            )
            return replies

    coordinator = Coordinator(world, Noting(world))
    coordinator.run()
    return world, coordinator.rounds.record, answers[0]


@pytest.mark.parametrize("seq", [1 << 32, (1 << 64) - 1])
def test_head_of_a_row_that_no_ledger_has_names_the_hospital(ended, seq: int) -> None:
    world, record, message = ended
    head = Head(seq, bytes(32), world.site(2).identity().sign(signed_bytes(seq, bytes(32))))
    with pytest.raises(RemoteProtocolError, match=r"MF-193 Celle"):
        record.take(2, replace(message, head=head.to_bytes()))


def test_no_charge_at_all_names_the_hospital(ended) -> None:
    world, record, message = ended
    with pytest.raises(RemoteProtocolError, match=r"MF-193 Celle"):
        record.take(2, replace(message, attempts_charged=0))
    mine = hospital_statement(record.said, record.roster, 2, (0, 0), Head.from_bytes(message.head))
    signature = bytes.fromhex(sign_for_hospital(mine, world.site(2).identity()).signature)
    with pytest.raises(RemoteProtocolError, match=r"MF-193 Celle.*0 attempts"):
        record.take(2, replace(message, attempts_charged=0, epsilon_spent_micro=0, signature=signature))


def retold(
    record: RunRecord, survivors: dict[int, list[int]], unsigned: tuple[int, ...] = ()
) -> tuple[bytes, Statement]:
    """The run's journal with other survivors in some rounds, or without signatures; a statement that names this journal."""
    begin, *attempts, end = map(json.loads, record.journal.splitlines())
    rounds = [
        Completed(
            line["round"],
            line["attempt"],
            bytes.fromhex(line["state_sha256"]),
            line["upload_bytes"],
            tuple(survivors.get(line["round"], line["survivors"])),
        )
        for line in attempts
    ]
    signatures = [b"" if place in unsigned else bytes.fromhex(each) for place, each in enumerate(end["signatures"])]
    hashes = [bytes.fromhex(begin[name]) for name in ("study_sha256", "roster_sha256")]
    journal = write_journal(*hashes, (len(attempts), begin["attempts_approved"]), rounds, signatures)
    said = record.said.model_copy(update={"journal_sha256": journal_hash(journal).hex(), "fewest_survivors": 3})
    return journal, said


def test_journal_tells_how_many_sums_each_hospital_is_in(ended) -> None:
    _, record, _ = ended
    journal, said = retold(record, {1: [0, 1, 3], 3: [1, 2, 3]}, (0,))
    assert check_journal(journal, said, record.roster.identities) == Told(0, (2, 3, 2, 3))
    with pytest.raises(RemoteProtocolError, match="too few"):
        check_journal(journal, said.model_copy(update={"fewest_survivors": 4}), record.roster.identities)


@pytest.mark.parametrize(
    ("survivors", "unsigned", "why"),
    [
        ({2: [0, 1]}, (), "too few"),
        ({2: [0, 1, 1, 2]}, (), "one twice"),
        ({2: [2, 1, 0]}, (), "one twice"),
        ({2: [0, 1, 2, 4]}, (), "not in the roster"),
        ({}, (1,), "missing"),
        ({3: [0, 1, 2]}, (), "one more"),
    ],
    ids=["too few", "one twice", "another order", "a stranger", "a signature less", "a signature more"],
)
def test_journal_of_sums_that_cannot_be_is_refused(
    ended, survivors: dict[int, list[int]], unsigned: tuple[int, ...], why: str
) -> None:
    """Chained rightly, and named by the statement."""
    _, record, _ = ended
    journal, said = retold(record, survivors, unsigned)
    with pytest.raises(RemoteProtocolError, match=f"MF-194.*{why}"):
        check_journal(journal, said, record.roster.identities)


# --------------------------------------------------------------------------------------------------- how it is told


def status(world) -> dict[str, object]:
    told: dict[str, object] = json.loads((world.folder / "coordinator" / "status.json").read_bytes())
    return told


class Broken(Post):
    def receive(self) -> list[Reply]:
        raise ValueError("nobody expected this")


def test_unexpected_error_is_in_the_status(make_world) -> None:
    world = make_world()
    world.start_all()
    with pytest.raises(ValueError, match="nobody"):
        train_with(Broken(world), world.folder / "coordinator" / "server.toml", world.seams_of("coordinator"))
    assert status(world)["what"] == "stopped"
    assert "ValueError" in str(status(world)["failed"])


def test_results_that_cannot_be_written_are_in_the_status(make_world) -> None:
    class Full(SystemFiles):
        def write(self, path, data, *, private=False) -> None:
            if path.name == "report.md":
                raise EnvironmentFault(603, "the disk is full", "free some space")
            super().write(path, data, private=private)

    world = make_world()
    world.start_all()
    seams = replace(world.seams_of("coordinator"), files=Full())
    with pytest.raises(EnvironmentFault):
        train_with(Post(world), world.folder / "coordinator" / "server.toml", seams)
    assert status(world)["what"] == "stopped"
    assert "disk is full" in str(status(world)["failed"])


def test_report_rounds_bounds_up(without_celle, tmp_path) -> None:
    """7.99925 is no 7.999."""
    world, run = without_celle
    shutil.rmtree(run)
    coordinator = Coordinator(world, Post(world))
    checkpoint = coordinator.run()
    record = coordinator.rounds.record
    record.said = record.said.model_copy(update={"epsilon": 7.99925, "epsilon_spent": 3.00004})
    write_results(FILES, run, world.assignment, checkpoint, record)
    text = (run / "report.md").read_text()
    assert "(epsilon 8)" in text
    assert "epsilon spent 3.001." in text
