"""LSTM and GRU layers that leave their gradients on a tape.

The gradient of a recurrent layer's weights by one record is a sum over steps of d x^T and d h^T, where d is the gradient
by the gates before their functions, x the inputs of the step and h the state that it began with. Going back through time
is needed for d alone. With it the weights are those of two linear layers over a sequence, and x, h and d go to the tape.
An LSTM has one d; of a GRU that of the states' side differs in the candidate by the reset gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.recurrent_cells import have_compiled_cell as have_compiled_cell
from medfed.recurrent_library import GruByLibrary, LstmByLibrary, ends
from medfed.recurrent_steps import Found, GruSteps, LstmSteps, Pass, steady
from medfed.tape import Tape

Cell = Literal["lstm", "gru"]
_LANES = 4


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one layer in one direction, as torch orders them: ``of_inputs`` [g * h, i], ``of_states`` [g * h, h], their biases
    [g * h], with g = 4 gates of an LSTM (input, forget, candidate, output) and 3 of a GRU (reset, update, candidate).
    A GRU's bias of the states stands, in the candidate, within the reset gate's product."""

    of_inputs: nn.Parameter
    of_states: nn.Parameter
    input_bias: nn.Parameter | None = None
    state_bias: nn.Parameter | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """How to go through time. ``compiled`` False: never by the compiled cell. ``by_library``: by torch's own kernels if
    what lies inside allows it; None: on a GPU only."""

    backwards: bool = False
    compiled: bool = True
    by_library: bool | None = None


_USUAL = Way()


def run(
    cell: Cell,
    gates: Tensor,
    weight: Tensor,
    state_bias: Tensor | None = None,
    inside: Tensor | None = None,
    first: tuple[Tensor, ...] = (),
    way: Way = _USUAL,
) -> Pass:
    """Through time: ``gates`` [steps, n, g * h], written over, are what the inputs give, with their bias.

    ``inside`` bool[n, steps]: whether a step counts; where not, the state passes through. ``first`` [n, h] each: what to
    begin with, state and cell of an LSTM; () is zeros.
    """
    hidden = weight.shape[1]
    if hidden % _LANES:
        return _Narrowed(cell, gates, weight, state_bias, inside, first, way)
    by_library = gates.is_cuda if way.by_library is None else way.by_library
    lengths = ends(inside) if by_library and inside is not None else None
    if cell == "lstm":
        gates = gates if state_bias is None else gates.add_(state_bias)
        if by_library and (inside is None or lengths is not None):
            return LstmByLibrary(gates, weight, lengths, first, backwards=way.backwards)
        return LstmSteps(gates, weight, inside, first, backwards=way.backwards, compiled=way.compiled)
    if by_library and (inside is None or lengths is not None):
        return GruByLibrary(gates, weight, state_bias, lengths, first, backwards=way.backwards)
    return GruSteps(gates, weight, state_bias, inside, first, backwards=way.backwards, compiled=way.compiled)


class _Narrowed:
    """A ``Pass`` among more units than there are, up to whole lanes; what was added stays zero throughout.

    Of a row that ends within a lane the processor's kernels compute the end by other code, and which depends on the place
    of the record in the batch.
    """

    def __init__(
        self,
        cell: Cell,
        gates: Tensor,
        weight: Tensor,
        state_bias: Tensor | None,
        inside: Tensor | None,
        first: tuple[Tensor, ...],
        way: Way,
    ) -> None:
        self._hidden, self._spare = weight.shape[1], -weight.shape[1] % _LANES
        self._made = run(
            cell,
            self._widened(gates),
            functional.pad(self._widened(weight.T).T, (0, self._spare)),
            None if state_bias is None else self._widened(state_bias),
            inside,
            tuple(self._widened(value) for value in first),
            way,
        )

    @property
    def states(self) -> Tensor:
        return self._made.states[:, :, : self._hidden]

    @property
    def before(self) -> Tensor:
        return self._made.before[:, :, : self._hidden]

    @property
    def last(self) -> tuple[Tensor, ...]:
        return tuple(value[:, : self._hidden] for value in self._made.last)

    def backward(self, by_states: Tensor | None, by_last: Sequence[Tensor | None] = (), *, keep: bool = False) -> Found:
        given = [None if value is None else self._widened(value) for value in (by_states, *by_last)]
        found = self._made.backward(given[0], given[1:], keep=keep)
        of_inputs = self._narrowed(found.of_inputs)
        of_states = of_inputs if found.of_states is found.of_inputs else self._narrowed(found.of_states)
        return Found(of_inputs, of_states, tuple(self._narrowed(value) for value in found.of_first))

    def _widened(self, values: Tensor) -> Tensor:
        """[..., k * h] -> [..., k * (h and what is added)]."""
        return functional.pad(_split(values, self._hidden), (0, self._spare)).flatten(-2)

    def _narrowed(self, values: Tensor) -> Tensor:
        return _split(values, self._hidden + self._spare)[..., : self._hidden].flatten(-2)


