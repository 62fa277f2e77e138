"""What is spent, what is promised, and whether more fits: pure functions over the approvals of a ledger.

An account belongs to a set of patients, not to a name. Two approvals with one patient in common draw on one account,
and so does everything linked to either; only approvals without a common patient compose in parallel.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from medfed.client.ledger.ids import PatientIds
from medfed.errors import BudgetExhausted, LocalProtocolError
from medfed.privacy.accounting import ORDERS, Bounds, Mechanism, compose, epsilon, micro, running
from medfed.privacy.filter import filter_epsilon
from medfed.study import Stage
from medfed.wire import enc

HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class Caps:
    """The hospital's caps. ``max_epsilon_study`` holds at the study's delta, the lifetime's at ``lifetime_delta``."""

    max_epsilon_study: float
    max_epsilon_lifetime: float
    lifetime_delta: float


@dataclass(frozen=True, slots=True)
class Approval:
    """What a hospital agrees to: the study by its hash, and the fixed list of ``attempts`` it may cost.

    ``study``, ``roster``, ``first_model``: SHA-256; of a study that stands, the latest roster. ``delta``: of the study.
    ``nominal_patients``: the size declared in the roster. ``unconfirmed``: Ed25519 keys of peers whose fingerprints this hospital
    could not check.
    ``approved_wall_s``: seconds since 1970 by the hospital's clock. ``ids``: what the patients' hashes are made by. ``stages``:
    how many of the attempts may be of which rounds; none where all are of one kind. ``holdout``: the share of patients who never
    train, where the price rests on who they are.
    """

    study: bytes
    name: str
    roster: bytes
    first_model: bytes
    mechanism: Mechanism
    attempts: int
    delta: float
    nominal_patients: int
    unconfirmed: tuple[bytes, ...]
    approved_wall_s: float
    ids: PatientIds
    stages: tuple[Stage, ...] = ()
    holdout: float | None = None

    def __post_init__(self) -> None:
        digests = (self.study, self.roster, self.first_model, self.ids.key, *self.unconfirmed)
        sound = all(len(digest) == HASH_BYTES for digest in digests) and self.attempts >= 1 and 0.0 < self.delta < 1.0
        if not sound or not self._is_priced_by_stage():
            raise LocalProtocolError(900, "approval is malformed", "report this as a fault of medfed")

    def _is_priced_by_stage(self) -> bool:
        """Whether the mechanism pays for every attempt that the stages allow, of every kind."""
        if not self.stages:
            return self.mechanism.most is None
        if self.stages[0].first_round != 1 or any(
            after.first_round != before.last_round + 1 for before, after in itertools.pairwise(self.stages)
        ):
            return False
        training = sum(stage.attempts for stage in self.stages if stage.kind == "training")
        beside = sum(other.repeats for other in self.mechanism.once + self.mechanism.aside)
        priced = training if self.mechanism.most is None else self.mechanism.most
        return sum(stage.attempts for stage in self.stages) == self.attempts <= priced + beside and training <= priced


