"""Convolutions over a text's words and the greatest of each: tokens int64[n, length] -> logits float32[n, outputs].

*Source* Kim 2014 (arXiv:1408.5882), without dropout. Windows begin at a token of the text; padding is seen as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.models.head import linear_from_zero

_WORDS = 0.1  # standard deviation of the first embeddings


class TextCnn(nn.Module):
    """Tokens 0 (padding) to ``tokens`` - 1 -> logits, of a text without a token those of zeros.

    Parameters: tokens * d of the embedding, (w * d + 1) * c of the windows of each width w, (c * widths + 1) * outputs.
    """

    def __init__(self, tokens: int, outputs: int, embedding_size: int, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, embedding_size)
        nn.init.normal_(self.embedding.weight, std=_WORDS)
        self.widths = tuple(widths)
        self.windows = nn.ModuleList([_windows(embedding_size, channels, width) for width in widths])
        self.head = linear_from_zero(channels * len(widths), outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens > 0)[:, None]
        words = torch.where(real, self.embedding(tokens).transpose(1, 2), 0.0)
        found = []
        for width, layer in zip(self.widths, self.windows, strict=True):
            seen = functional.relu(layer(functional.pad(words, (0, width - 1))))
            # of equal greatest ones each takes its share of the gradient: no order among places that could change
            found.append(torch.where(real, seen, 0.0).amax(2))
        logits: Tensor = self.head(torch.cat(found, 1))
        return logits


def _windows(inputs: int, channels: int, width: int) -> nn.Conv1d:
    layer = nn.Conv1d(inputs, channels, width)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
