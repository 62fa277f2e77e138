"""kill -9 of a spending hospital, in any phase: no debit is lost, none is doubled, the ledger opens and verifies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("ledger_crash_child.py")


def run_cycles(folder: Path, cycles: int) -> dict[str, object]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(CHILD), str(folder), str(cycles)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def check(report: dict[str, object], cycles: int) -> None:
    assert report["faults"] == []
    assert report["cycles"] == cycles
    assert isinstance(report["events"], int) and report["events"] >= cycles // 2  # the children did spend


@pytest.fixture
def folder(quick_folder: Path) -> Iterator[Path]:
    """In memory where possible: what a killed process wrote stays, synced or not. Power cuts are another test."""
    with tempfile.TemporaryDirectory(dir=quick_folder) as name:
        yield Path(name)


@pytest.mark.parametrize("cycles", [50, pytest.param(1000, marks=pytest.mark.soak)])
def test_killed_hospital_loses_and_doubles_no_debit(folder: Path, cycles: int) -> None:
    check(run_cycles(folder, cycles), cycles)
