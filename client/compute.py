"""Where this hospital computes gradients of deep models: a CUDA device if there is a usable one, else the processor.

Chosen once a process, from ``[compute]`` of hospital.toml. Models of tables stay on the processor, and so does all noise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import nn

from medfed.client.policy import ComputeSection
from medfed.privacy.gradients.engine import Engine

log = logging.getLogger("medfed.client")

CPU = torch.device("cpu")
GIB = 1 << 30
_LEAST_FREE_BYTES = GIB

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Compute:
    """The device, which physical batches were found right (``slot_test``) in this process, by form of computation, engines at
    rest by the same; what takes gradients patient by patient (of tables as well), and what deep models' products are
    computed in."""

    device: torch.device = CPU
    batches: dict[str, int] = field(default_factory=dict)
    engines: dict[str, list[Engine]] = field(default_factory=dict)
    engine: Literal["bookkeeping", "opacus"] = "bookkeeping"
    precision: Literal["float32", "bfloat16"] = "float32"

    def dtype_of(self, model: nn.Module) -> torch.dtype | None:
        """What the gradient engine computes a model's products and convolutions in; None: the model's own type."""
        is_short = self.precision == "bfloat16" and next(model.parameters()).dtype == torch.float32
        return torch.bfloat16 if is_short else None

    def run(self, work: Callable[[torch.device], Result]) -> Result:
        """``work`` on the device; where that fails (memory above all), the whole of it again on the processor.

        To the guarantee it is all the same where a sum was computed: noise is drawn afterwards, once. The device runs
        batches of one shape, so that whether it has the memory says nothing of the patients.
        """
        if self.device.type != "cpu":
            try:
                return work(self.device)
            except RuntimeError as error:  # out of memory and every fault of CUDA
                # the class name only: the text of a library's exception may hold patients' data
                log.warning("%s fails (%s): this step runs on the processor", self.device, type(error).__name__)
        return work(CPU)


def choose_compute(section: ComputeSection) -> Compute:
    """The device that hospital.toml asks for, made ready; without one the processor, and a line that says why."""
    engine: Literal["bookkeeping", "opacus"] = "bookkeeping" if section.engine == "auto" else section.engine
    if section.engine != "auto":
        log.info("gradients by %s, as hospital.toml says", section.engine)
    if section.device == "cpu":
        log.info("computing on the processor, as hospital.toml says")
        return Compute(engine=engine, precision=section.precision)
    # read when cuBLAS starts; without it its products may change from call to call
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda:0" if section.device in ("auto", "cuda") else section.device)
    missing = _missing(device, section.memory_gib)
    if missing is not None:
        level = logging.INFO if section.device == "auto" else logging.WARNING
        log.log(level, "computing on the processor: %s", missing)
        return Compute(engine=engine, precision=section.precision)
    if section.memory_gib is not None:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, section.memory_gib * GIB / total), device)
    _make_exact()
    log.info("computing on %s, %s", device, torch.cuda.get_device_name(device))
    return Compute(device, engine=engine, precision=section.precision)


def _missing(device: torch.device, memory_gib: float | None) -> str | None:
    """Why ``device`` cannot be used; None if it can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"{device} is not there"
    needed = _LEAST_FREE_BYTES if memory_gib is None else int(memory_gib * GIB)
    free = torch.cuda.mem_get_info(device)[0]
    if free < needed:
        return f"{device} has {free / GIB:.1f} GiB free of {needed / GIB:.1f} needed"
    return None


def _make_exact() -> None:
    """For this process: kernels that add up in one order, float32 without shortcuts (no TF32)."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
    torch.backends.cudnn.benchmark = False
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
