"""What a task means: its loss per record, its scores, its metrics. Every loss here is a sum over records."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.models.records import Records
from medfed.models.rowwise import sigmoid, softmax
from medfed.study import Task

Losses = Callable[[Tensor, Tensor], Tensor]


def losses(task: Task) -> Losses:
    """(logits float[n, outputs], labels int64[n]) -> float[n]: each record's own loss, separable by patient.

    Guarantee: the gradient by a record's logits is a function of that record alone, to the last bit.
    """
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


def probabilities(model: nn.Module, task: Task, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probability of each class, float64[n, classes]."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs)).double()
    if task.kind == "binary":
        positive = torch.sigmoid(logits[:, :1])
        return np.asarray(torch.cat([1 - positive, positive], 1).numpy(), np.float64)
    return np.asarray(torch.softmax(logits, 1).numpy(), np.float64)


def auc(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve by ranks (Mann-Whitney; ties count half); None when one class is absent."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def evaluate(model: nn.Module, task: Task, records: Records) -> dict[str, float | None]:
    """Metrics of a task on labelled records: ``auc`` (mean over classes against the rest) and ``accuracy``."""
    chances = probabilities(model, task, records.inputs)
    accuracy = float((chances.argmax(1) == records.labels).mean()) if len(records.labels) else None
    chosen = [1] if task.kind == "binary" else list(range(task.classes))
    areas = [auc(records.labels == index, chances[:, index]) for index in chosen]
    known = [area for area in areas if area is not None]
    return {"auc": sum(known) / len(known) if known else None, "accuracy": accuracy}
