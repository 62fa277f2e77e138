"""What the federation costs beside training: coordinator and hospitals as processes over TLS on this machine.

Everything is production's but the training: hospitals send an update of zeros, without noise (``benchmarks/hospital.py``).
Seconds per round are from one checkpoint of the coordinator to the next. Memory is what was held at most from start to end,
beyond what was held at most with a small model: ``growth_mb``. Coordinator means its two processes together.
A federation of two hospitals does not exist: a sum over fewer than three parties hides nobody, so the least is three.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medfed.model_choice import LogisticRegression, Mlp, ModelChoice
from medfed.seams import Seams
from medfed.server.daemon import load_assignment
from medfed.server.planning import TaskFile, load_task
from medfed.server.setup import CONFIG_NAME, load_office
from medfed.simulations.cohorts import Cohort, load_cohort
from medfed.simulations.federation import Processes, free_ports, running, wait_for_coordinator
from medfed.simulations.rehearsal import Ports, Rehearsal, lay_out
from medfed.study import LocalSteps, Momentum, Training

SMALL: ModelChoice = LogisticRegression(name="logistic-regression", hidden=[])
BIG: ModelChoice = Mlp(name="mlp", hidden=[2430, 4096])
"""10 million parameters over thirty features: 40 MB."""
MEGABYTE = 1e6
LOOK_EVERY_S = 0.02


@dataclass
class Peaks:
    """The most that was held so far, bytes of resident memory, and when checkpoints were written.

    ``memory``: by hospital, as the kernel kept it; "coordinator" is the sum of its processes, looked at every 20 ms.
    ``cpu``: by process, seconds of processor time at each checkpoint.
    """

    hospitals: list[str]
    memory: dict[str, int] = field(default_factory=dict)
    checkpoints_ns: list[int] = field(default_factory=list)
    cpu: list[dict[str, float]] = field(default_factory=list)

    def look(self, processes: Processes, folder: Path) -> None:
        """Once, at what runs now. A process that has ended keeps its last figure."""
        parent = processes.coordinator.pid
        pids = {"parent": parent, **{name: processes.hospitals[name].pid for name in self.hospitals}}
        for child in _children(parent)[:1]:
            pids["child"] = child
        for name in self.hospitals:
            self._note(name, _memory(pids[name], "VmHWM:"))
        self._note("coordinator", sum(_memory(pids[name], "VmRSS:") for name in ("parent", "child") if name in pids))
        for path in (folder / "coordinator" / "runs").glob("*/checkpoint.bin"):
            with contextlib.suppress(FileNotFoundError):
                written = path.stat().st_mtime_ns
                if written not in self.checkpoints_ns[-1:]:
                    self.checkpoints_ns.append(written)
                    self.cpu.append({name: _cpu_s(pid) for name, pid in pids.items()})

    def _note(self, name: str, taken: int) -> None:
        self.memory[name] = max(self.memory.get(name, 0), taken)


def _memory(pid: int, what: str) -> int:
    """A line of the process's status, in bytes; 0 once it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(what):
                return 1024 * int(line.split()[1])
    return 0


def _cpu_s(pid: int) -> float:
    """User and system time of a process, all threads; 0 once it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [
            int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
    return []


@contextlib.contextmanager
def _watching(peaks: Peaks, processes: Processes, folder: Path) -> Iterator[None]:
    """Look at memory and checkpoints in the background."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_EVERY_S):
            peaks.look(processes, folder)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def hospital_without_training(config: Path) -> list[str]:
    """The command of this package's hospital."""
    return [sys.executable, "-P", "-m", "medfed.simulations.benchmarks.hospital", str(config)]


def _task(task: TaskFile, model: ModelChoice, rounds: int) -> TaskFile:
    """The task with this model, plain averaging of updates and a fixed number of rounds."""
    local = LocalSteps(steps=1, learning_rate=1.0, proximal=0.0, sum_range=64.0)
    training = Training(
        aggregate="update",
        rounds=rounds,
        spare_attempts=2,
        learning_rates=[[1, 1.0]],
        average_last_rounds=1,
        server_step=Momentum(kind="momentum", momentum=0.0),
        local=local,
    )
    return task.model_copy(update={"model": model, "training": training})


