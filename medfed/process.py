"""What a command asks of its own process before it touches a secret."""

from __future__ import annotations

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
