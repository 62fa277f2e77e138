"""A study's numbers worked out: its grid, its noise, its mechanism, its epsilon. The same on all sides.

Hospitals recompute everything here from the study alone before they approve it; nothing is taken from the coordinator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from medfed import metrics
from medfed.errors import ConfigError, PrivacyError, RemoteProtocolError
from medfed.privacy import accounting, quantize
from medfed.privacy.accounting import Bounds, Mechanism
from medfed.standardization import most_of_one_patient
from medfed.standardization import words as statistics_words
from medfed.study import Study

WRAP_PROBABILITY_LIMIT = 1e-9  # for all attempts and words together


@dataclass(frozen=True, slots=True)
class Plan:
    """What follows from a study whose model has ``words`` trainable parameters.

    ``exponent`` and ``limit`` are those of the ring's grid, on which vectors are masked and summed. ``noise_exponent`` and
    ``noise_limit`` are those of the grid on which a clipped sum is saturated and noised: the same grid where that very sum
    is masked, one of its own for local steps, whose outcome is masked without more noise.
    ``noise_sd``: standard deviation, in units of 2^-noise_exponent, of the noise this one hospital adds to a sum.
    ``statistics_words``, ``statistics_exponent`` and ``statistics_noise_sd`` are those of the sum before round 1, 0 without.
    ``metrics_words``, ``metrics_exponent`` and ``metrics_noise_sd`` are those of the sum after the last round, likewise.
    ``mechanism``: what the stated guarantee counts: this hospital's noise (``local``), or the shares of the
    fewest_survivors - colluders that are surely honest in every sum (``distributed``).
    ``own_mechanism``: this hospital's noise alone, which is what remains should the secure sum fail.
    ``wrap_probability``: bound on the chance that any word of any attempt wraps; costs utility, never privacy.
    """

    words: int
    ring_bits: int
    exponent: int
    limit: int
    noise_exponent: int
    noise_limit: int
    noise_sd: float
    statistics_words: int
    statistics_exponent: int
    statistics_noise_sd: float
    metrics_words: int
    metrics_exponent: int
    metrics_noise_sd: float
    sums_to_train: int
    mechanism: Mechanism
    own_mechanism: Mechanism
    attempts: int
    delta: float
    wrap_probability: float

    @property
    def bounds(self) -> Bounds:
        """Both upper bounds on epsilon of all attempts, spares included: the fixed list that approval reserves."""
        return self.bounds_after(self.attempts)

    @property
    def epsilon(self) -> float:
        """The smaller of them."""
        return self.bounds.epsilon

    @property
    def ring_words(self) -> int:
        """Length of every masked vector: the model's parameters, or the statistics or metrics where those are more."""
        return max(self.words, self.statistics_words, self.metrics_words)

    def grid_exponent(self, completed_rounds: int) -> int:
        """Of the sum that leads on from the state after ``completed_rounds``."""
        if self.statistics_words and completed_rounds == 0:
            return self.statistics_exponent
        return self.metrics_exponent if completed_rounds == self.sums_to_train else self.exponent

    def noise_variance(self, survivors: int) -> float:
        """Of the noise in each coordinate of a sum of so many hospitals' gradients, in squared units of its grid; not of
        updates. Public, and a colluder is counted as if it had added its own. Multiplication alone: all sides get the same."""
        return survivors * (self.noise_sd * self.noise_sd)

    @property
    def events_per_attempt(self) -> int:
        """Noised sums behind one upload: the local steps of a round, or 1."""
        return self.mechanism.repeats

    @property
    def own_bounds(self) -> Bounds:
        """The same if every upload were seen unmasked."""
        return accounting.bounds(self.own_mechanism, self.attempts, self.delta)

    @property
    def own_epsilon(self) -> float:
        """The smaller of them."""
        return self.own_bounds.epsilon

    def bounds_after(self, attempts: int) -> Bounds:
        """Both bounds once ``attempts`` of the list are spent, with all their local steps; any of them may be training's, up to
        training's own number. Each new number takes a moment where patients are sampled."""
        return accounting.bounds(self.mechanism, attempts, self.delta)

    def epsilon_after(self, attempts: int) -> float:
        """The smaller of them."""
        return self.bounds_after(attempts).epsilon

    def trained_epsilon_after(self, attempts: int) -> float:
        """The same of a patient who trains: whoever is held out for the metrics pays ``metrics_epsilon`` instead."""
        return accounting.bounds(replace(self.mechanism, aside=()), attempts, self.delta).epsilon

    @property
    def metrics_epsilon(self) -> float | None:
        """What a patient held out for the metrics pays, in full from the first attempt of the study on; None without metrics."""
        return max((accounting.bounds(each, 1, self.delta).epsilon for each in self.mechanism.aside), default=None)

    def running_epsilon(self, attempts: int) -> float:
        """An upper bound on ``epsilon_after`` at once, for a line of progress."""
        return accounting.running(self.mechanism, attempts, self.epsilon, self.delta)

    def read_total(self, data: bytes | memoryview) -> quantize.RingIntegers:
        """A released ring sum as it travels (little-endian words), read as two's complement: a view, signed integers
        [ring_words]. MF-180 if its length is wrong."""
        if len(data) != self.ring_words * self.ring_bits // 8:
            raise RemoteProtocolError(180, f"a released sum of {len(data)} bytes", "both sides need the same study")
        if self.ring_bits == 16:
            return quantize.unwrap(np.frombuffer(data, "<u2").astype(np.uint16, copy=False))
        return quantize.unwrap(np.frombuffer(data, "<u4").astype(np.uint32, copy=False))


