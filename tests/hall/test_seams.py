"""The machine behind its four seams: files that are old or new, secrets nobody else reads, faults with a name."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from medfed.errors import EnvironmentFault, MedfedError
from medfed.seams import (
    SystemClock,
    SystemEntropy,
    SystemFiles,
    require_system_entropy,
    system_seams,
)

FILES = SystemFiles()


@contextlib.contextmanager
def refused(code: int, kind: type[MedfedError] = EnvironmentFault) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)


def failing(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int) -> None:
    """``owner.name`` raises the operating system's error ``number``."""

    def fail(*_arguments: object, **_named: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, fail)


# ------------------------------------------------------------------------------------------------------ atomic write


def test_file_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"one", b"", bytes(100_000)):
        FILES.write(path, data)
        assert FILES.read(path) == data
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


NAMED = [(errno.ENOSPC, 603), (errno.EROFS, 602), (errno.EIO, 608), (errno.EDQUOT, 608), (errno.EACCES, 607)]


@pytest.mark.parametrize(("number", "code"), NAMED)
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: int
) -> None:
    path = tmp_path / "file"
    FILES.write(path, b"old")
    failing(monkeypatch, os, call, number)
    with refused(code):
        FILES.write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_write_whose_rename_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    FILES.write(path, b"old")
    failing(monkeypatch, Path, "replace", errno.EIO)
    with refused(608):
        FILES.write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_write_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_sync(handle: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    FILES.write(tmp_path / "file", b"data")
    assert steps == ["file", "rename", "folder"]


def test_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        FILES.write(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_append_adds_and_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    FILES.append(path, b"one\n")
    FILES.append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    failing(monkeypatch, os, "fsync", errno.ENOSPC)
    with refused(603):
        FILES.append(path, b"three\n")


# ----------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_secret_is_never_readable_by_others(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "key"
    before = os.umask(umask)
    try:
        FILES.write(path, b"secret", private=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert FILES.read_private(path) == b"secret"


def test_secret_is_not_readable_by_others_even_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    fsync = os.fsync

    def look(handle: int) -> None:
        modes.append(os.fstat(handle).st_mode)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    FILES.write(tmp_path / "key", b"secret", private=True)
    assert [stat.S_IMODE(mode) for mode in modes if stat.S_ISREG(mode)] == [0o600]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o666, 0o777, 0o700])
def test_secret_with_another_mode_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    FILES.write(path, b"secret", private=True)
    path.chmod(mode)
    with refused(210):
        FILES.read_private(path)


def test_secret_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    FILES.write(path, b"secret", private=True)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with refused(210):
        FILES.read_private(path)


def test_read_only_secret_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "key"
    FILES.write(path, b"secret", private=True)
    path.chmod(0o400)
    assert FILES.read_private(path) == b"secret"


def test_private_folder_is_closed_to_others(tmp_path: Path) -> None:
    FILES.make_folder(tmp_path / "a" / "b", private=True)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    FILES.make_folder(tmp_path / "a" / "b", private=True)


def test_private_folder_that_was_there_is_closed_to_others(tmp_path: Path) -> None:
    for mode in (0o755, 0o777, 0o750, 0o701):
        tmp_path.chmod(mode)
        FILES.make_folder(tmp_path, private=True)
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_folder_that_many_share_is_neither_closed_nor_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with refused(204):
        FILES.make_folder(tmp_path, private=True)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_database_and_lock_are_not_readable_by_others(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with (
            FILES.lock(tmp_path / "lock"),
            contextlib.closing(FILES.database(tmp_path / "db", create=True)) as database,
        ):
            database.execute("BEGIN IMMEDIATE")
            database.execute("CREATE TABLE x (y)")
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["lock", "db", "db-journal"], 0o600)


# ---------------------------------------------------------------------------------------------------- faults by name


def test_missing_file_is_named(tmp_path: Path) -> None:
    for read in (FILES.read, FILES.read_private):
        with refused(606):
            read(tmp_path / "none")
    with refused(606):
        FILES.write(tmp_path / "none" / "file", b"")
    assert not FILES.exists(tmp_path / "none")


def test_file_over_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(11))
    assert len(FILES.read(path, limit_bytes=11)) == 11
    with refused(609):
        FILES.read(path, limit_bytes=10)
    path.chmod(0o600)
    with refused(609):
        FILES.read_private(path, limit_bytes=10)


