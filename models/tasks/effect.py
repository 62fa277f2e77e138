"""What a treatment changes: the chance of an outcome without it and with it, of which each record shows only one."""

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
from medfed.models.cells import fault
from medfed.models.rowwise import sigmoid
from medfed.models.tasks.classification import class_labels
from medfed.models.tasks.meaning import Floats, Labels, Losses, Scores
from medfed.models.tasks.scores import auc
from medfed.task_choice import Effect

MILLION = 1_000_000
"""True chances are kept as whole millionths."""


@dataclass(frozen=True, slots=True)
class EffectMeaning:
    """Outputs float[n, 2]: the outcome's logit without and with the treatment.

    Labels int64[n, 2]: outcome and treatment, 0 or 1; of semi-synthetic data [n, 4], behind them the outcome's true chance
    without and with the treatment in millionths, which no loss looks at.
    """

    task: Effect

    @property
    def primary(self) -> str:
        """Where the truth is known, how right the order of the effects is; else how right what happened was foretold."""
        return "auc" if self.task.truth is None else "rank_of_effect"

    @property
    def chance(self) -> float:
        return 0.5 if self.task.truth is None else 0.0

    def labels(self, data: DataContract, columns: Mapping[str, Sequence[str]], rows: Sequence[int]) -> Labels:
        found = [class_labels(name, 2, columns[name], rows) for name in (self.task.outcome, self.task.treatment)]
        found += [_chances(name, columns[name], rows) for name in self.task.truth or []]
        return np.stack(found, axis=1)

    def unlabelled(self, data: DataContract, count: int) -> Labels:
        return np.zeros((count, len(self.task.columns)), np.int64)

    def made_up_labels(self, data: DataContract, generator: torch.Generator, count: int) -> Tensor:
        return torch.empty(count, len(self.task.columns), dtype=torch.int64).random_(2, generator=generator)

    def strata(self, labels: Labels) -> Labels:
        """The four kinds of record: outcome and treatment."""
        return 2 * labels[:, 0] + labels[:, 1]

    def losses(self) -> Losses:
        def each(logits: Tensor, labels: Tensor) -> Tensor:
            result: Tensor = _FactualLoss.apply(logits, labels)  # type: ignore[no-untyped-call]
            return result

        return each

    def plain_losses(self) -> Losses:
        return _factual_losses

    def predictions(self, outputs: Floats) -> Floats:
        """The chance of the outcome without and with the treatment, and the difference: float64[n, 3]."""
        chances = np.asarray(sigmoid(outputs), np.float64)
        return np.concatenate([chances, chances[:, 1:] - chances[:, :1]], axis=1)

    def metrics(self, predictions: Floats, labels: Labels) -> Scores:
        """``auc`` of the outcome in the arm that a record was in, and ``average_effect``. Where the truth is known also
        ``rank_of_effect`` (Spearman), ``effect_gain``, ``effect_error`` and ``average_effect_error``, all of the difference of
        both arms' chances, and ``unadjusted_error``: what ``unadjusted_difference`` misses the average effect by.

        ``effect_error``: root of the mean squared distance from the true effects (PEHE, Hill 2011). ``effect_gain``: 1 minus the
        share that its square is of that of the plain difference between treated and others, taken for everybody's effect: 0 says
        no better than that, 1 is perfect.
        """
        outcome, treated = labels[:, 0], labels[:, 1]
        factual = predictions[np.arange(len(labels)), treated]
        effects = effects_of(predictions)
        scores: Scores = {
            "auc": auc(outcome == 1, factual),
            "average_effect": float(effects.mean()) if len(labels) else None,
        }
        return scores if self.task.truth is None else {**scores, **_against_truth(effects, labels)}


def effects_of(predictions: Floats) -> Floats:
    """float64[n]: the outcome's chance with the treatment minus that without it."""
    return np.asarray(predictions[:, 2], np.float64)


def unadjusted_difference(labels: Labels) -> float | None:
    """The rate of the outcome among the treated minus that among the others; None without both. Confounding is in it."""
    outcome, treated = labels[:, 0], labels[:, 1] == 1
    if not treated.any() or treated.all():
        return None
    return float(outcome[treated].mean() - outcome[~treated].mean())


def _against_truth(effects: Floats, labels: Labels) -> Scores:
    true = (labels[:, 3] - labels[:, 2]) / MILLION
    plain = unadjusted_difference(labels)
    error = float(((effects - true) ** 2).mean()) if len(labels) else None
    trivial = None if plain is None else float(((plain - true) ** 2).mean())
    return {
        "rank_of_effect": rank_correlation(effects, true),
        "effect_gain": None if error is None or not trivial else 1.0 - error / trivial,
        "effect_error": None if error is None else error**0.5,
        "average_effect_error": float(abs(effects.mean() - true.mean())) if len(labels) else None,
        "unadjusted_error": None if plain is None else float(abs(plain - true.mean())),
    }


def rank_correlation(guessed: Floats, true: Floats) -> float | None:
    """Spearman's, ties with their mean rank; 0 where all guesses are alike, None where all true values are."""
    first, second = (_ranks(values) for values in (guessed, true))
    spread = float(np.sqrt((first**2).sum() * (second**2).sum()))
    if not second.any():
        return None
    return float((first * second).sum()) / spread if spread else 0.0


def _ranks(values: Floats) -> Floats:
    """Ranks minus their mean, float64[n]; of equal values the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2, np.float64)


def _chances(name: str, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.int64]:
    found = np.empty(len(cells), np.int64)
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        try:
            value = float(cell)
        except ValueError:
            value = -1.0
        if not 0.0 <= value <= 1.0:
            raise fault(row, name, "is not a chance from 0 to 1", "leave truth out of the task where it is not known")
        found[record] = round(value * MILLION)
    return found


def _factual_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the arm that a record was in, float[n]."""
    own = torch.where(labels[:, 1] == 1, logits[:, 1], logits[:, 0])
    return functional.binary_cross_entropy_with_logits(own, labels[:, 0].to(logits.dtype), reduction="none")


class _FactualLoss(torch.autograd.Function):
    """As ``_factual_losses``; its gradient by elementwise operations, the same bits wherever a record stands."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return _factual_losses(logits, labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors  # type: ignore[attr-defined]
        chance = torch.from_numpy(sigmoid(logits.numpy(force=True))).to(logits)
        along = gradient[:, None] * (chance - labels[:, :1].to(logits.dtype))
        arms = torch.arange(2, device=logits.device)
        return torch.where(labels[:, 1:2] == arms, along, 0.0), None
