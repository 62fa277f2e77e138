"""``medfed-client``: the way in, what the approval screen says, and one clear line for every bad input."""

import io
import json
import os
import shutil
import sys
import time

import pytest
from medfed_test_commands import NAMES, call, check_refusal, init_arguments, new_arguments, write_records

from medfed.client.cli import main
from medfed.client.ledger import Ledger
from medfed.errors import ExitStatus
from medfed.identity import create_node_key, fingerprint, load_identity
from medfed.models.parameters import file_hash
from medfed.roster import enrol, load_enrolment, load_roster
from medfed.seams import system_seams
from medfed.server.study_file import render
from medfed.study import load_study

FILES = system_seams().files


def approve_arguments(federation):
    return ["approve", federation.study, "--peers", *federation.peers, "--config", federation.config, "--yes"]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def change_study(federation, section, **changes):
    """The study with other values, its roster and model still fitting."""
    study = load_study(FILES, federation.study)
    part = getattr(study, section).model_copy(update=changes)
    federation.study.write_text(render(study.model_copy(update={section: part})))


def replace_model(federation, data):
    """Another first model, which the study pins."""
    (federation.study.parent / "first_model.safetensors").write_bytes(data)
    change_study(federation, "model", first_model_sha256=file_hash(data))


def replace_roster(federation, roster):
    """Another roster, which the study pins."""
    (federation.study.parent / "roster.json").write_bytes(roster.to_bytes())
    change_study(federation, "cohort", roster_sha256=roster.hash().hex())


# --------------------------------------------------------------------------------------------------------- the way in


def test_approve_of_a_study_within_the_caps_is_one_more_ledger_row(federation):
    before = federation.head()
    outcome = call(main, approve_arguments(federation))
    assert (outcome.status, outcome.err) == (0, "")
    assert federation.head() != before
    verified = call(main, ["ledger", "--verify", "--json", "--config", federation.config])
    assert json.loads(verified.out)["rows"] == 2


def test_approve_twice_changes_nothing_and_is_not_counted_twice(federation):
    edit(federation.config, "max_epsilon_lifetime = 8.0", "max_epsilon_lifetime = 4.0")  # once fits, twice would not
    first = call(main, approve_arguments(federation))
    head = federation.head()
    second = call(main, approve_arguments(federation))
    assert (first.status, second.status) == (0, 0)
    assert federation.head() == head


def test_approval_screen_says_what_is_asked_what_it_costs_who_is_in_and_what_leaves(federation):
    peers = federation.peers[:1]
    out = call(main, ["approve", federation.study, "--peers", *peers, "--config", federation.config, "--yes"]).out
    for said in (
        "age: 0 to 120 years",
        "ventilated: one of no, yes",
        "what is predicted: died",
        "12 records of 12 patients",
        "4 rounds and 1 spare attempt; ",
        "your own noise alone",
        "against your cap 8",
        "by the privacy loss distribution",
        "UNCONFIRMED   west",
        "confirmed     south",
        "nothing else",
    ):
        assert said in out, said
    for name in NAMES:
        assert load_enrolment(FILES, federation.folder / name / "enrolment.json").fingerprint in out


def test_approval_as_json_states_the_bytes_that_the_wire_will_carry(federation):
    from medfed.identity import Identity
    from medfed.wire import Upload, encode

    asked = json.loads(call(main, [*approve_arguments(federation), "--json"]).out)
    payload = 52 + 4 * asked["leaves"]["values"] + 64  # secagg.md, section 5: header, words, signature
    frame = Upload(bytes(32), bytes(16), 0, 1, 0, bytes(64), bytes(104), bytes(payload))
    assert asked["leaves"]["upload_bytes_per_round"] == len(encode(frame, Identity.from_seed(bytes(32))))
    assert asked["approved"] is True
    assert 0 < asked["cost"]["epsilon_without_spares"] < asked["cost"]["epsilon"] <= 2
    assert asked["cost"]["epsilon_own_noise_alone"] > asked["cost"]["epsilon"]


