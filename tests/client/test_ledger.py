"""The ledger: nothing leaves undebited, nothing spent comes back, nothing is changed unnoticed (threats.md I1-I4)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medfed.client.ledger import (
    Approval,
    AttemptState,
    Caps,
    Entry,
    Head,
    Kind,
    Ledger,
    PatientIds,
    StudyState,
    lock,
    snapshot_digest,
)
from medfed.client.ledger import book as ledger_book
from medfed.client.ledger import entries as ledger_entries
from medfed.client.ledger import store as ledger_store
from medfed.client.ledger import view as ledger_view
from medfed.client.ledger.entries import MOVES, BegunBody, Draft, make_entry
from medfed.errors import ExitStatus, MedfedError
from medfed.identity import Identity
from medfed.privacy.accounting import Mechanism, bounds, compose, epsilon, micro
from medfed.privacy.filter import conversion, filter_epsilon, filter_order
from medfed.seams import SystemFiles
from medfed.witness import signed_bytes

IDENTITY = Identity.from_seed(bytes(31) + b"\1")
OTHER = Identity.from_seed(bytes(31) + b"\2")
FILES = SystemFiles()
CAPS = Caps(max_epsilon_study=2.0, max_epsilon_lifetime=4.0, lifetime_delta=1e-5)
NOISE = Mechanism(sampling_rate=1.0, sigma=12_000.0, shares=1, sensitivity=1000.0, dimensions=50)
DELTA = 1e-4
IDS = PatientIds(bytes(32), "patient")


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def people(*numbers: int) -> list[bytes]:
    return [digest("patient", number) for number in numbers]


def approval(name: str = "heart", attempts: int = 5, mechanism: Mechanism = NOISE) -> Approval:
    return Approval(
        study=digest("study", name),
        name=name,
        roster=digest("roster"),
        first_model=digest("model"),
        mechanism=mechanism,
        attempts=attempts,
        delta=DELTA,
        nominal_patients=100,
        unconfirmed=(OTHER.public,),
        approved_wall_s=1000.0,
        ids=IDS,
    )


HEART = approval().study


def path_in(folder: Path) -> Path:
    return folder / "ledger.db"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(FILES, path_in(tmp_path), IDENTITY) as opened:
        yield opened


@pytest.fixture
def approved(ledger: Ledger) -> Ledger:
    ledger.approve(approval(), people(1, 2, 3), CAPS)
    return ledger


def reserve(ledger: Ledger, attempt: int, study: bytes = HEART, caps: Caps = CAPS) -> None:
    ledger.reserve(study, attempt, attempt, caps, 2000.0 + attempt)


def send(ledger: Ledger, attempt: int, study: bytes = HEART) -> None:
    reserve(ledger, attempt, study)
    ledger.seal_and_release(study, attempt, digest("v", attempt), digest("p", study, attempt), digest("r", attempt))


@contextlib.contextmanager
def refused(code: int, ledger: Ledger | None = None) -> Iterator[pytest.ExceptionInfo[MedfedError]]:
    """The block raises ``code`` in one line, and the ledger is as before."""
    before = ledger.entries() if ledger else ()
    with pytest.raises(MedfedError) as caught:
        yield caught
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    if ledger:
        assert ledger.entries() == before
        assert ledger.verify().entries == len(before)


# ------------------------------------------------------------------------------------------------------------ beginning


def test_new_ledger_names_its_owner_and_opens_again(tmp_path: Path) -> None:
    with Ledger.create(FILES, path_in(tmp_path), IDENTITY) as ledger:
        head = ledger.head()
    with Ledger.open(FILES, path_in(tmp_path), IDENTITY) as ledger:
        assert ledger.head() == head
        assert ledger.entries()[0].read(BegunBody).identity == IDENTITY.public.hex()
        head.check(IDENTITY.public)


def test_ledger_is_begun_once(tmp_path: Path) -> None:
    Ledger.create(FILES, path_in(tmp_path), IDENTITY).close()
    with refused(212):
        Ledger.create(FILES, path_in(tmp_path), IDENTITY)


def test_lost_ledger_is_never_begun_anew(tmp_path: Path) -> None:
    Ledger.create(FILES, path_in(tmp_path), IDENTITY).close()
    path_in(tmp_path).unlink()
    with refused(401):
        Ledger.open(FILES, path_in(tmp_path), IDENTITY)
    with refused(401):
        Ledger.create(FILES, path_in(tmp_path), IDENTITY)
    path_in(tmp_path).write_bytes(b"")
    with refused(401):
        Ledger.create(FILES, path_in(tmp_path), IDENTITY)
    with refused(402):
        Ledger.open(FILES, path_in(tmp_path), IDENTITY)


def test_fresh_ledger_in_place_of_the_old_one_is_refused(tmp_path: Path) -> None:
    Ledger.create(FILES, path_in(tmp_path), IDENTITY).close()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    Ledger.create(FILES, path_in(fresh), OTHER).close()
    shutil.copy(path_in(fresh), path_in(tmp_path))
    with refused(404):
        Ledger.open(FILES, path_in(tmp_path), IDENTITY)
    with refused(401):
        Ledger.open(FILES, path_in(tmp_path), OTHER)


def test_creation_that_was_cut_off_can_be_repeated(tmp_path: Path) -> None:
    FILES.database(path_in(tmp_path), create=True).close()
    path_in(tmp_path).touch()
    Ledger.create(FILES, path_in(tmp_path), IDENTITY).close()
    (tmp_path / "ledger.db.begun").unlink()  # as if killed between the first commit and the mark
    Ledger.open(FILES, path_in(tmp_path), IDENTITY).close()
    assert (tmp_path / "ledger.db.begun").exists()


# ------------------------------------------------------------------------------------------------------------ approving


def test_approval_reserves_the_whole_list_of_events(ledger: Ledger) -> None:
    outlook = ledger.approve(approval(attempts=5), people(1, 2, 3), CAPS)
    assert outlook.study == bounds(NOISE, 5, DELTA)
    assert outlook.epsilon_study == outlook.study.pld < outlook.study.rdp == epsilon(compose(NOISE, 5), DELTA)
    assert outlook.lifetime_before == 0.0
    assert outlook.lifetime_after == epsilon(compose(NOISE, 5), CAPS.lifetime_delta)
    account = ledger.account(HEART, CAPS)
    assert (account.epsilon_spent, account.epsilon_reserved) == (0.0, outlook.epsilon_study)
    assert (account.lifetime_spent, account.lifetime_reserved) == (0.0, outlook.lifetime_after)
    filtered = filter_epsilon(compose(NOISE, 5), CAPS.max_epsilon_lifetime, CAPS.lifetime_delta)
    assert account.lifetime_filter == outlook.filter_after == filtered >= outlook.lifetime_after
    row = ledger.entries()[-1].read(ledger_entries.ApprovedBody)
    assert (row.study_micro, row.study_rdp_micro) == (micro(outlook.study.pld), micro(outlook.study.rdp))
    assert (row.study_pld_micro, row.filter_after_micro) == (row.study_micro, micro(filtered))
    assert (account.attempts_used, account.attempts_left) == (0, 5)
    known = ledger.approved(HEART)
    assert known.approval == approval()
    assert known.snapshot == snapshot_digest(people(3, 2, 1, 1))
    assert ledger.patients(HEART) == frozenset(people(1, 2, 3))


def test_preview_says_the_same_and_writes_nothing(ledger: Ledger) -> None:
    before = ledger.entries()
    outlook = ledger.preview(approval(), people(1), CAPS)
    assert ledger.entries() == before
    assert ledger.approve(approval(), people(1), CAPS) == outlook


def test_same_approval_again_costs_nothing(approved: Ledger) -> None:
    before = approved.entries()
    later = replace(approval(), approved_wall_s=5000.0)
    tight = replace(CAPS, max_epsilon_lifetime=epsilon(compose(NOISE, 5), CAPS.lifetime_delta) + 1e-5)
    assert approved.preview(later, people(3, 2, 1), tight) == approved.approve(later, people(3, 2, 1), tight)
    assert approved.entries() == before


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (replace(approval(), attempts=6), "the number of attempts"),
        (replace(approval(), unconfirmed=()), "the confirmed peers"),
    ],
)
def test_same_study_with_other_contents_is_refused_by_what_differs(
    approved: Ledger, other: Approval, what: str
) -> None:
    with refused(125, approved) as caught:
        approved.approve(other, people(1, 2, 3), CAPS)
    assert f"and now other: {what}: " in str(caught.value)
    with refused(125, approved) as caught:
        approved.approve(approval(), people(1, 2), CAPS)
    assert "and now other: the patients in the data: " in str(caught.value)
    with refused(125, approved):
        approved.preview(other, people(1, 2, 3), CAPS)


@pytest.mark.parametrize("end", [Ledger.close_study, Ledger.withdraw])
def test_ended_study_is_neither_approved_again_nor_spent(
    approved: Ledger, end: Callable[[Ledger, bytes, str], None]
) -> None:
    reserve(approved, 1)
    end(approved, HEART, "asked by a person")
    end(approved, HEART, "asked by a person")
    assert sum(entry.kind in {Kind.CLOSED, Kind.WITHDRAWN} for entry in approved.entries()) == 1
    with refused(125, approved):
        approved.approve(approval(), people(1, 2, 3), CAPS)
    with refused(125, approved):
        reserve(approved, 2)
    with refused(125, approved):
        approved.seal(HEART, 1, digest("v"), digest("p"), digest("r"))
    approved.abandon(HEART, 1, "study ended")
    account = approved.account(HEART, CAPS)
    assert account.state is not StudyState.OPEN
    assert (account.attempts_used, account.attempts_left) == (1, 0)
    assert account.lifetime_spent == account.lifetime_reserved > 0


def test_nothing_leaves_after_a_withdrawal(approved: Ledger) -> None:
    send(approved, 1)
    approved.release(HEART, 1)
    approved.withdraw(HEART, "data protection officer")
    with refused(125, approved):
        approved.release(HEART, 1)


def test_approval_without_patients_is_refused(ledger: Ledger) -> None:
    with refused(310, ledger):
        ledger.approve(approval(), [], CAPS)


def test_study_above_the_cap_spends_nothing(ledger: Ledger) -> None:
    cost = bounds(NOISE, 5, DELTA).epsilon
    with refused(501, ledger):
        ledger.approve(approval(), people(1), replace(CAPS, max_epsilon_study=cost - 2e-6))
    with pytest.raises(MedfedError) as caught:
        ledger.approve(approval(), people(1), replace(CAPS, max_epsilon_study=0.5))
    assert caught.value.exit_status is ExitStatus.BUDGET
    assert "max_epsilon_study" in str(caught.value) and "0.5" in str(caught.value)
    ledger.approve(approval(), people(1), replace(CAPS, max_epsilon_study=cost + 2e-6))


def test_lifetime_above_the_cap_spends_nothing(ledger: Ledger) -> None:
    one = epsilon(compose(NOISE, 5), CAPS.lifetime_delta)
    two = epsilon(compose(NOISE, 10), CAPS.lifetime_delta)
    second, exact = approval("lung"), replace(CAPS, max_epsilon_study=two, max_epsilon_lifetime=two + 1e-5)
    ledger.approve(approval(), people(1, 2, 3), exact)
    with refused(501, ledger):
        ledger.approve(second, people(3, 4), replace(exact, max_epsilon_lifetime=two - 1e-5))
    outlook = ledger.approve(second, people(3, 4), exact)
    assert (outlook.lifetime_before, outlook.lifetime_after) == (one, two)
    assert outlook.account == (HEART,)


def test_mechanism_without_bound_is_refused(ledger: Ledger) -> None:
    nothing = Mechanism(sampling_rate=1.0, sigma=0.5, shares=1, sensitivity=2.0**60, dimensions=10)
    with refused(501, ledger):
        ledger.approve(approval(mechanism=nothing), people(1), CAPS)


# ------------------------------------------------------------------------------------------------------------- accounts


def test_same_patients_under_another_name_share_the_account(approved: Ledger) -> None:
    send(approved, 1)
    outlook = approved.approve(approval("renamed"), people(1, 2, 3), CAPS)
    assert outlook.account == (HEART,)
    assert outlook.lifetime_before == epsilon(compose(NOISE, 5), CAPS.lifetime_delta)


def test_one_shared_patient_links_accounts_and_their_neighbors(ledger: Ledger) -> None:
    roomy = replace(CAPS, max_epsilon_lifetime=50.0)
    ledger.approve(approval("a"), people(1, 2), roomy)
    ledger.approve(approval("b"), people(3, 4), roomy)
    assert ledger.account(approval("a").study, roomy).account == ()
    outlook = ledger.approve(approval("c"), people(2, 3), roomy)
    assert set(outlook.account) == {approval("a").study, approval("b").study}
    everything = epsilon(compose(NOISE, 15), CAPS.lifetime_delta)
    for name in "abc":
        assert ledger.account(approval(name).study, roomy).lifetime_reserved == everything


def test_disjoint_patients_do_not_share(approved: Ledger) -> None:
    send(approved, 1)
    outlook = approved.approve(approval("lung"), people(4, 5), CAPS)
    assert outlook.account == ()
    assert outlook.lifetime_before == 0.0
    assert approved.account(approval("lung").study, CAPS).lifetime_spent == 0.0


def test_many_patients_are_matched_across_chunks(ledger: Ledger) -> None:
    ledger.approve(approval("a"), people(*range(1200)), CAPS)
    assert ledger.preview(approval("b"), people(*range(1199, 2400)), CAPS).account == (approval("a").study,)
    assert ledger.preview(approval("b"), people(*range(1200, 2400)), CAPS).account == ()


def test_closing_frees_what_was_not_used_and_nothing_more(approved: Ledger) -> None:
    send(approved, 1)
    send(approved, 2)
    approved.close_study(HEART, "done")
    after = approved.account(HEART, CAPS)
    assert after.lifetime_spent == after.lifetime_reserved == epsilon(compose(NOISE, 2), CAPS.lifetime_delta)
    outlook = approved.preview(approval("lung"), people(1), CAPS)
    assert outlook.lifetime_after == epsilon(compose(NOISE, 7), CAPS.lifetime_delta)


def test_study_that_ended_unused_is_on_no_account(approved: Ledger) -> None:
    approved.withdraw(HEART, "asked")
    assert approved.approve(approval("lung"), people(1), CAPS).account == ()
    send(approved, 1, approval("lung").study)
    approved.close_study(approval("lung").study, "done")
    outlook = approved.approve(approval("skin"), people(1), CAPS)
    assert outlook.account == (approval("lung").study,)
    assert outlook.apart == 0


def test_studies_without_a_common_patient_are_counted(approved: Ledger) -> None:
    assert approved.preview(approval(), people(1, 2, 3), CAPS).apart == 0
    approved.approve(approval("lung"), people(4), CAPS)
    assert approved.preview(approval("lung"), people(4), CAPS).apart == 1
    assert approved.preview(approval("skin"), people(5), CAPS).apart == 2
    outlook = approved.preview(approval("skin"), people(3, 5), CAPS)
    assert (outlook.account, outlook.apart) == ((HEART,), 1)


OTHER_IDS = {"key": replace(IDS, key=digest("another key")), "column": replace(IDS, column="stay")}


@pytest.mark.parametrize("changed", OTHER_IDS)
def test_patients_told_apart_by_another_key_or_column_are_refused(approved: Ledger, changed: str) -> None:
    """They would be strangers to their own account. A study that ended unused binds nobody."""
    for ask in (approved.preview, approved.approve):
        for name in ("heart", "lung"):
            with refused(340, approved) as caught:
                ask(replace(approval(name), ids=OTHER_IDS[changed]), people(7), CAPS)
    assert {"key": "patients.key", "column": "patients by patient"}[changed] in str(caught.value)
    approved.withdraw(HEART, "asked")
    approved.approve(replace(approval("lung"), ids=OTHER_IDS[changed]), people(7), CAPS)
    with refused(340, approved):
        approved.require_same_ids(IDS)


def test_study_that_cost_something_binds_ids_after_its_end(approved: Ledger) -> None:
    reserve(approved, 1)
    approved.withdraw(HEART, "asked")
    for other in OTHER_IDS.values():
        with refused(340, approved):
            approved.approve(replace(approval("lung"), ids=other), people(7), CAPS)


def by_filters(total: NDArray[np.float64], now: Caps, *begun: Caps) -> float:
    """The largest figure of filters whose orders are those of ``begun``, each at the smaller delta."""
    orders = [filter_order(each.max_epsilon_lifetime, each.lifetime_delta) for each in begun]
    deltas = [min(each.lifetime_delta, now.lifetime_delta) for each in begun]
    return max(float(total[order] + conversion(delta)[order]) for order, delta in zip(orders, deltas, strict=True))


EDITS = {
    "cap up": {"max_epsilon_lifetime": 40.0},
    "delta up": {"lifetime_delta": 1e-2},
    "both up": {"max_epsilon_lifetime": 40.0, "lifetime_delta": 1e-2},
    "delta down": {"lifetime_delta": 1e-6, "max_epsilon_lifetime": 40.0},
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_caps_never_make_the_same_spending_count_less(approved: Ledger, edit: str) -> None:
    """The filter's order is that of the caps before anything was spent: picked afterwards, it would be no filter."""
    before, held = approved.reserve(HEART, 1, 1, CAPS, 0.0), approved.account(HEART, CAPS)
    now = replace(CAPS, **EDITS[edit])
    after = approved.account(HEART, now).lifetime_filter
    assert after == pytest.approx(by_filters(compose(NOISE, 5), now, CAPS), rel=1e-8)
    assert after > held.lifetime_filter if edit == "delta down" else after == held.lifetime_filter
    lung = approved.approve(approval("lung"), people(3), now)
    assert lung.filter_after == pytest.approx(by_filters(compose(NOISE, 10), now, CAPS), rel=1e-8)
    assert approved.reserve(HEART, 2, 2, now, 0.0).filter_after > before.filter_after