def make_plan(study: Study, words: int) -> Plan:
    """Work out a study.

    Raises: ``PrivacyError`` MF-145 if the ring is too narrow for the sum and its noise, or the grid of the noise so coarse
    that its rounding would add more than a tenth to the sensitivity.
    """
    parties, bits = study.cohort.most_hospitals, study.quantization.ring_bits
    noise_exponent, noise_limit = _noise_grid(study)
    clip = study.privacy.clipping_norm * 2.0**noise_exponent
    if math.sqrt(words) > clip / 10:
        raise PrivacyError(145, "the grid is too coarse for this model", "use the 32-bit ring or a smaller range")
    mechanism, own = _mechanisms(study, words)
    exponent, limit = _ring_grid(study)
    if study.training.local is None:
        total_sd = own.sigma * math.sqrt(parties)
        wrap = study.training.attempts * quantize.wrap_probability(parties, limit, total_sd, words, bits)
    else:
        wrap = 0.0  # updates saturate after the noise: their sum cannot leave the ring
    for beside in own.once + own.aside:
        total_sd = beside.sigma * math.sqrt(parties)
        wrap += beside.repeats * quantize.wrap_probability(parties, limit, total_sd, beside.dimensions, bits)
    if wrap > WRAP_PROBABILITY_LIMIT:
        raise PrivacyError(
            145, f"the masked sum could overflow (chance {min(1.0, wrap):.1g})", "use a larger range or less noise"
        )
    return Plan(
        words=words,
        ring_bits=bits,
        exponent=exponent,
        limit=limit,
        noise_exponent=noise_exponent,
        noise_limit=noise_limit,
        noise_sd=own.sigma,
        statistics_words=statistics_words(study),
        statistics_exponent=_statistics_exponent(study) if own.once else 0,
        statistics_noise_sd=own.once[0].sigma if own.once else 0.0,
        metrics_words=metrics.words(study),
        metrics_exponent=_metrics_exponent(study) if own.aside else 0,
        metrics_noise_sd=own.aside[0].sigma if own.aside else 0.0,
        sums_to_train=study.sums_to_train,
        mechanism=mechanism,
        own_mechanism=own,
        attempts=study.attempts,
        delta=study.privacy.delta,
        wrap_probability=wrap,
    )


def _ring_grid(study: Study) -> tuple[int, int]:
    """Exponent and limit of what is masked."""
    parties, bits = study.cohort.most_hospitals, study.quantization.ring_bits
    return quantize.grid_exponent(bits, parties, study.quantization.range), quantize.limit(bits, parties)


def _noise_grid(study: Study) -> tuple[int, int]:
    """Exponent and limit of a clipped sum before its noise. A local step's is never summed with others': it has the
    whole of float32's integers."""
    local = study.training.local
    if local is None:
        return _ring_grid(study)
    if local.sum_range is None:
        raise ConfigError(203, "training.local.sum_range is missing", "plan the study again")
    return quantize.grid_exponent(32, 1, local.sum_range), quantize.limit(32, 1)


