"""Group, layer and RMS norm on a tape: the gradients of scale and shift are two numbers a channel, formed at once.

They cost little beside torch's own backward pass. Of a group norm torch sums them over a batch; shown n records of c channels
as one record of n * c channels, it gives every record its own (one core, float32, 64 x 32 x 28 x 28: 0.9 ms, where forming
them beside torch's pass takes 2.8). Such sums are short chains in float32: over more than ``_LONG`` positions they are taken
here instead, each record by itself, by torch's pairwise sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.tape import Tape

_LONG = 2048
_BLOCK_BYTES = 1 << 18

Forward = Callable[[Tensor], Tensor]


def taped_group_norm(layer: nn.GroupNorm, tape: Tape) -> Forward:
    """What takes the place of ``layer.forward``: [n, channels, ...] -> the same shape."""
    weight, bias = layer.weight, layer.bias

    def forward(inputs: Tensor) -> Tensor:
        inputs = _accurate(inputs, weight)
        if _is_plain(weight, bias):
            return functional.group_norm(inputs, layer.num_groups, weight, bias, layer.eps)
        result: Tensor = _GroupNorm.apply(inputs, weight, bias, layer.num_groups, layer.eps, tape)  # type: ignore[no-untyped-call]
        return result

    return forward


def taped_layer_norm(layer: nn.LayerNorm, tape: Tape) -> Forward:
    """What takes the place of ``layer.forward``: [n, ..., *normalized] -> the same shape."""
    weight, bias, shape = layer.weight, layer.bias, list(layer.normalized_shape)

    def forward(inputs: Tensor) -> Tensor:
        inputs = _accurate(inputs, weight)
        if _is_plain(weight, bias):
            return functional.layer_norm(inputs, shape, weight, bias, layer.eps)
        result: Tensor = _LayerNorm.apply(inputs, weight, bias, shape, layer.eps, tape)  # type: ignore[no-untyped-call]
        return result

    return forward


def taped_rms_norm(layer: nn.RMSNorm, tape: Tape) -> Forward:
    """What takes the place of ``layer.forward``: [n, ..., *normalized] -> the same shape."""
    weight, shape = layer.weight, list(layer.normalized_shape)

    def forward(inputs: Tensor) -> Tensor:
        inputs = _accurate(inputs, weight)
        if _is_plain(weight, None):
            return functional.rms_norm(inputs, shape, weight, layer.eps)
        result: Tensor = _RMSNorm.apply(inputs, weight, layer.eps, tape)  # type: ignore[no-untyped-call]
        return result

    return forward


def _accurate(inputs: Tensor, weight: Tensor | None) -> Tensor:
    """Norms are computed in the parameters' type, whatever products before them were computed in."""
    wanted = torch.promote_types(inputs.dtype, torch.float32) if weight is None else weight.dtype
    return inputs.to(wanted)


def _is_plain(*parameters: Tensor | None) -> bool:
    """Whether there is nothing to write to a tape."""
    return not any(each is not None and each.requires_grad for each in parameters)


def _leave(tape: Tape, parameter: nn.Parameter | None, each: Tensor | None) -> None:
    if parameter is not None and parameter.requires_grad and each is not None:
        tape.samples(parameter, each)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        groups: int,
        eps: float,
        tape: Tape,
    ) -> Tensor:
        inputs = inputs.contiguous()
        records, channels = inputs.shape[:2]
        places = math.prod(inputs.shape[2:])
        result, mean, scale = torch.native_group_norm(inputs, weight, bias, records, channels, places, groups, eps)
        ctx.save_for_backward(inputs, mean, scale)
        ctx.layer = weight, bias, groups, tape  # type: ignore[attr-defined]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, groups, tape = ctx.layer  # type: ignore[attr-defined]
        wants_inputs: bool = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        inputs, mean, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        if not len(gradient):
            return torch.zeros_like(gradient), None, None, None, None, None
        gradients = _group_gradients_of_long if math.prod(gradient.shape[2:]) > _LONG else _group_gradients
        by_inputs, by_weight, by_bias = gradients(
            gradient.contiguous(), inputs, mean, scale, weight, groups, wants_inputs=wants_inputs
        )
        _leave(tape, weight, by_weight)
        _leave(tape, bias, by_bias)
        return by_inputs, None, None, None, None, None


