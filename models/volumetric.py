"""The model of volumes: float32[n, 1, depth, height, width] -> logits float32[n, outputs]."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional

from medfed.models.convolutional import standardized, way_back_of
from medfed.models.head import linear_from_zero

Kernel = tuple[int, int, int]


class StandardizedConv3d(nn.Conv3d):
    """A convolution over three dimensions, padded to keep its places, its filters standardised as ``StandardizedConv2d``'s."""

    def __init__(self, inputs: int, outputs: int, stride: Kernel, kernel: Kernel, *, bias: bool = False) -> None:
        around = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        super().__init__(inputs, outputs, kernel_size=kernel, stride=stride, padding=around, bias=bias)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def used_weight(self, weight: Tensor) -> Tensor:
        """``standardized``."""
        return standardized(weight)

    def way_back(self, samples: Tensor) -> Tensor:
        """``way_back_of`` its weight."""
        return way_back_of(self.weight, samples)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.conv3d(inputs, self.used_weight(self.weight), self.bias, self.stride, self.padding)


class MeanOverVolume(nn.Module):
    """float[n, c, d, h, w] -> float[n, c]."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(dim=(2, 3, 4))


class LargestOfVolume(nn.Module):
    """float[n, c, d, h, w] -> float[n, c]: of each channel the largest value of one record, wherever it is."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.amax(dim=(2, 3, 4))


def cnn3d(outputs: int, channels: list[int], first_stride: int, groups: int, head: str) -> nn.Module:
    """Standardised 3 x 3 x 3 convolutions, each with GroupNorm and ReLU, the first with ``first_stride``, all others with
    stride 2; then a linear layer, begun at zero, over each channel's mean or largest value.

    Parameters: 27 * c_in * c_out + 2 * c_out for each convolution and (c_last + 1) * outputs.
    """
    layers: list[nn.Module] = []
    for place, (width_in, width_out) in enumerate(itertools.pairwise([1, *channels])):
        stride = 2 if place else first_stride
        layers.append(StandardizedConv3d(width_in, width_out, (stride, stride, stride), (3, 3, 3)))
        layers += [nn.GroupNorm(groups, width_out), nn.ReLU()]
    pooled = MeanOverVolume() if head == "mean" else LargestOfVolume()
    return nn.Sequential(*layers, pooled, linear_from_zero(channels[-1], outputs))
