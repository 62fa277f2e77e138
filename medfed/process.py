"""What a command asks of its own process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource


def keep_secrets() -> None:
    """Files made from now on are for their owner alone (umask 0077), and a crash writes no core file.

    For this process and all it starts; both hold until it ends. A core file would hold keys, patients' records and noise.
    The limit binds the kernel; a machine whose ``core_pattern`` pipes to a program relies on that program to heed it, as
    systemd-coredump does.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h
_LARGE_BYTES = 1 << 19


def give_large_memory_back() -> None:
    """Freed blocks of half a megabyte and more go back to the system at once, where the C library can be told so (glibc).

    For a process that moves models but does not train: otherwise each of its threads keeps some for itself, for ever.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        library.mallopt(_M_ARENA_MAX, 2)


class Collector:
    """Collects what large messages leave behind as garbage in circles, their bytes in it, before it is much."""

    def __init__(self) -> None:
        self._is_frozen = False

    def collect(self) -> None:
        """All but what was there at the first call, which stays for good: libraries are not looked through every time."""
        gc.collect()
        if not self._is_frozen:
            gc.freeze()
            self._is_frozen = True
