"""A linear model of which words and pieces a text holds: what a few thousand texts can teach, without their order."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TextBag(nn.Module):
    """Tokens int64[n, length], 0 padding, each below ``tokens`` -> logits float32[n, outputs], begun at zero.

    The sum over a text's tokens of what each says, a token that stands there k times counted sqrt(k) times (a word's second
    mention tells less than its first), divided by the square root of how many there are: every text has length 1, whatever its
    size, so that the clipping norm bites all alike. There is no constant: class weights stand for it.
    Parameters: tokens * outputs.
    """

    def __init__(self, tokens: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, outputs)
        nn.init.zeros_(self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = (self.embedding(tokens) * _shares(tokens)[:, :, None]).sum(1)
        return logits


def _shares(tokens: Tensor) -> Tensor:
    """float32[n, length]: 1 / sqrt(times the token stands in its text * tokens of the text), 0 of padding."""
    real = tokens > 0
    if torch.compiler.is_exporting():  # ONNX knows no search; every pair of tokens takes twenty times as long
        times = (tokens[:, :, None] == tokens[:, None, :]).sum(2)
    else:
        ordered = tokens.sort(1).values
        times = torch.searchsorted(ordered, tokens, right=True) - torch.searchsorted(ordered, tokens)
    whole = real.sum(1, keepdim=True)
    return torch.where(real, 1.0 / torch.sqrt((times * whole).clamp(min=1).float()), 0.0)
