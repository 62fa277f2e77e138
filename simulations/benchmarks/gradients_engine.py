"""One private step of medfed's, for the benchmark of gradients: the calls that a hospital makes, and SGD."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from medfed.models import tasks
from medfed.privacy import accounting
from medfed.privacy.gradients.engine import Engine, Statistics
from medfed.privacy.gradients.slot_test import MANY, settle_taped_batch
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.quantize import dequantize, grid_exponent, limit, quantize
from medfed.seams import Entropy
from medfed.simulations.benchmarks.gradients_families import Family
from medfed.simulations.benchmarks.gradients_peers import NOISE_MULTIPLIER, RATE, Case
from medfed.task_choice import Classification

SUM_RANGE = 64.0
"""Of the grid of the clipped sum, in clipping norms: as ``training.local.sum_range`` of a study."""


@dataclass(slots=True)
class Seen:
    """What a step tells beside its time. ``noise_s``: seconds that rounding, noise and the way back took, a step each."""

    noise_s: list[float] = field(default_factory=list)
    last: Statistics | None = None

    @property
    def noise_ms(self) -> float | None:
        """The median without the first step; None before the second."""
        return statistics.median(self.noise_s[1:]) * 1e3 if len(self.noise_s) > 1 else None

    @property
    def clipped_share(self) -> float | None:
        """Of the patients of the last step."""
        return None if self.last is None else self.last.clipped / max(1, self.last.patients)


def engine(case: Case, batch: int, entropy: Entropy, seen: Seen) -> Callable[[], None]:
    """A step in physical batches of ``batch`` records, every record a patient of its own."""
    model, losses = case.model(), catalogue_losses(case.family)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    sizes = [weight.numel() for weight in weights]
    optimizer = torch.optim.SGD(weights, lr=RATE)
    exponent, bound = grid_exponent(32, 1, SUM_RANGE * case.clipping_norm), limit(32, 1)
    noise_sd = NOISE_MULTIPLIER * accounting.sensitivity(case.clipping_norm, exponent, sum(sizes))
    everybody, one_hospital = np.arange(len(case.inputs)), np.zeros(len(case.inputs), np.int64)
    taking = Engine(model, losses, case.device, case.precision)  # kept from step to step, as a hospital does

    def step() -> None:
        taking.load(np.concatenate([weight.detach().numpy(force=True).ravel() for weight in weights]))
        totals, seen.last = taking.clipped_sums(
            case.inputs,
            case.labels,
            everybody,
            everybody,
            one_hospital,
            1,
            case.clipping_norm,
            batch=batch,
        )
        began = time.process_time()
        total = totals[0]
        integers = quantize(total, exponent, bound, out=total.view(np.int64))
        integers += discrete_gaussian(entropy.draw("noise", 32), noise_sd, integers.size)
        mean = dequantize(integers, exponent)
        mean /= len(everybody)
        seen.noise_s.append(time.process_time() - began)
        flat = torch.from_numpy(mean).to(case.device, torch.float32)
        for weight, part in zip(weights, torch.split(flat, sizes), strict=True):
            weight.grad = part.view(weight.shape)
        optimizer.step()

    return step


def catalogue_losses(family: Family) -> Callable[[Tensor, Tensor], Tensor]:
    """The catalogue's loss of so many classes."""
    return tasks.losses(Classification(kind="multiclass", label="class", classes=family.classes))


def physical_batch(case: Case) -> int:
    """How many records at once, as a hospital finds it out before a study begins."""
    return settle_taped_batch(
        case.model(),
        catalogue_losses(case.family),
        case.family.examples,
        device=case.device,
        dtype=case.precision,
        are_many=len(case.inputs) >= MANY,
    )
