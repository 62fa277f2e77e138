"""The model of several views or tiles of one patient: float32[n, views + 1, h, w] -> logits float32[n, outputs].

One convolutional encoder sees every view; what it makes of them is pooled by gated attention (Ilse et al. 2018,
arXiv:1802.04712) or their mean. Views stay an axis of their own all the way: folded into the axis of records, the views of a
patient would pass for patients, each with a gradient to clip.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.models.head import linear_from_zero
from medfed.models.volumetric import StandardizedConv3d

_NEVER = -1e30


class NormOfEachView(nn.Module):
    """float[n, c, views, h, w] -> the same shape: each group of channels of each view with mean 0 and variance 1.

    Group by group and view by view: a view that is absent changes nothing of the others.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, inputs: Tensor) -> Tensor:
        records, channels, views, height, width = inputs.shape
        apart = inputs.transpose(1, 2).reshape(records, views * channels, height, width)
        normal = functional.group_norm(apart, views * self.groups)
        return normal.view(records, views, channels, height, width).transpose(1, 2)


class PoolOfEachView(nn.Module):
    """float[n, c, views, h, w] -> float[n, views, c]: of each channel its mean or its largest value over a view's places."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        pooled = inputs.mean(dim=(3, 4)) if self.head == "mean" else inputs.amax(dim=(3, 4))
        return pooled.transpose(1, 2)


class GatedAttention(nn.Module):
    """(features float[n, views, c], present bool[n, views]) -> the weight of each view float[n, views].

    They add up to 1 over those that are present; all others have 0, and where none is present all have."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.content = nn.Linear(features, size)
        self.gate = nn.Linear(features, size)
        self.score = nn.Linear(size, 1, bias=False)  # what all views share moves no weight

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        scores = self.score(torch.tanh(self.content(features)) * torch.sigmoid(self.gate(features)))[..., 0]
        return _shares(scores, present)


class EqualAttention(nn.Module):
    """As ``GatedAttention``, every view that is present with the same weight."""

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        return _shares(torch.zeros_like(features[..., 0]), present)


def _shares(scores: Tensor, present: Tensor) -> Tensor:
    seen = scores.masked_fill(~present, _NEVER)
    grown = torch.exp(seen - seen.amax(1, keepdim=True)) * present
    return grown / grown.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


class MultiView(nn.Module):
    """``encoder``: float[n, 1, views, h, w] -> float[n, c, views, h', w'];
    ``pool`` takes their places together; ``attention`` weighs the views; ``head`` is linear, from zero."""

    def __init__(self, encoder: nn.Sequential, pool: nn.Module, attention: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.attention = attention
        self.head = head

    def features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of records float[n, views + 1, h, w]: what the model makes of each view, float[n, views, c], and which are there,
        bool[n, views]."""
        views = inputs.shape[1] - 1
        present = inputs[:, views].flatten(1)[:, :views] > 0.5
        return self.pool(self.encoder(inputs[:, None, :views])), present

    def weights(self, inputs: Tensor) -> Tensor:
        """How much each view counts: float[n, views]."""
        found: Tensor = self.attention(*self.features(inputs))
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        features, present = self.features(inputs)
        pooled = (self.attention(features, present)[..., None] * features).sum(1)
        out: Tensor = self.head(pooled)
        return out


def multi_view(
    outputs: int, channels: list[int], first_stride: int, groups: int, head: str, pooling: str, attention_size: int
) -> MultiView:
    """3 x 3 convolutions over each view, standardised, each with a bias and ReLU, ``NormOfEachView`` between; their mean or
    largest values over a view's places.

    Parameters: 9 * c_in * c_out + c_out for each convolution; of attention 2 * (c_last + 1) * a + a; (c_last + 1) * outputs.
    """
    layers: list[nn.Module] = []
    for place, (width_in, width_out) in enumerate(itertools.pairwise([1, *channels])):
        stride = 2 if place else first_stride
        if place:
            layers.append(NormOfEachView(groups))
        layers += [StandardizedConv3d(width_in, width_out, (1, stride, stride), (1, 3, 3), bias=True), nn.ReLU()]
    last = channels[-1]
    attention = GatedAttention(last, attention_size) if pooling == "attention" else EqualAttention()
    return MultiView(nn.Sequential(*layers), PoolOfEachView(head), attention, linear_from_zero(last, outputs))
