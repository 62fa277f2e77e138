"""What layers leave of one pass for whoever takes gradients patient by patient: between ``models`` and ``privacy/gradients``.

A parameter's gradient by one record is a sum of simple terms over the layer's input and the gradient of its result. A layer
that writes these to a tape, in its backward pass, spares the engine what it would have to guess from hooks, and torch the
gradient of the whole batch. Layers of ``models`` offer ``taped_forward(tape, *inputs)``: the same result as ``forward``,
through autograd functions that write to the tape and give parameters no gradient of torch's; layers inside such a layer
are not looked at. For torch's own layers
``privacy/gradients/layers.py`` has the rules.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Tape(Protocol):
    """Takes the terms of one batch of n records. Records of one patient stand together.

    A parameter may be written to several times, once a use; the terms add up. One that is frozen is not written to. What is
    handed over belongs to the tape. The engine clips slot by slot: what a record leaves must be the same bits whatever
    stands in the other slots of a batch of this shape.
    """

    @property
    def dtype(self) -> torch.dtype | None:
        """What inputs and weights of products and convolutions are cast to; None: they stay as they are."""
        ...

    def outer(self, weight: nn.Parameter, inputs: Tensor, gradient: Tensor) -> None:
        """``weight`` [o, i] was used as ``inputs @ weight.T``: inputs [n, i] or [n, ..., i], gradient of the result
        [n, o] or [n, ..., o]."""
        ...

    def samples(self, parameter: nn.Parameter, each: Tensor) -> None:
        """The parameter's gradient record by record: [n, size], or [n] and the parameter's shape."""
        ...

    def rows(self, parameter: nn.Parameter, index: Tensor, gradient: Tensor) -> None:
        """Rows ``index`` int64[n, k] of ``parameter`` [rows, width] were used: gradient [n, k, width]."""
        ...
