"""Rules of local steps: what they make of noised gradients, and that they see nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.client.approval import load_approved
from medfed.client.approved import Approved
from medfed.client.ledger import Ledger
from medfed.client.local_optimizer import local_rule
from medfed.client.local_steps import noised_sum, private_update, weighted_words
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.quantize import dequantize
from medfed.simulations.entropy import SeededEntropy
from medfed.study import DpAdamBC, Momentum

STEPS, RATE, PULL = 5, 0.5, 0.25
MOMENTUM = Momentum(kind="momentum", momentum=0.75)
ADAM_BC = DpAdamBC(kind="dp-adambc", beta1=0.5, beta2=0.75, floor=1e-4)
AVERAGE = ("momentum = 0.9", "momentum = 0.0")


def update_with(step: str = "", pull: float = PULL) -> tuple[str, str]:
    local = f"steps = {STEPS}, learning_rate = {RATE}, proximal = {pull}{step}"
    return ('aggregate = "gradient"', f'aggregate = "update"\nlocal = {{ {local} }}')


BY_MOMENTUM = ', step = { kind = "momentum", momentum = 0.75 }'
BY_ADAM_BC = ', step = { kind = "dp-adambc", beta1 = 0.5, beta2 = 0.75, floor = 1e-4 }'


def approved_at(world, position: int) -> Approved:
    site = world.site(position)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        return load_approved(site, world.study_hash, ledger)


# ------------------------------------------------------------------------------------------------------------- the rules


def test_momentum_is_the_loop_written_down() -> None:
    rng, velocity = np.random.default_rng(1), [0.0] * 3
    rule = local_rule(MOMENTUM, 7.0)
    for _ in range(6):
        gradient = rng.normal(size=3)
        velocity = [0.75 * before + now for before, now in zip(velocity, gradient.tolist(), strict=True)]
        step = rule(gradient.copy())
        assert step.tolist() == velocity
        step[:] = 1e9  # the caller's own


@pytest.mark.parametrize("variance", [0.0, 0.5, 1e3])
def test_dp_adambc_is_the_loop_written_down(variance: float) -> None:
    rng = np.random.default_rng(2)
    rule, first, second = local_rule(ADAM_BC, variance), [0.0] * 3, [0.0] * 3
    for number in range(1, 7):
        gradient = rng.normal(size=3)
        expected = []
        for place, value in enumerate(gradient.tolist()):
            first[place] = 0.5 * first[place] + 0.5 * value
            second[place] = 0.75 * second[place] + 0.25 * value * value
            spread = second[place] / (1 - 0.75**number) - variance
            expected.append(first[place] / (1 - 0.5**number) / math.sqrt(max(spread, 1e-4)))
        step = rule(gradient)
        np.testing.assert_allclose(step, expected, rtol=1e-12)
        step[:] = 1e9


def test_without_a_rule_the_gradient_is_the_step() -> None:
    gradient = np.array([1.0, -2.0])
    assert local_rule(None, 3.0)(gradient) is gradient


# ---------------------------------------------------------------------------------------------------------- in an update


def way_by(
    approved: Approved, start: NDArray[np.float32], rule: Callable[[NDArray[np.float64], int], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The way again, by ``rule``, from the same randomness."""
    entropy, at = SeededEntropy(6, "x"), start.astype(np.float64)
    expected = approved.study.privacy.sampling_rate * approved.nominal_patients
    for number in range(1, STEPS + 1):
        integers = noised_sum(approved, at.astype(np.float32), entropy, discrete_gaussian)
        gradient = dequantize(integers, approved.plan.noise_exponent) / expected
        at = at - RATE * (rule(gradient, number) + PULL * (at - start.astype(np.float64)))
    return at - start


def test_update_without_a_rule_is_what_it_was(make_world) -> None:
    """To the bit: the gradient, and the pull back within it."""
    approved = approved_at(make_world(update_with()), 2)
    assert approved.study.training.local.step is None
    start = np.random.default_rng(3).normal(size=approved.plan.words).astype(np.float32)
    update = private_update(approved, start, SeededEntropy(6, "x"), discrete_gaussian)
    assert update.tobytes() == way_by(approved, start, lambda gradient, _: gradient).tobytes()


