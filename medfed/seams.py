"""The four seams between medfed and the machine: clock, network, file system, entropy.

Production code receives these as arguments and never calls the system directly (a test parses the sources for
it), so that a simulator can run the same code under virtual time, a faulty disk and network, and one seed.
``system_seams()`` is what the three commands pass.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
import ssl
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from medfed.errors import EnvironmentFault, MedfedError

if TYPE_CHECKING:
    import httpx


class Clock(Protocol):
    """Time."""

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC; may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def sleep(self, seconds: float, wake: threading.Event | None = None) -> None:
        """Wait, or return early once ``wake`` is set."""
        ...


class Entropy(Protocol):
    """Secret randomness."""

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        """Fresh bytes nobody else knows.

        ``purpose`` names the use ("secagg/offer", "noise"). The operating system's source ignores it; a seeded source
        keeps one stream a purpose, so that a draw added in one place does not shift all the others.
        """
        ...


Pieces = Iterable[bytes | memoryview]


class Files(Protocol):
    """The durable file system. Errors come out as ``EnvironmentFault`` with a code, never as a bare ``OSError``."""

    def read(self, path: Path, *, limit_bytes: int = 1 << 30) -> bytes: ...

    def read_private(self, path: Path, *, limit_bytes: int = 1 << 20) -> bytes:
        """Read a secret; refuse (MF-210) unless it belongs to this user and has mode 0600."""
        ...

    def write(self, path: Path, data: bytes | Pieces, *, private: bool = False) -> None:
        """Replace ``path`` atomically: temporary file, sync, rename, sync of the folder. Old or new, never mixed.

        ``data`` may come in pieces, in order: nothing is put together in memory.
        """
        ...

    def append(self, path: Path, data: bytes) -> None:
        """Append and sync."""
        ...

    def exists(self, path: Path) -> bool: ...

    def remove(self, path: Path) -> None: ...

    def make_folder(self, path: Path, *, private: bool = False) -> None:
        """Make a folder unless it is there; ``private``: it is closed to others (0700) afterwards in either case.

        A folder that many share (/tmp) is not closed but refused (MF-204).
        """
        ...

    def lock(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Hold an exclusive lock (file of mode 0600) for the length of the block; a second holder is refused (MF-620)."""
        ...

    def database(self, path: Path, *, create: bool) -> sqlite3.Connection:
        """An SQLite connection in autocommit mode. ``create`` makes a missing file (0600), else it is refused (MF-401).

        So is one with a second name (MF-204): locks and journals are found by name.
        """
        ...

    def scratch(self, folder: Path) -> Scratch:
        """A file without a name on this folder's volume, readable by nobody else, gone when it is closed."""
        ...


class Scratch(Protocol):
    """Bytes that need not last and should not lie in memory. Any thread may call."""

    def put(self, offset: int, data: bytes) -> None: ...

    def take(self, offset: int, size: int) -> bytes:
        """Exactly what was put there; MF-608 where less is."""
        ...

    def close(self) -> None: ...


class Network(Protocol):
    """Outbound HTTP."""

    def transport(self, tls: ssl.SSLContext, proxy: str | None) -> httpx.BaseTransport:
        """Connect, send and receive over TLS, through an HTTP proxy where one is named."""
        ...


@dataclass(frozen=True, slots=True)
class Seams:
    """The four seams as one argument."""

    clock: Clock
    network: Network
    files: Files
    entropy: Entropy


class SystemClock:
    """The machine's clock."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float, wake: threading.Event | None = None) -> None:
        if seconds <= 0:
            return
        if wake is None:
            time.sleep(seconds)
        else:
            wake.wait(seconds)


class SystemEntropy:
    """The operating system's cryptographic random source, asked anew for every draw: nothing to copy or fork."""

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        return secrets.token_bytes(size_bytes)


class SystemNetwork:
    """Real sockets."""

    def transport(self, tls: ssl.SSLContext, proxy: str | None) -> httpx.BaseTransport:
        import httpx

        # trust_env is left out on purpose: only the proxy named in the configuration is used
        return httpx.HTTPTransport(verify=tls, proxy=proxy, retries=0, trust_env=False)


_ERRNO_CODES = {28: (603, "the disk is full", "free some space"), 30: (602, "the volume is read-only", "remount it")}


