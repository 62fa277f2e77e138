"""The last layer of the deep models."""

from __future__ import annotations

from torch import nn


def linear_from_zero(inputs: int, outputs: int) -> nn.Linear:
    """Features to logits, begun at zero: every class is as likely, and no random direction must first be unlearned."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
