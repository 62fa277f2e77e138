"""LSTM and GRU through time, step by step and both ways by hand.

Time comes first inside, so that what a step works on lies in one piece. A step is one matrix product with the states, and
one cell (``medfed.recurrent_cells``) for what is done value by value. ``Pass`` is what such a run offers; another way
through time is ``medfed.recurrent_library``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medfed.recurrent_cells import cells_for


@dataclass(frozen=True, slots=True)
class Found:
    """What going back through time comes to, for gates before their functions and states of width h.

    ``of_inputs``, ``of_states`` [steps, n, gates * h]: the gradient by what inputs and states give to the gates; the same
    tensor for an LSTM, different in the candidate of a GRU. ``of_first`` [n, h] each: by what the run began with, empty if
    that was zeros.
    """

    of_inputs: Tensor
    of_states: Tensor
    of_first: tuple[Tensor, ...]


class Pass(Protocol):
    """One run through time that has been made."""

    @property
    def states(self) -> Tensor:
        """[n, steps, h]: the states after each step."""
        ...

    @property
    def before(self) -> Tensor:
        """[n, steps, h]: the states that each step began with."""
        ...

    @property
    def last(self) -> tuple[Tensor, ...]:
        """The state where the run ended, and of an LSTM the cell: [n, h] each."""
        ...

    def backward(self, by_states: Tensor | None, by_last: Sequence[Tensor | None] = (), *, keep: bool = False) -> Found:
        """From the gradients by ``states`` and ``last``; None is one of zeros. It writes over what the run has left, and
        can be called once, unless ``keep``."""
        ...


class LstmSteps:
    """A ``Pass`` of an LSTM.

    ``gates`` [steps, n, 4 * h] without gaps: products of the inputs with all biases; written over. ``weight`` [4 * h, h].
    ``inside`` bool[n, steps], or None for all: a step outside leaves state and cell as they are, to the last bit. ``first``:
    state and cell to begin with, [n, h] each, or () for zeros. ``backwards``: begin at the last step. ``compiled`` False:
    torch's operations, whatever is installed.
    """

    def __init__(
        self,
        gates: Tensor,
        weight: Tensor,
        inside: Tensor | None = None,
        first: tuple[Tensor, ...] = (),
        *,
        backwards: bool = False,
        compiled: bool = True,
    ) -> None:
        steps, records, hidden = len(gates), gates.shape[1], weight.shape[1]
        self._gates, self._weight = gates, weight
        self._course = _Course(steps, inside, backwards)
        self._cells = cells_for(gates, compiled=compiled)
        self._has_first = bool(first)
        self._state = self._course.begin(gates.new_empty(steps + 1, records, hidden), *first[:1])
        self._cell = self._course.begin(torch.empty_like(self._state), *first[1:])
        transposed = weight.t()
        before, after = self._course.before, self._course.after
        for at, (gate, keep, cell, state, next_cell, next_state) in enumerate(
            zip(
                self._course.steps(gates),
                self._course.inside,
                before(self._cell),
                before(self._state),
                after(self._cell),
                after(self._state),
                strict=True,
            )
        ):
            if at or first:
                gate.addmm_(state, transposed)
            self._cells.lstm_forward(gate, cell, state, keep, next_cell, next_state)

    @property
    def states(self) -> Tensor:
        return self._course.all_after(self._state)

    @property
    def before(self) -> Tensor:
        return self._course.all_before(self._state)

    @property
    def last(self) -> tuple[Tensor, ...]:
        return self._course.end(self._state), self._course.end(self._cell)

    def backward(self, by_states: Tensor | None, by_last: Sequence[Tensor | None] = (), *, keep: bool = False) -> Found:
        gates = self._gates.clone() if keep else self._gates
        course = self._course
        earlier, by_state = course.gradients(by_states, by_last[:1], self._state)
        _, by_cell = course.gradients(None, by_last[1:], self._cell)
        left, weight = len(earlier), steady(self._weight)
        for gate, inside, cell, next_cell, more in zip(
            reversed(course.steps(gates)),
            reversed(course.inside),
            reversed(course.before(self._cell)),
            reversed(course.after(self._cell)),
            reversed(earlier),
            strict=True,
        ):
            self._cells.lstm_backward(gate, cell, next_cell, inside, by_state, by_cell, more)
            left -= 1
            if left or self._has_first:
                by_state.addmm_(gate, weight)
        return Found(gates, gates, (by_state, by_cell) if self._has_first else ())


class GruSteps:
    """A ``Pass`` of a GRU.

    As ``LstmSteps``, with ``gates`` [steps, n, 3 * h], ``weight`` [3 * h, h], one state in ``first``, and ``bias`` [3 * h]
    or None of what the states give: that of the candidate stands within the reset gate's product.
    """

    def __init__(
        self,
        gates: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        inside: Tensor | None = None,
        first: tuple[Tensor, ...] = (),
        *,
        backwards: bool = False,
        compiled: bool = True,
    ) -> None:
        steps, records, hidden = len(gates), gates.shape[1], weight.shape[1]
        self._gates, self._weight = gates, weight
        self._course = _Course(steps, inside, backwards)
        self._cells = cells_for(gates, compiled=compiled)
        self._has_first = bool(first)
        self._state = self._course.begin(gates.new_empty(steps + 1, records, hidden), *first)
        self._products = torch.empty_like(gates)
        shift = gates.new_zeros(3 * hidden) if bias is None else bias.detach().contiguous()
        transposed = weight.t()
        before, after = self._course.before, self._course.after
        for at, (gate, product, keep, state, next_state) in enumerate(
            zip(
                self._course.steps(gates),
                self._course.steps(self._products),
                self._course.inside,
                before(self._state),
                after(self._state),
                strict=True,
            )
        ):
            if at or first:
                torch.mm(state, transposed, out=product)
            else:
                product.zero_()
            self._cells.gru_forward(gate, product, shift, state, keep, next_state)

    @property
    def states(self) -> Tensor:
        return self._course.all_after(self._state)

    @property
    def before(self) -> Tensor:
        return self._course.all_before(self._state)

    @property
    def last(self) -> tuple[Tensor, ...]:
        return (self._course.end(self._state),)

    def backward(self, by_states: Tensor | None, by_last: Sequence[Tensor | None] = (), *, keep: bool = False) -> Found:
        gates, products = (self._gates.clone(), self._products.clone()) if keep else (self._gates, self._products)
        course = self._course
        earlier, by_state = course.gradients(by_states, by_last, self._state)
        left, weight = len(earlier), steady(self._weight)
        for gate, product, inside, state, more in zip(
            reversed(course.steps(gates)),
            reversed(course.steps(products)),
            reversed(course.inside),
            reversed(course.before(self._state)),
            reversed(earlier),
            strict=True,
        ):
            self._cells.gru_backward(gate, product, state, inside, by_state, more)
            left -= 1
            if left or self._has_first:
                by_state.addmm_(product, weight)
        return Found(gates, products, (by_state,) if self._has_first else ())


def steady(weight: Tensor) -> Tensor:
    """``weight`` [g, w] laid out for ``gradients @ weight``.

    Stored column by column: row by row, the processor's kernels give the last few of a small w other code by the place of
    a record, and seldom are quicker.
    """
    return weight.t().contiguous().t()


class _Course:
    """The order of steps. Series of states hold one entry more than there are steps: a step reads one and writes the next
    one, or, of a run that goes backwards, the one before."""

    def __init__(self, steps: int, inside: Tensor | None, backwards: bool) -> None:
        self._backwards = backwards
        self.inside: Sequence[Tensor | None] = [None] * steps
        if inside is not None:
            self.inside = self.steps(inside.t().contiguous())

    def steps(self, series: Tensor) -> Sequence[Tensor]:
        """The entries of [steps, ...] in the order of the run."""
        entries = series.unbind(0)
        return entries[::-1] if self._backwards else entries

    def before(self, series: Tensor) -> Sequence[Tensor]:
        return self.steps(series)[:-1]

    def after(self, series: Tensor) -> Sequence[Tensor]:
        return self.steps(series)[1:]

    def all_before(self, series: Tensor) -> Tensor:
        return (series[1:] if self._backwards else series[:-1]).transpose(0, 1)

    def all_after(self, series: Tensor) -> Tensor:
        return (series[:-1] if self._backwards else series[1:]).transpose(0, 1)

    def begin(self, series: Tensor, first: Tensor | None = None) -> Tensor:
        """``series`` with its first entry in the order of the run written."""
        entry = self.steps(series)[0]
        if first is None:
            entry.zero_()
        else:
            entry.copy_(first)
        return series

    def end(self, series: Tensor) -> Tensor:
        return self.steps(series)[-1]

    def gradients(
        self, by_states: Tensor | None, by_last: Sequence[Tensor | None], series: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """For each step the gradient that reaches the state it began with from elsewhere, and that by the last state."""
        total = torch.zeros_like(series[0])
        for given in by_last:
            if given is not None:
                total += given
        if by_states is None:
            return [None] * len(self.inside), total
        if by_states.stride(2) != 1:  # the compiled cell reads rows
            by_states = by_states.contiguous()
        outer = self.steps(by_states.transpose(0, 1))
        return [None, *outer[:-1]], total.add_(outer[-1])
