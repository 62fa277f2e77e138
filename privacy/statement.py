"""What epsilon on the certificate says: the statement that travels with a model, and what hospitals sign of it.

The coordinator writes the ``Statement`` of a finished run; every hospital works out the same from the study it approved, its
own model and its own ledger, refuses anything else, and signs a ``HospitalStatement`` that names it by its hash. The byte forms
are in docs/privacy_statement.md: whoever has that page can check them without medfed.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.errors import RemoteProtocolError
from medfed.identity import Identity, verify
from medfed.privacy import accounting
from medfed.privacy.plan import Plan
from medfed.roster import Hex32, Hex64, HospitalName, Roster
from medfed.study import Name, Study
from medfed.wire import enc
from medfed.witness import Head

NOT_CLAIMED = "anonymity; protection of a patient known to two hospitals beyond the sum of their epsilons"
AGREEMENT = 1e-6  # relative: processors and libraries differ in the last places of a logarithm

SIMULATION = "simulation"
NOT_PRIVATE = "NOT PRIVATE"
"""Stamps: hospitals and their keys were made up; and how stamps begin that take the promise back."""

_AGAINST = {
    "local": "everyone outside the patient's hospital: the coordinator, all other hospitals, readers of the model",
    "distributed": "all who see only sums, while at most {colluders} of the hospitals conspire with the coordinator",
}
_COORDINATOR_LABEL = b"medfed/privacy-statement/v1"
_HOSPITAL_LABEL = b"medfed/hospital-statement/v1"

Text = Annotated[str, Field(max_length=1000)]
Plain = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9 .,:;+_()'-]*$")]  # shown as it stands
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class Statement(_Document):
    """What ``privacy.json`` says of a run. Epsilons are upper bounds at ``delta``.

    ``epsilon``: of the fixed list of all attempts, which is what was approved; the smaller of ``epsilon_rdp`` and ``epsilon_pld``
    (null where that bound has none), as ``accountant`` says. ``epsilon_spent``: of the attempts used.
    ``epsilon_own_noise_alone``: what is left of the guarantee should the secure sum fail. ``events_per_attempt``: the local
    steps of a round, each a mechanism of its own; the update they make is post-processing. ``statistics_attempts``: events
    before round 1, of all patients, all of them counted in every epsilon. ``cohort``: n, hospitals in the roster that the study
    began with; ``fewest_survivors``: m, no sum of fewer was opened. ``excess_noise``: variance of the noise in a sum of n over
    the variance the guarantee needs. ``parameters``: d. ``state_sha256`` names the final model state, ``model_sha256`` the
    file of the released weights, ``journal_sha256`` the last line of the coordinator's journal. ``stamps``: what the run must
    not be mistaken for; empty for a run at hospitals. Hospitals vouch for all but ``journal_sha256``, ``stamps`` and
    ``versions``, which are the coordinator's word.
    """

    format: Literal["medfed-privacy-1"]
    stamps: Annotated[list[Plain], Field(max_length=8)]
    study: Name
    study_sha256: Hex32
    roster_sha256: Hex32
    unit: Text
    adjacency: Text
    mode: Literal["local", "distributed"]
    epsilon: float
    epsilon_rdp: float
    epsilon_pld: float | None
    epsilon_spent: float
    epsilon_own_noise_alone: float
    delta: float
    accountant: Text
    mechanism: Text
    noise_multiplier: float
    clipping_norm: float
    sampling_rate: float
    events_per_attempt: Count
    statistics_attempts: Count
    metrics_attempts: Count
    attempts_used: Count
    attempts_approved: Count
    released_sums: Count
    cohort: Count
    colluders: Count
    fewest_survivors: Count
    excess_noise: float
    wrap_probability: float
    holds_against: Text
    not_claimed: Text
    parameters: Count
    state_sha256: Hex32
    model_sha256: Hex32
    journal_sha256: Hex32
    versions: Annotated[dict[Plain, Plain], Field(max_length=64)]

    @property
    def is_simulation(self) -> bool:
        """Whether hospitals and their keys were made for a rehearsal."""
        return SIMULATION in self.stamps

    def hash(self) -> bytes:
        """SHA-256 of the signed bytes, 32 bytes: what hospitals' statements name."""
        return hashlib.sha256(_statement_bytes(self)).digest()

    def sign(self, identity: Identity) -> bytes:
        """The coordinator's signature, 64 bytes."""
        return identity.sign(_statement_bytes(self))

    def check(self, coordinator: bytes, signature: bytes) -> None:
        """Raise MF-110 unless the holder of ``coordinator`` signed this statement."""
        verify(coordinator, signature, _statement_bytes(self))


