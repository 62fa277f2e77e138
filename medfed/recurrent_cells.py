"""One step of an LSTM or GRU between its matrix products, for all records at once: compiled, or in torch's operations.

The compiled one (``recurrent_cell.c``) is for float32 on the CPU and there only where ``pip install`` found a C compiler;
nothing but speed depends on it. Both compute each record by itself. All tensors of a step are of one type and without
gaps; h is the width of a state. ``inside`` (bool[n], or None for all) says for which records the step counts: the others'
states pass through to the last bit, and so does the gradient by them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Protocol

import torch
from torch import Tensor


class Cells(Protocol):
    """The cells of Hochreiter and Schmidhuber 1997, with gates in the order input, forget, candidate, output, and of Cho et
    al. 2014 in torch's form: reset, update, candidate, whose product with the state the reset gate multiplies."""

    def lstm_forward(
        self, gates: Tensor, cell: Tensor, state: Tensor, inside: Tensor | None, next_cell: Tensor, next_state: Tensor
    ) -> None:
        """``gates`` [n, 4 h]: before their functions, and after the call behind them; writes the next cell and state."""
        ...

    def lstm_backward(
        self,
        gates: Tensor,
        cell: Tensor,
        next_cell: Tensor,
        inside: Tensor | None,
        by_state: Tensor,
        by_cell: Tensor,
        earlier: Tensor | None,
    ) -> None:
        """``gates`` as the forward call left them, turned into the gradient by them before their functions.

        ``by_state``, ``by_cell`` [n, h]: the gradient by the next state and cell; after the call that by this step's own,
        but for the states' product with the gates' gradient, and with ``earlier`` [n, h], the gradient that reaches this
        step's state from elsewhere.
        """
        ...

    def gru_forward(
        self, gates: Tensor, products: Tensor, bias: Tensor, state: Tensor, inside: Tensor | None, next_state: Tensor
    ) -> None:
        """``gates`` [n, 3 h]: what the inputs give, and after the call the gates behind their functions; ``products``
        [n, 3 h]: what the state gives before ``bias`` [3 h], and after the call, in the candidate, with it; writes the next
        state."""
        ...

    def gru_backward(
        self,
        gates: Tensor,
        products: Tensor,
        state: Tensor,
        inside: Tensor | None,
        by_state: Tensor,
        earlier: Tensor | None,
    ) -> None:
        """Turns ``gates`` into the gradient by what the inputs give, ``products`` into that by what the state gives;
        ``by_state`` and ``earlier`` as of an LSTM."""
        ...


def have_compiled_cell() -> bool:
    """Whether the compiled cell is installed."""
    return _library() is not None


def cells_for(example: Tensor, *, compiled: bool = True) -> Cells:
    """The quickest cells for tensors like ``example``; with ``compiled`` False torch's operations in any case."""
    library = _library() if compiled and example.dtype == torch.float32 and example.device.type == "cpu" else None
    return _TorchCells() if library is None else _CompiledCells(library)


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("medfed.recurrent_cell")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        if library.medfed_cell_version() != _VERSION:
            return None
        for name, pointers, numbers in _SIGNATURES:
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_ssize_t] * numbers
            function.restype = None
    except (OSError, AttributeError):  # built for another machine, or before there was a version
        return None
    return library


