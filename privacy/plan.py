"""A study's numbers worked out: its grid, its noise, its mechanism, its epsilon. The same on all sides.

Hospitals recompute everything here from the study alone before they approve it; nothing is taken from the coordinator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, PrivacyError, RemoteProtocolError
from medfed.privacy import accounting, quantize
from medfed.privacy.accounting import Mechanism
from medfed.study import Study

WRAP_PROBABILITY_LIMIT = 1e-9  # for all attempts and words together


@dataclass(frozen=True, slots=True)
class Plan:
    """What follows from a study whose model has ``words`` trainable parameters.

    ``noise_sd``: standard deviation, in grid units of 2^-exponent, of the noise this one hospital adds.
    ``mechanism``: what the stated guarantee counts: this hospital's noise (``local``), or the shares of the
    hospitals - colluders that are surely honest (``distributed``).
    ``own_mechanism``: this hospital's noise alone, which is what remains should the secure sum fail.
    ``wrap_probability``: bound on the chance that any word of any attempt wraps; costs utility, never privacy.
    """

    words: int
    ring_bits: int
    exponent: int
    limit: int
    noise_sd: float
    mechanism: Mechanism
    own_mechanism: Mechanism
    attempts: int
    delta: float
    wrap_probability: float

    @property
    def epsilon(self) -> float:
        """Epsilon of all attempts, spares included: the fixed list that approval reserves."""
        return self.epsilon_after(self.attempts)

    @property
    def own_epsilon(self) -> float:
        """Epsilon of all attempts if every upload were seen unmasked."""
        return accounting.epsilon(accounting.compose(self.own_mechanism, self.attempts), self.delta)

    def epsilon_after(self, attempts: int) -> float:
        """Epsilon once ``attempts`` events of the list are spent."""
        return accounting.epsilon(accounting.compose(self.mechanism, attempts), self.delta) if attempts else 0.0

    def read_total(self, data: bytes) -> NDArray[np.int64]:
        """A released ring sum as it travels (little-endian words) -> int64[words]; MF-180 if its length is wrong."""
        if len(data) != self.words * self.ring_bits // 8:
            raise RemoteProtocolError(180, f"a released sum of {len(data)} bytes", "both sides need the same study")
        if self.ring_bits == 16:
            return quantize.unwrap(np.frombuffer(data, "<u2").astype(np.uint16))
        return quantize.unwrap(np.frombuffer(data, "<u4").astype(np.uint32))


def make_plan(study: Study, words: int) -> Plan:
    """Work out a study.

    Raises: ``PrivacyError`` MF-145 if the ring is too narrow for the sum and its noise, or the grid so coarse that its
    rounding would add more than a tenth to the sensitivity.
    """
    parties, bits = study.cohort.hospitals, study.quantization.ring_bits
    exponent = quantize.grid_exponent(bits, parties, study.quantization.range)
    limit = quantize.limit(bits, parties)
    clip = study.privacy.clipping_norm * 2.0**exponent
    if math.sqrt(words) > clip / 10:
        raise PrivacyError(145, "the grid is too coarse for this model", "use the 32-bit ring or a smaller range")
    mechanism, own = _mechanisms(study, words, exponent)
    total_sd = own.sigma * math.sqrt(parties)
    wrap = min(1.0, study.training.attempts * quantize.wrap_probability(parties, limit, total_sd, words, bits))
    if wrap > WRAP_PROBABILITY_LIMIT:
        raise PrivacyError(
            145, f"the masked sum could overflow (chance {wrap:.1g})", "use a larger range or less noise"
        )
    return Plan(
        words=words,
        ring_bits=bits,
        exponent=exponent,
        limit=limit,
        noise_sd=own.sigma,
        mechanism=mechanism,
        own_mechanism=own,
        attempts=study.training.attempts,
        delta=study.privacy.delta,
        wrap_probability=wrap,
    )


def _mechanisms(study: Study, words: int, exponent: int) -> tuple[Mechanism, Mechanism]:
    """The mechanism of the guarantee and that of one hospital's noise alone."""
    privacy = study.privacy
    # the noise is scaled to the sensitivity on the grid, rounding included, so that the multiplier is the true ratio
    sensitivity = accounting.sensitivity(privacy.clipping_norm, exponent, words)
    needed_sd = privacy.noise_multiplier * sensitivity
    honest = study.cohort.hospitals - study.cohort.colluders
    shares = honest if privacy.mode == "distributed" else 1
    share_sd = needed_sd / math.sqrt(shares)
    mechanism = Mechanism(privacy.sampling_rate, share_sd, shares, sensitivity, words)
    return mechanism, Mechanism(privacy.sampling_rate, share_sd, 1, sensitivity, words)


def calibrate(study: Study, words: int, epsilon: float) -> Study:
    """``study`` with the smallest noise multiplier that keeps all its attempts within ``epsilon``, and that claim.

    Raises: ``ConfigError`` MF-203 if no multiplier a study may have reaches it.
    """
    draft = study.model_copy(update={"privacy": study.privacy.model_copy(update={"epsilon": epsilon})})

    def mechanism(noise_multiplier: float) -> Mechanism:
        trial = draft.privacy.model_copy(update={"noise_multiplier": noise_multiplier})
        exponent = quantize.grid_exponent(
            study.quantization.ring_bits, study.cohort.hospitals, study.quantization.range
        )
        return _mechanisms(draft.model_copy(update={"privacy": trial}), words, exponent)[0]

    found = accounting.calibrate(epsilon, study.privacy.delta, study.training.attempts, mechanism)
    if not 0.3 <= found <= 10_000:
        raise ConfigError(203, f"epsilon {epsilon:g} needs a noise multiplier of {found:g}", "choose 0.3 to 10000")
    return draft.model_copy(update={"privacy": draft.privacy.model_copy(update={"noise_multiplier": found})})
