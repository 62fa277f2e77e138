"""The sum before round 1 at the hospitals: charged first, of one length with all uploads, within its attempts."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray

from medfed import standardization
from medfed.client.approval import caps_of, load_approved
from medfed.client.ledger import Ledger, LedgerView
from medfed.client.ledger.accounts import AccountView
from medfed.errors import ConfigError, EnvironmentFault, PrivacyError
from medfed.privacy.accounting import ORDERS, Mechanism
from medfed.privacy.gradients.engine import CLIPPING_MARGIN
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import calibrate, make_plan
from medfed.simulations.entropy import SeededEntropy
from medfed.wire import Finished, Refused, Upload

sys.path.insert(0, str(Path(__file__).parent))

from test_participation import EVERYBODY, Desk, SpyEntropy, refused, zeros

TRIES = 2
STATISTICS = ("[training]", f"[statistics]\nnoise_multiplier = 6.0\nattempts = {TRIES}\nleast_scale = 0.01\n[training]")
UPDATE = ('aggregate = "gradient"', 'aggregate = "update"\nlocal = { steps = 3, learning_rate = 0.5, proximal = 0.0 }')
CASES = [(STATISTICS,), (STATISTICS, UPDATE)]


def dies_once(number: int):
    """Noise that fails at its ``number``-th draw."""
    calls: list[int] = []

    def noise(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        calls.append(1)
        if len(calls) == number:
            raise EnvironmentFault(630, "out of memory", "free some")
        return discrete_gaussian(key, sd, size)

    return noise


def account(world, position: int) -> AccountView:
    site = world.site(position)
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        return ledger.account(world.study_hash, caps_of(site))


def started(world, noise=None) -> Desk:
    world.start_all(noise)
    desk = Desk(world)
    desk.set_up()
    return desk


# ------------------------------------------------------------------------------------------------------------- a run


def test_without_noise_they_are_the_statistics_of_all_patients(make_world) -> None:
    """Through masks and ledger: mean and deviation over patients of their records' means, to the grid."""
    world = make_world(STATISTICS)
    desk = started(world, zeros)
    desk.round()
    total = np.zeros(5)
    for position in EVERYBODY:
        site = world.site(position)
        records = site.read_records(world.study)
        for patient in set(records.patients):
            rows = records.inputs[[owner == patient for owner in records.patients], :2].astype(np.float64)
            raw = rows * [20.0, 2.0] + [60.0, 2.0]
            z = np.clip((raw - [60.0, 15.0]) / [60.0, 15.0], -1, 1)
            total += [*z.mean(axis=0), *(z * z).mean(axis=0), 1.0]
    assert total[4] == 26
    mean, square = total[:2] / 26, total[2:4] / 26
    shift = ((mean * [60, 15] + [60, 15]) - [60, 2]) / [20, 2]
    stretch = np.sqrt(square - mean**2) * [60, 15] / [20, 2]
    np.testing.assert_allclose(desk.state.statistics, [*shift, *stretch], rtol=1e-4, atol=1e-4)
    assert desk.state.weights.tolist() == desk.previous.weights.tolist()


@pytest.mark.parametrize("changes", CASES, ids=["gradient", "update"])
def test_run_with_statistics_ends_with_one_model_for_all(make_world, changes) -> None:
    world = make_world(*changes)
    desk = started(world)
    for number in range(4):
        if number == 2:  # one is killed and comes back by its own files
            world.start(1)
            desk.set_up()
        uploads = desk.round()
        assert {len(upload.payload) for upload in uploads} == {len(uploads[0].payload)}
    refused(desk.ask(0, desk.finish(round=3)), Refused.OUT_OF_ORDER)
    for position in EVERYBODY:
        assert isinstance(desk.ask(position, desk.finish()), Finished)
    models = {hashlib.sha256((world.place(p) / "model.safetensors").read_bytes()).digest() for p in EVERYBODY}
    assert len(models) == 1
    assert [kind for kind, _ in world.rows(0)].count("RESERVED") == 4


def test_every_upload_is_of_one_length(make_world) -> None:
    """Two features, one category: 5 words of statistics, 4 parameters."""
    world = make_world(STATISTICS)
    plan = world.assignment.plan
    assert (plan.words, plan.statistics_words, plan.ring_words) == (4, 5, 5)
    desk = started(world)
    first, second = desk.round(), desk.round()
    assert {len(upload.payload) for upload in [*first, *second]} == {len(first[0].payload)}


def test_hospital_that_lost_its_state_gets_the_statistics_back(make_world) -> None:
    world = make_world(STATISTICS)
    desk = started(world)
    desk.round()
    desk.round()
    (world.place(2) / "state.bin").unlink()
    world.start(2)
    desk.set_up()
    refused(desk.ask(2, desk.request()), Refused.NEED_STATE)
    desk.ask(2, desk.transfer())
    uploads = desk.round()
    assert len(uploads) == 4
    assert (
        world.hospitals[2]._studies[world.study_hash]._keeper.state.statistics.tobytes()
        == desk.state.statistics.tobytes()
    )


