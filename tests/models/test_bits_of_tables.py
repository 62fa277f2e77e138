"""Models of tables: a record's gradient is the same bits in every batch, and one patient moves a clipped sum by at most C.

Weights are chosen by a hostile coordinator: of any size, and so that they cancel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medfed.models import tasks
from medfed.models.catalogue import build, is_rowwise
from medfed.models.rowwise import RowLinear
from medfed.privacy.gradients.engine import Engine
from medfed.study import Study

MakeStudy = Callable[..., Study]
PIN = {"first_model_sha256": "ab" * 32}
SURVIVAL = {"kind": "survival", "time": "days", "event": "ill", "unit": "days", "edges": [3, 8, 20]}
EFFECT = {"kind": "effect", "outcome": "ill", "treatment": "treated", "assumptions": "None holds."}
PAIRS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "mlp, hazards": ({"name": "mlp", "hidden": [6]}, {**SURVIVAL, "head": "hazard"}),
    "mlp, weibull": ({"name": "mlp", "hidden": [6]}, {**SURVIVAL, "head": "weibull"}),
    "linear, weibull of a public shape": (
        {"name": "logistic-regression", "hidden": []},
        {**SURVIVAL, "head": "weibull", "shape": 1.2},
    ),
    "autoencoder": (
        {"name": "autoencoder", "hidden": [5], "latent": 2},
        {"kind": "reconstruction", "divergence": 0.0},
    ),
    "variational-autoencoder": (
        {"name": "variational-autoencoder", "hidden": [5], "latent": 2},
        {"kind": "reconstruction", "divergence": 0.2},
    ),
    "two-arm": ({"name": "two-arm", "hidden": [6], "arm_hidden": [3]}, EFFECT),
}
NAMES = pytest.mark.parametrize("name", PAIRS)
C = 0.5


def made(make_study: MakeStudy, name: str, count: int = 37) -> tuple[Study, nn.Module, Tensor, Tensor]:
    model, task = PAIRS[name]
    study = make_study({"model": {**model, **PIN}, "task": task})
    assert is_rowwise(study)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, *study.data.shape, dtype=torch.float64, generator=generator)
    labels = tasks.meaning(study.task).made_up_labels(study.data, generator, count)
    return study, build(study).double(), inputs, labels


def weigh(model: nn.Module, draw: np.random.Generator, scale: float) -> None:
    """Weights of this size whose columns come in pairs that cancel but for their last places."""
    for weight in model.parameters():
        values = draw.normal(size=tuple(weight.shape)) * scale
        if values.ndim == 2 and values.shape[1] > 1:
            values[:, 1::2] = -values[:, : values.shape[1] // 2 * 2 : 2] * (1 + 1e-7)
        weight.data.copy_(torch.from_numpy(values.astype(np.float32)))


def by_record(model: nn.Module, study: Study, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    """Outputs of every layer and the loss's gradients by them: what records' gradients are made of."""
    seen: list[Tensor] = []

    def keep(layer: nn.Module, given: object, out: Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    hooks = [layer.register_forward_hook(keep) for layer in model.modules() if isinstance(layer, RowLinear)]
    tasks.losses(study.task)(model(inputs), labels).sum().backward()
    for hook in hooks:
        hook.remove()
    return [out.detach() for out in seen] + [out.grad for out in seen if out.grad is not None]


@NAMES
@pytest.mark.parametrize("scale", [0.3, 1e6, 1e12])
def test_gradient_of_a_record_is_the_same_bits_in_every_batch(make_study: MakeStudy, name: str, scale: float) -> None:
    study, model, inputs, labels = made(make_study, name)
    weigh(model, np.random.default_rng(1), scale)
    whole = by_record(model, study, inputs, labels)
    assert len(whole) >= 2
    for batch in ([4], [36, 4], [0, 4, 5, 6, 7], list(range(4, 37)), list(range(36, -1, -1))):
        part = by_record(model, study, inputs[batch], labels[batch])
        for one, other in zip(whole, part, strict=True):
            assert torch.equal(one[batch].view(torch.int64), other.view(torch.int64))


@NAMES
def test_one_patient_moves_the_sum_by_at_most_c_whatever_the_weights(make_study: MakeStudy, name: str) -> None:
    study, model, inputs, labels = made(make_study, name, 20)
    draw, engine = np.random.default_rng(2), Engine(model, tasks.losses(study.task), torch.device("cpu"))

    def summed(rows: np.ndarray) -> np.ndarray:
        owners = np.arange(len(rows))
        sums, _ = engine.clipped_sums(
            inputs[rows], labels[rows], owners, owners, np.zeros(len(rows), np.int64), 1, C, batch=64
        )
        return np.asarray(sums[0])

    moved = []
    for scale in (0.3, 1.0, 30.0, 1e4, 1e9, 1e15):
        weigh(model, draw, scale)
        engine.load(torch.cat([weight.detach().flatten() for weight in model.parameters()]).float().numpy())
        everybody = np.arange(20)
        whole = summed(everybody)
        moved += [float(np.linalg.norm(whole - summed(np.delete(everybody, gone)))) for gone in (0, 9, 19)]
    assert max(moved) <= C
    assert max(moved) > 0.5 * C, "somebody is clipped, or nearly"