class HospitalStatement(_Document):
    """What one hospital signs: which study, roster, model and statement; and how its own ledger stood when the study ended.

    ``attempts_charged``: events this hospital's ledger charged for the study; an attempt that never reached it is not among
    them, so that it is 0 for one that was away all the time. ``epsilon_spent_micro``: of those, in whole millionths, rounded
    up. ``ledger_*``: the row that ended the study, and the hospital's signature over it, which the ledger itself holds.
    """

    format: Literal["medfed-hospital-statement-1"]
    hospital: HospitalName
    position: Annotated[int, Field(ge=0, le=127)]
    identity: Hex32
    study_sha256: Hex32
    roster_sha256: Hex32
    state_sha256: Hex32
    model_sha256: Hex32
    statement_sha256: Hex32
    attempts_charged: Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
    epsilon_spent_micro: Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
    ledger_seq: Annotated[int, Field(ge=1, le=0xFFFFFFFF)]
    ledger_sha256: Hex32
    ledger_signature: Hex64

    @property
    def head(self) -> Head:
        """The row of the hospital's ledger that ended the study."""
        return Head(self.ledger_seq, bytes.fromhex(self.ledger_sha256), bytes.fromhex(self.ledger_signature))


class SignedByHospital(HospitalStatement):
    """The same with the hospital's signature."""

    signature: Hex64

    def check(self) -> None:
        """Raise MF-110 unless the holder of ``identity`` signed both this and the ledger's row. Says nothing of who that is."""
        public = bytes.fromhex(self.identity)
        self.head.check(public)
        unsigned = HospitalStatement(**self.model_dump(exclude={"signature"}))
        verify(public, bytes.fromhex(self.signature), _hospital_bytes(unsigned))


class PrivacyFile(Statement):
    """``privacy.json``: the statement, the coordinator's signature over it, and what the hospitals signed.

    ``hospitals``: in the roster's order; those are missing that could not be reached when the run ended.
    """

    coordinator_signature: Hex64
    hospitals: Annotated[list[SignedByHospital], Field(max_length=128)]

    @property
    def statement(self) -> Statement:
        return Statement(**self.model_dump(exclude={"coordinator_signature", "hospitals"}))

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Ending:
    """What a run came to, as far as it does not follow from the study: ``state``, ``model`` and ``journal`` are SHA-256."""

    attempts_used: int
    state: bytes
    model: bytes
    journal: bytes
    stamps: tuple[str, ...]
    versions: dict[str, str]


def holds_against(study: Study) -> str:
    """Whom the guarantee holds against, in words."""
    return _AGAINST[study.privacy.mode].format(colluders=study.cohort.colluders)


def excess_noise(study: Study) -> float:
    """Variance of the noise in a sum of all over the variance the guarantee needs: n/(m - c) of shares, n in ``local`` mode."""
    cohort = study.cohort
    needed = cohort.honest_survivors if study.privacy.mode == "distributed" else 1
    return cohort.hospitals / needed


def statement(study: Study, roster: Roster, plan: Plan, ending: Ending) -> Statement:
    """The statement of a run that ended so."""
    privacy, cohort = study.privacy, study.cohort
    return Statement(
        format="medfed-privacy-1",
        stamps=list(ending.stamps),
        study=study.study.name,
        study_sha256=study.hash().hex(),
        roster_sha256=roster.hash().hex(),
        unit=privacy.unit,
        adjacency=privacy.adjacency,
        mode=privacy.mode,
        epsilon=plan.epsilon,
        epsilon_rdp=plan.bounds.rdp,
        epsilon_pld=plan.bounds.pld,
        epsilon_spent=plan.epsilon_after(ending.attempts_used),
        epsilon_own_noise_alone=plan.own_epsilon,
        delta=privacy.delta,
        accountant=plan.bounds.accountant,
        mechanism="Poisson sampling, per-patient clipping, discrete Gaussian noise on the integer grid",
        noise_multiplier=privacy.noise_multiplier,
        clipping_norm=privacy.clipping_norm,
        sampling_rate=privacy.sampling_rate,
        events_per_attempt=plan.events_per_attempt,
        statistics_attempts=0 if study.statistics is None else study.statistics.attempts,
        metrics_attempts=0 if study.metrics is None else study.metrics.attempts,
        attempts_used=ending.attempts_used,
        attempts_approved=plan.attempts,
        released_sums=study.released_sums,
        cohort=cohort.hospitals,
        colluders=cohort.colluders,
        fewest_survivors=cohort.fewest_survivors,
        excess_noise=excess_noise(study),
        wrap_probability=plan.wrap_probability,
        holds_against=holds_against(study),
        not_claimed=NOT_CLAIMED,
        parameters=plan.words,
        state_sha256=ending.state.hex(),
        model_sha256=ending.model.hex(),
        journal_sha256=ending.journal.hex(),
        versions=ending.versions,
    )


