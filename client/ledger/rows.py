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
from medfed.client.ledger.entries import ApprovedBody, CapsBody, Entry, ReservedBody
from medfed.privacy.accounting import Mechanism, micro


def contents(approval: Approval) -> tuple[object, ...]:
    """What two approvals must have in common to be one: all but the time."""
    return (
        approval.study,
        approval.roster,
        approval.first_model,
        approval.mechanism.to_json(),
        approval.attempts,
        approval.delta,
        approval.nominal_patients,
        sorted(approval.unconfirmed),
    )


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
        shares_patients_with=sorted(touching),
        caps=caps_body(caps),
        study_micro=micro(outlook.epsilon_study),
        lifetime_before_micro=micro(outlook.lifetime_before),
        lifetime_after_micro=micro(outlook.lifetime_after),
    )


def reserved_body(
    mechanism: Mechanism, round_number: int, caps: Caps, now_wall: float, reservation: Reservation
) -> ReservedBody:
    return ReservedBody(
        round=round_number,
        wall_s=float(now_wall),
        mechanism=mechanism.to_json(),
        caps=caps_body(caps),
        study_before_micro=micro(reservation.epsilon_before),
        study_after_micro=micro(reservation.epsilon_after),
        lifetime_before_micro=micro(reservation.lifetime_before),
        lifetime_after_micro=micro(reservation.lifetime_after),
    )


def approved_study(entry: Entry, state: StudyState, events: int, highest_attempt: int) -> ApprovedStudy:
    body = entry.read(ApprovedBody)
    approval = Approval(
        study=entry.study,
        name=body.name,
        roster=bytes.fromhex(body.roster),
        first_model=bytes.fromhex(body.first_model),
        mechanism=Mechanism.from_json(body.mechanism),
        attempts=body.attempts,
        delta=body.delta,
        nominal_patients=body.nominal_patients,
        unconfirmed=tuple(bytes.fromhex(key) for key in body.unconfirmed),
        approved_wall_s=body.approved_wall_s,
    )
    return ApprovedStudy(
        seq=entry.seq,
        approval=approval,
        patients=body.patients,
        snapshot=bytes.fromhex(body.snapshot),
        shares_patients_with=tuple(body.shares_patients_with),
        state=state,
        events=events,
        highest_attempt=highest_attempt,
    )
