"""What is known of a variable fades with the time since it was last observed (Che et al. 2018, arXiv:1606.01865, GRU-D).

A value that is carried forward decays towards its variable's center, at a rate that is learned for each variable. The decay of
the hidden state is left out: instead each step also sees how long ago each variable was observed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FIRST_RATE = 0.1  # a step


class InputDecay(nn.Module):
    """Series float[n, steps, 2 * v + more], carried forward -> float[n, steps, 3 * v + more].

    A value last observed d steps ago is multiplied by exp(-max(0, a * d + b)), with a and b of its variable; at the end stand the
    shares of all steps that have passed since. The rates are a convolution over one step with a group for each variable, so that
    gradients of records are those of a layer that every engine knows. Parameters: 2 * v.
    """

    def __init__(self, variables: int) -> None:
        super().__init__()
        self.variables = variables
        self.rates = nn.Conv1d(variables, variables, 1, groups=variables)
        nn.init.constant_(self.rates.weight, _FIRST_RATE)
        nn.init.zeros_(self.rates.bias)  # type: ignore[arg-type]

    def forward(self, series: Tensor) -> Tensor:
        count = self.variables
        observed = series[:, :, count : 2 * count] > 0
        ago = _steps_since(observed).to(series.dtype)
        fading = torch.exp(-torch.relu(self.rates(ago.transpose(1, 2)).transpose(1, 2)))
        values = torch.where(observed, series[:, :, :count], series[:, :, :count] * fading)
        return torch.cat([values, series[:, :, count:], ago / series.shape[1]], dim=2)


def _steps_since(observed: Tensor) -> Tensor:
    """bool[n, steps, v] -> int64 of the same shape: 0 where observed, else steps since then, or since the beginning."""
    places = torch.arange(observed.shape[1], device=observed.device)[:, None]
    last = torch.where(observed, places, 0).cummax(1).values
    return places - last
