"""Clipped sums in batches of one shape: against a float64 loop of one record at a time, and the bits of patients' means."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from medfed.errors import LocalProtocolError, UnsupportedModel
from medfed.models import convolutional, recurrent, transformer
from medfed.privacy.gradients.fixed_batches import clipped_sum_in_fixed_batches, steady_arithmetic
from medfed.privacy.gradients.opacus_engine import CLIPPING_MARGIN

RECORDS = 70
CPU = torch.device("cpu")


def binary_losses(logits, labels):
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")


def class_losses(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def make(family):
    """model at random weights, losses, inputs, labels of 70 records."""
    torch.manual_seed(3)
    outcome, classes = torch.randint(0, 2, (RECORDS,)), torch.randint(0, 3, (RECORDS,))
    if family == "cnn":
        model = convolutional.cnn(9, 8, 1, [4, 8], 2, 2, "places")
        found = model, binary_losses, torch.randn(RECORDS, 1, 9, 8), outcome
    elif family == "transformer":
        tokens = torch.randint(1, 30, (RECORDS, 10))
        tokens[torch.arange(10) >= torch.randint(1, 11, (RECORDS, 1))] = 0
        found = transformer.TextTransformer(30, 3, 8, 2, 1, 12), class_losses, tokens, classes
    else:
        model = recurrent.Recurrent(family, 3, 2, 3, 5, 2, True)
        series = torch.randn(RECORDS, 6, 9)
        series[:, :, 6] = (torch.arange(6) < torch.randint(1, 7, (RECORDS, 1))).float()
        found = model, class_losses, series, classes
    with torch.no_grad():
        for weight in found[0].parameters():
            weight += 0.3 * torch.randn(weight.shape)
    return found


FAMILIES = ["cnn", "lstm", "gru", "transformer"]


def owners():
    """Uneven and in mixed order: patient 1 has far more records than a batch holds, most others one to three."""
    generator = np.random.default_rng(9)
    return np.where(generator.random(RECORDS) < 0.4, 1, generator.integers(2, 25, RECORDS)).astype(np.int64)


def means_one_by_one(model, losses, inputs, labels, patients):
    """Each patient's mean gradient by a float64 loop of one record at a time, without any engine: float64[patients, d]."""
    double = copy.deepcopy(model).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    weights, means = list(double.parameters()), []
    for patient in np.unique(patients):
        gradient = 0.0
        rows = np.flatnonzero(patients == patient).tolist()
        for row in rows:
            loss = losses(double(inputs[row : row + 1]), labels[row : row + 1])[0]
            gradient = gradient + torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]) / len(rows)
        means.append(gradient.numpy())
    return np.array(means)


def clipped(means, clipping_norm):
    norms = np.linalg.norm(means, axis=1)
    return (means * np.minimum(1.0, clipping_norm / norms)[:, None]).sum(0)


def summed(model, losses, inputs, labels, patients, clipping_norm, batch=8, chosen=None):
    chosen = np.arange(len(patients)) if chosen is None else chosen
    return clipped_sum_in_fixed_batches(
        model, losses, inputs, labels, patients, chosen, clipping_norm, batch=batch, device=CPU
    )


def relative(first, second):
    return np.linalg.norm(first - second) / np.linalg.norm(second)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_sum_equals_float64_loop_of_one_record(family, batch):
    model, losses, inputs, labels = make(family)
    patients = owners()
    means = means_one_by_one(model, losses, inputs, labels, patients)
    bound = float(np.median(np.linalg.norm(means, axis=1))) * 1.01
    expected = clipped(means, bound)
    result = summed(model, losses, inputs, labels, patients, bound * (1 + CLIPPING_MARGIN), batch)
    assert result.dtype == np.float64
    assert relative(result, expected) < 1e-5
    # the control: a clipping norm 5 % off is seen
    assert relative(clipped(means, bound * 1.05), expected) > 1e-3


