"""Training on without privacy, at one hospital, from weights that are there: for models that never leave it.

Adam on the study's own loss. How long, and at which rate, is chosen by a cross-validation among the patients given: 0
passes, which is the model as it came, is one of the choices, so that too few patients leave it as it is. Nothing is random:
the same records give the same weights on the same machine.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfed.models import catalogue, parameters
from medfed.models.records import Records
from medfed.models.tasks import meaning
from medfed.models.tasks.meaning import Losses
from medfed.study import Study

RATES = (0.1, 0.01, 0.001)
PASSES = (1, 2, 4, 8, 16, 32, 64)
FOLDS = 3
BATCH = 32
_PATIENCE = 2  # looks without a better loss before a rate is given up
_EVALUATED_AT_ONCE = 256
_SMALL = 1 << 17  # parameters


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """``weights`` float32[d]; how they came about; the cross-validated loss of a record before and after."""

    weights: NDArray[np.float32]
    passes: int
    rate: float
    loss_before: float
    loss_after: float


def tune(
    study: Study, start: NDArray[np.float32], records: Records, looked: Callable[[], None] = lambda: None
) -> Tuned:
    """From ``start`` float32[d] to weights for these records' patients. ``looked`` is called at most ``looks()`` times."""
    with _few_threads(start.size):
        return _tuned(study, start, records, looked)


def _tuned(study: Study, start: NDArray[np.float32], records: Records, looked: Callable[[], None]) -> Tuned:
    fold = _folds(records.patients)
    before = _loss(study, start, records)
    best, best_loss = (0, RATES[0]), before
    for rate in RATES:
        for passes, loss in _course(study, start, records, fold, rate):
            looked()
            if loss < best_loss:
                best, best_loss = (passes, rate), loss
    trainer = _Trainer(study, start, best[1])
    trainer.run(records, best[0])
    return Tuned(trainer.weights(), best[0], best[1], before, best_loss)


@contextlib.contextmanager
def _few_threads(size: int) -> Iterator[None]:
    """One thread for a small model: threads that wait for each other on a busy machine take fifty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if size < _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def looks() -> int:
    """Most calls of ``looked``, for a progress bar."""
    return len(RATES) * len(PASSES)


def _course(
    study: Study, start: NDArray[np.float32], records: Records, fold: NDArray[np.int64], rate: float
) -> Iterator[tuple[int, float]]:
    """(passes, loss of a record that its fold's model did not see), until it no longer falls."""
    parts = [(records.subset(fold != each), records.subset(fold == each)) for each in range(FOLDS)]
    trainers = [_Trainer(study, start, rate) for _ in parts]
    least, waited = math.inf, 0
    for passes in PASSES:
        total = 0.0
        for trainer, (training, judged) in zip(trainers, parts, strict=True):
            trainer.run(training, passes)
            total += trainer.loss(judged) * len(judged.patients)
        mean = total / len(records.patients)
        yield passes, mean
        waited = 0 if mean < least else waited + 1
        least = min(least, mean)
        if waited == _PATIENCE or not math.isfinite(mean):
            return


def _loss(study: Study, weights: NDArray[np.float32], records: Records) -> float:
    return _Trainer(study, weights, RATES[0]).loss(records)


class _Trainer:
    """One model on its way; ``run`` goes on until so many passes have been made in all."""

    def __init__(self, study: Study, start: NDArray[np.float32], rate: float) -> None:
        self._model = copy.deepcopy(catalogue.build(study))
        parameters.assign(self._model, start)
        self._losses: Losses = meaning(study.task).plain_losses()
        self._step = torch.optim.Adam([weight for _, weight in parameters.trainable(self._model)], lr=rate)
        self._done = 0

    def run(self, records: Records, passes: int) -> None:
        self._model.train()
        for number in range(self._done, passes):
            for chosen in _batches(len(records.patients), number):
                self._step.zero_grad()
                self._each(records, chosen).mean().backward()  # type: ignore[no-untyped-call]
                self._step.step()
        self._done = max(self._done, passes)

    def loss(self, records: Records) -> float:
        """Mean over records; infinite where it is no number."""
        self._model.eval()
        total, count = 0.0, len(records.patients)
        with torch.no_grad():
            for start in range(0, count, _EVALUATED_AT_ONCE):
                total += float(self._each(records, np.arange(start, min(start + _EVALUATED_AT_ONCE, count))).sum())
        mean = total / max(1, count)
        return mean if math.isfinite(mean) else math.inf

    def weights(self) -> NDArray[np.float32]:
        return parameters.flatten(self._model)

    def _each(self, records: Records, chosen: NDArray[np.int64]) -> Tensor:
        model: nn.Module = self._model
        return self._losses(model(torch.from_numpy(records.inputs[chosen])), torch.from_numpy(records.labels[chosen]))


def _batches(count: int, number: int) -> Iterator[NDArray[np.int64]]:
    """All records in an order that differs from pass to pass."""
    order = np.argsort(_mixed(np.arange(count, dtype=np.uint64), number), kind="stable")
    edges = [*range(0, count, BATCH), count]
    for start, end in itertools.pairwise(edges):
        yield order[start:end]


def _folds(patients: tuple[str, ...]) -> NDArray[np.int64]:
    """int64[n]: each patient's fold, all of a patient's records in one."""
    ids, patient = np.unique(np.array(patients, np.str_), return_inverse=True)
    order = np.argsort(_mixed(np.arange(len(ids), dtype=np.uint64), 0), kind="stable")
    fold = np.empty(len(ids), np.int64)
    fold[order] = np.arange(len(ids)) % FOLDS
    return fold[patient]


def _mixed(values: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    """A scramble of whole numbers (splitmix64, Steele et al. 2014): an order without a pattern, and without randomness."""
    mixed = values + np.uint64((number * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
