"""A ledger counts attempts by kind of round: what was paid for as one kind is not spent as another (threats.md I1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from medfed.client.ledger import Approval, Caps, Ledger, PatientIds
from medfed.client.ledger.entries import Kind, ReservedBody
from medfed.errors import LocalProtocolError, MedfedError
from medfed.identity import Identity
from medfed.privacy.accounting import Mechanism, bounds, compose, epsilon, micro
from medfed.seams import SystemFiles
from medfed.study import Stage

IDENTITY = Identity.from_seed(bytes(31) + b"\1")
FILES = SystemFiles()
CAPS = Caps(max_epsilon_study=4.0, max_epsilon_lifetime=8.0, lifetime_delta=1e-5)
DELTA = 1e-4
STATISTICS = Mechanism(1.0, 30_000.0, 1, 1000.0, 5, repeats=2)
METRICS = Mechanism(1.0, 20_000.0, 1, 1000.0, 8, repeats=1)
TRAINING = Mechanism(1.0, 12_000.0, 1, 1000.0, 50, once=(STATISTICS,), aside=(METRICS,), most=3)
STAGES = (Stage("statistics", 1, 1, 2), Stage("training", 2, 3, 3), Stage("metrics", 4, 4, 1))


def approval(**changes: object) -> Approval:
    whole = Approval(
        study=hashlib.sha256(b"study").digest(),
        name="heart",
        roster=bytes(32),
        first_model=bytes(32),
        mechanism=TRAINING,
        attempts=6,
        delta=DELTA,
        nominal_patients=100,
        unconfirmed=(),
        approved_wall_s=1000.0,
        ids=PatientIds(bytes(32), "patient"),
        stages=STAGES,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


STUDY = approval().study


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(FILES, tmp_path / "ledger.db", IDENTITY) as opened:
        opened.approve(approval(), [bytes(32)], CAPS)
        yield opened


def charge(ledger: Ledger, *rounds: int) -> None:
    for number in rounds:
        attempt = ledger.highest_attempt(STUDY) + 1
        ledger.reserve(STUDY, number, attempt, CAPS, 0.0)
        ledger.abandon(STUDY, attempt, "lost")


def refused(ledger: Ledger, round_number: int, code: int) -> None:
    before = ledger.entries()
    with pytest.raises(MedfedError) as caught:
        ledger.reserve(STUDY, round_number, ledger.highest_attempt(STUDY) + 1, CAPS, 0.0)
    assert caught.value.code == code
    assert ledger.entries() == before


@pytest.mark.parametrize(
    ("made", "next_round"),
    [
        ([1, 1], 1),
        ([2, 2, 3], 3),  # a coordinator that leaves the statistics out gains no step of training
        ([1, 2, 3, 2], 2),
        ([1, 2, 3, 4], 4),
    ],
)
def test_coordinator_that_asks_more_of_a_kind_than_the_list_holds_is_refused_unspent(ledger, made, next_round):
    charge(ledger, *made)
    assert len(made) < approval().attempts
    refused(ledger, next_round, 502)
    for number in (0, -1, 5, 1000):
        refused(ledger, number, 182)


def test_rows_count_by_kind_and_the_price_is_that_of_what_was_charged(ledger):
    charge(ledger, 1, 1, 2, 3)
    rows = [entry.read(ReservedBody) for entry in ledger.entries() if entry.kind is Kind.RESERVED]
    assert [row.charged for row in rows] == [[1, 0, 0], [2, 0, 0], [2, 1, 0], [2, 2, 0]]
    # the first of any kind pays for what is beside, and for one of training
    assert rows[0].study_after_micro == rows[1].study_after_micro == rows[2].study_after_micro
    assert rows[3].study_after_micro == micro(epsilon(compose(TRAINING, 2), DELTA))
    view = ledger.account(STUDY, CAPS)
    assert (view.spent, view.reserved) == (bounds(TRAINING, 2, DELTA), bounds(TRAINING, 3, DELTA))
    assert (view.attempts_used, view.attempts_left) == (4, 2)
    charge(ledger, 3, 4)
    assert ledger.account(STUDY, CAPS).spent == bounds(TRAINING, 3, DELTA) == bounds(TRAINING, 6, DELTA)


def test_count_that_does_not_follow_from_the_rows_is_damage(ledger, tmp_path, monkeypatch):
    """Planted: a hospital whose code forgets an attempt at the statistics, signature and chain intact."""
    monkeypatch.setattr("medfed.client.ledger.book.charged_with", lambda known, number: (0, 0, 0))
    charge(ledger, 1)
    with pytest.raises(MedfedError, match="MF-403"):
        ledger.verify()


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": ()},  # all attempts of one kind, of which the mechanism pays for three
        {"stages": STAGES[:2]},
        {"stages": (STAGES[0], Stage("training", 2, 3, 4), STAGES[2]), "attempts": 7},
        {"stages": (STAGES[0], STAGES[2])},
        {"stages": (Stage("statistics", 2, 2, 2), Stage("training", 3, 4, 3), Stage("metrics", 5, 5, 1))},
        {"attempts": 7},
        {"mechanism": replace(TRAINING, aside=())},
    ],
)
def test_approval_whose_mechanism_does_not_pay_for_its_stages_is_refused(changes):
    with pytest.raises(LocalProtocolError, match="MF-900"):
        approval(**changes)


def test_attempts_that_fit_is_the_last_that_approval_accepts(ledger, tmp_path):
    plain = replace(TRAINING, once=(), aside=(), most=None)
    asked = approval(study=bytes(32), mechanism=plain, stages=(), attempts=40)
    assert ledger.attempts_that_fit(asked, [b"\1" * 32], replace(CAPS, max_epsilon_study=50.0)) == 40
    tight = replace(CAPS, max_epsilon_study=1.0)
    fits = ledger.attempts_that_fit(asked, [b"\1" * 32], tight)
    assert 1 < fits < 40
    ledger.preview(replace(asked, attempts=fits), [b"\1" * 32], tight)
    with pytest.raises(MedfedError, match="MF-501"):
        ledger.preview(replace(asked, attempts=fits + 1), [b"\1" * 32], tight)
    assert ledger.outlook(asked, [b"\1" * 32], tight).epsilon_study > 1.0
