"""Hospitals that join while a study runs: five, of which any four make a sum, and room for a sixth and more. Virtual time."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest
from medfed_test_post import Coordinator, Killed, Post, opened

from medfed.client.approval import approve, review
from medfed.client.joining import approve_roster, card, in_words, review_roster
from medfed.client.ledger import Ledger
from medfed.errors import MedfedError, PrivacyError
from medfed.roster import Roster
from medfed.server.daemon import load_assignment
from medfed.server.exchange import Reply
from medfed.server.results import write_results
from medfed.wire import OfferReply, Refusal, Refused, SetupRequest, StateTransfer

FIVE, SIX = range(5), range(6)
FULDA, GOSLAR = 5, 6
UPDATE = ('aggregate = "gradient"', 'aggregate = "update"\nlocal = { steps = 2, learning_rate = 0.5, proximal = 0.0 }')
VERIFIER = Path(__file__).parent.parent / "verifier.py"


class Line(Post):
    """The exchange; keeps what each hospital answered."""

    def __init__(self, world) -> None:
        super().__init__(world)
        self.answers: list[tuple[int, object]] = []

    def online(self) -> frozenset[int]:
        return super().online() & frozenset(self.world.hospitals)

    def deliver(self, position: int, payload: bytes) -> list[Reply]:
        if position in self.offline:
            return []
        replies = super().deliver(position, payload)
        self.answers += [(position, opened(reply.payload)) for reply in replies if reply.payload]
        return replies


@pytest.fixture
def five(make_world):
    """Five hospitals after round 1, the coordinator dead; Fulda is laid out, and in no roster."""
    world = make_world(hospitals=5, drop_outs=1, room=6)
    world.start_all()
    run_until(world, "round 1 done")
    return world


def run_until(world, said: str) -> None:
    """The coordinator's process dies when it says so."""

    def die(checkpoint, what: str) -> None:
        if what == said:
            raise Killed

    with pytest.raises(Killed):
        Coordinator(world, Line(world), die).run()


def documents(world, names: Sequence[str]) -> list[Path]:
    return [world.folder / name / "enrolment.json" for name in names]


def study_path(world) -> Path:
    return world.office.study_path


def approve_again(world, position: int, peers: Sequence[str] = ("Fulda",)) -> None:
    """What ``medfed-client approve`` does at a hospital that approved the study before; then it is started again."""
    world.kill(position)
    site = world.site(position)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        reviewed = review_roster(site, study_path(world), documents(world, peers), ledger)
        assert reviewed is not None
        approve_roster(site, reviewed, ledger)
    world.start(position)


def approve_first(world, position: int, peers: Sequence[str]) -> None:
    """The same at one that joins."""
    site = world.site(position)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        approve(site, review(site, study_path(world), documents(world, peers)), ledger)
    world.start(position)


def join(world, approving: Sequence[int] = FIVE) -> None:
    """Fulda joins; those ``approving`` approve it."""
    world.extend("Fulda")
    for position in approving:
        approve_again(world, position)
    approve_first(world, FULDA, world.names[:5])


def verified(world, coordinator: Coordinator, checkpoint) -> None:
    """The run's folder passes ``verify`` and the second implementation."""
    from medfed.client.verify import verify

    write_results(world.base.files, world.run_folder, world.assignment, checkpoint, coordinator.rounds.record)
    found = verify(world.base.files, world.run_folder, None)
    stamped = {"kind"}  # rehearsals are
    assert [check for check in found["checks"] if not check["holds"] and check["check"] not in stamped] == []
    assert runpy.run_path(str(VERIFIER))["faults"](world.run_folder) == []


# ------------------------------------------------------------------------------------------------------------- joining


def test_hospital_that_joins_after_round_1_is_in_every_sum_from_then_on(five) -> None:
    """It gets the state with the signatures of c + 1 others; nobody's budget, attempts or account begin anew."""
    join(five)
    line = Line(five)
    coordinator = Coordinator(five, line)
    checkpoint = coordinator.run()
    assert [record.survivors for record in checkpoint.records] == [tuple(FIVE), tuple(SIX), tuple(SIX)]
    assert [position for position, _, frame in line.sent if isinstance(opened(frame), StateTransfer)] == [FULDA]
    assert [five.charged(position) for position in SIX] == [3, 3, 3, 3, 3, 2]
    assert [kind for kind, _ in five.rows(0) if kind in ("APPROVED", "ROSTER")] == ["APPROVED", "ROSTER"]
    assert len({(five.place(position) / "model.safetensors").read_bytes() for position in SIX}) == 1
    assert sorted(coordinator.rounds.record.signed) == list(SIX)
    verified(five, coordinator, checkpoint)


