"""Approvals and reservations to and from the bodies of their rows."""

from __future__ import annotations

from medfed.client.ledger.accounts import (
    Approval,
    ApprovalOutlook,
    ApprovedStudy,
    Caps,
    Reservation,
    StudyState,
    snapshot_digest,
)
from medfed.client.ledger.entries import ApprovedBody, CapsBody, Entry, ReservedBody, RosterBody, StageBody
from medfed.client.ledger.ids import PatientIds
from medfed.privacy.accounting import Mechanism, micro
from medfed.study import Stage


def contents(approval: Approval) -> dict[str, object]:
    """What two approvals must have in common to be one, each by its name: all but the time."""
    return {
        "the study": approval.study,
        "the roster": approval.roster,
        "the first model": approval.first_model,
        "the noise": approval.mechanism.to_json(),
        "the number of attempts": approval.attempts,
        "delta": approval.delta,
        "the declared patients": approval.nominal_patients,
        "the confirmed peers": sorted(approval.unconfirmed),
        "what tells patients apart": approval.ids,
        "the kinds of rounds": approval.stages,
        "holdout": approval.holdout,
    }


def caps_body(caps: Caps) -> CapsBody:
    return CapsBody(
        max_epsilon_study=float(caps.max_epsilon_study),
        max_epsilon_lifetime=float(caps.max_epsilon_lifetime),
        lifetime_delta=caps.lifetime_delta,
    )


def approved_body(
    approval: Approval, patients: frozenset[bytes], touching: frozenset[int], caps: Caps, outlook: ApprovalOutlook
) -> ApprovedBody:
    return ApprovedBody(
        name=approval.name,
        roster=approval.roster.hex(),
        first_model=approval.first_model.hex(),
        mechanism=approval.mechanism.to_json(),
        attempts=approval.attempts,
        delta=approval.delta,
        nominal_patients=approval.nominal_patients,
        unconfirmed=[key.hex() for key in approval.unconfirmed],
        approved_wall_s=float(approval.approved_wall_s),
        patients=len(patients),
        snapshot=snapshot_digest(patients).hex(),
        patients_key=approval.ids.key.hex(),
        patient_column=approval.ids.column,
        shares_patients_with=sorted(touching),
        caps=caps_body(caps),
        stages=[
            StageBody(
                kind=stage.kind, first_round=stage.first_round, last_round=stage.last_round, attempts=stage.attempts
            )
            for stage in approval.stages
        ],
        holdout=approval.holdout,
        study_micro=micro(outlook.study.epsilon),
        study_rdp_micro=micro(outlook.study.rdp),
        study_pld_micro=None if outlook.study.pld is None else micro(outlook.study.pld),
        lifetime_before_micro=micro(outlook.lifetime_before),
        lifetime_after_micro=micro(outlook.lifetime_after),
        filter_after_micro=micro(outlook.filter_after),
    )


def reserved_body(
    mechanism: Mechanism, round_number: int, caps: Caps, now_wall: float, reservation: Reservation
) -> ReservedBody:
    return ReservedBody(
        round=round_number,
        wall_s=float(now_wall),
        mechanism=mechanism.to_json(),
        charged=list(reservation.charged),
        caps=caps_body(caps),
        study_before_micro=micro(reservation.epsilon_before),
        study_after_micro=micro(reservation.epsilon_after),
        lifetime_before_micro=micro(reservation.lifetime_before),
        lifetime_after_micro=micro(reservation.lifetime_after),
        filter_after_micro=micro(reservation.filter_after),
    )


def stages_of(body: ApprovedBody) -> tuple[Stage, ...]:
    return tuple(Stage(stage.kind, stage.first_round, stage.last_round, stage.attempts) for stage in body.stages)


def approved_study(
    entry: Entry, roster: Entry | None, state: StudyState, events: int, last: Entry | None
) -> ApprovedStudy:
    """``roster``: the latest row of one that followed; ``last``: the reservation of the highest attempt, if there is any."""
    body = entry.read(ApprovedBody)
    pinned = body if roster is None else roster.read(RosterBody)
    charged = [0] * len(body.stages) if last is None else last.read(ReservedBody).charged
    approval = Approval(
        study=entry.study,
        name=body.name,
        roster=bytes.fromhex(pinned.roster),
        first_model=bytes.fromhex(body.first_model),
        mechanism=Mechanism.from_json(body.mechanism),
        attempts=body.attempts,
        delta=body.delta,
        nominal_patients=body.nominal_patients,
        unconfirmed=tuple(bytes.fromhex(key) for key in pinned.unconfirmed),
        approved_wall_s=body.approved_wall_s,
        ids=PatientIds(bytes.fromhex(body.patients_key), body.patient_column),
        stages=stages_of(body),
        holdout=body.holdout,
    )
    return ApprovedStudy(
        seq=entry.seq,
        approval=approval,
        caps=Caps(body.caps.max_epsilon_study, body.caps.max_epsilon_lifetime, body.caps.lifetime_delta),
        patients=body.patients,
        snapshot=bytes.fromhex(body.snapshot),
        shares_patients_with=tuple(body.shares_patients_with),
        epsilon=body.study_micro / 1e6,
        state=state,
        events=events,
        charged=tuple(charged),
        highest_attempt=0 if last is None else last.attempt,
    )