def test_accounts_that_grow_together_keep_every_order(approved: Ledger) -> None:
    other = replace(CAPS, max_epsilon_lifetime=40.0, lifetime_delta=1e-3)
    approved.approve(approval("lung"), people(4), other)
    outlook = approved.approve(approval("skin"), people(3, 4), other)
    together, alone = by_filters(compose(NOISE, 15), other, CAPS, other), by_filters(compose(NOISE, 5), other, other)
    assert outlook.filter_after == pytest.approx(together, rel=1e-8)
    assert approved.preview(approval("bone"), people(9), other).filter_after == pytest.approx(alone, rel=1e-8)


# ------------------------------------------------------------------------------------------------------------- spending


def test_every_attempt_costs_one_event(approved: Ledger) -> None:
    before = 0.0
    for attempt in range(1, 6):
        reservation = approved.reserve(HEART, 1, attempt, CAPS, 0.0)
        # at once: RDP, or what the whole list costs by the smaller bound; never less than the exact figure
        listed = micro(bounds(NOISE, 5, DELTA).epsilon) / 1e6
        assert reservation.epsilon_after == min(epsilon(compose(NOISE, attempt), DELTA), listed)
        assert reservation.epsilon_after >= bounds(NOISE, attempt, DELTA).epsilon
        assert reservation.epsilon_before == (before if attempt > 1 else 0.0)
        before = reservation.epsilon_after
        body = approved.entries()[-1].read(ledger_entries.ReservedBody)
        assert body.study_after_micro == micro(reservation.epsilon_after) >= reservation.epsilon_after * 1e6
        approved.abandon(HEART, attempt, "lost")
    with refused(502, approved):
        reserve(approved, 6)
    assert approved.account(HEART, CAPS).spent == bounds(NOISE, 5, DELTA)


