"""The model of records of several parts: one encoder a part, and what they say put together.

*Early*: the last layer sees all parts' summaries side by side. *Late*: each part has a last layer of its own, and the logits of
those that are there are averaged. *Hybrid*: the sum of both. A part that is not there has no summary, no say, and no gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from medfed.data_contract import DataContract, Text
from medfed.errors import ConfigError
from medfed.models.convolutional import cnn
from medfed.models.head import linear_from_zero
from medfed.models.recurrent import Recurrent

How = Literal["early", "late", "hybrid"]


class Fusion(nn.Module):
    """Records float[n, total] as ``medfed.record_parts.Mixed`` lays them out -> logits float[n, outputs].

    Each part's encoder ends in ``width`` numbers between -1 and 1, its summary. Parameters beside the encoders', with m parts and
    features counted as one: early (m * width + parts + 1) * outputs, late m * (width + 1) * outputs, hybrid both.
    """

    def __init__(self, data: DataContract, encoders: list[nn.Module], outputs: int, how: How, width: int) -> None:
        super().__init__()
        self.shapes = list(data.mixed_parts.values())
        self.features = data.inputs
        self.encoders = nn.ModuleList(encoders)
        late = len(encoders) if how != "early" else 0
        self.own_heads = nn.ModuleList([linear_from_zero(width, outputs) for _ in range(late)])
        wide = len(encoders) * width + len(self.shapes)
        self.joint_head = linear_from_zero(wide, outputs) if how != "late" else nn.Identity()
        self.is_joint = how != "late"

    def forward(self, records: Tensor) -> Tensor:
        flags, parts = self._split(records)
        is_there = [flag[:, None] > 0 for flag in flags.unbind(1)]
        if self.features:
            is_there = [torch.ones_like(is_there[0]), *is_there]
        # a part that is not there is zeros: what an encoder makes of them counts for nothing
        summaries = [
            torch.where(there, torch.tanh(encoder(part)), 0.0)
            for there, encoder, part in zip(is_there, self.encoders, parts, strict=True)
        ]
        logits: Tensor | None = self.joint_head(torch.cat([*summaries, flags], dim=1)) if self.is_joint else None
        if self.own_heads:
            averaged = self._late(summaries, is_there)
            logits = averaged if logits is None else logits + averaged
        return logits if logits is not None else flags

    def _split(self, records: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(flags float[n, parts], features if any and parts in their shapes)."""
        sizes = [len(self.shapes), self.features, *(math.prod(shape) for shape in self.shapes)]
        flags, features, *parts = torch.split_with_sizes(records, sizes, dim=1)
        shaped = [part.reshape(len(part), *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return flags, [features, *shaped] if self.features else shaped

    def _late(self, summaries: list[Tensor], is_there: list[Tensor]) -> Tensor:
        """Added up part by part, so that the order is one for all records."""
        total, count = torch.zeros_like(summaries[0][:, :1]), torch.zeros_like(summaries[0][:, :1])
        for head, summary, there in zip(self.own_heads, summaries, is_there, strict=True):
            total = total + torch.where(there, head(summary), 0.0)
            count = count + there.to(count.dtype)
        return total / count.clamp(min=1)


class WordMean(nn.Module):
    """Tokens as floats [n, length], 0 padding -> float[n, width]: the mean embedding of what is there, and a linear layer."""

    def __init__(self, tokens: int, embedding_size: int, width: int) -> None:
        super().__init__()
        self.last = tokens - 1
        self.embedding = nn.Embedding(tokens, embedding_size)
        self.out = nn.Linear(embedding_size, width)

    def forward(self, numbers: Tensor) -> Tensor:
        tokens = numbers.nan_to_num(0.0).clamp(0, self.last).long()
        is_word = (tokens > 0)[:, :, None]
        total = torch.where(is_word, self.embedding(tokens), 0.0).sum(1)
        result: Tensor = self.out(total / is_word.sum(1).clamp(min=1).to(total.dtype))
        return result


def fusion(
    data: DataContract, outputs: int, how: How, width: int, embedding_size: int, channels: list[int], groups: int
) -> Fusion:
    """``channels``, ``groups``: of the images' convolutions; ``embedding_size``: of the texts' words."""
    encoders: list[nn.Module] = [nn.Linear(data.inputs, width)] if data.features else []
    if data.image is not None:
        image = cnn(data.image.height, data.image.width, width, channels, 2, groups, "mean")
        encoders.append(_begun(image))
    if data.series is not None:
        encoders.append(_begun(Recurrent("gru", len(data.series.variables), 0, width, width, 1, True)))
    if data.text is not None:
        encoders.append(WordMean(_tokens(data.text), embedding_size, width))
    if data.block is not None:
        encoders.append(nn.Linear(data.block.count, width))
    return Fusion(data, encoders, outputs, how, width)


def _tokens(text: Text) -> int:
    if len(text.shape) != 1:
        raise ConfigError(203, f"tokens = {text.tokens} do not go into a mixed record", "choose bytes or hashed-words")
    return text.buckets + 1


def _begun(encoder: nn.Module) -> nn.Module:
    """With a last layer that is not zero: behind another one that is, both would stay so."""
    *_, last = (layer for layer in encoder.modules() if isinstance(layer, nn.Linear))
    nn.init.xavier_uniform_(last.weight)
    return encoder
