"""A hospital joins, by the commands that people type: ``study new --most-hospitals``, ``study extend``, ``approve`` once more."""

import json

import pytest
from medfed_test_commands import call, check_refusal, init_arguments, new_arguments, write_records

from medfed.client.cli import main as client
from medfed.client.ledger import Ledger
from medfed.seams import system_seams
from medfed.server.cli import main as server
from medfed.study import load_study

FILES = system_seams().files


@pytest.fixture
def joining(federation):
    """North has approved a study with room for four; east is set up and not enrolled."""
    new = [*new_arguments(federation), "--most-hospitals", "4", "--replace"]
    (federation.folder / "east").mkdir()
    write_records(federation.folder / "east" / "patients.csv", "east")
    done = [
        call(server, new),
        call(client, init_arguments(federation.folder, "east")),
        call(client, approve(federation)),
    ]
    assert [outcome.status for outcome in done] == [0, 0, 0], [outcome.err for outcome in done]
    return federation


def approve(federation, *peers, config=None):
    given = [federation.folder / peer / "enrolment.json" for peer in peers or ("south", "west")]
    return ["approve", federation.study, "--peers", *given, "--config", config or federation.config, "--yes"]


def extend(federation, *names):
    documents = [federation.folder / name / "enrolment.json" for name in names]
    return ["study", "extend", *documents, "--folder", federation.office]


def test_hospital_joins_by_the_commands(joining):
    study = load_study(FILES, joining.study)
    assert (study.cohort.hospitals, study.cohort.most_hospitals) == (3, 4)
    asked = call(client, approve(joining))
    assert "more may join, up to 4 in a sum; you are asked before any of them does" in asked.out
    said = call(server, extend(joining, "east"))
    assert (said.status, said.err) == (0, "")
    assert "4 hospitals in the roster of Trial 1" in said.out and "  3 east, 12 patients declared" in said.out
    assert load_study(FILES, joining.study) == study
    assert call(server, ["study", "check", joining.study]).status == 0

    again = call(client, approve(joining, "east"))
    assert (again.status, again.err) == (0, "")
    assert "confirmed     east" in again.out and "Unconfirmed: 0; the study allows for 1 colluders" in again.out
    assert "epsilon" not in again.out
    site = joining.site()
    with Ledger.open(FILES, site.ledger_path, site.identity()) as ledger:
        assert [entry.kind.value for entry in ledger.entries()] == ["BEGUN", "APPROVED", "ROSTER"]

    first = call(client, approve(joining, "north", "south", "west", config=joining.folder / "east" / "hospital.toml"))
    assert (first.status, first.err) == (0, "")
    assert "Who takes part: 4 hospitals" in first.out


def test_roster_is_asked_for_and_told_as_json(joining):
    call(server, extend(joining, "east"))
    asked = json.loads(call(client, [*approve(joining, "south"), "--json"]).out)
    assert asked["approved"] is True
    assert [(peer["hospital"], peer["confirmed"]) for peer in asked["joined"]] == [("east", False)]
    assert (asked["unconfirmed"], asked["colluders"], asked["most_hospitals"]) == (["east"], 1, 4)
    confirming = json.loads(call(client, [*approve(joining, "east"), "--json"]).out)
    assert (confirming["joined"], confirming["confirmed"], confirming["unconfirmed"]) == ([], ["east"], [])


def test_confirming_one_more_peer_later_is_no_other_approval(federation):
    """And what was confirmed once stays so: naming fewer peers the next time takes nothing back."""
    assert call(client, approve(federation, "south")).status == 0
    more = call(client, approve(federation, "west"))
    assert (more.status, more.err) == (0, "")
    assert "Confirmed from now on: west" in more.out
    head = federation.head()
    assert call(client, approve(federation, "south")).status == 0
    assert federation.head() == head


def test_roster_is_not_pinned_without_a_yes(joining, monkeypatch):
    call(server, extend(joining, "east"))
    monkeypatch.setattr("medfed.client.cli.confirm", lambda question, assume_yes: False)
    before = joining.head()
    outcome = call(client, approve(joining, "east"))
    assert outcome.err.startswith("MF-123") and joining.head() == before


REFUSED = {
    "who is in already": (("south",), 143, 3),
    "twice": (("east", "east"), 143, 3),
    "no document": (("nowhere",), 606, 6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_extend_of_bad_input_leaves_the_roster_as_it_was(joining, name):
    names, code, status = REFUSED[name]
    check_refusal(joining, server, extend(joining, *names), code, status)


def test_extend_beside_a_run_is_refused(joining):
    with FILES.lock(joining.office / "run.lock"):
        check_refusal(joining, server, extend(joining, "east"), 620, 4)


def test_extend_of_another_study_s_roster_is_refused(joining):
    roster = joining.study.parent / "roster.json"
    other = json.loads(roster.read_bytes())
    other["hospitals"].reverse()
    roster.write_text(json.dumps(other))
    check_refusal(joining, server, extend(joining, "east"), 124, 3)


def test_fewer_hospitals_at_most_than_are_enrolled_make_no_study(federation):
    argv = [*new_arguments(federation), "--replace", "--most-hospitals", "2"]
    check_refusal(federation, server, argv, 203, 2)
