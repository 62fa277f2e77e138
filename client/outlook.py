"""What a study would cost round by round, how much noise another epsilon would need, and what it asks of this machine.

Epsilon follows from the study alone. Time and memory come from a short trial on made-up records: no patient's are read.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypedDict

from torch import nn

from medfed import metrics
from medfed.client.compute import Compute
from medfed.client.trainer import gradient_sum, made_up_patients, warm_up
from medfed.errors import ConfigError
from medfed.models import parameters
from medfed.privacy import accounting
from medfed.privacy import plan as plans
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import Plan
from medfed.privacy.secagg.protocol import AggregatorConfig
from medfed.seams import Clock
from medfed.study import Study
from medfed.wire import upload_size_bytes

WANTED = (1.0, 3.0, 8.0)
_POINTS = 12
_TRIED_PATIENTS = 64
_TRIED_NOISE = 1 << 20
_TRIES = 3
_BAR = 30


class Spent(TypedDict):
    """Epsilon of a patient who trains once ``attempts`` are spent, ``spare``: whether the last of them is beyond
    the planned rounds."""

    attempts: int
    epsilon: float
    spare: bool


class Wanted(TypedDict):
    """The noise that another epsilon would need for the same list; None where no study may have as much or as little."""

    epsilon: float
    noise_multiplier: float | None


class Outlook(TypedDict):
    """``upload_bytes``: of this hospital, ``in_all`` with every spare. ``seconds_per_attempt``: clipped sum (of all its local
    steps) and noise for the patients expected in an attempt, on this machine as it is now; ``peak_memory_mb``: of this
    process after the trial. ``patients``: what that is for. ``metrics_auc_noise_sd``: with as many held-out patients as a
    quarter of them at every hospital; None without metrics or where the noise would drown it."""

    epsilon_by_attempt: list[Spent]
    noise_by_epsilon: list[Wanted]
    upload_bytes_per_attempt: int
    upload_bytes_in_all: int
    patients: int
    seconds_per_attempt: float
    seconds_in_all: float
    peak_memory_mb: float
    metrics_attempts: int
    metrics_auc_noise_sd: float | None


def outlook(
    study: Study, plan: Plan, model: nn.Module, *, patients: int, wanted: Sequence[float], clock: Clock
) -> Outlook:
    """For a hospital of ``patients`` declared patients. ``wanted``: epsilons to work the noise out for."""
    attempt_s = _seconds_per_attempt(study, plan, model, patients, clock)
    upload = upload_size_bytes(_masked_bytes(study, plan))
    return Outlook(
        epsilon_by_attempt=list(_spent(study, plan)),
        noise_by_epsilon=[_noise_for(study, plan, epsilon) for epsilon in wanted],
        upload_bytes_per_attempt=upload,
        upload_bytes_in_all=upload * plan.attempts,
        patients=patients,
        seconds_per_attempt=attempt_s,
        seconds_in_all=attempt_s * plan.attempts,
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1 << (20 if sys.platform == "darwin" else 10)),
        metrics_attempts=0 if study.metrics is None else study.metrics.attempts,
        metrics_auc_noise_sd=_metrics_auc_noise_sd(study, plan, patients),
    )


def _masked_bytes(study: Study, plan: Plan) -> int:
    """As ``AggregatorConfig`` has it, whoever the hospitals are."""
    nobody = tuple(bytes([number]) * 32 for number in range(study.cohort.hospitals))
    return AggregatorConfig(
        bytes(32), bytes(32), nobody, study.cohort.colluders, plan.ring_words, plan.ring_bits
    ).upload_bytes


def _spent(study: Study, plan: Plan) -> Iterator[Spent]:
    """At most ``_POINTS`` of the training's attempts, the end of its rounds and of the list among them."""
    rounds, last = study.training.rounds, study.training.attempts
    trained = replace(plan.mechanism, aside=())  # of a patient who trains: held-out ones pay for the metrics at once
    even = {math.ceil(last * part / _POINTS) for part in range(1, _POINTS + 1)}
    for attempts in sorted(even | {1, rounds, last}):
        epsilon = accounting.bounds(trained, attempts, plan.delta).epsilon
        yield Spent(attempts=attempts, epsilon=epsilon, spare=attempts > rounds)


