"""The ledger's row of a roster that changed under an approval that stands: it pins, and it costs nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from medfed.client.budget import row_in_words, rows
from medfed.client.ledger import Approval, Caps, Kind, Ledger, PatientIds
from medfed.client.ledger.entries import Draft, RosterBody
from medfed.errors import PrivacyError
from medfed.identity import Identity
from medfed.privacy.accounting import Mechanism
from medfed.seams import SystemFiles

IDENTITY, PEER, JOINER = (Identity.from_seed(bytes(31) + bytes([number])) for number in (1, 2, 3))
FILES = SystemFiles()
CAPS = Caps(max_epsilon_study=2.0, max_epsilon_lifetime=4.0, lifetime_delta=1e-5)
PATIENTS = [hashlib.sha256(bytes([number])).digest() for number in range(3)]
STUDY, FIRST, LATER, LATEST = (name.encode().ljust(32) for name in ("study", "first", "later", "latest"))


def approval(roster: bytes = FIRST, unconfirmed: tuple[bytes, ...] = (PEER.public,)) -> Approval:
    return Approval(
        study=STUDY,
        name="heart",
        roster=roster,
        first_model=bytes(32),
        mechanism=Mechanism(sampling_rate=1.0, sigma=12_000.0, shares=1, sensitivity=1000.0, dimensions=50),
        attempts=5,
        delta=1e-4,
        nominal_patients=100,
        unconfirmed=unconfirmed,
        approved_wall_s=1000.0,
        ids=PatientIds(bytes(32), "patient"),
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """With one study approved and one attempt charged."""
    with Ledger.create(FILES, tmp_path / "ledger.db", IDENTITY) as opened:
        opened.approve(approval(), PATIENTS, CAPS)
        opened.reserve(STUDY, 1, 1, CAPS, 2000.0)
        yield opened


def test_latest_roster_stands_and_nothing_else_changes(ledger: Ledger) -> None:
    before = ledger.account(STUDY, CAPS)
    ledger.pin_roster(STUDY, LATER, [PEER.public, JOINER.public], 3000.0)
    ledger.pin_roster(STUDY, LATEST, [JOINER.public], 4000.0)
    assert ledger.standing(STUDY) == approval(LATEST, (JOINER.public,))
    assert [known.approval.roster for known in ledger.studies()] == [LATEST]
    assert ledger.account(STUDY, CAPS) == before
    assert ledger.highest_attempt(STUDY) == 1 and ledger.highest_wall() == 4000.0
    ledger.reserve(STUDY, 2, 2, CAPS, 5000.0)
    assert ledger.verify().attempts == 2


def test_same_again_writes_nothing_in_any_order_of_keys(ledger: Ledger) -> None:
    ledger.pin_roster(STUDY, LATER, [PEER.public, JOINER.public], 3000.0)
    head = ledger.head()
    ledger.pin_roster(STUDY, LATER, [JOINER.public, PEER.public], 9000.0)
    assert ledger.head() == head


def test_row_is_shown_without_an_attempt(ledger: Ledger) -> None:
    ledger.pin_roster(STUDY, LATER, [], 3000.0)
    shown = rows(ledger)[-1]
    assert (shown["kind"], shown["attempt"], shown["study"]) == ("ROSTER", None, "heart")
    assert "-1" not in row_in_words(shown)


def test_ended_or_unknown_study_has_no_roster_to_pin(ledger: Ledger) -> None:
    with pytest.raises(PrivacyError) as caught:
        ledger.pin_roster(LATER, LATER, [], 3000.0)
    assert caught.value.code == 123
    ledger.close_study(STUDY, "done")
    with pytest.raises(PrivacyError) as caught:
        ledger.pin_roster(STUDY, LATER, [], 3000.0)
    assert caught.value.code == 125
    assert ledger.standing(STUDY) is None and ledger.standing(LATER) is None


@pytest.mark.parametrize(("study", "number"), [(STUDY, -2), (STUDY, 2), (LATER, -1)], ids=["gap", "attempt", "study"])
def test_roster_row_out_of_place_is_damage(ledger: Ledger, tmp_path: Path, study: bytes, number: int) -> None:
    """A chain that this hospital's key signed all the same: what must hold over rows is checked, too."""
    body = RosterBody(roster=LATER.hex(), unconfirmed=[], wall_s=3000.0)
    with ledger._store.transaction():
        seq = ledger._store.append(Draft(Kind.ROSTER, study, number, body)).seq
    ledger.close()
    with pytest.raises(PrivacyError, match=f"row {seq} was altered") as caught:
        Ledger.open(FILES, tmp_path / "ledger.db", IDENTITY)
    assert caught.value.code == 403
