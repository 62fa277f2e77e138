"""The baseline that privacy and federation are measured against: the same model on everybody's data, without privacy.

It is the study's own recipe (model, first weights, server step, rates, averaging of the last rounds) on the pooled
training patients, without clipping, sampling, noise or integers that matter. A recipe made for few noisy rounds may stop
long before it has converged, and training on may overfit a small cohort: so the baseline trains for whichever of
``lengths(study)`` scores best in a cross-validation over the pooled *training* patients; of equals the longer. Test
patients have no say in it, nor has the federated result. Its rates are the recipe's: it is not the best model that
anybody could make of these data, but what this study's model gives without privacy.

Of a deep model, and of a study that sums updates, the recipe tells little without clipping or without hospitals apart, and
such a search would cost far more than the federation. There the baseline is ordinary training: Adam at one usual rate in
batches of ``BATCH``, for as many passes as scored best on a held-out fifth of the training patients. Nothing else is tuned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from medfed import standardization
from medfed.advance import ModelState, advance, first_state, released_weights
from medfed.models import catalogue, parameters, tasks
from medfed.models.records import Records
from medfed.simulations.threads import one_torch_thread
from medfed.study import Study
from medfed.task_choice import Task

BATCH = 64
RATE = 0.002
MOST_PASSES = 20
MOST_RECORDS = 40_000  # seen in one ordinary training, whatever the number of passes; but one pass at least
MULTIPLES = (1, 10, 40)
MOST_ROUNDS = 3000  # a longer training is not tried, unless the recipe itself is longer
FOLDS = 5
_EXPONENT = 32  # fixed-point steps of 2^-32: finer than the float32 of the gradient, wide enough for 2^31 in a sum


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """``weights``: float32[d]; ``rounds``: the length that was chosen of ``lengths``, by their ``validation`` (the task's
    primary metric), in rounds of the study's recipe, or in passes of ordinary training (``is_ordinary``).
    """

    weights: NDArray[np.float32]
    rounds: int
    lengths: tuple[int, ...]
    validation: tuple[float | None, ...]
    is_ordinary: bool = False


def lengths(study: Study) -> tuple[int, ...]:
    """Rounds to choose from, ascending: the recipe's own, and 10 and 40 times as many (at most ``MOST_ROUNDS``)."""
    recipe = study.training.rounds
    return tuple(sorted({min(multiple * recipe, max(recipe, MOST_ROUNDS)) for multiple in MULTIPLES}))


def pooled_records(parts: Sequence[Records]) -> Records:
    """All hospitals' records in one place."""
    return Records(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.labels for part in parts]),
        tuple(patient for part in parts for patient in part.patients),
    )


def train_pooled(study: Study, first: NDArray[np.float32], records: Records) -> Pooled:
    """Train the baseline on ``records``, the pooled training patients, from first weights float32[d]."""
    if study.training.aggregate == "update" or not catalogue.is_rowwise(study):
        with one_torch_thread():
            return _train_ordinarily(study, first, records)
    rounds = lengths(study)
    with one_torch_thread():
        scores = _validate(study, first, records, rounds)
        best = max(range(len(rounds)), key=lambda index: (_or_worst(scores[index]), index))
        weights = _path(study, first, records, rounds[: best + 1])[-1]
    return Pooled(weights, rounds[best], rounds, scores)


def score(study: Study, weights: NDArray[np.float32], records: Records) -> float | None:
    """The task's primary metric of a model's weights float32[d] on records."""
    model = catalogue.build(study)
    parameters.assign(model, weights)
    return tasks.evaluate(model, study.task, records)[tasks.meaning(study.task).primary]


def _or_worst(value: float | None) -> float:
    return -np.inf if value is None else value


def _validate(
    study: Study, first: NDArray[np.float32], records: Records, rounds: Sequence[int]
) -> tuple[float | None, ...]:
    """Mean metric over folds for each length, 0 for a training that diverged; None where no fold holds two classes."""
    fold = _folds(study.task, records)
    found: list[list[float]] = [[] for _ in rounds]
    for number in range(FOLDS):
        held = fold == number
        if not held.any() or held.all():
            continue
        for index, weights in enumerate(_path(study, first, records.subset(~held), rounds)):
            value = score(study, weights, records.subset(held)) if np.isfinite(weights).all() else 0.0
            if value is not None:
                found[index].append(value)
    return tuple(float(np.mean(values)) if values else None for values in found)


def _folds(task: Task, records: Records) -> NDArray[np.int64]:
    """The fold of each record, int64[n]: patients dealt by the hash of their id, within each class, whole patients only."""
    label: dict[str, int] = {}
    for patient, value in zip(records.patients, tasks.meaning(task).strata(records.labels).tolist(), strict=True):
        label[patient] = max(value, label.get(patient, 0))
    order = sorted(label, key=lambda patient: (label[patient], hashlib.sha256(patient.encode()).digest()))
    fold = {patient: place % FOLDS for place, patient in enumerate(order)}
    return np.array([fold[patient] for patient in records.patients], np.int64)


