"""Time until an event that not everybody lives to have: discrete-time hazards, and Weibull times.

The loss of a record is minus the logarithm of the likelihood of what is known of it, and needs no other record. Predictions are
survival curves; risk, for the C-index, is minus the area under the curve up to the last edge.
"""

from __future__ import annotations

import math
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
from medfed.models.tasks.survival_scores import concordance, integrated_brier
from medfed.task_choice import Survival

MOST_UNITS = 1 << 40
_SHORTEST = 0.5  # a time of 0 units counts as half a unit: a Weibull time is never 0
_MOST_LOG_HAZARD = 30.0  # beyond, weights are absurd: a cumulative hazard stays a number
_EVENTS = {"0": 0, "1": 1}


@dataclass(frozen=True, slots=True)
class SurvivalMeaning:
    """Outputs: ``hazard`` logits float[n, edges]; ``weibull`` float[n, 1 or 2], the logarithms of scale and shape.

    Labels int64[n, 2]: the time in whole units, and 1 if the event came then, 0 if the record was censored.
    """

    task: Survival
    primary = "c_index"
    chance = 0.5

    def labels(self, data: DataContract, columns: Mapping[str, Sequence[str]], rows: Sequence[int]) -> Labels:
        times = _times(self.task.time, columns[self.task.time], rows)
        return np.stack([times, _events(self.task.event, columns[self.task.event], rows)], axis=1)

    def unlabelled(self, data: DataContract, count: int) -> Labels:
        return np.zeros((count, 2), np.int64)

    def made_up_labels(self, data: DataContract, generator: torch.Generator, count: int) -> Tensor:
        longest = min(MOST_UNITS, max(2, math.ceil(1.25 * self.task.edges[-1])))
        times = torch.empty(count, dtype=torch.int64).random_(longest, generator=generator)
        return torch.stack([times, torch.empty_like(times).random_(2, generator=generator)], dim=1)

    def strata(self, labels: Labels) -> Labels:
        """Whether the event came."""
        return labels[:, 1]

    def losses(self) -> Losses:
        def each(outputs: Tensor, labels: Tensor) -> Tensor:
            if self.task.head == "hazard":
                at_risk, came = self._intervals(labels, outputs)
                hazard: Tensor = _HazardLoss.apply(outputs, at_risk, came)  # type: ignore[no-untyped-call]
                return hazard
            log_time, event = self._log_time(labels, outputs)
            time: Tensor = _WeibullLoss.apply(outputs, log_time, event, self.task.shape)  # type: ignore[no-untyped-call]
            return time

        return each

    def plain_losses(self) -> Losses:
        def plain(outputs: Tensor, labels: Tensor) -> Tensor:
            if self.task.head == "hazard":
                return _hazard_losses(outputs, *self._intervals(labels, outputs))
            log_time, event = self._log_time(labels, outputs)
            shape = outputs[:, 1].exp() if self.task.shape is None else torch.full_like(log_time, self.task.shape)
            exponent = (shape * (log_time - outputs[:, 0])).clamp(max=_MOST_LOG_HAZARD)
            return exponent.exp() - event * (shape.log() + exponent - log_time)

        return plain

    def predictions(self, outputs: Floats) -> Floats:
        """The chance to be without the event at each of the edges, float64[n, edges]."""
        if self.task.head == "hazard":
            return np.asarray(np.cumprod(sigmoid(-outputs), axis=1), np.float64)
        edges = np.log(np.array(self.task.edges) / self.task.edges[-1])
        with np.errstate(over="ignore", invalid="ignore"):  # of absurd weights: whoever uses the result refuses it
            shape = np.exp(outputs[:, 1:]) if self.task.shape is None else self.task.shape
            hazards = np.exp(np.minimum(shape * (edges - outputs[:, :1]), _MOST_LOG_HAZARD))
        return np.asarray(np.exp(-hazards), np.float64)

    def metrics(self, predictions: Floats, labels: Labels) -> Scores:
        """``c_index`` (Harrell's) and ``integrated_brier`` (less is better)."""
        edges = np.array(self.task.edges)
        return {
            "c_index": concordance(labels[:, 0], labels[:, 1], -time_without_event(edges, predictions)),
            "integrated_brier": integrated_brier(edges, predictions, labels[:, 0], labels[:, 1]),
        }

    def _intervals(self, labels: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """bool[n, edges] each: whether an interval belongs to the loss, and whether the event came in it.

        Interval k reaches from the edge before (0 of the first) to its own, which belongs to it. A record that is censored
        inside an interval counts as having come through it if it came through half of it. *Source* Gensheimer and Narasimhan
        2019, equation 3 and the paragraph after it.
        """
        edges = torch.tensor(self.task.edges, dtype=torch.float64, device=outputs.device)
        before = torch.cat([edges.new_zeros(1), edges[:-1]])
        times = labels[:, :1].double()
        event = labels[:, 1:] == 1
        came = event & (times <= edges) & ((times > before) | (before == 0.0))
        through = torch.where(event, times > edges, times >= (before + edges) / 2.0)
        return through | came, came

    def _log_time(self, labels: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """float[n] each: the logarithm of the time in units of the last edge, and whether the event came."""
        times = labels[:, 0].to("cpu", torch.float64).clamp(min=_SHORTEST).numpy()
        log_time = torch.from_numpy(np.log(times / self.task.edges[-1]))
        return log_time.to(outputs), labels[:, 1].to(outputs)


def time_without_event(edges: Floats, curves: Floats) -> Floats:
    """The area under survival curves float64[n, edges] from 0, where they are 1, to the last edge: float64[n]."""
    before = np.concatenate([np.ones((len(curves), 1)), curves[:, :-1]], axis=1)
    return np.asarray(((before + curves) / 2.0 * np.diff(edges, prepend=0.0)).sum(1), np.float64)


# --------------------------------------------------------------------------------------------------------------- labels


def _times(name: str, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.int64]:
    times = np.empty(len(cells), np.int64)
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        text = cell.strip()
        try:
            value = math.nan if text in MISSING else float(text)
        except ValueError:
            value = math.nan
        if not 0.0 <= value <= MOST_UNITS:
            raise fault(row, name, "is not a time of 0 or more", "drop rows without one")
        if value != math.floor(value):  # rounded, an event could fall into another interval
            raise fault(row, name, "is no whole number", "give times in a finer unit, such as days; the study names it")
        times[record] = int(value)
    return times


def _events(name: str, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.int64]:
    events = np.empty(len(cells), np.int64)
    for record, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        found = _EVENTS.get(canonical(cell.strip()))
        if found is None:
            raise fault(row, name, "is neither 0 nor 1", "write 1 where the event came, 0 where it had not yet")
        events[record] = found
    return events


# --------------------------------------------------------------------------------------------------------------- losses


def _hazard_losses(logits: Tensor, counts: Tensor, came: Tensor) -> Tensor:
    """float[n]: added up interval by interval."""
    each = functional.binary_cross_entropy_with_logits(logits, came.to(logits.dtype), reduction="none")
    each = torch.where(counts, each, 0.0)
    total = each[:, 0]
    for place in range(1, each.shape[1]):
        total = total + each[:, place]
    return total


class _HazardLoss(torch.autograd.Function):
    """As ``_hazard_losses``; its gradient by elementwise operations, the same bits wherever a record stands."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, counts: Tensor, came: Tensor) -> Tensor:
        ctx.save_for_backward(logits, counts, came)
        return _hazard_losses(logits, counts, came)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, counts, came = ctx.saved_tensors  # type: ignore[attr-defined]
        hazard = torch.from_numpy(sigmoid(logits.numpy(force=True))).to(logits)
        return torch.where(counts, gradient[:, None] * (hazard - came.to(logits.dtype)), 0.0), None, None


class _WeibullLoss(torch.autograd.Function):
    """Minus log likelihood of a time t in units of the last edge: z = k (log t - log scale), k the shape; the cumulative hazard
    is exp(z) and the logarithm of the hazard log k + z - log t."""

    @staticmethod
    def forward(ctx: FunctionCtx, outputs: Tensor, log_time: Tensor, event: Tensor, shape: float | None) -> Tensor:
        ctx.save_for_backward(outputs, log_time, event)
        ctx.shape = shape  # type: ignore[attr-defined]
        powers, exponents = _weibull(outputs, log_time, shape)
        raised = torch.from_numpy(np.exp(exponents)).to(outputs)
        logs = torch.from_numpy(np.log(powers) + exponents).to(outputs)
        return raised - event * (logs - log_time)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        outputs, log_time, event = ctx.saved_tensors  # type: ignore[attr-defined]
        powers, exponents = _weibull(outputs, log_time, ctx.shape)  # type: ignore[attr-defined]
        came = event.numpy(force=True)
        along = np.exp(exponents) - came
        by_scale = -powers * along
        parts = [by_scale] if outputs.shape[1] == 1 else [by_scale, exponents * along - came]
        return gradient[:, None] * torch.from_numpy(np.stack(parts, 1)).to(outputs), None, None, None


def _weibull(
    outputs: Tensor, log_time: Tensor, shape: float | None
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The shape k and the exponent z of each record; absurd ones are bounded, so that a gradient stays a number."""
    found, logs = outputs.numpy(force=True), log_time.numpy(force=True)
    with np.errstate(over="ignore", invalid="ignore"):
        if shape is None:
            powers = np.exp(np.clip(found[:, 1], -_MOST_LOG_HAZARD, _MOST_LOG_HAZARD))
        else:
            powers = np.full_like(logs, shape)
        return powers, np.minimum(powers * (logs - found[:, 0]), _MOST_LOG_HAZARD)
