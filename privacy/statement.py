"""What epsilon on the certificate says: the statement that travels with a model."""

from __future__ import annotations

from typing import TypedDict

from medfed.privacy import accounting
from medfed.privacy.plan import Plan
from medfed.study import Study


class Statement(TypedDict):
    """``privacy.json``. Epsilons are upper bounds at ``delta``.

    ``epsilon``: of the fixed list of all attempts, which is what was approved. ``epsilon_spent``: of the attempts used.
    ``epsilon_own_noise_alone``: what is left of the guarantee should the secure sum fail. ``events_per_attempt``: the local
    steps of a round, each a mechanism of its own; the update they make is post-processing. ``statistics_attempts``: events
    before round 1, of all patients, all of them counted in every epsilon. ``excess_noise``: variance of the noise in the sum
    over the variance the guarantee needs, as all hospitals add theirs.
    """

    study: str
    study_sha256: str
    unit: str
    adjacency: str
    mode: str
    epsilon: float
    epsilon_spent: float
    epsilon_own_noise_alone: float
    delta: float
    accountant: str
    mechanism: str
    noise_multiplier: float
    clipping_norm: float
    sampling_rate: float
    events_per_attempt: int
    statistics_attempts: int
    attempts_used: int
    attempts_approved: int
    cohort: int
    colluders: int
    excess_noise: float
    wrap_probability: float
    holds_against: str
    not_claimed: str
    versions: dict[str, str]


_AGAINST = {
    "local": "everyone outside the patient's hospital: the coordinator, all other hospitals, readers of the model",
    "distributed": "all who see only sums, while at most {colluders} of the hospitals conspire with the coordinator",
}


def statement(study: Study, plan: Plan, attempts_used: int, versions: dict[str, str]) -> Statement:
    """The statement for a run that used ``attempts_used`` attempts."""
    privacy, cohort = study.privacy, study.cohort
    honest = cohort.hospitals - cohort.colluders
    return Statement(
        study=study.study.name,
        study_sha256=study.hash().hex(),
        unit=privacy.unit,
        adjacency=privacy.adjacency,
        mode=privacy.mode,
        epsilon=plan.epsilon,
        epsilon_spent=plan.epsilon_after(attempts_used),
        epsilon_own_noise_alone=plan.own_epsilon,
        delta=privacy.delta,
        accountant=accounting.ACCOUNTANT,
        mechanism="Poisson sampling, per-patient clipping, discrete Gaussian noise on the integer grid",
        noise_multiplier=privacy.noise_multiplier,
        clipping_norm=privacy.clipping_norm,
        sampling_rate=privacy.sampling_rate,
        events_per_attempt=plan.events_per_attempt,
        statistics_attempts=0 if study.statistics is None else study.statistics.attempts,
        attempts_used=attempts_used,
        attempts_approved=plan.attempts,
        cohort=cohort.hospitals,
        colluders=cohort.colluders,
        excess_noise=cohort.hospitals / honest if privacy.mode == "distributed" else float(cohort.hospitals),
        wrap_probability=plan.wrap_probability,
        holds_against=_AGAINST[privacy.mode].format(colluders=cohort.colluders),
        not_claimed="anonymity; protection of a patient known to two hospitals beyond the sum of their epsilons",
        versions=versions,
    )
