"""Looking at a ledger: what was approved, what is spent, what is left, whether it verifies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from medfed.client.ledger.accounts import (
    AccountView,
    Approval,
    ApprovalOutlook,
    ApprovedStudy,
    Caps,
    StudyState,
    account_of,
    filtered,
    price,
    promised,
    require_lifetime_fits,
    require_study_fits,
    snapshot_digest,
    spent,
)
from medfed.client.ledger.entries import HASH_BYTES, AttemptState, Entry, Kind, ReservedBody, SealedBody
from medfed.client.ledger.ids import PatientIds, require_same
from medfed.client.ledger.rows import approved_study, contents
from medfed.client.ledger.store import Store
from medfed.errors import BudgetExhausted, DataError, LocalProtocolError, PrivacyError
from medfed.identity import Identity
from medfed.privacy.accounting import bounds, compose
from medfed.seams import Files
from medfed.witness import Head

_ENDS = {Kind.CLOSED: StudyState.CLOSED, Kind.WITHDRAWN: StudyState.WITHDRAWN}
_ABOUT_STUDIES = (Kind.APPROVED, Kind.ROSTER, *_ENDS)
_Self = TypeVar("_Self", bound="LedgerView")


@dataclass(frozen=True, slots=True)
class Sealed:
    """SHA-256 of the noised vector and of the reply's bytes, and the id of the pad between them."""

    vector: bytes
    pad: bytes
    reply: bytes


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A ledger that verified: every row, signature, legal move and patient snapshot."""

    entries: int
    studies: int
    attempts: int
    head: Head


def _as_they_stand(rows: Sequence[Entry], tallies: Mapping[bytes, tuple[int, Entry]]) -> tuple[ApprovedStudy, ...]:
    """The approvals among ``rows``, each with its latest roster and its end, if they are there, and what was charged."""
    ends = {row.study: _ENDS[row.kind] for row in rows if row.kind in _ENDS}
    rosters = {row.study: row for row in rows if row.kind is Kind.ROSTER}
    return tuple(
        approved_study(
            row, rosters.get(row.study), ends.get(row.study, StudyState.OPEN), *tallies.get(row.study, (0, None))
        )
        for row in rows
        if row.kind is Kind.APPROVED
    )


class LedgerView:
    """A ledger that can only be read; context manager."""

    def __init__(self, store: Store, stack: contextlib.ExitStack) -> None:
        self._store = store
        self._stack = stack

    @staticmethod
    def inspect(files: Files, path: Path, identity: Identity) -> LedgerView:
        """Open for looking only, beside a running hospital: no lock, and SQLite refuses every write.

        The hospital is held up for the length of one read at most; checks walk a copy in memory.
        """
        with contextlib.ExitStack() as stack:
            connection = files.database(path, create=False)
            stack.callback(connection.close)
            store = Store.attach_reader(connection, identity)
            store.check()
            return LedgerView(store, stack.pop_all())

    def close(self) -> None:
        self._stack.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def attempt_status(self, study: bytes, attempt: int) -> AttemptState | None:
        """How far an attempt came; None if it was never charged."""
        rows = self._store.select("WHERE study = ? AND attempt = ? ORDER BY seq DESC LIMIT 1", (study, attempt))
        return AttemptState(rows[0].kind.value) if rows and attempt else None

    def charged_round(self, study: bytes, attempt: int) -> int | None:
        """The round = 1, 2, ... that an attempt was charged for; None if it never was."""
        rows = self._store.select("WHERE study = ? AND attempt = ? AND kind = 'RESERVED'", (study, attempt))
        return rows[0].read(ReservedBody).round if rows else None

    def sealed(self, study: bytes, attempt: int) -> Sealed | None:
        """What an attempt was sealed with: a reply in the outbox must match it to be sent (again)."""
        rows = self._store.select("WHERE study = ? AND attempt = ? AND kind = 'SEALED'", (study, attempt))
        if not rows:
            return None
        body = rows[0].read(SealedBody)
        return Sealed(bytes.fromhex(body.vector), bytes.fromhex(body.pad), bytes.fromhex(body.reply))

    def highest_attempt(self, study: bytes) -> int:
        """The last attempt charged; 0 before the first. ``PrivacyError`` (MF-123) if the study was never approved."""
        return self.approved(study).highest_attempt

    def highest_wall(self) -> float:
        """The latest time any row states: expiry is judged by this or the clock, whichever is later."""
        return self._store.latest_wall()

    def approved(self, study: bytes) -> ApprovedStudy:
        """The approval of a study, open or ended; ``PrivacyError`` (MF-123) if there is none."""
        known = self._find(study)
        if known is None:
            raise PrivacyError(123, "this hospital has not approved that study", "medfed-client approve study.toml")
        return known

    def patients(self, study: bytes) -> frozenset[bytes]:
        """Keyed hashes of the patients in the study's snapshot."""
        return self._store.patients_of(self.approved(study).seq)

    def standing(self, study: bytes) -> Approval | None:
        """What is approved of a study that is open, as of its latest roster; None where nothing is, or not any more."""
        known = self._find(study)
        return known.approval if known is not None and known.state is StudyState.OPEN else None

    def studies(self) -> tuple[ApprovedStudy, ...]:
        """Every approval, in order."""
        return _as_they_stand(self._store.of_studies(*_ABOUT_STUDIES), self._store.tallies())

    def _find(self, study: bytes) -> ApprovedStudy | None:
        rows = self._store.select("WHERE study = ? AND attempt <= 0 ORDER BY seq", (study,))
        return next(iter(_as_they_stand(rows, self._store.tallies(study))), None)

    def account(self, study: bytes, caps: Caps) -> AccountView:
        """Where a study and the account of its patients stand; MF-123 if the study was never approved."""
        known = self.approved(study)
        account = account_of(self.studies(), {known.seq})
        mechanism, delta, held = known.approval.mechanism, known.approval.delta, promised(account)
        return AccountView(
            study=study,
            state=known.state,
            delta=delta,
            spent=bounds(mechanism, known.trained, delta),
            reserved=bounds(mechanism, known.promised, delta),
            attempts_used=known.events,
            attempts_left=known.attempts_left,
            lifetime_delta=caps.lifetime_delta,
            lifetime_spent=price(spent(account), caps.lifetime_delta),
            lifetime_reserved=price(held, caps.lifetime_delta),
            lifetime_filter=filtered(held, caps, account),
            account=tuple(other.approval.study for other in account if other.seq != known.seq),
        )

    def entries(self) -> tuple[Entry, ...]:
        """Every row, in order."""
        return tuple(self._store.select())

    def head(self) -> Head:
        """The last row's number, hash and signature."""
        last = self._store.last()
        if last is None:
            raise PrivacyError(402, "ledger is empty", "restore the latest backup")
        return last.head

    def end_of(self, study: bytes) -> Head:
        """The row that closed or withdrew a study: where this ledger stood then. ``PrivacyError`` (MF-125) if it is open."""
        rows = self._store.select("WHERE study = ? AND kind IN ('CLOSED', 'WITHDRAWN')", (study,))
        if not rows:
            raise PrivacyError(125, "this study is not ended here", "wait until its last round is done")
        return rows[0].head

    def verify(self) -> VerifyReport:
        """Check everything, each row's signature included; raises as ``open`` does."""
        head = self._store.check(every_signature=True)
        studies = self.studies()
        return VerifyReport(head.seq, len(studies), sum(study.events for study in studies), head)

    def check_witness(self, witness: Head, public: bytes) -> None:
        """Compare with a head of this ledger that someone else kept.

        Raises: ``RemoteProtocolError`` 110 if the witness is forged (and proves nothing); ``PrivacyError`` 405 if the
        ledger is older than the witness or took another way since.
        """
        witness.check(public)
        # numbers of heads go beyond those that SQLite knows
        rows = self._store.select("WHERE seq = ?", (witness.seq,)) if witness.seq <= self.head().seq else []
        if not rows or rows[0].hash != witness.hash:
            raise PrivacyError(
                405,
                f"ledger has {self.head().seq} rows, but row {witness.seq} was seen with other contents or is missing",
                "this is an old or a second copy and is locked: restore the newest ledger.db, nothing else unlocks it",
            )

    def preview(self, approval: Approval, patients: Iterable[bytes], caps: Caps) -> ApprovalOutlook:
        """What ``approve`` would say or raise, without writing."""
        distinct = frozenset(patients)
        self.require_same_ids(approval.ids)
        known = self._find(approval.study)
        if known is not None and self._is_same(known, approval, distinct):
            return self._outlook_of(known, caps)
        return self._look_ahead(approval, distinct, caps)[0]

    def require_same_ids(self, ids: PatientIds) -> None:
        """``PrivacyError`` (MF-340) if patients are told apart by another key or column than in a study that counts here."""
        for known in self.studies():
            if known.counts:
                require_same(known.approval.ids, ids)

    @staticmethod
    def _is_same(known: ApprovedStudy, approval: Approval, patients: frozenset[bytes]) -> bool:
        """Whether this very approval stands; MF-125 if the study ended or stands with other contents."""
        if known.state is not StudyState.OPEN:
            raise PrivacyError(125, f"this study is {known.state.value} here", "a new study needs a new hash")
        stands = contents(known.approval)
        differing = [name for name, content in contents(approval).items() if content != stands[name]]
        if known.snapshot != snapshot_digest(patients):
            differing.append("the patients in the data")
        if differing:
            raise PrivacyError(
                125,
                f"this study is approved here already, and now other: {', '.join(differing)}",
                "the approval stands as it was made; what has to change needs a new study",
            )
        return True

    def outlook(self, approval: Approval, patients: Iterable[bytes], caps: Caps) -> ApprovalOutlook:
        """What an approval would cost, whether or not it fits the caps; as ``preview``, writes nothing."""
        account, _ = self._account_touched(frozenset(patients))
        before, listed = promised(account), compose(approval.mechanism, approval.attempts)
        return ApprovalOutlook(
            bounds(approval.mechanism, approval.attempts, approval.delta),
            price(before, caps.lifetime_delta),
            price(before + listed, caps.lifetime_delta),
            filtered(before + listed, caps, account),
            tuple(other.approval.study for other in account),
            self._apart(account),
        )

    def attempts_that_fit(self, approval: Approval, patients: Iterable[bytes], caps: Caps) -> int:
        """The largest number of an approval's attempts under both caps, by bisection: epsilon grows with every attempt."""
        account, _ = self._account_touched(frozenset(patients))
        before, fits, fails = promised(account), 0, approval.attempts + 1
        middle = approval.attempts  # mostly all of them fit
        while fails - fits > 1:
            try:
                require_study_fits(bounds(approval.mechanism, middle, approval.delta).epsilon, caps)
                require_lifetime_fits(before + compose(approval.mechanism, middle), caps, account)
            except BudgetExhausted:
                fails = middle
            else:
                fits = middle
            middle = (fits + fails) // 2
        return fits

    def _account_touched(self, patients: frozenset[bytes]) -> tuple[tuple[ApprovedStudy, ...], frozenset[int]]:
        """The account that an approval with these patients would draw on, and the approvals it shares patients with."""
        if not patients:
            raise DataError(310, "the data hold no patient for this study", "check the data and the hold-out")
        if any(len(patient) != HASH_BYTES for patient in patients):
            raise LocalProtocolError(900, "a patient hash is malformed", "report this as a fault of medfed")
        studies = self.studies()
        touching = self._store.approvals_touching(patients) & {known.seq for known in studies if known.counts}
        return account_of(studies, touching), touching

    def _apart(self, account: Sequence[ApprovedStudy]) -> int:
        """How many studies count in this ledger and not in ``account``."""
        members = {known.seq for known in account}
        return sum(known.counts and known.seq not in members for known in self.studies())

    def _look_ahead(
        self, approval: Approval, patients: frozenset[bytes], caps: Caps
    ) -> tuple[ApprovalOutlook, frozenset[int]]:
        account, touching = self._account_touched(patients)
        outlook = self.outlook(approval, patients, caps)
        require_study_fits(outlook.study.epsilon, caps)
        require_lifetime_fits(promised(account) + compose(approval.mechanism, approval.attempts), caps, account)
        return outlook, touching

    def _outlook_of(self, known: ApprovedStudy, caps: Caps) -> ApprovalOutlook:
        account = account_of(self.studies(), {known.seq})
        others = tuple(other for other in account if other.seq != known.seq)
        approval, held = known.approval, promised(account)
        return ApprovalOutlook(
            bounds(approval.mechanism, approval.attempts, approval.delta),
            price(promised(others), caps.lifetime_delta),
            price(held, caps.lifetime_delta),
            filtered(held, caps, account),
            tuple(other.approval.study for other in others),
            self._apart(account),
        )