class StudyState(Enum):
    """Whether a study may still spend."""

    OPEN = "open"
    CLOSED = "closed"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class ApprovedStudy:
    """An approval as it stands in the ledger.

    ``seq``: its row. ``caps``: in force then. ``snapshot``: digest of its ``patients`` keyed hashes. ``shares_patients_with``:
    rows of earlier approvals with a common patient, of those that counted then. ``epsilon``: of the whole list, as it was
    approved. ``events``: attempts charged. ``charged``: of them by stage. ``highest_attempt``: 0 before the first.
    """

    seq: int
    approval: Approval
    caps: Caps
    patients: int
    snapshot: bytes
    shares_patients_with: tuple[int, ...]
    epsilon: float
    state: StudyState
    events: int
    charged: tuple[int, ...]
    highest_attempt: int

    @property
    def counts(self) -> bool:
        """Whether it has cost its patients anything or still may; one that ended unused binds nobody."""
        return self.events > 0 or self.state is StudyState.OPEN

    @property
    def attempts_left(self) -> int:
        """How many more events may be charged; attempt numbers that were passed over are gone."""
        return self.approval.attempts - self.highest_attempt if self.state is StudyState.OPEN else 0

    @property
    def trained(self) -> int:
        """Attempts to pay for as training's: those charged, and one once anything is, as the first pays for what is beside."""
        stages = self.approval.stages
        own = [count for stage, count in zip(stages, self.charged, strict=False) if stage.kind == "training"]
        return max(sum(own), 1) if stages and self.events else self.events

    @property
    def epsilon_so_far(self) -> float:
        """Of what is charged, at the study's delta: a bound that is known at once."""
        return running(self.approval.mechanism, self.trained, self.epsilon, self.approval.delta)

    @property
    def promised(self) -> int:
        """The same, those still allowed included: ``compose`` knows how many can be training's."""
        return self.trained + self.attempts_left


@dataclass(frozen=True, slots=True)
class ApprovalOutlook:
    """What an approval costs. Epsilons; ``lifetime_*`` of the patients' account at the lifetime delta.

    ``study``: both bounds of all attempts at the study's delta. ``lifetime_before``: spent and promised so far;
    ``lifetime_after``: with this study's whole list; both as of a list known beforehand. ``filter_after``: what the privacy
    filter holds against the lifetime cap, which stays true when later studies are chosen by earlier results. ``account``:
    other studies on the same account, by hash; ``apart``: how many others count in this ledger.
    """

    study: Bounds
    lifetime_before: float
    lifetime_after: float
    filter_after: float
    account: tuple[bytes, ...]
    apart: int

    @property
    def epsilon_study(self) -> float:
        """The smaller of the study's bounds."""
        return self.study.epsilon


@dataclass(frozen=True, slots=True)
class Reservation:
    """One charged attempt: epsilon of the study (at its delta) and of the account (lifetime delta) before and after, and what
    the lifetime filter holds against its cap after it. ``charged``: attempts by stage, this one included."""

    attempt: int
    charged: tuple[int, ...]
    epsilon_before: float
    epsilon_after: float
    lifetime_before: float
    lifetime_after: float
    filter_after: float


@dataclass(frozen=True, slots=True)
class AccountView:
    """Where a study and its account stand.

    ``spent``: of the events charged, ``reserved``: of those and all attempts left, both at the study's ``delta``.
    ``lifetime_spent`` and ``lifetime_reserved``: the same over every study of the account, at ``lifetime_delta``;
    ``lifetime_filter``: of the reserved, what the privacy filter holds against the cap. ``account``: the other studies on it, by
    hash.
    """

    study: bytes
    state: StudyState
    delta: float
    spent: Bounds
    reserved: Bounds
    attempts_used: int
    attempts_left: int
    lifetime_delta: float
    lifetime_spent: float
    lifetime_reserved: float
    lifetime_filter: float
    account: tuple[bytes, ...]

    @property
    def epsilon_spent(self) -> float:
        """The smaller bound."""
        return self.spent.epsilon

    @property
    def epsilon_reserved(self) -> float:
        """The smaller bound."""
        return self.reserved.epsilon


def snapshot_digest(patients: Iterable[bytes]) -> bytes:
    """SHA-256 over the sorted distinct keyed hashes of a snapshot's patients: equal sets, equal digests."""
    return hashlib.sha256(enc(b"medfed/ledger/snapshot/v1", *sorted(set(patients)))).digest()


def account_of(studies: Sequence[ApprovedStudy], touching: Iterable[int]) -> tuple[ApprovedStudy, ...]:
    """Every study linked by common patients, directly or through others, to one of the rows ``touching``."""
    links: dict[int, set[int]] = {study.seq: set() for study in studies}
    for study in studies:
        for other in study.shares_patients_with:
            links[study.seq].add(other)
            links[other].add(study.seq)
    reached: set[int] = set()
    waiting = list(touching)
    while waiting:
        row = waiting.pop()
        if row not in reached:
            reached.add(row)
            waiting.extend(links[row])
    return tuple(study for study in studies if study.seq in reached)


