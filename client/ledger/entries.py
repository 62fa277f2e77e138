"""The rows of the ledger: what each kind says, its canonical bytes, its place in the hash chain.

A row's hash covers everything in the row and the hash of the row before; the hospital's identity signs every row, so
that the last one, the head, vouches for all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.errors import PrivacyError
from medfed.identity import Identity
from medfed.wire import enc
from medfed.witness import Head, signed_bytes

FORMAT = 2
HASH_BYTES = 32
NO_HASH = bytes(HASH_BYTES)


class Kind(Enum):
    """What a row records."""

    BEGUN = "BEGUN"
    APPROVED = "APPROVED"
    ROSTER = "ROSTER"
    RESERVED = "RESERVED"
    SEALED = "SEALED"
    RELEASED = "RELEASED"
    ACKED = "ACKED"
    ABANDONED = "ABANDONED"
    CLOSED = "CLOSED"
    WITHDRAWN = "WITHDRAWN"


class AttemptState(Enum):
    """How far an attempt came. Every one of them is charged."""

    RESERVED = "RESERVED"
    SEALED = "SEALED"
    RELEASED = "RELEASED"
    ACKED = "ACKED"
    ABANDONED = "ABANDONED"


# the legal moves of an attempt; None: not heard of
MOVES: dict[AttemptState | None, frozenset[AttemptState]] = {
    None: frozenset({AttemptState.RESERVED}),
    AttemptState.RESERVED: frozenset({AttemptState.SEALED, AttemptState.ABANDONED}),
    AttemptState.SEALED: frozenset({AttemptState.RELEASED, AttemptState.ABANDONED}),
    AttemptState.RELEASED: frozenset({AttemptState.ACKED, AttemptState.ABANDONED}),
    AttemptState.ACKED: frozenset(),
    AttemptState.ABANDONED: frozenset(),
}

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Micro = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """Strict: what a row says beside its kind, study and attempt."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BegunBody(Body):
    """The first row: whose ledger this is."""

    format: Annotated[int, Field(ge=1)]
    identity: Hex


class CapsBody(Body):
    """The hospital's caps in force."""

    max_epsilon_study: Annotated[float, Field(gt=0)]
    max_epsilon_lifetime: Annotated[float, Field(gt=0)]
    lifetime_delta: Annotated[float, Field(gt=0, lt=1)]


class StageBody(Body):
    """How many attempts may be made at which rounds."""

    kind: Literal["statistics", "training", "metrics"]
    first_round: Annotated[int, Field(ge=1)]
    last_round: Annotated[int, Field(ge=1)]
    attempts: Annotated[int, Field(ge=1)]


class ApprovedBody(Body):
    """A study with its fixed list of events, and the patients whose account it draws on.

    ``snapshot`` is the digest of the keyed patient hashes kept in the side table, which ``patients_key`` (a commitment to it)
    and ``patient_column`` made; ``shares_patients_with`` lists the earlier approvals (row numbers) that have at least one patient
    in common with this one, and had cost something or still could. ``stages``: none where all attempts
    are of one kind; ``holdout``: where metrics are among them. ``study_micro`` is the smaller of the two bounds after it;
    ``filter_after_micro`` what the lifetime filter holds against its cap.
    """

    name: str
    roster: Hex
    first_model: Hex
    mechanism: str
    attempts: Annotated[int, Field(ge=1)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    nominal_patients: Annotated[int, Field(ge=1)]
    unconfirmed: list[Hex]
    approved_wall_s: float
    patients: Annotated[int, Field(ge=1)]
    snapshot: Hex
    patients_key: Hex
    patient_column: str
    shares_patients_with: list[int]
    stages: list[StageBody]
    holdout: Annotated[float, Field(ge=0, le=0.5)] | None
    caps: CapsBody
    study_micro: Micro
    study_rdp_micro: Micro
    study_pld_micro: Micro | None
    lifetime_before_micro: Micro
    lifetime_after_micro: Micro
    filter_after_micro: Micro


class RosterBody(Body):
    """Of an approved study, from now on: its roster, and those of it whose fingerprints this hospital could not check."""

    roster: Hex
    unconfirmed: list[Hex]
    wall_s: float


class ReservedBody(Body):
    """One attempt, charged. Micro-epsilon, rounded up, of the study (its delta) and of the account (lifetime delta).

    ``charged``: attempts of the study so far by stage, this one included.
    """

    round: Annotated[int, Field(ge=1)]
    wall_s: float
    mechanism: str
    charged: list[Annotated[int, Field(ge=0)]]
    caps: CapsBody
    study_before_micro: Micro
    study_after_micro: Micro
    lifetime_before_micro: Micro
    lifetime_after_micro: Micro
    filter_after_micro: Micro


class SealedBody(Body):
    """The one vector of this attempt, the pad that covers it, and the bytes that will leave."""

    vector: Hex
    pad: Hex
    reply: Hex


class ReasonBody(Body):
    """Why an attempt or a study ended."""

    reason: Annotated[str, Field(max_length=200)]


class EmptyBody(Body):
    """Nothing more to say."""


BODIES: dict[Kind, type[Body]] = {
    Kind.BEGUN: BegunBody,
    Kind.APPROVED: ApprovedBody,
    Kind.ROSTER: RosterBody,
    Kind.RESERVED: ReservedBody,
    Kind.SEALED: SealedBody,
    Kind.RELEASED: EmptyBody,
    Kind.ACKED: EmptyBody,
    Kind.ABANDONED: ReasonBody,
    Kind.CLOSED: ReasonBody,
    Kind.WITHDRAWN: ReasonBody,
}

BodyType = TypeVar("BodyType", bound=Body)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row. ``study`` is all zero and ``attempt`` 0 where a row concerns none; of a study's rosters it is -1, -2, ..."""

    seq: int
    kind: Kind
    study: bytes
    attempt: int
    body: str
    previous: bytes
    hash: bytes
    signature: bytes

    def read(self, model: type[BodyType]) -> BodyType:
        """The body as ``model``; ``PrivacyError`` (MF-403) if it is none."""
        try:
            return model.model_validate_json(self.body, strict=True)
        except ValidationError as error:
            raise altered(self.seq) from error

    @property
    def head(self) -> Head:
        return Head(self.seq, self.hash, self.signature)


@dataclass(frozen=True, slots=True)
class Draft:
    """A row about to be appended."""

    kind: Kind
    study: bytes
    attempt: int
    body: Body


def make_entry(draft: Draft, previous: Head | None, identity: Identity) -> Entry:
    """Chain and sign the row that follows ``previous`` (None: the first)."""
    seq, before = (previous.seq + 1, previous.hash) if previous else (1, NO_HASH)
    body = json.dumps(draft.body.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = row_hash(seq, draft.kind.value, draft.study, draft.attempt, body, before)
    return Entry(
        seq, draft.kind, draft.study, draft.attempt, body, before, digest, identity.sign(signed_bytes(seq, digest))
    )


def row_hash(seq: int, kind: str, study: bytes, attempt: int, body: str, previous: bytes) -> bytes:
    """SHA-256 over the unambiguous encoding of a row's contents."""
    numbers = [number.to_bytes(8, "big", signed=True) for number in (seq, attempt)]  # a damaged one may be below 0
    parts = (numbers[0], kind.encode(), study, numbers[1], body.encode(), previous)
    return hashlib.sha256(enc(b"medfed/ledger/row/v1", *parts)).digest()


def altered(seq: int) -> PrivacyError:
    return damage(403, f"ledger row {seq} was altered")


def damage(code: int, what: str) -> PrivacyError:
    return PrivacyError(code, what, "stop, keep the file, restore the latest backup")