def test_approval_screen_escapes_and_marks_control_bidi_and_look_alike_characters(federation):
    change_study(federation, "study", purpose="Fine\x1b[2J\u202e0.1 nolispe\nepsilon 0.1, p\u0430id")
    out = call(main, approve_arguments(federation)).out
    assert "\\x1b[2J\\u202e" in out and "p\\u0430id" in out and "[!! 4 characters escaped" in out
    assert all(character.isascii() and (character.isprintable() or character == "\n") for character in out)
    assert not any(line.startswith("epsilon 0.1") for line in out.splitlines())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_approve_answered_no_writes_nothing(federation, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("no\n"))
    before = federation.listing()
    outcome = call(main, [each for each in approve_arguments(federation) if each != "--yes"])
    assert outcome.status == ExitStatus.POLICY
    assert "MF-123 not approved" in outcome.err
    assert federation.listing() == before


def test_approve_answered_yes_at_a_terminal_approves(federation, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
    before = federation.head()
    assert call(main, [each for each in approve_arguments(federation) if each != "--yes"]).status == 0
    assert federation.head() != before


def test_approve_without_a_terminal_and_without_yes_is_refused(federation, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    check_refusal(federation, main, [each for each in approve_arguments(federation) if each != "--yes"], 100, 2)


def test_plan_budget_and_ledger_work_beside_a_running_hospital_and_write_nothing(federation):
    call(main, approve_arguments(federation))
    change_study(federation, "study", name="Trial 2")  # another study on the same patients
    site = federation.site()
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        head = ledger.head()
        planned = call(main, ["plan", federation.study, "--config", federation.config, "--json"])
        spent = call(main, ["budget", "--config", federation.config, "--json"])
        rows = call(main, ["ledger", "--config", federation.config, "--json"])
        assert ledger.head() == head
    assert [planned.status, spent.status, rows.status] == [0, 0, 0]
    forecast, budget = json.loads(planned.out), json.loads(spent.out)
    assert forecast["refusals"] == [] and forecast["attempts_that_fit"] == 5
    assert forecast["lifetime"]["before"] == budget["accounts"][0]["epsilon_reserved"] > 0
    assert forecast["lifetime"]["after"] > forecast["lifetime"]["before"]
    assert budget["studies"][0]["epsilon_spent"] == 0 and budget["studies"][0]["attempts_left"] == 5
    assert [row["kind"] for row in json.loads(rows.out)] == ["BEGUN", "APPROVED"]


def test_plan_of_a_study_above_the_cap_says_how_many_attempts_fit(federation):
    edit(federation.config, "max_epsilon_study = 4.0", "max_epsilon_study = 1.5")
    before = federation.listing()
    outcome = call(main, ["plan", federation.study, "--config", federation.config, "--json"])
    forecast = json.loads(outcome.out)
    assert outcome.status == 3
    assert "MF-501" in forecast["refusals"][0]
    assert 0 < forecast["attempts_that_fit"] < forecast["attempts"] == 5
    assert federation.listing() == before


def test_plan_tells_every_reason_for_which_a_study_would_be_refused(federation):
    edit(federation.config, "min_colluders = 1", "min_colluders = 2")
    edit(federation.north / "patients.csv", "north-3,33", "north-3,333")
    planned = call(main, ["plan", federation.study, "--config", federation.config, "--json"])
    assert [reason[:6] for reason in json.loads(planned.out)["refusals"]] == ["MF-141", "MF-301"]


def test_plan_refuses_a_delta_that_approval_would_refuse(federation):
    change_study(federation, "privacy", delta=0.009)  # 12 patients are declared
    planned = call(main, ["plan", federation.study, "--config", federation.config, "--json"])
    approved = call(main, approve_arguments(federation))
    assert planned.status == approved.status == ExitStatus.POLICY
    assert json.loads(planned.out)["refusals"] == [approved.err.strip()]
    assert approved.err.startswith("MF-131")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda f: (f.study.parent / "first_model.safetensors").write_bytes(b"another"), "MF-124"),
        (lambda f: edit(f.study.parent / "roster.json", '"north"', '"North"'), "MF-110"),
        (lambda f: edit(f.config, "[coordinator]", f'[coordinator]\nidentity = "{"ab" * 32}"'), "MF-149"),
        (lambda f: edit(f.config, "holdout = 0.0", "holdout = 0.5"), None),
    ],
    ids=["first model", "roster", "coordinator", "control"],
)
def test_plan_checks_what_lies_beside_the_study(federation, spoil, code):
    spoil(federation)
    planned = call(main, ["plan", federation.study, "--config", federation.config, "--json"])
    assert [reason[:6] for reason in json.loads(planned.out)["refusals"]] == ([code] if code else [])


