"""One class of several, of a whole record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.data_contract import DataContract
from medfed.models.cells import canonical, fault
from medfed.models.rowwise import sigmoid, softmax
from medfed.models.tasks.meaning import Floats, Labels, Losses, Scores
from medfed.models.tasks.scores import auc, average_precision, calibration_error, f1_macro, mean_known
from medfed.task_choice import Classification


def class_labels(name: str, classes: int, cells: Sequence[str], rows: Sequence[int]) -> Labels:
    """int64[n] of the column ``name``, whole numbers below ``classes``; else ``DataError`` MF-301."""
    labels = np.empty(len(cells), np.int64)
    allowed = {str(value): value for value in range(classes)}
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        try:
            labels[record] = allowed[canonical(cell.strip())]
        except (KeyError, OverflowError, ValueError):
            raise fault(row, name, f"is not a class 0..{classes - 1}", "drop rows without a label") from None
    return labels


@dataclass(frozen=True, slots=True)
class ClassificationMeaning:
    """Outputs are logits float[n, 1] of a binary task, else float[n, classes]; labels int64[n]."""

    task: Classification
    primary = "auc"
    chance = 0.5

    def labels(self, data: DataContract, columns: Mapping[str, Sequence[str]], rows: Sequence[int]) -> Labels:
        return class_labels(self.task.label, self.task.classes, columns[self.task.label], rows)

    def unlabelled(self, data: DataContract, count: int) -> Labels:
        return np.zeros(count, np.int64)

    def made_up_labels(self, data: DataContract, generator: torch.Generator, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64).random_(self.task.classes, generator=generator)

    def strata(self, labels: Labels) -> Labels:
        return labels

    def losses(self) -> Losses:
        weights = self._weights()
        adjustments = self._adjustments()
        gamma = self.task.focusing

        def binary(logits: Tensor, labels: Tensor) -> Tensor:
            seen = logits[:, 0] if adjustments is None else logits[:, 0] + adjustments.to(logits)
            return _apply(_BinaryLoss, seen, labels, gamma) * weights.to(logits)[labels]

        def multiclass(logits: Tensor, labels: Tensor) -> Tensor:
            seen = logits if adjustments is None else logits + adjustments.to(logits)
            return _apply(_MulticlassLoss, seen, labels, gamma) * weights.to(logits)[labels]

        return binary if self.task.kind == "binary" else multiclass

    def plain_losses(self) -> Losses:
        if self.task.focusing is not None:
            return self.losses()
        weights, adjustments = self._weights(), self._adjustments()

        def plain(logits: Tensor, labels: Tensor) -> Tensor:
            seen = logits if adjustments is None else logits + adjustments.to(logits)
            if self.task.kind == "binary":
                wanted = labels.to(logits.dtype)
                each = functional.binary_cross_entropy_with_logits(seen[:, 0], wanted, reduction="none")
            else:
                each = functional.cross_entropy(seen, labels, reduction="none")
            return each if self.task.class_weights is None else each * weights.to(logits)[labels]

        return plain

    def predictions(self, outputs: Floats) -> Floats:
        """The probability of each class, float64[n, classes]."""
        if self.task.kind == "binary":
            positive = sigmoid(outputs[:, :1])
            return np.asarray(np.concatenate([1 - positive, positive], 1), np.float64)
        return np.asarray(softmax(outputs), np.float64)

    def metrics(self, predictions: Floats, labels: Labels) -> Scores:
        """``auc`` and ``auprc``, means over classes against the rest, ``accuracy``, ``f1_macro`` of a multiclass task, ``f1``
        of class 1 of a binary one, ``brier`` (mean squared distance of the probabilities) and ``calibration_error``."""
        predicted = predictions.argmax(1)
        right = predicted == labels
        is_binary = self.task.kind == "binary"
        chosen = [1] if is_binary else list(range(self.task.classes))
        actual = labels[:, None] == np.arange(self.task.classes)
        squares = ((predictions - actual) ** 2)[:, chosen].sum(1)
        scores: Scores = {
            "auc": mean_known([auc(actual[:, index], predictions[:, index]) for index in chosen]),
            "accuracy": float(right.mean()) if len(labels) else None,
            "auprc": mean_known([average_precision(actual[:, index], predictions[:, index]) for index in chosen]),
            "brier": float(squares.mean()) if len(labels) else None,
            "calibration_error": calibration_error(right, predictions.max(1)) if len(labels) else None,
        }
        if is_binary:
            return {**scores, "f1": _f1(actual[:, 1], predicted == 1)}
        return {**scores, "f1_macro": f1_macro(labels, predicted)}

    def _weights(self) -> Tensor:
        return torch.tensor(self.task.class_weights or [1.0] * self.task.classes, dtype=torch.float64)

    def _adjustments(self) -> Tensor | None:
        """What the priors add to the logits: log prior, of a binary task log odds."""
        if self.task.priors is None:
            return None
        logs = torch.tensor(self.task.priors, dtype=torch.float64).log()
        return logs[1] - logs[0] if self.task.kind == "binary" else logs


def _f1(actual: NDArray[np.bool_], named: NDArray[np.bool_]) -> float | None:
    total = int(actual.sum()) + int(named.sum())
    return 2 * int((actual & named).sum()) / total if total else None


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Of rows of logits [n, k] and labels int64[n], each by itself: float[n], its gradients the same bits in any batch."""
    return _apply(_MulticlassLoss, logits, labels, None)


