"""``medfed-server``: the way in, what a study's check says, and one clear line for every bad input."""

import json
import os
import shutil
import signal

import pytest
from medfed_test_commands import NAMES, call, check_refusal, new_arguments

from medfed.errors import ExitStatus
from medfed.identity import load_identity
from medfed.privacy.plan import make_plan
from medfed.roster import enrol, load_enrolment, load_roster
from medfed.seams import system_seams
from medfed.server.cli import main
from medfed.server.daemon import read_status
from medfed.server.study_file import render
from medfed.study import load_study

FILES = system_seams().files


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def option(argv, name, value):
    """``argv`` with another value of an option."""
    place = argv.index(name) + 1
    return [*argv[:place], value, *argv[place + 1 :]]


def change_study(federation, section, **changes):
    study = load_study(FILES, federation.study)
    part = getattr(study, section).model_copy(update=changes)
    federation.study.write_text(render(study.model_copy(update={section: part})))


@pytest.fixture(autouse=True)
def _signals_as_before():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------------- the way in


def test_enroll_shows_every_hospital_with_its_fingerprint_and_what_changed(federation):
    renewed = federation.folder / "south" / "enrolment.json"
    old = load_enrolment(FILES, renewed)
    identity = load_identity(FILES, federation.folder / "south" / "identity.key")
    renewed.write_bytes(enrol(identity, "south", old.node_key, 20).to_bytes())
    outcome = call(main, ["enroll", renewed, "--folder", federation.office])
    assert outcome.status == 0 and outcome.err == ""
    assert "1 south, 20 patients declared renewed" in outcome.out
    for name in NAMES:
        assert load_enrolment(FILES, federation.folder / name / "enrolment.json").fingerprint in outcome.out


def test_enroll_of_new_keys_under_a_known_name_says_so_loudly(federation):
    node_key = load_enrolment(FILES, federation.folder / "south" / "enrolment.json").node_key
    other = load_identity(FILES, federation.office / "identity.key")
    document = federation.folder / "new.json"
    document.write_bytes(enrol(other, "south", node_key, 12).to_bytes())
    assert "south, 12 patients declared NEW KEYS" in call(main, ["enroll", document, "--folder", federation.office]).out


def test_study_new_writes_plan_roster_and_model_that_fit_each_other(federation):
    folder = federation.study.parent
    assert sorted(path.name for path in folder.iterdir()) == ["first_model.safetensors", "roster.json", "study.toml"]
    checked = json.loads(call(main, ["study", "check", federation.study, "--json"]).out)
    assert checked["study_sha256"] == load_study(FILES, federation.study).hash().hex()
    assert checked["hospitals"] == 3 and checked["noise_sd_of_mean"] > 0
    assert 1.9 < checked["epsilon"] <= 2.0 == checked["epsilon_claimed"]
    assert checked["epsilon_without_spares"] < checked["epsilon"] < checked["epsilon_own_noise_alone"]
    assert checked["excess_noise"] == pytest.approx(1.5)


def test_study_check_explains_epsilon_noise_excess_ring_and_wrap(federation):
    outcome = call(main, ["study", "check", federation.study])
    assert (outcome.status, outcome.err) == (0, "")
    for said in (
        "epsilon 2",
        "if no spare is needed",
        "1.5 times the variance",
        "32-bit ring",
        "wraps",
        "at most 1 of the",
    ):
        assert said in outcome.out, said


def test_study_check_of_a_stranger_s_text_escapes_it(federation):
    change_study(federation, "study", purpose="Fine\x1b]0;owned\x07")
    out = call(main, ["study", "check", federation.study]).out
    assert "\x1b" not in out and "\\x1b]0;owned\\x07 [!! 2 characters escaped" in out


def test_study_new_again_needs_replace_and_then_replaces_all_three(federation):
    argv = option(new_arguments(federation), "--name", "Trial 2")
    check_refusal(federation, main, argv, 212, 2)
    assert call(main, [*argv, "--replace"]).status == 0
    assert load_study(FILES, federation.study).study.name == "Trial 2"
    assert call(main, ["study", "check", federation.study]).status == 0


