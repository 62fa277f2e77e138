"""Training on at one hospital: it learns what is there, leaves alone what is not, and repeats."""

import numpy as np
import pytest

from medfed.models import fine_tuning
from medfed.models.fine_tuning import FOLDS, tune
from medfed.models.records import Records


def records_of(count, wanted, seed=1, each=1):
    """Three inputs, labels by the first of them where ``wanted``, else of nothing."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(count, 3)).astype(np.float32)
    chance = 1 / (1 + np.exp(-3.0 * inputs[:, 0])) if wanted else np.full(count, 0.5)
    labels = (generator.random(count) < chance).astype(np.int64)
    return Records(inputs, labels, tuple(f"p{row // each}" for row in range(count)))


START = np.zeros(4, np.float32)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Fewer passes than in earnest."""
    monkeypatch.setattr(fine_tuning, "PASSES", (1, 4, 16))


def test_tuning_learns_what_the_records_say(make_study):
    found = tune(make_study(), START, records_of(150, wanted=True))
    assert found.passes > 0 and found.loss_after < 0.5 < found.loss_before
    assert found.weights[0] > 1.0 and abs(found.weights[1]) < 0.7


def test_tuning_on_noise_leaves_the_weights_as_they_are(make_study):
    found = tune(make_study(), START, records_of(60, wanted=False, seed=4))
    assert found.loss_after <= found.loss_before
    assert np.abs(found.weights).max() < 0.15


def test_tuning_repeats_bit_for_bit(make_study):
    one, other = (
        tune(make_study({"model.name": "mlp", "model.hidden": [4]}), _mlp(), records_of(60, True)) for _ in "ab"
    )
    assert (one.weights == other.weights).all() and one.passes == other.passes


def _mlp():
    return np.random.default_rng(2).normal(scale=0.4, size=4 * 4 + 5).astype(np.float32)


def test_tuning_changes_neither_start_nor_records(make_study):
    start, records = START.copy(), records_of(40, True)
    before = records.inputs.copy()
    tune(make_study(), start, records)
    assert (start == START).all() and (records.inputs == before).all()


def test_all_records_of_a_patient_are_in_one_fold():
    patients = tuple(f"p{row // 3}" for row in range(60))
    fold = fine_tuning._folds(patients)
    assert all(len(set(fold[3 * place : 3 * place + 3].tolist())) == 1 for place in range(20))
    assert np.bincount(fold, minlength=FOLDS).min() >= 18


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_every_pass_takes_each_record_once_in_another_order(count):
    orders = [np.concatenate(list(fine_tuning._batches(count, number))).tolist() for number in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 10 or len({tuple(order) for order in orders}) == 3


def test_rate_that_diverges_is_given_up(make_study, monkeypatch):
    monkeypatch.setattr(fine_tuning, "RATES", (1e30,))
    found = tune(make_study(), START, records_of(40, True))
    assert found.passes == 0 and (found.weights == START).all()
