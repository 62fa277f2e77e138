"""The hospital's privacy ledger: debit, sync to disk, then release.

``entries`` says what a row is, ``rows`` fills it, ``chain`` says what must hold over all of them, ``store`` keeps them in
SQLite, ``ids`` says what tells patients apart, ``accounts`` does the sums, ``view`` reads, ``lock`` locks what others saw a later
copy of, and ``book`` is what the hospital calls to spend.
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
from medfed.client.ledger.book import Ledger
from medfed.client.ledger.entries import AttemptState, Entry, Kind
from medfed.client.ledger.ids import PatientIds
from medfed.client.ledger.lock import lock, require_unlocked
from medfed.client.ledger.view import LedgerView, Sealed, VerifyReport
from medfed.witness import Head

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
    "LedgerView",
    "PatientIds",
    "Reservation",
    "Sealed",
    "StudyState",
    "VerifyReport",
    "lock",
    "require_unlocked",
    "snapshot_digest",
]
