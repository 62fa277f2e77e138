"""The clipped sum against a float64 loop over patients, and the bound it promises."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medfed.errors import LocalProtocolError, UnsupportedModel
from medfed.privacy.gradients.opacus_engine import CLIPPING_MARGIN, clipped_sum, refuse_unsupported


def binary_losses(logits, labels):
    return nn.functional.binary_cross_entropy_with_logits(logits.squeeze(1), labels, reduction="none")


def class_losses(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


class Scaled(nn.Module):
    """Public normalization constants as a buffer, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((6,), 0.3))
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 1)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs - self.mean))
        return self.last(torch.tanh(self.first(hidden)))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.last(self.norm(self.table(inputs)).mean(1))


def make(family):
    """model, losses, inputs, labels of 60 records."""
    torch.manual_seed(3)
    table = torch.randn(60, 6)
    outcome = (torch.rand(60) < 0.4).float()
    classes = torch.randint(0, 3, (60,))
    if family == "logistic":
        return nn.Linear(6, 1), binary_losses, table, outcome
    if family == "mlp":
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), binary_losses, table, outcome
    if family == "scaled":
        return Scaled(), binary_losses, table, outcome
    if family == "words":
        return Words(), class_losses, torch.randint(0, 11, (60, 4)), classes
    layers = [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)]
    return nn.Sequential(*layers), class_losses, torch.randn(60, 1, 8, 8), classes


FAMILIES = ["logistic", "mlp", "scaled", "words", "convolution"]


def owners(records=60, patients=17):
    """Uneven: patient 0 has no records, patient 1 many, the order is mixed."""
    generator = np.random.default_rng(9)
    return np.where(generator.random(records) < 0.2, 1, generator.integers(1, patients, records)).astype(np.int64)


def oracle(model, losses, inputs, labels, patients, clipping_norm):
    """One patient at a time, in float64, without any engine; also the norms before clipping."""
    double = copy.deepcopy(model).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    labels = labels.double() if labels.is_floating_point() else labels
    weights = [weight for weight in double.parameters() if weight.requires_grad]
    total = torch.zeros(sum(weight.numel() for weight in weights), dtype=torch.float64)
    norms = []
    for patient in np.unique(patients):
        rows = torch.from_numpy(np.flatnonzero(patients == patient))
        mean = losses(double(inputs[rows]), labels[rows]).mean()
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(mean, weights)])
        norms.append(float(gradient.norm()))
        total += gradient * min(1.0, clipping_norm / norms[-1])
    return total.numpy(), np.array(norms)


def relative(first, second):
    return np.linalg.norm(first - second) / np.linalg.norm(second)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_clipped_sum_equals_float64_loop_of_one(family, quantile):
    model, losses, inputs, labels = make(family)
    patients = owners()
    _, norms = oracle(model, losses, inputs, labels, patients, 1.0)
    bound = float(np.quantile(norms, quantile)) * (0.5 if quantile == 0 else 1.01)
    expected, _ = oracle(model, losses, inputs, labels, patients, bound)
    result = clipped_sum(model, losses, inputs, labels, patients, 17, bound * (1 + CLIPPING_MARGIN))
    assert result.dtype == np.float64
    assert relative(result, expected) < 1e-5
    # the control: a clipping norm 5 % off is seen wherever anybody is clipped
    if quantile < 1.0:
        wrong, _ = oracle(model, losses, inputs, labels, patients, bound * 1.05)
        assert relative(wrong, expected) > 1e-3


@pytest.mark.parametrize("max_batch", [1, 7, 20, 60])
def test_clipped_sum_micro_batches_never_split_a_patient(max_batch):
    model, losses, inputs, labels = make("mlp")
    expected, _ = oracle(model, losses, inputs, labels, owners(), 0.2 / (1 + CLIPPING_MARGIN))
    assert relative(clipped_sum(model, losses, inputs, labels, owners(), 17, 0.2, max_batch), expected) < 1e-5