def test_update_follows_momentum_anew_in_every_round(make_world) -> None:
    approved = approved_at(make_world(update_with(BY_MOMENTUM)), 2)
    start = np.random.default_rng(3).normal(size=approved.plan.words).astype(np.float32)
    velocity = np.zeros(approved.plan.words)

    def rule(gradient: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        velocity[:] = 0.75 * velocity + gradient
        return velocity

    rounds = [private_update(approved, start, SeededEntropy(6, "x"), discrete_gaussian) for _ in range(2)]
    assert rounds[0].tobytes() == rounds[1].tobytes()
    np.testing.assert_allclose(rounds[0], way_by(approved, start, rule), rtol=1e-12)


def test_update_takes_off_the_noise_of_its_own_sum(make_world) -> None:
    """This hospital's noise over the patients that it declared: not the cohort's."""
    approved = approved_at(make_world(update_with(BY_ADAM_BC)), 2)
    start = np.random.default_rng(3).normal(size=approved.plan.words).astype(np.float32)
    study, plan = approved.study, approved.plan
    of_a_sum = plan.noise_sd * 2.0**-plan.noise_exponent
    assert of_a_sum == pytest.approx(study.privacy.noise_multiplier * study.privacy.clipping_norm, rel=1e-3)
    variance = (of_a_sum / (study.privacy.sampling_rate * approved.nominal_patients)) ** 2
    first, second = np.zeros(plan.words), np.zeros(plan.words)

    def rule(gradient: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        first[:] = 0.5 * first + 0.5 * gradient
        second[:] = 0.75 * second + 0.25 * gradient**2
        spread = np.maximum(second / (1 - 0.75**number) - variance, 1e-4)
        return first / (1 - 0.5**number) / np.sqrt(spread)

    update = private_update(approved, start, SeededEntropy(6, "x"), discrete_gaussian)
    np.testing.assert_allclose(update, way_by(approved, start, rule), rtol=1e-9)


def test_rule_sees_noised_sums_only(make_world, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noised sums of other patients give the same update."""
    world = make_world(update_with(BY_ADAM_BC))
    approved = approved_at(world, 2)
    given = [np.random.default_rng(number).integers(-(2**20), 2**20, approved.plan.words) for number in range(STEPS)]
    updates = []
    for patients in (approved.patients, approved_at(world, 1).patients):
        left = [each.copy() for each in given]
        monkeypatch.setattr("medfed.client.local_steps.noised_sum", lambda *_, left=left: left.pop(0))
        other = replace(approved, patients=patients)
        start = np.ones(approved.plan.words, np.float32)
        updates.append(private_update(other, start, SeededEntropy(1, "x"), discrete_gaussian))
        assert left == []
    assert updates[0].tobytes() == updates[1].tobytes()


@pytest.mark.parametrize("step", ["", BY_MOMENTUM, BY_ADAM_BC])
def test_ring_holds_the_update_however_it_steps(make_world, step: str) -> None:
    """The range is planned for the rule: not even noise of six standard deviations in each step saturates."""
    approved = approved_at(make_world(update_with(step, pull=0.0), AVERAGE), 3)  # the largest hospital

    def large(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        return np.full(size, round(6 * sd))

    start = np.zeros(approved.plan.words, np.float32)
    update = private_update(approved, start, SeededEntropy(1, "x"), large)
    words = weighted_words(approved, update.copy(), SeededEntropy(1, "x"))
    assert np.abs(words).max() < approved.plan.limit
    share = approved.nominal_patients / approved.roster.nominal_patients
    np.testing.assert_allclose(words * 2.0**-approved.plan.exponent, update * share, rtol=1e-3)


def test_rule_changes_nothing_of_what_is_counted(make_world) -> None:
    plans = [make_world(update_with(step)).assignment.plan for step in ("", BY_MOMENTUM, BY_ADAM_BC)]
    assert plans[0].mechanism == plans[1].mechanism == plans[2].mechanism
    assert plans[0].epsilon == plans[1].epsilon == plans[2].epsilon
