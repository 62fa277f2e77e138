"""Losses that belong to one record each, probabilities, and metrics against scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn

from medfed.models.records import Records
from medfed.models.rowwise import sigmoid, softmax
from medfed.models.tasks import evaluate, losses
from medfed.models.tasks import predictions as probabilities
from medfed.models.tasks.scores import auc, average_precision, calibration_error, f1_macro
from medfed.task_choice import Classification as Task

BINARY = Task(kind="binary", label="y", classes=2)
WEIGHTED = Task(kind="binary", label="y", classes=2, class_weights=[1.0, 4.0])
THREE = Task(kind="multiclass", label="y", classes=3)
THREE_WEIGHTED = Task(kind="multiclass", label="y", classes=3, class_weights=[1.0, 2.0, 0.5])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=2, max_size=40))
def test_auc_equals_scikit_learn_ties_included(rows: list[tuple[bool, int]]) -> None:
    positive = np.array([row[0] for row in rows])
    scores = np.array([row[1] / 4 for row in rows])
    ours = auc(positive, scores)
    if positive.all() or not positive.any():
        assert ours is None
    else:
        assert ours == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)


def test_auc_of_perfect_reversed_and_equal_scores() -> None:
    positive = np.array([False, False, True, True])
    assert auc(positive, np.array([0.1, 0.2, 0.3, 0.4])) == 1.0
    assert auc(positive, np.array([0.4, 0.3, 0.2, 0.1])) == 0.0
    assert auc(positive, np.full(4, 0.5)) == 0.5
    assert auc(np.array([], np.bool_), np.array([])) is None


@pytest.mark.parametrize("task", [BINARY, WEIGHTED, THREE, THREE_WEIGHTED], ids=lambda task: f"{task.kind}")
def test_loss_is_each_records_own(task: Task) -> None:
    """What clipping by patient rests on: a record's loss is the same alone and among others."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, task.outputs, generator=generator)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 1]) * (task.classes - 1)
    together = losses(task)(logits, labels)
    alone = torch.cat([losses(task)(logits[i : i + 1], labels[i : i + 1]) for i in range(7)])
    assert together.shape == (7,)
    assert torch.allclose(together, alone, atol=1e-7)


def test_binary_loss_is_the_cross_entropy() -> None:
    logits, labels = torch.tensor([[0.0], [2.0], [-3.0]]), torch.tensor([1, 0, 1])
    chance = 1 / (1 + np.exp(-np.array([0.0, 2.0, -3.0])))
    expected = -np.log([chance[0], 1 - chance[1], chance[2]])
    assert losses(BINARY)(logits, labels).numpy() == pytest.approx(expected, rel=1e-6)
    assert losses(WEIGHTED)(logits, labels).numpy() == pytest.approx(expected * [4.0, 1.0, 4.0], rel=1e-6)


def test_multiclass_loss_is_the_cross_entropy_with_public_weights() -> None:
    logits, labels = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])
    expected = np.array([np.log(np.exp([1.0, 2.0, 3.0]).sum()) - 1.0, np.log(3.0)])
    assert losses(THREE)(logits, labels).numpy() == pytest.approx(expected, rel=1e-6)
    # weights multiply; they are not divided by their sum over the batch, which would couple patients
    assert losses(THREE_WEIGHTED)(logits, labels).numpy() == pytest.approx(expected * [1.0, 0.5], rel=1e-6)


def test_loss_of_no_records_is_empty() -> None:
    for task in (BINARY, THREE_WEIGHTED):
        assert losses(task)(torch.zeros(0, task.outputs), torch.zeros(0, dtype=torch.int64)).shape == (0,)


class Fixed(nn.Module):
    """Its inputs are its logits."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs


def test_probabilities_sum_to_one_and_switch_training_off() -> None:
    inputs = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    model = nn.Sequential(Fixed(), nn.Dropout(0.9))
    model.train()
    chances = probabilities(model, THREE, inputs)
    assert chances.dtype == np.float64
    assert chances.sum(1) == pytest.approx(np.ones(5))
    assert chances.argmax(1).tolist() == inputs.argmax(1).tolist()
    binary = probabilities(Fixed(), BINARY, inputs[:, :1])
    assert binary.shape == (5, 2)
    assert binary[:, 1] == pytest.approx(1 / (1 + np.exp(-inputs[:, 0].astype(np.float64))))


class Counting(nn.Module):
    """Counts the records of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(inputs))
        return inputs.flatten(1)[:, :1]


def test_probabilities_take_a_bounded_number_of_values_at_a_time() -> None:
    images = np.random.default_rng(2).normal(size=(900, 1, 28, 28)).astype(np.float32)
    model = Counting()
    chances = probabilities(model, BINARY, images)
    assert sum(model.calls) == 900
    assert max(model.calls) * 28 * 28 <= 1 << 17
    assert np.array_equal(chances, probabilities(Fixed(), BINARY, images[:, 0, 0, :1]))
    # a record larger than the bound is taken on its own
    model = Counting()
    probabilities(model, BINARY, np.zeros((3, 1, 600, 600), np.float32))
    assert model.calls == [1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_f1_macro_equals_scikit_learn_absent_classes_included(rows: list[tuple[int, int]]) -> None:
    labels, predicted = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    expected = metrics.f1_score(labels, predicted, average="macro")
    assert f1_macro(labels, predicted) == pytest.approx(expected, abs=1e-12)


def records(inputs: np.ndarray, labels: list[int]) -> Records:
    return Records(inputs.astype(np.float32), np.array(labels, np.int64), tuple(str(n) for n in range(len(labels))))


def test_metrics_equal_scikit_learn() -> None:
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 3, 60)
    inputs = rng.normal(size=(60, 3)) + np.eye(3)[labels]
    scores = evaluate(Fixed(), THREE, records(inputs, list(labels)))
    chances = probabilities(Fixed(), THREE, inputs.astype(np.float32))
    expected = metrics.roc_auc_score(labels, chances / chances.sum(1, keepdims=True), multi_class="ovr")
    assert scores["auc"] == pytest.approx(expected, abs=1e-12)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(labels, chances.argmax(1)))
    assert scores["f1_macro"] == pytest.approx(metrics.f1_score(labels, chances.argmax(1), average="macro"))