def test_attempt_numbers_only_rise(approved: Ledger) -> None:
    reserve(approved, 3)
    for attempt in (3, 2, 1, 0, -1):
        with refused(181, approved):
            reserve(approved, attempt)
    assert approved.highest_attempt(HEART) == 3
    assert approved.account(HEART, CAPS).attempts_left == 2


def test_unapproved_study_is_refused(ledger: Ledger) -> None:
    with refused(123, ledger):
        reserve(ledger, 1)
    with refused(123, ledger):
        ledger.seal(HEART, 1, digest("v"), digest("p"), digest("r"))
    assert ledger.attempt_status(HEART, 1) is None


def test_cap_lowered_after_approval_stops_the_study(approved: Ledger) -> None:
    reserve(approved, 1)
    two = epsilon(compose(NOISE, 2), DELTA)
    with refused(501, approved):
        reserve(approved, 2, caps=replace(CAPS, max_epsilon_study=two - 1e-5))
    with refused(501, approved):
        reserve(approved, 2, caps=replace(CAPS, max_epsilon_lifetime=two - 1e-5))
    reserve(approved, 2)


def test_refused_round_number_spends_nothing(approved: Ledger) -> None:
    with refused(182, approved):
        approved.reserve(HEART, 0, 1, CAPS, 0.0)


