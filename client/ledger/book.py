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
from dataclasses import replace
from pathlib import Path

from medfed.client.ledger.accounts import (
    Approval,
    ApprovalOutlook,
    ApprovedStudy,
    Caps,
    Reservation,
    StudyState,
    account_of,
    charged_with,
    price,
    require_lifetime_fits,
    require_study_fits,
    spent,
)
from medfed.client.ledger.entries import (
    HASH_BYTES,
    MOVES,
    AttemptState,
    Body,
    Draft,
    EmptyBody,
    Kind,
    ReasonBody,
    RosterBody,
    SealedBody,
)
from medfed.client.ledger.lock import require_unlocked
from medfed.client.ledger.rows import approved_body, reserved_body
from medfed.client.ledger.store import Store
from medfed.client.ledger.view import LedgerView, Sealed
from medfed.errors import BudgetExhausted, ConfigError, LocalProtocolError, MedfedError, PrivacyError
from medfed.identity import Identity
from medfed.seams import Files

_BY_PAD = "WHERE kind = 'SEALED' AND json_extract(body, '$.pad') = ?"


class Ledger(LedgerView):
    """A hospital's privacy spending. Open it as a context manager; one process at a time holds it."""

    # ------------------------------------------------------------------------------------------------ opening, closing

    @classmethod
    def create(cls, files: Files, path: Path, identity: Identity) -> Ledger:
        """Begin the ledger of a new hospital and open it.

        A second ledger is never begun: MF-212 where one is, MF-401 where one was (``<path>.begun`` remembers).
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.lock(_lock_path(path)))
            was_begun = files.exists(_mark_path(path))
            if was_begun and not files.exists(path):
                raise _lost(path)
            store = _attach(files, path, identity, stack, create=True)
            if was_begun and store.is_empty:
                raise _lost(path)
            if not store.is_empty:
                raise ConfigError(212, f"{path.name} exists", "a ledger is begun once")
            store.begin()
            _mark(files, path, store)
            return cls(store, stack.pop_all())

    @classmethod
    def open(cls, files: Files, path: Path, identity: Identity) -> Ledger:
        """Take the one-writer lock, check durability and the whole chain.

        Raises: 204 the file is a link or has a second name; 401 no ledger there, or another than the one begun there; 402, 403,
        404, 406 damage; 405 others saw a later one; 601 the volume is not safe; 620 another process holds it.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.lock(_lock_path(path)))
            store = _attach(files, path, identity, stack, create=False)
            store.check()
            _mark(files, path, store)
            require_unlocked(files, path, LedgerView(store, contextlib.ExitStack()), identity.public)
            return cls(store, stack.pop_all())

    @staticmethod
    def is_held(files: Files, path: Path) -> bool:
        """Whether a process has this ledger open. Takes the lock for a moment, so ask only when nobody is to start."""
        try:
            with files.lock(_lock_path(path)):
                return False
        except MedfedError as error:
            if error.code == 620:
                return True
            raise

    # ------------------------------------------------------------------------------------------------------- approving

    def approve(self, approval: Approval, patients: Iterable[bytes], caps: Caps) -> ApprovalOutlook:
        """Agree to a study and reserve its fixed list of events, in one commit.

        ``patients``: keyed hashes (32 bytes, one key a hospital, the same for every study) of the ids in the snapshot.
        Raises: ``BudgetExhausted`` 501 above a cap; ``PrivacyError`` 125 if the study is closed, withdrawn or approved
        with other contents (the same again is fine), 340 if the hashes are made by another key or column than before;
        ``DataError`` 310 without patients.
        """
        distinct = frozenset(patients)
        with self._store.transaction():
            self.require_same_ids(approval.ids)
            known = self._find(approval.study)
            if known is not None and self._is_same(known, approval, distinct):
                return self._outlook_of(known, caps)
            outlook, touching = self._look_ahead(approval, distinct, caps)
            body = approved_body(approval, distinct, touching, caps, outlook)
            entry = self._store.append(Draft(Kind.APPROVED, approval.study, 0, body))
            self._store.add_patients(entry.seq, distinct)
        return outlook

    def pin_roster(self, study: bytes, roster: bytes, unconfirmed: Iterable[bytes], now_wall: float) -> None:
        """From now on this is the study's roster, and these of its hospitals are unconfirmed. It costs nothing; twice is fine.

        Whether it follows from the one before is the caller's to check: the ledger knows hashes only. Raises ``PrivacyError``:
        123 not approved, 125 closed or withdrawn.
        """
        with self._store.transaction():
            known, keys = self.approved(study), sorted(unconfirmed)
            _require_open(known)
            if (known.approval.roster, sorted(known.approval.unconfirmed)) == (roster, keys):
                return
            body = RosterBody(roster=roster.hex(), unconfirmed=[key.hex() for key in keys], wall_s=float(now_wall))
            number = len(self._store.select("WHERE study = ? AND kind = 'ROSTER'", (study,))) + 1
            self._store.append(Draft(Kind.ROSTER, study, -number, body))

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
            self._store.append(Draft(kind, study, 0, ReasonBody(reason=reason[:200])))

    # -------------------------------------------------------------------------------------------------------- spending

    def reserve(self, study: bytes, round_number: int, attempt: int, caps: Caps, now_wall: float) -> Reservation:
        """Charge one attempt of the study's list; on disk when this returns. Only then may records be used.

        Epsilons of the reservation are upper bounds that are known at once: RDP, or that of the whole approved list.
        Raises: ``PrivacyError`` 123 not approved, 125 closed or withdrawn; ``LocalProtocolError`` 181 if this or a later
        attempt was charged before, 182 for a round the study has not; ``BudgetExhausted`` 502 beyond the list, as a whole or of
        the round's kind, 501 above a cap that was lowered since.
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
            reservation = self._charge(known, round_number, attempt, caps)
            body = reserved_body(known.approval.mechanism, round_number, caps, now_wall, reservation)
            self._store.append(Draft(Kind.RESERVED, study, attempt, body))
        return reservation

    def _charge(self, known: ApprovedStudy, round_number: int, attempt: int, caps: Caps) -> Reservation:
        after = replace(known, events=known.events + 1, charged=charged_with(known, round_number))
        account = account_of(self.studies(), {known.seq})
        others = tuple(other for other in account if other.seq != known.seq)
        before, total = spent(account), spent((*others, after))
        return Reservation(
            attempt,
            after.charged,
            known.epsilon_so_far,
            require_study_fits(after.epsilon_so_far, caps),
            price(before, caps.lifetime_delta),
            price(total, caps.lifetime_delta),
            require_lifetime_fits(total, caps, account),
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
                self._move(study, attempt, AttemptState.ABANDONED, ReasonBody(reason=reason[:200]))

    def _seal(self, study: bytes, attempt: int, sealed: Sealed) -> None:
        _require_open(self.approved(study))
        if any(len(part) != HASH_BYTES for part in (sealed.vector, sealed.pad, sealed.reply)):
            raise LocalProtocolError(900, "a sealed hash is malformed", "report this as a fault of medfed")
        before = self.sealed(study, attempt)
        if before == sealed:
            return
        if before is not None or self._store.select(_BY_PAD, (sealed.pad.hex(),)):
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


# ------------------------------------------------------------------------------------------------------------- details


def _lost(path: Path) -> PrivacyError:
    return PrivacyError(401, f"{path.name} not found", "restore it; a lost ledger is never begun anew")


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
        files.write(mark, first, private=True)
    elif files.read(mark, limit_bytes=1024) != first:
        raise PrivacyError(401, f"{path.name} is not the ledger begun here", "restore the one that was")


def _require_open(known: ApprovedStudy) -> None:
    if known.state is not StudyState.OPEN:
        raise PrivacyError(125, f"this study is {known.state.value} here", "nothing more leaves for it")