def test_plan_needs_neither_roster_nor_first_model(federation):
    for name in ("roster.json", "first_model.safetensors"):
        (federation.study.parent / name).unlink()
    assert call(main, ["plan", federation.study, "--config", federation.config]).status == 0


def test_plan_and_check_tell_the_same_error_of_metrics_and_what_they_cost(federation):
    """Both by the roster's declared sizes; the hospital puts its own share of held-out patients in the place of a fifth."""
    from medfed.server.cli import main as server

    edit(federation.folder / "task.toml", "[training]", "[metrics]\nbins = 4\nattempts = 2\n[training]")
    assert call(server, [*new_arguments(federation), "--replace"]).status == 0
    checked = json.loads(call(server, ["study", "check", federation.study, "--json"]).out)
    edit(federation.config, "holdout = 0.0", "holdout = 0.2")
    told = [json.loads(call(main, ["plan", federation.study, "--config", federation.config, "--json"]).out)]
    edit(federation.config, "holdout = 0.2", "holdout = 0.5")
    told.append(json.loads(call(main, ["plan", federation.study, "--config", federation.config, "--json"]).out))
    assert checked["held_out_patients"] == told[0]["outlook"]["held_out_patients"] == 9  # a quarter of 36 who train
    assert told[1]["outlook"]["held_out_patients"] == 12 + 6
    assert checked["metrics_auc_noise_sd"] == told[0]["outlook"]["metrics_auc_noise_sd"]
    assert checked["metrics_epsilon"] == told[0]["cost"]["metrics_epsilon"] == told[0]["outlook"]["metrics_epsilon"]
    assert 1.9 < checked["metrics_epsilon"] <= 2.0 and checked["epsilon_without_spares"] < 0.95 * checked["epsilon"]
    assert checked["upload_bytes_per_round"] == told[0]["outlook"]["upload_bytes_per_attempt"] > checked["vector_bytes"]
    for words in (call(server, ["study", "check", federation.study]).out, _planned(federation), _asked(federation)):
        assert "4 rounds, 1 spare attempt and 2 attempts at the metrics" in words or "4 rounds, with 1 spare" in words
        assert "charged in full with" in words and "first attempt" in words


def _planned(federation):
    return call(main, ["plan", federation.study, "--config", federation.config]).out


def _asked(federation):
    return call(main, approve_arguments(federation)).out


def test_plan_says_when_it_leaves_attempts_out(federation):
    assert "are shown" not in _planned(federation)  # of five
    edit(federation.folder / "task.toml", "rounds = 4", "rounds = 40")
    from medfed.server.cli import main as server

    call(server, [*new_arguments(federation), "--replace"])
    words = _planned(federation)
    bars = sum("#" in line for line in words.splitlines())
    assert f"({bars} of 41 are shown)" in words and bars < 20


def _with_hours(federation, begin_in_hours):
    """Hours of 30 minutes that begin so many hours from now, at the full hour."""
    hour = (time.localtime().tm_hour + begin_in_hours) % 24
    hours = f"{hour:02}:00-{hour:02}:59"
    edit(federation.config, "[policy]", f'[policy]\nhours = "{hours}"')
    return hours


def test_status_and_plan_tell_the_hours_and_the_next_opening(federation):
    hours = _with_hours(federation, 3)
    status = json.loads(call(main, ["status", "--config", federation.config, "--json"]).out)
    planned = json.loads(call(main, ["plan", federation.study, "--config", federation.config, "--json"]).out)
    assert status["hours"] == planned["hours"] == hours
    assert status["next_opening"] == planned["next_opening"]
    assert time.strftime("%H:%M", time.localtime(status["next_opening"])) == hours[:5]
    assert 0 < status["next_opening"] - time.time() <= 3 * 3600 + 1
    for words in (call(main, ["status", "--config", federation.config]).out, _planned(federation)):
        assert f"{hours}, now closed until " in words


def test_verify_of_no_folder_says_that_a_folder_is_wanted(federation):
    for run in (federation.study, federation.folder / "nowhere"):
        outcome = call(main, ["verify", run, "--config", federation.config])
        assert outcome.status == ExitStatus.USAGE
        assert outcome.err.startswith("MF-100") and "folder" in outcome.err


def test_plan_of_a_folder_is_a_fault_of_usage(federation):
    check_refusal(federation, main, ["plan", federation.study.parent, "--config", federation.config], 100, 2)


