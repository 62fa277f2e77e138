"""Several views of one record: those that are absent change nothing, the order of views neither."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medfed.models.multi_view import MultiView, multi_view


def grown(pooling: str = "attention", head: str = "mean") -> MultiView:
    torch.manual_seed(1)
    model = multi_view(1, [4, 6], 1, 2, head, pooling, 5)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape)
    return model


def records(present: list[list[float]]) -> Tensor:
    inputs = torch.randn(len(present), 4, 8, 8, generator=torch.Generator().manual_seed(2))
    inputs[:, 3] = 0.0
    inputs[:, 3, 0, :3] = torch.tensor(present)
    return inputs


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("head", ["mean", "largest"])
def test_absent_view_changes_nothing(pooling: str, head: str) -> None:
    model, inputs = grown(pooling, head), records([[1, 0, 1], [0, 0, 1]])
    changed = inputs.clone()
    changed[0, 1] += 5.0
    changed[1, :2] -= 3.0
    assert torch.equal(model(inputs), model(changed))
    changed[0, 0] += 1.0
    assert not torch.equal(model(inputs), model(changed))


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_weights_add_up_to_one_over_the_views_that_are_there(pooling: str) -> None:
    weights = grown(pooling).weights(records([[1, 1, 1], [0, 1, 1], [0, 0, 1]]))
    assert torch.allclose(weights.sum(1), torch.ones(3))
    assert weights[1, 0] == 0.0 and weights[2].tolist() == [0.0, 0.0, 1.0]
    assert (pooling == "mean") == torch.allclose(weights[0], torch.full((3,), 1 / 3))


def test_order_of_views_plays_no_part() -> None:
    model, inputs = grown(), records([[1, 1, 1]])
    turned = inputs[:, [2, 0, 1, 3]]
    assert torch.allclose(model(inputs), model(turned), atol=1e-6)


def test_record_without_any_view_gets_an_answer_and_no_gradient_of_its_encoder() -> None:
    model, inputs = grown(), records([[0, 0, 0]])
    logits = model(inputs)
    assert torch.isfinite(logits).all() and logits.item() == pytest.approx(model.head.bias.item())
    logits.sum().backward()
    assert all(not weight.grad.any() for weight in model.encoder.parameters() if weight.grad is not None)