def test_one_joins_and_then_one_leaves_for_good(five) -> None:
    join(five)
    line = Line(five)
    coordinator = Coordinator(five, line)

    def leave(checkpoint, what: str) -> None:
        if what == "round 2 done":
            five.kill(1)
            line.offline.add(1)

    coordinator.observe = leave
    checkpoint = coordinator.run()
    assert [record.survivors for record in checkpoint.records] == [tuple(FIVE), tuple(SIX), (0, 2, 3, 4, 5)]
    assert sorted(coordinator.rounds.record.signed) == [0, 2, 3, 4, 5]
    verified(five, coordinator, checkpoint)


def test_hospital_that_has_not_approved_the_new_roster_is_left_out_and_named(five, caplog) -> None:
    """No round waits for it. Once its people have approved it is in the next setup, without the others' doing."""
    join(five, approving=(0, 1, 2, 4))
    line = Line(five)
    coordinator = Coordinator(five, line)
    begun = five.clock.now_s

    def catch_up(checkpoint, what: str) -> None:
        if what == "round 2 done":
            assert five.clock.now_s - begun < five.study.deadlines.round_s
            approve_again(five, 3)

    coordinator.observe = catch_up
    checkpoint = coordinator.run()
    assert [record.survivors for record in checkpoint.records] == [tuple(FIVE), (0, 1, 2, 4, 5), tuple(SIX)]
    said = [record.message for record in caplog.records if "has not approved the new roster" in record.message]
    assert said == ["setup without Daun (has not approved the new roster)"]
    refused = {(position, reply.reason) for position, reply in line.answers if isinstance(reply, Refusal)}
    assert (3, int(Refused.OTHER_ROSTER)) in refused
    assert five.charged(3) == 2
    verified(five, coordinator, checkpoint)


def test_hospital_that_never_approves_the_new_roster_does_not_hold_up_the_end(five, caplog) -> None:
    join(five, approving=(0, 1, 2, 4))
    coordinator = Coordinator(five, Line(five))
    checkpoint = coordinator.run()
    assert sorted(coordinator.rounds.record.signed) == [0, 1, 2, 4, 5]
    assert "the final model is not signed by Daun" in caplog.text
    verified(five, coordinator, checkpoint)


def test_strict_study_can_do_without_one_once_a_hospital_has_joined(make_world) -> None:
    """m stays what the study says: four of five are enough now, and a hospital may have paid for fewer sums than there are."""
    world = make_world(hospitals=4, room=5)
    world.start_all()
    run_until(world, "round 1 done")
    world.extend("Emden")
    for position in range(4):
        approve_again(world, position, peers=("Emden",))
    approve_first(world, 4, world.names[:4])
    line = Line(world)
    coordinator = Coordinator(world, line)

    def leave(checkpoint, what: str) -> None:
        if what == "round 2 done":
            line.offline.add(0)
        elif what == "round 3 done":
            line.offline.discard(0)

    coordinator.observe = leave
    checkpoint = coordinator.run()
    assert [record.survivors for record in checkpoint.records] == [(0, 1, 2, 3), tuple(FIVE), (1, 2, 3, 4)]
    assert [world.charged(position) for position in FIVE] == [2, 3, 3, 3, 2]
    verified(world, coordinator, checkpoint)


def test_too_few_that_have_approved_are_waited_for_and_cost_nothing(five) -> None:
    join(five, approving=(0, 1))
    with pytest.raises(MedfedError) as caught:
        Coordinator(five, Line(five)).run()
    assert caught.value.code == 191
    assert "Celle" in str(caught.value) and "Fulda" not in str(caught.value)
    assert [five.charged(position) for position in SIX] == [1, 1, 1, 1, 1, 0]


