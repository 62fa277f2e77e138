"""Every bit of a ledger of 100 rows: what changes a stored field is refused by ``verify``, what does not changes nothing.

Three ways, from many bits to few: the checks of one row on every byte (every bit by ``make soak``), a bit in a field of each
row through an SQL shell that puts the triggers back, and bits anywhere in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
from medfed_test_power_cuts import CAPS, IDENTITY, approval, digest

from medfed.client.ledger import Entry, Kind, Ledger
from medfed.client.ledger.chain import check_chain, check_link
from medfed.client.ledger.entries import NO_HASH
from medfed.client.ledger.store import Store, _entry
from medfed.errors import MedfedError
from medfed.seams import SystemFiles

FILES = SystemFiles()
ROWS = 100
COLUMNS = ("seq", "kind", "study", "attempt", "body", "previous", "hash", "signature")
DAMAGE = {402, 403, 404}
BITS_OF_A_NUMBER = 64  # as SQLite keeps them: two's complement

soak = pytest.mark.soak


def write(path: Path) -> None:
    """100 rows of all kinds, over three studies with patients in common."""
    with Ledger.create(FILES, path, IDENTITY) as ledger:
        for number, name in enumerate("abc"):
            ledger.approve(approval(name), [digest("patient", number + other) for other in range(3)], CAPS)
        ledger.pin_roster(digest("a"), digest("longer roster"), [IDENTITY.public], 1.0)
        for attempt in range(1, 24):
            study = digest("ab"[attempt % 2])
            ledger.reserve(study, attempt, attempt, CAPS, 0.0)
            ledger.seal_and_release(study, attempt, digest("v", attempt), digest("p", attempt), digest("r", attempt))
            if attempt % 5:
                ledger.acknowledge(study, attempt)
            else:
                ledger.abandon(study, attempt, "lost")
        ledger.reserve(digest("a"), 30, 30, CAPS, 0.0)
        ledger.close_study(digest("a"), "done")
        ledger.withdraw(digest("b"), "asked")
        assert len(ledger.entries()) == ROWS
        assert {entry.kind for entry in ledger.entries()} == set(Kind)


@pytest.fixture(scope="module")
def written(quick_folder: Path) -> Iterator[Path]:
    """The ledger's file; put back by whoever changes it."""
    with tempfile.TemporaryDirectory(dir=quick_folder) as folder:
        path = Path(folder) / "ledger.db"
        write(path)
        yield path


@pytest.fixture(scope="module")
def entries(written: Path) -> tuple[Entry, ...]:
    with Ledger.inspect(FILES, written, IDENTITY) as ledger:
        ledger.verify()
        return ledger.entries()


# ------------------------------------------------------------------------------------------------- every field, by row


Places = Callable[[int, random.Random], range | list[int]]


def every_bit(size_bits: int, chance: random.Random) -> range:
    return range(size_bits)


def one_bit_a_byte(size_bits: int, chance: random.Random) -> list[int]:
    return [start + chance.randrange(8) for start in range(0, size_bits, 8)]


def flipped(value: object, bit: int) -> object:
    """A stored value with one bit other, as the store would read it."""
    if isinstance(value, int):
        other = (value % (1 << BITS_OF_A_NUMBER)) ^ (1 << bit)
        return other - (1 << BITS_OF_A_NUMBER) if other >> (BITS_OF_A_NUMBER - 1) else other
    data = bytearray(value.encode() if isinstance(value, str) else value)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data).decode("utf-8", "replace") if isinstance(value, str) else bytes(data)


def size_bits(value: object) -> int:
    return BITS_OF_A_NUMBER if isinstance(value, int) else 8 * len(value.encode() if isinstance(value, str) else value)


def check_one(row: tuple[object, ...], number: int, previous: bytes) -> None:
    """What ``verify`` does with one row of the chain."""
    entry = _entry(row)
    check_link(entry, number, previous)
    entry.head.check(IDENTITY.public)


def as_stored(entry: Entry) -> tuple[object, ...]:
    return (entry.seq, entry.kind.value, *astuple(entry)[2:])


@pytest.mark.parametrize("places", [one_bit_a_byte, pytest.param(every_bit, marks=soak)])
def test_bit_of_any_field_of_any_row_is_refused(entries: tuple[Entry, ...], places: Places) -> None:
    chance, tried = random.Random(1), 0
    for number, entry in enumerate(entries, start=1):
        row, previous = as_stored(entry), entries[number - 2].hash if number > 1 else NO_HASH
        check_one(row, number, previous)
        for column, value in enumerate(row):
            for bit in places(size_bits(value), chance):
                changed = (*row[:column], flipped(value, bit), *row[column + 1 :])
                try:
                    check_one(changed, number, previous)
                except MedfedError as error:
                    # 110: the signature, which the store turns into "row altered"
                    assert error.code in DAMAGE or (error.code == 110 and COLUMNS[column] == "signature"), error
                else:
                    raise AssertionError(f"bit {bit} of {COLUMNS[column]} of row {number} is not noticed")
                tried += 1
    assert tried > 30_000


