"""A tag for each word of a text: dilated convolutions over the words, int64[n, words, parts] -> logits float32[n, words, tags].

Each word enters as the embeddings of its parts side by side (``medfed.data_contract.Text``, given words). Padding takes no part:
it enters every convolution as zeros, as what lies outside a text does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.models.head import linear_from_zero

_PARTS = 0.03  # standard deviation of the first embeddings: parts of words never met in training say little


class Tagger(nn.Module):
    """Tokens int64[n, words, ``parts``], 0 padding, each below ``tokens`` -> logits float[n, words, outputs].

    Parameters: tokens * d of the embedding, (parts * d + 1) * h of its way in, 3 * h * h + 3 * h a dilation, and (2 * h + 1) *
    outputs of the head, which sees a word by itself and in its surroundings.
    """

    def __init__(
        self, tokens: int, parts: int, outputs: int, embedding_size: int, hidden_size: int, dilations: list[int]
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, embedding_size)
        nn.init.normal_(self.embedding.weight, std=_PARTS)
        self.way_in = nn.Linear(parts * embedding_size, hidden_size)
        self.blocks = nn.ModuleList([Surroundings(hidden_size, dilation) for dilation in dilations])
        self.head = linear_from_zero(2 * hidden_size, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens[:, :, 0] > 0)[:, :, None]
        alone = torch.where(real, self.way_in(self.embedding(tokens).flatten(2)), 0.0)
        hidden = alone
        for block in self.blocks:
            hidden = block(hidden, real)
        logits: Tensor = self.head(torch.cat([alone, hidden], 2))
        return logits


class Surroundings(nn.Module):
    """What a word's neighbors at distance ``dilation`` say, added to it.

    float[n, words, h], real bool[n, words, 1] -> float[n, words, h], zeros where not real.
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        nn.init.xavier_uniform_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        seen = torch.where(real, self.norm(hidden), 0.0)
        found = functional.relu(self.convolution(seen.transpose(1, 2)).transpose(1, 2))
        return torch.where(real, hidden + found, 0.0)
