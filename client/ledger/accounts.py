"""What is spent, what is promised, and whether more fits: pure functions over the approvals of a ledger.

An account belongs to a set of patients, not to a name. Two approvals with one patient in common draw on one account,
and so does everything linked to either; only approvals without a common patient compose in parallel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from medfed.errors import BudgetExhausted, LocalProtocolError
from medfed.privacy.accounting import ORDERS, Mechanism, epsilon, micro
from medfed.privacy.filter import filter_epsilon
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
    """What a hospital agrees to: the study by its hash, and the fixed list of ``attempts`` equal events it may cost.

    ``study``, ``roster``, ``first_model``: SHA-256. ``delta``: of the study. ``nominal_patients``: the size declared
    in the roster. ``unconfirmed``: Ed25519 keys of peers whose fingerprints this hospital could not check.
    ``approved_wall_s``: seconds since 1970 by the hospital's clock.
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

    def __post_init__(self) -> None:
        digests = (self.study, self.roster, self.first_model, *self.unconfirmed)
        if any(len(digest) != HASH_BYTES for digest in digests) or self.attempts < 1 or not 0.0 < self.delta < 1.0:
            raise LocalProtocolError(900, "approval is malformed", "report this as a fault of medfed")


class StudyState(Enum):
    """Whether a study may still spend."""

    OPEN = "open"
    CLOSED = "closed"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class ApprovedStudy:
    """An approval as it stands in the ledger.

    ``seq``: its row. ``snapshot``: digest of its ``patients`` keyed hashes. ``shares_patients_with``: rows of earlier
    approvals with a common patient. ``events``: attempts charged. ``highest_attempt``: 0 before the first.
    """

    seq: int
    approval: Approval
    patients: int
    snapshot: bytes
    shares_patients_with: tuple[int, ...]
    state: StudyState
    events: int
    highest_attempt: int

    @property
    def attempts_left(self) -> int:
        """How many more events may be charged; attempt numbers that were passed over are gone."""
        return self.approval.attempts - self.highest_attempt if self.state is StudyState.OPEN else 0

    @property
    def promised(self) -> int:
        """Events charged or still allowed."""
        return self.events + self.attempts_left


@dataclass(frozen=True, slots=True)
class ApprovalOutlook:
    """What an approval costs. Epsilons; ``lifetime_*`` of the patients' account at the lifetime delta.

    ``epsilon_study``: of all attempts at the study's delta. ``lifetime_before``: spent and promised so far;
    ``lifetime_after``: with this study's whole list. ``account``: other studies on the same account, by hash.
    """

    epsilon_study: float
    lifetime_before: float
    lifetime_after: float
    account: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Reservation:
    """One charged event: epsilon of the study (at its delta) and of the account (lifetime delta) before and after."""

    attempt: int
    epsilon_before: float
    epsilon_after: float
    lifetime_before: float
    lifetime_after: float


@dataclass(frozen=True, slots=True)
class AccountView:
    """Where a study and its account stand.

    ``epsilon_spent``: of the events charged, ``epsilon_reserved``: of those and all attempts left, both at the study's
    ``delta``. ``lifetime_spent`` and ``lifetime_reserved``: the same over every study of the account, at
    ``lifetime_delta``. ``account``: the other studies on it, by hash.
    """

    study: bytes
    state: StudyState
    delta: float
    epsilon_spent: float
    epsilon_reserved: float
    attempts_used: int
    attempts_left: int
    lifetime_delta: float
    lifetime_spent: float
    lifetime_reserved: float
    account: tuple[bytes, ...]


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


class Prices:
    """RDP of mechanisms, each worked out once."""

    def __init__(self) -> None:
        self._known: dict[Mechanism, NDArray[np.float64]] = {}

    def of(self, mechanism: Mechanism, count: int) -> NDArray[np.float64]:
        """RDP of ``count`` attempts over ``ORDERS``, what comes before the first included: float64[len(ORDERS)]."""
        if not count:
            return np.zeros(len(ORDERS))
        total = self._of_one(mechanism) * count
        return total if mechanism.beforehand is None else total + self._of_one(mechanism.beforehand)

    def of_next(self, mechanism: Mechanism, count: int) -> NDArray[np.float64]:
        """RDP of one attempt more after ``count``: float64[len(ORDERS)]."""
        return self._of_one(mechanism) if count else self.of(mechanism, 1)

    def _of_one(self, mechanism: Mechanism) -> NDArray[np.float64]:
        if mechanism not in self._known:
            self._known[mechanism] = mechanism.rdp()
        return self._known[mechanism]

    def spent(self, account: Iterable[ApprovedStudy]) -> NDArray[np.float64]:
        """RDP of every event charged."""
        return sum((self.of(study.approval.mechanism, study.events) for study in account), np.zeros(len(ORDERS)))

    def promised(self, account: Iterable[ApprovedStudy]) -> NDArray[np.float64]:
        """RDP of every event charged or still allowed."""
        return sum((self.of(study.approval.mechanism, study.promised) for study in account), np.zeros(len(ORDERS)))


def price(total: NDArray[np.float64], delta: float) -> float:
    """Epsilon, rounded up; 0 for nothing."""
    return epsilon(total, delta) if total.any() else 0.0


def require_study_fits(total: NDArray[np.float64], delta: float, caps: Caps) -> float:
    """Epsilon of a study's events; ``BudgetExhausted`` (MF-501) above the hospital's cap for one study."""
    value = price(total, delta)
    _require(value, caps.max_epsilon_study, "the study's", "max_epsilon_study")
    return value


def require_lifetime_fits(total: NDArray[np.float64], caps: Caps) -> float:
    """Epsilon of an account's events; ``BudgetExhausted`` (MF-501) where the lifetime filter would pass its cap.

    The filter decides; the value returned is the (smaller) one for a list of events known beforehand.
    """
    if total.any():
        figure = filter_epsilon(total, caps.max_epsilon_lifetime, caps.lifetime_delta)
        _require(figure, caps.max_epsilon_lifetime, "these patients' lifetime", "max_epsilon_lifetime")
    return price(total, caps.lifetime_delta)


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
