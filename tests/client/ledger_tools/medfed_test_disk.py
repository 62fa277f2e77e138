"""A disk that loses power: what SQLite and ``Files`` did to a folder, in order, and what a disk may hold after a cut.

*Watching.* ``Recorder`` registers an SQLite VFS of its own, by ctypes, in the library that Python's ``sqlite3`` is linked
to. It is SQLite's "unix" VFS with four functions replaced by ones that note the call and go on: xOpen, xDelete and, in the
table of each open file, xWrite, xTruncate and xSync. Which calls sync the folder is not assumed but seen, through the
"openDirectory" system call of that VFS. What medfed writes beside SQLite is noted as ``SystemFiles`` promises it.

*The model.* A file's bytes are sure once the file was synced, a name (made, removed, renamed) once its folder was synced:
a synced file whose name is not sure may be gone. Of what is not sure any subset survives, so also any order; every write is
torn at 512-byte sectors, each old or new; where a file grew and the sector is lost, it may read as zeros or as garbage.
Bytes beside a write in the same sector stay as they were ("powersafe overwrite", which SQLite takes for granted on every
disk). Not modelled: a disk that says synced and is not, rot, and the memory shared by readers of a write-ahead log
(``-shm``), which is no part of what a disk keeps.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import sqlite3
from collections.abc import Iterator, Mapping
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from medfed.seams import SystemFiles

SECTOR = 512
VFS_NAME = "medfed-power-cuts"


# --------------------------------------------------------------------------------------------------------- what happened


@dataclass(frozen=True, slots=True)
class Write:
    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    file: int


@dataclass(frozen=True, slots=True)
class Names:
    """Names that change as one: to a file's number, or None for a name that goes."""

    to: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class SyncFolder:
    pass


Event = Write | Truncate | Sync | Names | SyncFolder


# -------------------------------------------------------------------------------------------------- what a disk may hold


def _put(image: bytearray, offset: int, data: bytes) -> None:
    if len(image) < offset:
        image.extend(bytes(offset - len(image)))
    image[offset : offset + len(data)] = data


@dataclass
class _File:
    sure: bytearray = field(default_factory=bytearray)
    pending: list[Write | Truncate] = field(default_factory=list)

    def sync(self) -> None:
        for event in self.pending:
            if isinstance(event, Truncate):
                del self.sure[event.size :]
            else:
                _put(self.sure, event.offset, event.data)
        self.pending.clear()

    def after_cut(self, chance: random.Random, survival: float) -> bytes:
        image = bytearray(self.sure)
        for event in self.pending:
            if isinstance(event, Truncate):
                if chance.random() < survival:
                    del image[event.size :]
            else:
                for offset, piece in _sectors(event):
                    if chance.random() < survival:
                        _put(image, offset, piece)
                    elif offset + len(piece) > len(image) and chance.random() < 0.5:  # it grew before it was filled
                        junk = chance.randbytes(len(piece)) if chance.random() < 0.5 else bytes(len(piece))
                        old = image[offset:]
                        _put(image, offset, bytes(old) + junk[len(old) :])
        return bytes(image)


def _sectors(write: Write) -> Iterator[tuple[int, bytes]]:
    start, end = write.offset, write.offset + len(write.data)
    while start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        yield start, write.data[start - write.offset : stop - write.offset]
        start = stop


class Disk:
    """One folder, from its first contents through the events."""

    def __init__(self, first: dict[str, bytes]) -> None:
        self._files = {number: _File(bytearray(data)) for number, data in enumerate(first.values())}
        self._names: dict[str, int] = {name: number for number, name in enumerate(first)}
        self._pending: list[Names] = []

    def apply(self, event: Event) -> None:
        match event:
            case Write() | Truncate():
                self._files.setdefault(event.file, _File()).pending.append(event)
            case Sync():
                self._files.setdefault(event.file, _File()).sync()
            case Names():
                self._pending.append(event)
            case SyncFolder():
                for names in self._pending:
                    _rename(self._names, names)
                self._pending.clear()

    def contents(self) -> dict[str, bytes]:
        """The folder as the running system sees it."""
        names = dict(self._names)
        for change in self._pending:
            _rename(names, change)
        certain = random.Random(0)
        return {name: self._files.setdefault(number, _File()).after_cut(certain, 1.0) for name, number in names.items()}

    def after_cut(self, chance: random.Random) -> dict[str, bytes]:
        """One of the folders that may be found: all lost, all kept, or a random share of either kind."""
        shares = (0.0, 1.0, chance.random())
        names, of_names, of_bytes = dict(self._names), chance.choice(shares), chance.choice(shares)
        for change in self._pending:
            if chance.random() < of_names:
                _rename(names, change)
        return {
            name: self._files.setdefault(number, _File()).after_cut(chance, of_bytes) for name, number in names.items()
        }


