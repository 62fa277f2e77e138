"""What a series comes to, in numbers of one size, and the linear model of them: the most that little noise leaves of a series.

Under privacy a patient's gradient is clipped as a whole. Values without bounds would spend all of it on a few patients and
a few variables, and records with much in them would be clipped while others are not. So values are squashed first, and the
summaries of each record are brought to nearly one length: then the clipping norm bites all records alike, and a linear layer
needs few rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medfed.models.head import linear_from_zero

PER_VARIABLE = 5
_BOUND = 2.0  # scales of the study's own, beyond which a value says little more
_LENGTH = 4.0
_USUALLY_OBSERVED = 0.3  # share of the steps; a public guess, so that the shares say little where nothing is unusual
_CHANGE = 0.5
_LEAST_DEVIATION = 0.1  # a root's slope has no bound at 0


class SeriesSummaries(nn.Module):
    """Series float32[n, steps, 2 * v + 1 + f] -> logits float32[n, outputs]: a linear layer on ``summarise``, begun at zero.

    Parameters: outputs * (5 * v + 1 + f + 1).
    """

    def __init__(self, variables: int, features: int, outputs: int) -> None:
        super().__init__()
        self.variables = variables
        self.head = linear_from_zero(width(variables, features), outputs)

    def forward(self, series: Tensor) -> Tensor:
        logits: Tensor = self.head(summarise(series, self.variables))
        return logits


def width(variables: int, features: int) -> int:
    """How many numbers ``summarise`` gives."""
    return PER_VARIABLE * variables + 1 + features


def summarise(series: Tensor, variables: int) -> Tensor:
    """float[n, steps, 2 * v + 1 + f] -> float[n, 5 * v + 1 + f], each record's numbers of a length just below 4.

    Of each variable's observed values v, as 2 tanh(v / 2): their mean, their last, their standard deviation, half the difference
    of their means in the second and first half of the steps (0 without observations in both), and in what share of the steps it
    was observed, less 0.3; in what share of the steps the stay lies; the features of the first step. Steps outside the stay take
    no part. 0, a variable's center, stands for what was nowhere observed. Then all is divided by sqrt(1 + sum of squares) / 4.
    Least and greatest values are left out: they tell little beside these, and every number takes its part of the clipping norm.
    """
    inside = series[:, :, 2 * variables : 2 * variables + 1] > 0
    observed = (series[:, :, variables : 2 * variables] > 0) & inside
    values = torch.where(observed, _BOUND * torch.tanh(series[:, :, :variables] / _BOUND), 0.0)
    steps = series.shape[1]
    mean = _mean(values, observed)
    variance = (_mean(values * values, observed) - mean * mean).clamp(min=0.0)
    deviation = torch.sqrt(variance + _LEAST_DEVIATION**2) - _LEAST_DEVIATION
    early, late = observed[:, : steps // 2], observed[:, steps // 2 :]
    change = _mean(values[:, steps // 2 :], late) - _mean(values[:, : steps // 2], early)
    change = torch.where(early.any(1) & late.any(1), _CHANGE * change, 0.0)
    share = observed.sum(1).to(values.dtype) / steps - _USUALLY_OBSERVED
    stay = inside.sum(1).to(values.dtype) / steps
    features = torch.where(inside[:, 0], series[:, 0, 2 * variables + 1 :], 0.0)
    found = torch.cat([mean, _last(values, observed), deviation, change, share, stay, features], dim=1)
    return found * (_LENGTH / torch.sqrt(1.0 + (found * found).sum(1, keepdim=True)))


def _mean(values: Tensor, observed: Tensor) -> Tensor:
    """[n, steps, v], 0 where not observed -> [n, v]."""
    return values.sum(1) / observed.sum(1).clamp(min=1).to(values.dtype)


def _last(values: Tensor, observed: Tensor) -> Tensor:
    places = torch.arange(values.shape[1], device=values.device)[:, None]
    latest = torch.where(observed, places, 0).amax(1, keepdim=True)
    return torch.where(observed.any(1), values.gather(1, latest)[:, 0], 0.0)