def test_plan_of_an_approved_study_points_to_the_budget(federation):
    call(main, approve_arguments(federation))
    check_refusal(federation, main, ["plan", federation.study, "--config", federation.config], 125, 3)


@pytest.mark.parametrize("by", ["name", "hash"])
def test_withdraw_frees_what_was_not_spent_and_the_study_stays_refused(federation, by):
    call(main, approve_arguments(federation))
    wanted = "Trial 1" if by == "name" else load_study(FILES, federation.study).hash().hex()[:8]
    assert call(main, ["withdraw", wanted, "--config", federation.config, "--yes"]).status == 0
    budget = json.loads(call(main, ["budget", "--config", federation.config, "--json"]).out)
    assert budget["studies"][0]["state"] == "withdrawn"
    assert budget["accounts"][0]["epsilon_reserved"] == 0
    check_refusal(federation, main, approve_arguments(federation), 125, 3)
    check_refusal(federation, main, ["run", federation.config, "--once"], 123, 3)


def test_enrolment_renews_the_declared_patients_under_the_same_keys(federation):
    path = federation.north / "enrolment.json"
    old = load_enrolment(FILES, path)
    outcome = call(main, ["enrolment", "--patients", "20", "--config", federation.config])
    new = load_enrolment(FILES, path)
    assert outcome.status == 0 and new.fingerprint in outcome.out
    assert (new.public, new.node_key, new.nominal_patients) == (old.public, old.node_key, 20)


def test_init_writes_secrets_that_only_their_owner_can_read(federation):
    for name in ("identity.key", "node.key", "patients.key"):
        assert (federation.north / name).stat().st_mode & 0o777 == 0o600


PUBLIC = {"enrolment.json", "hospital.toml"}


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_init_closes_a_folder_that_was_there(federation, monkeypatch, umask):
    folder = federation.folder / "here"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.chdir(folder)
    arguments = [*init_arguments(federation.folder, "here"), "--folder", "."]
    before = os.umask(umask)
    try:
        assert call(main, arguments).status == 0
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.name not in PUBLIC}
    assert set(modes) >= {"identity.key", "node.key", "patients.key", "ledger.db", "ledger.db.begun", "ledger.db.lock"}
    assert set(modes.values()) == {0o600}


def test_coordinator_confirmed_in_hospital_toml_is_shown_as_confirmed(federation):
    roster = load_roster(FILES, federation.study.parent / "roster.json")
    digits = fingerprint(bytes.fromhex(roster.coordinator))
    edit(federation.config, '# identity = "..."', f'identity = "{digits}"')
    outcome = call(main, approve_arguments(federation))
    assert outcome.status == 0 and "(confirmed in hospital.toml)" in outcome.out


# -------------------------------------------------------------------------------------------------- bad input: approve


def _unlink(name):
    return lambda federation: (federation.study.parent / name).unlink()


def _in_study(old, new):
    return lambda federation: edit(federation.study, old, new)


def _in_config(old, new):
    return lambda federation: edit(federation.config, old, new)


def _in_data(old, new):
    return lambda federation: edit(federation.north / "patients.csv", old, new)


def _data(text):
    return lambda federation: (federation.north / "patients.csv").write_text(text)


def _mode(name, mode):
    return lambda federation: (federation.north / name).chmod(mode)


def _emptied(name):
    return lambda federation: (federation.north / name).write_bytes(b"")


def _study_is_a_directory(federation):
    federation.study.unlink()
    federation.study.mkdir()


def _study_is_a_pipe(federation):
    federation.study.unlink()
    os.mkfifo(federation.study)


def _changed_roster(federation):
    roster = load_roster(FILES, federation.study.parent / "roster.json")
    other = roster.model_copy(update={"hospitals": list(reversed(roster.hospitals))})
    (federation.study.parent / "roster.json").write_bytes(other.to_bytes())


def _changed_model(federation):
    path = federation.study.parent / "first_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def _tampered_peer(federation):
    edit(federation.folder / "south" / "enrolment.json", '"nominal_patients": 12', '"nominal_patients": 13')


def _tampered_roster(federation):
    edit(federation.study.parent / "roster.json", '"nominal_patients": 12', '"nominal_patients": 13')


def _doubled_hospital(federation):
    roster = load_roster(FILES, federation.study.parent / "roster.json")
    replace_roster(federation, roster.model_copy(update={"hospitals": [*roster.hospitals[:2], roster.hospitals[1]]}))


