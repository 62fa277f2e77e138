"""A model's chances: what the study's public constants did to them is taken back, and a hospital's own two numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medfed.errors import DataError, MedfedError
from medfed.models.calibration import FEWEST_OF_A_CLASS, LocalCalibration, calibrated, fit_local
from medfed.models.tasks import meaning
from medfed.task_choice import Classification, MultiLabel, Survival

BINARY = {"kind": "binary", "label": "ill", "classes": 2}
THREE = {"kind": "multiclass", "label": "ill", "classes": 3}


def task_of(values, **changes):
    return Classification.model_validate(values | changes)


def least_of(task, truth):
    """Outputs of the least expected loss where the classes' chances are ``truth``: what a perfect model would learn."""
    outputs = torch.zeros(1, task.outputs, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(task.classes)
    weights = torch.tensor(truth, dtype=torch.float64)
    step = torch.optim.LBFGS([outputs], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        step.zero_grad()
        total = (meaning(task).losses()(outputs.expand(task.classes, -1), labels) * weights).sum()
        total.backward()
        return total

    step.step(loss)
    return outputs.detach().numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_weights": [1.0, 6.0]},
        {"priors": [0.9, 0.1]},
        {"focusing": 2.0},
        {"focusing": 0.5, "class_weights": [0.5, 3.0], "priors": [0.8, 0.2]},
    ],
)
@pytest.mark.parametrize("chance", [0.04, 0.3, 0.75])
def test_calibrated_chances_of_a_binary_model_that_learned_perfectly_are_the_true_ones(changes, chance):
    task = task_of(BINARY, **changes)
    found = calibrated(task, meaning(task).predictions(least_of(task, [1 - chance, chance])))
    assert found[0] == pytest.approx([1 - chance, chance], abs=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_weights": [1.0, 4.0, 0.5]},
        {"priors": [0.7, 0.2, 0.1]},
        {"focusing": 1.5, "class_weights": [1.0, 2.0, 3.0], "priors": [0.5, 0.3, 0.2]},
    ],
)
def test_calibrated_chances_of_several_classes_are_the_true_ones(changes):
    task, truth = task_of(THREE, **changes), [0.6, 0.3, 0.1]
    found = calibrated(task, meaning(task).predictions(least_of(task, truth)))
    assert found[0] == pytest.approx(truth, abs=2e-4)


def test_class_weights_left_in_would_be_wrong():
    """The positive control: the model's own chances are not the true ones."""
    task = task_of(BINARY, class_weights=[1.0, 6.0])
    assert meaning(task).predictions(least_of(task, [0.9, 0.1]))[0, 1] == pytest.approx(0.6 / 1.5, abs=1e-3)


def test_chances_without_public_constants_stay_the_same_bits():
    chances = np.array([[0.25, 0.75], [0.0, 1.0]])
    assert calibrated(task_of(BINARY), chances) is chances


@given(st.floats(0.0, 1.0), st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_calibrated_chances_sum_to_one_and_are_finite(chance, one, other):
    found = calibrated(task_of(BINARY, class_weights=[one, other], focusing=1.3), np.array([[1 - chance, chance]]))
    assert np.isfinite(found).all() and found.sum() == pytest.approx(1.0)


def test_findings_lose_their_positive_weights():
    task = MultiLabel.model_validate({"kind": "multilabel", "labels": ["a", "b"], "positive_weights": [3.0, 1.0]})
    # least of 3 p log q + (1 - p) log(1 - q): odds three times as high
    found = calibrated(task, np.array([[0.5, 0.5]]))
    assert found[0] == pytest.approx([0.25, 0.5])


def test_predictions_that_are_no_chances_of_classes_stay_as_they_are():
    values = {"kind": "survival", "time": "t", "event": "e", "unit": "d", "head": "weibull", "edges": [1.0]}
    task, predictions = Survival.model_validate(values), np.array([[0.3]])
    assert calibrated(task, predictions) is predictions


# ------------------------------------------------------------------------------------------------ a hospital's own part


def shifted(slope, offset, count=4000):
    """Chances that are wrong by a slope and an offset, and the labels of the right ones."""
    odds = np.linspace(-4.0, 4.0, count)
    right = 1 / (1 + np.exp(-(slope * odds + offset)))
    labels = (((np.arange(count) * 0.6180339887) % 1.0) < right).astype(np.int64)
    chances = 1 / (1 + np.exp(-odds))
    return np.stack([1 - chances, chances], 1), labels


def test_local_calibration_of_a_binary_task_finds_slope_and_offset():
    chances, labels = shifted(0.5, -0.8)
    found = fit_local(task_of(BINARY), chances, labels)
    assert found.kind == "platt"
    assert (found.slope, found.offset) == pytest.approx((0.5, -0.8), abs=0.05)
    assert found.apply(chances)[:, 1].mean() == pytest.approx(labels.mean(), abs=1e-3)


def test_local_calibration_of_several_classes_finds_the_temperature():
    logits = np.stack([np.sin(np.arange(3000) * k) * 3 for k in (1.0, 2.3, 3.7)], 1)
    right = np.exp(logits / 2.0)
    right /= right.sum(1, keepdims=True)
    places = (np.arange(3000) * 0.6180339887) % 1.0
    labels = (places[:, None] > right.cumsum(1)).sum(1).clip(0, 2).astype(np.int64)
    sure = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = fit_local(task_of(THREE), sure, labels)
    assert (found.kind, found.offset) == ("temperature", 0.0)
    assert found.slope == pytest.approx(0.5, abs=0.05)


def test_local_calibration_keeps_the_order_of_records():
    chances, labels = shifted(1.0, 0.0, 200)
    found = fit_local(task_of(BINARY), chances, 1 - labels)  # a model that is worse than guessing here
    assert found.slope > 0
    assert (np.diff(found.apply(chances)[:, 1]) >= 0).all()


def test_local_calibration_of_labels_that_chances_separate_stays_finite():
    chances = np.array([[0.9, 0.1]] * 20 + [[0.1, 0.9]] * 20)
    found = fit_local(task_of(BINARY), chances, np.array([0] * 20 + [1] * 20))
    assert math.isfinite(found.slope) and math.isfinite(found.offset)
    assert 0.9 < found.apply(chances)[-1, 1] < 1.0


def test_too_few_labelled_records_are_refused():
    labels = np.array([0] * 100 + [1] * (FEWEST_OF_A_CLASS - 1))
    with pytest.raises(DataError) as caught:
        fit_local(task_of(BINARY), np.full((len(labels), 2), 0.5), labels)
    assert caught.value.code == 310


def test_a_task_without_classes_is_refused():
    task = MultiLabel.model_validate({"kind": "multilabel", "labels": ["a"]})
    with pytest.raises(MedfedError) as caught:
        fit_local(task, np.full((50, 1), 0.5), np.zeros(50, np.int64))
    assert caught.value.code == 203


def test_local_calibration_of_nothing_to_correct_changes_nothing():
    chances = np.array([[0.2, 0.8], [1e-15, 1.0]])
    assert LocalCalibration("platt", 1.0, 0.0).apply(chances) == pytest.approx(chances, abs=1e-11)
