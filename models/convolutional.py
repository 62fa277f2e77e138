"""The model of images: float32[n, 1, h, w] -> logits float32[n, outputs]."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.models.head import linear_from_zero

_STABILIZER = 1e-4
_VALUES_AT_ONCE = 1 << 16  # few enough to stay in a processor's cache


def standardized(weight: Tensor) -> Tensor:
    """float[outputs, inputs, *kernel] -> the same shape: each filter with mean 0 and variance 1 / fan-in."""
    spread, mean = torch.var_mean(weight, dim=tuple(range(1, weight.dim())), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(spread * weight[0].numel() + _STABILIZER)


def way_back_of(weight: Tensor, samples: Tensor) -> Tensor:
    """Gradients of ``standardized(weight)``, float[n, outputs, inputs, *kernel] -> of ``weight``, the same shape.

    With c the filter less its mean and r = (|c|^2 + eps)^(-1/2): g -> r (g - mean g) - r^3 <g, c> c. Writes over
    ``samples``, which must be contiguous, and returns them.
    """
    filters = weight.detach().flatten(1)
    centered = filters - filters.mean(1, keepdim=True)
    size = torch.rsqrt(centered.square().sum(1, keepdim=True) + _STABILIZER)
    for part in torch.split(samples.flatten(2), max(1, _VALUES_AT_ONCE // filters.numel())):
        along = (part * centered).sum(2, keepdim=True).mul_(size * size)
        part.sub_(part.mean(2, keepdim=True)).addcmul_(along, centered, value=-1.0).mul_(size)
    return samples


class StandardizedConv2d(nn.Conv2d):
    """A 3 x 3 (or 1 x 1) convolution without bias, its filters standardised before use (Qiao et al. 2019, arXiv:1903.10520).

    The gradient of ``weight`` is a linear function of the gradient of the weight that is used, the same function for every
    record: whoever takes gradients record by record needs ``used_weight``, an ordinary convolution and ``way_back``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: Literal[1, 3] = 3) -> None:
        super().__init__(inputs, outputs, kernel_size=kernel, stride=stride, padding=kernel // 2, bias=False)

    def used_weight(self, weight: Tensor) -> Tensor:
        """``standardized``."""
        return standardized(weight)

    def way_back(self, samples: Tensor) -> Tensor:
        """``way_back_of`` its weight."""
        return way_back_of(self.weight, samples)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.conv2d(inputs, self.used_weight(self.weight), None, self.stride, self.padding)


def cnn(
    height: int, width: int, outputs: int, channels: list[int], first_stride: int, groups: int, head: str
) -> nn.Module:
    """Standardised convolutions, each with GroupNorm and ReLU; then a linear layer, begun at zero, over their mean or places.

    GroupNorm looks at one record, BatchNorm would couple patients. Parameters: 9 * c_in * c_out + 2 * c_out for each
    convolution and (features + 1) * outputs, where ``head`` "mean" has c_last features and "places" c_last for each place
    that is left: 14,161 and 14,641 of ``channels`` 16-32-32 with ``first_stride`` 2 over 28 x 28 pixels and one output.
    """
    layers: list[nn.Module] = []
    for place, (width_in, width_out) in enumerate(itertools.pairwise([1, *channels])):
        stride = 2 if place else first_stride
        layers += [StandardizedConv2d(width_in, width_out, stride), nn.GroupNorm(groups, width_out), nn.ReLU()]
        height, width = math.ceil(height / stride), math.ceil(width / stride)
    if head == "mean":
        return nn.Sequential(*layers, MeanOverPlaces(), linear_from_zero(channels[-1], outputs))
    return nn.Sequential(*layers, nn.Flatten(), linear_from_zero(channels[-1] * height * width, outputs))


class MeanOverPlaces(nn.Module):
    """float[n, c, h, w] -> float[n, c]."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(dim=(2, 3))
