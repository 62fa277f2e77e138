"""The recurrences against torch's own, their gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medfed.models.recurrent import GruLayer, LstmLayer


def pair(cell: str, inputs: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's with the same weights, in float64. Torch has two biases, and other names for a GRU's gates."""
    torch.manual_seed(4)
    ours = (LstmLayer if cell == "lstm" else GruLayer)(inputs, hidden).double()
    theirs = (nn.LSTM if cell == "lstm" else nn.GRU)(inputs, hidden, batch_first=True).double()
    for layer in (ours.by_input, ours.by_state):
        for weight in layer.parameters():
            weight.data += 0.3 * torch.randn_like(weight)
    theirs.weight_ih_l0.data = ours.by_input.weight.data.clone()
    theirs.weight_hh_l0.data = ours.by_state.weight.data.clone()
    theirs.bias_ih_l0.data = ours.by_input.bias.data.clone()
    nn.init.zeros_(theirs.bias_hh_l0)
    return ours, theirs


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layer_is_torch_s_own_in_its_states_and_gradients(cell: str) -> None:
    ours, theirs = pair(cell, 3, 5)
    x = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    mine, other = ours(x, torch.ones(4, 7, dtype=torch.bool)), theirs(z)[0]
    torch.testing.assert_close(mine, other)
    weigh = torch.randn_like(other)
    (mine.sin() * weigh).sum().backward()
    (other.sin() * weigh).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    torch.testing.assert_close(ours.by_input.weight.grad, theirs.weight_ih_l0.grad)
    torch.testing.assert_close(ours.by_input.bias.grad, theirs.bias_ih_l0.grad)
    torch.testing.assert_close(ours.by_state.weight.grad, theirs.weight_hh_l0.grad)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradient_is_that_of_finite_differences_with_gaps_in_the_stay(cell: str) -> None:
    ours, _ = pair(cell, 2, 3)
    inside = torch.tensor([[True, False, True, True, False], [False, True, True, False, False], [False] * 5])
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in ours.named_parameters()]

    def run(inputs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (inputs, inside))

    states = run(x, *ours.parameters())
    assert torch.equal(states[0, 1], states[0, 0]) and torch.equal(states[0, 4], states[0, 3])
    assert not states[1, 0].any() and not states[2].any()
    # the weight of the states reaches its gradient beside the values: differences of the values must agree with it
    assert torch.autograd.gradcheck(run, (x, *ours.parameters()))


def test_forget_gate_begins_open() -> None:
    layer = LstmLayer(3, 4)
    assert layer.by_input.bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8
    block = layer.by_state.weight[4:8]
    torch.testing.assert_close(block @ block.T, torch.eye(4), atol=1e-6, rtol=0)
