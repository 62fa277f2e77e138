"""The hospital's privacy ledger: debit, sync to disk, then release.

``entries`` says what a row is, ``store`` keeps rows in SQLite, ``accounts`` does the sums, ``book`` is what the
hospital calls.
"""

from medfed.client.ledger.accounts import (
    AccountView,
    Approval,
    ApprovalOutlook,
    ApprovedStudy,
    Caps,
    Reservation,
    StudyState,
    snapshot_digest,
)
from medfed.client.ledger.book import Ledger, Sealed, VerifyReport
from medfed.client.ledger.entries import AttemptState, Entry, Head, Kind

__all__ = [
    "AccountView",
    "Approval",
    "ApprovalOutlook",
    "ApprovedStudy",
    "AttemptState",
    "Caps",
    "Entry",
    "Head",
    "Kind",
    "Ledger",
    "Reservation",
    "Sealed",
    "StudyState",
    "VerifyReport",
    "snapshot_digest",
]
