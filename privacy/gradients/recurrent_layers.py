"""Rules of the gradient engine for torch's own LSTM and GRU: layers, directions, packed series, given first states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from medfed.errors import UnsupportedModel
from medfed.recurrence import Cell, Way, Weights, taped
from medfed.tape import Tape

Series = Tensor | PackedSequence
_USUAL = Way()


class TapedLstm:
    """In place of ``forward`` of an ``nn.LSTM``: (output, (last states, last cells))."""

    def __init__(self, module: nn.LSTM, tape: Tape, way: Way = _USUAL) -> None:
        self._layers = _Layers(module, "lstm", tape, way)

    def __call__(self, inputs: Series, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Series, tuple[Tensor, Tensor]]:
        output, (states, cells) = self._layers(inputs, hx or ())
        return output, (states, cells)


class TapedGru:
    """In place of ``forward`` of an ``nn.GRU``: (output, last states)."""

    def __init__(self, module: nn.GRU, tape: Tape, way: Way = _USUAL) -> None:
        self._layers = _Layers(module, "gru", tape, way)

    def __call__(self, inputs: Series, hx: Tensor | None = None) -> tuple[Series, Tensor]:
        output, (states,) = self._layers(inputs, () if hx is None else (hx,))
        return output, states


def taped_lstm(module: nn.LSTM, tape: Tape) -> TapedLstm:
    """The rule for ``nn.LSTM``. Raises ``UnsupportedModel`` (MF-160) for projections and for dropout between layers."""
    return TapedLstm(module, tape)


def taped_gru(module: nn.GRU, tape: Tape) -> TapedGru:
    """The rule for ``nn.GRU``. Raises ``UnsupportedModel`` (MF-160) for dropout between layers."""
    return TapedGru(module, tape)


class _Layers:
    def __init__(self, module: nn.RNNBase, cell: Cell, tape: Tape, way: Way) -> None:
        kind = type(module).__name__
        if module.proj_size:
            raise UnsupportedModel(160, f"{kind} with proj_size = {module.proj_size}", "use proj_size = 0")
        if module.dropout > 0 and module.num_layers > 1:
            # a mask drawn for a batch gives a record another gradient each time
            raise UnsupportedModel(
                160, f"{kind} with dropout = {module.dropout}", "use dropout = 0: the noise regularises"
            )
        self._module, self._cell, self._tape, self._way = module, cell, tape, way
        self._directions = 2 if module.bidirectional else 1

    def __call__(self, inputs: Series, first: tuple[Tensor, ...]) -> tuple[Series, list[Tensor]]:
        if isinstance(inputs, PackedSequence):
            return self._packed(inputs, first)
        if inputs.dim() != 3:
            kind = type(self._module).__name__
            raise UnsupportedModel(160, f"{kind} called with one series and no batch", "give it [n, steps, inputs]")
        if self._module.batch_first:
            return self._padded(inputs, None, first)
        output, last = self._padded(inputs.transpose(0, 1), None, first)
        return output.transpose(0, 1), last

    def _packed(self, packed: PackedSequence, first: tuple[Tensor, ...]) -> tuple[PackedSequence, list[Tensor]]:
        """In the order of the records, not in that of their lengths."""
        inputs, lengths = pad_packed_sequence(packed, batch_first=True)
        inside = torch.arange(inputs.shape[1], device=inputs.device) < lengths.to(inputs.device)[:, None]
        output, last = self._padded(inputs, inside, first)
        order = packed.sorted_indices
        if order is not None:
            output, lengths = output.index_select(0, order), lengths[order.cpu()]
        data, sizes = pack_padded_sequence(output, lengths, batch_first=True)[:2]
        return PackedSequence(data, sizes, order, packed.unsorted_indices), last

    def _padded(self, inputs: Tensor, inside: Tensor | None, first: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """[n, steps, i] -> [n, steps, directions * h], and what torch calls h_n (and c_n): [layers * directions, n, h]."""
        ends: list[tuple[Tensor, ...]] = []
        for layer in range(self._module.num_layers):
            states = []
            for direction in range(self._directions):
                begin = tuple(value[len(ends)] for value in first)
                way = Way(direction == 1, self._way.compiled, self._way.by_library)
                made, *last = taped(self._cell, self._tape, inputs, self._weights(layer, direction), inside, begin, way)
                states.append(made)
                ends.append(tuple(last))
            inputs = states[0] if len(states) == 1 else torch.cat(states, 2)
        return inputs, [torch.stack(each) for each in zip(*ends, strict=True)]

    def _weights(self, layer: int, direction: int) -> Weights:
        names = [
            f"{name}_l{layer}{'_reverse' * direction}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        return Weights(*(getattr(self._module, name) for name in names[: 4 if self._module.bias else 2]))
