"""Several yes-or-no findings of one record; what is not known of it takes no part."""

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
from medfed.models.cells import MISSING, canonical, fault
from medfed.models.rowwise import sigmoid
from medfed.models.tasks.meaning import Floats, Labels, Losses, Scores
from medfed.models.tasks.scores import auc, average_precision, calibration_error, mean_known
from medfed.task_choice import MultiLabel

UNKNOWN = -1
_FINDINGS = {"0": 0, "1": 1}


@dataclass(frozen=True, slots=True)
class MultiLabelMeaning:
    """Outputs are log-odds float[n, k], labels int64[n, k]: 0, 1, or -1 where a finding is not known.

    A record's loss is the mean over its known findings, 0 where none is known.
    """

    task: MultiLabel
    primary = "auc"
    chance = 0.5

    def labels(self, data: DataContract, columns: Mapping[str, Sequence[str]], rows: Sequence[int]) -> Labels:
        found = [_column(name, columns[name], rows) for name in self.task.labels]
        return np.stack(found, axis=1)

    def unlabelled(self, data: DataContract, count: int) -> Labels:
        return np.full((count, self.task.outputs), UNKNOWN, np.int64)

    def made_up_labels(self, data: DataContract, generator: torch.Generator, count: int) -> Tensor:
        return torch.empty(count, self.task.outputs, dtype=torch.int64).random_(UNKNOWN, 2, generator=generator)

    def strata(self, labels: Labels) -> Labels:
        """Whether any finding is there."""
        return np.asarray((labels == 1).any(1), np.int64)

    def losses(self) -> Losses:
        weights = self._weights()

        def each(logits: Tensor, labels: Tensor) -> Tensor:
            result: Tensor = _MaskedLoss.apply(logits, labels, weights.to(logits))  # type: ignore[no-untyped-call]
            return result

        return each

    def plain_losses(self) -> Losses:
        weights = self._weights()
        return lambda logits, labels: _masked_losses(logits, labels, weights.to(logits))

    def predictions(self, outputs: Floats) -> Floats:
        """The probability of each finding, float64[n, k]."""
        return np.asarray(sigmoid(outputs), np.float64)

    def metrics(self, predictions: Floats, labels: Labels) -> Scores:
        """``auc``, ``auprc``, ``f1`` (of probabilities above one half), ``brier`` and ``calibration_error``: the mean over the
        findings of which they can be said, each over the records of which the finding is known."""
        each = [self._of_finding(predictions[:, place], labels[:, place]) for place in range(self.task.outputs)]
        return {name: mean_known([scores[name] for scores in each]) for name in each[0]}

    def _of_finding(self, chances: Floats, labels: Labels) -> Scores:
        known = labels != UNKNOWN
        chance, actual = chances[known], labels[known] == 1
        named = chance > 0.5
        total = int(actual.sum()) + int(named.sum())
        return {
            "auc": auc(actual, chance),
            "auprc": average_precision(actual, chance),
            "f1": 2 * int((actual & named).sum()) / total if total else None,
            "brier": float(((chance - actual) ** 2).mean()) if len(actual) else None,
            "calibration_error": calibration_error(actual == named, np.maximum(chance, 1 - chance)),
        }

    def _weights(self) -> Tensor:
        return torch.tensor(self.task.positive_weights or [1.0] * self.task.outputs, dtype=torch.float64)


def _column(name: str, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.int64]:
    """int64[n]; else ``DataError`` MF-301."""
    labels = np.empty(len(cells), np.int64)
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        text = cell.strip()
        found = UNKNOWN if text in MISSING else _FINDINGS.get(canonical(text))
        if found is None:
            raise fault(row, name, "is neither 0 nor 1", "leave the cell empty where it is not known")
        labels[record] = found
    return labels


def _masked_losses(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """float[n]: added up finding by finding."""
    known = labels != UNKNOWN
    each = functional.binary_cross_entropy_with_logits(logits, (labels == 1).to(logits.dtype), reduction="none")
    each = torch.where(known, each * torch.where(labels == 1, weights, 1.0), 0.0)
    total = each[:, 0]
    for place in range(1, each.shape[1]):
        total = total + each[:, place]
    return total / known.sum(1).clamp(min=1).to(logits.dtype)


class _MaskedLoss(torch.autograd.Function):
    """As ``_masked_losses``; its gradient by elementwise operations, the same bits wherever a record stands."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels, weights)
        return _masked_losses(logits, labels, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        known = labels != UNKNOWN
        chance = torch.from_numpy(sigmoid(logits.numpy(force=True))).to(logits)
        along = (chance - (labels == 1).to(logits.dtype)) * torch.where(labels == 1, weights, 1.0)
        share = gradient / known.sum(1).clamp(min=1).to(logits.dtype)
        return torch.where(known, share[:, None] * along, 0.0), None, None