_VERSION = 1
"""What ``recurrent_cell.c`` says of itself: the arguments below."""
_SIGNATURES = (
    ("medfed_lstm_forward", 6, 2),
    ("medfed_lstm_backward", 7, 3),
    ("medfed_gru_forward", 6, 2),
    ("medfed_gru_backward", 6, 3),
)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _CompiledCells:
    """Trusts its callers in ``medfed.recurrence`` with types, shapes and gaps: a check a step would cost what it saves."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._lstm_forward = library.medfed_lstm_forward
        self._lstm_backward = library.medfed_lstm_backward
        self._gru_forward = library.medfed_gru_forward
        self._gru_backward = library.medfed_gru_backward

    def lstm_forward(
        self, gates: Tensor, cell: Tensor, state: Tensor, inside: Tensor | None, next_cell: Tensor, next_state: Tensor
    ) -> None:
        self._lstm_forward(
            gates.data_ptr(),
            cell.data_ptr(),
            state.data_ptr(),
            _address(inside),
            next_cell.data_ptr(),
            next_state.data_ptr(),
            *cell.shape,
        )

    def lstm_backward(
        self,
        gates: Tensor,
        cell: Tensor,
        next_cell: Tensor,
        inside: Tensor | None,
        by_state: Tensor,
        by_cell: Tensor,
        earlier: Tensor | None,
    ) -> None:
        self._lstm_backward(
            gates.data_ptr(),
            cell.data_ptr(),
            next_cell.data_ptr(),
            _address(inside),
            by_state.data_ptr(),
            by_cell.data_ptr(),
            _address(earlier),
            0 if earlier is None else earlier.stride(0),
            *cell.shape,
        )

    def gru_forward(
        self, gates: Tensor, products: Tensor, bias: Tensor, state: Tensor, inside: Tensor | None, next_state: Tensor
    ) -> None:
        self._gru_forward(
            gates.data_ptr(),
            products.data_ptr(),
            bias.data_ptr(),
            state.data_ptr(),
            _address(inside),
            next_state.data_ptr(),
            *state.shape,
        )

    def gru_backward(
        self,
        gates: Tensor,
        products: Tensor,
        state: Tensor,
        inside: Tensor | None,
        by_state: Tensor,
        earlier: Tensor | None,
    ) -> None:
        self._gru_backward(
            gates.data_ptr(),
            products.data_ptr(),
            state.data_ptr(),
            _address(inside),
            by_state.data_ptr(),
            _address(earlier),
            0 if earlier is None else earlier.stride(0),
            *state.shape,
        )


class _TorchCells:
    """For any type and device."""

    def lstm_forward(
        self, gates: Tensor, cell: Tensor, state: Tensor, inside: Tensor | None, next_cell: Tensor, next_state: Tensor
    ) -> None:
        hidden = cell.shape[1]
        gates[:, : 2 * hidden].sigmoid_()
        gates[:, 3 * hidden :].sigmoid_()
        enter, forget, candidate, output = gates.chunk(4, 1)
        candidate.tanh_()
        torch.mul(forget, cell, out=next_cell).addcmul_(enter, candidate)
        torch.tanh(next_cell, out=next_state).mul_(output)
        _pass_through(inside, (next_cell, cell), (next_state, state))

    def lstm_backward(
        self,
        gates: Tensor,
        cell: Tensor,
        next_cell: Tensor,
        inside: Tensor | None,
        by_state: Tensor,
        by_cell: Tensor,
        earlier: Tensor | None,
    ) -> None:
        enter, forget, candidate, output = gates.chunk(4, 1)
        shown = next_cell.tanh()
        whole = torch.addcmul(by_cell, by_state * output, 1 - shown * shown)
        kept = whole * forget
        of_enter = whole * candidate
        torch.mul(whole * enter, 1 - candidate * candidate, out=candidate)
        enter.mul_(1 - enter).mul_(of_enter)
        forget.mul_(1 - forget).mul_(whole.mul_(cell))
        output.mul_(1 - output).mul_(shown.mul_(by_state))
        _pass_back(inside, by_cell, kept)
        _pass_back(inside, by_state, None, earlier)
        if inside is not None:
            gates.masked_fill_(~inside[:, None], 0.0)

    def gru_forward(
        self, gates: Tensor, products: Tensor, bias: Tensor, state: Tensor, inside: Tensor | None, next_state: Tensor
    ) -> None:
        hidden = state.shape[1]
        gates[:, : 2 * hidden].add_(products.add_(bias)[:, : 2 * hidden]).sigmoid_()
        reset, update, candidate = gates.chunk(3, 1)
        candidate.addcmul_(reset, products[:, 2 * hidden :]).tanh_()
        torch.sub(state, candidate, out=next_state).mul_(update).add_(candidate)
        _pass_through(inside, (next_state, state))

    def gru_backward(
        self,
        gates: Tensor,
        products: Tensor,
        state: Tensor,
        inside: Tensor | None,
        by_state: Tensor,
        earlier: Tensor | None,
    ) -> None:
        hidden = state.shape[1]
        reset, update, candidate = gates.chunk(3, 1)
        recalled = products[:, 2 * hidden :]
        kept = by_state * update
        of_candidate = (by_state - kept).mul_(1 - candidate * candidate)
        of_update = torch.sub(state, candidate).mul_(by_state)
        candidate.copy_(of_candidate)
        update.mul_(1 - update).mul_(of_update)
        of_reset = of_candidate * recalled
        torch.mul(of_candidate, reset, out=recalled)
        reset.mul_(1 - reset).mul_(of_reset)
        products[:, : 2 * hidden] = gates[:, : 2 * hidden]
        _pass_back(inside, by_state, kept, earlier)
        if inside is not None:
            gates.masked_fill_(~inside[:, None], 0.0)
            products.masked_fill_(~inside[:, None], 0.0)


def _pass_through(inside: Tensor | None, *pairs: tuple[Tensor, Tensor]) -> None:
    if inside is not None:
        for written, before in pairs:
            torch.where(inside[:, None], written, before, out=written)


def _pass_back(inside: Tensor | None, gradient: Tensor, found: Tensor | None, more: Tensor | None = None) -> None:
    """``gradient`` becomes ``found`` (None: zero) where the step counts, and ``more`` is added everywhere."""
    if inside is None:
        gradient.zero_() if found is None else gradient.copy_(found)
    else:
        torch.where(inside[:, None], gradient.new_zeros(()) if found is None else found, gradient, out=gradient)
    if more is not None:
        gradient.add_(more)