def _path(
    study: Study, first: NDArray[np.float32], records: Records, ascending: Sequence[int]
) -> list[NDArray[np.float32]]:
    """One training run, and the model that would be released had it been planned for each of these lengths."""
    state = first_state(first, study)
    if study.statistics is not None:  # nobody's noise
        state, records = _standardized(study, state, records)
    step = _Step(study, records)
    released = []
    for rounds in ascending:
        training = study.training.model_copy(update={"rounds": rounds})
        planned = step.study.model_copy(update={"training": training})
        if training.ema_decay is None:
            state = replace(state, tail=np.zeros_like(state.tail))
        while state.completed_rounds < planned.sums_to_train and np.isfinite(state.weights).all():
            state = step.advance(state, planned)
        whole = state.completed_rounds == planned.sums_to_train
        released.append(released_weights(state, planned) if whole else np.full_like(first, np.nan))
    return released


def _standardized(study: Study, state: ModelState, records: Records) -> tuple[ModelState, Records]:
    """The state after a round of exact statistics, and the records as the model takes them then."""
    ids, unit = np.unique(np.array(records.patients, np.str_), return_inverse=True)
    inputs = np.asarray(records.inputs, np.float32)
    found = standardization.from_sum(study, standardization.shares(study, inputs, unit, len(ids)).sum(axis=0))
    changed = standardization.standardized(study, found, inputs)
    return replace(state, completed_rounds=1, statistics=found), Records(changed, records.labels, records.patients)


class _Step:
    """Full-batch gradients of the mean over patients of each one's mean loss, handed to the federation's server step."""

    def __init__(self, study: Study, records: Records) -> None:
        # every patient in every round, and nobody's noise
        self.study = study.model_copy(update={"privacy": study.privacy.model_copy(update={"sampling_rate": 1.0})})
        self._model = catalogue.build(study).train()
        self._losses = tasks.losses(study.task)
        self._inputs = torch.from_numpy(records.inputs)
        self._labels = torch.from_numpy(records.labels)
        _, owner, counts = np.unique(np.array(records.patients, np.str_), return_inverse=True, return_counts=True)
        self._patients = len(counts)
        self._shares = torch.from_numpy((1.0 / counts[owner]).astype(np.float32))
        self._weights = [weight for _, weight in parameters.trainable(self._model)]

    def advance(self, state: ModelState, planned: Study) -> ModelState:
        parameters.assign(self._model, state.weights.astype(np.float32))
        loss = (self._losses(self._model(self._inputs), self._labels) * self._shares).sum()
        parts = torch.autograd.grad(loss, self._weights)
        gradient = torch.cat([part.flatten() for part in parts]).numpy().astype(np.float64)
        if not np.isfinite(gradient).all():
            return replace(state, weights=np.full_like(state.weights, np.nan))
        units = np.rint(np.clip(gradient, -(2.0**30), 2.0**30) * 2.0**_EXPONENT).astype(np.int64)
        return advance(
            state, units, planned, grid_exponent=_EXPONENT, nominal_patients=self._patients, noise_variance=0.0
        )


# ------------------------------------------------------------------------------------------------------ ordinary training


def _train_ordinarily(study: Study, first: NDArray[np.float32], records: Records) -> Pooled:
    passes = min(MOST_PASSES, max(1, MOST_RECORDS // max(1, len(records.labels))))
    held = _folds(study.task, records) == 0
    scores: tuple[float | None, ...] = (None,) * passes
    if held.any() and not held.all():
        tried = _passes(study, first, records.subset(~held), passes)
        scores = tuple(score(study, weights, records.subset(held)) for weights in tried)
    best = max(range(passes), key=lambda index: (_or_worst(scores[index]), index))
    *_, weights = _passes(study, first, records, best + 1)
    return Pooled(weights, best + 1, tuple(range(1, passes + 1)), scores, is_ordinary=True)


def _passes(study: Study, first: NDArray[np.float32], records: Records, passes: int) -> Iterator[NDArray[np.float32]]:
    """The weights float32[d] after each pass over the records, in an order that a fixed seed shuffles."""
    model = catalogue.build(study)
    parameters.assign(model, first)
    weights = [weight for _, weight in parameters.trainable(model)]
    losses, optimizer = tasks.losses(study.task), torch.optim.Adam(weights, lr=RATE)
    inputs, labels = torch.from_numpy(records.inputs), torch.from_numpy(records.labels)
    shuffle = np.random.default_rng(0)
    for _ in range(passes):
        model.train()
        order = torch.from_numpy(shuffle.permutation(len(labels)))
        for start in range(0, len(labels), BATCH):
            rows = order[start : start + BATCH]
            optimizer.zero_grad()
            torch.autograd.backward(losses(model(inputs[rows]), labels[rows]).mean())
            optimizer.step()
        yield parameters.flatten(model)
