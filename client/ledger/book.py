"""What a hospital asks of its ledger: approve, reserve, seal, release, account.

    RESERVED   one event charged                          on disk before a single record is used
    SEALED     hashes of noised vector, pad and reply     on disk before the first byte leaves
    RELEASED   the first byte may have left               on disk before it does
    ACKED (receipt) | ABANDONED (reason)                  both stay charged

*Guarantees* (threats.md I1-I4): when a method that writes returns, its row is synced to disk. Spending never falls:
no row is ever changed, there is no refund. One attempt covers one vector, one pad covers one attempt. A refusal writes
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from medfed.client.ledger.accounts import (
    AccountView,
    Approval,
    ApprovalOutlook,
    ApprovedStudy,
    Caps,
    Prices,
    Reservation,
    StudyState,
    account_of,
    price,
    require_lifetime_fits,
    require_study_fits,
    snapshot_digest,
)
from medfed.client.ledger.entries import (
    HASH_BYTES,
    MOVES,
    ApprovedBody,
    AttemptState,
    Body,
    CapsBody,
    Draft,
    EmptyBody,
    Entry,
    Head,
    Kind,
    ReasonBody,
    ReservedBody,
    SealedBody,
)
from medfed.client.ledger.store import Store
from medfed.privacy.accounting import Mechanism, micro

from medfed.errors import BudgetExhausted, ConfigError, DataError, LocalProtocolError, PrivacyError
from medfed.identity import Identity
from medfed.seams import Files


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


class Ledger:
    """A hospital's privacy spending. Open it as a context manager; one process at a time holds it."""

    def __init__(self, store: Store, stack: contextlib.ExitStack) -> None:
        self._store = store
        self._stack = stack
        self._prices = Prices()

    # ------------------------------------------------------------------------------------------------ opening, closing

    @classmethod
    def create(cls, files: Files, path: Path, identity: Identity) -> Ledger:
        """Begin the ledger of a new hospital and open it.

        A second ledger is never begun: MF-212 where one is, MF-401 where one was (``<path>.begun`` remembers).
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.lock(_lock_path(path)))
            if files.exists(_mark_path(path)) and not files.exists(path):
                raise PrivacyError(401, f"{path.name} not found", "restore it; a lost ledger is never begun anew")
            store = _attach(files, path, identity, stack, create=True)
            if not store.is_empty:
                raise ConfigError(212, f"{path.name} exists", "a ledger is begun once")
            store.begin()
            _mark(files, path, store)
            return cls(store, stack.pop_all())

    @classmethod
    def open(cls, files: Files, path: Path, identity: Identity) -> Ledger:
        """Take the one-writer lock, check durability and the whole chain.

        Raises: 401 no ledger there, or another than the one begun there; 402, 403, 404, 406 damage; 601 the volume is
        not safe; 620 another process holds it.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.lock(_lock_path(path)))
            store = _attach(files, path, identity, stack, create=False)
            store.check()
            _mark(files, path, store)
            return cls(store, stack.pop_all())

    @classmethod
    def inspect(cls, files: Files, path: Path, identity: Identity) -> Ledger:
        """Open for looking only, beside a running hospital: no lock, and SQLite refuses every write."""
        with contextlib.ExitStack() as stack:
            store = Store.attach_reader(files.database(path, create=False), identity)
            stack.callback(store.close)
            store.check()
            return cls(store, stack.pop_all())

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------- approving

    def preview(self, approval: Approval, patients: Iterable[bytes], caps: Caps) -> ApprovalOutlook:
        """What ``approve`` would say, without writing."""
        return self._look_ahead(approval, frozenset(patients), caps)[0]

    def approve(self, approval: Approval, patients: Iterable[bytes], caps: Caps) -> ApprovalOutlook:
        """Agree to a study and reserve its fixed list of events, in one commit.

        ``patients``: keyed hashes (32 bytes, one key a hospital, the same for every study) of the ids in the snapshot.
        Raises: ``BudgetExhausted`` 501 above a cap; ``PrivacyError`` 125 if the study is closed, withdrawn or approved
        with other contents (the same again is fine); ``DataError`` 310 without patients.
        """
        distinct = frozenset(patients)
        with self._store.transaction():
            known = self._find(approval.study)
            if known is not None and self._is_same(known, approval, distinct):
                return self._outlook_of(known, caps)
            outlook, touching = self._look_ahead(approval, distinct, caps)
            body = _approved_body(approval, distinct, touching, caps, outlook)
            entry = self._store.append(Draft(Kind.APPROVED, approval.study, 0, body))
            self._store.add_patients(entry.seq, distinct)
        return outlook

    def _is_same(self, known: ApprovedStudy, approval: Approval, patients: frozenset[bytes]) -> bool:
        """Whether this very approval stands; MF-125 if the study ended or stands with other contents."""
        if known.state is not StudyState.OPEN:
            raise PrivacyError(125, f"this study is {known.state.value} here", "a new study needs a new hash")
        same = _contents(known.approval) == _contents(approval) and known.snapshot == snapshot_digest(patients)
        if not same:
            raise PrivacyError(125, "this study is approved here with other contents", "withdraw it, make a new study")
        return True

    def _look_ahead(
        self, approval: Approval, patients: frozenset[bytes], caps: Caps
    ) -> tuple[ApprovalOutlook, frozenset[int]]:
        if not patients:
            raise DataError(310, "the data hold no patient for this study", "check the data and the hold-out")
        if any(len(patient) != HASH_BYTES for patient in patients):
            raise LocalProtocolError(900, "a patient hash is malformed", "report this as a fault of medfed")
        touching = self._store.approvals_touching(patients)
        account = account_of(self.studies(), touching)
        listed = self._prices.of(approval.mechanism, approval.attempts)
        before = self._prices.promised(account)
        study = require_study_fits(listed, approval.delta, caps)
        after = require_lifetime_fits(before + listed, caps)
        hashes = tuple(other.approval.study for other in account)
        return ApprovalOutlook(study, price(before, caps.lifetime_delta), after, hashes), touching

    def _outlook_of(self, known: ApprovedStudy, caps: Caps) -> ApprovalOutlook:
        account = account_of(self.studies(), {known.seq})
        others = tuple(other for other in account if other.seq != known.seq)
        return ApprovalOutlook(
            price(self._prices.of(known.approval.mechanism, known.approval.attempts), known.approval.delta),
            price(self._prices.promised(others), caps.lifetime_delta),
            price(self._prices.promised(account), caps.lifetime_delta),
            tuple(other.approval.study for other in others),
        )

    def close_study(self, study: bytes, reason: str) -> None:
        """The study is over: what it did not use is free again for others; nothing more leaves. Twice is fine."""
        self._end(study, reason, Kind.CLOSED, StudyState.CLOSED)

    def withdraw(self, study: bytes, reason: str) -> None:
        """The hospital takes its approval back; otherwise as ``close_study``."""
        self._end(study, reason, Kind.WITHDRAWN, StudyState.WITHDRAWN)

    def _end(self, study: bytes, reason: str, kind: Kind, state: StudyState) -> None:
        with self._store.transaction():
            known = self.approved(study)
            if known.state is state:
                return
            _require_open(known)
            self._store.append(Draft(kind, study, 0, ReasonBody(reason=reason)))

    # -------------------------------------------------------------------------------------------------------- spending

    def reserve(self, study: bytes, round_number: int, attempt: int, caps: Caps, now_wall: float) -> Reservation:
        """Charge one event of the study's list; on disk when this returns. Only then may records be used.

        Raises: ``PrivacyError`` 123 not approved, 125 closed or withdrawn; ``LocalProtocolError`` 181 if this or a later
        attempt was charged before; ``BudgetExhausted`` 502 beyond the list, 501 above a cap that was lowered since.
        """
        with self._store.transaction():
            known = self.approved(study)
            _require_open(known)
            if attempt <= known.highest_attempt:
                raise LocalProtocolError(181, f"attempt {attempt} was charged before", "harmless; send what was sealed")
            if not 1 <= attempt <= known.approval.attempts:
                raise BudgetExhausted(
                    502,
                    f"attempt {attempt} is beyond the {known.approval.attempts} this hospital approved, nothing was spent",
                    "the study is used up; a new one needs a new approval",
                )
            reservation = self._charge(known, attempt, caps)
            body = _reserved_body(known.approval.mechanism, round_number, caps, now_wall, reservation)
            self._store.append(Draft(Kind.RESERVED, study, attempt, body))
        return reservation

    def _charge(self, known: ApprovedStudy, attempt: int, caps: Caps) -> Reservation:
        mechanism, delta = known.approval.mechanism, known.approval.delta
        account = self._prices.spent(account_of(self.studies(), {known.seq}))
        return Reservation(
            attempt,
            price(self._prices.of(mechanism, known.events), delta),
            require_study_fits(self._prices.of(mechanism, known.events + 1), delta, caps),
            price(account, caps.lifetime_delta),
            require_lifetime_fits(account + self._prices.of(mechanism, 1), caps),
        )

    def seal(self, study: bytes, attempt: int, vector_hash: bytes, pad_id: bytes, reply_hash: bytes) -> None:
        """Bind an attempt to the one vector it may send, before the first byte leaves. The same again is fine.

        Raises ``LocalProtocolError``: 183 for other bytes in this attempt or a pad that covered anything before, 182
        if the attempt is not reserved; ``PrivacyError`` 125 if the study ended.
        """
        with self._store.transaction():
            self._seal(study, attempt, Sealed(vector_hash, pad_id, reply_hash))

    def release(self, study: bytes, attempt: int) -> None:
        """Say that bytes may leave from now on. The same again is fine: the sealed reply may be sent again.

        Raises ``LocalProtocolError`` 182 unless sealed; ``PrivacyError`` 125 if the study ended: then nothing leaves.
        """
        with self._store.transaction():
            self._release(study, attempt)

    def seal_and_release(
        self, study: bytes, attempt: int, vector_hash: bytes, pad_id: bytes, reply_hash: bytes
    ) -> None:
        """``seal`` and ``release`` with one sync instead of two."""
        with self._store.transaction():
            self._seal(study, attempt, Sealed(vector_hash, pad_id, reply_hash))
            self._release(study, attempt)

    def acknowledge(self, study: bytes, attempt: int) -> None:
        """The coordinator holds the reply. The same again is fine."""
        with self._store.transaction():
            if self.attempt_status(study, attempt) is not AttemptState.ACKED:
                self._move(study, attempt, AttemptState.ACKED, EmptyBody())

    def abandon(self, study: bytes, attempt: int, reason: str) -> None:
        """The attempt is lost, and stays charged. The same again is fine."""
        with self._store.transaction():
            if self.attempt_status(study, attempt) is not AttemptState.ABANDONED:
                self._move(study, attempt, AttemptState.ABANDONED, ReasonBody(reason=reason))

    def _seal(self, study: bytes, attempt: int, sealed: Sealed) -> None:
        _require_open(self.approved(study))
        if any(len(part) != HASH_BYTES for part in (sealed.vector, sealed.pad, sealed.reply)):
            raise LocalProtocolError(900, "a sealed hash is malformed", "report this as a fault of medfed")
        before = self.sealed(study, attempt)
        if before == sealed:
            return
        if before is not None or self._store.select("WHERE pad = ?", (sealed.pad,)):
            raise LocalProtocolError(183, "this attempt or pad covers another vector", "stop; a new attempt is needed")
        body = SealedBody(vector=sealed.vector.hex(), pad=sealed.pad.hex(), reply=sealed.reply.hex())
        self._move(study, attempt, AttemptState.SEALED, body)

    def _release(self, study: bytes, attempt: int) -> None:
        _require_open(self.approved(study))
        if self.attempt_status(study, attempt) not in {AttemptState.RELEASED, AttemptState.ACKED}:
            self._move(study, attempt, AttemptState.RELEASED, EmptyBody())

    def _move(self, study: bytes, attempt: int, to: AttemptState, body: Body) -> None:
        state = self.attempt_status(study, attempt)
        if attempt < 1 or state is None or to not in MOVES[state]:
            now = state.value if state else "unknown"
            raise LocalProtocolError(
                182, f"attempt {attempt} is {now}, not to be {to.value}", "a new attempt is needed"
            )
        self._store.append(Draft(Kind(to.value), study, attempt, body))

    # --------------------------------------------------------------------------------------------------------- reading

    def attempt_status(self, study: bytes, attempt: int) -> AttemptState | None:
        """How far an attempt came; None if it was never charged."""
        rows = self._store.select("WHERE study = ? AND attempt = ? ORDER BY seq DESC LIMIT 1", (study, attempt))
        return AttemptState(rows[0].kind.value) if rows and attempt else None

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
        rows = self._store.select("WHERE kind IN ('APPROVED', 'RESERVED') ORDER BY seq")
        times = [
            row.read(ApprovedBody).approved_wall_s if row.kind is Kind.APPROVED else row.read(ReservedBody).wall_s
            for row in rows
        ]
        return max(times, default=0.0)

    def approved(self, study: bytes) -> ApprovedStudy:
        """The approval of a study, open or ended; ``PrivacyError`` (MF-123) if there is none."""
        known = self._find(study)
        if known is None:
            raise PrivacyError(123, "this hospital has not approved that study", "medfed-client approve study.toml")
        return known

    def patients(self, study: bytes) -> frozenset[bytes]:
        """Keyed hashes of the patients in the study's snapshot."""
        return self._store.patients_of(self.approved(study).seq)

    def studies(self) -> tuple[ApprovedStudy, ...]:
        """Every approval, in order."""
        rows = self._store.select("WHERE kind IN ('APPROVED', 'RESERVED', 'CLOSED', 'WITHDRAWN') ORDER BY seq")
        by_study: dict[bytes, list[Entry]] = {}
        for row in rows:
            by_study.setdefault(row.study, []).append(row)
        return tuple(_approved_study(entries) for entries in by_study.values())

    def _find(self, study: bytes) -> ApprovedStudy | None:
        rows = self._store.select(
            "WHERE study = ? AND kind IN ('APPROVED', 'RESERVED', 'CLOSED', 'WITHDRAWN') ORDER BY seq", (study,)
        )
        return _approved_study(rows) if rows else None

    def account(self, study: bytes, caps: Caps) -> AccountView:
        """Where a study and the account of its patients stand; MF-123 if the study was never approved."""
        known = self.approved(study)
        account = account_of(self.studies(), {known.seq})
        mechanism, delta = known.approval.mechanism, known.approval.delta
        return AccountView(
            study=study,
            state=known.state,
            delta=delta,
            epsilon_spent=price(self._prices.of(mechanism, known.events), delta),
            epsilon_reserved=price(self._prices.of(mechanism, known.promised), delta),
            attempts_used=known.events,
            attempts_left=known.attempts_left,
            lifetime_delta=caps.lifetime_delta,
            lifetime_spent=price(self._prices.spent(account), caps.lifetime_delta),
            lifetime_reserved=price(self._prices.promised(account), caps.lifetime_delta),
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
        rows = self._store.select("WHERE seq = ?", (witness.seq,))
        if not rows or rows[0].hash != witness.hash:
            raise PrivacyError(
                405,
                f"ledger has {self.head().seq} rows, but row {witness.seq} was seen with other contents or is missing",
                "this is an old or a second copy: stop, restore the latest one",
            )


# ------------------------------------------------------------------------------------------------------------- details


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _mark_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.begun")


def _attach(files: Files, path: Path, identity: Identity, stack: contextlib.ExitStack, *, create: bool) -> Store:
    connection = files.database(path, create=create)
    stack.callback(connection.close)
    return Store.attach(connection, identity)


def _mark(files: Files, path: Path, store: Store) -> None:
    """Remember which ledger was begun here, so that it cannot silently be replaced by a fresh one."""
    first = store.select("WHERE seq = 1")[0].hash
    mark = _mark_path(path)
    if not files.exists(mark):
        files.write(mark, first)
    elif files.read(mark, limit_bytes=1024) != first:
        raise PrivacyError(401, f"{path.name} is not the ledger begun here", "restore the one that was")


def _require_open(known: ApprovedStudy) -> None:
    if known.state is not StudyState.OPEN:
        raise PrivacyError(125, f"this study is {known.state.value} here", "nothing more leaves for it")


def _contents(approval: Approval) -> tuple[object, ...]:
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


def _caps_body(caps: Caps) -> CapsBody:
    return CapsBody(
        max_epsilon_study=float(caps.max_epsilon_study),
        max_epsilon_lifetime=float(caps.max_epsilon_lifetime),
        lifetime_delta=caps.lifetime_delta,
    )


def _approved_body(
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
        caps=_caps_body(caps),
        study_micro=micro(outlook.epsilon_study),
        lifetime_before_micro=micro(outlook.lifetime_before),
        lifetime_after_micro=micro(outlook.lifetime_after),
    )


def _reserved_body(
    mechanism: Mechanism, round_number: int, caps: Caps, now_wall: float, reservation: Reservation
) -> ReservedBody:
    return ReservedBody(
        round=round_number,
        wall_s=float(now_wall),
        mechanism=mechanism.to_json(),
        caps=_caps_body(caps),
        study_before_micro=micro(reservation.epsilon_before),
        study_after_micro=micro(reservation.epsilon_after),
        lifetime_before_micro=micro(reservation.lifetime_before),
        lifetime_after_micro=micro(reservation.lifetime_after),
    )


_ENDS = {Kind.CLOSED: StudyState.CLOSED, Kind.WITHDRAWN: StudyState.WITHDRAWN}


def _approved_study(entries: list[Entry]) -> ApprovedStudy:
    """An approval and what became of it, from the rows of one study in order."""
    first, body = entries[0], entries[0].read(ApprovedBody)
    attempts = [entry.attempt for entry in entries if entry.kind is Kind.RESERVED]
    ends = [_ENDS[entry.kind] for entry in entries if entry.kind in _ENDS]
    approval = Approval(
        study=first.study,
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
        seq=first.seq,
        approval=approval,
        patients=body.patients,
        snapshot=bytes.fromhex(body.snapshot),
        shares_patients_with=tuple(body.shares_patients_with),
        state=ends[-1] if ends else StudyState.OPEN,
        events=len(attempts),
        highest_attempt=max(attempts, default=0),
    )
