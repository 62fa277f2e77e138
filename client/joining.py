"""A study that is approved here and whose roster changed since: hospitals joined, or more of its peers were confirmed.

No new budget, no new snapshot of patients: one row in the ledger pins the roster from now on. It may only have grown at its
end, and as at approval no more of it may be unconfirmed than the study allows for colluders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from medfed.client.approval import (
    ROSTER_NAME,
    approved_beginning,
    checked_roster,
    require_not_expired,
    unconfirmed_peers,
)
from medfed.client.ledger import Ledger
from medfed.client.site import Site
from medfed.display import shown
from medfed.roster import Enrolment, Roster
from medfed.study import Study, load_study
from medfed.wording import counted


@dataclass(frozen=True, slots=True)
class RosterReview:
    """``joined``: hospitals of ``roster`` that are not in the one approved before; ``confirmed``: those newly confirmed."""

    study: Study
    roster: Roster
    joined: tuple[Enrolment, ...]
    confirmed: tuple[Enrolment, ...]
    unconfirmed: tuple[Enrolment, ...]


class Peer(TypedDict):
    hospital: str
    fingerprint: str
    declared_patients: int
    confirmed: bool


class RosterCard(TypedDict):
    """What the decision rests on: who joins, whom the people here confirmed besides, how many they did not."""

    study: str
    study_sha256: str
    hospitals: int
    most_hospitals: int
    colluders: int
    joined: list[Peer]
    confirmed: list[str]
    unconfirmed: list[str]


def review_roster(site: Site, study_path: Path, peer_paths: Sequence[Path], ledger: Ledger) -> RosterReview | None:
    """What changed in the roster of a study that is approved here; None where nothing did, or it is not approved.

    Raises, with nothing written: as ``approval.review`` of a roster, MF-125 for one that does not begin with the approved one.
    """
    study = load_study(site.seams.files, study_path)
    standing = ledger.standing(study.hash())
    if standing is None:
        return None
    require_not_expired(site, study)
    roster = checked_roster(site, study, study_path.parent / ROSTER_NAME)
    joined = tuple(roster.hospitals[len(approved_beginning(study, roster, standing)) :])
    unconfirmed = unconfirmed_peers(site, study, roster, peer_paths, standing)
    confirmed = tuple(
        entry for entry in roster.hospitals if entry.public in standing.unconfirmed and entry not in unconfirmed
    )
    return RosterReview(study, roster, joined, confirmed, unconfirmed) if joined or confirmed else None


def approve_roster(site: Site, reviewed: RosterReview, ledger: Ledger) -> None:
    """Pin it: the file into this hospital's folder, then the ledger row."""
    study, files = reviewed.study.hash(), site.seams.files
    files.write(site.study_folder(study) / ROSTER_NAME, reviewed.roster.to_bytes())
    unconfirmed = [entry.public for entry in reviewed.unconfirmed]
    ledger.pin_roster(study, reviewed.roster.hash(), unconfirmed, site.seams.clock.wall())


def card(reviewed: RosterReview) -> RosterCard:
    """Gather what ``in_words`` tells."""
    study = reviewed.study
    return RosterCard(
        study=study.study.name,
        study_sha256=study.hash().hex(),
        hospitals=len(reviewed.roster.hospitals),
        most_hospitals=study.cohort.most_hospitals,
        colluders=study.cohort.colluders,
        joined=[
            Peer(
                hospital=entry.hospital,
                fingerprint=entry.fingerprint,
                declared_patients=entry.nominal_patients,
                confirmed=entry not in reviewed.unconfirmed,
            )
            for entry in reviewed.joined
        ],
        confirmed=[entry.hospital for entry in reviewed.confirmed],
        unconfirmed=[entry.hospital for entry in reviewed.unconfirmed],
    )


def in_words(asked: RosterCard) -> Iterator[str]:
    """The card as lines for a terminal."""
    yield f"Study {shown(asked['study'])} ({asked['study_sha256'][:12]}) is approved here. Its cost stays what it is."
    if asked["joined"]:
        total = counted(asked["hospitals"], "hospital")
        yield f"{counted(len(asked['joined']), 'hospital')} more, {total} then, at most {asked['most_hospitals']} in a sum:"
    for entry in asked["joined"]:
        mark = "confirmed" if entry["confirmed"] else "UNCONFIRMED"
        yield f"  {mark:13} {shown(entry['hospital'])}, {entry['declared_patients']} patients declared"
        yield f"  {'':13} {entry['fingerprint']}"
    if asked["confirmed"]:
        yield f"Confirmed from now on: {', '.join(map(shown, asked['confirmed']))}"
    names = f" ({', '.join(map(shown, asked['unconfirmed']))})" if asked["unconfirmed"] else ""
    yield f"Unconfirmed: {len(asked['unconfirmed'])}{names}; the study allows for {asked['colluders']} colluders."
