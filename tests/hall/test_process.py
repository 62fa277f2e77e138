"""Each command closes its files to others and writes no core file; seen from a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, io, json, os, resource, subprocess, sys
os.umask(0o022)
soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
{act}
child = subprocess.run(["sh", "-c", "umask; ulimit -c"], capture_output=True, text=True, check=True).stdout.split()
print(json.dumps([os.umask(0), *resource.getrlimit(resource.RLIMIT_CORE), *child]))
"""
RUN = """
from medfed.{room}.cli import main
with contextlib.redirect_stderr(io.StringIO()):
    assert main(["{argument}"]) == 2
"""


def after(act: str) -> list[int | str]:
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM.format(act=act)], capture_output=True, check=True)
    told: list[int | str] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("room", ["client", "server"])
def test_command_keeps_its_secrets_and_so_do_its_children(room: str) -> None:
    assert after(RUN.format(room=room, argument="no-such-command")) == [0o077, 0, 0, "0077", "0"]


def test_process_that_did_not_ask_keeps_no_secrets() -> None:
    """The positive control."""
    assert after("")[0] == 0o022
