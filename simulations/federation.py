"""One coordinator process and its hospitals' processes over TLS on this machine, as people would run them on many.

The folders are laid out by the code of ``init``, ``enroll``, ``study new`` and ``approve``; then ``medfed-server run`` and
one ``medfed-client run`` a hospital are started as processes of their own. The result has the keys of every run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from medfed.command import say, say_json
from medfed.errors import EnvironmentFault, ExitStatus
from medfed.seams import Seams, system_seams
from medfed.server.daemon import load_assignment, read_status, run_folder
from medfed.server.results import RECORD_NAMES
from medfed.server.setup import CONFIG_NAME as SERVER_CONFIG_NAME
from medfed.server.setup import load_office
from medfed.server.store import Store
from medfed.simulations.cohorts import Cohort, load_cohort
from medfed.simulations.rehearsal import Ports, Rehearsal, lay_out, slowest_training
from medfed.simulations.run_folder import RESULT_NAME, new_run_folder
from medfed.wording import named

log = logging.getLogger("medfed.simulations")

GIVE_UP_S = 600.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def command(name: str, *arguments: str) -> list[str]:
    """One of medfed's commands as a process of this installation."""
    room = {"medfed-server": "server", "medfed-client": "client"}[name]
    return [sys.executable, "-P", "-m", f"medfed.{room}.cli", *arguments]


HospitalCommand = Callable[[Path], list[str]]  # what runs the hospital of a configuration file


def real_hospital(config: Path) -> list[str]:
    """The hospital as its people would start it."""
    return command("medfed-client", "run", "--config", str(config))


class Processes:
    """The coordinator and the hospitals as processes with a log file each; none outlives the block."""

    def __init__(self, folder: Path, hospitals: list[str], hospital_command: HospitalCommand) -> None:
        self._folder = folder
        self._hospital_command = hospital_command
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self.coordinator = self.start_coordinator()
        self.hospitals = {name: self.start_hospital(name) for name in hospitals}

    def start_coordinator(self) -> subprocess.Popen[bytes]:
        config = self._folder / "coordinator" / SERVER_CONFIG_NAME
        return self._start("coordinator", command("medfed-server", "run", str(config)))

    def start_hospital(self, name: str) -> subprocess.Popen[bytes]:
        config = self._folder / name / "hospital.toml"
        return self._start(name, self._hospital_command(config))

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self._logs / f"{name}.log").open("ab") as log_file:
            return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file)

    def last_line(self, name: str) -> str:
        """The last line of a process's log: an error is one line."""
        lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        everybody = [*self.hospitals.values(), self.coordinator]
        for process in everybody:
            if process.poll() is None:
                process.terminate()
        for process in everybody:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running(
    folder: Path, hospitals: list[str], hospital_command: HospitalCommand = real_hospital
) -> Iterator[Processes]:
    """Start everybody; stop everybody."""
    processes = Processes(folder, hospitals, hospital_command)
    try:
        yield processes
    finally:
        processes.close()


def wait_for_coordinator(processes: Processes, seams: Seams, folder: Path, *, give_up_s: float = GIVE_UP_S) -> None:
    """Until the coordinator ends by itself. Raises with its own last line if it fails or takes too long."""
    config = folder / "coordinator" / SERVER_CONFIG_NAME
    end = seams.clock.monotonic() + give_up_s
    told = ""
    while processes.coordinator.poll() is None:
        if seams.clock.monotonic() > end:
            raise EnvironmentFault(191, f"no result after {give_up_s:.0f} s", "see the logs folder of the run")
        told = _tell(config, seams, told)
        for name, process in processes.hospitals.items():
            if process.poll() not in (None, 0):
                raise EnvironmentFault(192, f"{name} ended: {processes.last_line(name)}", "see the logs folder")
        seams.clock.sleep(0.1)
    if processes.coordinator.returncode != 0:
        raise EnvironmentFault(192, f"coordinator: {processes.last_line('coordinator')}", "see the logs folder")