def test_study_new_with_a_first_model_begins_at_its_weights(federation):
    import numpy as np
    from safetensors.numpy import load, save

    first = federation.study.parent / "first_model.safetensors"
    tensors = {name: np.full_like(tensor, 0.25) for name, tensor in load(first.read_bytes()).items()}
    earlier = federation.folder / "earlier.safetensors"
    earlier.write_bytes(save(tensors))
    outcome = call(main, [*new_arguments(federation), "--replace", "--first-model", earlier])
    assert outcome.status == 0, outcome.err
    assert f"First weights: {len(tensors)} tensors of {len(tensors)} from the file." in outcome.out
    assert {name: tensor.mean() for name, tensor in load(first.read_bytes()).items()} == dict.fromkeys(tensors, 0.25)
    pinned = load_study(FILES, federation.study).model.first_model_sha256
    name, one = next(iter(tensors.items()))
    earlier.write_bytes(save({name: one}))
    argv = [*new_arguments(federation), "--replace", "--first-model", earlier]
    check_refusal(federation, main, argv, 152, ExitStatus.INTEGRITY)
    assert load_study(FILES, federation.study).model.first_model_sha256 == pinned
    outcome = call(main, [*argv, "--partly"])
    assert outcome.status == 0 and f"1 tensor of {len(tensors)} from the file" in outcome.out
    assert "drawn anew: " in outcome.out
    check_refusal(federation, main, [*new_arguments(federation), "--replace", "--partly"], 100, ExitStatus.USAGE)


def test_study_new_with_word_vectors_puts_them_into_the_first_embedding(federation):
    import numpy as np
    from safetensors.numpy import load

    from medfed.models.text_records import hashed_word

    vectors = federation.folder / "vectors.txt"
    vectors.write_text("cough " + " ".join(["1"] * 16) + "\n")
    new = [*option(new_arguments(federation), "--task", "synthetic-notes"), "--replace", "--word-vectors", vectors]
    outcome = call(main, new)
    assert outcome.status == 0, outcome.err
    assert "1 tensor of" in outcome.out and "from the file" in outcome.out
    rows = load((federation.study.parent / "first_model.safetensors").read_bytes())["embedding.weight"]
    np.testing.assert_allclose(rows[hashed_word("cough", 1024)], 0.1, rtol=1e-6)
    check_refusal(federation, main, [*new, "--first-model", vectors], 100, ExitStatus.USAGE)
    vectors.write_text("cough 1 1\n")
    check_refusal(federation, main, new, 203, ExitStatus.USAGE)


def test_study_new_with_replace_beside_a_run_is_refused(federation):
    with FILES.lock(federation.office / "run.lock"):
        check_refusal(federation, main, [*new_arguments(federation), "--replace"], 620, 4)


def test_study_tasks_lists_templates_and_show_task_prints_a_usable_one(federation):
    tasks = json.loads(call(main, ["study", "tasks", "--json"]).out)
    assert set(tasks) >= {"breast-cancer", "example", "heart-disease"}
    own = federation.folder / "own.toml"
    own.write_text(call(main, ["study", "show-task", "example"]).out)
    argv = option(new_arguments(federation), "--task", str(own))
    assert call(main, [*argv, "--replace"]).status == 0


def test_init_twice_is_refused_and_leaves_the_first_as_it_was(federation):
    check_refusal(federation, main, ["init", "--folder", federation.office, "--host", "localhost"], 212, 2)


def test_init_closes_a_folder_that_was_there_and_its_secrets(federation):
    folder = federation.folder / "here"
    folder.mkdir()
    folder.chmod(0o755)
    assert call(main, ["init", "--folder", folder, "--host", "localhost"]).status == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert (modes["here"], modes["tls"]) == (0o700, 0o700)
    assert {modes[name] for name in ("identity.key", "ca.key", "server.key")} == {0o600}


def test_status_shows_the_last_run(federation):
    status = {
        "study": "Trial 1",
        "study_sha256": "ab" * 32,
        "what": "done",
        "failed": None,
        "updated": 1.0,
        "round": 4,
        "rounds": 4,
        "attempts_used": 5,
        "attempts": 5,
        "rounds_by_kind": {"training": 3, "metrics": 1},
        "epsilon_spent": 1.5,
        "epsilon_spent_at_most": 1.6,
        "epsilon": 2.0,
    }
    (federation.office / "status.json").write_text(json.dumps(status))
    shown = call(main, ["status", federation.office / "server.toml"])
    as_json = call(main, ["status", federation.office / "server.toml", "--json"])
    assert "round 4 of 4 (3 of training, 1 of metrics)" in shown.out and "not running" in shown.out
    assert "epsilon spent 1.5 of 2\n" in shown.out and "first attempt" in shown.out
    assert "medfed-server run" not in shown.out
    assert json.loads(as_json.out)["running"] is False