def test_metrics_of_a_set_with_one_class_or_none() -> None:
    one = evaluate(Fixed(), BINARY, records(np.array([[1.0], [-1.0]]), [1, 1]))
    assert (one["auc"], one["accuracy"], one["f1"]) == (None, 0.5, pytest.approx(2 / 3))
    assert set(evaluate(Fixed(), BINARY, records(np.zeros((0, 1)), [])).values()) == {None}
    # a class that does not occur is left out of the mean
    two = evaluate(Fixed(), THREE, records(np.eye(3)[[0, 1]], [0, 1]))
    assert (two["auc"], two["accuracy"], two["f1_macro"], two["auprc"]) == (1.0, 1.0, 1.0, 1.0)
    assert set(evaluate(Fixed(), THREE, records(np.zeros((0, 3)), [])).values()) == {None}


def test_weights_that_overflow_say_nothing_on_the_screen() -> None:
    """The coordinator chooses the weights; whatever comes of them is no number, and a hospital's terminal stays clean."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for columns in (1, 3):
            logits = np.array([[np.inf, -np.inf, np.nan][:columns], [1e308, -1e308, 0.0][:columns]])
            softmax(logits)
            sigmoid(logits)


def test_area_under_precision_and_recall_equals_scikit_learn_ties_included() -> None:
    draw = np.random.default_rng(4)
    for _ in range(50):
        positive, scores = draw.random(30) < 0.3, draw.integers(0, 8, 30) / 8
        if positive.any():
            expected = metrics.average_precision_score(positive, scores)
            assert average_precision(positive, scores) == pytest.approx(expected, abs=1e-12)
    assert average_precision(np.zeros(3, np.bool_), np.zeros(3)) is None


def test_calibration_error_is_the_gap_between_how_sure_and_how_right() -> None:
    sure = np.array([0.95] * 10 + [0.65] * 10)
    right = np.array([True] * 9 + [False] + [True] * 2 + [False] * 8)
    assert calibration_error(right, sure) == pytest.approx(0.5 * 0.05 + 0.5 * 0.45)
    assert calibration_error(np.array([True]), np.array([1.0])) == 0.0


FOCAL = [Task(kind="binary", label="y", classes=2, focusing=gamma) for gamma in (0.5, 2.0)] + [
    Task(kind="multiclass", label="y", classes=3, focusing=2.0, class_weights=[1.0, 2.0, 0.5])
]
PRIORS = [
    Task(kind="binary", label="y", classes=2, priors=[0.9, 0.1]),
    Task(kind="multiclass", label="y", classes=3, priors=[0.7, 0.2, 0.1]),
]


@pytest.mark.parametrize("task", [*FOCAL, *PRIORS], ids=str)
def test_focal_and_adjusted_losses_have_the_gradient_of_their_definition(task: Task) -> None:
    logits = torch.randn(9, task.outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.arange(9) % task.classes
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses(task)(one, labels).sum().backward()
    seen = other
    if task.priors is not None:
        logs = torch.tensor(task.priors, dtype=torch.float64).log()
        seen = other + (logs[1] - logs[0] if task.kind == "binary" else logs)
    both = torch.cat([torch.zeros_like(seen), seen], 1) if task.kind == "binary" else seen
    chance = both.softmax(1).gather(1, labels[:, None])[:, 0]
    weights = torch.tensor(task.class_weights or [1.0] * task.classes, dtype=torch.float64)[labels]
    each = -chance.log() * (1 - chance) ** (task.focusing or 0.0) * weights
    each.sum().backward()
    assert torch.allclose(losses(task)(logits, labels), each.detach(), atol=1e-12)
    assert torch.allclose(one.grad, other.grad, atol=1e-10)


@pytest.mark.parametrize("task", [*FOCAL, *PRIORS, THREE_WEIGHTED], ids=str)
def test_losses_gradient_of_a_record_is_the_same_bits_in_any_batch(task: Task) -> None:
    draw = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(67, task.outputs, generator=draw)
    labels = torch.randint(task.classes, (67,), generator=draw)
    whole = logits.clone().requires_grad_()
    losses(task)(whole, labels).sum().backward()
    order = torch.randperm(67, generator=draw)
    for rows in (order, order[:13], order[13:14]):
        part = logits[rows].clone().requires_grad_()
        losses(task)(part, labels[rows]).sum().backward()
        assert torch.equal(part.grad, whole.grad[rows])


def test_prior_adjusted_model_says_what_equally_common_classes_would_have_it() -> None:
    """At the minimum the adjusted logits are the true log odds, so that the model's own are free of the priors."""
    task = PRIORS[0]
    logit = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0] * 9 + [1])
    for _ in range(400):
        (gradient,) = torch.autograd.grad(losses(task)(logit.expand(10, 1), labels).mean(), logit)
        logit = (logit - 5.0 * gradient).detach().requires_grad_()
    assert logit.item() == pytest.approx(0.0, abs=1e-6)
