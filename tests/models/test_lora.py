"""Low-rank adapters: what is trained, what stays, and that the gradient engine sees it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from medfed.errors import UnsupportedModel
from medfed.models.lora import LoraLinear, adapt
from medfed.models.parameters import assign, count, flatten, from_safetensors, to_safetensors, trainable
from medfed.models.transformer import TextTransformer


def adapted() -> tuple[TextTransformer, TextTransformer]:
    """A text Transformer as if pretrained, and the same with adapters and its head to train."""
    torch.manual_seed(2)
    plain = TextTransformer(20, 3, 8, 2, 1, 12)
    for weight in plain.parameters():
        weight.data += 0.2 * torch.randn(weight.shape)
    model = copy.deepcopy(plain)
    assert adapt(model, 2, trained=["head"]) == 4
    return plain, model


def test_adapted_model_says_at_first_what_the_pretrained_one_says() -> None:
    plain, model = adapted()
    tokens = torch.randint(1, 20, (5, 7))
    assert torch.equal(plain(tokens), model(tokens))


def test_adapters_and_named_layers_are_trained_and_nothing_else() -> None:
    _, model = adapted()
    names = {name for name, _ in trainable(model)}
    assert {name.rsplit(".", 2)[-2] for name in names} == {"down", "up", "head"}
    width, forward = 8, 12
    assert count(model) == 2 * ((width + 3 * width) + 2 * width + 2 * (width + forward)) + (width + 1) * 3
    before = {name: value.clone() for name, value in model.named_parameters() if name not in names}
    assign(model, flatten(model) + 1.0)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in before.items())
    # a model file holds what was trained
    assert (from_safetensors(model, to_safetensors(model, flatten(model))) == flatten(model)).all()


def test_gradients_of_adapters_are_those_of_a_loop_of_one_record() -> None:
    """The engine's clipped sums, with the base frozen; the control: the base's own weights are in neither."""
    from medfed.privacy.gradients.engine import CLIPPING_MARGIN, clipped_sum

    _, model = adapted()
    model = model.double()
    for weight in (each for each in model.parameters() if each.requires_grad):
        weight.data += 0.3 * torch.randn(weight.shape, dtype=torch.float64)
    tokens, labels = torch.randint(1, 20, (9, 7)), torch.randint(0, 3, (9,))

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    weights = [each for _, each in trainable(model)]
    each = [
        torch.cat(
            [
                part.flatten()
                for part in torch.autograd.grad(losses(model(tokens[i : i + 1]), labels[i : i + 1])[0], weights)
            ]
        ).numpy()
        for i in range(9)
    ]
    norms = np.linalg.norm(each, axis=1)
    bound = float(np.median(norms))
    wanted = (np.array(each) * np.minimum(1, bound / norms)[:, None]).sum(0)
    rows = np.arange(9)
    found = clipped_sum(
        model,
        losses,
        tokens,
        labels,
        rows,
        rows,
        bound * (1 + CLIPPING_MARGIN),
        batch=8,
        device=torch.device("cpu"),
    )
    assert found.total.shape == (count(model),)
    assert np.linalg.norm(found.total - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_adapting_what_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="MF-160 there is no layer tail to train"):
        adapt(nn.Sequential(nn.Linear(3, 2)), 2, trained=["tail"])
    with pytest.raises(UnsupportedModel, match="MF-160 the model has no linear layer to adapt"):
        adapt(nn.Sequential(nn.Linear(3, 2)), 2, trained=["0"])


def test_adapter_keeps_its_base_frozen() -> None:
    layer = LoraLinear(nn.Linear(4, 3), 1)
    assert [name for name, weight in layer.named_parameters() if weight.requires_grad] == ["down.weight", "up.weight"]
