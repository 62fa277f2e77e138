"""What a study would cost round by round, how much noise another epsilon would need, and what it asks of this machine.

Epsilon follows from the study alone. Time and memory come from a short trial on made-up records: no patient's are read.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import TypedDict

from torch import nn

from medfed import metrics
from medfed.client.compute import Compute
from medfed.client.trainer import gradient_sum, made_up_patients, warm_up
from medfed.errors import ConfigError
from medfed.models import parameters
from medfed.privacy import plan as plans
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import Plan
from medfed.privacy.secagg.protocol import AggregatorConfig
from medfed.seams import Clock
from medfed.study import Study
from medfed.wire import upload_size_bytes
from medfed.wording import counted, rounded_up

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
    process after the trial. ``patients``: what that is for. ``metrics_epsilon``: of a patient held out for the metrics, in full
    from the first attempt on. ``metrics_auc_noise_sd``: with ``held_out_patients`` at all hospitals together. These three are
    None without metrics, the last one also where the noise would drown an AUC."""

    epsilon_by_attempt: list[Spent]
    noise_by_epsilon: list[Wanted]
    upload_bytes_per_attempt: int
    upload_bytes_in_all: int
    patients: int
    seconds_per_attempt: float
    seconds_in_all: float
    peak_memory_mb: float
    metrics_attempts: int
    metrics_epsilon: float | None
    held_out_patients: int | None
    metrics_auc_noise_sd: float | None


def outlook(
    study: Study,
    plan: Plan,
    model: nn.Module,
    *,
    patients: int,
    held_out: float,
    wanted: Sequence[float],
    clock: Clock,
) -> Outlook:
    """For a hospital of ``patients`` declared patients, where ``held_out`` are at all hospitals together. ``wanted``: epsilons
    to work the noise out for."""
    attempt_s = _seconds_per_attempt(study, plan, model, patients, clock)
    upload = upload_size_bytes(AggregatorConfig.of_anybody(study, plan.ring_words).everybody.upload_bytes)
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
        metrics_epsilon=plan.metrics_epsilon,
        held_out_patients=None if study.metrics is None else round(held_out),
        metrics_auc_noise_sd=_metrics_auc_noise_sd(study, plan, held_out),
    )


def some_attempts(rounds: int, last: int) -> list[int]:
    """About ``_POINTS`` of the attempts 1 to ``last``, the end of the rounds and of the list among them: each figure takes a
    moment where patients are sampled."""
    even = {math.ceil(last * part / _POINTS) for part in range(1, _POINTS + 1)}
    return sorted(even | {1, rounds, last})


def _spent(study: Study, plan: Plan) -> Iterator[Spent]:
    """Of a patient who trains: held-out ones pay for the metrics at once."""
    rounds, last = study.training.rounds, study.training.attempts
    for attempts in some_attempts(rounds, last):
        epsilon = plan.trained_epsilon_after(attempts)
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


def _metrics_auc_noise_sd(study: Study, plan: Plan, held_out: float) -> float | None:
    if study.metrics is None:
        return None
    noise_sd = metrics.noise_sd_of_cell(plan.metrics_noise_sd, plan.metrics_exponent, study.cohort.hospitals)
    return metrics.noise_in_auc(study, held_out, noise_sd)


def in_words(found: Outlook) -> Iterator[str]:
    """Lines for a terminal, epsilon as bars."""
    listed = [spent["attempts"] for spent in found["epsilon_by_attempt"]]
    left_out = "" if listed == list(range(1, listed[-1] + 1)) else f" ({len(listed)} of {listed[-1]} are shown)"
    yield f"Epsilon of a patient who trains, once so many attempts are spent{left_out}:"
    top = max(spent["epsilon"] for spent in found["epsilon_by_attempt"])
    for spent in found["epsilon_by_attempt"]:
        bar = "#" * max(1, round(_BAR * spent["epsilon"] / top)) if top else ""
        epsilon = math.ceil(spent["epsilon"] * 1e4) / 1e4  # a bound never reads smaller than it is
        yield f"  {spent['attempts']:6d}  {epsilon:8.4f}  {bar}{' (spare)' if spent['spare'] else ''}"
    for wanted in found["noise_by_epsilon"]:
        noise = wanted["noise_multiplier"]
        told = "out of reach for a study of this length" if noise is None else f"a noise multiplier of {noise:g}"
        yield f"For epsilon {wanted['epsilon']:g} in all: {told}."
    if found["metrics_epsilon"] is not None:
        told = metrics.noise_in_auc_in_words(found["held_out_patients"] or 0, found["metrics_auc_noise_sd"])
        yield (
            f"Metrics: noised counts over held-out patients, at most {counted(found['metrics_attempts'], 'attempt')}. A patient "
            f"held out pays epsilon {rounded_up(found['metrics_epsilon'])} for them and nothing else, charged in full with the "
            "study's first attempt."
        )
        yield f"  {told}"
    yield (
        f"This machine, for {counted(found['patients'], 'patient')}: about {_seconds(found['seconds_per_attempt'])} an attempt, "
        f"{_seconds(found['seconds_in_all'])} for all of them without waiting; {found['peak_memory_mb']:.0f} MB of memory."
    )
    yield (
        f"Uploads of a hospital: {found['upload_bytes_per_attempt']:,} bytes an attempt (the masked vector and what proves it), "
        f"{found['upload_bytes_in_all']:,} for all attempts."
    )


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
