"""What a simulated round costs beside training: processor seconds of medfed's round over those of a bare PyTorch loop.

Both do the same work: every hospital takes the round's weights and makes one pass over its 100 images in batches of 10,
without privacy; the mean of the updates is the next model. medfed's round has all else that is production's: signed
requests, pairwise masks, the ledger on disk, states hashed and compared. The two alternate in one process on one thread a
hospital, and processor time is that of the whole process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.model_choice import Cnn
from medfed.models import catalogue, parameters
from medfed.seams import Seams
from medfed.server.assignment import Assignment
from medfed.server.planning import load_task
from medfed.server.store import Checkpoint
from medfed.simulations.rehearsal import Rehearsal, rehearse
from medfed.simulations.synthetic import synthetic
from medfed.simulations.threads import one_torch_thread
from medfed.study import LocalSteps, Momentum, Study, Training

IMAGES, BATCH, RATE, PIXELS = 100, 10, 0.1, 28
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


@dataclass
class Meter:
    """Called by the coordinator after each round, when no hospital works: notes it, and runs a bare round."""

    hospitals: int
    medfed_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    _loop: BareLoop | None = None
    _since: float = 0.0

    def __call__(self, assignment: Assignment, checkpoint: Checkpoint, what: str) -> None:
        if not what.endswith(" done"):
            return
        now = time.process_time()
        if self._loop is None:
            self._loop = BareLoop(assignment.study, self.hospitals)
            self._loop.round()  # the first of both is not counted
        else:
            self.medfed_s.append(now - self._since)
            started = time.process_time()
            self._loop.round()
            self.bare_s.append(time.process_time() - started)
        self._since = time.process_time()


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
    meter = Meter(hospitals)
    with tempfile.TemporaryDirectory() as folder, one_torch_thread():
        done = rehearse(Path(folder), cohort, Rehearsal(epsilon=None, mode="local"), seams, observe=meter)
    ratios = [ours / bare for ours, bare in zip(meter.medfed_s, meter.bare_s, strict=True)]
    return {
        "hospitals": hospitals,
        "images_per_hospital": IMAGES,
        "parameters": done.assignment.plan.words,
        "rounds_measured": len(ratios),
        "medfed_core_s_per_round": round(statistics.median(meter.medfed_s), 3),
        "bare_core_s_per_round": round(statistics.median(meter.bare_s), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
    }


def run(hospitals: Sequence[int], rounds: int, seams: Seams) -> dict[str, object]:
    """All figures as a JSON object."""
    return {"rounds": rounds, "simulations": [row(count, rounds, seams) for count in hospitals]}