def test_only_chosen_records_count():
    model, losses, inputs, labels = make("cnn")
    patients = owners()
    chosen = np.flatnonzero(np.random.default_rng(2).random(RECORDS) < 0.5)
    result = summed(model, losses, inputs, labels, patients, 0.4, chosen=np.random.default_rng(3).permutation(chosen))
    means = means_one_by_one(model, losses, inputs[chosen], labels[chosen], patients[chosen])
    assert relative(result, clipped(means, 0.4 / (1 + CLIPPING_MARGIN))) < 1e-5


def test_sum_of_nobody_is_zero():
    model, losses, inputs, labels = make("lstm")
    result = summed(model, losses, inputs, labels, owners(), 1.0, chosen=np.zeros(0, np.int64))
    assert result.shape == (sum(weight.numel() for weight in model.parameters()),)
    assert not result.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("patient", [1, 13])
def test_patient_that_is_not_finite_contributes_zero(bad, patient):
    """Patient 1 runs through several batches, 13 lies in one."""
    model, losses, inputs, labels = make("cnn")
    patients = owners()
    with torch.no_grad():
        model[0].weight *= 1e3
    inputs[np.flatnonzero(patients == patient)[0]] = bad
    result = summed(model, losses, inputs, labels, patients, 0.3)
    expected = summed(model, losses, inputs, labels, patients, 0.3, chosen=np.flatnonzero(patients != patient))
    assert np.isfinite(result).all()
    assert relative(result, expected) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_patient_of_many_records_moves_the_sum_by_at_most_the_clipping_norm(family):
    model, losses, inputs, labels = make(family)
    patients = owners()
    whole = summed(model, losses, inputs, labels, patients, 0.01)
    without = summed(model, losses, inputs, labels, patients, 0.01, chosen=np.flatnonzero(patients != 1))
    assert 0.009 < np.linalg.norm(whole - without) <= 0.01


class Product(nn.Module):
    """A record's gradient is its input, to the last bit."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, inputs):
        return self.layer(inputs)


def test_patients_mean_is_the_same_bits_wherever_batches_end():
    """1e30 and -1e30 leave of the 3 between or after them what the order makes of it: by the order of rows, always."""
    values = [1e30, 3.0, -1e30, 3.0]
    for batch in (1, 2, 3, 4, 8):
        for others in range(5):
            inputs = torch.tensor([0.0] * others + values)[:, None]
            patients = np.array([*range(others), *[others] * 4])
            labels = torch.zeros(len(inputs))
            result = summed(Product(), lambda logits, _: logits[:, 0], inputs, labels, patients, 100.0, batch)
            assert result.tolist() == [0.75]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family):
    model, losses, inputs, labels = make(family)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    summed(model, losses, inputs, labels, owners(), 0.1)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None and not hasattr(weight, "grad_sample") for weight in model.parameters())


def test_steady_arithmetic_is_undone():
    threads = torch.get_num_threads()
    small = torch.tensor(1e-39)
    with steady_arithmetic():
        assert torch.get_num_threads() == 1
        assert float(small * 1.0) == 0.0
        with steady_arithmetic():
            pass
        assert float(small * 1.0) == 0.0
    assert torch.get_num_threads() == threads
    assert float(small * 1.0) > 0.0


def test_a_model_that_mixes_records_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    with pytest.raises(UnsupportedModel, match="MF-160 1: BatchNorm1d"):
        summed(model, binary_losses, torch.zeros(2, 3), torch.zeros(2), np.arange(2), 1.0)


@pytest.mark.parametrize(("labels", "norm"), [(3, 1.0), (2, 0.0), (2, math.nan)])
def test_arguments_that_do_not_fit_are_refused(labels, norm):
    with pytest.raises(LocalProtocolError, match="MF-180"):
        summed(nn.Linear(3, 1), binary_losses, torch.zeros(2, 3), torch.zeros(labels), np.arange(2), norm)
