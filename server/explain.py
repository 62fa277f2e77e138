"""``medfed-server study check``: what a study means, worked out from its file, in plain words or as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypedDict

from medfed import metrics
from medfed.display import block, shown
from medfed.errors import PrivacyError
from medfed.model_choice import described
from medfed.models import catalogue, parameters
from medfed.privacy.plan import Plan, make_plan
from medfed.privacy.statement import NOT_CLAIMED, excess_noise, holds_against
from medfed.roster import Roster
from medfed.study import Study

_HELD_OUT = 0.2


class StudyCheck(TypedDict):
    """``epsilon`` counts all attempts; it is the smaller of ``epsilon_rdp`` and ``epsilon_pld`` (null where that bound has
    none), as ``accountant`` says. ``noise_sd_of_mean``: standard deviation of the noise in each coordinate of the
    released mean (of gradients clipped to ``clipping_norm``, or of the updates of local steps), null without the roster.
    ``statistics_noise_sd``: the same of a feature's mean before round 1, in halves of its public range.
    ``metrics_auc_noise_sd``: what the noise would do to an AUC of 0.80 with a fifth of the declared patients held out; null
    without the roster, or where it would drown it. ``grid_step`` and ``range`` are in units of the gradient or update;
    ``wrap_probability`` is for all attempts and words together."""

    study: str
    study_sha256: str
    purpose: str
    expires: str
    expired: bool
    model: str
    parameters: int
    hospitals: int
    colluders: int
    rounds: int
    spare_attempts: int
    aggregate: str
    local_steps: int
    sampling_rate: float
    unit: str
    mode: str
    epsilon_claimed: float
    epsilon: float
    epsilon_rdp: float
    epsilon_pld: float | None
    accountant: str
    epsilon_without_spares: float
    epsilon_own_noise_alone: float
    delta: float
    noise_multiplier: float
    clipping_norm: float
    excess_noise: float
    noise_sd_of_mean: float | None
    statistics_attempts: int
    statistics_noise_sd: float | None
    metrics_attempts: int
    metrics_noise_multiplier: float | None
    metrics_auc_noise_sd: float | None
    ring_bits: int
    grid_step: float
    range: float
    wrap_probability: float
    upload_bytes_per_round: int
    holds_against: str
    not_claimed: str


def check(study: Study, roster: Roster | None, wall_s: float) -> StudyCheck:
    """Work out a study. Raises MF-135 if it claims less epsilon than it costs, MF-145 if its ring is too narrow."""
    plan = make_plan(study, parameters.count(catalogue.build(study)))
    if plan.epsilon > study.privacy.epsilon:
        what = f"the study states epsilon {study.privacy.epsilon:g}, it is {plan.epsilon:.4f}"
        raise PrivacyError(135, what, "plan it again: medfed-server study new")
    step = 2.0**-plan.exponent
    noise = None
    if roster is not None:
        noise = _noise_sd_of_mean(study, plan, roster)
    return StudyCheck(
        study=study.study.name,
        study_sha256=study.hash().hex(),
        purpose=study.study.purpose,
        expires=study.study.expires,
        expired=study.expired(wall_s),
        model=described(study.model),
        parameters=plan.words,
        hospitals=study.cohort.hospitals,
        colluders=study.cohort.colluders,
        rounds=study.training.rounds,
        spare_attempts=study.training.spare_attempts,
        aggregate=study.training.aggregate,
        local_steps=plan.events_per_attempt,
        sampling_rate=study.privacy.sampling_rate,
        unit=study.privacy.unit,
        mode=study.privacy.mode,
        epsilon_claimed=study.privacy.epsilon,
        epsilon=plan.epsilon,
        epsilon_rdp=plan.bounds.rdp,
        epsilon_pld=plan.bounds.pld,
        accountant=plan.bounds.accountant,
        # whatever else a study has is paid for with the first attempt
        epsilon_without_spares=plan.epsilon_after(study.training.rounds),
        epsilon_own_noise_alone=plan.own_epsilon,
        delta=plan.delta,
        noise_multiplier=study.privacy.noise_multiplier,
        clipping_norm=study.privacy.clipping_norm,
        excess_noise=excess_noise(study),
        noise_sd_of_mean=noise,
        statistics_attempts=0 if study.statistics is None else study.statistics.attempts,
        statistics_noise_sd=None if roster is None else _statistics_noise_sd(study, plan, roster),
        metrics_attempts=0 if study.metrics is None else study.metrics.attempts,
        metrics_noise_multiplier=None if study.metrics is None else study.metrics.noise_multiplier,
        metrics_auc_noise_sd=None if roster is None else _metrics_auc_noise_sd(study, plan, roster),
        ring_bits=plan.ring_bits,
        grid_step=step,
        range=study.quantization.range,
        wrap_probability=plan.wrap_probability,
        upload_bytes_per_round=plan.ring_words * plan.ring_bits // 8,
        holds_against=holds_against(study),
        not_claimed=NOT_CLAIMED,
    )


def _noise_sd_of_mean(study: Study, plan: Plan, roster: Roster) -> float:
    """Of local steps: of the noise as it was added, not of how later steps answer to it."""
    sum_sd = plan.noise_sd * 2.0**-plan.noise_exponent * math.sqrt(study.cohort.hospitals)
    mean_sd = sum_sd / (study.privacy.sampling_rate * roster.nominal_patients)
    local = study.training.local
    return mean_sd if local is None else mean_sd * local.learning_rate * math.sqrt(local.steps)


def _statistics_noise_sd(study: Study, plan: Plan, roster: Roster) -> float | None:
    if not plan.statistics_words:
        return None
    sum_sd = plan.statistics_noise_sd * 2.0**-plan.statistics_exponent * math.sqrt(study.cohort.hospitals)
    return sum_sd / roster.nominal_patients


def _metrics_auc_noise_sd(study: Study, plan: Plan, roster: Roster) -> float | None:
    if study.metrics is None:
        return None
    noise_sd = metrics.noise_sd_of_cell(plan.metrics_noise_sd, plan.metrics_exponent, study.cohort.hospitals)
    auc = metrics.expected(study, round(_HELD_OUT * roster.nominal_patients), noise_sd).auc
    return None if auc is None else auc.noise_sd


def in_words(checked: StudyCheck) -> Iterator[str]:
    """The check as lines for a terminal."""
    yield f"Study {shown(checked['study'])}, until {checked['expires']}{' (EXPIRED)' if checked['expired'] else ''}"
    yield f"  hash {checked['study_sha256']}"
    yield from block(checked["purpose"])
    yield (
        f"Trains {checked['model']} ({checked['parameters']} parameters) for {checked['rounds']} rounds, with "
        f"{checked['spare_attempts']} spare attempts; each {checked['unit']} is in a "
        f"{'round' if checked['local_steps'] == 1 else 'step'} with chance {checked['sampling_rate']:g}."
    )
    if checked["local_steps"] > 1:
        yield f"  {checked['local_steps']} private steps a round at each hospital, each of them counted"
    yield (
        f"Privacy: epsilon {checked['epsilon']:.4g} for all attempts (claimed {checked['epsilon_claimed']:g}), "
        f"{checked['epsilon_without_spares']:.4g} without spares, at delta {checked['delta']:g} a {checked['unit']}."
    )
    pld = "no figure" if checked["epsilon_pld"] is None else f"{checked['epsilon_pld']:.4g}"
    yield f"  the smaller of two bounds: privacy loss distribution {pld}, Renyi divergence {checked['epsilon_rdp']:.4g}"
    yield "  a hospital's lifetime account counts by Renyi divergence"
    yield f"  mode {checked['mode']}: holds against {checked['holds_against']}"
    yield f"  one hospital's noise alone: epsilon {checked['epsilon_own_noise_alone']:.4g}"
    yield f"  not claimed: {checked['not_claimed']}"
    yield (
        f"Noise: multiplier {checked['noise_multiplier']:g} on clipping norm {checked['clipping_norm']:g}; the sum holds "
        f"{checked['excess_noise']:.4g} times the variance that the guarantee needs."
    )
    if checked["noise_sd_of_mean"] is not None:
        yield f"  in each coordinate of the mean {checked['aggregate']}: standard deviation {checked['noise_sd_of_mean']:.3g}"
    if checked["statistics_attempts"]:
        noise = checked["statistics_noise_sd"]
        yield (
            f"Statistics: before round 1, mean and scale of the numeric features from one sum over all patients, in at most "
            f"{checked['statistics_attempts']} attempts, all counted above."
        )
        if noise is not None:
            yield f"  in each mean: standard deviation {noise:.3g} of half the feature's range; useless where that is wide"
    if checked["metrics_attempts"]:
        noise = checked["metrics_auc_noise_sd"]
        told = (
            "would drown an AUC" if noise is None else f"would move an AUC of 0.80 by {noise:.3g} (standard deviation)"
        )
        yield (
            f"Metrics: after the last round, noised counts over held-out patients, in at most {checked['metrics_attempts']} "
            f"attempts, noise multiplier {checked['metrics_noise_multiplier']:g}; they are in nothing else."
        )
        yield f"  with one held-out patient for every five declared, the noise {told}"
    yield (
        f"Cohort: {checked['hospitals']} hospitals, of which {checked['colluders']} may conspire with the coordinator; "
        "all of them are needed in every round."
    )
    yield (
        f"Sums: {checked['ring_bits']}-bit ring, steps of {checked['grid_step']:.3g}, a hospital's word saturates beyond "
        f"{checked['range']:g}; chance that any word wraps {checked['wrap_probability']:.1g}; "
        f"{checked['upload_bytes_per_round']} bytes of vector an upload."
    )
