"""What a simulated round costs beside training: processor seconds of medfed's round over those of a bare loop.

Both do the same work, in two ways.

``simulations``: every hospital takes the round's weights and makes one pass over its 100 images in batches of 10, without
privacy; the mean of the updates is the next model. The bare loop is plain PyTorch.

``gradient_mode``: every hospital samples about 100 of its 200 images, and noised sums of clipped gradients make the next
model. The bare loop is one site that trains privately on everybody's images: the same engine over as many sampled images,
one vector of noise a step.

medfed's round has all else that is production's: signed requests, pairwise masks, the ledger on disk, states hashed and
compared. The two alternate in one process on one thread a hospital, and processor time is that of the whole process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.client.compute import Compute
from medfed.client.trainer import gradient_sum, made_up_patients
from medfed.model_choice import Cnn
from medfed.models import catalogue, parameters
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.quantize import dequantize, quantize
from medfed.seams import Entropy, Seams
from medfed.server.assignment import Assignment
from medfed.server.planning import load_task
from medfed.server.store import Checkpoint
from medfed.simulations.extract import Cohort
from medfed.simulations.rehearsal import Rehearsal, rehearse
from medfed.simulations.synthetic import synthetic
from medfed.simulations.threads import one_torch_thread
from medfed.study import LocalSteps, Momentum, Study, Training

IMAGES, BATCH, RATE, PIXELS = 100, 10, 0.1, 28
PATIENTS, SAMPLING_RATE, EPSILON = 200, 0.5, 8.0
MODEL = Cnn(name="cnn", channels=[64, 136, 280], first_stride=2, groups=8, head="mean")
"""423 thousand parameters."""


class BareLoop:
    """The same rounds in plain PyTorch: no federation, no files, no hashes."""

    def __init__(self, study: Study, hospitals: int) -> None:
        generator = np.random.default_rng(0)
        shape = (hospitals, IMAGES, 1, PIXELS, PIXELS)
        self._images = torch.from_numpy(generator.normal(size=shape).astype(np.float32))
        self._labels = torch.from_numpy(generator.integers(0, 2, (hospitals, IMAGES)).astype(np.float32))
        self._model: nn.Module = catalogue.build(study).train()
        self._weights = parameters.flatten(self._model)

    def round(self) -> None:
        """Every hospital in turn from the same weights, then the mean of where they came."""
        total = np.zeros_like(self._weights)
        for images, labels in zip(self._images, self._labels, strict=True):
            parameters.assign(self._model, self._weights)
            self._one_pass(images, labels)
            total += parameters.flatten(self._model)
        self._weights = total / np.float32(len(self._images))

    def _one_pass(self, images: Tensor, labels: Tensor) -> None:
        optimizer = torch.optim.SGD(self._model.parameters(), lr=RATE)
        for rows in torch.randperm(IMAGES).reshape(-1, BATCH):
            optimizer.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(self._model(images[rows])[:, 0], labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


class OneSite:
    """The rounds of gradient mode where everybody's images lie in one place: private all the same, but no federation."""

    def __init__(self, assignment: Assignment, hospitals: int, entropy: Entropy) -> None:
        self._study, self._plan, self._entropy = assignment.study, assignment.plan, entropy
        self._patients = made_up_patients(self._study, hospitals * PATIENTS)
        self._model: nn.Module = catalogue.build(self._study).train()
        self._weights = parameters.flatten(self._model)
        self._compute = Compute()

    def round(self) -> None:
        """Sample, clip, add up, round to the grid, add noise, step."""
        total = gradient_sum(
            self._study,
            self._model,
            self._weights,
            self._patients,
            sampling_key=self._entropy.draw("sampling", 64),
            compute=self._compute,
        )
        plan = self._plan
        integers = quantize(total, plan.noise_exponent, plan.noise_limit, out=total.view(np.int64))
        integers += discrete_gaussian(self._entropy.draw("noise", 32), plan.noise_sd, plan.words)
        mean = dequantize(integers, plan.noise_exponent) / (SAMPLING_RATE * self._patients.count)
        self._weights -= (RATE * mean).astype(np.float32)


class Loop(Protocol):
    """What a simulated round is measured against."""

    def round(self) -> None: ...


