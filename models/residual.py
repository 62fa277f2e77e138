"""The deeper model of images: a residual network of standardised convolutions, float32[n, 1, h, w] -> logits
float32[n, outputs].

*Source* He et al. 2015, arXiv:1512.03385 (blocks and shortcuts); De et al. 2022, arXiv:2204.13650 (standardised weights and
GroupNorm in the place of BatchNorm, which couples patients).
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

from torch import Tensor, nn

from medfed.models.convolutional import MeanOverPlaces, StandardizedConv2d
from medfed.models.head import linear_from_zero


class ResidualBlock(nn.Module):
    """float[n, inputs, h, w] -> float[n, outputs, h / stride, w / stride], rounded up: two convolutions add to the input.

    The input goes round them as it is, or through a 1 x 1 convolution where its shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.first = _convolved(inputs, outputs, stride, 3, groups)
        self.first_relu = nn.ReLU()
        self.second = _convolved(outputs, outputs, 1, 3, groups)
        keeps_shape = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity() if keeps_shape else _convolved(inputs, outputs, stride, 1, groups)
        self.second_relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        added: Tensor = self.second(self.first_relu(self.first(inputs)))
        out: Tensor = self.second_relu(self.shortcut(inputs) + added)
        return out


def _convolved(inputs: int, outputs: int, stride: int, kernel: Literal[1, 3], groups: int) -> nn.Sequential:
    return nn.Sequential(StandardizedConv2d(inputs, outputs, stride, kernel), nn.GroupNorm(groups, outputs))


def resnet(
    height: int,
    width: int,
    outputs: int,
    channels: list[int],
    blocks: int,
    first_stride: int,
    groups: int,
    head: str,
) -> nn.Module:
    """A first convolution to ``channels[0]`` with ``first_stride``; for each of ``channels`` so many blocks, the first with
    stride 2 but in the first stage; then a linear layer, begun at zero, over the mean or each place, as in ``convolutional.cnn``.

    Parameters: 9 * c_0 + 2 * c_0; a block 9 * c_in * c + 9 * c^2 + 4 * c, and c_in * c + 2 * c for a shortcut that is no
    identity; (features + 1) * outputs.
    """
    layers: list[nn.Module] = [_convolved(1, channels[0], first_stride, 3, groups), nn.ReLU()]
    height, width = math.ceil(height / first_stride), math.ceil(width / first_stride)
    for stage, (width_in, width_out) in enumerate(itertools.pairwise([channels[0], *channels])):
        stride = 2 if stage else 1
        layers.append(ResidualBlock(width_in, width_out, stride, groups))
        layers += [ResidualBlock(width_out, width_out, 1, groups) for _ in range(blocks - 1)]
        height, width = math.ceil(height / stride), math.ceil(width / stride)
    if head == "mean":
        return nn.Sequential(*layers, MeanOverPlaces(), linear_from_zero(channels[-1], outputs))
    return nn.Sequential(*layers, nn.Flatten(), linear_from_zero(channels[-1] * height * width, outputs))