def spent(account: Iterable[ApprovedStudy]) -> NDArray[np.float64]:
    """RDP of every event charged."""
    return sum((compose(study.approval.mechanism, study.trained) for study in account), np.zeros(len(ORDERS)))


def promised(account: Iterable[ApprovedStudy]) -> NDArray[np.float64]:
    """RDP of every event charged or still allowed."""
    return sum((compose(study.approval.mechanism, study.promised) for study in account), np.zeros(len(ORDERS)))


def charged_with(known: ApprovedStudy, round_number: int) -> tuple[int, ...]:
    """Attempts by stage with one more at ``round_number``.

    Raises: ``LocalProtocolError`` 182 for a round no stage has; ``BudgetExhausted`` 502 where its stage has all that were paid
    for: another kind's attempts are not for it.
    """
    stages = known.approval.stages
    if round_number < 1 or (stages and round_number > stages[-1].last_round):
        raise LocalProtocolError(182, f"round {round_number} does not exist", "rounds count from 1 to the study's last")
    for place, stage in enumerate(stages):
        if stage.first_round <= round_number <= stage.last_round and known.charged[place] >= stage.attempts:
            raise BudgetExhausted(
                502,
                f"all {stage.attempts} attempts at the {stage.kind} are made, nothing was spent",
                "the study is used up; a new one needs a new approval",
            )
    return tuple(
        count + (stage.first_round <= round_number <= stage.last_round)
        for stage, count in zip(stages, known.charged, strict=True)
    )


def price(total: NDArray[np.float64], delta: float) -> float:
    """Epsilon, rounded up; 0 for nothing."""
    return epsilon(total, delta) if total.any() else 0.0


def filtered(total: NDArray[np.float64], caps: Caps, account: Iterable[ApprovedStudy]) -> float:
    """What the lifetime filter holds against its cap; 0 for nothing.

    A filter whose order is picked after seeing results is none. So it is that of the caps under which the ``account`` was
    begun, of each beginning where several have grown together; editing the caps never makes the same spending count less.
    """
    if not total.any():
        return 0.0
    begun = [known.caps for known in account if not known.shares_patients_with] or [caps]
    return max(
        filter_epsilon(total, first.max_epsilon_lifetime, first.lifetime_delta, at_most=caps.lifetime_delta)
        for first in begun
    )


def require_study_fits(value: float, caps: Caps) -> float:
    """Epsilon of a study's events; ``BudgetExhausted`` (MF-501) above the hospital's cap for one study."""
    _require(value, caps.max_epsilon_study, "the study's", "max_epsilon_study")
    return value


def require_lifetime_fits(total: NDArray[np.float64], caps: Caps, account: Iterable[ApprovedStudy]) -> float:
    """The filter's figure for an account's events; ``BudgetExhausted`` (MF-501) where it would pass its cap."""
    figure = filtered(total, caps, account)
    _require(figure, caps.max_epsilon_lifetime, "these patients' lifetime", "max_epsilon_lifetime")
    return figure


def _require(value: float, cap: float, whose: str, key: str) -> None:
    # whole millionths, spending rounded up and the cap down: no sum of tiny debits slips through
    if not math.isfinite(value) or micro(value) > int(Decimal(repr(cap)) * 1_000_000):
        raise BudgetExhausted(
            501,
            f"{whose} epsilon {_up(value)} would exceed this hospital's cap {cap:g}, nothing was spent",
            f"ask for fewer rounds or more noise, or raise {key} in hospital.toml",
        )


def _up(value: float) -> str:
    """Four decimals, rounded up, so that a refused figure never reads as the cap itself."""
    return f"{math.ceil(value * 10_000) / 10_000:.4f}" if math.isfinite(value) else "without bound"