def _south_again(federation, name):
    """A document for ``name`` under keys that are not south's."""
    keys = federation.folder / "invented"
    shutil.copytree(federation.folder / "west", keys)
    (keys / "node.key").unlink()
    identity = load_identity(FILES, federation.folder / "office" / "identity.key")
    return enrol(identity, name, create_node_key(FILES, keys / "node.key"), 12)


def _impostor_of_a_confirmed_hospital(federation):
    roster = load_roster(FILES, federation.study.parent / "roster.json")
    hospitals = [roster.hospitals[0], _south_again(federation, "south"), roster.hospitals[2]]
    replace_roster(federation, roster.model_copy(update={"hospitals": hospitals}))


def _confirmed_hospital_not_in_roster(federation):
    roster = load_roster(FILES, federation.study.parent / "roster.json")
    hospitals = [roster.hospitals[0], _south_again(federation, "east"), roster.hospitals[2]]
    replace_roster(federation, roster.model_copy(update={"hospitals": hospitals}))


def _renewed_after_enrolling(federation):
    assert call(main, ["enrolment", "--patients", "20", "--config", federation.config]).status == 0


def _pickle_as_model(federation):
    replace_model(federation, b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00.")


def _model(federation, tensors):
    from safetensors.numpy import save

    replace_model(federation, bytes(save(tensors)))


def _weights(federation):
    from safetensors.numpy import load

    return load((federation.study.parent / "first_model.safetensors").read_bytes())


def _weights_not_finite(federation):
    _model(federation, {name: values * float("nan") for name, values in _weights(federation).items()})


def _weights_of_another_shape(federation):
    _model(federation, {name: values.ravel()[:1] for name, values in _weights(federation).items()})


def _ledger_lost(federation):
    (federation.north / "ledger.db").unlink()


def _ledger_cut(federation):
    path = federation.north / "ledger.db"
    path.write_bytes(path.read_bytes()[:5000])


def _identity_of_another_backup(federation):
    shutil.copy(federation.folder / "south" / "identity.key", federation.north / "identity.key")


HEADER = "pid,age,ventilated,died\n"
BAD_APPROVALS = {
    # the study's file
    "unknown key": (_in_study("epsilon =", "epsilom ="), 202, 2, 'did you mean "privacy.epsilon"?'),
    "wrong type": (_in_study("rounds = 4", 'rounds = "three"'), 203, 2, "training.rounds must be a whole number"),
    "decimal comma": (_in_study("epsilon = 2.0", "epsilon = 2,0"), 201, 2, "study.toml not accepted at"),
    "negative": (_in_study("epsilon = 2.0", "epsilon = -1.0"), 203, 2, "privacy.epsilon must be above 0"),
    "infinite": (_in_study("epsilon = 2.0", "epsilon = inf"), 203, 2, "privacy.epsilon"),
    "delta of 1": (_in_study("delta = 0.001", "delta = 1.0"), 203, 2, "privacy.delta must be at most 0.01"),
    "sampling rate of 0": (_in_study("sampling_rate = 1.0", "sampling_rate = 0.0"), 203, 2, "sampling_rate"),
    "syntax": (_in_study("[privacy]", "[privacy"), 201, 2, "study.toml not accepted at"),
    "doubled key": (_in_study("delta = 0.001", "delta = 0.001\ndelta = 0.001"), 201, 2, "not accepted at"),
    "seed": (_in_study("delta = 0.001", "delta = 0.001\nseed = 7"), 133, 3, "sets randomness"),
    "empty study": (lambda f: f.study.write_text(""), 203, 2, "is missing"),
    "binary study": (lambda f: f.study.write_bytes(b"\xff\xfe\x00"), 201, 2, "not UTF-8"),
    "study is a directory": (_study_is_a_directory, 100, 2, "study.toml is a folder"),
    "study is a pipe": (_study_is_a_pipe, 204, 3, "not a regular file"),
    "no study": (_unlink("study.toml"), 606, 6, "study.toml not found"),
    "expired": (lambda f: change_study(f, "study", expires="2020-01-31"), 120, 3, "expired on 2020-01-31"),
    "false claim": (_in_study("epsilon = 2.0", "epsilon = 1.9"), 135, 3, "states epsilon 1.9"),
    # its attachments
    "no roster": (_unlink("roster.json"), 606, 6, "roster.json not found"),
    "empty roster": (lambda f: (f.study.parent / "roster.json").write_text(""), 201, 2, "roster.json"),
    "other roster": (_changed_roster, 124, 3, "not the study's roster"),
    "tampered roster": (_tampered_roster, 110, 4, "a signature in roster.json"),
    "doubled hospital": (_doubled_hospital, 143, 3, "listed twice"),
    "own document renewed": (_renewed_after_enrolling, 144, 3, "not its own document"),
    "no model": (_unlink("first_model.safetensors"), 606, 6, "first_model.safetensors not found"),
    "other model": (_changed_model, 124, 3, "not the study's first model"),
    "pickle": (_pickle_as_model, 151, 3, "no safetensors file"),
    "other tensors": (_weights_of_another_shape, 152, 4, "another shape"),
    "weights not finite": (_weights_not_finite, 153, 4, "not finite"),
    # the peers
    "tampered peer": (_tampered_peer, 110, 4, "a signature in enrolment.json"),
    "empty peer": (lambda f: (f.folder / "south" / "enrolment.json").write_text(""), 201, 2, "enrolment.json"),
    "no peer": (lambda f: (f.folder / "south" / "enrolment.json").unlink(), 606, 6, "not found"),
    "impostor": (_impostor_of_a_confirmed_hospital, 148, 3, "not the hospital you confirmed"),
    "peer left out": (_confirmed_hospital_not_in_roster, 148, 3, "confirmed but not in the roster"),
    "other coordinator": (_in_config('# identity = "..."', f'identity = "{"0" * 64}"'), 149, 3, "coordinator"),
    # policy and caps
    "study cap": (_in_config("max_epsilon_study = 4.0", "max_epsilon_study = 1.0"), 501, 5, "cap 1, nothing was spent"),
    "lifetime cap": (
        lambda f: (
            edit(f.config, "max_epsilon_study = 4.0", "max_epsilon_study = 2.1"),
            edit(f.config, "max_epsilon_lifetime = 8.0", "max_epsilon_lifetime = 2.1"),
        ),
        *(501, 5, "max_epsilon_lifetime"),
    ),
    "little noise": (_in_config("min_noise_multiplier = 0.5", "min_noise_multiplier = 90.0"), 130, 3, "below"),
    "large delta": (_in_config("max_delta = 0.01", "max_delta = 0.0001"), 131, 3, "delta 0.001 is above"),
    "many attempts": (_in_config("max_attempts = 10000", "max_attempts = 4"), 132, 3, "max_attempts"),
    "mode": (_in_config('["local", "distributed"]', '["local"]'), 134, 3, "distributed"),
    "unit": (lambda f: change_study(f, "privacy", unit="record"), 134, 3, "record"),
    "few hospitals": (_in_config("min_hospitals = 3", "min_hospitals = 4"), 140, 3, "sums of 3 hospitals"),
    "few colluders": (_in_config("min_colluders = 1", "min_colluders = 2"), 141, 3, "min_colluders"),
    # the data
    "NaN": (_in_data("north-3,33,no", "north-3,nan,no"), 301, 2, "row 5, column age"),
    "infinite value": (_in_data("north-3,33,no", "north-3,1e999,no"), 301, 2, "not finite"),
    "out of range": (_in_data("north-3,33,no", "north-3,333,no"), 301, 2, "outside [0, 120] years"),
    "no level": (_in_data("north-3,33,no", "north-3,33,maybe"), 301, 2, "none of the study's levels"),
    "missing column": (_in_data("ventilated", "breathing"), 301, 2, 'column "ventilated" is missing'),
    "doubled column": (_in_data("pid,age", "age,age"), 301, 2, "column"),
    "label out of range": (_in_data("north-3,33,no,1", "north-3,33,no,2"), 301, 2, "not a class 0..1"),
    "no label": (_in_data("north-3,33,no,1", "north-3,33,no,"), 301, 2, "not a class"),
    "ragged row": (_in_data("north-3,33,no,1", "north-3,33,no"), 301, 2, "row 5 has 3 cells"),
    "nobody's record": (_in_data("north-3,33", ",33"), 301, 2, "no patient id"),
    "open quote": (_in_data("north-3,33", '"north-3,33'), 301, 2, "quote"),
    "empty data": (_data(""), 301, 2, "empty"),
    "header alone": (_data(HEADER), 310, 3, "no record"),
    "one patient": (_data(HEADER + "p,50,no,1\n"), 310, 3, "fewer than 2 patients"),
    "no data": (lambda f: (f.north / "patients.csv").unlink(), 606, 6, "patients.csv not found"),
    # this hospital's own folder
    "identity 0644": (_mode("identity.key", 0o644), 210, 6, "chmod 600"),
    "patients key 0640": (_mode("patients.key", 0o640), 210, 6, "chmod 600"),
    "identity empty": (_emptied("identity.key"), 211, 6, "not a usable private key"),
    "patients key empty": (_emptied("patients.key"), 211, 6, "not the key made here"),
    "identity of another": (_identity_of_another_backup, 144, 3, "not of this identity"),
    "no configuration": (lambda f: f.config.unlink(), 606, 6, "hospital.toml not found"),
    "empty configuration": (_emptied("hospital.toml"), 203, 2, "is missing"),
    "unknown policy": (_in_config("max_delta", "max_dleta"), 202, 2, 'did you mean "policy.max_delta"?'),
    "cap as text": (_in_config("max_epsilon_study = 4.0", 'max_epsilon_study = "4"'), 203, 2, "must be a number"),
    "cap of infinity": (_in_config("max_epsilon_study = 4.0", "max_epsilon_study = inf"), 203, 2, "max_epsilon_study"),
    "ledger lost": (_ledger_lost, 401, 4, "ledger.db not found"),
    "ledger cut": (_ledger_cut, 402, 4, "damaged or truncated"),
}


@pytest.mark.parametrize("name", BAD_APPROVALS)
def test_approve_of_bad_input_says_one_line_and_leaves_everything_as_it_was(federation, name):
    spoil, code, status, said = BAD_APPROVALS[name]
    spoil(federation)
    outcome = check_refusal(federation, main, approve_arguments(federation), code, status)
    assert said in outcome.err, outcome.err
    assert "333" not in outcome.err and "maybe" not in outcome.err  # no cell's value


def test_approve_with_more_unconfirmed_peers_than_colluders_is_refused_by_name(federation):
    outcome = check_refusal(
        federation, main, ["approve", federation.study, "--config", federation.config, "--yes"], 147, 3
    )
    assert "south, west" in outcome.err


def test_approve_beside_a_running_hospital_is_refused(federation):
    site = federation.site()
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        head = ledger.head()
        outcome = call(main, approve_arguments(federation))
        assert ledger.head() == head
    assert outcome.status == ExitStatus.INTEGRITY
    assert outcome.err.startswith("MF-620") and outcome.err.count("\n") == 1


# ------------------------------------------------------------------------------------------ bad input: run and the rest


def _stored(federation, name):
    [folder] = (federation.north / "studies").iterdir()
    return folder / name


def _stored_roster_changed(federation):
    path = _stored(federation, "roster.json")
    roster = load_roster(FILES, path)
    path.write_bytes(roster.model_copy(update={"hospitals": list(reversed(roster.hospitals))}).to_bytes())


BAD_STARTS = {
    "changed study": (lambda f: edit(_stored(f, "study.json"), '"rounds":4', '"rounds":5'), 124, 3),
    "changed roster": (_stored_roster_changed, 124, 3),
    "changed model": (lambda f: _stored(f, "first_model.safetensors").write_bytes(b"other"), 124, 3),
    "lost study": (lambda f: _stored(f, "study.json").unlink(), 606, 6),
    "new patients": (lambda f: write_records(f.north / "patients.csv", "newcomer"), 340, 4),
    "node key 0644": (_mode("node.key", 0o644), 210, 6),
    "no authority": (
        lambda f: edit(f.config, "tls/ca.crt", "tls/gone.crt"),
        *(606, 6),
    ),
}


@pytest.fixture(autouse=True)
def _signals_as_before():
    import signal

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", BAD_STARTS)
def test_run_of_what_was_changed_after_approval_does_not_start(federation, name):
    spoil, code, status = BAD_STARTS[name]
    assert call(main, approve_arguments(federation)).status == 0
    spoil(federation)
    head = federation.head()
    before = federation.listing()
    outcome = call(main, ["run", federation.config, "--once"])
    assert (outcome.status, federation.head()) == (status, head)
    assert outcome.err.splitlines()[-1].startswith(f"MF-{code} "), outcome.err
    assert "Traceback" not in outcome.err
    assert federation.listing() == before


def test_run_without_an_approved_study_is_refused(federation):
    check_refusal(federation, main, ["run", "--config", federation.config, "--once"], 123, 3)


def test_run_once_against_an_unreachable_coordinator_names_it_and_spends_nothing(federation):
    assert call(main, approve_arguments(federation)).status == 0
    head = federation.head()
    outcome = call(main, ["run", federation.config, "--once"])
    assert outcome.status == ExitStatus.ENVIRONMENT
    assert outcome.err.splitlines()[-1].startswith("MF-610 localhost:1 cannot be reached")
    assert federation.head() == head


@pytest.mark.parametrize(
    ("argv", "code", "status"),
    [
        (["withdraw", "Trial 9", "--yes"], 123, 3),
        (["plan", "nowhere.toml"], 606, 6),
        (["enrolment", "--patients", "0"], 203, 2),
        (["enrolment", "--patients", "many"], 100, 2),
        (["budget", "--everything"], 100, 2),
        (["ledgers"], 100, 2),
        ([], 100, 2),
        (["run", "--seed", "1"], 701, 3),
        (["run", "--insecure"], 701, 3),
        (["run", "--no-dp"], 701, 3),
        (["approve", "study.toml", "--seed=1"], 701, 3),
        (["approve", "study.toml", "--epsilon", "none"], 701, 3),
        (["approve", "study.toml", "--epsilon=None"], 701, 3),
        (["approve", "odd-\udcff.toml"], 100, 2),
    ],
)
def test_command_line_of_bad_arguments_says_one_line(federation, argv, code, status):
    needs_config = argv and argv[0] in {"withdraw", "plan", "enrolment", "run"}
    check_refusal(
        federation, main, [*argv, *(["--config", str(federation.config)] if needs_config else [])], code, status
    )


BAD_INITS = {
    "in use": ({}, "north", 212, 2),
    "no patients": ({"--patients": "0"}, "east", 203, 2),
    "more than the living": ({"--patients": "100000000000"}, "east", 203, 2),
    "no port": ({"--coordinator": "example.org"}, "east", 203, 2),
    "port out of range": ({"--coordinator": "example.org:99999"}, "east", 203, 2),
    "no authority": ({"--ca": "nowhere.crt"}, "east", 606, 6),
    "negative cap": ({"--max-epsilon-study": "-1"}, "east", 203, 2),
    "cap as text": ({"--max-epsilon-study": "three"}, "east", 100, 2),
    "cap not a number": ({"--max-epsilon-study": "nan"}, "east", 203, 2),
    "study above lifetime": ({"--max-epsilon-study": "9"}, "east", 203, 2),
    "delta of 1": ({"--max-delta": "1"}, "east", 203, 2),
    "proxy": ({"--proxy": "socks5://proxy:1080"}, "east", 203, 2),
    "holdout": ({"--holdout": "0.9"}, "east", 203, 2),
    "colluders": ({"--min-colluders": "0"}, "east", 203, 2),
}


@pytest.mark.parametrize("name", BAD_INITS)
def test_init_with_bad_options_lays_out_nothing(federation, name):
    options, folder, code, status = BAD_INITS[name]
    argv = init_arguments(federation.folder, folder)
    for option, value in options.items():
        if option in argv:
            argv[argv.index(option) + 1] = value
        else:
            argv += [option, value]
    check_refusal(federation, main, argv, code, status)


def test_init_with_a_name_that_no_roster_takes_lays_out_nothing(federation):
    argv = init_arguments(federation.folder, "east")
    argv[1] = "East\x1b[31m"
    outcome = check_refusal(federation, main, argv, 203, 2)
    assert "\x1b" not in outcome.err


def test_init_over_the_keys_of_an_interrupted_one_is_refused(federation):
    federation.config.unlink()
    check_refusal(federation, main, init_arguments(federation.folder, "north"), 212, 2)


def test_init_with_odd_file_names_reads_them_back(federation):
    argv = init_arguments(federation.folder, "east")
    argv[argv.index("--data") + 1] = str(federation.folder / "east" / 'données "1"\\\x7f😀.csv')
    assert call(main, argv).status == 0
    assert call(main, ["budget", "--config", federation.folder / "east" / "hospital.toml"]).status == 0
    assert "Put the records at" in call(main, init_arguments(federation.folder, "far")).out
