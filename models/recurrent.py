"""LSTM and GRU over series: float32[n, steps, channels] -> logits float32[n, outputs].

The channels are those of ``medfed.data_contract.Series``: variables, whether each was observed, whether the step lies
inside the stay, features. A step outside the stay leaves the state as it is, to the last bit.

Each layer's recurrence is one autograd function that runs through time by hand, both ways. Beside it the linear layer of
the states sees all states of the series at once: its result is used by nobody, but the gradient that reaches it is that
of each step's gates, so its weight gets the gradient of backpropagation through time. To whoever takes gradients record
by record, a recurrent layer is thereby two linear layers over a sequence, and none that is called anew at every step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from medfed.models.head import linear_from_zero


class Recurrent(nn.Module):
    """``layers`` LSTM or GRU layers, the last one's final state, and a linear layer begun at zero.

    With ``summaries`` that layer also sees the series' summaries (``summarise``), so that it starts as a logistic
    regression on them. Parameters: g * h * (inputs + h + 1) for each layer, where g is 4 of an LSTM and 3 of a GRU, and
    outputs * (h + 1 + summaries). An LSTM of h = 32 over 37 variables and 5 features: 14,497, with summaries 14,614.
    """

    def __init__(
        self,
        cell: Literal["lstm", "gru"],
        variables: int,
        features: int,
        outputs: int,
        hidden_size: int,
        layers: int,
        summaries: bool,
    ) -> None:
        super().__init__()
        widths = [2 * variables + 1 + features, *[hidden_size] * (layers - 1)]
        kind = LstmLayer if cell == "lstm" else GruLayer
        self.layers = nn.ModuleList([kind(width, hidden_size) for width in widths])
        self.variables = variables
        self.summaries = summaries
        self.head = linear_from_zero(hidden_size + (3 * variables + 1 + features if summaries else 0), outputs)

    def forward(self, series: Tensor) -> Tensor:
        inside = series[:, :, 2 * self.variables] > 0
        states = series
        for layer in self.layers:
            states = layer(states, inside)
        seen = states[:, -1]
        if self.summaries:
            seen = torch.cat([seen, summarise(series, self.variables)], dim=1)
        logits: Tensor = self.head(seen)
        return logits


def summarise(series: Tensor, variables: int) -> Tensor:
    """float[n, steps, 2 * v + 1 + f] -> float[n, 3 * v + 1 + f]: what the steps inside the stay come to.

    The mean over them of each variable, of whether it was observed, and of each feature; in place of the mean of the
    channel that says what lies inside, which is 1, their share of all steps; each variable's last observed value (0, its
    center, if nowhere). Least and greatest values are left out: they tell little beside these, and every number more takes
    its part of the clipping norm.
    """
    inside = series[:, :, 2 * variables : 2 * variables + 1] > 0
    steps = inside.sum(1)
    means = torch.where(inside, series, 0.0).sum(1) / steps.clamp(min=1)
    share = steps / series.shape[1]
    observed = (series[:, :, variables : 2 * variables] > 0) & inside
    places = torch.arange(series.shape[1], device=series.device)[:, None]
    latest = torch.where(observed, places, 0).amax(1, keepdim=True)
    last = series[:, :, :variables].gather(1, latest)[:, 0]
    last = torch.where(observed.any(1), last, 0.0)
    parts = [means[:, : 2 * variables], share.to(series.dtype), means[:, 2 * variables + 1 :], last]
    return torch.cat(parts, dim=1)


class LstmLayer(nn.Module):
    """float[n, steps, inputs], inside bool[n, steps] -> states float[n, steps, h] (Hochreiter and Schmidhuber 1997).

    Gates in the order input, forget, candidate, output; one bias, of the forget gate begun at 1 (Jozefowicz et al. 2015).
    """

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__()
        self.by_input = nn.Linear(inputs, 4 * hidden_size)
        self.by_state = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        _begin(self.by_input, self.by_state, gates=4)
        with torch.no_grad():
            self.by_input.bias[hidden_size : 2 * hidden_size] = 1.0

    def forward(self, inputs: Tensor, inside: Tensor) -> Tensor:
        by_input = self.by_input(inputs)
        gates, states, cells = _lstm_run(by_input.detach(), self.by_state.weight.detach(), inside)
        by_state = self.by_state(states[:-1].transpose(0, 1))
        weight = self.by_state.weight.detach()
        result: Tensor = _Lstm.apply(by_input, by_state, weight, inside, gates, states, cells)  # type: ignore[no-untyped-call]
        return result


def _lstm_run(by_input: Tensor, weight: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Through time: gates [steps, n, 4 * h] after their functions, states and cells [steps + 1, n, h], from zero."""
    records, steps, width = by_input.shape
    hidden = width // 4
    gates = by_input.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # of one record, too, a copy
    states = gates.new_zeros(steps + 1, records, hidden)
    cells = torch.zeros_like(states)
    keep = inside.T[:, :, None]
    weight = weight.T.contiguous()
    for t in range(steps):
        gate = gates[t].addmm_(states[t], weight)
        gate[:, : 2 * hidden].sigmoid_()
        gate[:, 3 * hidden :].sigmoid_()
        enter, forget, candidate, output = gate.chunk(4, 1)
        candidate.tanh_()
        cell = torch.addcmul(forget * cells[t], enter, candidate)
        torch.where(keep[t], cell, cells[t], out=cells[t + 1])
        torch.where(keep[t], output * cell.tanh(), states[t], out=states[t + 1])
    return gates, states, cells


