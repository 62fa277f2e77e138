"""Metrics from noised counts: what a patient adds, what the cells say, how wrong it says it is, and where it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medfed import metrics
from medfed.advance import advance, first_state, parse_state, released_weights, state_bytes, state_size_bytes
from medfed.models import tasks
from medfed.study import Study

MakeStudy = Callable[..., Study]
ASKED = {"bins": 20, "attempts": 2, "noise_multiplier": 4.0, "range": 64.0}
BINARY = {"metrics": ASKED}
THREE = {"metrics": ASKED, "task": {"kind": "multiclass", "label": "ill", "classes": 3}}


def drawn(study: Study, records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and somewhat good probabilities of each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, study.task.classes, records)
    logits = rng.normal(size=(records, study.task.classes)) + 1.2 * np.eye(study.task.classes)[labels]
    chances = np.exp(logits)
    return labels, chances / chances.sum(axis=1, keepdims=True)


def cells_of(study: Study, chances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return metrics.shares(study, chances, labels, np.arange(len(labels)), len(labels)).sum(axis=0)


# ------------------------------------------------------------------------------------------------------ what patients add


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), records=st.integers(1, 30), many=st.booleans(), absurd=st.booleans())
def test_no_held_out_patient_adds_more_than_the_bound(
    seed: int, records: int, many: bool, absurd: bool, make_study: MakeStudy
) -> None:
    study = make_study(THREE if many else BINARY)
    labels, chances = drawn(study, records + 2, seed)
    if absurd:  # weights may be anything
        chances[0] = np.nan
    unit = np.concatenate([np.zeros(records, np.int64), [1, 2]])
    shares = metrics.shares(study, chances, labels, unit, 3)
    assert shares.shape == (3, metrics.words(study))
    assert (np.linalg.norm(shares, axis=1) <= metrics.most_of_one_patient(study) * (1 + 1e-12)).all()
    assert (shares >= 0).all()


def test_a_patient_s_share_is_the_same_bits_whoever_else_is_there(make_study: MakeStudy) -> None:
    study = make_study(THREE)
    labels, chances = drawn(study, 40, 5)
    unit = np.arange(40) % 8
    alone = metrics.shares(study, chances[unit == 3], labels[unit == 3], np.zeros(5, np.int64), 1)
    np.testing.assert_array_equal(metrics.shares(study, chances, labels, unit, 8)[3], alone[0])


# ------------------------------------------------------------------------------------------------------ what the cells say


def test_without_noise_the_figures_are_those_of_the_records(make_study: MakeStudy) -> None:
    study = make_study({"metrics": {**ASKED, "bins": 1000}})
    labels, chances = drawn(study, 3000, 1)
    found = metrics.from_cells(study, cells_of(study, chances, labels), 0.0)
    exact = tasks.metrics(study.task, chances, labels)
    positive = chances[:, 1]
    assert found.patients.value == pytest.approx(3000)
    assert found.auc.value == pytest.approx(exact["auc"], abs=1e-4)
    assert found.accuracy.value == pytest.approx(exact["accuracy"], abs=1e-12)
    assert found.brier.value == pytest.approx(((positive - labels) ** 2).mean(), abs=1e-3)
    assert found.log_loss.value == pytest.approx(-np.log(chances[np.arange(3000), labels]).mean(), abs=2e-3)
    assert found.calibration_gap.value == pytest.approx(positive.mean() - labels.mean(), abs=1e-3)


def test_of_several_classes_too(make_study: MakeStudy) -> None:
    study = make_study({**THREE, "metrics": {**ASKED, "bins": 1000}})
    labels, chances = drawn(study, 3000, 2)
    found = metrics.from_cells(study, cells_of(study, chances, labels), 0.0)
    exact = tasks.metrics(study.task, chances, labels)
    assert found.patients.value == pytest.approx(3000)
    assert found.auc.value == pytest.approx(exact["auc"], abs=1e-4)
    assert found.accuracy.value == pytest.approx(exact["accuracy"], abs=1e-12)
    assert found.log_loss.value == pytest.approx(-np.log(chances[np.arange(3000), labels]).mean(), abs=2e-3)
    assert found.calibration_gap.value == pytest.approx(chances.max(1).mean() - exact["accuracy"], abs=1e-3)
    assert found.brier is None


@pytest.mark.parametrize("changes", [BINARY, THREE])
@pytest.mark.parametrize("name", ["patients", "auc", "accuracy", "calibration_gap", "log_loss", "brier"])
def test_stated_deviation_is_that_of_the_noise(changes: dict, name: str, make_study: MakeStudy) -> None:
    """400 draws tell a deviation to 3.5 %; the delta method and the seed stay within 15."""
    study, rng = make_study(changes), np.random.default_rng(7)
    labels, chances = drawn(study, 4000, 3)
    exact, sd = cells_of(study, chances, labels), 5.0
    stated = getattr(metrics.from_cells(study, exact, sd), name)
    if stated is None:
        assert name == "brier" and study.task.kind == "multiclass"
        return
    noisy = [metrics.from_cells(study, exact + rng.normal(0, sd, exact.size), sd) for _ in range(400)]
    spread = np.std([getattr(each, name).value for each in noisy])
    assert stated.noise_sd == pytest.approx(spread, rel=0.15)
    within = [getattr(each, name).low <= stated.value <= getattr(each, name).high for each in noisy]
    assert np.mean(within) >= 0.93


def test_what_the_noise_drowns_is_not_stated(make_study: MakeStudy) -> None:
    study = make_study(BINARY)
    labels, chances = drawn(study, 30, 3)
    drowned = metrics.from_cells(study, cells_of(study, chances, labels), 10.0)
    assert drowned.auc is None and drowned.accuracy is None
    nobody = metrics.from_cells(study, np.zeros(metrics.words(study)), 0.0)
    assert nobody.auc is None and nobody.log_loss is None


def test_expected_error_falls_with_patients_and_says_what_it_costs(make_study: MakeStudy) -> None:
    study = make_study(BINARY)
    few, many = (metrics.expected(study, patients, 5.0) for patients in (300, 3000))
    assert many.auc.value == pytest.approx(0.8, abs=0.005)
    assert 8 < few.auc.noise_sd / many.auc.noise_sd < 12


# ----------------------------------------------------------------------------------------------------------- where it lies


def test_cells_are_the_last_of_the_state_and_change_no_weight(make_study: MakeStudy) -> None:
    study = make_study(BINARY)
    size = 4
    state = first_state(np.ones(size, np.float32), study)
    total = np.arange(metrics.words(study), dtype=np.int64) - 3
    for _ in range(study.sums_to_train):
        state = advance(state, total, study, grid_exponent=4, nominal_patients=40)
        assert not state.metrics.any()
    before = released_weights(state, study)
    state = advance(state, total, study, grid_exponent=2, nominal_patients=40)
    np.testing.assert_array_equal(released_weights(state, study), before)
    np.testing.assert_array_equal(state.metrics, (total / 4).astype(np.float32))
    assert state.completed_rounds == study.released_sums == study.training.rounds + 1
    data = state_bytes(state)
    assert len(data) == state_size_bytes(study, size)
    assert state_bytes(parse_state(data, study, size)) == data


def test_released_weights_are_the_mean_of_the_last_rounds_before_the_metrics_too(make_study: MakeStudy) -> None:
    study = make_study(BINARY)
    state = first_state(np.ones(2, np.float32), study)
    state = replace(state, completed_rounds=study.sums_to_train, tail=np.array([4.0, 6.0], np.float32))
    np.testing.assert_array_equal(released_weights(state, study), np.array([2.0, 3.0], np.float32))


@pytest.mark.parametrize(
    "changes", [{"bins": 3}, {"bins": 0}, {"attempts": 0}, {"noise_multiplier": None}, {"range": None}]
)
def test_study_with_unfinished_metrics_is_refused(changes: dict, make_study: MakeStudy) -> None:
    with pytest.raises(ValidationError):
        make_study({"metrics": {**ASKED, **changes}})
