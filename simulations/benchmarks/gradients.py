"""What private gradients cost: a step of medfed's engine beside plain training and Opacus, interleaved in one process.

``python -m medfed.simulations.benchmarks gradients --json``; ``docs/benchmarks/gradients.md`` tells how to read and rerun it.

Seconds are the processor's, of all threads of this one process: what one core takes, whatever else the machine does (on a GPU
the clock's). One core, one torch thread, denormal numbers flushed to zero in all modes (without it a plain LSTM of 200 steps
takes twelve times as long). A step is everything from records on the CPU to the next weights: the engine's holds its clipped
sum, rounding to the grid, discrete Gaussian noise, and the way back to floats; the others' are in ``gradients_peers``. Every
round times each mode once, plain training and the engine next to each other in alternating order, and ratios are medians over
the rounds of the ratio within a round. Opacus sits out where its share of the time is spent.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from medfed.errors import EnvironmentFault, MedfedError
from medfed.privacy.gradients.fixed_batches import steady_arithmetic
from medfed.progress import Progress
from medfed.seams import system_seams
from medfed.simulations.benchmarks import gradients_memory
from medfed.simulations.benchmarks.gradients_engine import Seen, engine, physical_batch
from medfed.simulations.benchmarks.gradients_families import FAMILIES, QUICK, family
from medfed.simulations.benchmarks.gradients_peers import PEERS, Case, Step, plain

BATCHES = (64, 256)
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
ROW_S, LONGEST_S, QUICK_S = 40.0, 14 * 60.0, 36.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100

_TRIED, _MEASURED = 3, 32
_NEAR = 1.25
_QUICK_MS, _SLOW_MS, _VERY_SLOW_MS = 500.0, 500.0, 5000.0
_PEERS_SHARE = 0.5

NOTES = (
    "denormal numbers are flushed to zero in all modes",
    "plain_ms is the fastest plain variant; ratio_plain and speedup_opacus are medians of ratios within a round",
    "engine_ms holds clipping, rounding, discrete Gaussian noise (noise_ms of it) and SGD; Opacus's noise is torch.normal",
    "times are processor time of the process on one core; on a GPU the clock's, until it has finished",
    "memory is growth of the peak over two steps, each mode in a process of its own",
)


Times = Mapping[str, float]
"""Milliseconds by mode, of one round; a mode that sat out is missing."""


def paired_ratio(rounds: Sequence[Times], over: str, under: str) -> float | None:
    """The median of ``over`` / ``under`` within a round, over the rounds that timed both; None if none did."""
    ratios = [times[over] / times[under] for times in rounds if over in times and under in times]
    return statistics.median(ratios) if ratios else None


def median_ms(rounds: Sequence[Times], mode: str) -> float | None:
    """Over the rounds that timed ``mode``; None if none did."""
    taken = [times[mode] for times in rounds if mode in times]
    return statistics.median(taken) if taken else None


def fastest(rounds: Sequence[Times], modes: Sequence[str]) -> str | None:
    """Which of ``modes`` has the least median; None if none was timed."""
    medians = {mode: ms for mode in modes if (ms := median_ms(rounds, mode)) is not None}
    return min(medians, key=lambda mode: medians[mode], default=None)


def timed_ms(step: Step, device: torch.device) -> float:
    """One call: processor milliseconds of this process, whatever else the machine does; on a GPU those until it has finished."""
    if device.type == "cpu":
        began = time.process_time()
        step()
        return (time.process_time() - began) * 1e3
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) * 1e3


# ------------------------------------------------------------------------------------------------------------- a case


def new_case(name: str, batch: int, device: torch.device, precision: torch.dtype | None) -> Case:
    """A family's records, and a clipping norm that half of the first of them are beyond at the first weights."""
    of = family(name)
    inputs, labels = of.examples(torch.Generator().manual_seed(0), batch)
    begun = Case(of, inputs, labels, torch.device("cpu"), None, 1.0)
    norm = statistics.median(_gradient_norms(begun, min(batch, _MEASURED)))
    return Case(of, inputs, labels, device, precision, norm)


def _gradient_norms(case: Case, count: int) -> list[float]:
    """Of the first ``count`` records, one after the other in plain PyTorch."""
    model = case.model()
    weights = list(model.parameters())
    found = []
    for row in range(count):
        loss = nn.functional.cross_entropy(model(case.inputs[row : row + 1]), case.labels[row : row + 1])
        squares = [part.square().sum() for part in torch.autograd.grad(loss, weights)]
        found.append(float(torch.stack(squares).sum().sqrt()))
    return found


