"""Statistics before round 1: what a patient adds, what everybody computes of the sum, and the model that comes out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medfed import standardization
from medfed.advance import (
    advance,
    first_state,
    parse_state,
    released_weights,
    state_bytes,
    state_hash,
    state_size_bytes,
    task_hash,
)
from medfed.errors import RemoteProtocolError
from medfed.models import catalogue, parameters
from medfed.study import Study

MakeStudy = Callable[..., Study]
STATISTICS = {"statistics": {"noise_multiplier": 4.0, "attempts": 2, "least_scale": 0.01, "range": 16.0}}
# age in years [0, 120] centered at 60 by 20; lactate [0, 30] at 2 by 2; ventilated is a category
HALVES = [(60.0, 60.0), (15.0, 15.0)]
CONSTANTS = [(60.0, 20.0), (2.0, 2.0)]


def encoded(values: list[list[float]]) -> np.ndarray:
    """Rows of (age, lactate, ventilated) as the study encodes them."""
    rows = [
        [*((v - c) / s for v, (c, s) in zip(row, CONSTANTS, strict=False)), (row[2] - 0.25) / 0.5] for row in values
    ]
    return np.array(rows, np.float32)


# ------------------------------------------------------------------------------------------------------ what patients add


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), records=st.integers(1, 30), spread=st.sampled_from([0.1, 3.0, 1e6]))
def test_no_patient_adds_more_than_the_bound(seed: int, records: int, spread: float, make_study: MakeStudy) -> None:
    """However many records, and whatever an encoder let through."""
    study, rng = make_study(STATISTICS), np.random.default_rng(seed)
    inputs = (spread * rng.normal(size=(records + 3, 3))).astype(np.float32)
    unit = np.concatenate([np.zeros(records, np.int64), [1, 1, 2]])
    shares = standardization.shares(study, inputs, unit, 3)
    assert shares.shape == (3, 5) == (3, standardization.words(study))
    assert (np.linalg.norm(shares, axis=1) <= standardization.most_of_one_patient(study) * (1 + 1e-15)).all()
    assert np.abs(shares).max() <= 1.0
    without = standardization.shares(study, inputs[records:], unit[records:] - 1, 2)
    assert without.tobytes() == shares[1:].tobytes(), "nobody's share looks at another patient"


def test_shares_are_means_over_a_patients_records(make_study: MakeStudy) -> None:
    inputs = encoded([[30, 6, 1], [90, 12, 0], [60, 0, 1]])
    shares = standardization.shares(make_study(STATISTICS), inputs, np.array([1, 1, 0]), 2)
    np.testing.assert_allclose(shares[0], [0.0, -1.0, 0.0, 1.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(shares[1], [0.0, -0.4, 0.25, (0.36 + 0.04) / 2, 1.0], atol=1e-6)


# --------------------------------------------------------------------------------------------------- what everybody finds


def plain(total: list[float], least: float) -> list[float]:
    """The same in plain Python floats."""
    patients, shifts, stretches = max(total[4], 1.0), [], []
    for place in range(2):
        center, scale = CONSTANTS[place]
        low, high = (0.0 - center) / scale, (2 * HALVES[place][1] - center) / scale
        middle, half = low / 2.0 + high / 2.0, high / 2.0 - low / 2.0
        mean = min(max(total[place] / patients, -1.0), 1.0)
        variance = total[2 + place] / patients - mean * mean
        shifts.append(middle + mean * half)
        stretches.append(math.sqrt(min(max(variance, least * least), 1.0)) * half)
    return [float(np.float32(value)) for value in [*shifts, *stretches]]


@settings(max_examples=100, deadline=None)
@given(total=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=5, max_size=5), exponent=st.integers(0, 30))
def test_statistics_of_any_sum_are_the_plain_ones_bit_for_bit(
    total: list[int], exponent: int, make_study: MakeStudy
) -> None:
    """Whatever the noise made of it: finite, in range, never a stretch of nothing."""
    study = make_study(STATISTICS)
    before = first_state(np.ones(4, np.float32), study)
    after = advance(before, np.array(total), study, grid_exponent=exponent, nominal_patients=26)
    assert after.statistics.tolist() == plain([float(each) * 2.0**-exponent for each in total], 0.01)
    assert (after.statistics[2:] > 0).all()
    again = parse_state(state_bytes(after), study, 4)
    assert state_bytes(again) == state_bytes(after)


def test_statistics_are_mean_and_deviation(make_study: MakeStudy) -> None:
    """Of one record a patient: those of numpy, in units of the encoded inputs."""
    study, rng = make_study(STATISTICS), np.random.default_rng(2)
    values = np.stack([rng.uniform(20, 100, 500), rng.uniform(0, 20, 500), rng.integers(0, 2, 500)], axis=1)
    inputs = encoded(values.tolist())
    total = standardization.shares(study, inputs, np.arange(500), 500).sum(axis=0)
    found = standardization.from_sum(study, total)
    np.testing.assert_allclose(found, [*inputs[:, :2].mean(axis=0), *inputs[:, :2].std(axis=0)], rtol=1e-5, atol=1e-5)
    changed = standardization.standardized(study, found, inputs)
    np.testing.assert_allclose(changed[:, :2].mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(changed[:, :2].std(axis=0), 1.0, atol=1e-5)
    assert changed[:, 2].tobytes() == inputs[:, 2].tobytes(), "categories stay as the study encodes them"


# ------------------------------------------------------------------------------------------------------------ the state


def test_first_round_finds_the_statistics_and_changes_nothing_else(make_study: MakeStudy) -> None:
    study = make_study(STATISTICS)
    assert (study.released_sums, study.attempts) == (4, 7)
    before = first_state(np.array([1.0, 2.0, 3.0, 4.0], np.float32), study)
    assert before.statistics.tolist() == [0.0, 0.0, 1.0, 1.0]
    after = advance(before, np.array([3, -8, 9, 40, 100]), study, grid_exponent=3, nominal_patients=26)
    assert after.completed_rounds == 1
    assert after.statistics.tolist() != before.statistics.tolist()
    assert all(
        getattr(after, name).tobytes() == getattr(before, name).tobytes() for name in ("weights", "first", "tail")
    )


def test_rounds_after_it_are_those_of_a_study_without(make_study: MakeStudy) -> None:
    """Same rates, same averaging, one number later; a sum longer than the model is read as far as the model goes."""
    with_them, without = make_study(STATISTICS), make_study()
    one = advance(
        first_state(np.zeros(4, np.float32), with_them), np.arange(5), with_them, grid_exponent=2, nominal_patients=9
    )
    other = first_state(np.zeros(4, np.float32), without)
    for total in ([5, -7, 1, 0, 99], [2, 2, -2, 8, 99], [1, 0, 4, -4, 99]):
        one = advance(one, np.array(total), with_them, grid_exponent=3, nominal_patients=9)
        other = advance(other, np.array(total), without, grid_exponent=3, nominal_patients=9)
        assert one.completed_rounds == other.completed_rounds + 1
        assert all(
            getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in ("weights", "first", "tail")
        )
    plain_model = released_weights(replace(other), without)
    assert (
        released_weights(replace(one, statistics=standardization.neutral(with_them)), with_them).tolist()
        == plain_model.tolist()
    )


def test_statistics_are_bound_into_the_task(make_study: MakeStudy) -> None:
    study = make_study(STATISTICS)
    state = first_state(np.zeros(4, np.float32), study)
    other = replace(state, statistics=np.nextafter(state.statistics, np.float32(9)))
    name = hashlib.sha256(b"study").digest()
    assert state_hash(name, state) != state_hash(name, other)
    assert task_hash(name, state) != task_hash(name, other)
    assert len(state_bytes(state)) == state_size_bytes(study, 4) == 13 + 4 * (3 * 4 + 4)


def test_state_without_the_statistics_a_study_needs_is_refused(make_study: MakeStudy) -> None:
    bare, asking = make_study(), make_study(STATISTICS)
    data = state_bytes(first_state(np.zeros(4, np.float32), bare))
    with pytest.raises(RemoteProtocolError, match="MF-150"):
        parse_state(data, asking, 4)
    with pytest.raises(RemoteProtocolError, match="MF-150"):
        parse_state(state_bytes(first_state(np.zeros(4, np.float32), asking)), bare, 4)


# -------------------------------------------------------------------------------------------------- the released model


@pytest.mark.parametrize(
    "model",
    [
        {"name": "logistic-regression", "hidden": [], "first_model_sha256": "ab" * 32},
        {"name": "mlp", "hidden": [5, 3], "first_model_sha256": "ab" * 32},
    ],
)
@pytest.mark.parametrize("task", [{"kind": "binary", "classes": 2}, {"kind": "multiclass", "classes": 3}])
def test_released_model_takes_plain_inputs(
    model: dict[str, object], task: dict[str, object], make_study: MakeStudy
) -> None:
    """The trained model on standardised inputs and the released one on plain inputs say the same."""
    study = make_study({**STATISTICS, "model": model, "task": {"label": "ill", **task}})
    trained = catalogue.build(study)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
    weights = parameters.flatten(trained)
    statistics = np.array([0.7, -3.0, 0.25, 2.5], np.float32)
    inputs = np.random.default_rng(3).normal(size=(40, 3)).astype(np.float32)
    state = replace(first_state(weights, study), completed_rounds=1, statistics=statistics)
    released = catalogue.build(study)
    parameters.assign(released, released_weights(state, study))
    with torch.no_grad():
        expected = trained(torch.from_numpy(standardization.standardized(study, statistics, inputs)))
        found = released(torch.from_numpy(inputs))
    assert not torch.allclose(trained(torch.from_numpy(inputs)), expected, atol=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ the study


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"statistics": {**STATISTICS["statistics"], "range": None}}, "statistics.range is missing"),
        ({"statistics": {**STATISTICS["statistics"], "attempts": 0}}, "attempts"),
        ({"statistics": {**STATISTICS["statistics"], "noise_multiplier": 0.1}}, "noise_multiplier"),
        ({"statistics": {**STATISTICS["statistics"], "least_scale": 0.0}}, "least_scale"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(changes: dict[str, object], why: str, make_study: MakeStudy) -> None:
    with pytest.raises(ValidationError, match=why):
        make_study(changes)


@pytest.mark.parametrize(
    "range_of_age",
    [
        {"minimum": 0.0, "maximum": 1e-5, "center": -(2.0**39), "scale": 1.0},  # one number as float64: 0 / 0
        {"minimum": 0.0, "maximum": 1e-3, "center": 1e5, "scale": 1.0},  # one number as float32
        {"minimum": 0.0, "maximum": 1e-300, "center": 0.0, "scale": 1e12},
    ],
)
def test_range_that_rounding_closes_is_refused(range_of_age: dict[str, float], make_study: MakeStudy) -> None:
    """Else a patient with a value makes the sum no number, one without does not: who answers would tell which."""
    changes = {f"data.features.0.{key}": value for key, value in range_of_age.items()}
    make_study(changes)
    with pytest.raises(ValidationError, match="cannot tell the ends of age's range apart"):
        make_study({**changes, **STATISTICS})


def test_statistics_need_a_number(make_study: MakeStudy, study_values: dict[str, dict[str, object]]) -> None:
    category = study_values["data"]["features"][2]
    with pytest.raises(ValidationError, match="numeric features"):
        make_study({**STATISTICS, "data.features": [category]})


def test_study_without_statistics_has_none_of_it(make_study: MakeStudy) -> None:
    study = make_study()
    assert (standardization.words(study), study.released_sums, study.attempts) == (0, 3, 5)
    assert first_state(np.zeros(4, np.float32), study).statistics.size == 0
