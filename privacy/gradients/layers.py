"""Which layers write to the gradient engine's tape, and how: one rule a layer type, looked up exactly.

A layer without parameters needs no rule. One with parameters and no rule goes through Opacus (``trainer`` says so in a
notice), if it keeps patients apart at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.errors import UnsupportedModel
from medfed.privacy.gradients.attention import taped_attention
from medfed.privacy.gradients.convolution import taped_convolution, taped_used_weight_convolution
from medfed.privacy.gradients.normalization import taped_group_norm, taped_layer_norm, taped_rms_norm
from medfed.privacy.gradients.products import product
from medfed.privacy.gradients.recurrent_layers import taped_gru, taped_lstm
from medfed.tape import Tape

Forward = Callable[..., object]
Rule = Callable[..., Forward]
"""(layer, tape) -> what takes the place of ``layer.forward``."""


def taped_linear(layer: nn.Linear, tape: Tape) -> Forward:
    def forward(inputs: Tensor) -> Tensor:
        return product(tape, inputs, layer.weight, layer.bias)

    return forward


def taped_embedding(layer: nn.Embedding, tape: Tape) -> Forward:
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        what = "Embedding with max_norm, scale_grad_by_freq or sparse lets records see each other"
        raise UnsupportedModel(160, what, "switch them off")

    def forward(index: Tensor) -> Tensor:
        result: Tensor = _Lookup.apply(index, layer.weight, layer.padding_idx, tape)  # type: ignore[no-untyped-call]
        return result

    return forward


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, index: Tensor, weight: nn.Parameter, padding: int | None, tape: Tape) -> Tensor:
        ctx.save_for_backward(index)
        ctx.used = weight, padding, tape  # type: ignore[attr-defined]
        return functional.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[None, ...]:
        (index,) = ctx.saved_tensors  # type: ignore[attr-defined]
        weight, padding, tape = ctx.used  # type: ignore[attr-defined]
        if padding is not None:
            gradient = gradient.where((index != padding)[..., None], 0.0)
        if len(index):
            tape.rows(weight, index.reshape(len(index), -1), gradient.reshape(len(index), -1, gradient.shape[-1]))
        return None, None, None, None


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: taped_linear,
    nn.Conv1d: taped_convolution,
    nn.Conv2d: taped_convolution,
    nn.Conv3d: taped_convolution,
    nn.Embedding: taped_embedding,
    nn.LayerNorm: taped_layer_norm,
    nn.GroupNorm: taped_group_norm,
    nn.RMSNorm: taped_rms_norm,
    nn.LSTM: taped_lstm,
    nn.GRU: taped_gru,
    nn.MultiheadAttention: taped_attention,
}
"""Layers of torch; ``TransformerEncoderLayer`` and ``TransformerDecoderLayer`` are made of these."""


def attach(model: nn.Module, tape: Tape) -> None:
    """Let every layer of ``model``, a private copy, write to ``tape``; ``UnsupportedModel`` (MF-160) for one that cannot."""
    lacking = without_rule(model)
    if lacking is not None:
        raise UnsupportedModel(160, f"{lacking} has no rule in the gradient engine", "use Opacus's gradients")
    for layer in list(_heads(model)):
        forward = _taped(layer, tape)
        if forward is not None:
            layer.forward = forward


def without_rule(model: nn.Module) -> str | None:
    """Name and type of the first layer that this engine cannot take; None if it takes all."""
    names = {layer: name for name, layer in model.named_modules()}
    for layer in _heads(model):
        has_own = next(layer.parameters(recurse=False), None) is not None
        if has_own and not _is_known(layer):
            return f"{names[layer] or 'the model'}: {type(layer).__name__}"
    return None


def _heads(layer: nn.Module) -> Iterator[nn.Module]:
    """All layers but those inside a layer that answers for them."""
    yield layer
    if hasattr(layer, "taped_forward") or type(layer) is nn.MultiheadAttention:
        return
    for child in layer.children():
        yield from _heads(child)


def _is_known(layer: nn.Module) -> bool:
    return hasattr(layer, "taped_forward") or type(layer) in RULES or hasattr(layer, "used_weight")


def _taped(layer: nn.Module, tape: Tape) -> Forward | None:
    if hasattr(layer, "taped_forward"):
        return functools.partial(layer.taped_forward, tape)  # type: ignore[operator, arg-type, misc]
    if type(layer) in RULES:
        return RULES[type(layer)](layer, tape)
    if hasattr(layer, "used_weight"):
        return taped_used_weight_convolution(layer, tape)
    if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
        what = f"{type(layer).__name__} with p = {layer.p} gives a record another gradient in every batch"
        raise UnsupportedModel(160, what, "use p = 0: the noise regularises")
    return None
