"""What would come of a record with a treatment and without it: float32[n, p] -> logits float32[n, 2], without and with.

*Source* TARNet (Shalit, Johansson, Sontag 2017, arXiv:1606.03976, section 4): a trunk that both arms share and a head for each.
Their balancing term compares the treated of a batch with the others; it couples patients and is left out.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from medfed.models.rowwise import RowLinear


class TwoArm(nn.Module):
    """``hidden``: widths of the trunk; ``arm_hidden``: of each head, with none it is one linear layer, begun at zero."""

    def __init__(self, inputs: int, hidden: list[int], arm_hidden: list[int]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*_with_relu([inputs, *hidden]))
        self.untreated, self.treated = (_head([[inputs, *hidden][-1], *arm_hidden]) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        shared = self.trunk(inputs)
        return torch.cat([self.untreated(shared), self.treated(shared)], dim=1)


def _with_relu(widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [RowLinear(width_in, width_out), nn.ReLU()]
    return layers


def _head(widths: list[int]) -> nn.Sequential:
    last = RowLinear(widths[-1], 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*_with_relu(widths), last)