@dataclass(slots=True)
class Timings:
    """Steps of one case: of each mode the first one's time, and those of all rounds."""

    case: Case
    steps: dict[str, Step] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def begin(self, mode: str, build: Callable[[], Step]) -> None:
        """Build a mode and take its first step. One that cannot run is noted by the class of its error."""
        try:
            step = build()
            self.first[mode] = timed_ms(step, self.case.device)
            self.steps[mode] = step
        except Exception as error:  # whatever a library raises for a model that it cannot take
            code = f" MF-{error.code}" if isinstance(error, MedfedError) else ""
            self.notes[mode] = type(error).__name__ + code

    def drop_slow(self, modes: Sequence[str]) -> dict[str, float]:
        """The least time of each of ``modes``, of some steps (of slow ones the first); only those near the fastest stay."""
        present = [mode for mode in modes if mode in self.steps]
        tried: list[Times] = [self.first]
        if any(self.first[mode] < _SLOW_MS for mode in present):
            tried = [self._round(present, turned=bool(turn % 2)) for turn in range(_TRIED)]
        found = {mode: min(times[mode] for times in tried) for mode in present}
        for mode in present:
            if found[mode] > _NEAR * min(found.values()):
                del self.steps[mode]
        return found

    def run(self, seconds: float, watch: Callable[[float], None]) -> None:
        """Rounds for so long, at least ``FEWEST_ROUNDS``. ``watch`` is told the share that is done.

        A peer that needs many seconds a step is not asked again: its first step stands for it in the first round.
        """
        began, peers = time.perf_counter(), [mode for mode in self.steps if mode in PEERS]
        main = [mode for mode in self.steps if mode not in PEERS]
        share = _PEERS_SHARE * seconds / max(1, len(peers))
        while len(self.rounds) < MOST_ROUNDS:
            spent = time.perf_counter() - began
            if spent >= seconds and len(self.rounds) >= FEWEST_ROUNDS:
                break
            times = self._round(main, turned=bool(len(self.rounds) % 2))
            for mode in peers:
                if self.first.get(mode, 0.0) > _VERY_SLOW_MS:
                    if not self.rounds:
                        times[mode] = self.first[mode]
                        self.notes[mode] = "its first step alone"
                elif self._has_time(mode, share):
                    times |= self._round([mode], turned=False)
            self.rounds.append(times)
            watch(min(1.0, spent / seconds))

    def _has_time(self, mode: str, share_s: float) -> bool:
        """Always once; then as long as one more step of a peer is within its share of the time."""
        taken = [times[mode] for times in self.rounds if mode in times]
        return not taken or sum(taken) * (1 + 1 / len(taken)) <= share_s * 1e3

    def _round(self, modes: Sequence[str], *, turned: bool) -> dict[str, float]:
        """Each mode once, in order or, ``turned``, in the opposite one.

        Of a quick mode a step that is not timed comes first: in training a step follows one of its own kind, and finds caches
        and allocator as that one left them, not as some other mode did.
        """
        times = {}
        for mode in modes[::-1] if turned else modes:
            if self.first.get(mode, _QUICK_MS) < _QUICK_MS:
                self.steps[mode]()
            times[mode] = timed_ms(self.steps[mode], self.case.device)
        return times


# --------------------------------------------------------------------------------------------------------------- rows


def measure(case: Case, batch: int, seconds: float, watch: Callable[[float], None]) -> dict[str, object]:
    """What a row says of time: every mode in turn for about so many seconds. ``batch``: the engine's physical one."""
    ends, timings, seen = time.perf_counter() + seconds, Timings(case), Seen()
    variants = {f"plain_{name}": build for name, build in {"torch": case.family.build, **case.family.variants}.items()}
    for name, build in variants.items():
        timings.begin(name, lambda build=build: plain(case, build))  # type: ignore[misc]
    tried = timings.drop_slow(list(variants))
    timings.begin("engine", lambda: engine(case, batch, system_seams().entropy, seen))
    for name, opacus in PEERS.items():
        timings.begin(name, lambda opacus=opacus: opacus(case))  # type: ignore[misc]
    timings.run(max(1.0, ends - time.perf_counter()), watch)
    rounds = timings.rounds
    baseline, best = fastest(rounds, list(variants)) or "", fastest(rounds, list(PEERS)) or ""
    return {
        "plain_ms": _rounded(median_ms(rounds, baseline)),
        "plain_variant": baseline.removeprefix("plain_"),
        "plain_variants_ms": {name.removeprefix("plain_"): _rounded(ms) for name, ms in tried.items()},
        "opacus_ms": _rounded(median_ms(rounds, best)),
        **{f"{name}_ms": _rounded(median_ms(rounds, name)) for name in PEERS},
        "engine_ms": _rounded(median_ms(rounds, "engine")),
        "noise_ms": _rounded(seen.noise_ms),
        "ratio_plain": _rounded(paired_ratio(rounds, "engine", baseline)),
        "speedup_opacus": _rounded(paired_ratio(rounds, best, "engine")),
        "clipped_share": _rounded(seen.clipped_share),
        "first_step_ms": {name: _rounded(ms) for name, ms in timings.first.items()},
        "rounds": len(rounds),
        "notes": timings.notes,
    }