ACTIONS: dict[AttemptState, Callable[[Ledger], object]] = {
    AttemptState.RESERVED: lambda ledger: reserve(ledger, 1),
    AttemptState.SEALED: lambda ledger: ledger.seal(HEART, 1, digest("v"), digest("p"), digest("r")),
    AttemptState.RELEASED: lambda ledger: ledger.release(HEART, 1),
    AttemptState.ACKED: lambda ledger: ledger.acknowledge(HEART, 1),
    AttemptState.ABANDONED: lambda ledger: ledger.abandon(HEART, 1, "lost"),
}
ROADS: dict[AttemptState | None, list[AttemptState]] = {
    None: [],
    AttemptState.RESERVED: [AttemptState.RESERVED],
    AttemptState.SEALED: [AttemptState.RESERVED, AttemptState.SEALED],
    AttemptState.RELEASED: [AttemptState.RESERVED, AttemptState.SEALED, AttemptState.RELEASED],
    AttemptState.ACKED: [AttemptState.RESERVED, AttemptState.SEALED, AttemptState.RELEASED, AttemptState.ACKED],
    AttemptState.ABANDONED: [AttemptState.RESERVED, AttemptState.ABANDONED],
}


@pytest.mark.parametrize("state", list(ROADS))
@pytest.mark.parametrize("action", list(ACTIONS))
def test_attempt_moves_by_the_table_only(approved: Ledger, state: AttemptState | None, action: AttemptState) -> None:
    for step in ROADS[state]:
        ACTIONS[step](approved)
    assert approved.attempt_status(HEART, 1) is state
    if action in MOVES[state]:
        ACTIONS[action](approved)
        assert approved.attempt_status(HEART, 1) is action
    elif action in ROADS[state] and action is not AttemptState.RESERVED:  # the same again is free and writes nothing
        before = approved.entries()
        if action is AttemptState.SEALED or action is state or state is AttemptState.ACKED:
            ACTIONS[action](approved)
        assert approved.entries() == before
    else:
        with refused(181 if action is AttemptState.RESERVED else 182, approved):
            ACTIONS[action](approved)


def test_one_bit_other_costs(approved: Ledger) -> None:
    reserve(approved, 1)
    approved.seal(HEART, 1, digest("v"), digest("p"), digest("r"))
    for vector, pad, reply in [("w", "p", "r"), ("v", "q", "r"), ("v", "p", "s")]:
        with refused(183, approved):
            approved.seal(HEART, 1, digest(vector), digest(pad), digest(reply))
    sealed = approved.sealed(HEART, 1)
    assert sealed is not None and sealed.reply == digest("r")
    assert approved.sealed(HEART, 2) is None


