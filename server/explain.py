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
from medfed.privacy.secagg.protocol import AggregatorConfig
from medfed.privacy.statement import NOT_CLAIMED, excess_noise, holds_against
from medfed.roster import Roster, require_small_delta
from medfed.study import ServerStep, Study, Training
from medfed.wire import upload_size_bytes
from medfed.wording import counted, rounded_up


class StudyCheck(TypedDict):
    """``epsilon`` counts all attempts; it is the smaller of ``epsilon_rdp`` and ``epsilon_pld`` (null where that bound has
    none), as ``accountant`` says. ``noise_sd_of_mean``: standard deviation of the noise in each coordinate of the
    released mean (of gradients clipped to ``clipping_norm``, or of the updates of local steps), null without the roster or where
    local steps scale it by what they see. ``server_step`` and ``local_step`` (null without): how sums and gradients are followed.
    ``statistics_noise_sd``: the same of a feature's mean before round 1, in halves of its public range.
    ``epsilon_without_spares``: of a patient who trains; ``metrics_epsilon``: of one held out for the metrics, in full from the
    first attempt on, null without. ``metrics_auc_noise_sd``: what the noise would do to an AUC of 0.80 with
    ``held_out_patients`` at all hospitals together, a fifth of their patients; null without the roster, or where it would
    drown it. ``vector_bytes``: of the masked numbers alone; ``upload_bytes_per_round``: of the whole message. ``grid_step`` and
    ``range`` are in units of the gradient or update; ``wrap_probability`` is for all attempts and words together."""

    study: str
    study_sha256: str
    purpose: str
    expires: str
    expired: bool
    model: str
    parameters: int
    hospitals: int
    colluders: int
    fewest_survivors: int
    rounds: int
    spare_attempts: int
    aggregate: str
    local_steps: int
    server_step: str
    local_step: str | None
    released: str
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
    metrics_epsilon: float | None
    metrics_noise_multiplier: float | None
    held_out_patients: int | None
    metrics_auc_noise_sd: float | None
    ring_bits: int
    grid_step: float
    range: float
    wrap_probability: float
    vector_bytes: int
    upload_bytes_per_round: int
    holds_against: str
    not_claimed: str


def check(study: Study, roster: Roster | None, wall_s: float) -> StudyCheck:
    """Work out a study. Raises MF-135 if it claims less epsilon than it costs, MF-145 if its ring is too narrow, MF-131 if its
    delta is too large for the declared patients of a hospital in the roster: that hospital could not approve it."""
    plan = make_plan(study, parameters.count(catalogue.build(study)))
    if plan.epsilon > study.privacy.epsilon:
        what = f"the study states epsilon {study.privacy.epsilon:g}, it is {plan.epsilon:.4f}"
        raise PrivacyError(135, what, "plan it again: medfed-server study new")
    step, local = 2.0**-plan.exponent, study.training.local
    noise, held_out = None, None
    if roster is not None:
        noise = _noise_sd_of_mean(study, plan, roster)
        largest = max(entry.nominal_patients for entry in roster.hospitals)
        require_small_delta(study.privacy.delta, largest, f"plan it with a delta of at most 0.1 / {largest}")
        held_out = None if study.metrics is None else round(metrics.held_out(roster.nominal_patients))
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
        fewest_survivors=study.cohort.fewest_survivors,
        rounds=study.training.rounds,
        spare_attempts=study.training.spare_attempts,
        aggregate=study.training.aggregate,
        local_steps=plan.events_per_attempt,
        server_step=_step(study.training.server_step),
        local_step=None if local is None or local.step is None else _step(local.step),
        released=_released(study.training),
        sampling_rate=study.privacy.sampling_rate,
        unit=study.privacy.unit,
        mode=study.privacy.mode,
        epsilon_claimed=study.privacy.epsilon,
        epsilon=plan.epsilon,
        epsilon_rdp=plan.bounds.rdp,
        epsilon_pld=plan.bounds.pld,
        accountant=plan.bounds.accountant,
        # statistics are paid for with the first attempt
        epsilon_without_spares=plan.trained_epsilon_after(study.training.rounds),
        epsilon_own_noise_alone=plan.own_epsilon,
        delta=plan.delta,
        noise_multiplier=study.privacy.noise_multiplier,
        clipping_norm=study.privacy.clipping_norm,
        excess_noise=excess_noise(study),
        noise_sd_of_mean=noise,
        statistics_attempts=0 if study.statistics is None else study.statistics.attempts,
        statistics_noise_sd=None if roster is None else _statistics_noise_sd(study, plan, roster),
        metrics_attempts=0 if study.metrics is None else study.metrics.attempts,
        metrics_epsilon=plan.metrics_epsilon,
        metrics_noise_multiplier=None if study.metrics is None else study.metrics.noise_multiplier,
        held_out_patients=held_out,
        metrics_auc_noise_sd=None if held_out is None else _metrics_auc_noise_sd(study, plan, held_out),
        ring_bits=plan.ring_bits,
        grid_step=step,
        range=study.quantization.range,
        wrap_probability=plan.wrap_probability,
        vector_bytes=plan.ring_words * plan.ring_bits // 8,
        upload_bytes_per_round=upload_size_bytes(
            AggregatorConfig.of_anybody(study, plan.ring_words).everybody.upload_bytes
        ),
        holds_against=holds_against(study),
        not_claimed=NOT_CLAIMED,
    )


