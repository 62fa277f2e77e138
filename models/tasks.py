"""What a task means: its loss per record, its scores, its metrics. Every loss here is a sum over records."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.errors import UnsupportedModel
from medfed.models.records import Records
from medfed.models.rowwise import sigmoid, softmax
from medfed.study import Task

Losses = Callable[[Tensor, Tensor], Tensor]

_VALUES_AT_ONCE = 1 << 17  # encoded values that a model takes in one call outside training

SEPARABLE_LOSSES: dict[str, str] = {
    "binary": "cross-entropy of a record's own logit and label, times a public weight",
    "multiclass": "cross-entropy of a record's own logits and label, times a public weight",
}
"""Every loss by kind of task, and why it keeps patients apart (``models/separability`` says what that means)."""


def losses(task: Task) -> Losses:
    """(logits float[n, outputs], labels int64[n]) -> float[n]: each record's own loss, separable by patient.

    Guarantee: the gradient by a record's logits is a function of that record alone, to the last bit.
    Raises ``UnsupportedModel`` (MF-160) for a kind of task whose loss is not known to keep patients apart.
    """
    if task.kind not in SEPARABLE_LOSSES:
        what = f"the loss of a {task.kind} task is not known to keep patients apart"
        raise UnsupportedModel(160, what, f"use one of {', '.join(SEPARABLE_LOSSES)}")
    weights = torch.tensor(task.class_weights or [1.0] * task.classes, dtype=torch.float64)

    def binary(logits: Tensor, labels: Tensor) -> Tensor:
        return _apply(_BinaryLoss, logits[:, 0], labels) * weights.to(logits)[labels]

    def multiclass(logits: Tensor, labels: Tensor) -> Tensor:
        return _apply(_MulticlassLoss, logits, labels) * weights.to(logits)[labels]

    return binary if task.kind == "binary" else multiclass


def _apply(function: type[torch.autograd.Function], logits: Tensor, labels: Tensor) -> Tensor:
    result: Tensor = function.apply(logits, labels)  # type: ignore[no-untyped-call]
    return result


class _BinaryLoss(torch.autograd.Function):
    """Cross-entropy of a logit; torch's own gradient may differ in the last place with a value's place in the batch."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors  # type: ignore[attr-defined]
        chance = torch.from_numpy(sigmoid(logits.numpy(force=True))).to(logits)
        return gradient * (chance - labels.to(logits.dtype)), None


class _MulticlassLoss(torch.autograd.Function):
    """Cross-entropy of logits [n, k]; see ``_BinaryLoss``."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return functional.cross_entropy(logits, labels, reduction="none")

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors  # type: ignore[attr-defined]
        chances = torch.from_numpy(softmax(logits.numpy(force=True))).to(logits)
        return gradient[:, None] * (chances - functional.one_hot(labels, logits.shape[1]).to(logits.dtype)), None


def probabilities(
    model: nn.Module,
    task: Task,
    inputs: NDArray[np.float32] | NDArray[np.int64],
    *,
    at_once: int | None = None,
) -> NDArray[np.float64]:
    """Probability of each class, float64[n, classes], of encoded records [n, ...].

    ``at_once``: how many records a call of the model takes; None for a few, to bound memory. With 1 every call has one shape, so
    that a record's probabilities are the same bits whatever other records there are.
    """
    if not len(inputs):
        return np.zeros((0, task.classes))
    at_once = at_once or max(1, _VALUES_AT_ONCE // max(1, inputs[0].size))
    model.eval()
    with torch.no_grad():
        parts = [model(torch.from_numpy(inputs[start : start + at_once])) for start in range(0, len(inputs), at_once)]
        logits = torch.cat(parts).double().numpy()
    if task.kind == "binary":
        positive = sigmoid(logits[:, :1])
        return np.asarray(np.concatenate([1 - positive, positive], 1), np.float64)
    return np.asarray(softmax(logits), np.float64)


def auc(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve by ranks (Mann-Whitney; ties count half); None when one class is absent."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def f1_macro(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> float | None:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), over the classes that occur or are predicted; None without records."""
    scores = []
    for index in np.union1d(labels, predicted):
        actual, named = labels == index, predicted == index
        scores.append(2 * int((actual & named).sum()) / (int(actual.sum()) + int(named.sum())))
    return sum(scores) / len(scores) if scores else None


def evaluate(model: nn.Module, task: Task, records: Records) -> dict[str, float | None]:
    """Metrics of a task on labelled records: ``auc`` (mean over classes against the rest), ``accuracy``, and of a
    multiclass task ``f1_macro``."""
    return metrics(task, probabilities(model, task, records.inputs), records.labels)


def metrics(task: Task, chances: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float | None]:
    """As ``evaluate``, from the probability of each class, float64[n, classes], and the labels int64[n]."""
    predicted = chances.argmax(1)
    accuracy = float((predicted == labels).mean()) if len(labels) else None
    chosen = [1] if task.kind == "binary" else list(range(task.classes))
    areas = [auc(labels == index, chances[:, index]) for index in chosen]
    known = [area for area in areas if area is not None]
    scores = {"auc": sum(known) / len(known) if known else None, "accuracy": accuracy}
    return scores if task.kind == "binary" else {**scores, "f1_macro": f1_macro(labels, predicted)}
