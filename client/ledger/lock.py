"""The lock of a ledger that is older than others saw it, or a second copy.

``<ledger>.behind`` holds the head that was seen and is not in it. Nothing opens that ledger for spending any more; looking
is allowed. It is no switch: what unlocks is a ledger that has the row, and only a person can bring that.
"""

from __future__ import annotations

from pathlib import Path

from medfed.client.ledger.view import LedgerView
from medfed.seams import Files
from medfed.wire import HEAD_BYTES
from medfed.witness import Head


def lock(files: Files, ledger: Path, seen: Head) -> None:
    """Keep the head that speaks against the ledger, over restarts."""
    files.write(_path(ledger), seen.to_bytes(), private=True)


def require_unlocked(files: Files, ledger: Path, view: LedgerView, public: bytes) -> None:
    """Raise ``PrivacyError`` (MF-405) if a head was seen that is not in the ledger."""
    if files.exists(_path(ledger)):
        view.check_witness(Head.from_bytes(files.read(_path(ledger), limit_bytes=HEAD_BYTES)), public)


def _path(ledger: Path) -> Path:
    return ledger.with_name(f"{ledger.name}.behind")
