"""Layers whose result for one record depends on that record alone, to the last bit.

A matrix product may add up a row in another order when the batch has one row more: that changes the last place. Whoever
chooses the weights (the coordinator chooses the first model and, through the sums it relays, all others) can blow that
last place up to a changed sign, for every patient of the batch at once. Then one patient more would move the clipped sum
by far more than the clipping norm, whatever the precision. So private models add up term by term, by elementwise
products and sums, each of which IEEE 754 rounds alike wherever it stands in a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from medfed.tape import Tape


class RowLinear(nn.Linear):
    """``nn.Linear`` for inputs [n, in] -> [n, out], added up input by input.

    Guarantee: row i of the result, and of the gradient by the inputs, is the same bits in every batch that holds it.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = _RowLinear.apply(inputs, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result

    def taped_forward(self, tape: Tape, *inputs: Tensor) -> Tensor:
        """As ``forward``, for whoever takes gradients by record (``medfed/tape.py``)."""
        result: Tensor = _TapedRowLinear.apply(inputs[0], self.weight, self.bias, tape)  # type: ignore[no-untyped-call]
        return result


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _by_inputs(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        # sums over the batch: for training without privacy; private gradients are taken record by record before this
        return _by_outputs(gradient, inputs, weight), gradient.T @ inputs, gradient.sum(0)


class _TapedRowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, weight: nn.Parameter, bias: nn.Parameter, tape: Tape) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer = weight, bias, tape  # type: ignore[attr-defined]
        return _by_inputs(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors  # type: ignore[attr-defined]
        weight, bias, tape = ctx.layer  # type: ignore[attr-defined]
        if weight.requires_grad:
            tape.outer(weight, inputs, gradient)
        if bias.requires_grad:
            tape.samples(bias, gradient)
        needed = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        return _by_outputs(gradient, inputs, weight) if needed else None, None, None, None


def _by_inputs(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """inputs @ weight.T + bias, input by input."""
    out = bias.expand(len(inputs), -1).clone()
    for column in range(inputs.shape[1]):
        out += inputs[:, column : column + 1] * weight[:, column]
    return out


def _by_outputs(gradient: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight, output by output."""
    by_inputs = torch.zeros_like(inputs)
    for row in range(weight.shape[0]):
        by_inputs += gradient[:, row : row + 1] * weight[row]
    return by_inputs


def sigmoid(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """1 / (1 + exp(-v)) without overflow, elementwise and alike wherever a value stands."""
    small = np.exp(-np.abs(values))
    return np.asarray(np.where(values >= 0, 1 / (1 + small), small / (1 + small)))


def softmax(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Softmax over the columns of [n, k], added up column by column."""
    # of weights so absurd that values overflow: whoever uses the result refuses it, or takes it for nothing
    with np.errstate(over="ignore", invalid="ignore"):
        raised = np.exp(values - values.max(axis=1, keepdims=True))
        total = np.zeros(len(values), values.dtype)
        for column in range(values.shape[1]):
            total += raised[:, column]
        return np.asarray(raised / total[:, None])