def test_folder_is_not_read_as_a_file(tmp_path: Path) -> None:
    with refused(204):
        FILES.read(tmp_path)


def test_device_is_not_read_as_a_file() -> None:
    with refused(204):
        FILES.read(Path("/dev/zero"), limit_bytes=10)


def test_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    """A FIFO in place of a data file would hold the process for ever."""
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    with refused(204):
        FILES.read(path)
    with refused(204):
        FILES.read_private(path)


def test_removing_what_is_gone_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "file"
    FILES.write(path, b"x")
    FILES.remove(path)
    FILES.remove(path)
    assert not FILES.exists(path)


def test_message_of_a_fault_names_the_file_and_not_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_bytes(b"a line of a record")
    with pytest.raises(EnvironmentFault) as caught:
        FILES.read(path, limit_bytes=3)
    assert "patients.csv" in str(caught.value)
    assert "Example" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- lock


def test_second_holder_of_a_lock_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with FILES.lock(path), refused(620, MedfedError), FILES.lock(path):
        pytest.fail("two holders")
    with FILES.lock(path):
        pass


def test_lock_is_free_after_a_fault_inside(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(ZeroDivisionError), FILES.lock(path):
        raise ZeroDivisionError
    with FILES.lock(path):
        pass


def test_lock_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    with refused(606), FILES.lock(tmp_path / "none" / "lock"):
        pass


# ---------------------------------------------------------------------------------------------------------- database


def test_missing_database_is_never_begun_anew(tmp_path: Path) -> None:
    with refused(401, MedfedError):
        FILES.database(tmp_path / "ledger.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_database_is_opened_in_autocommit_mode(tmp_path: Path) -> None:
    with contextlib.closing(FILES.database(tmp_path / "ledger.db", create=True)) as connection:
        assert connection.isolation_level is None
        connection.execute("CREATE TABLE t (x)")
    with contextlib.closing(FILES.database(tmp_path / "ledger.db", create=False)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_database_with_a_second_name_is_refused_under_either(tmp_path: Path, link) -> None:
    """But for the own name of what a symbolic link points to."""
    first, second = tmp_path / "ledger.db", tmp_path / "second.db"
    FILES.database(first, create=True).close()
    link(first, second)
    for path in (second,) if second.is_symlink() else (first, second):
        for create in (True, False):
            with refused(204):
                FILES.database(path, create=create)
    second.unlink()
    FILES.database(first, create=False).close()


def test_symbolic_link_to_nothing_makes_no_database(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").symlink_to(tmp_path / "elsewhere.db")
    with refused(204):
        FILES.database(tmp_path / "ledger.db", create=True)
    assert not (tmp_path / "elsewhere.db").exists()


def test_database_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with refused(608):
        FILES.database(tmp_path, create=True)


# --------------------------------------------------------------------------------------------------- clock and entropy


def test_sleep_ends_when_it_is_woken() -> None:
    wake = threading.Event()
    wake.set()
    clock = SystemClock()
    started = clock.monotonic()
    clock.sleep(30.0, wake)
    clock.sleep(0.0)
    clock.sleep(-5.0)
    assert clock.monotonic() - started < 10.0


def test_entropy_has_the_size_asked_for_and_never_repeats() -> None:
    entropy = SystemEntropy()
    draws = {entropy.draw("noise", 32) for _ in range(100)}
    assert len(draws) == 100
    assert {len(draw) for draw in draws} == {32}
    assert entropy.draw("nothing", 0) == b""


def test_seeded_entropy_is_refused_in_production() -> None:
    class Seeded(SystemEntropy):
        """Even a subclass: only the operating system's source will do."""

    require_system_entropy(system_seams().entropy)
    with refused(701, MedfedError):
        require_system_entropy(Seeded())
