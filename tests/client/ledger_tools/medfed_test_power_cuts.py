"""A hospital spends over a watched disk, and the power fails at any point: what is promised must be there."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from medfed_test_disk import Disk, Event, Instead, Recorder

from medfed.client.ledger import Approval, Caps, Entry, Ledger, PatientIds
from medfed.errors import MedfedError
from medfed.identity import Identity
from medfed.privacy.accounting import Mechanism
from medfed.seams import SystemFiles

IDENTITY = Identity.from_seed(bytes(31) + b"\5")
IDS = PatientIds(bytes(32), "patient")
CAPS = Caps(max_epsilon_study=100.0, max_epsilon_lifetime=100.0, lifetime_delta=1e-5)
MECHANISM = Mechanism(sampling_rate=1.0, sigma=1e6, shares=1, sensitivity=1000.0, dimensions=10)
LEDGER = "ledger.db"
JOURNAL, WRITE_AHEAD_LOG = f"{LEDGER}-journal", f"{LEDGER}-wal"

SMALL_CACHE: Instead = {"PRAGMA fullfsync = ON": ("PRAGMA cache_size = 4",)}
"""An approval of many patients: SQLite writes pages before the commit."""


def in_place_of_extra(synchronous: str) -> Instead:
    """The store believes that it got EXTRA."""
    return {
        "PRAGMA synchronous = EXTRA": (f"PRAGMA synchronous = {synchronous}",),
        "PRAGMA synchronous": ("SELECT 3",),
    }


def write_ahead(synchronous: str) -> Instead:
    """The store believes that it got a rollback journal."""
    return {
        "PRAGMA journal_mode = DELETE": ("PRAGMA journal_mode = WAL", "SELECT 'delete'"),
        **in_place_of_extra(synchronous),
    }


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def approval(name: str) -> Approval:
    return Approval(digest(name), name, bytes(32), bytes(32), MECHANISM, 50, 1e-5, 100, (), 0.0, IDS)


# ------------------------------------------------------------------------------------------------------------- spending


@dataclass
class Spending:
    """What was written, and what was promised when: (events so far, the ledger's rows), in order."""

    first: dict[str, bytes]
    events: list[Event]
    promises: list[tuple[int, tuple[Entry, ...]]] = field(default_factory=list)

    def expected(self, cut: int) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """Rows promised before the cut, and those with the one operation that was under way."""
        rows = [()] + [promised for mark, promised in self.promises if mark <= cut]
        later = [promised for mark, promised in self.promises if mark > cut]
        return rows[-1], (later or rows[-1:])[0]


def spend(folder: Path, instead: Instead) -> Spending:
    """Every operation of a ledger, a restart in the middle; two studies, one of enough patients for several pages."""
    recorder, path = Recorder(folder, instead), folder / LEDGER
    done = Spending(recorder.first, recorder.events)
    with recorder.watching():
        for steps in (_first_day, _second_day):
            opening = Ledger.create if steps is _first_day else Ledger.open
            with opening(recorder.files, path, IDENTITY) as ledger:
                done.promises.append((len(done.events), ledger.entries()))
                for _ in steps(ledger):
                    done.promises.append((len(done.events), ledger.entries()))
    return done


def _first_day(ledger: Ledger) -> Iterator[None]:
    study = digest("a")
    ledger.approve(approval("a"), [digest("patient", number) for number in range(120)], CAPS)
    yield
    for attempt in (1, 2, 3):
        yield from _attempt(ledger, study, attempt)
        yield ledger.acknowledge(study, attempt)
    yield from _attempt(ledger, study, 4)


def _second_day(ledger: Ledger) -> Iterator[None]:
    study, other = digest("a"), digest("b")
    yield ledger.abandon(study, 4, "interrupted")
    ledger.approve(approval("b"), [digest("patient", number) for number in range(100, 160)], CAPS)
    yield
    yield from _attempt(ledger, other, 1)
    yield ledger.withdraw(other, "asked")
    for attempt in (5, 7):
        yield from _attempt(ledger, study, attempt)
    yield ledger.close_study(study, "done")


def _attempt(ledger: Ledger, study: bytes, attempt: int) -> Iterator[None]:
    ledger.reserve(study, attempt, attempt, CAPS, 0.0)
    yield
    ledger.seal_and_release(study, attempt, digest("v", attempt), digest("p", study, attempt), digest("r", attempt))
    yield


# ------------------------------------------------------------------------------------------------------------ power cuts


@dataclass
class Found:
    """Cuts after which a promise was not kept, by how: rows ``lost``, a ledger ``refused`` (and why), or one that opens
    and holds other rows than were written (``silent``). ``mid_commit``: cuts that left a journal or a write-ahead log."""

    cuts: int = 0
    mid_commit: int = 0
    lost: int = 0
    refused: list[str] = field(default_factory=list)
    silent: int = 0

    def check(self) -> None:
        assert (self.lost, self.refused, self.silent) == (0, [], 0), self


def cut(done: Spending, folder: Path, count: int, seed: int, lost: str | None = None) -> Found:
    """``count`` power cuts, each at a random event with a random choice of what survives; after one in five, another
    cut while the ledger is opened again. ``lost``: a file that is gone on top of it."""
    chance, found, disk, position = random.Random(seed), Found(), Disk(done.first), 0
    for number, at in enumerate(sorted(chance.randrange(len(done.events) + 1) for _ in range(count))):
        for event in done.events[position:at]:
            disk.apply(event)
        position = at
        contents = disk.after_cut(chance)
        contents.pop(lost or "", None)
        before, after = done.expected(at)
        found.cuts += 1
        found.mid_commit += JOURNAL in contents or WRITE_AHEAD_LOG in contents
        if number % 5 == 0:
            contents = _cut_while_opening(contents, folder / f"{number}-once", chance)
        _judge(folder / f"{number}", contents, (before, after), found)
    return found


def _cut_while_opening(contents: dict[str, bytes], folder: Path, chance: random.Random) -> dict[str, bytes]:
    with _laid_out(contents, folder):
        recorder = Recorder(folder)
        with recorder.watching(), contextlib.suppress(MedfedError):
            Ledger.open(recorder.files, folder / LEDGER, IDENTITY).close()
    disk = Disk(recorder.first)
    for event in recorder.events[: chance.randrange(len(recorder.events) + 1)]:
        disk.apply(event)
    return disk.after_cut(chance)


def _judge(
    folder: Path, contents: dict[str, bytes], expected: tuple[tuple[Entry, ...], tuple[Entry, ...]], found: Found
) -> None:
    before, after = expected
    with _laid_out(contents, folder):
        try:
            with _open(folder / LEDGER, is_begun=bool(before)) as ledger:
                rows = ledger.entries()
        except MedfedError as error:
            found.refused.append(str(error))
            return
    if rows not in (before, after):
        is_older = rows == before[: len(rows)]
        found.lost += is_older
        found.silent += not is_older


def _open(path: Path, is_begun: bool) -> Ledger:
    """Before ``create`` returned it may have come to nothing; then it must be possible to say it again."""
    try:
        return Ledger.open(SystemFiles(), path, IDENTITY)
    except MedfedError as error:
        if is_begun or error.code not in {401, 402}:
            raise
    return Ledger.create(SystemFiles(), path, IDENTITY)


@contextlib.contextmanager
def _laid_out(contents: dict[str, bytes], folder: Path) -> Iterator[None]:
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    try:
        yield
    finally:
        shutil.rmtree(folder)
