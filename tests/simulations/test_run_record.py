"""The statement that travels with a model: two verifiers, one of which imports nothing of medfed, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from medfed.client import run_checks
from medfed.client.cli import main
from medfed.client.setup import open_site
from medfed.client.verify import Verification, verify
from medfed.identity import load_identity
from medfed.privacy.page import page
from medfed.privacy.statement import (
    PrivacyFile,
    SignedByHospital,
    Statement,
    hospital_statement,
    sign_for_hospital,
)
from medfed.roster import load_roster
from medfed.seams import SystemFiles, system_seams
from medfed.server.results import RECORD_NAMES, write_results
from medfed.simulations.entropy import SeededEntropy
from medfed.simulations.rehearsal import Rehearsal, rehearse
from medfed.witness import Head, signed_bytes

TESTS = Path(__file__).parent.parent
FILES = SystemFiles()
STATISTICS = "[statistics]\nnoise_multiplier = 6.0\nattempts = 2\nleast_scale = 0.01\n[training]"
METRICS = "[metrics]\nbins = 4\nattempts = 2\nnoise_multiplier = 3.0\n[deadlines]"
LOCAL = 'aggregate = "update"\nlocal = { steps = 3, learning_rate = 0.5, proximal = 0.0 }'
ONE_ROUND = (
    ("sampling_rate = 0.5", "sampling_rate = 1.0"),
    ("rounds = 3", "rounds = 1"),
    ("_last_rounds = 2", "_last_rounds = 1"),
)

_spec = importlib.util.spec_from_file_location("second_verifier", TESTS / "verifier.py")
assert _spec is not None and _spec.loader is not None
second = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(second)


@dataclass(frozen=True)
class Made:
    """A run's folder, and the folders of its parties, whose keys a test may use."""

    run: Path
    parties: Path


MakeRun = Callable[..., Made]


@pytest.fixture(scope="session")
def make_run(quick_folder: Path, tiny_cohort) -> MakeRun:
    """``make_run("distributed", ("old", "new"))``: the tiny task with these changes, rehearsed, as a coordinator leaves it."""
    made: dict[tuple[object, ...], Made] = {}

    def make(mode: str, *changes: tuple[str, str]) -> Made:
        key = (mode, *changes)
        if key not in made:
            text = (TESTS / "tiny_task.toml").read_text()
            for old, new in changes:
                assert old in text
                text = text.replace(old, new)
            place = quick_folder / f"record-{len(made)}"
            place.mkdir()
            (place / "task.toml").write_text(text)
            cohort = replace(tiny_cohort, task=str(place / "task.toml"))
            # who is held out of a hospital of four is drawn: not all of them, with these draws
            seams = replace(system_seams(), entropy=SeededEntropy(1, place.name))
            done = rehearse(place / "parties", cohort, Rehearsal(epsilon=8.0, mode=mode), seams)
            write_results(FILES, place / "run", done.assignment, done.checkpoint, done.record)
            made[key] = Made(place / "run", place / "parties")
        return made[key]

    return make


@pytest.fixture(scope="session")
def made(make_run: MakeRun) -> Made:
    """Not to be changed."""
    return make_run("local")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.run, tmp_path / "run")


def failed(found: Verification) -> set[str]:
    """The checks that fail, but for the page: that one would notice every change of privacy.json."""
    return {check["check"] for check in found["checks"] if not check["holds"]} - {"page"}


def both_refuse(folder: Path) -> None:
    assert failed(verify(FILES, folder, None))
    assert second.faults(folder)


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return 1.5
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return ("0" if value[:1] != "0" else "1") + value[1:]
    return [*value, "simulation"] if isinstance(value, list) else {**value, "medfed": "9.9"}


# ------------------------------------------------------------------------------------------------------------- accepted


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("local", ()),
        ("distributed", (("[training]", STATISTICS), ("[deadlines]", METRICS))),
        ("local", (('aggregate = "gradient"', LOCAL), ("[deadlines]", METRICS))),
        ("local", ONE_ROUND),
    ],
    ids=["local", "statistics and metrics", "local steps", "one round of all"],
)
def test_run_is_accepted_by_both_verifiers(make_run: MakeRun, mode: str, changes: tuple[tuple[str, str], ...]) -> None:
    run = make_run(mode, *changes).run
    found = verify(FILES, run, None)
    assert [check for check in found["checks"] if not check["holds"]] == []
    assert found["verified"]
    assert second.faults(run) == []
    assert found["stamps"] == ["simulation"]
    assert found["signed_by"] == ["Ahaus", "Bonn", "Celle", "Daun"]


