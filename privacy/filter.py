"""The lifetime cap: a privacy filter over studies that are chosen after seeing the results of earlier ones.

Adding up RDP stays valid when each mechanism is chosen in the light of what came before, as long as one order, fixed
beforehand, is watched and everything stops before its sum passes a fixed budget. It is not known to stay valid when
the best order is picked afterwards, as one does for a list of events fixed in advance. So the filter's order depends
on the hospital's cap and delta alone, as they stood before anything was spent.

*Source* Feldman, Zrnic 2021 (arXiv:2008.11193), Theorem 4.3 (RDP filter of one order); Haney et al. 2023
(arXiv:2309.05901) for interleaved studies; conversion: Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), Prop. 12.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError
from medfed.privacy.accounting import ORDERS

_ROUNDING = 1e-9  # covers the rounding of float64, so that figures come out rounded up


def conversion(delta: float) -> NDArray[np.float64]:
    """What turns RDP into epsilon at ``delta`` by adding, at every order of ``ORDERS``: float64[len(ORDERS)]."""
    if not 0.0 < delta < 1.0:
        raise ConfigError(203, f"delta {delta} is outside (0, 1)", "correct it")
    orders = np.asarray(ORDERS)
    added: NDArray[np.float64] = np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return added


def filter_order(cap: float, delta: float) -> int:
    """Index into ``ORDERS`` of the order this filter watches: the one that admits most Gaussian noise events.

    A Gaussian event costs rho times the order, hence the largest budget a unit of the order. For such events (q = 1)
    nothing is lost against the best order found afterwards; others are refused a little early, never late.
    """
    if not 0.0 < cap < math.inf:
        raise ConfigError(203, f"lifetime epsilon {cap} is not positive", "correct it")
    return int(np.argmax((cap - conversion(delta)) / np.asarray(ORDERS)))


def filter_epsilon(rdp_total: NDArray[np.float64], cap: float, delta: float, at_most: float = 1.0) -> float:
    """The figure that must stay at or below the cap: epsilon of the total RDP at the filter's order, rounded up.

    ``cap`` and ``delta`` as they were at the beginning choose the order. ``at_most``: the delta now; the smaller of the two
    counts, a larger one must not make less of what is spent.
    Never below ``accounting.epsilon`` of the same total, and far above it while little is spent: a figure to decide by,
    not to show.
    """
    order = filter_order(cap, delta)
    return max(0.0, float(rdp_total[order] + conversion(min(delta, at_most))[order])) * (1 + _ROUNDING)
