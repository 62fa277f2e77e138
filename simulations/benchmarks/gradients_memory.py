"""How far a step's memory grows, each mode in a process of its own: for the benchmark of gradients.

``python -m medfed.simulations.benchmarks.gradients_memory`` reads one request as JSON from standard input and prints the growth
of the peak over two steps, beyond what is held once model, records and optimiser are there: MiB of resident memory, or of the
device's. What torch loads at a first step counts too.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from medfed.privacy.gradients.fixed_batches import steady_arithmetic
from medfed.seams import system_seams
from medfed.simulations.benchmarks.gradients_engine import Seen, engine
from medfed.simulations.benchmarks.gradients_families import family
from medfed.simulations.benchmarks.gradients_peers import PEERS, Case, Step, plain

STEPS = 2
_TIMEOUT_S = 300.0
_MEBIBYTE = 1 << 20


def growth_mb(name: str, case: Case, mode: str, batch: int) -> float | None:
    """MiB of one mode (``engine``, ``plain_`` and a variant, or a peer); None if it does not run or nothing tells.

    ``name``: of the case's family; ``batch``: the engine's physical batch. The process takes on this one's core.
    """
    request = {
        "family": name,
        "records": len(case.inputs),
        "mode": mode,
        "batch": batch,
        "device": str(case.device),
        "precision": None if case.precision is None else str(case.precision).removeprefix("torch."),
        "clipping_norm": case.clipping_norm,
    }
    command = [sys.executable, "-m", "medfed.simulations.benchmarks.gradients_memory"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    found: float | None = json.loads(done.stdout)["growth_mb"]
    return found


def step_of(case: Case, mode: str, batch: int) -> Step:
    """The step that ``mode`` names."""
    if mode == "engine":
        return engine(case, batch, system_seams().entropy, Seen())
    if mode in PEERS:
        return PEERS[mode](case)
    return plain(case, {"torch": case.family.build, **case.family.variants}[mode.removeprefix("plain_")])


def _measured(step: Step, device: torch.device) -> float | None:
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _repeat(step)
        return (torch.cuda.max_memory_allocated(device) - before) / _MEBIBYTE
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():  # only Linux can forget a peak: that of building the model would count
        return None
    clear.write_text("5")
    held = _kibibytes(status, "VmRSS")
    _repeat(step)
    # not getrusage: a process there begins with the peak of the one that started it
    return (_kibibytes(status, "VmHWM") - held) / 1024


def _repeat(step: Callable[[], None]) -> None:
    for _ in range(STEPS):
        step()


def _kibibytes(status: Path, key: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def main() -> None:
    request = json.load(sys.stdin)
    of = family(request["family"])
    inputs, labels = of.examples(torch.Generator().manual_seed(0), request["records"])
    device = torch.device(request["device"])
    precision = None if request["precision"] is None else getattr(torch, request["precision"])
    with steady_arithmetic():
        case = Case(of, inputs, labels, device, precision, request["clipping_norm"])
        growth = _measured(step_of(case, request["mode"], request["batch"]), device)
    json.dump({"growth_mb": None if growth is None else round(growth, 1)}, sys.stdout)


if __name__ == "__main__":
    main()