def _mechanisms(study: Study, words: int) -> tuple[Mechanism, Mechanism]:
    """The mechanism of the guarantee and that of one hospital's noise alone, of one attempt each."""
    privacy, steps = study.privacy, study.training.events_per_attempt
    exponent, _ = _noise_grid(study)
    # the noise is scaled to the sensitivity on the grid, rounding included, so that the multiplier is the true ratio
    sensitivity = accounting.sensitivity(privacy.clipping_norm, exponent, words)
    needed_sd = privacy.noise_multiplier * sensitivity
    shares = study.cohort.honest_survivors if privacy.mode == "distributed" else 1
    share_sd = needed_sd / math.sqrt(shares)

    def seen(observed: int) -> Mechanism:
        """By whom ``observed`` shares stand before."""
        return Mechanism(
            sampling_rate=privacy.sampling_rate,
            sigma=share_sd,
            shares=observed,
            sensitivity=sensitivity,
            dimensions=words,
            repeats=steps,
            once=_statistics_mechanism(study, observed, shares),
            # held-out patients never train, and those who train are not held out (``client.approval`` pins who is)
            aside=_metrics_mechanism(study, observed, shares),
            # the hospital's ledger refuses one more (``client.ledger``), so that no attempt is counted as both kinds
            most=study.training.attempts if study.attempts > study.training.attempts else None,
        )

    return seen(shares), seen(1)


def _statistics_exponent(study: Study) -> int:
    if study.statistics is None or study.statistics.range is None:
        raise ConfigError(203, "statistics.range is missing", "plan the study again")
    return quantize.grid_exponent(study.quantization.ring_bits, study.cohort.most_hospitals, study.statistics.range)


def _statistics_mechanism(study: Study, observed: int, shares: int) -> tuple[Mechanism, ...]:
    """All attempts at the statistics, where ``observed`` of the ``shares`` of noise stand before the observer."""
    if study.statistics is None:
        return ()
    length = statistics_words(study)
    sensitivity = accounting.sensitivity(most_of_one_patient(study), _statistics_exponent(study), length)
    share_sd = study.statistics.noise_multiplier * sensitivity / math.sqrt(shares)
    return (Mechanism(1.0, share_sd, observed, sensitivity, length, study.statistics.attempts),)


def _metrics_exponent(study: Study) -> int:
    if study.metrics is None or study.metrics.range is None:
        raise ConfigError(203, "metrics.range is missing", "plan the study again")
    return quantize.grid_exponent(study.quantization.ring_bits, study.cohort.most_hospitals, study.metrics.range)


def _metrics_mechanism(study: Study, observed: int, shares: int) -> tuple[Mechanism, ...]:
    """All attempts at the metrics, seen likewise."""
    if study.metrics is None or study.metrics.noise_multiplier is None:
        return ()
    length = metrics.words(study)
    sensitivity = accounting.sensitivity(metrics.most_of_one_patient(study), _metrics_exponent(study), length)
    share_sd = study.metrics.noise_multiplier * sensitivity / math.sqrt(shares)
    return (Mechanism(1.0, share_sd, observed, sensitivity, length, study.metrics.attempts),)


def calibrate_metrics(study: Study, epsilon: float) -> Study:
    """``study`` with the least noise in its metrics that keeps a held-out patient within ``epsilon``. MF-203 as ``calibrate``."""
    shares = study.cohort.honest_survivors if study.privacy.mode == "distributed" else 1

    def draft(noise_multiplier: float) -> Study:
        asked = (
            None if study.metrics is None else study.metrics.model_copy(update={"noise_multiplier": noise_multiplier})
        )
        return study.model_copy(update={"metrics": asked})

    def mechanism(noise_multiplier: float) -> Mechanism:
        return _metrics_mechanism(draft(noise_multiplier), shares, shares)[0]

    found = accounting.calibrate(epsilon, study.privacy.delta, 1, mechanism)
    return draft(min(max(found, 0.3), 10_000.0))


def calibrate(study: Study, words: int, epsilon: float) -> Study:
    """``study`` with the smallest noise multiplier that keeps all its attempts within ``epsilon``, and that claim.

    Raises: ``ConfigError`` MF-203 if no multiplier a study may have reaches it.
    """
    draft = study.model_copy(update={"privacy": study.privacy.model_copy(update={"epsilon": epsilon})})

    def mechanism(noise_multiplier: float) -> Mechanism:
        trial = draft.privacy.model_copy(update={"noise_multiplier": noise_multiplier})
        # what other patients pay aside has noise of its own
        return replace(_mechanisms(draft.model_copy(update={"privacy": trial}), words)[0], aside=())

    found = accounting.calibrate(epsilon, study.privacy.delta, study.attempts, mechanism)
    if not 0.3 <= found <= 10_000:
        raise ConfigError(203, f"epsilon {epsilon:g} needs a noise multiplier of {found:g}", "choose 0.3 to 10000")
    return draft.model_copy(update={"privacy": draft.privacy.model_copy(update={"noise_multiplier": found})})