def test_pad_covers_one_vector_over_attempts_and_studies(approved: Ledger) -> None:
    approved.approve(approval("lung"), people(9), CAPS)
    reserve(approved, 1)
    approved.seal(HEART, 1, digest("v"), digest("p"), digest("r"))
    reserve(approved, 2)
    reserve(approved, 1, approval("lung").study)
    with refused(183, approved):
        approved.seal(HEART, 2, digest("v"), digest("p"), digest("r"))
    with refused(183, approved):
        approved.seal_and_release(approval("lung").study, 1, digest("v"), digest("p"), digest("r"))


def test_seal_and_release_is_one_commit(approved: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve(approved, 1)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "_release", broken)
    with pytest.raises(KeyboardInterrupt):
        approved.seal_and_release(HEART, 1, digest("v"), digest("p"), digest("r"))
    assert approved.attempt_status(HEART, 1) is AttemptState.RESERVED


def test_latest_time_is_kept_when_the_clock_goes_back(approved: Ledger) -> None:
    assert approved.highest_wall() == 1000.0
    approved.reserve(HEART, 1, 1, CAPS, 9000.0)
    approved.reserve(HEART, 2, 2, CAPS, 50.0)
    assert approved.highest_wall() == 9000.0


# ---------------------------------------------------------------------------------------------- one process, sure disks


def test_second_process_is_refused(tmp_path: Path) -> None:
    with Ledger.create(FILES, path_in(tmp_path), IDENTITY), refused(620):
        Ledger.open(FILES, path_in(tmp_path), IDENTITY)
    Ledger.open(FILES, path_in(tmp_path), IDENTITY).close()


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("is_held", [True, False])
def test_ledger_with_a_second_name_is_refused(
    tmp_path: Path, link: Callable[[Path, Path], None], is_held: bool
) -> None:
    """The lock lies beside a name: under two of them two hospitals would write one ledger."""
    second = tmp_path / "second" / "ledger.db"
    second.parent.mkdir()
    with Ledger.create(FILES, path_in(tmp_path), IDENTITY) as ledger:
        link(path_in(tmp_path), second)
        if not is_held:
            ledger.close()
        for way in (Ledger.open, Ledger.create, Ledger.inspect):
            with refused(204):
                way(FILES, second, IDENTITY)
    second.unlink()
    Ledger.open(FILES, path_in(tmp_path), IDENTITY).close()


def test_ledger_can_be_looked_at_beside_a_running_hospital(tmp_path: Path) -> None:
    with Ledger.create(FILES, path_in(tmp_path), IDENTITY) as writer:
        writer.approve(approval(), people(1), CAPS)
        with Ledger.inspect(FILES, path_in(tmp_path), IDENTITY) as view:
            send(writer, 1)
            assert view.account(HEART, CAPS).attempts_used == 1
            assert view.verify().head == writer.head()
            with pytest.raises(MedfedError), view._store.transaction():  # SQLite refuses what the type does not offer
                view._store._connection.execute("INSERT INTO patients VALUES (x'00', 1)")


def only_the_file(path: Path, to: Path) -> Path:
    """``ledger.db`` as somebody copies it who knows nothing of SQLite."""
    to.mkdir()
    shutil.copy(path, to / path.name)
    return to / path.name


def test_debit_is_in_the_ledgers_own_file_when_it_returns(tmp_path: Path) -> None:
    """Copied alone while the hospital runs, as after kill -9 and the loss of every file beside it."""
    with Ledger.create(FILES, path_in(tmp_path), IDENTITY) as ledger:
        ledger.approve(approval(), people(1), CAPS)
        for attempt in range(1, 6):
            reserve(ledger, attempt)
            copy = only_the_file(path_in(tmp_path), tmp_path / f"copy-{attempt}")
            with Ledger.open(FILES, copy, IDENTITY) as alone:
                assert alone.account(HEART, CAPS).attempts_used == attempt
                assert alone.verify().head == ledger.head()
        assert {path.name for path in tmp_path.glob("ledger.db*")} == {"ledger.db", "ledger.db.begun", "ledger.db.lock"}


def write_ahead(path: Path) -> None:
    """Turn to the write-ahead log of earlier versions."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)


def killed_with_a_write_ahead_log(folder: Path) -> Path:
    """What an earlier version left when it was killed: two debits in ``ledger.db-wal``, none of them in ``ledger.db``."""
    old, path = folder / "old" / "ledger.db", folder / "killed" / "ledger.db"
    old.parent.mkdir()
    with Ledger.create(FILES, old, IDENTITY) as ledger:
        ledger.approve(approval(), people(1), CAPS)
    write_ahead(old)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(ledger_store.sqlite3.connect(old))).execute("SELECT 1")
        database = stack.enter_context(contextlib.closing(FILES.database(old, create=False)))
        store = ledger_store.Store(database, IDENTITY)
        ledger = Ledger(store, contextlib.ExitStack())
        reserve(ledger, 1)
        reserve(ledger, 2)
        shutil.copytree(old.parent, path.parent)
    return path


def test_write_ahead_log_of_an_earlier_version_is_merged_at_open(tmp_path: Path) -> None:
    path = killed_with_a_write_ahead_log(tmp_path)
    log = path.with_name("ledger.db-wal")
    assert log.stat().st_size
    with Ledger.inspect(FILES, path, IDENTITY) as view:
        assert view.account(HEART, CAPS).attempts_used == 2
    with Ledger.open(FILES, path, IDENTITY) as ledger:
        reserve(ledger, 3)
        assert not log.exists()
        with Ledger.open(FILES, only_the_file(path, tmp_path / "alone"), IDENTITY) as alone:
            assert alone.account(HEART, CAPS).attempts_used == 3


def test_write_ahead_log_alone_would_lose_debits(tmp_path: Path) -> None:
    """The positive control: what the merge prevents."""
    path = killed_with_a_write_ahead_log(tmp_path)
    with Ledger.open(FILES, only_the_file(path, tmp_path / "alone"), IDENTITY) as alone:
        assert alone.account(HEART, CAPS).attempts_used == 0


def test_reader_that_checks_holds_up_no_debit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long walk is over a copy: in its middle the hospital commits at once, though it would wait for nobody."""
    with Ledger.create(FILES, path_in(tmp_path), IDENTITY) as writer:
        writer.approve(approval(), people(1), CAPS)
        writer._store._connection.execute("PRAGMA busy_timeout = 0")
        walk, attempts = ledger_store.check_chain, iter(range(1, 5))

        def interrupted(*arguments: object) -> None:
            walk(*arguments)
            send(writer, next(attempts))

        monkeypatch.setattr(ledger_store, "check_chain", interrupted)
        with Ledger.inspect(FILES, path_in(tmp_path), IDENTITY) as view:
            assert view.account(HEART, CAPS).attempts_used == 1
            view.verify()
            assert view.account(HEART, CAPS).attempts_used == 2


