"""The baseline without privacy: the study's recipe on everybody's data, its length chosen without test patients."""

import numpy as np
import pytest

from medfed.models.records import Records
from medfed.simulations.pooled import FOLDS, _folds, lengths, pooled_records, score, train_pooled
from medfed.task_choice import Classification

BINARY = Classification(kind="binary", label="ill", classes=2)


def plain_logistic(study, records, rounds):
    """Heavy-ball gradient descent on the mean over patients of each one's mean log-loss, in plain float64."""
    inputs, labels = records.inputs.astype(float), records.labels.astype(float)
    names = np.array(records.patients)
    share = np.array([1.0 / (names == name).sum() for name in names])
    weights, velocity, tail = np.zeros(inputs.shape[1] + 1), 0.0, []
    design = np.hstack([inputs, np.ones((len(inputs), 1))])
    for number in range(1, rounds + 1):
        slope = (1.0 / (1.0 + np.exp(-design @ weights)) - labels) * share
        velocity = study.training.server_step.momentum * velocity + design.T @ slope / len(set(names))
        weights = weights - study.training.learning_rate(number) * velocity
        tail.append(weights)
    return np.mean(tail[-study.training.average_last_rounds :], 0)


def make_records(count, strength, seed=5, repeats=1):
    """Records with three inputs, the first of which says something about the label."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    inputs = generator.normal(size=(count, 3))
    inputs[:, 0] += strength * labels
    names = tuple(f"p{row // repeats}" for row in range(count))
    return Records(inputs.astype(np.float32), labels.astype(np.int64), names)


def first_of(study):
    return np.zeros(study.data.inputs + 1, np.float32)


@pytest.mark.parametrize("repeats", [1, 3])
def test_pooled_training_equals_a_plain_loop_of_the_recipe(make_study, repeats):
    study = make_study()
    records = make_records(90, 1.0, repeats=repeats)
    trained = train_pooled(study, first_of(study), records)
    expected = plain_logistic(study, records, trained.rounds)
    np.testing.assert_allclose(trained.weights, expected, rtol=2e-4, atol=2e-5)
    # the control: one round less is another model
    assert np.abs(trained.weights - plain_logistic(study, records, trained.rounds - 1)).max() > 1e-4


def test_pooled_length_is_the_best_in_cross_validation(make_study):
    study = make_study()
    trained = train_pooled(study, first_of(study), make_records(90, 1.0))
    assert trained.lengths == lengths(study) == (3, 30, 120)
    assert trained.rounds == trained.lengths[max(range(3), key=lambda place: (trained.validation[place], place))]


def test_pooled_length_of_a_recipe_that_stops_too_early_is_longer(make_study):
    """The first weights point the wrong way, and the recipe's few small steps cannot turn them."""
    study = make_study({"training.learning_rates": [[1, 0.01]]})
    wrong = np.array([-1.0, 0.0, 0.0, 0.0], np.float32)
    records = make_records(120, 3.0)
    trained = train_pooled(study, wrong, records)
    assert trained.rounds == 120
    assert score(study, trained.weights, records) > 0.9
    assert trained.validation[0] < 0.2 < 0.9 < trained.validation[2]


def test_pooled_length_that_diverges_is_not_chosen(make_study):
    """Adam's opposite: heavy steps with much momentum on inputs a thousand times too large leave the numbers."""
    study = make_study({"training.learning_rates": [[1, 1e6]], "training.server_step.momentum": 0.999})
    records = make_records(60, 1.0)
    huge = Records(records.inputs * np.float32(1e30), records.labels, records.patients)
    trained = train_pooled(study, first_of(study), huge)
    assert trained.validation[2] == 0.0


def test_pooled_length_of_equals_is_the_longest(make_study):
    study = make_study()
    records = make_records(60, 30.0)
    trained = train_pooled(study, first_of(study), records)
    assert trained.validation == (1.0, 1.0, 1.0)
    assert trained.rounds == 120


def test_pooled_folds_keep_patients_whole_and_classes_even():
    records = make_records(300, 1.0, repeats=2)
    fold = _folds(BINARY, records)
    names = np.array(records.patients)
    assert all(len(set(fold[names == name])) == 1 for name in set(names))
    shares = [records.labels[fold == number].mean() for number in range(FOLDS)]
    assert max(shares) - min(shares) < 0.12
    assert set(fold) == set(range(FOLDS))


def test_pooled_folds_do_not_depend_on_the_order_of_hospitals():
    one, two = make_records(40, 1.0), make_records(30, 1.0, seed=6)
    two = Records(two.inputs, two.labels, tuple(f"q{name}" for name in two.patients))
    here, there = pooled_records([one, two]), pooled_records([two, one])
    first = dict(zip(here.patients, _folds(BINARY, here).tolist(), strict=True))
    assert first == dict(zip(there.patients, _folds(BINARY, there).tolist(), strict=True))


def test_pooled_lengths_of_a_long_recipe_are_bounded(make_study):
    assert lengths(make_study({"training.rounds": 2000})) == (2000, 3000)
    assert lengths(make_study({"training.rounds": 5000})) == (5000,)


def test_pooled_training_on_one_class_is_undefined_but_ends(make_study):
    study = make_study()
    records = make_records(20, 1.0)
    same = Records(records.inputs, np.ones(20, np.int64), records.patients)
    trained = train_pooled(study, first_of(study), same)
    assert trained.validation == (None, None, None)
    assert np.isfinite(trained.weights).all()