@dataclass
class Meter:
    """Called by the coordinator after each round, when no hospital works: notes it, and runs a bare round."""

    bare: Callable[[Assignment], Loop]
    medfed_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    _loop: Loop | None = None
    _since: float = 0.0

    def __call__(self, assignment: Assignment, checkpoint: Checkpoint, what: str) -> None:
        if not what.endswith(" done"):
            return
        now = time.process_time()
        if self._loop is None:
            self._loop = self.bare(assignment)
            self._loop.round()  # the first of both is not counted
        else:
            self.medfed_s.append(now - self._since)
            started = time.process_time()
            self._loop.round()
            self.bare_s.append(time.process_time() - started)
        self._since = time.process_time()

    def figures(self) -> dict[str, object]:
        """Seconds of both, and their ratio round by round."""
        ratios = [ours / bare for ours, bare in zip(self.medfed_s, self.bare_s, strict=True)]
        return {
            "rounds_measured": len(ratios),
            "medfed_core_s_per_round": round(statistics.median(self.medfed_s), 3),
            "bare_core_s_per_round": round(statistics.median(self.bare_s), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_least": round(min(ratios), 3),
            "ratio_most": round(max(ratios), 3),
        }


def row(hospitals: int, rounds: int, seams: Seams) -> dict[str, object]:
    """One number of hospitals: seconds of both in each round, and their ratio."""
    training = Training(
        aggregate="update",
        rounds=rounds + 1,
        spare_attempts=0,
        learning_rates=[[1, 1.0]],
        average_last_rounds=1,
        server_step=Momentum(kind="momentum", momentum=0.0),
        local=LocalSteps(steps=IMAGES // BATCH, learning_rate=RATE, proximal=0.0, sum_range=64.0),
    )
    task = load_task(seams.files, "synthetic-images").model_copy(
        update={"model": MODEL, "training": training, "sampling_rate": BATCH / IMAGES}
    )
    cohort = replace(synthetic("images", 1, hospitals, IMAGES), task=task)
    meter = Meter(lambda assignment: BareLoop(assignment.study, hospitals))
    words = _rehearse(cohort, Rehearsal(epsilon=None, mode="local"), meter, seams)
    return {"hospitals": hospitals, "images_per_hospital": IMAGES, "parameters": words, **meter.figures()}


def gradient_row(hospitals: int, rounds: int, seams: Seams, *, exact: bool = False) -> dict[str, object]:
    """The same of gradient mode, privacy on both sides. ``exact``: without one call of the engine for many hospitals."""
    training = Training(
        aggregate="gradient",
        rounds=rounds + 1,
        spare_attempts=0,
        learning_rates=[[1, RATE]],
        average_last_rounds=1,
        server_step=Momentum(kind="momentum", momentum=0.0),
    )
    task = load_task(seams.files, "synthetic-images").model_copy(
        update={"model": MODEL, "training": training, "sampling_rate": SAMPLING_RATE}
    )
    cohort = replace(synthetic("images", 1, hospitals, PATIENTS), task=task)
    meter = Meter(lambda assignment: OneSite(assignment, hospitals, seams.entropy))
    words = _rehearse(cohort, Rehearsal(epsilon=EPSILON, mode="local", exact=exact), meter, seams)
    sizes = {"hospitals": hospitals, "images_per_hospital": PATIENTS, "sampling_rate": SAMPLING_RATE}
    return {**sizes, "parameters": words, "joint_sums": not exact, **meter.figures()}


def _rehearse(cohort: Cohort, plan: Rehearsal, meter: Meter, seams: Seams) -> int:
    """Run it under the meter; returns d."""
    with tempfile.TemporaryDirectory() as folder, one_torch_thread():
        return rehearse(Path(folder), cohort, plan, seams, observe=meter).assignment.plan.words


def run(hospitals: Sequence[int], rounds: int, seams: Seams) -> dict[str, object]:
    """All figures as a JSON object."""
    return {
        "rounds": rounds,
        "simulations": [row(count, rounds, seams) for count in hospitals],
        "gradient_mode": [gradient_row(count, rounds, seams) for count in hospitals],
    }
