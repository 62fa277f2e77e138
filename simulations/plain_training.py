"""Local steps without privacy, for measuring what privacy costs: ordinary minibatch SGD. Exists in simulations only.

Batches are shuffled passes over the patients, neither Poisson samples nor clipped; one batched backward pass a step.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed.advance import Integers, ModelState, advance, state_hash
from medfed.client.approved import Approved
from medfed.client.local_optimizer import LocalRule, local_rule
from medfed.client.local_steps import Noise, local_steps
from medfed.client.trainer import Patients
from medfed.models import parameters, tasks
from medfed.privacy.keystream import Keystream
from medfed.seams import Entropy
from medfed.study import Study


def plain_update(
    approved: Approved, weights: NDArray[np.float32], entropy: Entropy, noise: Noise
) -> NDArray[np.float64]:
    """The way from ``weights`` through the study's local steps without privacy: float64[d].

    A step follows the mean over its patients of each one's mean loss. ``noise`` is not used; ``approved.model`` is, and is
    left with the weights after the last step.
    """
    study, patients, model = approved.study, approved.patients, approved.model.train()
    local, losses = local_steps(approved), tasks.meaning(study.task).plain_losses()
    rule = None if local.step is None else local_rule(local.step, noise_variance=0.0)
    inputs, labels = torch.from_numpy(patients.records.inputs), torch.from_numpy(patients.records.labels)
    parameters.assign(model, weights)
    trained: list[Tensor] = [parameter for _, parameter in parameters.trainable(model)]
    start = [parameter.detach().clone() for parameter in trained] if local.proximal else []
    batches = _batches(study, patients, Keystream(entropy.draw("shuffle", 32)))
    for _, (rows, shares) in zip(range(local.steps), batches, strict=False):
        if not len(rows):
            continue  # fewer patients than steps in a pass
        loss = (losses(model(inputs[rows]), labels[rows]) * shares).sum()
        gradients = torch.autograd.grad(loss, trained)
        if rule is not None:
            gradients = _followed(rule, gradients)
        with torch.no_grad():
            for gradient, weight, before in zip(gradients, trained, start, strict=False):  # none without a pull back
                gradient.add_(weight - before, alpha=local.proximal)
            torch._foreach_add_(trained, gradients, alpha=-local.learning_rate)
    return parameters.flatten(model).astype(np.float64) - weights


def _followed(rule: LocalRule, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The rule's step, tensor by tensor."""
    flat = torch.cat([gradient.flatten() for gradient in gradients]).numpy().astype(np.float64)
    step = torch.split(torch.from_numpy(rule(flat)).float(), [gradient.numel() for gradient in gradients])
    return tuple(part.view_as(gradient) for part, gradient in zip(step, gradients, strict=True))


def _batches(study: Study, patients: Patients, lots: Keystream) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each step and their shares of its loss, without end: 1 / sampling_rate steps make one pass over all patients.

    Of a patient with more records than the study's cap a fresh random subset of that size is used in each pass.
    """
    parts = max(1, round(1 / study.privacy.sampling_rate))
    cuts = np.arange(parts + 1, dtype=np.int64) * patients.count // parts  # into nearly equal numbers of patients
    while True:
        order = np.argsort(lots.words(patients.count))
        rows, places = _rows_in_order(patients, order, study.data.max_records_per_patient, lots)
        used = np.bincount(places, minlength=patients.count)
        ends = np.searchsorted(places, cuts)
        for part in range(parts):
            chosen = slice(ends[part], ends[part + 1])
            shares = 1.0 / (used[places[chosen]] * max(1, cuts[part + 1] - cuts[part]))
            yield torch.from_numpy(rows[chosen]), torch.from_numpy(shares.astype(np.float32))


def _rows_in_order(
    patients: Patients, order: NDArray[np.int64], cap: int, lots: Keystream
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Records, patient by patient in ``order``, at most ``cap`` of each; and the place in it of each one's patient."""
    place = np.empty(patients.count, np.int64)
    place[order] = np.arange(patients.count)
    rows = np.lexsort((lots.words(len(patients.unit)), place[patients.unit]))
    places = place[patients.unit[rows]]
    rank = np.arange(len(rows)) - np.searchsorted(places, places)
    return rows[rank < cap], places[rank < cap]


class SharedAdvance:
    """``advance`` worked out once for all hospitals of one process that stand at the same state with the same sum.

    The same bits, as it is the same function; the states are shared, too, and so are their hashes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = b""
        self._answer: ModelState | None = None

    def __call__(
        self,
        state: ModelState,
        total: Integers,
        study: Study,
        *,
        grid_exponent: int,
        nominal_patients: int,
        roster_patients: int | None = None,
        noise_variance: float | None = None,
    ) -> ModelState:
        settings = f"{grid_exponent} {nominal_patients} {roster_patients} {noise_variance}".encode()
        asked = hashlib.sha256(
            state_hash(study.hash(), state) + hashlib.sha256(total.data).digest() + settings
        ).digest()
        with self._lock:
            if self._answer is None or asked != self._asked:
                self._answer = advance(
                    state,
                    total,
                    study,
                    grid_exponent=grid_exponent,
                    nominal_patients=nominal_patients,
                    roster_patients=roster_patients,
                    noise_variance=noise_variance,
                )
                self._asked = asked
            return self._answer