class _Lstm(torch.autograd.Function):
    """The states that ``_lstm_run`` found, and the gradient of each step's gates before their functions."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        by_input: Tensor,
        by_state: Tensor,
        weight: Tensor,
        inside: Tensor,
        gates: Tensor,
        states: Tensor,
        cells: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, inside, gates, cells)
        return states[1:].transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, inside, gates, cells = ctx.saved_tensors  # type: ignore[attr-defined]
        enter, forget, candidate, output = gates.chunk(4, 2)
        keep = inside.T[:, :, None]
        shown = cells[1:].tanh()
        # all steps at once: what a cell's or state's gradient is multiplied with to become that of a gate
        of_cell = torch.cat(
            [
                candidate * enter * (1 - enter),
                cells[:-1] * forget * (1 - forget),
                enter * (1 - candidate * candidate),
            ],
            2,
        )
        of_cell = torch.where(keep, of_cell, 0.0).view(*keep.shape[:2], 3, -1)
        of_output = torch.where(keep, shown * output * (1 - output), 0.0)
        to_cell = torch.where(keep, output * (1 - shown * shown), 0.0)
        kept_cell = torch.where(keep, forget, 1.0)
        kept_state = (~keep).to(gates.dtype)
        by_gates = torch.empty_like(gates).view(*keep.shape[:2], 4, -1)
        by_states = gradient.transpose(0, 1)
        state, cell = torch.zeros_like(cells[0]), torch.zeros_like(cells[0])
        for t in reversed(range(len(gates))):
            state = state + by_states[t]
            cell = torch.addcmul(cell, state, to_cell[t])
            torch.mul(cell[:, None], of_cell[t], out=by_gates[t, :, :3])
            torch.mul(state, of_output[t], out=by_gates[t, :, 3])
            state = torch.addmm(state * kept_state[t], by_gates[t].flatten(1), weight)
            cell = cell * kept_cell[t]
        found = by_gates.flatten(2).transpose(0, 1)
        return found, found, None, None, None, None, None


class GruLayer(nn.Module):
    """float[n, steps, inputs], inside bool[n, steps] -> states float[n, steps, h] (Cho et al. 2014).

    Gates in the order reset, update, candidate; the reset gate multiplies the candidate's product with the state. One bias.
    """

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__()
        self.by_input = nn.Linear(inputs, 3 * hidden_size)
        self.by_state = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        _begin(self.by_input, self.by_state, gates=3)

    def forward(self, inputs: Tensor, inside: Tensor) -> Tensor:
        by_input = self.by_input(inputs)
        gates, states, recalled = _gru_run(by_input.detach(), self.by_state.weight.detach(), inside)
        by_state = self.by_state(states[:-1].transpose(0, 1))
        weight = self.by_state.weight.detach()
        result: Tensor = _Gru.apply(by_input, by_state, weight, inside, gates, states, recalled)  # type: ignore[no-untyped-call]
        return result


def _gru_run(by_input: Tensor, weight: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Through time: gates [steps, n, 3 * h] after their functions, states [steps + 1, n, h] from zero, and what the state
    gives to the candidate before the reset gate [steps, n, h]."""
    records, steps, width = by_input.shape
    hidden = width // 3
    gates = by_input.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # of one record, too, a copy
    states = gates.new_zeros(steps + 1, records, hidden)
    recalled = gates.new_empty(steps, records, hidden)
    keep = inside.T[:, :, None]
    weight = weight.T.contiguous()
    for t in range(steps):
        by_state = states[t] @ weight
        recalled[t] = by_state[:, 2 * hidden :]
        switches = gates[t, :, : 2 * hidden]
        switches += by_state[:, : 2 * hidden]
        switches.sigmoid_()
        reset, update = switches.chunk(2, 1)
        candidate = gates[t, :, 2 * hidden :].addcmul_(reset, recalled[t]).tanh_()
        torch.where(keep[t], torch.lerp(candidate, states[t], update), states[t], out=states[t + 1])
    return gates, states, recalled


