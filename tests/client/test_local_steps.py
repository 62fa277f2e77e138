"""Local steps: what they compute, that every one is drawn, noised and charged, and that nothing else leaves."""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray

from medfed.advance import state_hash
from medfed.client.approval import caps_of, load_approved
from medfed.client.approved import Approved
from medfed.client.ledger import Ledger, LedgerView
from medfed.client.local_steps import noised_sum, private_update, weighted_words
from medfed.errors import EnvironmentFault, LocalProtocolError
from medfed.privacy.accounting import ORDERS, Mechanism, compose, epsilon
from medfed.privacy.gradients.engine import CLIPPING_MARGIN
from medfed.privacy.noise import discrete_gaussian
from medfed.simulations.entropy import SeededEntropy
from medfed.wire import Refused, Upload

sys.path.insert(0, str(Path(__file__).parent))

from test_participation import EVERYBODY, Desk, SpyEntropy, refused, zeros

STEPS = 5
LOCAL = f"""aggregate = "update"
local = {{ steps = {STEPS}, learning_rate = 0.5, proximal = 0.25 }}"""
UPDATE = ('aggregate = "gradient"', LOCAL)
AVERAGE = ("momentum = 0.9", "momentum = 0.0")
WHOLE = (("sampling_rate = 0.5", "sampling_rate = 1.0"), ("max_records_per_patient = 2", "max_records_per_patient = 3"))


def approved_at(world, position: int) -> Approved:
    """What a hospital that is not running would open."""
    site = world.site(position)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        return load_approved(site, world.study_hash, ledger)


# ------------------------------------------------------------------------------------------------------ what they compute


