"""How a local step follows its gradient: straight, with momentum, or by DP-AdamBC.

A rule sees noised gradients and public numbers alone, so that whatever it makes of them costs no more privacy. Its moments are
float64, and live as long as the hospital's steps of one round.

*Source* heavy-ball momentum (Polyak 1964); DP-AdamBC (Tang, Panchal, Lecuyer 2024, arXiv:2312.14334, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medfed.study import DpAdamBC, LocalStep, Momentum

Floats = NDArray[np.float64]
# gradient float64[d], which may be written over -> the step to be taken against it, float64[d], the caller's own
LocalRule = Callable[[Floats], Floats]


def local_rule(step: LocalStep | None, noise_variance: float) -> LocalRule:
    """A fresh rule. ``noise_variance``: of the noise in each coordinate of a gradient, 0 without noise."""
    if step is None:
        return _straight
    return _Momentum(step) if isinstance(step, Momentum) else _DpAdamBC(step, noise_variance)


def _straight(gradient: Floats) -> Floats:
    return gradient


class _Momentum:
    def __init__(self, step: Momentum) -> None:
        self._decay = step.momentum
        self._velocity: Floats | float = 0.0

    def __call__(self, gradient: Floats) -> Floats:
        self._velocity = self._decay * self._velocity + gradient
        gradient[:] = self._velocity
        return gradient


class _DpAdamBC:
    def __init__(self, step: DpAdamBC, noise_variance: float) -> None:
        self._step, self._variance = step, noise_variance
        self._first: Floats | float = 0.0
        self._second: Floats | float = 0.0
        # the weight that the moments' start at 0 still has
        self._start1 = self._start2 = 1.0

    def __call__(self, gradient: Floats) -> Floats:
        step = self._step
        self._first = step.beta1 * self._first + (1.0 - step.beta1) * gradient
        self._second = step.beta2 * self._second + (1.0 - step.beta2) * np.square(gradient)
        self._start1, self._start2 = self._start1 * step.beta1, self._start2 * step.beta2
        spread = self._second / (1.0 - self._start2) - self._variance
        moved: Floats = self._first / (1.0 - self._start1) / np.sqrt(np.maximum(spread, step.floor))
        return moved