def test_debit_that_another_process_holds_up_is_undone_and_comes_through_later(tmp_path: Path) -> None:
    with Ledger.create(FILES, path_in(tmp_path), IDENTITY) as ledger:
        ledger.approve(approval(), people(1), CAPS)
        ledger._store._connection.execute("PRAGMA busy_timeout = 0")
        with contextlib.closing(sqlite3.connect(path_in(tmp_path), isolation_level=None)) as shell:
            shell.execute("BEGIN")
            shell.execute("SELECT * FROM entries").fetchall()
            with refused(620, ledger):
                reserve(ledger, 1)
        reserve(ledger, 1)
        assert ledger.account(HEART, CAPS).attempts_used == 1


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_ledgers_files_are_their_owners_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with Ledger.create(FILES, path_in(tmp_path), IDENTITY):
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["ledger.db", "ledger.db.begun", "ledger.db.lock"], 0o600)


class Database(sqlite3.Connection):
    """A connection whose volume misbehaves: statements that begin with a key of ``faults`` do otherwise."""

    faults: ClassVar[dict[str, Callable[[Database, str], sqlite3.Cursor]]] = {}

    def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:  # type: ignore[override]
        for start, fault in self.faults.items():
            if sql.startswith(start):
                return fault(self, sql)
        return super().execute(sql, *arguments)  # type: ignore[arg-type]


class FaultyFiles(SystemFiles):
    def database(self, path: Path, *, create: bool) -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=Database)


@pytest.fixture
def faults() -> Iterator[dict[str, Callable[[Database, str], sqlite3.Cursor]]]:
    Database.faults = {}
    yield Database.faults
    Database.faults = {}


@pytest.mark.parametrize(
    ("statement", "instead"),
    [
        ("PRAGMA synchronous = EXTRA", "PRAGMA synchronous = FULL"),
        ("PRAGMA journal_mode", "PRAGMA journal_mode = MEMORY"),
    ],
)
def test_volume_without_durable_modes_is_refused(
    tmp_path: Path, faults: dict[str, Callable[[Database, str], sqlite3.Cursor]], statement: str, instead: str
) -> None:
    faults[statement] = lambda database, _: sqlite3.Connection.execute(database, instead)
    with refused(601):
        Ledger.create(FaultyFiles(), path_in(tmp_path), IDENTITY)


def _raise(code: int) -> Callable[[Database, str], sqlite3.Cursor]:
    def fault(_: Database, __: str) -> sqlite3.Cursor:
        error = sqlite3.OperationalError("planted")
        error.sqlite_errorcode = code  # type: ignore[misc]
        raise error

    return fault


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_FULL, 603),
        (sqlite3.SQLITE_READONLY, 602),
        (sqlite3.SQLITE_IOERR, 608),
        (sqlite3.SQLITE_BUSY, 620),
    ],
)
@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "INSERT INTO entries", "COMMIT"])
def test_write_that_fails_leaves_no_row_and_the_ledger_whole(
    tmp_path: Path,
    faults: dict[str, Callable[[Database, str], sqlite3.Cursor]],
    statement: str,
    code: int,
    expected: int,
) -> None:
    with Ledger.create(FaultyFiles(), path_in(tmp_path), IDENTITY) as ledger:
        ledger.approve(approval(), people(1), CAPS)
        faults[statement] = _raise(code)
        with refused(expected, ledger) as first:
            reserve(ledger, 1)
        faults.clear()
        must_stop = statement == "COMMIT" and expected != 620
        assert ("restart the hospital" in str(first.value)) is must_stop
        if must_stop:  # it is not known what reached the disk: this process must not go on
            with refused(608, ledger) as later:
                reserve(ledger, 1)
            assert "restart the hospital" in str(later.value)
        else:
            reserve(ledger, 1)
    with Ledger.open(FILES, path_in(tmp_path), IDENTITY) as ledger:
        assert ledger.account(HEART, CAPS).attempts_used == (0 if must_stop else 1)


# ------------------------------------------------------------------------------------------------------------ tampering


def spent_ledger(folder: Path) -> Path:
    with Ledger.create(FILES, path_in(folder), IDENTITY) as ledger:
        ledger.approve(approval(), people(1, 2, 3), CAPS)
        for attempt in (1, 2):
            send(ledger, attempt)
            ledger.acknowledge(HEART, attempt)
    return path_in(folder)


