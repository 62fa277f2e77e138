"""Matrix products that write to a tape: what linear layers and attention's projections are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.tape import Tape


def product(tape: Tape, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``inputs @ weight.T + bias``, parameters both: inputs [n, ..., i], weight [o, i] -> [n, ..., o]."""
    result: Tensor = _Product.apply(inputs, weight, bias, tape)  # type: ignore[no-untyped-call]
    return result


_LANES = 16


def steady_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight.T + bias`` in whole vector registers.

    A processor's kernels compute the odd end of a matrix by other code, by its place and by where in memory a row begins:
    then no batch of more than one record would pass ``slot_test``. Zeros beside the numbers change none of them.
    """
    outputs, width = weight.shape
    if outputs % _LANES == 0 and width % _LANES == 0:
        return functional.linear(inputs, weight, bias)
    filled = functional.pad(weight, (0, -width % _LANES, 0, -outputs % _LANES))
    result = functional.linear(_filled(inputs), filled)[..., :outputs]
    return result if bias is None else result + bias


def outer_sums(inputs: Tensor, gradient: Tensor, kept: Tensor | None = None) -> Tensor:
    """sum_k g_k a_k^T of each: inputs [n, k, i], gradient [n, k, o] -> [n, o', i'], in whole registers.

    o' and i' are o and i or a little more: zeros follow. ``kept``: an earlier call's result, to be written over if it fits.
    """
    left, right = _filled(gradient), _filled(inputs)
    shape = (len(left), left.shape[2], right.shape[2])
    if kept is None or kept.shape != shape or kept.dtype != inputs.dtype:
        kept = inputs.new_empty(shape)
    return torch.bmm(left.transpose(1, 2), right, out=kept)


def _filled(values: Tensor) -> Tensor:
    spare = -values.shape[-1] % _LANES
    return functional.pad(values, (0, spare)) if spare else values


def bias_samples(gradient: Tensor) -> Tensor:
    """[n, ..., o] -> the gradient of a bias, record by record: [n, o]."""
    return gradient if gradient.dim() == 2 else gradient.flatten(1, -2).sum(1, dtype=_accurate_type(gradient))


def _accurate_type(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def cast(tape: Tape, *values: Tensor) -> list[Tensor]:
    """To the tape's dtype, where it has one."""
    return [each if tape.dtype is None else each.detach().to(tape.dtype) for each in values]


def cast_if_any(tape: Tape, value: Tensor | None) -> Tensor | None:
    return None if value is None else cast(tape, value)[0]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, tape: Tape
    ) -> Tensor:
        used, by = cast(tape, inputs, weight)
        ctx.save_for_backward(used, by)
        ctx.layer = weight, bias, tape, inputs.dtype  # type: ignore[attr-defined]
        return steady_linear(used, by, cast_if_any(tape, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, by = ctx.saved_tensors  # type: ignore[attr-defined]
        weight, bias, tape, dtype = ctx.layer  # type: ignore[attr-defined]
        if weight.requires_grad:
            tape.outer(weight, inputs, gradient)
        if bias is not None and bias.requires_grad:
            tape.samples(bias, bias_samples(gradient))
        by_inputs = steady_linear(gradient, by.T).to(dtype) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        return by_inputs, None, None, None
