"""A study's numbers: noise sized for the grid and for the honest hospitals, calibrated for spares too."""

import itertools
import math

import numpy as np
import pytest

from medfed.errors import PrivacyError, RemoteProtocolError
from medfed.models import catalogue, parameters
from medfed.privacy.plan import WRAP_PROBABILITY_LIMIT, calibrate, make_plan
from medfed.study import Study


def changed(study: Study, section: str, **values) -> Study:
    part = getattr(study, section).model_copy(update=values)
    return study.model_copy(update={section: part})


@pytest.fixture
def study(make_study) -> Study:
    return make_study()


@pytest.fixture
def words(study: Study) -> int:
    return parameters.count(catalogue.build(study))


def test_plan_local_noise_is_the_multiplier_times_the_sensitivity_on_the_grid(study, words):
    study = changed(study, "privacy", mode="local")
    plan = make_plan(study, words)
    sensitivity = study.privacy.clipping_norm * 2.0**plan.exponent + math.sqrt(words)
    assert plan.noise_sd == pytest.approx(study.privacy.noise_multiplier * sensitivity, rel=1e-12)
    assert plan.mechanism == plan.own_mechanism
    assert plan.epsilon == plan.own_epsilon


def test_plan_distributed_shares_of_the_honest_hospitals_alone_add_up_to_the_noise_needed(study, words):
    local = make_plan(changed(study, "privacy", mode="local"), words)
    plan = make_plan(changed(study, "privacy", mode="distributed"), words)
    honest = study.cohort.hospitals - study.cohort.colluders
    assert plan.noise_sd * math.sqrt(honest) == pytest.approx(local.noise_sd, rel=1e-12)
    assert plan.mechanism.shares == honest
    assert plan.own_mechanism.shares == 1
    assert plan.epsilon == pytest.approx(local.epsilon, rel=1e-6)
    assert plan.own_epsilon > 1.2 * plan.epsilon, "one share alone protects less, and the plan says so"


def test_plan_epsilon_counts_rounds_and_spares(study, words):
    plan = make_plan(study, words)
    assert plan.attempts == study.training.rounds + study.training.spare_attempts
    spent = [plan.epsilon_after(count) for count in range(plan.attempts + 1)]
    assert spent[0] == 0.0
    assert all(later > earlier for earlier, later in itertools.pairwise(spent))
    assert spent[-1] == plan.epsilon
    more = changed(study, "training", spare_attempts=study.training.spare_attempts + 3)
    assert make_plan(more, words).epsilon > plan.epsilon


@pytest.mark.parametrize("mode", ["local", "distributed"])
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_calibrate_meets_epsilon_and_does_not_waste_it(study, words, mode, epsilon):
    calibrated = calibrate(changed(study, "privacy", mode=mode), words, epsilon)
    found = make_plan(calibrated, words).epsilon
    assert 0.995 * epsilon < found <= epsilon
    assert calibrated.privacy.epsilon == epsilon


def test_plan_of_a_grid_that_is_too_coarse_is_refused(study, words):
    with pytest.raises(PrivacyError, match="MF-145"):
        make_plan(changed(study, "quantization", range=1e9), words)


def test_plan_of_the_16_bit_ring_where_rounding_would_dominate_is_refused(study):
    """Room for sums of 64 C leaves few grid steps to C, and 10,000 parameters are rounded by 100 of them."""
    narrow = changed(study, "quantization", ring_bits=16, range=study.privacy.clipping_norm * 2.0**6)
    with pytest.raises(PrivacyError, match="MF-145 the grid is too coarse"):
        make_plan(narrow, 10_000)
    with pytest.raises(PrivacyError, match="MF-145 the masked sum could overflow"):
        make_plan(narrow, 4)  # of a tiny model the grid is fine enough, and the ring is what fails


def test_plan_of_a_ring_without_room_for_the_noise_is_refused(study, words):
    assert make_plan(study, words).wrap_probability <= WRAP_PROBABILITY_LIMIT
    narrow = changed(changed(study, "quantization", ring_bits=16), "privacy", clipping_norm=1.0)
    with pytest.raises(PrivacyError, match="MF-145"):
        make_plan(narrow, words)
    loud = changed(changed(study, "privacy", noise_multiplier=10_000.0), "quantization", range=64.0)
    with pytest.raises(PrivacyError, match="MF-145"):
        make_plan(loud, words)


def test_plan_reads_a_released_sum_as_two_s_complement_and_refuses_another_length(study, words):
    plan = make_plan(study, words)
    values = np.arange(words, dtype=np.int64) - words // 2
    np.testing.assert_array_equal(plan.read_total(values.astype("<i4").tobytes()), values)
    with pytest.raises(RemoteProtocolError, match="MF-180"):
        plan.read_total(bytes(4 * words - 1))
