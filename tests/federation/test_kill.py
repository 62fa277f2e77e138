"""Real processes by the real commands, killed with SIGKILL in the middle of a run; then started again."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medfed.client.ledger import Kind, Ledger
from medfed.client.setup import open_site
from medfed.seams import system_seams
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.federation import Processes, free_ports, running, wait_for_coordinator
from medfed.simulations.rehearsal import Ports, Rehearsal, lay_out

ROUNDS, SPARES = 8, 2
NAMES = ["hospital-1", "hospital-2", "hospital-3"]
GIVE_UP_S = 300.0  # a busy machine is slow, not broken


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", 1, len(NAMES))
    plan = Rehearsal(1.0, "local", rounds=ROUNDS, spare_attempts=SPARES)
    lay_out(tmp_path, cohort, plan, seams, ports=Ports(*free_ports(2)))
    return tmp_path


def status(folder: Path) -> dict:
    path = folder / "coordinator" / "status.json"
    return json.loads(path.read_bytes()) if path.exists() else {"round": 0}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def reserved(folder: Path, name: str) -> set[int]:
    """Attempts that a hospital's ledger has charged, read beside the running hospital."""
    seams = system_seams()
    site = open_site(seams, folder / name / "hospital.toml")
    view = Ledger.inspect(seams.files, site.ledger_path, site.identity())
    try:
        return {entry.attempt for entry in view.entries() if entry.kind is Kind.RESERVED}
    finally:
        view.close()


def check(folder: Path, charged_before: set[int]) -> None:
    seams = system_seams()
    final = status(folder)
    assert final["what"] == "done" and final["round"] == ROUNDS
    assert final["attempts_used"] <= ROUNDS + 1
    for name in NAMES:
        site = open_site(seams, folder / name / "hospital.toml")
        with Ledger.open(seams.files, site.ledger_path, site.identity()) as ledger:
            ledger.verify()
        assert len(reserved(folder, name)) >= ROUNDS
    assert charged_before <= reserved(folder, NAMES[0])


def finish(processes: Processes, folder: Path) -> None:
    wait_for_coordinator(processes, system_seams(), folder, give_up_s=GIVE_UP_S)
    until(lambda: all(list((folder / name / "studies").glob("*/model.safetensors")) for name in NAMES))


def test_hospital_killed_in_the_middle_is_started_again_and_the_run_goes_on(folder: Path) -> None:
    with running(folder, NAMES) as processes:
        until(lambda: status(folder)["round"] >= 2)
        victim = processes.hospitals["hospital-1"]
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        charged = reserved(folder, "hospital-1")
        assert charged
        processes.hospitals["hospital-1"] = processes.start_hospital("hospital-1")
        finish(processes, folder)
    check(folder, charged)


def test_coordinator_killed_in_the_middle_is_started_again_and_the_run_goes_on(folder: Path) -> None:
    with running(folder, NAMES) as processes:
        until(lambda: status(folder)["round"] >= 2)
        processes.coordinator.send_signal(signal.SIGKILL)
        processes.coordinator.wait()
        charged = reserved(folder, "hospital-1")
        processes.coordinator = processes.start_coordinator()
        finish(processes, folder)
        codes = {name: process.poll() for name, process in processes.hospitals.items()}
        assert set(codes.values()) == {None}, "hospitals stay up"
    check(folder, charged)
    assert status(folder)["attempts_used"] == ROUNDS, "a coordinator's crash costs no attempt"
    assert {process.returncode for process in processes.hospitals.values()} == {0}, "SIGTERM ends a hospital cleanly"


def test_hospital_killed_for_good_is_dropped_and_the_run_ends_with_the_others(tmp_path: Path) -> None:
    """Five hospitals, of which any four make a sum (c = 1, m = 4): nobody waits for the dead one, and nothing is spent twice."""
    seams, names = system_seams(), [f"hospital-{number}" for number in range(1, 6)]
    cohort = load_cohort(seams.files, "breast-cancer", 1, len(names))
    rounds = 5
    plan = Rehearsal(1.0, "distributed", drop_outs=1, rounds=rounds, spare_attempts=SPARES)
    lay_out(tmp_path, cohort, plan, seams, ports=Ports(*free_ports(2)))
    with running(tmp_path, names) as processes:
        until(lambda: status(tmp_path)["round"] >= 2)
        victim = processes.hospitals.pop("hospital-2")
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        wait_for_coordinator(processes, seams, tmp_path, give_up_s=GIVE_UP_S)
    final = status(tmp_path)
    assert final["what"] == "done" and final["round"] == rounds
    (run,) = (place for place in (tmp_path / "coordinator" / "runs").iterdir() if place.is_dir())
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_bytes().splitlines()]
    survivors = [line["survivors"] for line in lines if line["kind"] == "completed"]
    assert survivors[0] == [0, 1, 2, 3, 4]
    assert survivors[-1] == [0, 2, 3, 4]
    signed = json.loads((run / "privacy.json").read_bytes())["hospitals"]
    assert [each["hospital"] for each in signed] == [names[position] for position in (0, 2, 3, 4)]
    for name in ("hospital-1", "hospital-3", "hospital-4", "hospital-5"):
        assert list((tmp_path / name / "studies").glob("*/model.safetensors"))
        assert len(reserved(tmp_path, name)) == final["attempts_used"]