@pytest.mark.parametrize("records", [1, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sum_one_patient_more_moves_it_by_at_most_the_clipping_norm(family, records):
    model, losses, inputs, labels = make(family)
    loud = inputs * 50 if inputs.is_floating_point() else inputs
    patients = np.arange(60, dtype=np.int64)
    patients[60 - records :] = 60 - records
    kept = slice(0, 60 - records)
    clipping_norm = 0.01
    with_patient = clipped_sum(model, losses, loud, labels, patients, 60, clipping_norm)
    without = clipped_sum(model, losses, loud[kept], labels[kept], patients[kept], 60, clipping_norm)
    moved = np.linalg.norm(with_patient - without)
    assert 0.99 * clipping_norm < moved <= clipping_norm


def test_clipped_sum_by_record_instead_of_patient_would_break_the_bound():
    # the control of the test before: the same thirty records as thirty patients move the sum much further
    model, losses, inputs, labels = make("mlp")
    patients = np.arange(60, dtype=np.int64)
    whole = clipped_sum(model, losses, inputs * 50, labels, patients, 60, 0.01)
    without = clipped_sum(model, losses, inputs[:30] * 50, labels[:30], patients[:30], 60, 0.01)
    assert np.linalg.norm(whole - without) > 0.03


@given(st.integers(0, 2**31), st.floats(0.001, 10.0), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_clipped_sum_norm_never_exceeds_patients_times_clipping_norm(seed, clipping_norm, patient_count):
    torch.manual_seed(seed)
    model, inputs = nn.Linear(4, 1), torch.randn(12, 4) * 100
    patients = np.random.default_rng(seed).integers(0, patient_count, 12)
    result = clipped_sum(model, binary_losses, inputs, torch.ones(12), patients, patient_count, clipping_norm)
    assert np.linalg.norm(result) <= len(np.unique(patients)) * clipping_norm


def test_clipped_sum_patients_do_not_see_each_other():
    model, losses, inputs, labels = make("convolution")
    patients = np.arange(60, dtype=np.int64)
    alone = [
        clipped_sum(model, losses, inputs[[row]], labels[[row]], np.zeros(1, np.int64), 1, 0.3) for row in range(60)
    ]
    assert relative(clipped_sum(model, losses, inputs, labels, patients, 60, 0.3), sum(alone)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_clipped_sum_patient_that_is_not_finite_contributes_zero(bad):
    model, losses, inputs, labels = make("mlp")
    patients = np.arange(60, dtype=np.int64) // 3
    spoiled = inputs.clone()
    spoiled[4] = bad
    kept = torch.from_numpy(np.flatnonzero(patients != 1))
    result = clipped_sum(model, losses, spoiled * torch.tensor(10.0), labels, patients, 20, 0.3)
    expected = clipped_sum(model, losses, inputs[kept] * 10.0, labels[kept], patients[kept.numpy()], 20, 0.3)
    assert np.isfinite(result).all()
    assert relative(result, expected) < 1e-5


def test_clipped_sum_of_nobody_is_zero():
    model, losses, inputs, labels = make("mlp")
    result = clipped_sum(model, losses, inputs[:0], labels[:0], np.zeros(0, np.int64), 17, 1.0)
    assert result.shape == (6 * 8 + 8 + 8 + 1,)
    assert not result.any()


def test_clipped_sum_frozen_weights_are_left_out():
    model, losses, inputs, labels = make("mlp")
    model[0].requires_grad_(False)
    expected, _ = oracle(model, losses, inputs, labels, owners(), 0.1 / (1 + CLIPPING_MARGIN))
    result = clipped_sum(model, losses, inputs, labels, owners(), 17, 0.1)
    assert result.shape == (9,)
    assert relative(result, expected) < 1e-5


def test_clipped_sum_in_double_precision_follows_the_model():
    model, losses, inputs, labels = make("mlp")
    expected, _ = oracle(model, losses, inputs, labels, owners(), 0.1 / (1 + CLIPPING_MARGIN))
    result = clipped_sum(model.double(), losses, inputs.double(), labels.double(), owners(), 17, 0.1)
    assert relative(result, expected) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sum_leaves_the_model_as_it_was(family):
    model, losses, inputs, labels = make(family)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    clipped_sum(model, losses, inputs, labels, owners(), 17, 0.1)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks and not module._backward_hooks
    for weight in model.parameters():
        assert weight.grad is None and not hasattr(weight, "grad_sample")


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (nn.BatchNorm1d(8), r"LayerNorm\(8\)"),
        (nn.BatchNorm2d(48), r"GroupNorm\(16, 48\)"),
        (nn.SyncBatchNorm(32), r"GroupNorm\(32, 32\)"),
        (nn.InstanceNorm1d(8, track_running_stats=True), "switch them off"),
    ],
)
def test_model_with_batch_statistics_is_refused_by_name(layer, advice):
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(layer))
    with pytest.raises(UnsupportedModel, match=rf"MF-160 1\.0: {type(layer).__name__} .*{advice}"):
        refuse_unsupported(model)


def test_model_with_a_shared_parameter_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(UnsupportedModel, match=r"1\.weight is the same parameter as 0\.weight"):
        refuse_unsupported(model)


class Borrowed(nn.Module):
    """Uses a layer's weight behind its back: the hooks see half of the gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, inputs):
        return self.layer(inputs) + (inputs**2) @ self.layer.weight.T


class Mixing(nn.Module):
    """A parameter that meets the batch's mean."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, inputs):
        return ((inputs + inputs.mean(0)) * self.scale).sum(1, keepdim=True)


class Counting(nn.Module):
    """A buffer that takes in records."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.register_buffer("total", torch.zeros(6))

    def forward(self, inputs):
        self.total += inputs.detach().sum(0)
        return self.layer(inputs)


@pytest.mark.parametrize("kind", [Borrowed, Mixing, Counting])
def test_model_that_escapes_the_hooks_is_refused(kind):
    _, losses, inputs, labels = make("mlp")
    with pytest.raises(UnsupportedModel, match="MF-160"):
        clipped_sum(kind(), losses, inputs, labels, owners(), 17, 0.1)


def test_loss_averaged_over_records_is_refused():
    model, _, inputs, labels = make("mlp")
    with pytest.raises(UnsupportedModel, match="one loss a record"):
        clipped_sum(
            model, lambda logits, target: binary_losses(logits, target).mean(), inputs, labels, owners(), 17, 1.0
        )


@pytest.mark.parametrize(
    ("records", "first", "clipping_norm"), [(59, 0, 1.0), (60, -1, 1.0), (60, 17, 1.0), (60, 0, 0.0), (60, 0, math.nan)]
)
def test_clipped_sum_arguments_that_do_not_fit_are_refused(records, first, clipping_norm):
    model, losses, inputs, labels = make("mlp")
    patients = owners()
    patients[0] = first
    with pytest.raises(LocalProtocolError, match="MF-180"):
        clipped_sum(model, losses, inputs[:records], labels, patients, 17, clipping_norm)