def test_run_leaves_everything_that_proves_it(made: Made) -> None:
    assert {path.name for path in made.run.iterdir()} == {
        *RECORD_NAMES,
        "model.safetensors",
        "study.toml",
        "report.md",
        "result.json",
    }


def test_page_tells_a_data_protection_officer_what_counts(made: Made) -> None:
    text, file = (made.run / "privacy.md").read_text(), json.loads((made.run / "privacy.json").read_bytes())
    assert "no hospital signed it" in text
    assert file["model_sha256"] in text
    assert all(entry.fingerprint in text for entry in load_roster(FILES, made.run / "roster.json").hospitals)
    for words in ("Anonymity", "Patients of two hospitals", "one patient: all records", "sampling", "noise multiplier"):
        assert words in text


def test_second_verifier_imports_nothing_of_medfed() -> None:
    text = (TESTS / "verifier.py").read_text()
    assert len(text.splitlines()) <= 300
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {
        "__future__",
        "collections",
        "cryptography",
        "functools",
        "hashlib",
        "json",
        "math",
        "numpy",
        "pathlib",
        "sys",
        "tomllib",
        "typing",
    }


# -------------------------------------------------------------------------------------------------------------- refused

_FIELDS = [*Statement.model_fields, "coordinator_signature"]
_OF_HOSPITAL = list(SignedByHospital.model_fields)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "privacy.json"
    file = json.loads(path.read_bytes())
    before = json.dumps(file)
    change(file)
    assert json.dumps(file) != before
    path.write_text(json.dumps(file, indent=1) + "\n")


@pytest.mark.parametrize("field", _FIELDS)
def test_changed_field_of_the_statement_is_refused_by_both(copy: Path, field: str) -> None:
    rewrite(copy, lambda file: file.update({field: changed(file[field])}))
    both_refuse(copy)


@pytest.mark.parametrize("field", _OF_HOSPITAL)
def test_changed_field_of_a_hospitals_statement_is_refused_by_both(copy: Path, field: str) -> None:
    rewrite(copy, lambda file: file["hospitals"][2].update({field: changed(file["hospitals"][2][field])}))
    both_refuse(copy)


def _lower_attempts(file: dict[str, Any]) -> None:
    file["attempts_used"] -= 1
    for mine in file["hospitals"]:
        mine["attempts_charged"] -= 1


def _swap_signatures(file: dict[str, Any]) -> None:
    one, other = file["hospitals"][0], file["hospitals"][1]
    one["signature"], other["signature"] = other["signature"], one["signature"]


_STATEMENTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "attempts lowered everywhere": _lower_attempts,
    "signature of another hospital": _swap_signatures,
    "whole statement of another hospital": lambda file: file["hospitals"].__setitem__(0, file["hospitals"][1]),
    "hospitals in another order": lambda file: file["hospitals"].reverse(),
    "a hospital left out": lambda file: file["hospitals"].pop(),
    "a hospital twice": lambda file: file["hospitals"].append(file["hospitals"][0]),
    "a field more": lambda file: file.update(epsilon_true=0.1),
    "a field less": lambda file: file.pop("not_claimed"),
    "a field more of a hospital": lambda file: file["hospitals"][0].update(comment="fine"),
    "nobody signed": lambda file: file.update(hospitals=[]),
    "not a number": lambda file: file.update(epsilon=float("nan")),
}


@pytest.mark.parametrize("name", _STATEMENTS)
def test_tampered_statement_is_refused_by_both(copy: Path, name: str) -> None:
    rewrite(copy, _STATEMENTS[name])
    both_refuse(copy)


