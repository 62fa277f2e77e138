"""What makes two records one patient's, pinned with the first study that may cost anything.

An account is keyed by hashes of patient ids. Under another key, or by another column, the same patients would be strangers
to their own account and begin a fresh one. So every approval says what its hashes were made by.
"""

from __future__ import annotations

from dataclasses import dataclass

from medfed.display import shown
from medfed.errors import PrivacyError


@dataclass(frozen=True, slots=True)
class PatientIds:
    """``key``: a commitment to the secret key of the hashes, 32 bytes; ``column``: the local name of the column of ids."""

    key: bytes
    column: str


def require_same(before: PatientIds, now: PatientIds) -> None:
    """``PrivacyError`` (MF-340) if the hashes of ``now`` cannot be compared with those made ``before``."""
    if now.key != before.key:
        raise PrivacyError(
            340,
            "patients.key is not the one of the studies in this ledger, under another all patients would be strangers",
            "restore it from backup; nothing else tells who has spent what",
        )
    if now.column != before.column:
        raise PrivacyError(
            340,
            f"patient_column is {shown(now.column)}, the studies in this ledger know patients by {shown(before.column)}",
            "set it as it was; if the table has the same ids under another name, rename that column in the table",
        )