def test_status_of_a_run_that_was_killed_says_how_to_go_on_and_what_is_spent_exactly(federation):
    study = load_study(FILES, federation.study)
    plan = make_plan(study, 3)
    status = {
        "study": "Trial 1",
        "study_sha256": study.hash().hex(),
        "what": "round 3, attempt 2",
        "failed": None,
        "updated": 1.0,
        "round": 2,
        "rounds": 4,
        "rounds_by_kind": {"training": 4},
        "attempts_used": 2,
        "attempts": 5,
        "epsilon_spent": None,
        "epsilon_spent_at_most": plan.running_epsilon(2),
        "epsilon": plan.epsilon,
    }
    (federation.office / "status.json").write_text(json.dumps(status))
    told = json.loads(call(main, ["status", federation.office / "server.toml", "--json"]).out)
    assert told["epsilon_spent"] == plan.epsilon_after(2) < told["epsilon_spent_at_most"]
    assert "medfed-server run" in call(main, ["status", federation.office / "server.toml"]).out
    assert read_status(federation.office / "server.toml", system_seams(), exact=False)["epsilon_spent"] is None
    change_study(federation, "study", name="Another")
    shown = call(main, ["status", federation.office / "server.toml"]).out
    assert "epsilon spent at most" in shown


def test_study_with_a_delta_that_a_hospital_would_refuse_is_not_planned(federation):
    listing = federation.listing()
    large = option(new_arguments(federation), "--delta", "0.009")  # 12 patients are declared
    outcome = call(main, [*large, "--replace"])
    assert outcome.status == ExitStatus.POLICY
    assert outcome.err.startswith("MF-131 delta 0.009 exceeds a tenth of 1 in 12 patients")
    assert federation.listing() == listing
    change_study(federation, "privacy", delta=0.009)
    check_refusal(federation, main, ["study", "check", federation.study], 131, 3)


def test_decision_that_no_study_may_have_is_said_in_plain_words(federation):
    outcome = call(main, option([*new_arguments(federation), "--replace"], "--epsilon", "-1"))
    assert "epsilon must be above 0, not -1" in outcome.err


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "code", "status"),
    [
        (["--host", "https://fl.example.org"], 203, 2),
        (["--host", "fl.example.org:8443"], 203, 2),
        (["--host", "localhost", "--port", "99999"], 203, 2),
        (["--host", "localhost", "--admin-port", "-1"], 203, 2),
        (["--host", "localhost", "--port", "many"], 100, 2),
        ([], 100, 2),
    ],
)
def test_init_with_bad_options_lays_out_nothing(federation, argv, code, status):
    check_refusal(federation, main, ["init", "--folder", federation.folder / "other", *argv], code, status)


def _document(federation, signer, hospital):
    """A document whose signature holds, by the identity of ``signer``."""
    path = federation.folder / "extra.json"
    node_key = load_enrolment(FILES, federation.folder / "west" / "enrolment.json").node_key
    identity = load_identity(FILES, federation.folder / signer / "identity.key")
    path.write_bytes(enrol(identity, hospital, node_key, 12).to_bytes())
    return [path]


def _spoiled(federation, spoil):
    path = federation.folder / "extra.json"
    shutil.copy(federation.folder / "south" / "enrolment.json", path)
    spoil(path)
    return [path]


def _unwritten(path):
    path.unlink()


def _directory(path):
    path.unlink()
    path.mkdir()


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