def _edited(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        before = (folder / name).read_bytes()
        after = change(before)
        assert after != before
        (folder / name).write_bytes(after)

    return edit


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _without_line(number: int) -> Callable[[bytes], bytes]:
    def drop(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        del lines[number]
        return b"".join(lines)

    return drop


_FOLDERS: dict[str, Callable[[Path], None]] = {
    "last bit of the model": _edited("model.safetensors", lambda data: _flipped(data, len(data) - 1)),
    "header of the model": _edited("model.safetensors", lambda data: _flipped(data, 9)),
    "a byte more in the model": _edited("model.safetensors", lambda data: data + b"\0"),
    "no model": lambda folder: (folder / "model.safetensors").unlink(),
    "an attempt dropped from the journal": _edited("journal.jsonl", _without_line(2)),
    "the journal's end dropped": _edited("journal.jsonl", _without_line(-1)),
    "the journal's begin dropped": _edited("journal.jsonl", _without_line(0)),
    "an attempt called lost": _edited("journal.jsonl", lambda data: data.replace(b"completed", b"lost", 1)),
    "other upload in the journal": _edited("journal.jsonl", lambda data: data.replace(b'_bytes":', b'_bytes":1', 1)),
    "a blank in the journal": _edited("journal.jsonl", lambda data: data.replace(b":", b": ", 1)),
    "journal without its last newline": _edited("journal.jsonl", lambda data: data[:-1]),
    "empty journal": _edited("journal.jsonl", lambda data: b""),
    "no journal": lambda folder: (folder / "journal.jsonl").unlink(),
    "another epsilon in study.toml": _edited("study.toml", lambda data: data.replace(b"epsilon = ", b"epsilon = 0", 1)),
    "another rate in study.json": _edited("study.json", lambda data: data.replace(b'rate":0.5', b'rate":0.25')),
    "a blank in study.json": _edited("study.json", lambda data: data.replace(b":", b": ", 1)),
    "another patient number in the roster": _edited(
        "roster.json", lambda data: data.replace(b'patients": ', b'patients": 1', 1)
    ),
    "another key in the roster": _edited(
        "roster.json", lambda data: data.replace(b'identity": "', b'identity": "00', 1)
    ),
    "roster is a list": _edited("roster.json", lambda data: b"[]"),
    "another survivor in the journal": _edited("journal.jsonl", lambda data: data.replace(b"[0,1,2,3]", b"[0,1,3]", 1)),
    "no study.toml": lambda folder: (folder / "study.toml").unlink(),
    "epsilon twice": _edited("privacy.json", lambda data: data.replace(b"{", b'{\n "epsilon": 0.01,', 1)),
    "charges twice": _edited(
        "privacy.json", lambda data: data.replace(b'"attempts_charged"', b'"attempts_charged": 1, "attempts_charged"')
    ),
    "a blank in the statement": _edited("privacy.json", lambda data: data.replace(b": ", b":  ", 1)),
    "coordinator twice": _edited(
        "roster.json", lambda data: data.replace(b"{", b'{\n "coordinator": "%s",' % (b"00" * 32), 1)
    ),
    "a hospital's name twice": _edited(
        "roster.json", lambda data: data.replace(b'"hospital":', b'"hospital": "St Mary", "hospital":')
    ),
    "statement is a list": _edited("privacy.json", lambda data: b"[]"),
    "statement is no JSON": _edited("privacy.json", lambda data: data[:-5]),
}


@pytest.mark.parametrize("name", _FOLDERS)
def test_tampered_folder_is_refused_by_both(copy: Path, name: str) -> None:
    _FOLDERS[name](copy)
    both_refuse(copy)


def test_page_that_says_something_else_is_refused(copy: Path) -> None:
    _edited("privacy.md", lambda data: data + b"Epsilon is really 0.1.\n")(copy)
    found = verify(FILES, copy, None)
    assert [check["check"] for check in found["checks"] if not check["holds"]] == ["page"]


def test_page_of_another_medfed_is_not_said_to_hold(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its wording may be another: nothing is known of it, and that is said."""
    (copy / "privacy.md").write_text("# Epsilon is 0.0001, signed by all\n")
    assert failed(verify(FILES, copy, None)) == set()
    monkeypatch.setattr(run_checks, "__version__", "99.0")
    found = verify(FILES, copy, None)
    assert found["verified"]
    assert [check["holds"] for check in found["checks"] if check["check"] == "page"] == [None]
    assert "privacy.md" not in found["covers"]
    assert main(["verify", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "NOT CHECKED  page" in said
    assert f"{len(found['checks']) - 1} of {len(found['checks'])} checks hold" in said


def test_what_nobody_signed_is_named(made: Made, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``report.md`` and ``result.json`` may say anything."""
    (copy / "result.json").write_text('{"epsilon": 0.01}')
    assert verify(FILES, copy, None)["covers"] == [
        "privacy.json",
        "study.json",
        "roster.json",
        "model.safetensors",
        "privacy.md",
        "study.toml",
        "journal.jsonl",
    ]
    assert main(["verify", str(copy)]) == 0
    assert "report.md or result.json, nobody signed" in capsys.readouterr().out
    assert "signed by nobody" in (made.run / "report.md").read_text()


def test_stamps_are_the_coordinators_word(made: Made, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resign(made, copy, lambda said: {"stamps": ["certified by the ministry"]})
    (copy / "privacy.md").write_text(page(read(copy), load_roster(FILES, copy / "roster.json")))
    assert main(["verify", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "stamped certified by the ministry, by the coordinator's word" in said
    assert "[certified by the ministry] (the coordinator's word)" in said
    assert "**certified by the ministry** (the coordinator's word)" in (copy / "privacy.md").read_text()


def read(folder: Path) -> PrivacyFile:
    return PrivacyFile.model_validate_json((folder / "privacy.json").read_bytes())


def resign(made: Made, folder: Path, change: Callable[[Statement], dict[str, object]]) -> None:
    """A lie that everybody signs, coordinator and all hospitals: only working it out anew can tell."""
    path = folder / "privacy.json"
    file = PrivacyFile.model_validate_json(path.read_bytes())
    said = file.statement.model_copy(update=change(file.statement))
    roster = load_roster(FILES, folder / "roster.json")
    signed = []
    for mine in file.hospitals:
        identity = load_identity(FILES, made.parties / mine.hospital / "identity.key")
        charged = (mine.attempts_charged, mine.epsilon_spent_micro)
        signed.append(sign_for_hospital(hospital_statement(said, roster, mine.position, charged, mine.head), identity))
    coordinator = load_identity(FILES, made.parties / "coordinator" / "identity.key")
    values = said.model_dump() | {"coordinator_signature": said.sign(coordinator).hex(), "hospitals": signed}
    path.write_bytes(PrivacyFile(**values).to_bytes())


def test_statement_signed_anew_is_accepted(made: Made, copy: Path) -> None:
    """The control: what ``resign`` makes of the truth is the truth."""
    resign(made, copy, lambda said: {})
    assert failed(verify(FILES, copy, None)) == set()
    assert second.faults(copy) == []


_LIES: dict[str, Callable[[Statement], dict[str, object]]] = {
    "epsilon": lambda said: {"epsilon": said.epsilon * 0.99},
    "epsilon by RDP": lambda said: {"epsilon_rdp": said.epsilon_rdp * 0.99999},
    "all epsilons above RDP": lambda said: {
        "epsilon_rdp": 60.0,
        "epsilon_pld": 50.0,
        "epsilon": 50.0,
        "accountant": "pld",
    },
    "epsilon of own noise": lambda said: {"epsilon_own_noise_alone": 100.0},
    "epsilon spent": lambda said: {"epsilon_spent": said.epsilon * 1.01},
    "accountant": lambda said: {"accountant": "rdp" if said.accountant == "pld" else "pld"},
    "delta": lambda said: {"delta": said.delta / 10},
    "noise": lambda said: {"noise_multiplier": said.noise_multiplier * 2},
    "clipping": lambda said: {"clipping_norm": said.clipping_norm / 2},
    "sampling": lambda said: {"sampling_rate": said.sampling_rate / 2},
    "unit": lambda said: {"unit": "record"},
    "mode": lambda said: {"mode": "distributed"},
    "colluders": lambda said: {"colluders": said.colluders + 1},
    "fewest survivors": lambda said: {"fewest_survivors": said.fewest_survivors - 1},
    "cohort": lambda said: {"cohort": said.cohort + 1},
    "excess noise": lambda said: {"excess_noise": said.excess_noise + 1},
    "attempts approved": lambda said: {"attempts_approved": said.attempts_approved + 1},
    "attempts used": lambda said: {"attempts_used": said.attempts_used + 1},
    "rounds": lambda said: {"released_sums": said.released_sums - 1},
    "parameters": lambda said: {"parameters": said.parameters + 1},
    "model": lambda said: {"model_sha256": "0" * 64},
    "state": lambda said: {"state_sha256": "0" * 64},
    "journal": lambda said: {"journal_sha256": "0" * 64},
    "roster": lambda said: {"roster_sha256": "0" * 64},
    "study": lambda said: {"study": "another"},
    "no privacy": lambda said: {"stamps": ["NOT PRIVATE: no noise"]},
}


@pytest.mark.parametrize("name", _LIES)
def test_lie_that_everybody_signed_is_refused_by_both(made: Made, copy: Path, name: str) -> None:
    resign(made, copy, _LIES[name])
    both_refuse(copy)


@pytest.mark.parametrize(
    "lie",
    [
        {"epsilon_pld": 0.1, "epsilon": 0.1, "accountant": "pld", "epsilon_spent": 0.01},
        {"epsilon_spent": 0.01},
        {"epsilon_own_noise_alone": 0.1},
        {"wrap_probability": 0.5},
        {"holds_against": "everyone"},
        {"not_claimed": "nothing"},
        {"mechanism": "magic"},
    ],
    ids=lambda lie: next(iter(lie)),
)
def test_lie_that_needs_medfed_to_be_told_is_refused(made: Made, copy: Path, lie: dict[str, object]) -> None:
    """What the second verifier does not work out: figures below the RDP bound, and words."""
    resign(made, copy, lambda said: lie)
    assert "figures" in failed(verify(FILES, copy, None))


# -------------------------------------------------------------------------------------------------- at a hospital's side


def own_copy(made: Made, hospital: str) -> Path:
    (folder,) = (made.parties / hospital / "studies").iterdir()
    return folder


def test_hospital_verifies_the_run_against_its_own_ledger(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(made.parties / "Celle" / "hospital.toml")
    assert main(["verify", str(made.run), "--config", config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [check["check"] for check in found["checks"]][-1] == "own ledger"
    assert found["verified"]


def test_hospitals_own_copy_is_verified_beside_its_ledger_only(made: Made) -> None:
    """Of the signatures it holds its own: whoever is somebody else needs all."""
    folder, config = str(own_copy(made, "Celle")), made.parties / "Celle" / "hospital.toml"
    assert main(["verify", folder, "--config", str(config)]) == 0
    assert main(["verify", folder, "--config", str(made.parties / "Bonn" / "hospital.toml")]) == 4
    assert failed(verify(FILES, Path(folder), None)) == {"study", "signatures", "journal"}


def test_hospital_of_another_run_checks_what_anybody_can(made: Made, make_run: MakeRun) -> None:
    """Of the same name, with another key: it is none of the run's, and its ledger has nothing to say."""
    other = make_run("local", *ONE_ROUND).parties / "Celle" / "hospital.toml"
    assert main(["verify", str(made.run), "--config", str(other)]) == 0


def test_ledger_without_the_row_stated_is_noticed(made: Made, copy: Path) -> None:
    """A head of the hospital's own making, so that signatures hold, and a ledger that never had such a row."""
    identity = load_identity(FILES, made.parties / "Celle" / "identity.key")
    digest = bytes(32)
    head = Head(999, digest, identity.sign(signed_bytes(999, digest)))
    path = copy / "privacy.json"
    file = PrivacyFile.model_validate_json(path.read_bytes())
    mine = file.hospitals[2]
    charged = (mine.attempts_charged, mine.epsilon_spent_micro)
    lie = hospital_statement(file.statement, load_roster(FILES, copy / "roster.json"), 2, charged, head)
    hospitals = [*file.hospitals[:2], sign_for_hospital(lie, identity), *file.hospitals[3:]]
    path.write_bytes(file.model_copy(update={"hospitals": hospitals}).to_bytes())
    assert failed(verify(FILES, copy, None)) == set()
    site = open_site(system_seams(), made.parties / "Celle" / "hospital.toml")
    assert failed(verify(FILES, copy, site)) == {"own ledger"}


def test_verify_says_what_fails_and_how_it_ends(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    said = capsys.readouterr()
    assert "FAILS" not in said.out
    assert "[simulation]" in said.out
    rewrite(copy, lambda file: file.update(epsilon=0.1))
    assert main(["verify", str(copy)]) == 4
    said = capsys.readouterr()
    assert "FAILS  figures" in said.out
    assert said.err.startswith("MF-194 ")
    assert main(["verify", str(copy), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["verified"] is False
    assert main(["verify", str(copy / "nothing")]) == 2