def test_state_is_the_same_under_both_rosters_where_updates_are_weighted_by_patients(make_world) -> None:
    """The sum of round 1 is advanced by the coordinator under the old roster, by the hospitals under the new one."""
    world = make_world(UPDATE, hospitals=5, drop_outs=1, room=6)
    world.start_all()
    run_until(world, "round 1 done")
    join(world)
    checkpoint = Coordinator(world, Line(world)).run()
    assert [record.attempt for record in checkpoint.records] == [1, 2, 3]
    assert [record.survivors for record in checkpoint.records] == [tuple(FIVE), tuple(SIX), tuple(SIX)]


def test_attempt_that_was_open_under_the_old_roster_is_lost_by_name(make_world, caplog) -> None:
    """Its keys are bound to the old roster: it stays charged, and the next one has the next number."""
    world = make_world(hospitals=5, drop_outs=1, room=6)
    world.start_all()
    run_until(world, "round 2, attempt 2")
    join(world)
    checkpoint = Coordinator(world, Line(world)).run()
    assert "attempt 2 is lost: it was of the roster before hospitals joined" in caplog.text
    assert [(record.round, record.attempt) for record in checkpoint.records] == [(1, 1), (2, 3), (3, 4)]
    assert checkpoint.records[-1].survivors == tuple(SIX)


def test_roster_may_be_longer_than_a_sum_and_a_spare_takes_the_place_of_one_that_leaves(make_world, caplog) -> None:
    """Room for six, seven in the roster: the one whose offer comes last waits, and no round makes keys anew for it."""
    world = make_world(hospitals=5, drop_outs=1, room=6)
    world.extend("Fulda", "Goslar")
    for position in FIVE:
        approve_again(world, position, peers=("Fulda", "Goslar"))
    for position in (FULDA, GOSLAR):
        approve_first(world, position, [*world.names[:5], "Fulda", "Goslar"])
    line = Line(world)
    coordinator = Coordinator(world, line)

    def leave(checkpoint, what: str) -> None:
        if what == "round 2 done":
            world.kill(1)

    coordinator.observe = leave
    checkpoint = coordinator.run()
    assert [record.survivors for record in checkpoint.records] == [tuple(SIX)] * 2 + [(0, 2, 3, 4, 5, 6)]
    setups = [position for position, _, frame in line.sent if isinstance(opened(frame), SetupRequest)]
    assert setups.count(0) == 2
    assert "ALARM" not in caplog.text


# ------------------------------------------------------------------------------------------- rosters that are refused


def tampered(world, change) -> Roster:
    """``roster.json`` beside the study, with its hospitals changed."""
    path = study_path(world).parent / "roster.json"
    roster = Roster.model_validate_json(path.read_bytes())
    changed = roster.model_copy(update={"hospitals": change(list(roster.hospitals))})
    path.write_bytes(changed.to_bytes())
    return changed


ROSTERS = {
    "reordered": lambda hospitals: [hospitals[1], hospitals[0], *hospitals[2:]],
    "replaced": lambda hospitals: [*hospitals[:4], hospitals[5]],
    "shortened": lambda hospitals: hospitals[:4],
    "put in the middle": lambda hospitals: [*hospitals[:2], hospitals[5], *hospitals[2:5]],
}


@pytest.mark.parametrize("change", ROSTERS)
def test_roster_that_does_more_than_grow_at_its_end_is_refused_by_everybody(five, change: str) -> None:
    five.extend("Fulda")
    tampered(five, ROSTERS[change])
    with pytest.raises(PrivacyError) as at_coordinator:
        load_assignment(five.office)
    with pytest.raises(PrivacyError) as at_hospital:
        approve_again(five, 0)
    with pytest.raises(PrivacyError) as at_joiner:
        approve_first(five, FULDA, five.names[:5])
    assert [caught.value.code for caught in (at_coordinator, at_hospital, at_joiner)] == [124] * 3
    assert [kind for kind, _ in five.rows(0)].count("ROSTER") == 0


def test_without_the_check_of_extensions_a_reordered_roster_would_be_approved(five, monkeypatch) -> None:
    """The control: it is that check which refuses it at a hospital that joins."""
    five.extend("Fulda")
    tampered(five, ROSTERS["reordered"])
    monkeypatch.setattr(Roster, "extends", lambda roster, study: True)
    approve_first(five, FULDA, five.names[:5])
    assert ("APPROVED", 0) in five.rows(FULDA)


