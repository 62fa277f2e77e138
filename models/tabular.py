"""Models of encoded tables: float32[n, p] -> logits float32[n, outputs]."""

from __future__ import annotations

import itertools

from torch import nn

from medfed.models.rowwise import RowLinear


def logistic_regression(inputs: int, outputs: int) -> nn.Module:
    """One linear layer, begun at zero: the loss is convex, so a random start would only add noise."""
    layer = RowLinear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, hidden: list[int]) -> nn.Module:
    """Linear layers with ReLU between; no normalisation, as batch statistics would couple patients."""
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise([inputs, *hidden]):
        layers += [RowLinear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers, RowLinear(hidden[-1], outputs))
