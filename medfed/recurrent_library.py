"""LSTM and GRU through time by torch's own kernels (cuDNN on a GPU), for the gradient by the gates alone.

A loop of small kernels is what a GPU does worst, and its library's recurrences, which have no loop outside, give away the
gradient of inputs and weights only. But multiplied beforehand, the inputs' products can themselves be the inputs of a
recurrence whose input weight is the identity: then the gradient by its inputs *is* the one by the gates before their
functions. Of a GRU the states' side differs in the candidate by the reset gate, which one product over all steps gives.

Records with an end of their own run on past it. Their states are then held where they ended, the gradients that reach
what is held are added to that state's, and an LSTM's gates are set so that the cell stays. The end must be one: ``inside``
must be true for the first steps of a record and false for all others.

Tried on the CPU against the loop (``tests/models/test_recurrence.py``). It has not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medfed.recurrent_steps import Found

# added to a gate it opens or closes it whatever the states give to it, in float32 and float64
_SHUT = 1e4


def ends(inside: Tensor) -> Tensor | None:
    """bool[n, steps] -> int64[n], the steps inside; None if any record has one after a step outside."""
    lengths = inside.sum(1)
    places = torch.arange(inside.shape[1], device=inside.device)
    return lengths if bool(torch.equal(inside, places < lengths[:, None])) else None


class LstmByLibrary:
    """A ``Pass`` of an LSTM; arguments as of ``LstmSteps``, but for ``lengths`` (int64[n], from ``ends``, or None)."""

    def __init__(
        self,
        gates: Tensor,
        weight: Tensor,
        lengths: Tensor | None = None,
        first: tuple[Tensor, ...] = (),
        *,
        backwards: bool = False,
    ) -> None:
        hidden = weight.shape[1]
        self._has_first = bool(first)
        self._order = _Order(lengths, len(gates), backwards)
        fed = self._order.arrange(gates)
        if self._order.outside is not None:
            shut = fed.new_tensor([-_SHUT, _SHUT, 0.0, 0.0]).repeat_interleave(hidden)
            fed = torch.where(self._order.outside, shut, fed)
        begin = first or (fed.new_zeros(fed.shape[1], hidden),) * 2
        self._leaves = [leaf.detach().clone().requires_grad_() for leaf in (fed, *begin)]
        fed, state, cell = self._leaves
        with torch.enable_grad():
            made, _, cells = torch.lstm(
                fed,
                (state[None], cell[None]),
                [_identity(fed), weight.detach()],
                has_biases=False,
                num_layers=1,
                dropout=0.0,
                train=True,
                bidirectional=False,
                batch_first=False,
            )
            self._after, end = self._order.held(made, state)
            self._outputs = (self._after, end, cells[0])

    @property
    def states(self) -> Tensor:
        return self._order.arrange(self._after.detach()).transpose(0, 1)

    @property
    def before(self) -> Tensor:
        return self._order.before(self._after.detach(), self._leaves[1].detach())

    @property
    def last(self) -> tuple[Tensor, ...]:
        return tuple(output.detach() for output in self._outputs[1:])

    def backward(self, by_states: Tensor | None, by_last: Sequence[Tensor | None] = (), *, keep: bool = False) -> Found:
        of_fed, *of_first = _back(self._order, self._outputs, self._leaves, by_states, by_last, keep)
        return Found(of_fed, of_fed, tuple(of_first) if self._has_first else ())


class GruByLibrary:
    """A ``Pass`` of a GRU; arguments as of ``GruSteps``, but for ``lengths`` (int64[n], from ``ends``, or None)."""

    def __init__(
        self,
        gates: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        lengths: Tensor | None = None,
        first: tuple[Tensor, ...] = (),
        *,
        backwards: bool = False,
    ) -> None:
        hidden = weight.shape[1]
        self._has_first = bool(first)
        self._order = _Order(lengths, len(gates), backwards)
        self._reset_weight = weight[:hidden].detach()
        self._reset_bias = None if bias is None else bias[:hidden].detach()
        fed = self._order.arrange(gates)
        if self._order.outside is not None:
            fed = fed.masked_fill(self._order.outside, 0.0)
        begin = first or (fed.new_zeros(fed.shape[1], hidden),)
        self._leaves = [leaf.detach().clone().requires_grad_() for leaf in (fed, *begin)]
        fed, state = self._leaves
        weights = [_identity(fed), weight.detach()]
        if bias is not None:
            weights += [torch.zeros_like(bias), bias.detach()]
        with torch.enable_grad():
            made, _ = torch.gru(
                fed,
                state[None],
                weights,
                has_biases=bias is not None,
                num_layers=1,
                dropout=0.0,
                train=True,
                bidirectional=False,
                batch_first=False,
            )
            self._outputs = self._order.held(made, state)

    @property
    def states(self) -> Tensor:
        return self._order.arrange(self._outputs[0].detach()).transpose(0, 1)

    @property
    def before(self) -> Tensor:
        return self._order.before(self._outputs[0].detach(), self._leaves[1].detach())

    @property
    def last(self) -> tuple[Tensor, ...]:
        return (self._outputs[1].detach(),)

    def backward(self, by_states: Tensor | None, by_last: Sequence[Tensor | None] = (), *, keep: bool = False) -> Found:
        of_fed, *of_first = _back(self._order, self._outputs, self._leaves, by_states, by_last, keep)
        hidden = self._reset_weight.shape[1]
        reset = torch.nn.functional.linear(self.before.transpose(0, 1), self._reset_weight, self._reset_bias)
        reset += self._order.arrange(self._leaves[0].detach()[:, :, :hidden])
        of_states = of_fed.clone()
        of_states[:, :, 2 * hidden :] *= reset.sigmoid_()
        return Found(of_fed, of_states, tuple(of_first) if self._has_first else ())


class _Order:
    """Between the steps as they are and as the library is to go through them: each record's own, from its last to its first
    if backwards, and then what lies outside."""

    def __init__(self, lengths: Tensor | None, steps: int, backwards: bool) -> None:
        self._lengths = lengths
        self._backwards = backwards
        self.outside: Tensor | None = None
        if lengths is not None:
            places = torch.arange(steps, device=lengths.device)[:, None]
            self.outside = (places >= lengths)[:, :, None]
            mirrored = torch.where(places < lengths, lengths - 1 - places, places)
            self._places = (mirrored if backwards else places.expand(-1, len(lengths)))[:, :, None]

    def arrange(self, series: Tensor) -> Tensor:
        """[steps, n, w] from one order to the other: it is the same way there and back."""
        if not self._backwards:
            return series
        return series.flip(0) if self._lengths is None else series.gather(0, self._places.expand_as(series))

    def held(self, made: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The states after each step in the library's order, held where the record has no step, and the last ones.

        Steps outside come last, or first of all if backwards: then the state is still what the run began with.
        """
        if self._lengths is None or self.outside is None:
            return made, made[-1]
        begun = torch.cat([first[None], made])
        end = begun.gather(0, self._lengths[None, :, None].expand(1, -1, made.shape[2]))[0]
        return torch.where(self.outside, first if self._backwards else end, made), end

    def before(self, after: Tensor, first: Tensor) -> Tensor:
        """[n, steps, h]: what each step began with."""
        return self.arrange(torch.cat([first[None], after[:-1]])).transpose(0, 1)


def _back(
    order: _Order,
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    by_states: Tensor | None,
    by_last: Sequence[Tensor | None],
    keep: bool,
) -> list[Tensor]:
    """Gradients by the leaves, that by the gates in the order of steps."""
    given = [None if by_states is None else order.arrange(by_states.transpose(0, 1)), *by_last]
    reached = [(output, by) for output, by in zip(outputs, given, strict=False) if by is not None]
    if not reached:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        [output for output, _ in reached], leaves, [by for _, by in reached], retain_graph=keep, allow_unused=True
    )
    of_leaves = [torch.zeros_like(leaf) if by is None else by for leaf, by in zip(leaves, found, strict=True)]
    if order.outside is not None:
        of_leaves[0] = of_leaves[0].masked_fill(order.outside, 0.0)
    return [order.arrange(of_leaves[0]), *of_leaves[1:]]


def _identity(fed: Tensor) -> Tensor:
    return torch.eye(fed.shape[2], dtype=fed.dtype, device=fed.device)
