"""LSTM and GRU over series: float32[n, steps, channels] -> logits float32[n, outputs].

The channels are those of ``medfed.data_contract.Series``: variables, whether each was observed, whether the step lies
inside the stay, features. A step outside the stay leaves the state as it is, to the last bit.

Each layer's recurrence runs through time by hand, both ways (``medfed.recurrence``). Beside it the linear layer of the
states sees all states of the series at once: its result is used by nobody, but the gradient that reaches it is that of
each step's gates, so its weight gets the gradient of backpropagation through time. To whoever takes gradients record by
record through hooks, a recurrent layer is thereby two linear layers over a sequence, and none that is called anew at every
step. A tape gets the same terms without that product.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from medfed.models.gru_d import InputDecay
from medfed.models.head import linear_from_zero
from medfed.models.summaries import summarise, width
from medfed.recurrence import Cell, Weights, run, taped
from medfed.recurrent_steps import Pass
from medfed.tape import Tape


class Recurrent(nn.Module):
    """``layers`` LSTM or GRU layers, the last one's final state, and a linear layer begun at zero.

    With ``summaries`` that layer also sees the series' summaries (``summarise``), so that it starts as a logistic
    regression on them. ``both_ways``: beside each layer one that goes back through the stay; the next sees both.
    ``decay``: values carried forward fade (``gru_d.InputDecay``). Parameters: g * h * (inputs + h + 1) for each layer, where
    g is 4 of an LSTM and 3 of a GRU, twice that of ``both_ways``, and outputs * (h + 1 + summaries). An LSTM of h = 32 over
    37 variables and 5 features: 14,497, with summaries 14,688.
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
        *,
        both_ways: bool = False,
        decay: bool = False,
    ) -> None:
        super().__init__()
        ways = 2 if both_ways else 1
        widths = [(3 if decay else 2) * variables + 1 + features, *[ways * hidden_size] * (layers - 1)]
        kind = LstmLayer if cell == "lstm" else GruLayer
        self.decay = InputDecay(variables) if decay else nn.Identity()
        self.layers = nn.ModuleList([kind(width, hidden_size) for width in widths])
        self.backward_layers = nn.ModuleList([kind(width, hidden_size) for width in widths] if both_ways else [])
        self.variables = variables
        self.summaries = summaries
        self.head = linear_from_zero(ways * hidden_size + (width(variables, features) if summaries else 0), outputs)

    def forward(self, series: Tensor) -> Tensor:
        inside = series[:, :, 2 * self.variables] > 0
        states = self.decay(series)
        seen = states[:, -1]
        for place, layer in enumerate(self.layers):
            onwards = layer(states, inside)
            seen = onwards[:, -1]
            if self.backward_layers:
                # flipped, what lies outside the stay comes first, and leaves the state at zero
                back = self.backward_layers[place](states.flip(1), inside.flip(1)).flip(1)
                onwards, seen = torch.cat([onwards, back], dim=2), torch.cat([seen, back[:, 0]], dim=1)
            states = onwards
        if self.summaries:
            seen = torch.cat([seen, summarise(series, self.variables)], dim=1)
        logits: Tensor = self.head(seen)
        return logits


class _Layer(nn.Module):
    """One layer in one direction; ``by_input`` holds the bias, which a recurrence needs once."""

    cell: Cell

    def __init__(self, inputs: int, hidden_size: int, gates: int) -> None:
        super().__init__()
        self.by_input = nn.Linear(inputs, gates * hidden_size)
        self.by_state = nn.Linear(hidden_size, gates * hidden_size, bias=False)
        _begin(self.by_input, self.by_state, gates)

    def forward(self, inputs: Tensor, inside: Tensor) -> Tensor:
        by_input = self.by_input(inputs)
        # of one record, too, a copy: it is written over
        gates = by_input.detach().transpose(0, 1).clone(memory_format=torch.contiguous_format)
        made = run(self.cell, gates, self.by_state.weight.detach(), inside=inside)
        by_state = self.by_state(made.before)
        result: Tensor = _Made.apply(by_input, by_state, made)  # type: ignore[no-untyped-call]
        return result

    def taped_forward(self, tape: Tape, inputs: Tensor, inside: Tensor) -> Tensor:
        """As ``forward``, for whoever takes gradients by record (``medfed/tape.py``)."""
        weights = Weights(self.by_input.weight, self.by_state.weight, self.by_input.bias)  # type: ignore[arg-type]
        return taped(self.cell, tape, inputs, weights, inside)[0]


class LstmLayer(_Layer):
    """float[n, steps, inputs], inside bool[n, steps] -> states float[n, steps, h] (Hochreiter and Schmidhuber 1997).

    Gates in the order input, forget, candidate, output; one bias, of the forget gate begun at 1 (Jozefowicz et al. 2015).
    """

    cell = "lstm"

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__(inputs, hidden_size, gates=4)
        with torch.no_grad():
            self.by_input.bias[hidden_size : 2 * hidden_size] = 1.0


class GruLayer(_Layer):
    """float[n, steps, inputs], inside bool[n, steps] -> states float[n, steps, h] (Cho et al. 2014).

    Gates in the order reset, update, candidate; the reset gate multiplies the candidate's product with the state. One bias.
    """

    cell = "gru"

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__(inputs, hidden_size, gates=3)


class _Made(torch.autograd.Function):
    """The states of a run that has been made, and the gradients of both sides of each step's gates before their functions."""

    @staticmethod
    def forward(ctx: FunctionCtx, by_input: Tensor, by_state: Tensor, made: Pass) -> Tensor:
        ctx.made = made  # type: ignore[attr-defined]
        return made.states.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        made: Pass = ctx.made  # type: ignore[attr-defined]
        found = made.backward(gradient, keep=True)
        return found.of_inputs.transpose(0, 1), found.of_states.transpose(0, 1), None


def _begin(by_input: nn.Linear, by_state: nn.Linear, gates: int) -> None:
    """Glorot's uniform weights for the inputs, an orthogonal matrix for the states, gate by gate; no bias."""
    for block in by_input.weight.detach().chunk(gates):
        nn.init.xavier_uniform_(block)
    for block in by_state.weight.detach().chunk(gates):
        nn.init.orthogonal_(block)
    nn.init.zeros_(by_input.bias)