def test_training_after_it_sees_standardised_patients(make_world) -> None:
    """Nobody's noise: the second sum is that of gradients at the standardised inputs."""
    world = make_world(
        STATISTICS,
        ("sampling_rate = 0.5", "sampling_rate = 1.0"),
        ("max_records_per_patient = 2", "max_records_per_patient = 3"),
    )
    desk = started(world, zeros)
    desk.round()
    desk.round()
    plan, study = world.assignment.plan, world.study
    expected = np.zeros(4)
    for position in EVERYBODY:
        records = world.site(position).read_records(study)
        inputs = standardization.standardized(study, desk.state.statistics, records.inputs).astype(np.float64)
        for patient in set(records.patients):
            mine = [owner == patient for owner in records.patients]
            errors = 0.5 - records.labels[mine]  # logistic regression begins at zero
            gradient = np.append((errors[:, None] * inputs[mine]).mean(axis=0), errors.mean())
            expected += gradient * min(1.0, 1 / (1 + CLIPPING_MARGIN) / np.linalg.norm(gradient))
    total = plan.read_total(desk.total)
    np.testing.assert_allclose(total[:4] * 2.0**-plan.exponent, expected, rtol=0, atol=1e-4)
    assert total[4] == 0


# ------------------------------------------------------------------------------------------------------------ the cost


def oracle(study, attempts: int) -> float:
    """dp_accounting: all attempts at the statistics, and as many of training."""
    accountant = RdpAccountant(orders=ORDERS)
    accountant.compose(dp_event.GaussianDpEvent(study.statistics.noise_multiplier), study.statistics.attempts)
    event = dp_event.GaussianDpEvent(study.privacy.noise_multiplier)
    steps = 1 if study.training.local is None else study.training.local.steps
    accountant.compose(dp_event.PoissonSampledDpEvent(study.privacy.sampling_rate, event), attempts * steps)
    return accountant.get_epsilon(study.privacy.delta)


@pytest.mark.parametrize("changes", CASES, ids=["gradient", "update"])
def test_cost_is_that_of_both_kinds_of_events(make_world, changes) -> None:
    study, plan = make_world(*changes).study, make_world(*changes).assignment.plan
    assert plan.attempts == 3 + 2 + TRIES
    assert plan.epsilon_after(0) == 0.0
    for attempts in (1, 4, plan.attempts):
        # of all attempts, at most 5 can be training's: the ledger refuses a sixth
        expected = oracle(study, min(attempts, 5))
        assert expected <= plan.bounds_after(attempts).rdp <= 1.12 * expected
    assert plan.bounds_after(5) == plan.bounds
    assert 0.99 * 8.0 < plan.epsilon <= 8.0


def test_first_attempt_pays_for_all_tries_and_the_ledger_says_so(make_world) -> None:
    world = make_world(STATISTICS)
    plan, desk = world.assignment.plan, started(world)
    (before,) = plan.mechanism.once
    assert (before.sampling_rate, before.repeats, before.once) == (1.0, TRIES, ())
    for attempts in (1, 2, 3):
        desk.round()
        view = account(world, 0)
        assert view.attempts_used == attempts
        trained = max(
            1, attempts - 1
        )  # the first was one at the statistics, and pays for all of them and one of training
        assert view.epsilon_spent == pytest.approx(plan.epsilon_after(trained), rel=1e-12)
        assert view.epsilon_reserved == pytest.approx(plan.epsilon, rel=1e-12)
    with LedgerView.inspect(world.base.files, world.site(0).ledger_path, world.site(0).identity()) as ledger:
        ledger.verify()
        steps = [entry.body for entry in ledger.entries() if entry.kind.value == "RESERVED"]
    assert all('\\"once\\":[{' in body for body in steps)