def tamper(path: Path, *statements: str, keep_triggers: bool = True) -> None:
    """What an insider with an SQLite shell does: take the triggers off, change rows, put them back."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        triggers = database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            database.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            database.execute(statement)
        for _, sql in triggers if keep_triggers else []:
            with contextlib.suppress(sqlite3.OperationalError):  # its table was dropped
                database.execute(sql)


def test_tampering_tool_alone_does_no_harm(tmp_path: Path) -> None:
    path = spent_ledger(tmp_path)
    tamper(path)
    Ledger.open(FILES, path, IDENTITY).close()


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("UPDATE entries SET body = replace(body, '\"round\":2', '\"round\":1') WHERE kind = 'RESERVED'", 403),
        ("UPDATE entries SET attempt = 4 WHERE seq = 7", 403),
        ("UPDATE entries SET kind = 'ABANDONED' WHERE kind = 'ACKED'", 403),
        ("UPDATE entries SET kind = 'REFUNDED' WHERE kind = 'ACKED'", 403),
        ("UPDATE entries SET signature = zeroblob(64) WHERE seq = (SELECT max(seq) FROM entries)", 403),
        ("UPDATE entries SET previous = zeroblob(31) WHERE seq = 4", 404),
        ("DELETE FROM entries WHERE seq = 5", 404),
        ("DELETE FROM entries WHERE seq = 1", 404),
        ("DELETE FROM entries WHERE seq > 6", 402),
        ("DELETE FROM entries", 402),
        ("DELETE FROM patients WHERE patient = (SELECT min(patient) FROM patients)", 403),
        ("UPDATE patients SET patient = zeroblob(32) WHERE patient = (SELECT min(patient) FROM patients)", 403),
        ("INSERT INTO patients VALUES (zeroblob(32), 2)", 403),
        ("DROP INDEX one_vector_a_pad", 404),
        ("DROP TABLE patients", 404),
        ("DROP TABLE entries", 402),
        ("CREATE TRIGGER forget AFTER INSERT ON entries BEGIN SELECT 1; END", 404),
    ],
)
def test_changed_ledger_is_refused_at_open(tmp_path: Path, statement: str, code: int) -> None:
    path = spent_ledger(tmp_path)
    tamper(path, statement)
    with refused(code):
        Ledger.open(FILES, path, IDENTITY)
    with refused(code):
        Ledger.inspect(FILES, path, IDENTITY)


def test_ledger_without_its_triggers_is_refused(tmp_path: Path) -> None:
    path = spent_ledger(tmp_path)
    tamper(path, keep_triggers=False)
    with refused(404):
        Ledger.open(FILES, path, IDENTITY)


@pytest.mark.parametrize("statement", ["UPDATE entries SET body = '{}'", "DELETE FROM entries", "DELETE FROM patients"])
def test_database_itself_refuses_update_and_delete(tmp_path: Path, statement: str) -> None:
    path = spent_ledger(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as database, pytest.raises(sqlite3.IntegrityError, match="append"):
        database.execute(statement)


def test_row_chained_by_another_identity_is_refused(tmp_path: Path) -> None:
    path = spent_ledger(tmp_path)
    with Ledger.open(FILES, path, IDENTITY) as ledger:
        last = ledger.head()
    forged = make_entry(Draft(Kind.CLOSED, HEART, 0, ledger_entries.ReasonBody(reason="forged")), last, OTHER)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (forged.seq, "CLOSED", forged.study, 0, forged.body, forged.previous, forged.hash, forged.signature),
        )
    with refused(403):
        Ledger.open(FILES, path, IDENTITY)


def test_earlier_signature_is_checked_by_verify(tmp_path: Path) -> None:
    path = spent_ledger(tmp_path)
    tamper(path, "UPDATE entries SET signature = zeroblob(64) WHERE seq = 3")
    with Ledger.open(FILES, path, IDENTITY) as ledger, refused(403):
        ledger.verify()


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = spent_ledger(tmp_path)
    data = path.read_bytes()
    for size in (1, 100, 4096, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        for way in (Ledger.open, Ledger.inspect):
            with refused(402):
                way(FILES, path, IDENTITY)


@pytest.mark.parametrize("written", [ledger_store.FORMAT - 1, ledger_store.FORMAT + 1])
def test_ledger_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    monkeypatch.setattr(ledger_store, "FORMAT", written)
    spent_ledger(tmp_path)
    monkeypatch.undo()
    tamper(path_in(tmp_path), "ALTER TABLE patients ADD COLUMN more TEXT")
    with refused(406):
        Ledger.open(FILES, path_in(tmp_path), IDENTITY)


def test_witness_notices_an_old_copy_and_a_second_one(tmp_path: Path) -> None:
    path = spent_ledger(tmp_path)
    old = path.read_bytes()
    with Ledger.open(FILES, path, IDENTITY) as ledger:
        ledger.check_witness(ledger.head(), IDENTITY.public)
        send(ledger, 3)
        witness = ledger.head()
        send(ledger, 4)
        ledger.check_witness(witness, IDENTITY.public)
    path.write_bytes(old)
    with Ledger.open(FILES, path, IDENTITY) as ledger:
        with refused(405, ledger):
            ledger.check_witness(witness, IDENTITY.public)
        reserve(ledger, 5)
        ledger.abandon(HEART, 5, "lost")
        ledger.abandon(HEART, 5, "lost")
        ledger.withdraw(HEART, "")
        with refused(405, ledger):
            ledger.check_witness(witness, IDENTITY.public)


@pytest.mark.parametrize("seq", [1 << 32, 1 << 63, (1 << 64) - 1])
def test_witness_of_any_number_is_a_later_one(approved: Ledger, tmp_path: Path, seq: int) -> None:
    """Also beyond what SQLite takes for a number: signed by a hospital's stolen key, it locks and breaks nothing."""
    row = digest("row")
    seen = Head(seq, row, IDENTITY.sign(signed_bytes(seq, row)))
    with refused(405, approved):
        approved.check_witness(seen, IDENTITY.public)
    approved.close()
    lock(FILES, path_in(tmp_path), seen)
    with refused(405):
        Ledger.open(FILES, path_in(tmp_path), IDENTITY)


def test_lying_witness_cannot_lock_the_hospital(approved: Ledger) -> None:
    with refused(110, approved):
        approved.check_witness(Head(99, digest("x"), bytes(64)), IDENTITY.public)
    with refused(110, approved):
        approved.check_witness(replace(approved.head(), seq=99), IDENTITY.public)