def _step(rule: ServerStep) -> str:
    """A rule and its numbers."""
    numbers = (f"{name} {value:g}" for name, value in rule.model_dump(exclude={"kind"}).items())
    return f"{rule.kind} ({', '.join(numbers)})"


def _released(training: Training) -> str:
    if training.ema_decay is not None:
        return f"the exponential moving average over all rounds (decay {training.ema_decay:g})"
    last = training.average_last_rounds
    return "the model after the last round" if last == 1 else f"the mean over the last {last} rounds"


def _noise_sd_of_mean(study: Study, plan: Plan, roster: Roster) -> float | None:
    """Of local steps: of the noise as it was added, not of how later steps answer to it."""
    sum_sd = plan.noise_sd * 2.0**-plan.noise_exponent * math.sqrt(study.cohort.hospitals)
    mean_sd = sum_sd / (study.privacy.sampling_rate * roster.nominal_patients)
    local = study.training.local
    if local is None:
        return mean_sd
    spread = local.noise_spread
    return None if spread is None else mean_sd * local.learning_rate * spread


def _statistics_noise_sd(study: Study, plan: Plan, roster: Roster) -> float | None:
    if not plan.statistics_words:
        return None
    sum_sd = plan.statistics_noise_sd * 2.0**-plan.statistics_exponent * math.sqrt(study.cohort.hospitals)
    return sum_sd / roster.nominal_patients


def _metrics_auc_noise_sd(study: Study, plan: Plan, held_out: int) -> float | None:
    noise_sd = metrics.noise_sd_of_cell(plan.metrics_noise_sd, plan.metrics_exponent, study.cohort.hospitals)
    return metrics.noise_in_auc(study, held_out, noise_sd)


def in_words(checked: StudyCheck) -> Iterator[str]:
    """The check as lines for a terminal."""
    yield f"Study {shown(checked['study'])}, until {checked['expires']}{' (EXPIRED)' if checked['expired'] else ''}"
    yield f"  hash {checked['study_sha256']}"
    yield from block(checked["purpose"])
    yield (
        f"Trains {checked['model']} ({counted(checked['parameters'], 'parameter')}) for {counted(checked['rounds'], 'round')}, "
        f"with {counted(checked['spare_attempts'], 'spare attempt')}; each {checked['unit']} is in a "
        f"{'round' if checked['local_steps'] == 1 else 'step'} with chance {checked['sampling_rate']:g}."
    )
    if checked["local_steps"] > 1:
        yield f"  {checked['local_steps']} private steps a round at each hospital, each of them counted"
    if checked["local_step"] is not None:
        yield f"  these steps follow {checked['local_step']}, begun anew in every round"
    yield f"  server step {checked['server_step']}; released is {checked['released']}"
    yield (
        f"Privacy: epsilon {rounded_up(checked['epsilon'])} for all attempts (claimed {checked['epsilon_claimed']:g}), "
        f"{rounded_up(checked['epsilon_without_spares'])} of one who trains if no spare is needed, at delta "
        f"{checked['delta']:g} a {checked['unit']}."
    )
    pld = "no figure" if checked["epsilon_pld"] is None else rounded_up(checked["epsilon_pld"])
    yield f"  the smaller of two bounds: privacy loss distribution {pld}, Renyi divergence {rounded_up(checked['epsilon_rdp'])}"
    yield "  a hospital's lifetime account counts by Renyi divergence"
    yield f"  mode {checked['mode']}: holds against {checked['holds_against']}"
    yield f"  one hospital's noise alone: epsilon {rounded_up(checked['epsilon_own_noise_alone'])}"
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
            f"{counted(checked['statistics_attempts'], 'attempt')}, all counted above and charged in full with the first attempt."
        )
        if noise is not None:
            yield f"  in each mean: standard deviation {noise:.3g} of half the feature's range; useless where that is wide"
    if checked["metrics_attempts"]:
        yield (
            f"Metrics: after the last round, noised counts over held-out patients, in at most "
            f"{counted(checked['metrics_attempts'], 'attempt')}, noise multiplier {checked['metrics_noise_multiplier']:g}."
        )
        yield (
            f"  they are in nothing else: one held out pays epsilon {rounded_up(checked['metrics_epsilon'] or 0.0)}, charged in "
            "full with the study's first attempt; the study's epsilon is that of whoever pays more"
        )
        if checked["held_out_patients"] is not None:
            told = metrics.noise_in_auc_in_words(checked["held_out_patients"], checked["metrics_auc_noise_sd"])
            yield f"  {told}; taken for granted: a share of {metrics.ASSUMED_HOLDOUT:g} at every hospital"
    yield (
        f"Cohort: {counted(checked['hospitals'], 'hospital')}, of which {checked['colluders']} may conspire with the "
        f"coordinator; {_needed(checked['hospitals'], checked['fewest_survivors'])}."
    )
    yield (
        f"Sums: {checked['ring_bits']}-bit ring, steps of {checked['grid_step']:.3g}, a hospital's word saturates beyond "
        f"{checked['range']:g}; chance that any word wraps {checked['wrap_probability']:.1g}; "
        f"an upload is {checked['upload_bytes_per_round']:,} bytes, {checked['vector_bytes']:,} of them the masked vector."
    )


def _needed(hospitals: int, fewest: int) -> str:
    if fewest == hospitals:
        return "all of them are needed in every round"
    return f"{fewest} of them are needed in every round"
