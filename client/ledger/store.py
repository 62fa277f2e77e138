"""The ledger's file: SQLite, append-only, synced at every commit, chained, one writer.

What makes it hold: every commit is in ``ledger.db`` itself when it returns (rollback journal, ``synchronous=EXTRA``, both
read back at every open), so that no debit hangs on a second file; triggers that refuse UPDATE and DELETE, UNIQUE over
what may happen once, a hash chain checked at every open, and a lock file for one process.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from medfed.client.ledger.accounts import snapshot_digest
from medfed.client.ledger.chain import check_chain, check_format, check_moves, check_owner
from medfed.client.ledger.entries import (
    FORMAT,
    NO_HASH,
    ApprovedBody,
    BegunBody,
    Draft,
    Entry,
    Kind,
    altered,
    damage,
    make_entry,
)
from medfed.errors import EnvironmentFault, LocalProtocolError, MedfedError
from medfed.identity import Identity
from medfed.witness import Head

_SCHEMA = (
    """CREATE TABLE entries (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        study BLOB NOT NULL,
        attempt INTEGER NOT NULL,
        body TEXT NOT NULL,
        previous BLOB NOT NULL UNIQUE,
        hash BLOB NOT NULL UNIQUE,
        signature BLOB NOT NULL,
        UNIQUE (study, attempt, kind)
    ) STRICT""",
    "CREATE UNIQUE INDEX one_vector_a_pad ON entries (json_extract(body, '$.pad')) WHERE kind = 'SEALED'",
    "CREATE TABLE patients (patient BLOB NOT NULL, approval INTEGER NOT NULL, PRIMARY KEY (patient, approval)) STRICT",
    "CREATE INDEX patients_by_approval ON patients (approval)",
    *(
        f"CREATE TRIGGER {table}_{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for table in ("entries", "patients")
        for verb in ("UPDATE", "DELETE")
    ),
)
_COLUMNS = "seq, kind, study, attempt, body, previous, hash, signature"
_CHUNK = 500
_SYNCHRONOUS_EXTRA = 3
_HELD = 620
_RESTART = "then restart the hospital: the ledger is read anew at its start"


class Store:
    """One open ledger file. Every method raises ``MedfedError``; after a failed commit nothing more is accepted."""

    def __init__(self, connection: sqlite3.Connection, identity: Identity, *, is_reader: bool = False) -> None:
        # a damaged page may hold bytes that are no text: they must reach the hash check, not raise on the way
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        self._connection = connection
        self._identity = identity
        self._is_reader = is_reader
        self._turn = threading.RLock()
        self._failed = False

    @classmethod
    def attach(cls, connection: sqlite3.Connection, identity: Identity) -> Store:
        """Ask for the durable modes and read them back: ``EnvironmentFault`` (MF-601) where the volume has them not.

        A write-ahead log that an earlier version left is merged into the file. None is used any more: a debit would lie
        in ``ledger.db-wal`` alone, and whoever lost or did not copy that file would have an older ledger that verifies.
        EXTRA also syncs the folder once the journal is gone, or a power cut could bring it back and undo the commit.
        """
        store = cls(connection, identity)
        with _named_faults():
            journal = connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0]
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("PRAGMA fullfsync = ON")
            synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
        if journal != "delete" or synchronous != _SYNCHRONOUS_EXTRA:
            raise EnvironmentFault(
                601,
                f"this volume gives no durable ledger (journal {journal}, synchronous {synchronous})",
                "put the hospital's state on a local disk",
            )
        return store

    @classmethod
    def attach_reader(cls, connection: sqlite3.Connection, identity: Identity) -> Store:
        """For looking only, beside a hospital that writes: SQLite itself refuses every write."""
        with _named_faults():
            connection.execute("PRAGMA query_only = ON")
        return cls(connection, identity, is_reader=True)

    # ------------------------------------------------------------------------------------------------------- writing

    @property
    def is_empty(self) -> bool:
        """Whether the file holds no ledger at all, as after a crash before the first commit."""
        with _named_faults():
            count: int = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return count == 0

    def begin(self) -> None:
        """Write the schema and the first row in one commit."""
        with self.transaction():
            for statement in _SCHEMA:
                self._connection.execute(statement)
            body = BegunBody(format=FORMAT, identity=self._identity.public.hex())
            self.append(Draft(Kind.BEGUN, NO_HASH, 0, body))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Check and write as one: all of it is on disk at the end of the block, or none.

        A commit that failed may or may not have reached the disk. The file knows; this process no longer does, so it
        refuses to go on until the ledger is opened (and read) anew. Not so where another process held the file so long
        that the commit never began (MF-620): that is undone for certain.
        """
        with self._turn:
            if self._failed:
                raise EnvironmentFault(608, "the ledger could not be written before", f"check the volume, {_RESTART}")
            with _named_faults():
                self._connection.execute("BEGIN IMMEDIATE")
            try:
                with _named_faults():
                    yield
            except BaseException:
                self._roll_back()
                raise
            self._commit()

    def _commit(self) -> None:
        try:
            with _named_faults():
                self._connection.execute("COMMIT")
        except EnvironmentFault as error:
            self._failed = True
            self._roll_back()
            raise EnvironmentFault(error.code, error.what, f"{error.remedy}, {_RESTART}") from error
        except BaseException as error:
            self._failed = not (isinstance(error, MedfedError) and error.code == _HELD)
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._failed = True

    def append(self, draft: Draft) -> Entry:
        """Chain, sign and insert one row; only inside ``transaction``."""
        if not self._connection.in_transaction:
            raise LocalProtocolError(900, "ledger row outside a transaction", "report this as a fault of medfed")
        last = self.last()
        entry = make_entry(draft, last.head if last else None, self._identity)
        self._connection.execute(
            f"INSERT INTO entries ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 constant names
            (
                entry.seq,
                entry.kind.value,
                entry.study,
                entry.attempt,
                entry.body,
                entry.previous,
                entry.hash,
                entry.signature,
            ),
        )
        return entry

    def add_patients(self, approval: int, patients: Iterable[bytes]) -> None:
        """Keep the keyed hashes of one approval's patients; only inside the transaction of the approval."""
        rows = ((patient, approval) for patient in sorted(patients))
        self._connection.executemany("INSERT INTO patients (patient, approval) VALUES (?, ?)", rows)

    # ------------------------------------------------------------------------------------------------------- reading

    def last(self) -> Entry | None:
        """The row that was appended last."""
        found = self.select("ORDER BY seq DESC LIMIT 1")
        return found[0] if found else None

    def select(self, condition: str = "ORDER BY seq", values: Sequence[int | bytes | str] = ()) -> list[Entry]:
        """Rows that meet an SQL ``condition`` written in this room."""
        with self._turn, _named_faults():
            rows = self._connection.execute(f"SELECT {_COLUMNS} FROM entries {condition}", values).fetchall()  # noqa: S608
        return [_entry(row) for row in rows]

    def of_studies(self, *kinds: Kind) -> list[Entry]:
        """Rows of these kinds, which concern a study and no attempt, in order.

        They are looked up in an index: to read every row for them would make a debit cost more with each one before it.
        """
        marks = ",".join("?" * len(kinds))
        found = f"SELECT seq FROM entries WHERE attempt <= 0 AND kind IN ({marks})"  # noqa: S608 only marks
        return self.select(f"WHERE seq IN ({found}) ORDER BY seq", tuple(kind.value for kind in kinds))

    def tallies(self, study: bytes | None = None) -> dict[bytes, tuple[int, Entry]]:
        """For each study with a charge (or only ``study``): how many attempts were charged, and the row of the highest."""
        only, values = ("", ()) if study is None else ("AND study = ?", (study,))
        query = f"SELECT study, count(*), max(attempt) FROM entries WHERE kind = 'RESERVED' {only} GROUP BY study"  # noqa: S608
        with self._turn, _named_faults():
            counted = self._connection.execute(query, values).fetchall()
        of_attempt = "WHERE study = ? AND attempt = ? AND kind = 'RESERVED'"
        return {study: (count, self.select(of_attempt, (study, highest))[0]) for study, count, highest in counted}

    def latest_wall(self) -> float:
        """The latest time any row states; 0 if none does."""
        query = (
            "SELECT max(coalesce(json_extract(body, '$.wall_s'), json_extract(body, '$.approved_wall_s'))) FROM entries"
        )
        with self._turn, _named_faults():
            return float(self._connection.execute(query).fetchone()[0] or 0.0)

    def patients_of(self, approval: int) -> frozenset[bytes]:
        """Keyed hashes of one approval's patients."""
        with self._turn, _named_faults():
            rows = self._connection.execute("SELECT patient FROM patients WHERE approval = ?", (approval,)).fetchall()
        return frozenset(row[0] for row in rows)

    def approvals_touching(self, patients: Iterable[bytes]) -> frozenset[int]:
        """Rows of every approval that has one of ``patients``."""
        wanted, found = sorted(patients), set[int]()
        with self._turn, _named_faults():
            for start in range(0, len(wanted), _CHUNK):
                chunk = wanted[start : start + _CHUNK]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT DISTINCT approval FROM patients WHERE patient IN ({marks})"  # noqa: S608 only marks
                found.update(row[0] for row in self._connection.execute(query, chunk))
        return frozenset(found)

    # ------------------------------------------------------------------------------------------------------ checking

    def check(self, every_signature: bool = False) -> Head:
        """Walk the whole chain and return its head.

        The head's signature covers the chain; ``every_signature`` also checks each row's own.
        Raises ``PrivacyError``: 402 truncated or not a database, 403 a row altered, 404 the chain broken or another
        hospital's, 406 written by a newer version.
        """
        if self._is_reader:
            with self._copied() as copy:
                return copy.check(every_signature)
        with self._view():
            self._check_file()
            return self._check_rows(every_signature)

    @contextlib.contextmanager
    def _copied(self) -> Iterator[Store]:
        """The file as it is now, in memory: a reader's long walk would hold up the hospital's next debit."""
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as memory:
            with self._view(), _named_faults():
                self._connection.execute("SELECT count(*) FROM sqlite_master")  # waits for a commit under way
                self._connection.backup(memory)
            yield Store(memory, self._identity)

    @contextlib.contextmanager
    def _view(self) -> Iterator[None]:
        """Several reads of one state: no other process can append in between."""
        with self._turn:
            with _named_faults():
                self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._roll_back()

    def _check_file(self) -> None:
        """SQLite's own consistency (indexes included), and the rules of the schema still in force."""
        with _named_faults():
            if self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                raise damage(402, "ledger file is damaged or truncated")
            first = self._connection.execute("SELECT body FROM entries WHERE seq = 1").fetchone()
            query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
            rules = {row[0] for row in self._connection.execute(query)}
        if first:
            check_format(str(first[0]))
        if rules != set(_SCHEMA):
            raise damage(404, "ledger's tables or their rules were changed")

    def _check_rows(self, every_signature: bool) -> Head:
        entries = self.select()
        if not entries:
            raise damage(402, "ledger is empty")
        check_chain(entries, self._highest_ever())
        check_owner(entries[0], self._identity.public)
        for entry in entries if every_signature else entries[-1:]:
            try:
                entry.head.check(self._identity.public)
            except MedfedError as error:
                raise altered(entry.seq) from error
        check_moves(entries)
        self._check_patients(entries)
        return entries[-1].head

    def _highest_ever(self) -> int:
        """SQLite's own counter of rows ever inserted, which a deleted tail leaves behind."""
        with _named_faults():
            row = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
        return int(row[0]) if row else 0

    def _check_patients(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.kind is Kind.APPROVED:
                body = entry.read(ApprovedBody)
                patients = self.patients_of(entry.seq)
                if len(patients) != body.patients or snapshot_digest(patients).hex() != body.snapshot:
                    raise altered(entry.seq)


def _entry(row: tuple[object, ...]) -> Entry:
    seq, kind, study, attempt, body, previous, digest, signature = row
    if not (
        isinstance(seq, int)
        and isinstance(study, bytes)
        and isinstance(attempt, int)
        and isinstance(body, str)
        and isinstance(previous, bytes)
        and isinstance(digest, bytes)
        and isinstance(signature, bytes)
    ):
        raise damage(402, "ledger rows have other types")
    try:
        return Entry(seq, Kind(kind), study, attempt, body, previous, digest, signature)
    except ValueError as error:
        raise altered(seq) from error


_SQLITE_FAULTS = {
    sqlite3.SQLITE_FULL: (603, "the disk is full", "free some space"),
    sqlite3.SQLITE_READONLY: (602, "the volume is read-only", "remount it"),
    sqlite3.SQLITE_PERM: (607, "no permission for the ledger", "check owner and mode"),
    sqlite3.SQLITE_CANTOPEN: (607, "the ledger could not be opened", "check owner and mode of its folder"),
}


@contextlib.contextmanager
def _named_faults() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        _translate(error)
    except UnicodeDecodeError as error:  # SQLite's own message quoted bytes of a damaged page
        raise damage(402, "ledger file is damaged or truncated") from error


def _translate(error: sqlite3.Error) -> NoReturn:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_BUSY:
        raise MedfedError(620, "another process holds the ledger", "stop it, or wait until it is done") from error
    if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        raise damage(402, "ledger file is damaged or truncated") from error
    if code == sqlite3.SQLITE_CONSTRAINT:
        raise LocalProtocolError(181, "this attempt or pad was used before", "a new attempt needs new noise") from error
    if isinstance(error, sqlite3.DatabaseError) and "no such table" in str(error):
        raise damage(402, "ledger file is incomplete") from error
    fault = _SQLITE_FAULTS.get(code, (608, "the ledger could not be read or written", "check the volume"))
    raise EnvironmentFault(*fault) from error
