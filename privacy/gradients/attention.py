"""``nn.MultiheadAttention`` on a tape: its projections as products, torch's own attention between them.

Thereby ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``, too. *Source* Vaswani et al. 2017, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.errors import UnsupportedModel
from medfed.privacy.gradients.products import bias_samples, cast, cast_if_any, outer_sums, product, steady_linear
from medfed.tape import Tape

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def taped_attention(layer: nn.MultiheadAttention, tape: Tape) -> Attention:
    """What takes the place of ``layer.forward``, with its arguments and results."""
    for setting, wanted in (("dropout", 0.0), ("bias_k", None), ("add_zero_attn", False)):
        if getattr(layer, setting) != wanted:
            what = f"MultiheadAttention with {'add_bias_kv' if setting == 'bias_k' else setting}"
            raise UnsupportedModel(160, what, f"switch it off ({setting} = {wanted})")

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3:
            raise UnsupportedModel(160, "attention over records without a batch dimension", "add the batch dimension")
        is_one = query is key and key is value
        if not layer.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        parts = _projected(tape, layer, query, key, value, is_one=is_one)
        q, k, v = (part.view(*part.shape[:2], layer.num_heads, -1).transpose(1, 2) for part in parts)
        mask = _mask(layer, q, k.shape[2], key_padding_mask, attn_mask)
        weights = None
        if need_weights:
            mixed, weights = _attended(q, k, v, mask)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        out = product(tape, mixed, layer.out_proj.weight, layer.out_proj.bias)
        return (out if layer.batch_first else out.transpose(0, 1)), weights

    return forward


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As torch's ``scaled_dot_product_attention``, and the weights [n, heads, queries, keys] beside it."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    weights = torch.softmax(scores if mask is None else scores + mask, dim=3)
    return weights @ value, weights


def _mask(
    layer: nn.MultiheadAttention, query: Tensor, keys: int, padding: Tensor | None, attention: Tensor | None
) -> Tensor | None:
    """What is added to the scores: float[n or 1, heads or 1, queries, keys]. A true bool means: not seen."""
    whole: Tensor | None = None
    if padding is not None:
        whole = _as_scores(padding, query.dtype)[:, None, None, :]
    if attention is not None:
        scores = _as_scores(attention, query.dtype)
        if scores.dim() == 3:
            scores = scores.view(len(query), layer.num_heads, query.shape[2], keys)
        whole = scores if whole is None else whole + scores
    if whole is not None:
        whole = whole.expand(*([1] * (4 - whole.dim())), *whole.shape) if whole.dim() < 4 else whole
    return whole


def _as_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def _projected(
    tape: Tape, layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *, is_one: bool
) -> list[Tensor]:
    """Queries, keys and values before they are cut into heads."""
    weight: nn.Parameter | None = layer.in_proj_weight
    bias: nn.Parameter | None = layer.in_proj_bias
    if weight is not None and is_one:
        return list(product(tape, query, weight, bias).chunk(3, 2))
    if weight is not None:
        found: tuple[Tensor, ...] = _Projections.apply(query, key, value, weight, bias, tape)  # type: ignore[no-untyped-call]
        return list(found)
    own = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    parts = [product(tape, each, by, None) for each, by in zip((query, key, value), own, strict=True)]
    if bias is None:
        return parts
    shifts: tuple[Tensor, ...] = _Shifts.apply(*parts, bias, tape)  # type: ignore[no-untyped-call]
    return list(shifts)


class _Projections(torch.autograd.Function):
    """Three inputs through the three parts of one weight [3 * width, i]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        tape: Tape,
    ) -> tuple[Tensor, ...]:
        *inputs, by = cast(tape, query, key, value, weight)
        shift = cast_if_any(tape, bias)
        ctx.save_for_backward(*inputs, by)
        ctx.layer = weight, bias, tape, query.dtype  # type: ignore[attr-defined]
        shifts = [None] * 3 if shift is None else list(shift.chunk(3))
        parts = zip(inputs, by.chunk(3), shifts, strict=True)
        return tuple(steady_linear(each, part, own) for each, part, own in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, by = ctx.saved_tensors  # type: ignore[attr-defined]
        weight, bias, tape, dtype = ctx.layer  # type: ignore[attr-defined]
        if weight.requires_grad:
            wide = torch.float64 if by.dtype == torch.float64 else torch.float32
            each = [
                outer_sums(a.to(wide), g.to(wide))[:, : g.shape[2], : a.shape[2]]
                for g, a in zip(gradients, inputs, strict=True)
            ]
            tape.samples(weight, torch.cat(each, 1))
        if bias is not None and bias.requires_grad:
            tape.samples(bias, torch.cat([bias_samples(g) for g in gradients], 1))
        needed = ctx.needs_input_grad  # type: ignore[attr-defined]
        back = [
            steady_linear(gradient, part.T).to(dtype) if wanted else None
            for gradient, part, wanted in zip(gradients, by.chunk(3), needed[:3], strict=True)
        ]
        return *back, None, None, None


class _Shifts(torch.autograd.Function):
    """One bias [3 * width] for three results."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, bias: nn.Parameter, tape: Tape
    ) -> tuple[Tensor, ...]:
        ctx.layer = bias, tape  # type: ignore[attr-defined]
        parts = zip((query, key, value), bias.detach().to(query.dtype).chunk(3), strict=True)
        return tuple(each + own for each, own in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        bias, tape = ctx.layer  # type: ignore[attr-defined]
        if bias.requires_grad:
            tape.samples(bias, torch.cat([bias_samples(g) for g in gradients], 1))
        return *gradients, None, None
