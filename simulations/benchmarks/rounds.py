"""What a round costs beyond training: over TLS between processes, and over the in-process grid as the baseline.

``python -m medfed.simulations.benchmarks rounds --hospitals 4 --rounds 20 --repeats 3 --json``

The two alternate in one run. ``overhead_s``: wall time of a round at the coordinator minus the slowest hospital's training.
The first round of a federation (first connections) is given apart.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medfed.seams import Seams, system_seams
from medfed.server.daemon import load_assignment, run_folder
from medfed.server.setup import CONFIG_NAME, load_office
from medfed.server.store import Checkpoint, Store
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.federation import free_ports, running, wait_for_coordinator
from medfed.simulations.rehearsal import Ports, Rehearsal, lay_out, rehearse, slowest_training


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of each round, and of its slowest training."""

    rounds: tuple[float, ...]
    training: tuple[float, ...]

    @property
    def overheads(self) -> list[float]:
        return [wall - train for wall, train in zip(self.rounds, self.training, strict=True)]


def _sample(checkpoint: Checkpoint, training: Mapping[int, float]) -> Sample:
    """``training``: seconds by attempt."""
    records = checkpoint.records
    return Sample(tuple(record.seconds for record in records), tuple(training[record.attempt] for record in records))


def measure_processes(folder: Path, hospitals: int, plan: Rehearsal, seams: Seams) -> Sample:
    """One federation of real processes over TLS."""
    cohort = load_cohort(seams.files, "breast-cancer", 1, hospitals)
    sites = lay_out(folder, cohort, plan, seams, ports=Ports(*free_ports(2)))
    with running(folder, [hospital.name for hospital in cohort.hospitals]) as processes:
        wait_for_coordinator(processes, seams, folder)
    office = load_office(seams, folder / "coordinator" / CONFIG_NAME)
    assignment = load_assignment(office)
    checkpoint = Store(
        seams.files, run_folder(office, assignment), assignment.study, assignment.plan.words
    ).load_checkpoint()
    if checkpoint is None:
        raise RuntimeError("the coordinator left no checkpoint")
    return _sample(checkpoint, slowest_training(sites, assignment.study))


def measure_in_process(folder: Path, hospitals: int, plan: Rehearsal, seams: Seams) -> Sample:
    """The same federation over the in-process grid."""
    rehearsed = rehearse(folder, load_cohort(seams.files, "breast-cancer", 1, hospitals), plan, seams)
    return _sample(rehearsed.checkpoint, rehearsed.train_seconds)


def _summary(samples: list[Sample]) -> dict[str, float]:
    later = [value for sample in samples for value in sample.overheads[1:]]
    return {
        "first_round_overhead_s": round(statistics.median(sample.overheads[0] for sample in samples), 4),
        "overhead_s": round(statistics.median(later), 4),
        "overhead_p90_s": round(statistics.quantiles(later, n=10)[-1], 4),
        "training_s": round(statistics.median(t for sample in samples for t in sample.training[1:]), 4),
        "rounds_measured": len(later),
    }


def run(hospitals: int, rounds: int, repeats: int) -> dict[str, object]:
    """All figures as a JSON object."""
    seams, plan = system_seams(), Rehearsal(epsilon=1.0, mode="local", rounds=rounds)
    samples: dict[str, list[Sample]] = {"processes_tls": [], "in_process": []}
    for _ in range(repeats):
        for name, measure in (("processes_tls", measure_processes), ("in_process", measure_in_process)):
            with tempfile.TemporaryDirectory() as folder:
                samples[name].append(measure(Path(folder), hospitals, plan, seams))
    return {
        "hospitals": hospitals,
        "rounds": rounds,
        "repeats": repeats,
        **{name: _summary(taken) for name, taken in samples.items()},
    }