def _noise_for(study: Study, plan: Plan, epsilon: float) -> Wanted:
    try:
        found = plans.calibrate(study, plan.words, epsilon).privacy.noise_multiplier
    except ConfigError:
        return Wanted(epsilon=epsilon, noise_multiplier=None)
    return Wanted(epsilon=epsilon, noise_multiplier=found)


def _seconds_per_attempt(study: Study, plan: Plan, model: nn.Module, patients: int, clock: Clock) -> float:
    """A warm trial with every made-up patient in it, scaled to the patients expected in a step."""
    expected = study.privacy.sampling_rate * patients
    everybody = study.model_copy(update={"privacy": study.privacy.model_copy(update={"sampling_rate": 1.0})})
    tried, compute = max(1, min(_TRIED_PATIENTS, math.ceil(expected))), Compute()
    made_up, weights = made_up_patients(study, tried), parameters.flatten(model)
    warm_up(everybody, model, compute)
    tries = []
    for _ in range(_TRIES):  # the quickest: other work on the machine only ever adds
        started = clock.monotonic()
        gradient_sum(everybody, model, weights, made_up, sampling_key=bytes(64), compute=compute)
        tries.append(clock.monotonic() - started)
    step_s = min(tries) * expected / tried
    drawn = min(plan.words, _TRIED_NOISE)
    started = clock.monotonic()
    discrete_gaussian(bytes(32), plan.noise_sd, drawn)  # thrown away: a key that everybody knows
    noise_s = (clock.monotonic() - started) * plan.words / drawn
    return plan.events_per_attempt * (step_s + noise_s)


def _metrics_auc_noise_sd(study: Study, plan: Plan, patients: int) -> float | None:
    if study.metrics is None:
        return None
    hospitals = study.cohort.hospitals
    noise_sd = metrics.noise_sd_of_cell(plan.metrics_noise_sd, plan.metrics_exponent, hospitals)
    auc = metrics.expected(study, patients // 4 * hospitals, noise_sd).auc
    return None if auc is None else auc.noise_sd


def in_words(found: Outlook) -> Iterator[str]:
    """Lines for a terminal, epsilon as bars."""
    yield "Epsilon of a patient who trains, once so many attempts are spent:"
    top = max(spent["epsilon"] for spent in found["epsilon_by_attempt"])
    for spent in found["epsilon_by_attempt"]:
        bar = "#" * max(1, round(_BAR * spent["epsilon"] / top)) if top else ""
        yield f"  {spent['attempts']:6d}  {spent['epsilon']:8.4f}  {bar}{' (spare)' if spent['spare'] else ''}"
    for wanted in found["noise_by_epsilon"]:
        noise = wanted["noise_multiplier"]
        told = "out of reach for a study of this length" if noise is None else f"a noise multiplier of {noise:g}"
        yield f"For epsilon {wanted['epsilon']:g} in all: {told}."
    if found["metrics_attempts"]:
        noise = found["metrics_auc_noise_sd"]
        told = "drown an AUC of 0.80" if noise is None else f"move an AUC of 0.80 by {noise:.3g} (standard deviation)"
        yield (
            f"Metrics: noised counts over held-out patients, at most {found['metrics_attempts']} attempts. With "
            f"{found['patients'] // 4} held out at every hospital the noise would {told}."
        )
    yield (
        f"This machine, for {found['patients']} patients: about {_seconds(found['seconds_per_attempt'])} an attempt, "
        f"{_seconds(found['seconds_in_all'])} for all of them without waiting; {found['peak_memory_mb']:.0f} MB of memory."
    )
    yield (
        f"Sent: {found['upload_bytes_per_attempt']:,} bytes an attempt, {found['upload_bytes_in_all']:,} for all of them."
    )


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
