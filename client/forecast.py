"""``medfed-client plan``: what a study would cost at this hospital, before anybody joins. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from medfed import metrics
from medfed.client.approval import (
    MODEL_NAME,
    ROSTER_NAME,
    caps_of,
    check_claims,
    checked_roster,
    own_position,
    pinned_holdout,
    read_first_model,
    require_not_expired,
    require_patients_to_train,
)
from medfed.client.explain import Cost, Lifetime, attempts_in_words, bound_in_words, cost
from medfed.client.ledger import Approval, LedgerView
from medfed.client.outlook import WANTED, Outlook, outlook
from medfed.client.outlook import in_words as outlook_in_words
from medfed.client.own_models import allowed_model
from medfed.client.policy import hours_in_words
from medfed.client.site import Site
from medfed.display import shown
from medfed.errors import MedfedError, PrivacyError
from medfed.models import parameters
from medfed.privacy.plan import Plan, make_plan
from medfed.roster import Roster, load_enrolment
from medfed.study import Study, load_study
from medfed.wording import counted, rounded_up


class Forecast(TypedDict):
    """``refusals``: what would stop the approval, as the errors it would raise. ``lifetime`` is null where the data do
    not fit the study. ``attempts_that_fit``: how many of the study's attempts the caps leave room for. ``holdout``: this
    hospital's own share. ``hours`` and ``next_opening`` as in ``Status``."""

    study: str
    study_sha256: str
    patients: int | None
    cost: Cost
    outlook: Outlook
    lifetime: Lifetime | None
    attempts: int
    attempts_that_fit: int | None
    holdout: float
    hours: str | None
    next_opening: float | None
    refusals: list[str]


def forecast(site: Site, study_path: Path, ledger: LedgerView, wanted: Sequence[float] = WANTED) -> Forecast:
    """Work a study out against this hospital's data, policy and ledger. Roster and first model are checked where they lie
    beside the study, and not needed; of what would stop an approval only unconfirmed peers are not known here.

    ``wanted``: epsilons to tell the noise for. Of the data the patients' ids are used, for their account, and nothing else.

    Raises ``ConfigError`` for files that cannot be read, MF-125 for a study that is in the ledger already; what else
    would stop it is told in ``refusals``.
    """
    study = load_study(site.seams.files, study_path)
    if any(known.approval.study == study.hash() for known in ledger.studies()):
        raise PrivacyError(125, "this study was approved here already", "medfed-client budget shows what it costs")
    model = allowed_model(study, site.config.policy)
    plan = make_plan(study, parameters.count(model))
    caps = caps_of(site)
    refusals: list[str] = []
    own = load_enrolment(site.seams.files, site.enrolment_path).nominal_patients
    roster = _beside(site, study, study_path.parent, refusals)
    for check in _checks(site, study, plan, own):
        _collect(refusals, check)
    patients: tuple[bytes, ...] = ()
    try:
        ledger.require_same_ids(site.patient_ids())
        found = site.read_records(study).patients
        patients = tuple(sorted(set(site.keyed_hashes(found))))
        _collect(refusals, lambda: require_patients_to_train(found, site.holdout(found)))
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
    held_out, policy, now = _held_out(site, study, own, roster), site.config.policy, site.seams.clock.wall()
    return Forecast(
        study=study.study.name,
        study_sha256=study.hash().hex(),
        patients=len(patients) or None,
        cost=cost(study, plan, caps),
        outlook=outlook(study, plan, model, patients=own, held_out=held_out, wanted=wanted, clock=site.seams.clock),
        lifetime=lifetime,
        attempts=plan.attempts,
        attempts_that_fit=fitting,
        holdout=site.config.data.holdout,
        hours=policy.hours,
        next_opening=policy.next_opening(now),
        refusals=refusals,
    )


def _collect(refusals: list[str], check: Callable[[], object]) -> None:
    try:
        check()
    except MedfedError as error:
        refusals.append(str(error))


def _checks(site: Site, study: Study, plan: Plan, own: int) -> tuple[Callable[[], object], ...]:
    """What an approval asks of the study alone, in its order."""
    return (
        lambda: require_not_expired(site, study),
        lambda: site.config.policy.admit(study),
        lambda: check_claims(study, plan, own),
    )


def _beside(site: Site, study: Study, folder: Path, refusals: list[str]) -> Roster | None:
    """The roster that lies beside the study, where it is the study's; what is wrong with it or the first model is a refusal."""
    files, known = site.seams.files, None
    if files.exists(folder / MODEL_NAME):
        _collect(refusals, lambda: read_first_model(site, study, folder / MODEL_NAME))
    if files.exists(folder / ROSTER_NAME):
        try:
            known = checked_roster(site, study, folder / ROSTER_NAME)
            own_position(site, known)
        except MedfedError as error:
            refusals.append(str(error))
    return known


def _held_out(site: Site, study: Study, own: int, roster: Roster | None) -> float:
    """Patients held out at all hospitals: here the true share of the declared ones, elsewhere what is assumed. Without the
    study's roster all hospitals are taken for as large as this one."""
    everybody = own * study.cohort.hospitals if roster is None else roster.nominal_patients
    return metrics.held_out(own, site.config.data.holdout) + metrics.held_out(max(0, everybody - own))


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
        ids=site.patient_ids(),
        stages=study.stages,
        holdout=pinned_holdout(site, study),
    )


def in_words(planned: Forecast) -> Iterator[str]:
    """The forecast as lines for a terminal."""
    price, lifetime = planned["cost"], planned["lifetime"]
    yield f"Study {shown(planned['study'])} ({planned['study_sha256'][:12]}), if this hospital joined:"
    yield (
        f"  epsilon {rounded_up(price['epsilon'])} for {attempts_in_words(price)}; "
        f"{rounded_up(price['epsilon_without_spares'])} of one who trains if no spare is needed (delta {price['delta']:g}, "
        f"cap {price['max_epsilon_study']:g})"
    )
    yield f"  {bound_in_words(price)}"
    if price["statistics_attempts"]:
        told = counted(price["statistics_attempts"], "noised sum")
        yield f"  counting {told} over all patients before round 1, charged in full with the first attempt"
    if price["local_steps"] > 1:
        yield f"  counting {price['local_steps']} private steps here in every round"
    yield f"  epsilon {rounded_up(price['epsilon_own_noise_alone'])} by this hospital's noise alone"
    if lifetime is not None:
        yield (
            f"  lifetime of its {planned['patients']} patients: {rounded_up(lifetime['before'])} before, "
            f"{rounded_up(lifetime['after'])} after (delta {lifetime['delta']:g}); the privacy filter counts "
            f"{rounded_up(lifetime['filter_after'])} against the cap {lifetime['cap']:g}"
        )
        yield f"  {planned['attempts_that_fit']} of its {planned['attempts']} attempts fit under the caps"
    yield from outlook_in_words(planned["outlook"])
    if price["metrics_epsilon"] is not None:
        assumed = f"a share of {metrics.ASSUMED_HOLDOUT:g} at the others"
        yield f"  held out are a share of {planned['holdout']:g} at this hospital (holdout in hospital.toml), {assumed}"
    if planned["hours"] is not None:
        yield f"Hours in which this hospital takes part: {hours_in_words(planned['hours'], planned['next_opening'])}."
    if planned["refusals"]:
        yield "It would be refused:"
        yield from (f"  {refusal}" for refusal in planned["refusals"])
    else:
        yield "It would be accepted once its peers are confirmed. Nothing was written; medfed-client approve joins."