BAD_DOCUMENTS = {
    "tampered": (lambda f: _spoiled(f, lambda p: edit(p, '"south"', '"north"')), 110, 4),
    "empty": (lambda f: _spoiled(f, lambda p: p.write_text("")), 201, 2),
    "other file": (lambda f: [f.north / "patients.csv"], 201, 2),
    "missing": (lambda f: _spoiled(f, _unwritten), 606, 6),
    "directory": (lambda f: _spoiled(f, _directory), 204, 3),
    "pipe": (lambda f: _spoiled(f, _pipe), 204, 3),
    "one hospital under two names": (lambda f: _document(f, "south", "east"), 143, 3),
    "node key of another": (lambda f: _document(f, "office", "east"), 143, 3),
    "two documents of a name": (
        lambda f: [*_document(f, "office", "south"), f.folder / "south" / "enrolment.json"],
        *(143, 3),
    ),
    "unknown field": (lambda f: _spoiled(f, lambda p: edit(p, "{", '{"seed": 1,')), 201, 2),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_enroll_of_a_bad_document_leaves_the_roster_as_it_was(federation, name):
    make, code, status = BAD_DOCUMENTS[name]
    documents = make(federation)
    check_refusal(federation, main, ["enroll", *documents, "--folder", federation.office], code, status)


def test_enroll_without_a_coordinator_is_refused(federation):
    documents = [federation.folder / "south" / "enrolment.json"]
    check_refusal(federation, main, ["enroll", *documents, "--folder", federation.folder], 606, 6)


def _two_hospitals(federation):
    path = federation.office / "roster.json"
    roster = load_roster(FILES, path)
    path.write_bytes(roster.model_copy(update={"hospitals": roster.hospitals[:2]}).to_bytes())


def _task(old, new):
    return lambda federation: edit(federation.folder / "task.toml", old, new)


BAD_PLANS = {
    "no noise": ({"--epsilon": "none"}, None, 701, 3),
    "epsilon of 0": ({"--epsilon": "0"}, None, 203, 2),
    "negative epsilon": ({"--epsilon": "-1"}, None, 203, 2),
    "infinite epsilon": ({"--epsilon": "inf"}, None, 203, 2),
    "epsilon not a number": ({"--epsilon": "nan"}, None, 203, 2),
    "decimal comma": ({"--epsilon": "1,5"}, None, 100, 2),
    "epsilon out of reach": ({"--epsilon": "0.000001"}, None, 145, 3),
    "delta of 1": ({"--delta": "1"}, None, 203, 2),
    "mode": ({"--mode": "central"}, None, 100, 2),
    "unit": ({"--unit": "hospital"}, None, 100, 2),
    "colluders": ({"--colluders": "2"}, None, 203, 2),
    "no colluders": ({"--colluders": "0"}, None, 203, 2),
    "name": ({"--name": "../other"}, None, 203, 2),
    "past": ({"--expires": "2020-01-01"}, None, 203, 2),
    "no date": ({"--expires": "tomorrow"}, None, 203, 2),
    "no task": ({"--task": "lung-cancer"}, None, 203, 2),
    "task with a seed": ({}, _task("sampling_rate", "seed = 1\nsampling_rate"), 202, 2),
    "task with a loss over the batch": ({}, _task("classes = 2", 'classes = 2\nloss = "cox"'), 160, 3),
    "task misspelled": ({}, _task("spare_attempts", "spare_atempts"), 202, 2),
    "task out of range": ({}, _task("sampling_rate = 1.0", "sampling_rate = 1.5"), 203, 2),
    "no roster": ({}, lambda f: (f.office / "roster.json").unlink(), 606, 6),
    "tampered roster": ({}, lambda f: edit(f.office / "roster.json", '"west"', '"east"'), 110, 4),
    "two hospitals": ({}, _two_hospitals, 140, 3),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_study_new_of_bad_input_writes_no_study(federation, name):
    options, spoil, code, status = BAD_PLANS[name]
    shutil.rmtree(federation.study.parent)
    if spoil is not None:
        spoil(federation)
    argv = new_arguments(federation)
    for given, value in options.items():
        argv = option(argv, given, value)
    check_refusal(federation, main, argv, code, status)


def _changed_model(federation):
    path = federation.study.parent / "first_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def _changed_roster(federation):
    path = federation.study.parent / "roster.json"
    roster = load_roster(FILES, path)
    path.write_bytes(roster.model_copy(update={"hospitals": list(reversed(roster.hospitals))}).to_bytes())


def _directory_for_study(federation):
    federation.study.unlink()
    federation.study.mkdir()


BAD_STUDIES = {
    "missing": (lambda f: f.study.unlink(), 606, 6),
    "directory": (_directory_for_study, 100, 2),
    "empty": (lambda f: f.study.write_text(""), 203, 2),
    "misspelled": (lambda f: edit(f.study, "epsilon =", "epsilom ="), 202, 2),
    "seed": (lambda f: edit(f.study, "delta =", "seed = 3\ndelta ="), 133, 3),
    "false claim": (lambda f: edit(f.study, "epsilon = 2.0", "epsilon = 1.0"), 135, 3),
    "narrow ring": (lambda f: change_study(f, "quantization", ring_bits=16, range=1000.0), 145, 3),
    "much noise for the ring": (lambda f: change_study(f, "privacy", noise_multiplier=9000.0), 145, 3),
    "other model": (_changed_model, 124, 3),
    "other roster": (_changed_roster, 124, 3),
}


@pytest.mark.parametrize("name", BAD_STUDIES)
def test_study_check_of_a_bad_study_says_one_line(federation, name):
    spoil, code, status = BAD_STUDIES[name]
    spoil(federation)
    check_refusal(federation, main, ["study", "check", federation.study], code, status)


BAD_STARTS = {
    **{name: BAD_STUDIES[name] for name in ("missing", "seed", "false claim", "narrow ring", "other model")},
    "other roster": BAD_STUDIES["other roster"],
    "expired": (lambda f: change_study(f, "study", expires="2020-01-31"), 120, 3),
    "no roster": (lambda f: (f.study.parent / "roster.json").unlink(), 606, 6),
    "identity 0644": (lambda f: (f.office / "identity.key").chmod(0o644), 210, 6),
    "identity empty": (lambda f: (f.office / "identity.key").write_bytes(b""), 211, 6),
    "other coordinator": (
        lambda f: shutil.copy(f.folder / "west" / "identity.key", f.office / "identity.key"),
        *(144, 3),
    ),
    "no configuration": (lambda f: (f.office / "server.toml").unlink(), 606, 6),
    "unknown setting": (lambda f: edit(f.office / "server.toml", "admin_port", "admin_prot"), 202, 2),
    "port as text": (lambda f: edit(f.office / "server.toml", "port = 8443", 'port = "8443"'), 203, 2),
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_run_of_bad_input_opens_no_port_and_leaves_everything_as_it_was(federation, name):
    spoil, code, status = BAD_STARTS[name]
    spoil(federation)
    check_refusal(federation, main, ["run", federation.office / "server.toml"], code, status)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda tls: (tls / "server.key").chmod(0o644), 210),
        (lambda tls: (tls / "server.crt").write_text("no certificate"), 211),
        (lambda tls: shutil.copy(tls / "ca.crt", tls / "server.crt"), 211),
        (lambda tls: (tls / "server.crt").unlink(), 606),
    ],
)
def test_run_with_bad_tls_files_opens_no_port(federation, spoil, code):
    spoil(federation.office / "tls")
    outcome = call(main, ["run", federation.office / "server.toml"])
    assert outcome.status == ExitStatus.ENVIRONMENT
    assert outcome.err.startswith(f"MF-{code} ") and outcome.err.count("\n") == 1, outcome.err


