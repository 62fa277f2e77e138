"""One step of training, plain and by Opacus, for the benchmark of gradients to compare with.

A step is everything from the records to the next weights: forward pass, loss, backward pass; Opacus's clipping and noise
(``torch.normal``, which is fit for no release); SGD. Opacus replaces layers that it cannot take by its own, as its users do.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medfed.simulations.benchmarks.gradients_families import Family

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer

RATE = 1e-5  # so small that weights, and so who is clipped, hardly change
NOISE_MULTIPLIER = 1.0

Step = Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """What is measured: a model, its records on the CPU, where and how. ``precision``: what products are taken in, None for
    float32. ``clipping_norm``: some records' gradients are longer, some are not."""

    family: Family
    inputs: Tensor
    labels: Tensor
    device: torch.device
    precision: torch.dtype | None
    clipping_norm: float

    def model(self, build: Callable[[], nn.Module] | None = None) -> nn.Module:
        """The family's model, or a variant's: the same weights at every call."""
        torch.manual_seed(0)
        return (build or self.family.build)().to(self.device).train()

    def records(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels where the model is: taking them there is a part of a step."""
        return self.inputs.to(self.device), self.labels.to(self.device)

    def narrowed(self) -> contextlib.AbstractContextManager[object]:
        """What forward pass and loss run under."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision)


def plain(case: Case, build: Callable[[], nn.Module] | None = None) -> Step:
    """Ordinary training, without privacy."""
    model, loss = case.model(build), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        inputs, labels = case.records()
        optimizer.zero_grad(set_to_none=True)
        with case.narrowed():
            value = loss(model(inputs), labels)
        value.backward()
        optimizer.step()

    return step


def opacus_hooks(case: Case) -> Step:
    """Gradients record by record from hooks: Opacus's own default."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = _fixed(case.model())
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="mean", strict=False)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=RATE), **_options(case))
    return _opacus_step(case, wrapped, optimizer, nn.CrossEntropyLoss())


def opacus_ghost(case: Case) -> Step:
    """Norms first, then a second backward pass over the clipped losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model = _fixed(case.model())
    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=case.clipping_norm, use_ghost_clipping=True, strict=False
    )
    optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD(model.parameters(), lr=RATE), **_options(case))
    loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    return _opacus_step(case, wrapped, optimizer, loss)


PEERS: dict[str, Callable[[Case], Step]] = {"opacus_hooks": opacus_hooks, "opacus_ghost": opacus_ghost}


def _opacus_step(
    case: Case, wrapped: nn.Module, optimizer: DPOptimizer, loss: Callable[[Tensor, Tensor], Tensor]
) -> Step:
    def step() -> None:
        inputs, labels = case.records()
        optimizer.zero_grad()
        with case.narrowed():
            value = loss(wrapped(inputs), labels)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _options(case: Case) -> dict[str, float]:
    return {
        "noise_multiplier": NOISE_MULTIPLIER,
        "max_grad_norm": case.clipping_norm,
        "expected_batch_size": len(case.inputs),
    }


def _fixed(model: nn.Module) -> nn.Module:
    from opacus.validators import ModuleValidator

    _quiet()
    device = next(model.parameters()).device
    fixed: nn.Module = ModuleValidator.fix(model).to(device).train()
    return fixed


def _quiet() -> None:
    """What torch and Opacus say of every such model, and nothing else: for the whole of a process that only measures."""
    logging.getLogger("opacus").setLevel(logging.WARNING)  # which layers it replaces
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