def _apply(function: type[torch.autograd.Function], logits: Tensor, labels: Tensor, gamma: float | None) -> Tensor:
    result: Tensor = function.apply(logits, labels, gamma)  # type: ignore[no-untyped-call]
    return result


class _BinaryLoss(torch.autograd.Function):
    """Cross-entropy of a logit; torch's own gradient may differ in the last place with a value's place in the batch.

    With ``gamma`` the focal loss (1 - p)^gamma times it, p the probability of the record's own class.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, gamma: float | None) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.gamma = gamma  # type: ignore[attr-defined]
        each = functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        if gamma is None:
            return each
        right = sigmoid((torch.where(labels == 1, logits, -logits)).numpy(force=True))
        return each * torch.from_numpy((1.0 - right) ** gamma).to(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors  # type: ignore[attr-defined]
        chance = torch.from_numpy(sigmoid(logits.numpy(force=True))).to(logits)
        along = chance - labels.to(logits.dtype)
        gamma = ctx.gamma  # type: ignore[attr-defined]
        if gamma is not None:
            along = along * _focus(torch.where(labels == 1, chance, 1.0 - chance), gamma)
        return gradient * along, None, None


class _MulticlassLoss(torch.autograd.Function):
    """Cross-entropy of logits [n, k]; see ``_BinaryLoss``."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, gamma: float | None) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.gamma = gamma  # type: ignore[attr-defined]
        each = functional.cross_entropy(logits, labels, reduction="none")
        if gamma is None:
            return each
        chances = torch.from_numpy(softmax(logits.numpy(force=True))).to(logits)
        return each * (1.0 - chances.gather(1, labels[:, None])[:, 0]) ** gamma

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors  # type: ignore[attr-defined]
        chances = torch.from_numpy(softmax(logits.numpy(force=True))).to(logits)
        along = chances - functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        gamma = ctx.gamma  # type: ignore[attr-defined]
        if gamma is not None:
            along = along * _focus(chances.gather(1, labels[:, None]), gamma)
        return gradient[:, None] * along, None, None


def _focus(right: Tensor, gamma: float) -> Tensor:
    """What the focal loss's gradient is of the cross-entropy's, p the chance of the right class:
    (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p."""
    wrong = torch.from_numpy(1.0 - right.numpy(force=True).astype(np.float64))
    p = torch.from_numpy(right.numpy(force=True).astype(np.float64))
    # gamma below 1 would divide by 0 where p is 1: there p log p (1 - p)^(gamma - 1) has the limit 0
    power = torch.where(wrong > 0, wrong, 1.0).numpy() ** (gamma - 1.0)
    second = gamma * p.numpy() * power * np.log(np.maximum(p.numpy(), 1e-300)) * (wrong.numpy() > 0)
    return torch.from_numpy(wrong.numpy() ** gamma - second).to(right)
