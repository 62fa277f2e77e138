"""Where a model of several views looked: attention's weights, and Grad-CAM of each view by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("captum")

from medfed.models.attribution import Asked
from medfed.models.multi_view import multi_view
from medfed.models.view_reasons import grad_cam_of_views, view_weights


def asked() -> Asked:
    """A model whose channels see brightness alone, and a record with a bright spot in its third view; the second is absent."""
    torch.manual_seed(1)
    model = multi_view(1, [2], 1, 1, "largest", "attention", 3)
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.fill_(0.0)
        model.encoder[0].weight[:, 0, 0] = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, 8.0, -1.0], [-1.0, -1.0, -1.0]])
        model.head.weight.fill_(1.0)
    inputs = torch.zeros(1, 4, 8, 8)
    inputs[0, 3, 0, :3] = torch.tensor([1.0, 0.0, 1.0])
    inputs[0, 2, 5, 6] = 3.0
    return Asked(model, inputs, "log-odds of class 1", lambda outputs, given: outputs[:, 0])


def test_weights_of_attention_are_given_for_each_view() -> None:
    weights = view_weights(asked())
    assert weights is not None and weights.shape == (3,)
    assert weights[1] == 0.0 and weights.sum() == pytest.approx(1.0)


def test_grad_cam_is_brightest_where_the_spot_is_and_dark_in_an_absent_view() -> None:
    found = grad_cam_of_views(asked())
    assert found is not None and found.shape == (3, 8, 8)
    assert np.unravel_index(found.argmax(), found.shape) == (2, 5, 6)
    assert found.max() == 1.0 and not found[1].any()


def test_model_of_another_make_has_neither() -> None:
    other = Asked(torch.nn.Flatten(), torch.zeros(1, 4, 8, 8), "sum", lambda outputs, given: outputs.sum(1))
    assert view_weights(other) is None and grad_cam_of_views(other) is None