def test_debit_comes_before_the_noise_and_the_noise_is_fresh_each_time(make_world) -> None:
    world = make_world(STATISTICS)
    seen: list[tuple[str, list[tuple[str, int]]]] = []
    noises: list[tuple[bytes, float, int]] = []

    def noted(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        noises.append((key, sd, size))
        return discrete_gaussian(key, sd, size)

    world.start_all()
    world.start(
        0, noted, entropy=SpyEntropy(SeededEntropy(3, "spied"), lambda what: seen.append((what, world.rows(0)[2:])))
    )
    desk = Desk(world)
    desk.set_up()
    request = desk.request()
    assert isinstance(desk.ask(0, request), Upload)
    assert seen == [("secagg/offer", []), ("noise", [("RESERVED", 1)])], "no sampling: all patients are in"
    desk.attempt = 1
    assert isinstance(desk.ask(0, desk.request()), Upload)
    plan = world.assignment.plan
    assert [each[1:] for each in noises] == [(plan.statistics_noise_sd, plan.statistics_words)] * 2
    assert noises[0][0] != noises[1][0]
    assert plan.statistics_noise_sd >= 6.0 * np.sqrt(5) * 2.0**plan.statistics_exponent


def test_tries_beyond_those_paid_for_are_refused_unspent(make_world) -> None:
    world = make_world(STATISTICS)
    world.start_all()
    world.start(0, dies_once(1))
    desk = Desk(world)
    desk.set_up()
    refused(desk.ask(0, desk.request()), Refused.INTERNAL)
    assert isinstance(desk.ask(0, desk.request(2)), Upload)
    spent = account(world, 0).epsilon_spent
    for attempt in (3, 4, 7):
        refused(desk.ask(0, desk.request(attempt)), Refused.BUDGET)
    assert account(world, 0).epsilon_spent == spent
    assert world.charged(0) == TRIES


def test_try_that_is_lost_leaves_the_next(make_world) -> None:
    world = make_world(STATISTICS)
    world.start_all()
    world.start(3, dies_once(1))
    desk = Desk(world)
    desk.set_up()
    refused(desk.ask(3, desk.request()), Refused.INTERNAL)
    desk.attempt = 1
    for _ in range(4):
        desk.round()
    assert isinstance(desk.ask(3, desk.finish()), Finished)


# ------------------------------------------------------------------------------------------------------- plan and policy


def test_shares_of_noise_add_up_in_distributed_mode(make_world) -> None:
    study = make_world(STATISTICS).study
    both = {}
    for mode in ("local", "distributed"):
        changed = study.model_copy(update={"privacy": study.privacy.model_copy(update={"mode": mode})})
        both[mode] = make_plan(calibrate(changed, 4, 8.0), 4)
    local, shared = both["local"], both["distributed"]
    assert shared.statistics_noise_sd * np.sqrt(3) == pytest.approx(local.statistics_noise_sd)
    assert shared.mechanism.once[0].shares == 3
    assert shared.own_mechanism.once[0].shares == 1
    assert shared.own_epsilon > shared.epsilon
    assert local.mechanism == local.own_mechanism


def test_statistics_that_would_eat_the_whole_budget_are_refused(make_world) -> None:
    study = make_world(STATISTICS).study
    loud = study.model_copy(update={"statistics": study.statistics.model_copy(update={"noise_multiplier": 0.3})})
    with pytest.raises(ConfigError, match="MF-203"):
        calibrate(loud, 4, 1.0)


def test_hospitals_floor_of_noise_holds_for_statistics(make_world) -> None:
    world = make_world(STATISTICS)
    policy = world.site(0).config.policy
    policy.admit(world.study)
    quiet = world.study.model_copy(
        update={"statistics": world.study.statistics.model_copy(update={"noise_multiplier": 0.3})}
    )
    stricter = policy.model_copy(update={"min_noise_multiplier": 0.31})
    stricter.admit(world.study)
    with pytest.raises(PrivacyError, match="MF-130"):
        stricter.admit(quiet)


def test_mechanism_with_something_before_it_reads_back() -> None:
    before = Mechanism(1.0, 30.0, 1, 10.0, 5, TRIES)
    both = Mechanism(0.5, 40.0, 1, 20.0, 3, once=(before,), aside=(before, before), most=4)
    assert Mechanism.from_json(both.to_json()) == both
    with pytest.raises(ConfigError, match="MF-203"):
        replace(both, once=(both,))
    alone = replace(both, once=(), aside=(), most=None).to_json()
    assert not any(name in alone for name in ("once", "aside", "most"))


def test_reserve_itself_counts_the_tries(make_world) -> None:
    """Whoever calls it: not only the participation."""
    world = make_world(STATISTICS)
    site = world.site(0)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        load_approved(site, world.study_hash, ledger)
        for attempt in (1, 2):
            ledger.reserve(world.study_hash, 1, attempt, caps_of(site), 0.0)
            ledger.abandon(world.study_hash, attempt, "lost")
        with pytest.raises(PrivacyError, match="MF-502"):
            ledger.reserve(world.study_hash, 1, 3, caps_of(site), 0.0)
        assert ledger.reserve(world.study_hash, 2, 3, caps_of(site), 0.0).attempt == 3


def test_coordinator_that_saves_tries_gains_no_step_of_training(make_world) -> None:
    """It asks for a sixth attempt at training, though of the list of seven one is unused: that one was paid as a try."""
    world = make_world(STATISTICS)
    desk = started(world)
    desk.round()
    for attempt in range(2, 7):
        assert isinstance(desk.ask(0, desk.request(attempt)), Upload)
    rows, spent = world.rows(0), account(world, 0).spent
    assert world.assignment.plan.attempts == 7
    refused(desk.ask(0, desk.request(7)), Refused.BUDGET)
    assert (world.rows(0), account(world, 0).spent) == (rows, spent)
    assert spent == world.assignment.plan.bounds
