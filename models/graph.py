"""A message-passing network over molecules: float32[n, atoms, values + atoms] -> logits float32[n, outputs].

*Source* Gilmer et al. 2017 (arXiv:1704.01212): an atom gets from each neighbor a linear function of its state by the kind of
bond, their sum is added to a function of its own. One molecule's atoms see each other, no two molecules do. Atoms' states
pass through linear layers as places of a sequence do, so that gradients are taken record by record as in a Transformer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medfed.models.head import linear_from_zero
from medfed.record_parts import ATOM_VALUES, BOND_KINDS

_USUAL_ATOMS = 32.0  # what the sum over atoms is divided by: of the order of the mean then


class MessagePassing(nn.Module):
    """``layers`` rounds of messages; the last layer sees the mean and the sum of the atoms' states.

    Parameters, d = ``hidden_size``: (``ATOM_VALUES`` + 1) * d, (5 * d + 3) * d for each round, 2 * d of the last
    normalization, and outputs * (2 * d + 1).
    """

    def __init__(self, outputs: int, hidden_size: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(ATOM_VALUES, hidden_size)
        self.rounds = nn.ModuleList([Messages(hidden_size) for _ in range(layers)])
        self.norm = nn.LayerNorm(hidden_size)
        self.head = linear_from_zero(2 * hidden_size, outputs)

    def forward(self, molecules: Tensor) -> Tensor:
        atoms, bonds = molecules[:, :, :ATOM_VALUES], molecules[:, :, ATOM_VALUES:]
        is_there = atoms[:, :, :1] > 0
        kinds = torch.arange(1, BOND_KINDS + 1, device=bonds.device, dtype=bonds.dtype)
        neighbors = (bonds[:, :, None, :] == kinds[:, None]).to(atoms.dtype).flatten(2)  # [n, atoms, kinds * atoms]
        hidden = torch.where(is_there, self.embedding(atoms), 0.0)
        for each in self.rounds:
            hidden = torch.where(is_there, each(hidden, neighbors), 0.0)
        seen = torch.where(is_there, self.norm(hidden), 0.0).sum(1)
        mean = seen / is_there.sum(1).clamp(min=1).to(seen.dtype)
        logits: Tensor = self.head(torch.cat([mean, seen / _USUAL_ATOMS], dim=1))
        return logits


class Messages(nn.Module):
    """States float[n, atoms, d], neighbors float[n, atoms, kinds * atoms] of 0 and 1 -> states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = nn.Linear(width, width)
        self.by_bond = nn.Linear(width, BOND_KINDS * width, bias=False)

    def forward(self, hidden: Tensor, neighbors: Tensor) -> Tensor:
        normed = self.norm(hidden)
        sent = self.by_bond(normed).unflatten(2, (BOND_KINDS, -1)).transpose(1, 2).flatten(1, 2)
        result: Tensor = hidden + torch.relu(self.own(normed) + neighbors @ sent)
        return result