class _Gru(torch.autograd.Function):
    """The states that ``_gru_run`` found, and the gradients of both sides of each step's gates before their functions."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        by_input: Tensor,
        by_state: Tensor,
        weight: Tensor,
        inside: Tensor,
        gates: Tensor,
        states: Tensor,
        recalled: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, inside, gates, states, recalled)
        return states[1:].transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, inside, gates, states, recalled = ctx.saved_tensors  # type: ignore[attr-defined]
        reset, update, candidate = gates.chunk(3, 2)
        keep = inside.T[:, :, None]
        # all steps at once: what a state's gradient is multiplied with to become that of a gate
        of_candidate = torch.where(keep, (1 - update) * (1 - candidate * candidate), 0.0)
        of_update = torch.where(keep, (states[:-1] - candidate) * update * (1 - update), 0.0)
        of_reset = of_candidate * recalled * reset * (1 - reset)
        of_recalled = of_candidate * reset
        factors = torch.stack([of_reset, of_update, of_recalled], 2)
        kept = torch.where(keep, update, 1.0)
        by_gates = torch.empty_like(factors)
        by_states = gradient.transpose(0, 1)
        summed = torch.empty_like(kept)
        state = torch.zeros_like(states[0])
        for t in reversed(range(len(gates))):
            state = torch.add(state, by_states[t], out=summed[t])
            torch.mul(state[:, None], factors[t], out=by_gates[t])
            state = torch.addmm(state * kept[t], by_gates[t].flatten(1), weight)
        of_inputs = torch.cat([by_gates[:, :, :2].flatten(2), summed * of_candidate], 2)
        return of_inputs.transpose(0, 1), by_gates.flatten(2).transpose(0, 1), None, None, None, None, None


def _begin(by_input: nn.Linear, by_state: nn.Linear, gates: int) -> None:
    """Glorot's uniform weights for the inputs, an orthogonal matrix for the states, gate by gate; no bias."""
    for block in by_input.weight.detach().chunk(gates):
        nn.init.xavier_uniform_(block)
    for block in by_state.weight.detach().chunk(gates):
        nn.init.orthogonal_(block)
    nn.init.zeros_(by_input.bias)