def by_hand(approved: Approved, start: NDArray[np.float64], noises: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Logistic regression, one patient at a time, as the method is written down; every patient takes part in each step."""
    study, plan, local = approved.study, approved.plan, approved.study.training.local
    records, grid = approved.patients.records, 2.0**approved.plan.noise_exponent
    at = start.copy()
    for noise in noises:
        total = np.zeros(plan.words)
        weights = at.astype(np.float32).astype(np.float64)
        for patient in sorted(set(records.patients)):
            gradients = []
            for inputs, label, owner in zip(
                records.inputs.astype(np.float64), records.labels, records.patients, strict=True
            ):
                if owner == patient:
                    chance = 1 / (1 + math.exp(-(weights[:-1] @ inputs + weights[-1])))
                    gradients.append((chance - label) * np.append(inputs, 1.0))
            mean = np.mean(gradients, axis=0)
            bound = study.privacy.clipping_norm / (1 + CLIPPING_MARGIN)
            total += mean * min(1.0, bound / np.linalg.norm(mean))
        mean_gradient = (
            (np.rint(total * grid) + noise) / grid / (study.privacy.sampling_rate * approved.nominal_patients)
        )
        at -= local.learning_rate * (mean_gradient + local.proximal * (at - start))
    return at - start


def test_update_is_the_loop_written_down(make_world) -> None:
    world = make_world(UPDATE, *WHOLE)
    approved = approved_at(world, 2)
    assert approved.patients.count == approved.nominal_patients == 7
    assert len(approved.patients.records.labels) > 7, "some patients have several records"
    rng = np.random.default_rng(3)
    start = rng.normal(size=approved.plan.words).astype(np.float32)
    noises = [rng.integers(-(2**18), 2**18, approved.plan.words) for _ in range(STEPS)]
    left = list(noises)
    update = private_update(approved, start, SeededEntropy(1, "x"), lambda key, sd, size: left.pop(0))
    assert left == []
    expected = by_hand(approved, start.astype(np.float64), noises)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(update, expected, rtol=0, atol=1e-6)


def test_proximal_term_pulls_back(make_world) -> None:
    """Noise alone drives both: the pull shortens the way."""
    ways = []
    for proximal in ("0.25", "0.0"):
        approved = approved_at(make_world(UPDATE, ("proximal = 0.25", f"proximal = {proximal}"), *WHOLE), 0)
        push = np.full(approved.plan.words, 2**22)
        zero = np.zeros(approved.plan.words, np.float32)
        ways.append(np.linalg.norm(private_update(approved, zero, SeededEntropy(1, "x"), lambda *_, push=push: push)))
    assert ways[0] < 0.9 * ways[1]


def test_steps_that_overflow_do_so_for_any_patients(make_world) -> None:
    """A study's absurd rate makes weights infinite, then no numbers: sums go on, nothing raises before the update is cut."""
    approved = approved_at(make_world(UPDATE), 2)
    absurd = approved.study.privacy.model_copy(update={"sampling_rate": 1e-310})
    approved = replace(approved, study=approved.study.model_copy(update={"privacy": absurd}))
    everybody = approved.study.model_copy(update={"privacy": absurd.model_copy(update={"sampling_rate": 1.0})})
    for weight in (np.inf, -np.inf, np.nan):
        weights = np.full(approved.plan.words, weight, np.float32)
        sums = noised_sum(replace(approved, study=everybody), weights, SeededEntropy(1, "x"), zeros)
        assert np.abs(sums).max() <= approved.plan.noise_limit
    start = np.zeros(approved.plan.words, np.float32)
    update = private_update(approved, start, SeededEntropy(1, "x"), discrete_gaussian)
    assert not np.isfinite(update).any()
    with pytest.raises(LocalProtocolError, match="MF-184"):
        weighted_words(approved, update, SeededEntropy(1, "x"))


def test_hospitals_weigh_by_what_they_declared(make_world) -> None:
    """The shares add up to one, whatever each really has."""
    world = make_world(UPDATE)
    parts = [approved_at(world, position) for position in EVERYBODY]
    one = np.full(parts[0].plan.words, 2.0**-6)
    total = sum(weighted_words(part, one, SeededEntropy(1, "x")) for part in parts)
    np.testing.assert_allclose(total * 2.0 ** -parts[0].plan.exponent, one, rtol=1e-5)
    assert weighted_words(parts[3], one, SeededEntropy(1, "x"))[0] == round(
        2.0**-6 * 8 / 26 * 2.0 ** parts[3].plan.exponent
    )


def test_round_adds_the_weighted_mean_of_the_updates(make_world) -> None:
    """Through masks, ledger and server step: w + sum of share times update, to the grid."""
    world = make_world(UPDATE, AVERAGE, ("[[1, 0.5], [3, 0.25]]", "[[1, 1.0]]"))
    parts = [approved_at(world, position) for position in EVERYBODY]
    given = [np.random.default_rng(position).normal(scale=0.01, size=parts[0].plan.words) for position in EVERYBODY]
    for position in EVERYBODY:
        world.start(position, zeros)
        part = world.hospitals[position]._studies[world.study_hash]
        part._local_update = lambda *_, update=given[position]: update
    desk = Desk(world)
    desk.set_up()
    desk.round()
    mean = sum(part.nominal_patients * update for part, update in zip(parts, given, strict=True)) / 26
    step = 2.0 ** -parts[0].plan.exponent
    np.testing.assert_allclose(desk.state.weights, desk.previous.weights + mean, rtol=0, atol=4 * step + 1e-7)


def test_update_far_below_a_step_adds_up_where_it_is_rounded_at_random(make_world) -> None:
    """The grid of the 16-bit ring is coarse. To its nearest point such an update is 0 in every round; at random it is right in
    the mean."""
    coarse = ("sampling_rate = 0.5", 'sampling_rate = 0.5\nring_bits = 16\nrounding = "stochastic"')
    approved = approved_at(make_world(UPDATE, coarse), 0)
    assert (approved.study.quantization.ring_bits, approved.study.quantization.rounding) == (16, "stochastic")
    share = approved.nominal_patients / approved.roster.nominal_patients
    update = np.full(approved.plan.words, 0.25 * 2.0**-approved.plan.exponent / share)
    entropy = SeededEntropy(5, "rounding")
    rounded = np.stack([weighted_words(approved, update, entropy) for _ in range(500)])
    assert set(np.unique(rounded)) == {0, 1}
    assert abs(rounded.mean() - 0.25) < 0.03
    nearest = approved.study.quantization.model_copy(update={"rounding": "nearest"})
    to_nearest = replace(approved, study=approved.study.model_copy(update={"quantization": nearest}))
    assert not weighted_words(to_nearest, update, entropy).any()


def test_study_on_the_16_bit_ring_runs_to_its_end(make_world) -> None:
    """Two bytes a parameter; every hospital ends with the same model."""
    coarse = ("sampling_rate = 0.5", 'sampling_rate = 0.5\nring_bits = 16\nrounding = "stochastic"')
    world = make_world(UPDATE, coarse)
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    desk.round()
    upload = desk.ask(0, desk.request())
    assert isinstance(upload, Upload)
    assert len(upload.payload) == 52 + 2 * world.assignment.plan.ring_words + 64


# -------------------------------------------------------------------------------------------------- drawn, noised, charged


def test_every_step_draws_fresh_keys_after_one_debit(make_world) -> None:
    world = make_world(UPDATE)
    world.start_all()
    seen: list[tuple[str, list[tuple[str, int]]]] = []
    keys: list[bytes] = []
    noises: list[tuple[float, int]] = []

    def noted(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        keys.append(key)
        noises.append((sd, size))
        return discrete_gaussian(key, sd, size)

    world.start(
        0, noted, entropy=SpyEntropy(SeededEntropy(3, "spied"), lambda what: seen.append((what, world.rows(0)[2:])))
    )
    desk = Desk(world)
    desk.set_up()
    assert isinstance(desk.ask(0, desk.request()), Upload)
    debited = [("RESERVED", 1)]
    assert seen == [("secagg/offer", []), *[("sampling", debited), ("noise", debited)] * STEPS]
    assert len(set(keys)) == STEPS
    plan = world.assignment.plan
    assert noises == [(plan.noise_sd, plan.words)] * STEPS
    assert (
        plan.noise_sd
        >= world.study.privacy.noise_multiplier * world.study.privacy.clipping_norm * 2.0**plan.noise_exponent
    )


def test_attempt_that_dies_between_steps_is_charged_whole(make_world) -> None:
    world = make_world(UPDATE)
    calls: list[int] = []

    def dies(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        calls.append(1)
        if len(calls) == 3:
            raise EnvironmentFault(630, "out of memory", "free some")
        return discrete_gaussian(key, sd, size)

    world.start_all()
    world.start(0, dies)
    desk = Desk(world)
    desk.set_up()
    refused(desk.ask(0, desk.request()), Refused.INTERNAL)
    desk.attempt += 1
    assert world.rows(0)[2:] == [("RESERVED", 1), ("ABANDONED", 1)]
    desk.round()
    site = world.site(0)
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        view = ledger.account(world.study_hash, caps_of(site))
    assert view.attempts_used == 2
    assert view.spent.rdp == pytest.approx(oracle(world, 2 * STEPS), rel=0.12)
    assert view.spent.rdp >= oracle(world, 2 * STEPS)


def oracle(world, events: int) -> float:
    """dp_accounting's own RDP accountant of continuous noise: never above ours, and near."""
    privacy = world.study.privacy
    accountant = RdpAccountant(orders=ORDERS)
    event = dp_event.PoissonSampledDpEvent(privacy.sampling_rate, dp_event.GaussianDpEvent(privacy.noise_multiplier))
    accountant.compose(event, events)
    return accountant.get_epsilon(privacy.delta)


@pytest.mark.parametrize("attempts", [1, 3, 5])
def test_attempts_times_steps_are_counted_as_dp_accounting_does(make_world, attempts: int) -> None:
    world = make_world(UPDATE)
    plan, expected = world.assignment.plan, oracle(world, attempts * STEPS)
    assert plan.events_per_attempt == STEPS
    assert expected <= plan.bounds_after(attempts).rdp <= 1.12 * expected
    assert plan.epsilon == plan.own_epsilon == plan.epsilon_after(5)
    assert 0.99 * 8.0 < plan.epsilon <= world.study.privacy.epsilon == 8.0


def test_ledger_reserves_and_charges_all_steps(make_world) -> None:
    world = make_world(UPDATE)
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    desk.round()
    site, plan = world.site(1), world.assignment.plan
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        view = ledger.account(world.study_hash, caps_of(site))
        bodies = [entry.body for entry in ledger.entries() if entry.kind.value in ("APPROVED", "RESERVED")]
    assert len(bodies) == 2
    assert all(f'\\"repeats\\":{STEPS}' in body for body in bodies)
    assert view.epsilon_spent == plan.epsilon_after(1)
    assert view.epsilon_reserved == plan.epsilon
    assert view.lifetime_spent == epsilon(compose(plan.mechanism, 1), caps_of(site).lifetime_delta)


def test_mechanism_of_one_event_reads_as_before() -> None:
    """A ledger from before there were local steps stays readable, and tells one from several."""
    one = Mechanism(0.5, 40.0, 1, 20.0, 3)
    assert "repeats" not in one.to_json()
    many = replace(one, repeats=STEPS)
    assert Mechanism.from_json(many.to_json()) == many != one == Mechanism.from_json(one.to_json())
    np.testing.assert_allclose(many.rdp(), STEPS * one.rdp())


def test_run_ends_with_one_model_for_all(make_world) -> None:
    world = make_world(UPDATE)
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    for _ in range(3):
        desk.round()
    for position in EVERYBODY:
        reply = desk.ask(position, desk.finish())
        assert type(reply).__name__ == "Finished", reply
    assert state_hash(world.study_hash, desk.state) != state_hash(world.study_hash, desk.previous)
    models = {hashlib.sha256((world.place(p) / "model.safetensors").read_bytes()).digest() for p in EVERYBODY}
    assert len(models) == 1