def row(name: str, case: Case, batch: int, seconds: float, watch: Callable[[float], None]) -> dict[str, object]:
    """One family at one batch, all but memory."""
    return {
        "model": name,
        "batch": len(case.inputs),
        "device": _named(case.device),
        "precision": _precision(case.precision),
        "parameters": sum(weight.numel() for weight in case.model().parameters()),
        "physical_batch": batch,
        "clipping_norm": _rounded(case.clipping_norm),
        **measure(case, batch, seconds, watch),
        "memory_growth_mb": None,
        "plain_memory_growth_mb": None,
    }


def memory(name: str, case: Case, batch: int, variant: object) -> dict[str, object]:
    """What a row says of memory: the engine's, and that of the plain ``variant`` that it is compared with."""
    return {
        "memory_growth_mb": gradients_memory.growth_mb(name, case, "engine", batch),
        "plain_memory_growth_mb": gradients_memory.growth_mb(name, case, f"plain_{variant}", batch),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _named(device: torch.device) -> str:
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _precision(precision: torch.dtype | None) -> str:
    return next(name for name, each in PRECISIONS.items() if each == precision)


# ------------------------------------------------------------------------------------------------------------ the whole


def run(
    names: Sequence[str], batches: Sequence[int], device_name: str, precision_name: str, *, quick: bool
) -> dict[str, object]:
    """All figures as a JSON object. Without ``names`` and ``batches`` all of them; ``quick``: a few, within 50 s.

    Raises ``EnvironmentFault`` (MF-630) for a device that is not there.
    """
    device, precision = find_device(device_name), PRECISIONS[precision_name]
    chosen = [(name, batch) for name in names or (QUICK if quick else FAMILIES) for batch in batches or BATCHES]
    if quick and not batches:
        chosen = [(name, batch) for name, batch in chosen if batch == BATCHES[0]]
    limit_s = QUICK_S if quick else min(LONGEST_S, ROW_S * len(chosen))
    with steady_arithmetic(), one_core(), Progress("gradients", 100 * len(chosen), sys.stderr) as bar:
        rows = _rows(chosen, device, precision, limit_s, quick, bar)
    return {"rows": rows, "notes": list(NOTES)}


def _rows(
    chosen: Sequence[tuple[str, int]],
    device: torch.device,
    precision: torch.dtype | None,
    limit_s: float,
    quick: bool,
    bar: Progress,
) -> list[dict[str, object]]:
    """Each gets its part of the time that the ones before it left; what memory takes is taken to be what it took last."""
    began, memory_s, rows, settled = time.perf_counter(), 10.0, [], {}
    for done, (name, size) in enumerate(chosen):
        started = time.perf_counter()
        with_memory = not quick or not done
        ends = started + (limit_s - (started - began)) / (len(chosen) - done) - with_memory * memory_s
        case = new_case(name, size, device, precision)
        if (name, size) not in settled:
            settled[name, size] = physical_batch(case)

        def watch(share: float, done: int = done, name: str = name, size: int = size) -> None:
            bar.update(int(100 * (done + 0.9 * share)), f"{name}, batch {size}")

        watch(0.0)
        found = row(name, case, settled[name, size], ends - time.perf_counter(), watch)
        if with_memory:
            asked = time.perf_counter()
            found |= memory(name, case, settled[name, size], found["plain_variant"])
            memory_s = time.perf_counter() - asked
        rows.append(found)
    return rows


def find_device(name: str) -> torch.device:
    """``cpu``, or the first CUDA device; MF-630 if there is none."""
    if name == "cpu":
        return torch.device("cpu")
    # read when cuBLAS starts, as at a hospital (client/compute.py)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not torch.cuda.is_available():
        raise EnvironmentFault(630, "torch finds no CUDA device", "leave --device out, or install torch for CUDA")
    return torch.device("cuda:0")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This thread, and processes and threads that it starts, on one core, where the system can do that."""
    if sys.platform != "linux":
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


COLUMNS = (
    *("model", "batch", "plain_ms", "opacus_ms", "engine_ms", "noise_ms", "ratio_plain", "speedup_opacus"),
    *("memory_growth_mb", "plain_memory_growth_mb"),
)


def table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Lines for people: the columns that matter; what is not known is a dash."""
    cells = [list(COLUMNS)] + [[_cell(row[column]) for column in COLUMNS] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