# ----------------------------------------------------------------------------------------------- spending never falls

Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["approve", "reserve", "seal", "release", "ack", "abandon", "close", "withdraw", "reopen"]),
        st.integers(0, 2),
        st.integers(1, 4),
    ),
    max_size=14,
)


WALK_CAPS = replace(CAPS, max_epsilon_lifetime=0.9)  # room for two studies of three attempts, not for three


def take(ledger: Ledger, step: Step) -> None:
    action, number, attempt = step
    name, study = f"s{number}", approval(f"s{number}").study
    if action == "approve":
        ledger.approve(approval(name, attempts=3), people(number, number + 1), WALK_CAPS)
    elif action == "reserve":
        reserve(ledger, attempt, study, WALK_CAPS)
    elif action == "seal":
        ledger.seal(study, attempt, digest("v", study, attempt), digest("p", study, attempt), digest("r"))
    elif action == "release":
        ledger.release(study, attempt)
    elif action == "ack":
        ledger.acknowledge(study, attempt)
    elif action == "abandon":
        ledger.abandon(study, attempt, "lost")
    elif action == "close":
        ledger.close_study(study, "done")
    else:
        ledger.withdraw(study, "asked")


def check_walk(folder: Path, steps: list[Step]) -> None:
    """I1, I2, I3 over any list of operations: each release has its debit, spending never falls, all within the caps."""
    path = path_in(folder)
    ledger = Ledger.create(FILES, path, IDENTITY)
    try:
        spent: dict[bytes, tuple[int, int]] = {}
        released: set[tuple[bytes, int]] = set()
        for step in [*steps, ("reopen", 0, 0)]:
            if step[0] == "reopen":
                ledger.close()
                ledger = Ledger.open(FILES, path, IDENTITY)
            else:
                with contextlib.suppress(MedfedError):
                    take(ledger, step)
            released |= {(row.study, row.attempt) for row in ledger.entries() if row.kind is Kind.RELEASED}
            for known in ledger.studies():
                study = known.approval.study
                view = ledger.account(study, WALK_CAPS)
                figures = (micro(view.epsilon_spent), micro(view.lifetime_spent))
                assert figures >= spent.get(study, (0, 0)) and figures[1] >= spent.get(study, (0, 0))[1]
                spent[study] = figures
                sent = sum(1 for other, _ in released if other == study)
                assert view.epsilon_spent >= bounds(NOISE, sent, DELTA).epsilon
                assert view.epsilon_reserved <= WALK_CAPS.max_epsilon_study
                assert view.lifetime_reserved <= WALK_CAPS.max_epsilon_lifetime
    finally:
        ledger.close()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps=STEPS)
def test_spending_never_falls(steps: list[Step], tmp_path_factory: pytest.TempPathFactory) -> None:
    check_walk(tmp_path_factory.mktemp("walk"), steps)


WALK: list[Step] = [
    ("approve", 0, 1),
    ("approve", 1, 1),
    ("approve", 2, 1),
    ("reserve", 0, 1),
    ("seal", 0, 1),
    ("release", 0, 1),
    ("abandon", 0, 1),
    ("reserve", 1, 1),
    ("seal", 1, 1),
    ("release", 1, 1),
    ("ack", 1, 1),
    ("reopen", 0, 0),
    ("reserve", 0, 2),
    ("close", 0, 1),
    ("reserve", 1, 2),
    ("withdraw", 1, 1),
]


def refund(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an abandoned attempt is not charged."""
    query = (
        "SELECT study, count(*), max(attempt) FROM entries AS e WHERE kind = 'RESERVED' AND NOT EXISTS (SELECT 1 FROM "
        "entries AS a WHERE a.study = e.study AND a.attempt = e.attempt AND a.kind = 'ABANDONED') GROUP BY study"
    )
    of_attempt = "WHERE study = ? AND attempt = ? AND kind = 'RESERVED'"

    def without_abandoned(self: ledger_store.Store, study: bytes | None = None) -> dict[bytes, tuple[int, Entry]]:
        counted = self._connection.execute(query).fetchall()
        return {study: (count, self.select(of_attempt, (study, highest))[0]) for study, count, highest in counted}

    monkeypatch.setattr(ledger_store.Store, "tallies", without_abandoned)


def release_before_debit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: bytes leave first, the debit is dropped."""
    monkeypatch.setattr(ledger_store.Store, "tallies", lambda self, study=None: {})


def forget_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a closed study's account starts from zero."""
    whole = ledger_store.Store.tallies

    def without_closed(self: ledger_store.Store, study: bytes | None = None) -> dict[bytes, tuple[int, Entry]]:
        closed = {row.study for row in self.select("WHERE kind IN ('CLOSED', 'WITHDRAWN')")}
        return {study: figures for study, figures in whole(self, study).items() if study not in closed}

    monkeypatch.setattr(ledger_store.Store, "tallies", without_closed)


def caps_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the lifetime is not asked about."""
    for module in (ledger_book, ledger_view):
        monkeypatch.setattr(module, "require_lifetime_fits", lambda total, caps, account: 0.0)


def test_walk_without_planted_bug_holds(tmp_path: Path) -> None:
    check_walk(tmp_path, WALK)


@pytest.mark.parametrize("plant", [refund, release_before_debit, forget_when_closed, caps_ignored])
def test_planted_bug_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_walk(tmp_path, WALK)


def test_million_tiny_debits_round_up() -> None:
    """Money is rounded up once on the total, so no number of tiny events is ever free."""
    tiny = Mechanism(sampling_rate=1.0, sigma=1e9, shares=1, sensitivity=1.0, dimensions=1)
    last = 0
    for count in (1, 10, 1000, 1_000_000):
        cost = epsilon(compose(tiny, count), 1e-5)
        assert micro(cost) >= cost * 1e6 and micro(cost) >= last
        last = micro(cost)
