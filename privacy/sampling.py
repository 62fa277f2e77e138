"""Which patients take part in a step: independent secret coins, for hospitals.

Only this kind of sampling is what the accountant assumes; shuffled batches are not. An empty mask is a step like any
other (noise and nothing else).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError
from medfed.privacy.keystream import Keystream


def poisson_mask(key: bytes, population: int, sampling_rate: float) -> NDArray[np.bool_]:
    """Each of ``population`` patients independently with probability ``sampling_rate`` in (0, 1]: bool[population].

    ``key``: 32 fresh secret bytes. A coin compares a uniform 64-bit word with floor(q 2^64), so the probability is q
    or less by under 2^-64, never more (epsilon grows with q); q = 1 takes everybody.
    Raises ``ConfigError`` (MF-203) for a rate or population out of range.
    """
    if not 0.0 < sampling_rate <= 1.0 or population < 0:
        raise ConfigError(203, f"sampling rate {sampling_rate} of {population} patients", "use a rate in (0, 1]")
    if sampling_rate == 1.0:
        return np.ones(population, dtype=np.bool_)
    threshold = np.uint64(int(sampling_rate * 2.0**64))  # a product with a power of two is exact
    return Keystream(key).words(population) < threshold
