"""Autoencoders: what comes out of a record is its own, no label is trained on, and nothing is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from medfed.models.autoencoder import DIVERGENCE, ERROR, LATENT, Autoencoder, VariationalAutoencoder, exponential
from medfed.models.records import columns_of
from medfed.models.tasks import losses, meaning
from medfed.models.tasks.reconstruction import anomaly_scores, representation
from medfed.study import Study
from medfed.task_choice import Reconstruction

MakeStudy = Callable[..., Study]
TASK = Reconstruction(kind="reconstruction", label="unusual", divergence=0.3)
PIN = {"first_model_sha256": "ab" * 32}
BOTH = pytest.mark.parametrize("kind", [Autoencoder, VariationalAutoencoder])


def made(kind: type[nn.Module], inputs: int = 5, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = kind(inputs, [4], 2).double()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return model


def gradients(model: nn.Module, inputs: Tensor) -> Tensor:
    leaf = inputs.clone().requires_grad_()
    found = losses(TASK)(model(leaf), torch.zeros(len(leaf), dtype=torch.int64))
    return torch.autograd.grad(found.sum(), leaf)[0]


@BOTH
def test_record_has_the_same_bits_and_gradient_in_every_batch(kind: type[nn.Module]) -> None:
    model, inputs = made(kind), torch.randn(101, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole, slopes = model(inputs), gradients(model, inputs)
    order = torch.from_numpy(np.random.default_rng(1).permutation(101))
    assert torch.equal(model(inputs[order]), whole[order])
    assert torch.equal(gradients(model, inputs[order]), slopes[order])
    for size in (1, 3, 64):
        parts = [inputs[start : start + size] for start in range(0, 101, size)]
        assert torch.equal(torch.cat([model(part) for part in parts]), whole)
        assert torch.equal(torch.cat([gradients(model, part) for part in parts]), slopes)


@BOTH
def test_model_draws_nothing(kind: type[nn.Module]) -> None:
    model, inputs = made(kind).train(), torch.ones(3, 5, dtype=torch.float64)
    before = torch.get_rng_state()
    assert torch.equal(model(inputs), model(inputs))
    assert torch.equal(torch.get_rng_state(), before)


def test_error_is_the_mean_square_of_what_is_not_given_back() -> None:
    model = made(Autoencoder)
    inputs = torch.randn(7, 5, dtype=torch.float64)
    found = model(inputs)
    latent = model.encoder(inputs)
    assert torch.allclose(found[:, ERROR], ((model.decoder(latent) - inputs) ** 2).mean(1))
    assert not found[:, DIVERGENCE].any()
    assert torch.equal(found[:, LATENT:], latent)


def test_divergence_is_that_of_torch_from_the_standard_normal_distribution() -> None:
    model = made(VariationalAutoencoder)
    inputs = torch.randn(7, 5, dtype=torch.float64)
    mean, logarithm = model.encoder(inputs).chunk(2, 1)
    normal = torch.distributions.Normal(mean, (0.5 * logarithm).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(normal, standard).sum(1)
    assert torch.allclose(model(inputs)[:, DIVERGENCE], expected)
    assert torch.equal(model(inputs)[:, LATENT:], mean)


def test_sigma_points_give_the_expected_error_of_a_linear_decoder_exactly() -> None:
    """Of draws it would be the mean of many: |W m + b - x|^2 + sum of variances times squared columns, over p."""
    torch.manual_seed(3)
    model = VariationalAutoencoder(5, [], 3).double()
    inputs = torch.randn(6, 5, dtype=torch.float64)
    mean, logarithm = model.encoder(inputs).chunk(2, 1)
    squares = (model.decoder[0].weight ** 2).sum(0)
    expected = ((model.decoder(mean) - inputs) ** 2).sum(1) + (logarithm.exp() * squares).sum(1)
    assert torch.allclose(model(inputs)[:, ERROR], expected / 5)


def test_exponential_is_the_exponential_and_bounded_where_values_are_absurd() -> None:
    values = torch.tensor([-3.0, 0.0, 2.5, 1e4], dtype=torch.float64, requires_grad=True)
    found = exponential(values)
    assert found[:3].tolist() == pytest.approx([math.exp(-3.0), 1.0, math.exp(2.5)])
    (slope,) = torch.autograd.grad(found.sum(), values)
    assert torch.equal(slope, found)
    assert torch.isfinite(found).all()


def test_label_is_never_trained_on() -> None:
    """Whatever the labels say, losses and gradients are the same bits."""
    model, inputs = made(VariationalAutoencoder), torch.randn(9, 5, dtype=torch.float64)
    outputs = model(inputs)
    for each in (meaning(TASK).losses(), meaning(TASK).plain_losses()):
        assert torch.equal(
            each(outputs, torch.zeros(9, dtype=torch.int64)), each(outputs, torch.ones(9, dtype=torch.int64))
        )


def test_score_is_the_loss_and_stands_before_the_representation() -> None:
    outputs = np.array([[0.5, 1.0, 7.0, 8.0], [0.1, 0.0, 5.0, 6.0]])
    found = meaning(TASK).predictions(outputs)
    assert anomaly_scores(found).tolist() == [0.8, 0.1]
    assert representation(found).tolist() == [[7.0, 8.0], [5.0, 6.0]]
    assert anomaly_scores(found) == pytest.approx(losses(TASK)(torch.from_numpy(outputs), torch.zeros(2)).numpy())


def test_metrics_are_the_score_against_the_label_and_the_usual_records_score() -> None:
    roc = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(4)
    labels, scores = draw.integers(0, 2, 60), draw.normal(size=60).round(1)
    found = meaning(TASK).metrics(np.stack([scores, scores], 1), labels)
    assert found["auc"] == pytest.approx(roc.roc_auc_score(labels, scores))
    assert found["auprc"] == pytest.approx(roc.average_precision_score(labels, scores))
    assert found["error"] == pytest.approx(scores[labels == 0].mean())
    assert meaning(TASK).metrics(np.ones((2, 3)), np.ones(2, np.int64)) == {"auc": None, "auprc": 1.0, "error": None}


def test_task_without_a_label_reads_none(make_study: MakeStudy) -> None:
    changes = {
        "task": {"kind": "reconstruction", "divergence": 0.0},
        "model": {"name": "autoencoder", "hidden": [], "latent": 1, **PIN},
    }
    study = make_study(changes)
    assert columns_of(study) == ["age", "lactate", "ventilated"]
    assert meaning(study.task).labels(study.data, {}, [1, 2]).tolist() == [0, 0]


def test_autoencoder_solves_nothing_else_and_no_other_model_reconstructs(make_study: MakeStudy) -> None:
    own = {"name": "autoencoder", "hidden": [], "latent": 1, **PIN}
    with pytest.raises(ValidationError, match="autoencoder is not for tasks of kind binary"):
        make_study({"model": own})
    with pytest.raises(ValidationError, match="logistic-regression is not for tasks of kind reconstruction"):
        make_study({"task": {"kind": "reconstruction", "divergence": 0.0}})