@dataclass(frozen=True, slots=True)
class Measured:
    """One federation: parameters of its model, seconds between checkpoints, peak bytes of both sides."""

    parameters: int
    rounds_s: tuple[float, ...]
    coordinator: int
    hospital: int
    cpu_s: Mapping[str, float]


def measure(hospitals: int, model: ModelChoice, rounds: int, seams: Seams) -> Measured:
    """Lay out a federation, run it, look at it."""
    cohort: Cohort = load_cohort(seams.files, "breast-cancer", 1, hospitals)
    cohort = replace(cohort, task=_task(load_task(seams.files, "breast-cancer"), model, rounds))
    names = [hospital.name for hospital in cohort.hospitals]
    plan = Rehearsal(epsilon=8.0, mode="local", rounds=rounds)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lay_out(folder, cohort, plan, seams, ports=Ports(*free_ports(2)))
        words = load_assignment(load_office(seams, folder / "coordinator" / CONFIG_NAME)).plan.words
        peaks = Peaks(names)
        with running(folder, names, hospital_without_training) as processes, _watching(peaks, processes, folder):
            wait_for_coordinator(processes, seams, folder)
    taken = [(b - a) / 1e9 for a, b in zip(peaks.checkpoints_ns, peaks.checkpoints_ns[1:], strict=False)]
    return Measured(
        parameters=words,
        rounds_s=tuple(taken),
        coordinator=peaks.memory["coordinator"],
        hospital=max(peaks.memory[name] for name in names),
        cpu_s=_cpu_per_round(peaks, names),
    )


def _cpu_per_round(peaks: Peaks, names: list[str]) -> dict[str, float]:
    """Processor seconds of a round from the second on, by part: the coordinator's two processes, a mean hospital."""
    first, last, rounds = peaks.cpu[0], peaks.cpu[-1], len(peaks.cpu) - 1
    spent = {name: (last[name] - first[name]) / rounds for name in first if name in last}
    return {
        "coordinator_link": spent["parent"],
        "coordinator_training": spent["child"],
        "hospital": statistics.fmean(spent[name] for name in names),
    }


def row(hospitals: int, rounds: int, repeats: int, seams: Seams) -> dict[str, object]:
    """Small and big model at one number of hospitals."""
    small = [measure(hospitals, SMALL, rounds, seams) for _ in range(repeats)]
    big = [measure(hospitals, BIG, rounds, seams) for _ in range(repeats)]
    small_s = statistics.median(second for one in small for second in one.rounds_s)
    big_s = statistics.median(second for one in big for second in one.rounds_s)
    model_bytes = 4 * big[0].parameters
    moved = 2 * hospitals * model_bytes  # the sum down to each, an upload up from each
    coordinator = max(one.coordinator for one in big) - min(one.coordinator for one in small)
    hospital = max(one.hospital for one in big) - min(one.hospital for one in small)
    return {
        "hospitals": hospitals,
        "small": {"parameters": small[0].parameters, "s_per_round": round(small_s, 3)},
        "big": {
            "parameters": big[0].parameters,
            "model_mb": round(model_bytes / MEGABYTE, 1),
            "s_per_round": round(big_s, 3),
            "s_per_round_most": round(max(second for one in big for second in one.rounds_s), 3),
            "mb_per_s": round(moved / MEGABYTE / big_s, 1),
            "coordinator_growth_mb": round(coordinator / MEGABYTE, 1),
            "coordinator_growth_in_models": round(coordinator / model_bytes, 2),
            "hospital_growth_mb": round(hospital / MEGABYTE, 1),
            "hospital_growth_in_models": round(hospital / model_bytes, 2),
            "cpu_s_per_round": {
                part: round(statistics.median(one.cpu_s[part] for one in big), 2) for part in big[0].cpu_s
            },
        },
        "rounds_measured": sum(len(one.rounds_s) for one in big),
    }


def run(hospitals: Sequence[int], rounds: int, repeats: int, seams: Seams) -> dict[str, object]:
    """All figures as a JSON object."""
    return {
        "rounds": rounds,
        "repeats": repeats,
        "federations": [row(count, rounds, repeats, seams) for count in hospitals],
    }