@pytest.mark.parametrize(
    ("argv", "code", "status"),
    [
        (["status"], 606, 6),
        (["study"], 100, 2),
        (["study", "news"], 100, 2),
        (["study", "show-task", "../setup"], 203, 2),
        (["run", "--seed", "1"], 701, 3),
        (["run", "--insecure"], 701, 3),
        (["study", "new", "--no-dp"], 701, 3),
        (["study", "new", "--epsilon=none"], 701, 3),
    ],
)
def test_command_line_of_bad_arguments_says_one_line(federation, monkeypatch, argv, code, status):
    monkeypatch.chdir(federation.office)
    check_refusal(federation, main, argv, code, status)


# ------------------------------------------------------------------------------------------------------ half-written


class FullDisk:
    """The real disk, until the write of one name."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        return getattr(FILES, attribute)

    def write(self, path, data, *, private=False):
        from medfed.errors import EnvironmentFault

        if path.name == self.name and data != self.kept:
            raise EnvironmentFault(603, "the disk is full", "free some space")
        FILES.write(path, data, private=private)

    kept = b""


@pytest.mark.parametrize("fails_at", ["first_model.safetensors", "roster.json", "study.toml"])
@pytest.mark.parametrize("replaces", [False, True])
def test_write_study_on_a_disk_that_fills_up_leaves_what_was_there(federation, tmp_path, fails_at, replaces):
    from medfed.errors import EnvironmentFault
    from medfed.server.study_folder import StudySet, write_study

    study = load_study(FILES, federation.study)
    other = study.model_copy(update={"study": study.study.model_copy(update={"name": "Other"})})
    roster = load_roster(FILES, federation.study.parent / "roster.json")
    disk = FullDisk(fails_at)
    folder = federation.study.parent if replaces else tmp_path / "study"
    if replaces:
        disk.kept = (folder / fails_at).read_bytes()
        roster = roster.model_copy(update={"hospitals": list(reversed(roster.hospitals))})
    before = federation.listing()
    with pytest.raises(EnvironmentFault):
        write_study(disk, folder, StudySet(other, roster, b"another model"), replace=replaces)
    assert federation.listing() == before
    assert replaces or list(folder.iterdir()) == []
