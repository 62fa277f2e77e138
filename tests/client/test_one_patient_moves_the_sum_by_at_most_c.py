"""Weights chosen by a hostile coordinator must not turn rounding into sensitivity: one patient moves a sum by at most C.

The attack: weights that cancel (+h, -h) leave a logit that is nothing but the rounding of its summation. A matrix product
rounds a row by the place it has in the batch, so one patient more or less flips the sign of other patients' logits.
"""

import numpy as np
import pytest
import torch
from torch import nn

from medfed.models import catalogue, parameters, tasks
from medfed.models.rowwise import RowLinear, sigmoid, softmax
from medfed.privacy.gradients.opacus_engine import clipped_sum

PATIENTS, INPUTS, C = 60, 25, 0.5


def plain_linear(inputs: int, outputs: int) -> nn.Module:
    """The defence switched off: the same model with torch's own layer."""
    return nn.Linear(inputs, outputs)


def attack(layer, rng: np.random.Generator) -> float:
    """Worst ‖S(D) - S(D without one patient)‖ / C over chosen weights, patients' indicators as of a public category."""
    level = np.where(rng.random(PATIENTS) < 0.3, rng.integers(0, 12, PATIENTS), 12)
    inputs = rng.normal(size=(PATIENTS, INPUTS))
    inputs[:, 13:] = (np.eye(13)[level][:, :12] - 0.1) / 0.3
    x, y = torch.from_numpy(inputs.astype(np.float32)).double(), torch.from_numpy(rng.integers(0, 2, PATIENTS))
    model = layer(INPUTS, 1).double()

    def clipped(rows: np.ndarray) -> np.ndarray:
        people = np.arange(len(rows))
        return clipped_sum(model, _binary_losses, x[rows], y[rows], people, len(rows), C)

    everybody, worst = np.arange(PATIENTS), 0.0
    for _ in range(40):
        scale = 10.0 ** rng.uniform(15, 18)
        h = (rng.normal(size=6) * scale * 10.0 ** rng.uniform(-3, 0, 6)).astype(np.float32)
        columns = 13 + rng.permutation(12)
        weights = np.zeros(INPUTS + 1, np.float32)
        weights[columns[:6]], weights[columns[6:]] = h, -h
        parameters.assign(model, weights)
        whole = clipped(everybody)
        for absent in (0, PATIENTS // 2, PATIENTS - 1):
            worst = max(worst, float(np.linalg.norm(whole - clipped(np.delete(everybody, absent)))) / C)
    return worst


def _binary_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")


def test_one_patient_moves_the_sum_by_at_most_c_whatever_the_weights():
    assert attack(RowLinear, np.random.default_rng(1)) <= 1.0


def test_one_patient_moves_the_sum_by_more_where_rows_depend_on_the_batch():
    """The control: the same attack on torch's own layer breaks the bound."""
    assert attack(plain_linear, np.random.default_rng(1)) > 1.1


MODELS = {
    "logistic-regression": {"model": {"name": "logistic-regression", "hidden": []}},
    "mlp": {"model": {"name": "mlp", "hidden": [7, 5]}},
    "multiclass": {"model": {"name": "mlp", "hidden": [6]}, "task": {"kind": "multiclass", "classes": 4}},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [1.0, 1e12])
def test_gradient_of_a_record_is_the_same_bits_in_every_batch(make_study, name, scale):
    """Every model and task of the catalogue: logits and the gradients by each layer's output, alone and in company."""
    study = _changed(make_study(), MODELS[name])
    rng = np.random.default_rng(3)
    model = catalogue.build(study).double()
    parameters.assign(model, (rng.normal(size=parameters.count(model)) * scale).astype(np.float32))
    inputs = torch.from_numpy(rng.normal(size=(37, study.data.inputs)))
    labels = torch.from_numpy(rng.integers(0, study.task.classes, 37))
    whole = _by_record(model, study, inputs, labels)
    for batch in ([4], [36, 4], [0, 4, 5, 6, 7], list(range(4, 37)), list(range(36, -1, -1))):
        part = _by_record(model, study, inputs[batch], labels[batch])
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[batch].view(torch.int64), b.view(torch.int64))


def _by_record(model: nn.Module, study, inputs: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The output of every layer and the loss's gradient by it: what records' gradients are made of."""
    seen: list[torch.Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [
        layer.register_forward_hook(lambda _, __, out: (out.retain_grad(), seen.append(out))[1]) for layer in layers
    ]
    tasks.losses(study.task)(model(inputs), labels).sum().backward()
    for hook in hooks:
        hook.remove()
    return [out.detach() for out in seen] + [out.grad for out in seen]


def _changed(study, sections: dict):
    for section, values in sections.items():
        study = study.model_copy(update={section: getattr(study, section).model_copy(update=values)})
    return study


def test_sigmoid_and_softmax_do_not_depend_on_a_value_s_place():
    values = np.random.default_rng(0).normal(size=1001) * 20
    alone = np.array([sigmoid(values[i : i + 1])[0] for i in range(len(values))])
    np.testing.assert_array_equal(sigmoid(values).view(np.uint64), alone.view(np.uint64))
    table = values[:999].reshape(333, 3)
    rows = np.concatenate([softmax(table[i : i + 1]) for i in range(333)])
    np.testing.assert_array_equal(softmax(table).view(np.uint64), rows.view(np.uint64))
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-12)
    assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_row_linear_is_torch_s_linear_to_rounding_and_in_its_gradients():
    torch.manual_seed(0)
    ours, theirs = RowLinear(9, 4).double(), nn.Linear(9, 4).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(11, 9, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    torch.testing.assert_close(ours(x), theirs(z))
    (ours(x) ** 2).sum().backward()
    (theirs(z) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