@contextlib.contextmanager
def _named_faults(path: Path) -> Iterator[None]:
    """Turn ``OSError`` into an error with a code. The file's own name may be shown: configuration names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise EnvironmentFault(606, f"file {path.name} not found", f"check the path {path}") from error
    except PermissionError as error:
        raise EnvironmentFault(607, f"no permission for {path.name}", "check owner and mode") from error
    except OSError as error:
        code, what, remedy = _ERRNO_CODES.get(error.errno or 0, (608, "input/output error", "check the volume"))
        raise EnvironmentFault(code, f"{what} at {path.name} ({type(error).__name__})", remedy) from error


class SystemFiles:
    """The machine's disk."""

    def read(self, path: Path, *, limit_bytes: int = 1 << 30) -> bytes:
        with _named_faults(path):
            # not to block: the open of a pipe would wait for a writer, for ever
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise EnvironmentFault(204, f"{path.name} is not a regular file", "name a plain file")
            with os.fdopen(handle, "rb") as file:
                data = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise EnvironmentFault(609, f"{path.name} is larger than {limit_bytes} bytes", "name the right file")
        return data

    def read_private(self, path: Path, *, limit_bytes: int = 1 << 20) -> bytes:
        with _named_faults(path):
            status = path.stat()
        if stat.S_IMODE(status.st_mode) & 0o177 or status.st_uid != os.getuid():
            raise EnvironmentFault(210, f"key file {path.name} can be read by others", f"chmod 600 {path}")
        return self.read(path, limit_bytes=limit_bytes)

    def write(self, path: Path, data: bytes | Pieces, *, private: bool = False) -> None:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with _named_faults(path):
            try:
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
                with os.fdopen(handle, "wb") as file:
                    file.writelines((data,) if isinstance(data, bytes) else data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
                _sync_folder(path.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def append(self, path: Path, data: bytes) -> None:
        with _named_faults(path), path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def exists(self, path: Path) -> bool:
        return path.exists()

    def remove(self, path: Path) -> None:
        with _named_faults(path):
            path.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def make_folder(self, path: Path, *, private: bool = False) -> None:
        with _named_faults(path):
            path.mkdir(mode=0o700 if private else 0o755, parents=True, exist_ok=True)
            mode = path.stat().st_mode
            if private and mode & stat.S_ISVTX:
                raise EnvironmentFault(204, f"folder {path.name} is shared with others", "name a folder of your own")
            if private and mode & 0o077:
                path.chmod(0o700)

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        with _named_faults(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MedfedError(
                    620,
                    f"{path.name} is held by another process",
                    "end the medfed command that runs in this folder first (a hospital: medfed-client stop)",
                ) from error
            yield

    def scratch(self, folder: Path) -> Scratch:
        path = folder / f".scratch.{secrets.token_hex(8)}.tmp"
        with _named_faults(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            path.unlink()
        return SystemScratch(handle, folder)

    def database(self, path: Path, *, create: bool) -> sqlite3.Connection:
        _refuse_links(path)
        if not create and not path.exists():
            raise MedfedError(401, f"{path.name} not found", "restore it; a lost ledger is never begun anew")
        if create:
            with _named_faults(path):  # SQLite itself would let others read what it makes
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        except sqlite3.Error as error:
            raise EnvironmentFault(608, f"{path.name} could not be opened", "check the volume") from error


class SystemScratch:
    """A file of the system that has no name any more."""

    def __init__(self, handle: int, folder: Path) -> None:
        self._handle = handle
        self._folder = folder

    def put(self, offset: int, data: bytes) -> None:
        with _named_faults(self._folder):
            view = memoryview(data)
            while view:
                written = os.pwrite(self._handle, view, offset)
                view, offset = view[written:], offset + written

    def take(self, offset: int, size: int) -> bytes:
        with _named_faults(self._folder):
            data = os.pread(self._handle, size, offset)
        if len(data) != size:
            raise EnvironmentFault(608, f"input/output error at {self._folder.name}", "check the volume")
        return data

    def close(self) -> None:
        os.close(self._handle)


def _refuse_links(path: Path) -> None:
    """MF-204 for a symbolic link, or a file that has another name as well."""
    try:
        status = path.lstat()
    except OSError:  # not there, or not to be seen: whoever opens it says so
        return
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
        raise EnvironmentFault(
            204,
            f"{path.name} is a link, or another name links to it",
            "copy the file instead (also in backups): two names would be two hospitals writing one ledger",
        )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def system_seams() -> Seams:
    """The real machine."""
    return Seams(SystemClock(), SystemNetwork(), SystemFiles(), SystemEntropy())


def require_system_entropy(entropy: Entropy) -> None:
    """Refuse (MF-701) any other source of randomness: for the entry points of real hospitals and coordinators."""
    if type(entropy) is not SystemEntropy:
        raise MedfedError(701, "seeded randomness is not for production", "use medfed-simulate")