@contextlib.contextmanager
def in_memory(path: Path) -> Iterator[tuple[Store, sqlite3.Connection]]:
    """A copy whose rows can be changed."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as memory:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.backup(memory)
        for table in ("entries", "patients"):
            memory.execute(f"DROP TRIGGER {table}_update")
        yield Store(memory, IDENTITY), memory


@pytest.mark.parametrize("places", [one_bit_a_byte, pytest.param(every_bit, marks=soak)])
def test_bit_of_any_patient_is_refused(written: Path, entries: tuple[Entry, ...], places: Places) -> None:
    chance, tried = random.Random(2), 0
    with in_memory(written) as (store, memory):
        store._check_patients(entries)
        for rowid, *fields in memory.execute("SELECT rowid, patient, approval FROM patients").fetchall():
            for column, value in zip(("patient", "approval"), fields, strict=True):
                for bit in places(size_bits(value), chance):
                    change = f"UPDATE patients SET {column} = ? WHERE rowid = ?"
                    try:
                        memory.execute(change, (flipped(value, bit), rowid))
                    except sqlite3.IntegrityError:
                        continue  # the patient is in that other approval as well: the database holds no such row twice
                    with pytest.raises(MedfedError, match="MF-403"):
                        store._check_patients(entries)
                    memory.execute(change, (value, rowid))
                    tried += 1
        store._check_patients(entries)
    assert tried > 300


def test_bit_of_the_count_of_rows_is_refused(entries: tuple[Entry, ...]) -> None:
    check_chain(entries, ROWS)
    for bit in range(BITS_OF_A_NUMBER):
        with pytest.raises(MedfedError, match="MF-402"):
            check_chain(entries, flipped(ROWS, bit))


# ------------------------------------------------------------------------------------------------------ whole files


@contextlib.contextmanager
def put_back(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    try:
        yield data
    finally:
        clean(path, data)


def clean(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for leftover in path.parent.glob(f"{path.name}-*"):
        leftover.unlink()


def verify(path: Path) -> tuple[object, ...]:
    with Ledger.inspect(FILES, path, IDENTITY) as ledger:
        ledger.verify()
        return ledger.entries(), [ledger.patients(known.approval.study) for known in ledger.studies()]


def test_bit_flipped_in_an_sql_shell_is_refused_in_every_row(written: Path) -> None:
    """A field of each row in turn; the triggers are as before, so that only the contents can betray it."""
    chance = random.Random(3)
    with put_back(written) as data:
        for seq in range(1, ROWS + 1):
            column = COLUMNS[seq % len(COLUMNS)]
            with contextlib.closing(sqlite3.connect(written, isolation_level=None)) as shell:
                (rule,) = shell.execute("SELECT sql FROM sqlite_master WHERE name = 'entries_update'").fetchone()
                (value,) = shell.execute(f"SELECT {column} FROM entries WHERE seq = ?", (seq,)).fetchone()
                shell.execute("DROP TRIGGER entries_update")
                while True:
                    changed = flipped(value, chance.randrange(size_bits(value)))
                    with contextlib.suppress(sqlite3.IntegrityError):  # of two rows that would be one: another bit
                        shell.execute(f"UPDATE entries SET {column} = ? WHERE seq = ?", (changed, seq))
                        break
                shell.execute(rule)
            with pytest.raises(MedfedError) as caught:
                verify(written)
            assert caught.value.code in DAMAGE, (seq, column, caught.value)
            clean(written, data)
        verify(written)


@pytest.mark.parametrize("flips", [200, pytest.param(20_000, marks=soak)])
def test_bit_flipped_anywhere_in_the_file_is_refused_or_harmless(written: Path, flips: int) -> None:
    """Free space, SQLite's counters and the like do not matter; nothing else gets through."""
    chance, truth, found = random.Random(hashlib.sha256(b"flips").digest()), verify(written), 0
    with put_back(written) as data:
        for _ in range(flips):
            bit, changed = chance.randrange(len(data) * 8), bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            clean(written, changed)
            try:
                assert verify(written) == truth, bit
            except MedfedError:
                found += 1
    assert found > flips // 5
