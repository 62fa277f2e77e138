"""``medfed-client plan``: what a study would cost at this hospital, before anybody joins. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from medfed.client.approval import caps_of, pinned_holdout
from medfed.client.explain import Cost, Lifetime, bound_in_words, cost
from medfed.client.ledger import Approval, LedgerView
from medfed.client.outlook import WANTED, Outlook, outlook
from medfed.client.outlook import in_words as outlook_in_words
from medfed.client.site import Site
from medfed.display import shown
from medfed.errors import MedfedError, PrivacyError
from medfed.models import catalogue, parameters
from medfed.privacy.plan import Plan, make_plan
from medfed.roster import load_enrolment
from medfed.study import Study, load_study


class Forecast(TypedDict):
    """``refusals``: what would stop the approval, as the errors it would raise. ``lifetime`` is null where the data do
    not fit the study. ``attempts_that_fit``: how many of the study's attempts the caps leave room for."""

    study: str
    study_sha256: str
    patients: int | None
    cost: Cost
    outlook: Outlook
    lifetime: Lifetime | None
    attempts: int
    attempts_that_fit: int | None
    refusals: list[str]


def forecast(site: Site, study_path: Path, ledger: LedgerView, wanted: Sequence[float] = WANTED) -> Forecast:
    """Work a study out against this hospital's data, policy and ledger; needs neither roster nor first model.

    ``wanted``: epsilons to tell the noise for. Of the data the patients' ids are used, for their account, and nothing else.

    Raises ``ConfigError`` for files that cannot be read, MF-125 for a study that is in the ledger already; what else
    would stop it is told in ``refusals``.
    """
    study = load_study(site.seams.files, study_path)
    if any(known.approval.study == study.hash() for known in ledger.studies()):
        raise PrivacyError(125, "this study was approved here already", "medfed-client budget shows what it costs")
    model = catalogue.build(study)
    plan = make_plan(study, parameters.count(model))
    caps = caps_of(site)
    refusals: list[str] = []
    _collect(refusals, lambda: _check_study(site, study, plan))
    patients: tuple[bytes, ...] = ()
    try:
        patients = tuple(sorted(set(site.keyed_hashes(site.read_records(study).patients))))
    except MedfedError as error:
        refusals.append(str(error))
    lifetime, fitting = None, None
    if patients:
        approval = _approval(site, study, plan)
        seen = ledger.outlook(approval, patients, caps)
        lifetime = Lifetime(
            before=seen.lifetime_before,
            after=seen.lifetime_after,
            filter_after=seen.filter_after,
            cap=caps.max_epsilon_lifetime,
            delta=caps.lifetime_delta,
        )
        _collect(refusals, lambda: ledger.preview(approval, patients, caps))
        fitting = ledger.attempts_that_fit(approval, patients, caps)
    declared = load_enrolment(site.seams.files, site.enrolment_path).nominal_patients
    return Forecast(
        study=study.study.name,
        study_sha256=study.hash().hex(),
        patients=len(patients) or None,
        cost=cost(study, plan, caps),
        outlook=outlook(study, plan, model, patients=declared, wanted=wanted, clock=site.seams.clock),
        lifetime=lifetime,
        attempts=plan.attempts,
        attempts_that_fit=fitting,
        refusals=refusals,
    )


def _collect(refusals: list[str], check: Callable[[], object]) -> None:
    try:
        check()
    except MedfedError as error:
        refusals.append(str(error))


def _check_study(site: Site, study: Study, plan: Plan) -> None:
    if study.expired(site.seams.clock.wall()):
        raise PrivacyError(120, f"study {study.study.name} expired on {study.study.expires}", "ask for a new one")
    site.config.policy.admit(study)
    if plan.epsilon > study.privacy.epsilon:
        what = f"the study states epsilon {study.privacy.epsilon:g}, it is {plan.epsilon:.4f}"
        raise PrivacyError(135, what, "ask for a true one")


def _approval(site: Site, study: Study, plan: Plan) -> Approval:
    """Stands in for the approval to come: a preview looks at its mechanism, attempts and delta only."""
    return Approval(
        study=study.hash(),
        name=study.study.name,
        roster=bytes.fromhex(study.cohort.roster_sha256),
        first_model=bytes.fromhex(study.model.first_model_sha256 or ""),
        mechanism=plan.mechanism,
        attempts=plan.attempts,
        delta=study.privacy.delta,
        nominal_patients=load_enrolment(site.seams.files, site.enrolment_path).nominal_patients,
        unconfirmed=(),
        approved_wall_s=site.seams.clock.wall(),
        stages=study.stages,
        holdout=pinned_holdout(site, study),
    )


def in_words(planned: Forecast) -> Iterator[str]:
    """The forecast as lines for a terminal."""
    price, lifetime = planned["cost"], planned["lifetime"]
    yield f"Study {shown(planned['study'])} ({planned['study_sha256'][:12]}), if this hospital joined:"
    yield (
        f"  epsilon {price['epsilon']:.4g} for {price['rounds']} rounds and {price['spare_attempts']} spares, "
        f"{price['epsilon_without_spares']:.4g} without spares (delta {price['delta']:g}, cap "
        f"{price['max_epsilon_study']:g})"
    )
    yield f"  {bound_in_words(price)}"
    if price["statistics_attempts"]:
        yield f"  counting {price['statistics_attempts']} noised sums over all patients before round 1"
    if price["local_steps"] > 1:
        yield f"  counting {price['local_steps']} private steps here in every round"
    yield f"  epsilon {price['epsilon_own_noise_alone']:.4g} by this hospital's noise alone"
    if lifetime is not None:
        yield (
            f"  lifetime of its {planned['patients']} patients: {lifetime['before']:.4g} before, {lifetime['after']:.4g} "
            f"after (delta {lifetime['delta']:g}); the privacy filter counts {lifetime['filter_after']:.4g} against the cap "
            f"{lifetime['cap']:g}"
        )
        yield f"  {planned['attempts_that_fit']} of its {planned['attempts']} attempts fit under the caps"
    yield from outlook_in_words(planned["outlook"])
    if planned["refusals"]:
        yield "It would be refused:"
        yield from (f"  {refusal}" for refusal in planned["refusals"])
    else:
        yield "It would be accepted. Nothing was written; medfed-client approve joins."
