"""``medfed-client budget`` and ``ledger``: what is spent and left, and every row, read beside a running hospital."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypedDict

from medfed.client.ledger import Caps, Entry, LedgerView
from medfed.display import shown
from medfed.errors import PrivacyError
from medfed.wording import rounded_down, rounded_up


class StudyBudget(TypedDict):
    """One study at its own delta. ``left``: of what was reserved for it, which is the most it may still cost. Of the two bounds
    on what is reserved, ``accountant`` names the smaller; ``epsilon_pld`` is null where that bound has none."""

    study: str
    study_sha256: str
    state: str
    delta: float
    epsilon_spent: float
    epsilon_reserved: float
    epsilon_rdp: float
    epsilon_pld: float | None
    accountant: str
    epsilon_left: float
    attempts_used: int
    attempts_left: int


class Account(TypedDict):
    """All studies that share patients, at the lifetime delta. ``left``: for studies to come. ``filter``: of what is reserved,
    what the privacy filter holds against the cap, true also when studies are chosen by earlier results."""

    studies: list[str]
    epsilon_spent: float
    epsilon_reserved: float
    epsilon_filter: float
    epsilon_left: float


class Budget(TypedDict):
    max_epsilon_study: float
    max_epsilon_lifetime: float
    lifetime_delta: float
    studies: list[StudyBudget]
    accounts: list[Account]


class Row(TypedDict):
    """One row of the ledger; ``body`` as it was hashed and signed."""

    row: int
    kind: str
    study: str | None
    study_sha256: str | None
    attempt: int | None
    body: object
    sha256: str


def budget(ledger: LedgerView, caps: Caps) -> Budget:
    """Spent and left, by study and by account."""
    studies: list[StudyBudget] = []
    accounts: dict[frozenset[bytes], Account] = {}
    for known in ledger.studies():
        view = ledger.account(known.approval.study, caps)
        studies.append(
            StudyBudget(
                study=known.approval.name,
                study_sha256=view.study.hex(),
                state=view.state.value,
                delta=view.delta,
                epsilon_spent=view.epsilon_spent,
                epsilon_reserved=view.epsilon_reserved,
                epsilon_rdp=view.reserved.rdp,
                epsilon_pld=view.reserved.pld,
                accountant=view.reserved.accountant,
                epsilon_left=max(0.0, view.epsilon_reserved - view.epsilon_spent),
                attempts_used=view.attempts_used,
                attempts_left=view.attempts_left,
            )
        )
        members = frozenset({view.study, *view.account})
        accounts[members] = Account(
            studies=sorted(study.hex() for study in members),
            epsilon_spent=view.lifetime_spent,
            epsilon_reserved=view.lifetime_reserved,
            epsilon_filter=view.lifetime_filter,
            epsilon_left=max(0.0, caps.max_epsilon_lifetime - view.lifetime_reserved),
        )
    return Budget(
        max_epsilon_study=caps.max_epsilon_study,
        max_epsilon_lifetime=caps.max_epsilon_lifetime,
        lifetime_delta=caps.lifetime_delta,
        studies=studies,
        accounts=list(accounts.values()),
    )


def budget_in_words(spent: Budget) -> Iterator[str]:
    """The budget as lines for a terminal."""
    yield (
        f"Caps: epsilon {spent['max_epsilon_study']:g} a study, {spent['max_epsilon_lifetime']:g} for a patient's lifetime "
        f"(delta {spent['lifetime_delta']:g})"
    )
    if not spent["studies"]:
        yield "No study was approved; nothing is spent."
    for study in spent["studies"]:
        yield (
            f"{shown(study['study'])} ({study['study_sha256'][:12]}, {study['state']}): spent "
            f"{rounded_up(study['epsilon_spent'])} of {rounded_up(study['epsilon_reserved'])} reserved (delta "
            f"{study['delta']:g}, by {study['accountant'].upper()}; by RDP {rounded_up(study['epsilon_rdp'])}), "
            f"{study['attempts_used']} attempts used, {study['attempts_left']} left"
        )
    for account in spent["accounts"]:
        names = ", ".join(study[:12] for study in account["studies"])
        yield (
            f"Patients of {names}: spent {rounded_up(account['epsilon_spent'])}, reserved "
            f"{rounded_up(account['epsilon_reserved'])}, left for other studies {rounded_down(account['epsilon_left'])}; the "
            f"privacy filter counts {rounded_up(account['epsilon_filter'])} against the cap {spent['max_epsilon_lifetime']:g}"
        )


def rows(ledger: LedgerView) -> list[Row]:
    """Every row, in order."""
    names = {known.approval.study: known.approval.name for known in ledger.studies()}
    return [_row(entry, names) for entry in ledger.entries()]


def _row(entry: Entry, names: dict[bytes, str]) -> Row:
    has_study = any(entry.study)
    return Row(
        row=entry.seq,
        kind=entry.kind.value,
        study=names.get(entry.study),
        study_sha256=entry.study.hex() if has_study else None,
        attempt=entry.attempt if entry.attempt > 0 else None,
        body=json.loads(entry.body),
        sha256=entry.hash.hex(),
    )


def row_in_words(row: Row) -> str:
    """One row as a line for a terminal."""
    parts = [f"{row['row']:6} {row['kind']:9}"]
    if row["study_sha256"] is not None:
        parts.append(f"{shown(row['study'] or '')} ({row['study_sha256'][:12]})")
    if row["attempt"] is not None:
        parts.append(f"attempt {row['attempt']}")
    body = row["body"]
    if isinstance(body, dict) and "study_micro" in body:
        parts.append(
            f"epsilon {body['study_micro'] / 1e6:.6f}, by RDP {body['study_rdp_micro'] / 1e6:.6f}, lifetime "
            f"{body['lifetime_after_micro'] / 1e6:.6f}, filter {body['filter_after_micro'] / 1e6:.6f}"
        )
    if isinstance(body, dict) and "study_after_micro" in body:
        parts.append(
            f"epsilon at most {body['study_after_micro'] / 1e6:.6f}, lifetime {body['lifetime_after_micro'] / 1e6:.6f}, "
            f"filter {body['filter_after_micro'] / 1e6:.6f}"
        )
    if isinstance(body, dict) and "reason" in body:
        parts.append(shown(str(body["reason"])))
    return " ".join(parts)


def find_study(ledger: LedgerView, wanted: str) -> bytes:
    """The approved study of this name, or whose hash begins so; MF-123 unless there is exactly one."""
    known = ledger.studies()
    found = [each for each in known if each.approval.name == wanted]
    if not found and len(wanted) >= 4:
        found = [each for each in known if each.approval.study.hex().startswith(wanted.lower())]
    if not found:
        raise PrivacyError(123, f"no approved study is called {shown(wanted)}", "medfed-client budget lists them")
    if len(found) > 1:
        raise PrivacyError(123, f"{len(found)} studies are called {shown(wanted)}", "give the beginning of the hash")
    return found[0].approval.study
