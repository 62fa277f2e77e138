"""The power fails: unsynced writes are dropped, reordered and torn, and no debit that was promised is lost.

How a disk is simulated, and what is not, says ``ledger_tools/medfed_test_disk.py``. Beside the store's way (rollback
journal, synchronous=EXTRA) the same cuts befall other ways, of which all but one lose debits: else the cuts prove nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from medfed_test_disk import Disk, Instead, Names, Sync, SyncFolder, Write, sqlite_library
from medfed_test_power_cuts import (
    JOURNAL,
    LEDGER,
    SMALL_CACHE,
    WRITE_AHEAD_LOG,
    Found,
    Spending,
    cut,
    in_place_of_extra,
    spend,
    write_ahead,
)

pytestmark = pytest.mark.skipif(
    sqlite_library() is None, reason="Python's sqlite3 has no libsqlite3 of its own that a VFS could be registered in"
)

AS_IT_IS: Instead = {}
CONTROLS = 100


@pytest.fixture
def spend_on(quick_folder: Path) -> Iterator[Callable[[Instead], tuple[Spending, Path]]]:
    """Spend in a folder of its own; and a folder for what is found after the cuts."""
    folders: list[Path] = []

    def spend_once(instead: Instead) -> tuple[Spending, Path]:
        folder = Path(tempfile.mkdtemp(dir=quick_folder))
        folders.append(folder)
        (folder / "spent").mkdir()
        (folder / "found").mkdir()
        return spend(folder / "spent", instead), folder / "found"

    yield spend_once
    for folder in folders:
        shutil.rmtree(folder)


SpendOn = Callable[[Instead], tuple[Spending, Path]]


@pytest.mark.parametrize("cuts", [250, pytest.param(5000, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "instead", [AS_IT_IS, SMALL_CACHE], ids=["one page a write", "pages written before the commit"]
)
def test_power_cut_loses_no_debit_and_breaks_no_chain(spend_on: SpendOn, instead: Instead, cuts: int) -> None:
    found = cut(*spend_on(instead), cuts, seed=1)
    found.check()
    assert found.cuts == cuts and found.mid_commit > cuts // 2


def lose(spend_on: SpendOn, instead: Instead, lost: str | None = None) -> Found:
    return cut(*spend_on(instead), CONTROLS, seed=2, lost=lost)


@pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
def test_rollback_journal_synced_less_than_extra_loses_debits(spend_on: SpendOn, synchronous: str) -> None:
    """After the commit the journal is gone but its folder is not synced: it comes back and undoes the debit."""
    assert lose(spend_on, in_place_of_extra(synchronous)).lost > CONTROLS // 10


def test_rollback_journal_never_synced_damages_the_ledger(spend_on: SpendOn) -> None:
    assert len(lose(spend_on, in_place_of_extra("OFF")).refused) > CONTROLS // 10


def test_write_ahead_log_synced_normal_loses_debits(spend_on: SpendOn) -> None:
    assert lose(spend_on, write_ahead("NORMAL")).lost > CONTROLS // 10


def test_write_ahead_log_synced_full_loses_no_debit_while_its_file_is_kept(spend_on: SpendOn) -> None:
    """As good as EXTRA in a power cut; what speaks against it is the second file, see the next test."""
    lose(spend_on, write_ahead("FULL")).check()


def test_write_ahead_log_that_is_lost_loses_debits(spend_on: SpendOn) -> None:
    assert lose(spend_on, write_ahead("FULL"), WRITE_AHEAD_LOG).lost > CONTROLS // 10


def test_write_ahead_log_whose_name_is_not_synced_loses_debits(spend_on: SpendOn) -> None:
    """The positive control of the model of names: SQLite syncs the folder of a new log, here it does not."""
    spending, folder = spend_on(write_ahead("FULL"))
    within_sync = [
        isinstance(event, SyncFolder) and isinstance(before, Sync)
        for before, event in zip([None, *spending.events], spending.events, strict=False)
    ]
    spending.events = [
        Names(()) if dropped else event for event, dropped in zip(spending.events, within_sync, strict=True)
    ]
    assert cut(spending, folder, CONTROLS, seed=2).lost > CONTROLS // 10


def test_torn_commit_without_its_journal_is_refused_or_whole(spend_on: SpendOn) -> None:
    """No promise covers a journal that somebody deletes; but what is half written never opens as something else."""
    found = lose(spend_on, AS_IT_IS, JOURNAL)
    assert found.refused and (found.lost, found.silent) == (0, 0)


@pytest.mark.parametrize("instead", [AS_IT_IS, SMALL_CACHE, write_ahead("FULL")])
def test_watched_events_make_the_folder_as_it_is(spend_on: SpendOn, instead: Instead) -> None:
    """The recorder misses nothing: its events, replayed, are the files byte for byte."""
    spending, found = spend_on(instead)
    disk = Disk(spending.first)
    for event in spending.events:
        disk.apply(event)
    folder = found.parent / "spent"
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}
    assert disk.contents() == there
    assert {LEDGER, f"{LEDGER}.begun"} == set(there)
    assert sum(isinstance(event, Write) for event in spending.events) > 200