def hospital_statement(
    said: Statement, roster: Roster, position: int, charged: tuple[int, int], head: Head
) -> HospitalStatement:
    """What the hospital at ``position`` signs. ``charged``: attempts, and their epsilon in whole millionths.

    Raises MF-194 for figures that no statement can hold: they may be those of anybody at the other end.
    """
    attempts, micro = charged
    try:
        return HospitalStatement(
            format="medfed-hospital-statement-1",
            hospital=roster.hospitals[position].hospital,
            position=position,
            identity=roster.hospitals[position].identity,
            study_sha256=said.study_sha256,
            roster_sha256=said.roster_sha256,
            state_sha256=said.state_sha256,
            model_sha256=said.model_sha256,
            statement_sha256=said.hash().hex(),
            attempts_charged=attempts,
            epsilon_spent_micro=micro,
            ledger_seq=head.seq,
            ledger_sha256=head.hash.hex(),
            ledger_signature=head.signature.hex(),
        )
    except ValidationError as error:
        raise RemoteProtocolError(194, "figures beyond what a statement can hold", "ask the hospital") from error


def require_plausible(mine: HospitalStatement, said: Statement, plan: Plan, survived: int) -> None:
    """Raise MF-194 unless a hospital's own figures fit the run's: no sum with its upload in it without a charge (``survived`` of
    them), no charge without an attempt, and its epsilon is that of the attempts it charged."""
    where = f"{mine.hospital}'s statement"
    if not survived <= mine.attempts_charged <= said.attempts_used:
        raise RemoteProtocolError(194, f"{where} says {mine.attempts_charged} attempts were charged", "ask it")
    expected = accounting.micro(plan.epsilon_after(mine.attempts_charged))
    if abs(mine.epsilon_spent_micro - expected) > 1 + AGREEMENT * expected:
        raise RemoteProtocolError(194, f"{where} says another epsilon than its attempts cost", "ask it")


def sign_for_hospital(unsigned: HospitalStatement, identity: Identity) -> SignedByHospital:
    """The hospital's statement under its signature."""
    signature = identity.sign(_hospital_bytes(unsigned)).hex()
    return SignedByHospital(**unsigned.model_dump(), signature=signature)


def parse_statement(data: bytes) -> Statement:
    """The statement of its canonical bytes; MF-103 for anything else."""
    try:
        parsed = Statement.model_validate_json(data)
    except ValidationError as error:
        raise RemoteProtocolError(103, "privacy statement malformed", "both sides need the same medfed") from error
    if canonical(parsed) != data:
        raise RemoteProtocolError(103, "privacy statement not in canonical form", "both sides need the same medfed")
    return parsed


def require_same(stated: Statement, expected: Statement) -> None:
    """Raise MF-194, naming the fields, unless both say the same: numbers with a fraction within ``AGREEMENT``."""
    other = expected.model_dump()
    wrong = [name for name, value in stated.model_dump().items() if not _agrees(value, other[name])]
    if wrong:
        raise RemoteProtocolError(194, f"the privacy statement is wrong in {', '.join(wrong)}", "do not use it; ask")


def _agrees(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=AGREEMENT)
    return one == other


def canonical(document: BaseModel) -> bytes:
    """The one byte form of a document: JSON, keys sorted, no blanks, shortest round-trip numbers, ASCII."""
    values = document.model_dump()
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _statement_bytes(said: Statement) -> bytes:
    return enc(_COORDINATOR_LABEL, canonical(said))


def _hospital_bytes(said: HospitalStatement) -> bytes:
    return enc(_HOSPITAL_LABEL, canonical(said))