def _split(values: Tensor, width: int) -> Tensor:
    """[..., k * width] -> [..., k, width], of no records, too."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // width, width)


def taped(
    cell: Cell,
    tape: Tape,
    inputs: Tensor,
    weights: Weights,
    inside: Tensor | None = None,
    first: tuple[Tensor, ...] = (),
    way: Way = _USUAL,
) -> tuple[Tensor, ...]:
    """``inputs`` [n, steps, i] -> states [n, steps, h], the last state [n, h], and of an LSTM the last cell [n, h].

    The weights' gradients go to ``tape`` in the backward pass; those of ``inputs`` and ``first`` are torch's as usual. The
    backward pass can be made once. With ``tape.dtype`` the inputs' products, and what the tape gets of all products, are of
    that type; states and gates stay of the inputs'.
    """
    result: tuple[Tensor, ...] = _Taped.apply(  # type: ignore[no-untyped-call]
        cell,
        tape,
        way,
        inside,
        weights,
        inputs,
        *(weights.of_inputs, weights.of_states, weights.input_bias, weights.state_bias),
        *first,
    )
    return result


class _Taped(torch.autograd.Function):
    """The weights are arguments so that a first layer, whose inputs need no gradient, has a backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        cell: Cell,
        tape: Tape,
        way: Way,
        inside: Tensor | None,
        weights: Weights,
        inputs: Tensor,
        of_inputs: Tensor,
        of_states: Tensor,
        input_bias: Tensor | None,
        state_bias: Tensor | None,
        *first: Tensor,
    ) -> tuple[Tensor, ...]:
        used = _cast(inputs, tape.dtype)
        bias, rest = input_bias, state_bias
        if cell == "lstm" and input_bias is not None and state_bias is not None:
            bias, rest = input_bias + state_bias, None
        gates = _from_inputs(used, _cast(of_inputs, tape.dtype), None if bias is None else _cast(bias, tape.dtype))
        made = run(cell, gates.to(inputs.dtype), of_states, rest, inside, first, way)
        ctx.set_materialize_grads(False)
        # the states are shared with whoever gets them: saved, a change of theirs is noticed
        ctx.save_for_backward(used, of_inputs, made.before)
        ctx.made, ctx.tape = made, tape  # type: ignore[attr-defined]
        ctx.weights = weights  # type: ignore[attr-defined]
        return (made.states.detach(), *(value.detach() for value in made.last))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, by_states: Tensor | None, *by_last: Tensor | None) -> tuple[Tensor | None, ...]:
        used, of_inputs, before = ctx.saved_tensors  # type: ignore[attr-defined]
        made: Pass | None = ctx.made  # type: ignore[attr-defined]
        if made is None:
            raise RuntimeError("gradients that go to a tape can be taken once")
        ctx.made = None  # type: ignore[attr-defined]
        found = made.backward(by_states, by_last)
        tape: Tape = ctx.tape  # type: ignore[attr-defined]
        needs: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
        by_inputs = None
        if needs[5]:
            by_gates = _cast(found.of_inputs, tape.dtype)
            by_inputs = _to_inputs(by_gates, _cast(of_inputs, tape.dtype)).to(found.of_inputs.dtype)
        _write(tape, ctx.weights, used, before, found)  # type: ignore[attr-defined]
        of_first = found.of_first or (None,) * (len(needs) - 10)
        return None, None, None, None, None, by_inputs, None, None, None, None, *of_first


def _write(tape: Tape, weights: Weights, used: Tensor, before: Tensor, found: Found) -> None:
    """To the tape; of an LSTM both sides get the very same tensors of gradients."""
    of_inputs, of_states = found.of_inputs, found.of_states
    by_input = _cast(of_inputs.transpose(0, 1), tape.dtype)
    by_state = by_input if of_states is of_inputs else _cast(of_states.transpose(0, 1), tape.dtype)
    # the larger first: what is found for it of gradients that both share, the other need not find again
    if weights.of_states.requires_grad:
        tape.outer(weights.of_states, _cast(before, tape.dtype), by_state)
    if weights.of_inputs.requires_grad:
        tape.outer(weights.of_inputs, used, by_input)
    of_bias = of_inputs.sum(0)
    if weights.input_bias is not None and weights.input_bias.requires_grad:
        tape.samples(weights.input_bias, of_bias)
    if weights.state_bias is not None and weights.state_bias.requires_grad:
        tape.samples(weights.state_bias, of_bias if of_states is of_inputs else of_states.sum(0))


def _from_inputs(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, steps, i] -> [steps, n, g * h] without gaps: what the inputs give to the gates."""
    rows = inputs.transpose(0, 1).reshape(-1, inputs.shape[2])
    return functional.linear(rows, weight, bias).view(inputs.shape[1], inputs.shape[0], len(weight))


def _to_inputs(by_gates: Tensor, weight: Tensor) -> Tensor:
    """[steps, n, g * h] -> [n, steps, i]: the way back of the gradient."""
    rows, spare = by_gates.flatten(0, 1), -len(weight) % _LANES
    if spare:
        rows, weight = functional.pad(rows, (0, spare)), functional.pad(weight, (0, 0, 0, spare))
    return (rows @ steady(weight)).view(*by_gates.shape[:2], weight.shape[1]).transpose(0, 1)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
