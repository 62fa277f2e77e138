"""A whole simulation at full size: 100 hospitals, a million parameters, 100 rounds, in one process.

``python -m medfed.simulations.benchmarks load --json``; ``--folder`` is on the disk that ledgers, states and uploads go to.

All is production's but the gradient: ServerApp and ClientApps, masks with recovery from drop-outs on and nobody dropped,
signatures, states advanced and hashed by both sides, ledgers, states and uploads synced to disk. A hospital's clipped sum
is a constant; it is saturated and rounded, and discrete Gaussian noise is drawn anew for every sum. As in any simulation
coordinator and hospitals share one process, and a state that all compute alike is computed once. ``peak_rss_mib`` is of
that process from its start, coordinator and all hospitals together. ``core_s``: processor seconds of all threads, and what
of them drawing noise and the system's calls took.
"""

from __future__ import annotations

import math
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.client.approved import Approved
from medfed.client.local_steps import Noise, local_steps
from medfed.client.site import Site
from medfed.model_choice import Mlp
from medfed.privacy.quantize import dequantize, quantize
from medfed.seams import Entropy, Seams
from medfed.server.daemon import load_assignment, run_folder
from medfed.server.exchange import Exchange
from medfed.server.planning import load_task
from medfed.server.rounds import Rounds
from medfed.server.setup import CONFIG_NAME, load_office
from medfed.server.store import Checkpoint, Store
from medfed.simulations.cohorts import Cohort, load_cohort
from medfed.simulations.rehearsal import Rehearsal, in_this_process, lay_out
from medfed.study import LocalSteps, Momentum, Training, least_survivors

COHORT = "breast-cancer"
FEATURES = 30
SPARES = 2
KIBIBYTE, MEBIBYTE = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """``parameters``: at least so many. ``threads``: hospitals that work at once."""

    hospitals: int
    parameters: int
    rounds: int
    threads: int


@dataclass
class Load:
    """What the hospitals' threads and the coordinator's note while they run. ``noise_s``: processor seconds, of all."""

    noise_s: float = 0.0
    attempts: int = 0
    ended_s: list[float] = field(default_factory=list)
    cores_s: list[float] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def update(
        self, approved: Approved, weights: NDArray[np.float32], entropy: Entropy, noise: Noise
    ) -> NDArray[np.float64]:
        """``private_update`` of one local step whose clipped sum is the same everywhere: float64[d]."""
        plan, clip = approved.plan, approved.study.privacy.clipping_norm
        total = np.broadcast_to(np.float64(clip / math.sqrt(plan.words)), plan.words)
        integers = quantize(total, plan.noise_exponent, plan.noise_limit)
        began = time.thread_time()
        integers += noise(entropy.draw("noise", 32), plan.noise_sd, plan.words)
        with self._lock:
            self.noise_s += time.thread_time() - began
        expected = approved.study.privacy.sampling_rate * approved.nominal_patients
        step = dequantize(integers, plan.noise_exponent)
        step *= -local_steps(approved).learning_rate / expected
        return step

    def observe(self, checkpoint: Checkpoint, what: str) -> None:
        """The coordinator's word: notes when a round ends, and when the first one begins."""
        if what.endswith(" done") or (not self.ended_s and what.startswith("round ")):
            self.ended_s.append(time.monotonic())
            self.cores_s.append(time.process_time())
            self.uploads += [record.upload_bytes for record in checkpoint.records[-1:]]

    def figures(self, core_s: float) -> dict[str, object]:
        """Of the rounds, and of the whole process, whose threads took ``core_s`` in all."""
        taken, worked = _differences(self.ended_s), _differences(self.cores_s)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "rounds": len(taken),
            "attempts": self.attempts,
            "s_per_round": round(statistics.median(taken), 3),
            "s_per_round_most": round(max(taken), 3),
            "core_s_per_round": round(statistics.median(worked), 3),
            "core_s": {"all": round(core_s, 3), "noise": round(self.noise_s, 3), "system": round(usage.ru_stime, 3)},
            "peak_rss_mib": round(usage.ru_maxrss * KIBIBYTE / MEBIBYTE, 1),
            "upload_bytes": max(self.uploads),
        }


def hidden_layers(parameters: int) -> list[int]:
    """Widths of two hidden layers over ``FEATURES`` numbers that make about so many parameters, never fewer."""
    first = max(1, round(math.sqrt(parameters)) - FEATURES // 2)
    second = max(1, math.ceil((parameters - 1 - first * (FEATURES + 1)) / (first + 2)))
    return [first, second]


def _cohort(size: Size, seams: Seams) -> Cohort:
    training = Training(
        aggregate="update",
        rounds=size.rounds,
        spare_attempts=SPARES,
        learning_rates=[[1, 1.0]],
        average_last_rounds=1,
        server_step=Momentum(kind="momentum", momentum=0.0),
        local=LocalSteps(steps=1, learning_rate=0.1, proximal=0.0, sum_range=64.0),
    )
    model = Mlp(name="mlp", hidden=hidden_layers(size.parameters))
    task = load_task(seams.files, COHORT).model_copy(update={"model": model, "training": training, "statistics": None})
    return replace(load_cohort(seams.files, COHORT, 1, size.hospitals), task=task)


def run(size: Size, folder: Path, seams: Seams) -> dict[str, object]:
    """All figures as a JSON object; nothing is left in ``folder``."""
    started, cores, load = time.monotonic(), time.process_time(), Load()
    colluders = max(1, size.hospitals // 3)
    drop_outs = size.hospitals - least_survivors(size.hospitals, colluders)
    plan = Rehearsal(epsilon=8.0, mode="local", colluders=colluders, drop_outs=drop_outs)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        sites = lay_out(Path(place), _cohort(size, seams), plan, seams)
        laid_out = time.monotonic()
        parameters = _rehearse(Path(place), sites, plan, size, load, seams)
        volume = _volume(Path(place))
    return {
        "hospitals": size.hospitals,
        "colluders": colluders,
        "drop_outs_allowed": drop_outs,
        "parameters": parameters,
        "threads": size.threads,
        "volume": volume,
        "seconds": round(time.monotonic() - started, 1),
        "lay_out_s": round(laid_out - started, 1),
        "setup_s": round(load.ended_s[0] - laid_out, 1),
        **load.figures(time.process_time() - cores),
    }


def _rehearse(folder: Path, sites: Sequence[Site], plan: Rehearsal, size: Size, load: Load, seams: Seams) -> int:
    """All rounds of the federation that is laid out in ``folder``; returns d."""
    office = load_office(seams, folder / "coordinator" / CONFIG_NAME)
    assignment = load_assignment(office)
    words = assignment.plan.words
    store = Store(seams.files, run_folder(office, assignment), assignment.study, words)

    def train(exchange: Exchange) -> None:
        load.attempts = Rounds(assignment, exchange, store, seams, load.observe).run().last_attempt

    in_this_process(sites, plan, train, update=load.update, workers=size.threads)
    return words


def _differences(values: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(values)]


def _volume(folder: Path) -> str:
    """The kind of file system that ``folder`` lies on: that of the longest mount point above it."""
    place, mounts = folder.resolve(), {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        mounts[Path(point)] = kind
    above = next((each for each in (place, *place.parents) if each in mounts), None)
    return "unknown" if above is None else mounts[above]