def _tell(config: Path, seams: Seams, told: str) -> str:
    """Say on the log what the coordinator's status says, when it changes."""
    if not seams.files.exists(config.parent / "status.json"):
        return told
    status = read_status(config, seams, exact=False)
    known, at_most = status["epsilon_spent"], status["epsilon_spent_at_most"]
    spent = f"at most {at_most:.3f}" if known is None else f"{known:.3f}"
    what = f"{status['what']} ({status['round']} of {status['rounds']}, epsilon spent {spent})"
    if what != told:
        log.info("%s", what)
    return what


def federate(folder: Path, cohort: Cohort, plan: Rehearsal, seams: Seams) -> dict[str, object]:
    """Lay out, run with real processes, score outside the federation; returns the result's keys."""
    from medfed.simulations.runs import federation_result

    public, admin = free_ports(2)
    sites = lay_out(folder, cohort, plan, seams, ports=Ports(public, admin))
    log.info("laid out %d hospitals and a coordinator; starting %d processes", len(sites), len(sites) + 1)
    started = seams.clock.monotonic()
    with running(folder, [hospital.name for hospital in cohort.hospitals]) as processes:
        wait_for_coordinator(processes, seams, folder)
        seconds = seams.clock.monotonic() - started
    office = load_office(seams, folder / "coordinator" / SERVER_CONFIG_NAME)
    assignment = load_assignment(office)
    run = run_folder(office, assignment)
    checkpoint = Store(seams.files, run, assignment.study, assignment.plan.words).load_checkpoint()
    if checkpoint is None:
        raise EnvironmentFault(606, "the coordinator left no checkpoint", "see the logs folder of the run")
    training = slowest_training(sites, assignment.study)
    return federation_result(cohort, assignment, checkpoint, training, seconds, run)


RESULTS = ("model.safetensors", "study.toml", "report.md", *RECORD_NAMES)


def run_federation(arguments: argparse.Namespace) -> int:
    """``medfed-simulate federation``: an earlier run's folder is replaced only once this one has worked."""
    seams = system_seams()
    out = Path(arguments.out)
    cohort = load_cohort(seams.files, arguments.cohort, seed=arguments.split_seed, hospitals=None)
    plan = Rehearsal(epsilon=arguments.epsilon, mode=arguments.mode)
    with new_run_folder(out, seams) as folder:
        try:
            result = federate(folder, cohort, plan, seams)
        except BaseException:
            _keep_logs(folder, out)
            raise
        (run,) = (each for each in (folder / "coordinator" / "runs").iterdir() if each.is_dir())
        for name in RESULTS:
            seams.files.write(folder / name, seams.files.read(run / name))
        seams.files.write(folder / RESULT_NAME, json.dumps(result, indent=1).encode())
    if arguments.json:
        say_json(result)
    else:
        _summary(result, out)
    return ExitStatus.HANDLED


def _keep_logs(folder: Path, out: Path) -> None:
    """The parties' logs of a run that failed, beside the place of its result."""
    if (folder / "logs").is_dir():
        kept = out.resolve().with_name(f"{out.name}-failed-logs")
        shutil.copytree(folder / "logs", kept, dirs_exist_ok=True)
        log.warning("the parties' logs are in %s", kept)


def _summary(result: dict[str, object], out: Path) -> None:
    say(
        f"{result['hospitals']} hospitals and a coordinator, each a process of its own, trained over TLS on this machine:\n"
        f"  {result['rounds']} rounds, {result['seconds_per_round']} s each, of which {result['overhead_s_per_round']} s "
        f"are not training\n"
        f"  test {named(str(result['metric']))} {result['test_metric']:.3f} "
        f"(everybody's data in one place, no privacy: {result['pooled_metric']:.3f})\n"
        f"  epsilon {result['epsilon']:.3f} for each {result['unit']}, delta {result['delta']}, mode {result['mode']}\n"
        f"  model, privacy statement and report, folders of every party and their logs: {out}\n"
        f"Next: .venv/bin/medfed-simulate evaluate {out}   or read {out}/report.md and {out}/logs"
    )