def _group_gradients(
    gradient: Tensor,
    inputs: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    groups: int,
    *,
    wants_inputs: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """By the inputs [n, c, ...], by weight and bias [n, c]: all channels of all records as those of one."""
    records, channels = inputs.shape[:2]
    all_channels = records * channels
    places = math.prod(inputs.shape[2:])
    by_inputs, by_weight, by_bias = torch.ops.aten.native_group_norm_backward(
        gradient.view(1, all_channels, places),
        inputs.view(1, all_channels, places),
        mean.view(1, -1),
        scale.view(1, -1),
        None if weight is None else weight.detach().repeat(records),
        1,
        all_channels,
        places,
        records * groups,
        [wants_inputs, True, True],
    )
    whole = by_inputs.view_as(inputs) if wants_inputs else None
    return whole, by_weight.view(records, channels), by_bias.view(records, channels)


def _group_gradients_of_long(
    gradient: Tensor,
    inputs: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    groups: int,
    *,
    wants_inputs: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """As ``_group_gradients``, record by record.

    With y the normalized inputs and w g the gradient by them: by inputs it is scale (w g - mean(w g) - y mean(w g y)), the
    means over a group.
    """
    records, channels = inputs.shape[:2]
    of_group = channels // groups
    size = of_group * math.prod(inputs.shape[2:])
    by_weight, by_bias = inputs.new_empty(records, channels), inputs.new_empty(records, channels)
    by_inputs = torch.empty_like(inputs) if wants_inputs else None
    used = inputs.new_ones(channels) if weight is None else weight.detach()
    for record in range(records):
        own, places = gradient[record].flatten(1), inputs[record].flatten(1)
        center = mean.view(records, groups)[record].repeat_interleave(of_group)[:, None]
        spread = scale.view(records, groups)[record].repeat_interleave(of_group)[:, None]
        normalized = (places - center).mul_(spread)
        torch.sum(own, 1, out=by_bias[record])
        torch.sum(own * normalized, 1, out=by_weight[record])
        if by_inputs is not None:
            even, along = (
                (sums[record] * used).view(groups, of_group).sum(1).repeat_interleave(of_group)[:, None] / size
                for sums in (by_bias, by_weight)
            )
            back = normalized.mul_(-along).sub_(even).addcmul_(own, used[:, None])
            torch.mul(back, spread, out=by_inputs[record].view_as(back))
    return by_inputs, by_weight, by_bias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        shape: list[int],
        eps: float,
        tape: Tape,
    ) -> Tensor:
        inputs = inputs.contiguous()
        result, mean, scale = torch.native_layer_norm(inputs, shape, weight, bias, eps)
        ctx.save_for_backward(inputs, mean, scale)
        ctx.layer = weight, bias, shape, tape  # type: ignore[attr-defined]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, mean, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        weight, bias, shape, tape = ctx.layer  # type: ignore[attr-defined]
        gradient = gradient.contiguous()
        if weight is not None and weight.requires_grad:
            tape.samples(weight, _scale_samples(gradient, inputs, mean, scale, math.prod(shape)))
        if bias is not None and bias.requires_grad:
            tape.samples(bias, _rows(gradient, math.prod(shape)).sum(1))
        by_inputs = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            only_inputs = [True, False, False]
            by_inputs, _, _ = torch.ops.aten.native_layer_norm_backward(
                gradient, inputs, shape, mean, scale, weight, bias, only_inputs
            )
        return by_inputs, None, None, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, weight: nn.Parameter, eps: float | None, tape: Tape) -> Tensor:
        inputs = inputs.contiguous()
        normalized = tuple(range(-weight.dim(), 0))
        stabilizer = torch.finfo(inputs.dtype).eps if eps is None else eps
        scale = torch.rsqrt(inputs.square().mean(normalized, keepdim=True).add_(stabilizer))
        ctx.save_for_backward(inputs, scale)
        ctx.layer = weight, normalized, tape  # type: ignore[attr-defined]
        return (inputs * scale).mul_(weight.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With y = scale * inputs and w g the gradient by y: by inputs it is scale (w g - y mean(w g y))."""
        inputs, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        weight, normalized, tape = ctx.layer  # type: ignore[attr-defined]
        gradient = gradient.contiguous()
        if weight.requires_grad:
            tape.samples(weight, _scale_samples(gradient, inputs, None, scale, weight.numel()))
        by_inputs = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            by_result = gradient * weight.detach()
            along = (by_result * inputs).mean(normalized, keepdim=True).mul_(scale).mul_(scale)
            by_inputs = by_result.addcmul_(inputs, along, value=-1.0).mul_(scale)
        return by_inputs, None, None, None


def _rows(values: Tensor, width: int) -> Tensor:
    """[n, ..., *normalized] -> [n, steps, width]."""
    return values.reshape(len(values), -1, width) if len(values) else values.new_empty(0, 1, width)


def _scale_samples(gradient: Tensor, inputs: Tensor, mean: Tensor | None, scale: Tensor, width: int) -> Tensor:
    """The sum over a record's steps of gradient * (inputs - mean) * scale: [n, width]. A few records at a time, in cache."""
    gradient, inputs = _rows(gradient, width), _rows(inputs, width)
    records, steps = inputs.shape[:2]
    scale = scale.view(records, steps, 1)
    mean = None if mean is None else mean.view(records, steps, 1)
    samples = inputs.new_empty(records, width)
    at_once = max(1, _BLOCK_BYTES // (steps * width * inputs.element_size()))
    for start in range(0, records, at_once):
        part = slice(start, start + at_once)
        normalized = inputs[part] * scale[part] if mean is None else (inputs[part] - mean[part]).mul_(scale[part])
        torch.sum(normalized.mul_(gradient[part]), 1, out=samples[part])
    return samples
