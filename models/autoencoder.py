"""Models that give a table's record back through few numbers: float32[n, p] -> float32[n, 2 + latent].

What comes out of a record: its error (the mean over its p values of the squared distance), its divergence (0 of the plain
autoencoder), and its latent numbers, the reduced representation. A loss needs no more, and no other record.

The variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114) draws nothing: in place of random draws of its latent
numbers it decodes the 2 x latent sigma points mean +- sqrt(latent) x standard deviation along each axis, public and fixed,
whose mean and covariance are exactly those that draws would have (the unscented transform of Janjos et al. 2023,
arXiv:2306.05256). A record then has the same gradient in every batch, which clipping rests on.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from medfed.models.rowwise import RowLinear

ERROR, DIVERGENCE, LATENT = 0, 1, 2
"""Columns of what comes out; the latent numbers from ``LATENT`` on."""
_LARGEST_LOGARITHM = 20.0  # of a variance; beyond, weights are absurd


class Autoencoder(nn.Module):
    """Layers of ``hidden`` widths with ReLU between down to ``latent`` numbers, and the same way back."""

    def __init__(self, inputs: int, hidden: list[int], latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = _layers([inputs, *hidden, latent])
        self.decoder = _layers([latent, *reversed(hidden), inputs])

    def forward(self, inputs: Tensor) -> Tensor:
        latent = self.encoder(inputs)
        error = squared_error(self.decoder(latent), inputs)
        return torch.cat([error, torch.zeros_like(error), latent], dim=1)


class VariationalAutoencoder(nn.Module):
    """As ``Autoencoder``; a record has a mean and a variance of each latent number, and gives back the mean as its own."""

    def __init__(self, inputs: int, hidden: list[int], latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = _layers([inputs, *hidden, 2 * latent])
        self.decoder = _layers([latent, *reversed(hidden), inputs])

    def forward(self, inputs: Tensor) -> Tensor:
        encoded = self.encoder(inputs)
        mean, logarithm = encoded[:, : self.latent], encoded[:, self.latent :]
        deviation = exponential(logarithm * 0.5)
        axes = torch.eye(self.latent, dtype=inputs.dtype, device=inputs.device) * math.sqrt(self.latent)
        error = torch.zeros_like(inputs[:, :1])
        for axis, side in itertools.product(axes, (1.0, -1.0)):
            error = error + squared_error(self.decoder(mean + deviation * (side * axis)), inputs)
        each = 0.5 * (mean * mean + deviation * deviation - 1.0 - logarithm)
        return torch.cat([error / (2.0 * self.latent), in_order(each), mean], dim=1)


def squared_error(given_back: Tensor, inputs: Tensor) -> Tensor:
    """The mean of squared distances over each record's own values: [n, 1]."""
    distance = given_back - inputs
    return in_order(distance * distance) / inputs.shape[1]


def in_order(values: Tensor) -> Tensor:
    """[n, k] -> [n, 1], added up column by column: the same bits for a record in every batch."""
    total = values[:, :1]
    for column in range(1, values.shape[1]):
        total = total + values[:, column : column + 1]
    return total


def exponential(values: Tensor) -> Tensor:
    """exp, the same bits wherever a value stands (torch's may differ at the end of a batch); of absurd values bounded."""
    result: Tensor = _Exponential.apply(values)  # type: ignore[no-untyped-call]
    return result


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        bounded = np.clip(values.numpy(force=True), -_LARGEST_LOGARITHM, _LARGEST_LOGARITHM)
        raised = torch.from_numpy(np.exp(bounded)).to(values)
        ctx.save_for_backward(raised)
        return raised

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        raised: Tensor = ctx.saved_tensors[0]  # type: ignore[attr-defined]
        return gradient * raised


def _layers(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [RowLinear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