def test_roster_that_leaves_out_a_hospital_that_joined_is_refused_where_it_was_approved(five) -> None:
    """Each is an extension of the study's own; only the ledger's row tells that another one was approved since."""
    before = (study_path(five).parent / "roster.json").read_bytes()
    join(five)
    (study_path(five).parent / "roster.json").write_bytes(before)
    with pytest.raises(PrivacyError, match="does not begin with") as caught:
        approve_again(five, 0)
    assert caught.value.code == 125


def test_pinned_roster_that_was_changed_on_disk_is_refused_at_the_start(five) -> None:
    join(five)
    five.extend("Goslar")
    (five.place(0) / "roster.json").write_bytes((study_path(five).parent / "roster.json").read_bytes())
    with pytest.raises(PrivacyError, match="approved roster was changed") as caught:
        five.start(0)
    assert caught.value.code == 124


def test_victim_cannot_be_outnumbered_by_joiners_that_it_did_not_confirm(make_world) -> None:
    """c = 1: one unconfirmed hospital may be the coordinator's invention, over all rosters together."""
    world = make_world(hospitals=5, drop_outs=1, room=6)
    world.start_all()
    world.extend("Fulda")
    approve_again(world, 0, peers=())
    world.extend("Goslar")
    with pytest.raises(PrivacyError) as caught:
        approve_again(world, 0, peers=())
    assert caught.value.code == 147
    assert "Fulda" in str(caught.value) and "Goslar" in str(caught.value)
    approve_again(world, 0, peers=("Goslar",))
    approve_again(world, 0, peers=("Fulda",))  # the same roster, one more confirmed: the row is for that as well
    assert [row for row in world.rows(0) if row[0] == "ROSTER"] == [("ROSTER", -1), ("ROSTER", -2), ("ROSTER", -3)]


def test_masks_never_cancel_between_rosters(five) -> None:
    """A hospital with the old roster that is shown a setup as of old makes an offer; no aggregator of the new roster takes it."""
    five.extend("Fulda")
    identity = five.assignment.identity
    from medfed.privacy.secagg.aggregator import Aggregator
    from medfed.wire import encode

    answer = opened(five.hospitals[0].handle(encode(SetupRequest(five.study_hash, bytes(16), ()), identity)))
    assert isinstance(answer, OfferReply)
    with pytest.raises(MedfedError) as caught:
        Aggregator(five.assignment.secagg_config()).add_offer(answer.offer)
    assert caught.value.code == 112


def test_verify_refuses_a_roster_that_does_not_begin_with_the_study_s(five) -> None:
    """Also where the statement names it: the study alone says who was there at the start."""
    from medfed.client.verify import verify

    join(five)
    coordinator = Coordinator(five, Line(five))
    checkpoint = coordinator.run()
    verified(five, coordinator, checkpoint)
    changed = tampered(five, ROSTERS["reordered"])
    signed = five.assignment.roster.hash().hex()
    (five.run_folder / "roster.json").write_bytes(changed.to_bytes())
    statement = five.run_folder / "privacy.json"
    statement.write_text(statement.read_text().replace(signed, changed.hash().hex()))
    details = {check["check"]: check["detail"] for check in verify(five.base.files, five.run_folder, None)["checks"]}
    assert details["roster"] == "roster.json is not the study's roster, nor one that begins with it"
    found = runpy.run_path(str(VERIFIER))["faults"](five.run_folder)
    assert "roster: the study began with another roster" in found


# --------------------------------------------------------------------------------------------------------- the card


def test_card_names_who_joins_and_how_many_are_unconfirmed(five) -> None:
    five.extend("Fulda")
    five.kill(0)
    site = five.site(0)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        reviewed = review_roster(site, study_path(five), [], ledger)
        assert reviewed is not None
        asked = card(reviewed)
        assert [(peer["hospital"], peer["confirmed"]) for peer in asked["joined"]] == [("Fulda", False)]
        text = "\n".join(in_words(asked))
        assert "UNCONFIRMED   Fulda" in text and reviewed.joined[0].fingerprint in text
        approve_roster(site, reviewed, ledger)
        head = ledger.head()
        approve_roster(site, reviewed, ledger)
        assert ledger.head() == head  # twice is once
        assert review_roster(site, study_path(five), [], ledger) is None
        ledger.withdraw(five.study_hash, "enough")
        with pytest.raises(PrivacyError) as caught:
            approve_roster(site, reviewed, ledger)
        assert caught.value.code == 125
