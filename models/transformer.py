"""A Transformer encoder over texts or series -> logits float32[n, outputs]; built of linear layers and torch's attention.

Padding takes no part: nothing attends to it (unless a record is nothing else) and the mean leaves it out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.models.head import linear_from_zero

_WORDS = 0.03  # standard deviation of a text's first embeddings
_PLACES = 0.02
_EVENTS = 0.3


class TextTransformer(nn.Module):
    """Tokens int64[n, length], 0 padding, each below ``tokens`` -> logits.

    Parameters: tokens * d of the embedding, and those of ``Encoder`` and the head (d + 1) * outputs.
    """

    def __init__(
        self, tokens: int, outputs: int, embedding_size: int, heads: int, layers: int, feedforward_size: int
    ) -> None:
        super().__init__()
        # no padding_idx: gradients by record would not heed it; padding is masked instead
        self.embedding = nn.Embedding(tokens, embedding_size)
        # small, and places smaller still, with nothing that scales them up again: with unit numbers the places, alike in
        # every text, drown what a few thousand texts say of their words
        nn.init.normal_(self.embedding.weight, std=_WORDS)
        self.encoder = Encoder(embedding_size, heads, layers, feedforward_size, places=_PLACES, last=nn.Identity())
        self.head = linear_from_zero(embedding_size, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(tokens), tokens > 0))
        return logits


class EventTransformer(nn.Module):
    """Events int64[n, length, 2], code and time each below ``tokens``, 0 and 0 padding -> logits.

    An event is the sum of its two embeddings. Parameters: as of ``TextTransformer``.
    """

    def __init__(
        self, tokens: int, outputs: int, embedding_size: int, heads: int, layers: int, feedforward_size: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, embedding_size)
        nn.init.normal_(self.embedding.weight, std=_EVENTS)
        self.encoder = Encoder(embedding_size, heads, layers, feedforward_size, places=_PLACES, last=nn.Identity())
        self.head = linear_from_zero(embedding_size, outputs)

    def forward(self, events: Tensor) -> Tensor:
        embedded = self.embedding(events)
        logits: Tensor = self.head(self.encoder(embedded[:, :, 0] + embedded[:, :, 1], events[:, :, 0] > 0))
        return logits


class SeriesTransformer(nn.Module):
    """Series float[n, steps, channels], padding where channel ``inside`` is 0 -> logits.

    Parameters: (channels + 1) * d of the embedding, those of ``Encoder``, 2 * d of the last normalisation and the head
    (d + 1) * outputs.
    """

    def __init__(
        self,
        channels: int,
        inside: int,
        outputs: int,
        embedding_size: int,
        heads: int,
        layers: int,
        feedforward_size: int,
    ) -> None:
        super().__init__()
        self.inside = inside
        self.embedding = nn.Linear(channels, embedding_size)
        last = nn.LayerNorm(embedding_size)
        self.encoder = Encoder(embedding_size, heads, layers, feedforward_size, places=1.0, last=last)
        self.head = linear_from_zero(embedding_size, outputs)

    def forward(self, series: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(series), series[:, :, self.inside] > 0))
        return logits


class Encoder(nn.Module):
    """Places embedded as float[n, steps, d], real bool[n, steps] -> float[n, d], the mean over what is real.

    Blocks with the normalisation before each part (Xiong et al. 2020, arXiv:2002.04745), then ``last``. ``places``: size of
    what tells places apart. Parameters: 4 * d * d + 2 * d * f + 9 * d + f for each block, where f is ``feedforward_size``.
    """

    def __init__(
        self, width: int, heads: int, layers: int, feedforward_size: int, *, places: float, last: nn.Module
    ) -> None:
        super().__init__()
        self.places = places
        self.blocks = nn.ModuleList([Block(width, heads, feedforward_size) for _ in range(layers)])
        self.norm = last

    def forward(self, embedded: Tensor, real: Tensor) -> Tensor:
        shown = real[:, :, None]
        hidden = torch.where(shown, embedded + self.places * _places(embedded), 0.0)
        # a softmax over nothing is not a number: a record of padding alone attends to padding, which its mean leaves out
        attended = (real | ~real.any(1, keepdim=True))[:, None, None, :]
        for block in self.blocks:
            hidden = block(hidden, attended)
        total = torch.where(shown, self.norm(hidden), 0.0).sum(1)
        return total / real.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


class Block(nn.Module):
    """Attention, then two linear layers, each on the normalised values and added to them: float[n, steps, d] -> the same."""

    def __init__(self, width: int, heads: int, feedforward_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward_in = nn.Linear(width, feedforward_size)
        self.feedforward_out = nn.Linear(feedforward_size, width)
        for block in self.queries_keys_values.weight.detach().chunk(3):
            nn.init.xavier_uniform_(block)
        for layer in (self.attention_out, self.feedforward_in, self.feedforward_out):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.queries_keys_values, self.attention_out, self.feedforward_in, self.feedforward_out):
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.attention_norm(hidden)).unflatten(2, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)
        found = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=attended)
        hidden = hidden + self.attention_out(found.transpose(1, 2).flatten(2))
        inner = functional.gelu(self.feedforward_in(self.feedforward_norm(hidden)))
        result: Tensor = hidden + self.feedforward_out(inner)
        return result


def _places(embedded: Tensor) -> Tensor:
    """Sinusoids float[steps, d] that tell places apart (Vaswani et al. 2017, arXiv:1706.03762): nothing to be learned."""
    steps, width = embedded.shape[1:]
    rates = torch.exp(torch.arange(0, width, 2, device=embedded.device) * (-math.log(10_000.0) / width))
    angles = torch.arange(steps, device=embedded.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width].to(embedded.dtype)