def _rename(names: dict[str, int], change: Names) -> None:
    for name, number in change.to:
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


# ------------------------------------------------------------------------------------------------------- SQLite's tables

# names as addresses: SQLite keeps the one it passes to xOpen, a copy would be gone
_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Delete = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_SetCall = CFUNCTYPE(c_int, c_void_p, c_char_p, c_void_p)
_GetCall = CFUNCTYPE(c_void_p, c_void_p, c_char_p)
_WriteCall = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_TruncateCall = CFUNCTYPE(c_int, c_void_p, c_int64)
_SyncCall = CFUNCTYPE(c_int, c_void_p, c_int)
_OpenFolder = CFUNCTYPE(c_int, c_char_p, c_void_p)


class _Vfs(Structure):
    """``sqlite3_vfs`` version 3; functions that stay as they are stand as bare addresses."""

    _fields_ = (
        ("version", c_int),
        ("file_size", c_int),
        ("longest_path", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        ("open", c_void_p),
        ("delete", c_void_p),
        *((f"other_{number}", c_void_p) for number in range(11)),
        ("set_call", c_void_p),
        ("get_call", c_void_p),
        ("next_call", c_void_p),
    )


class _Methods(Structure):
    """``sqlite3_io_methods`` version 3."""

    _fields_ = (
        ("version", c_int),
        ("close", c_void_p),
        ("read", c_void_p),
        ("write", c_void_p),
        ("truncate", c_void_p),
        ("sync", c_void_p),
        *((f"other_{number}", c_void_p) for number in range(13)),
    )


def sqlite_library() -> ctypes.CDLL | None:
    """The library that ``sqlite3`` uses, if it is one of its own that this process has loaded."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in loaded.splitlines() if "/libsqlite3.so" in line}
    if len(paths) != 1:
        return None
    library = ctypes.CDLL(paths.pop())
    library.sqlite3_libversion.restype = c_char_p
    library.sqlite3_vfs_find.restype = POINTER(_Vfs)
    unix = library.sqlite3_vfs_find(b"unix")
    is_known = library.sqlite3_libversion().decode() == sqlite3.sqlite_version and unix and unix.contents.version >= 3
    return library if is_known else None


def _path(address: int) -> Path:
    return Path(os.fsdecode(ctypes.string_at(address)))


def _address(callback: object) -> int | None:
    return ctypes.cast(callback, c_void_p).value  # type: ignore[arg-type]


Instead = Mapping[str, tuple[str, ...]]
_AS_IT_IS: Instead = {}


class _Connection(sqlite3.Connection):
    """Executes other statements in place of some; what the last of them gives is the answer."""

    instead: Instead = _AS_IT_IS

    def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:  # type: ignore[override]
        for statement in self.instead.get(sql, ())[:-1]:
            super().execute(statement)
        return super().execute(self.instead.get(sql, (sql,))[-1], *arguments)  # type: ignore[arg-type]


class Recorder:
    """Everything that happens to ``folder``, through ``files``, while ``watching``; one at a time in a process."""

    def __init__(self, folder: Path, instead: Instead = _AS_IT_IS) -> None:
        library = sqlite_library()
        if library is None:
            raise RuntimeError("no libsqlite3 to watch")
        self.instead = instead
        self.events: list[Event] = []
        self.files = RecordedFiles(self)
        self.first = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self._numbers = {name: number for number, name in enumerate(self.first)}
        self._next = len(self._numbers)
        self._open: dict[int, int] = {}  # address of an open file's structure -> number of the file
        self._tables: dict[int, _Methods] = {}  # address of a table of unix's -> ours
        self._keep: list[object] = []  # what C holds pointers to
        self._library = library
        self._unix: _Vfs = library.sqlite3_vfs_find(b"unix").contents
        self._vfs = self._make_vfs()

    # ------------------------------------------------------------------------------------------------------ noting

    def note(self, event: Event) -> None:
        self.events.append(event)

    def made(self, path: Path) -> int:
        """A new file under this name, that nobody synced the folder for."""
        number, self._next = self._next, self._next + 1
        self._numbers[path.name] = number
        self.note(Names(((path.name, number),)))
        return number

    def renamed(self, source: Path, path: Path) -> None:
        number = self._numbers.pop(source.name)
        self._numbers[path.name] = number
        self.note(Names(((source.name, None), (path.name, number))))

    def removed(self, path: Path) -> None:
        if self._numbers.pop(path.name, None) is not None:
            self.note(Names(((path.name, None),)))

    @contextlib.contextmanager
    def watching(self) -> Iterator[Recorder]:
        name = b"openDirectory"
        get = _GetCall(self._unix.get_call)(ctypes.addressof(self._unix), name)
        original = _OpenFolder(get)

        def open_folder(path: bytes, handle: int) -> int:
            self.note(SyncFolder())  # it is opened for nothing else
            return original(path, handle)

        hook = _OpenFolder(open_folder)
        set_call = _SetCall(self._unix.set_call)
        if self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 0):
            raise RuntimeError("SQLite refused the VFS")
        set_call(ctypes.addressof(self._unix), name, _address(hook))
        try:
            yield self
        finally:
            set_call(ctypes.addressof(self._unix), name, None)
            self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))

    # ------------------------------------------------------------------------------------------------- SQLite's calls

    def _make_vfs(self) -> _Vfs:
        vfs = _Vfs.from_buffer_copy(self._unix)
        open_file, delete = _Open(self._unix.open), _Delete(self._unix.delete)

        def on_open(vfs: int, name: int | None, file: int, flags: int, out: int) -> int:
            path = _path(name) if name else None
            is_new = path is not None and not path.exists()
            code: int = open_file(vfs, name, file, flags, out)
            if code == 0 and path is not None:
                if is_new:
                    self.made(path)
                self._open[file] = self._numbers[path.name]
                slot = ctypes.cast(file, POINTER(c_void_p))
                slot[0] = ctypes.addressof(self._watched(slot[0]))
            return code

        def on_delete(vfs: int, name: int, sync_folder: int) -> int:
            self.removed(_path(name))
            return delete(vfs, name, sync_folder)

        hooks = _Open(on_open), _Delete(on_delete)
        self._keep.extend(hooks)
        vfs.name = VFS_NAME.encode()
        vfs.next = None
        vfs.open, vfs.delete = map(_address, hooks)
        return vfs

    def _watched(self, table: int) -> _Methods:
        if table in self._tables:
            return self._tables[table]
        unix = _Methods.from_address(table)
        watched = _Methods.from_buffer_copy(unix)
        write, truncate, sync = _WriteCall(unix.write), _TruncateCall(unix.truncate), _SyncCall(unix.sync)

        def on_write(file: int, data: int, size: int, offset: int) -> int:
            self.note(Write(self._open[file], offset, ctypes.string_at(data, size)))
            return write(file, data, size, offset)

        def on_truncate(file: int, size: int) -> int:
            self.note(Truncate(self._open[file], size))
            return truncate(file, size)

        def on_sync(file: int, flags: int) -> int:
            self.note(Sync(self._open[file]))  # before the call: within it a new journal's folder is synced
            return sync(file, flags)

        hooks = _WriteCall(on_write), _TruncateCall(on_truncate), _SyncCall(on_sync)
        self._keep.extend(hooks)
        watched.write, watched.truncate, watched.sync = map(_address, hooks)
        self._tables[table] = watched
        return watched


class RecordedFiles(SystemFiles):
    """``SystemFiles`` over the watched SQLite; its own writes are noted as it promises them."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def write(self, path: Path, data: object, *, private: bool = False) -> None:
        assert isinstance(data, bytes)
        note, temporary = self._recorder.note, path.with_name(f".{path.name}.tmp")
        number = self._recorder.made(temporary)
        note(Write(number, 0, data))
        note(Sync(number))
        super().write(path, data, private=private)
        self._recorder.renamed(temporary, path)
        note(SyncFolder())

    def database(self, path: Path, *, create: bool) -> sqlite3.Connection:
        if create and not path.exists():
            self._recorder.made(path)
        super().database(path, create=create).close()  # refuses and makes the file as production does
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?vfs={VFS_NAME}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
        )
        connection.instead = self._recorder.instead
        return connection
