"""The tape the engine reads: each parameter's gradient patient by patient, in the cheapest form that is exact and safe.

Four forms. ``Samples`` and ``Matrices`` hold the gradient itself: its norm is that of the very numbers that are summed.
``Products`` holds what the gradient is the product of, where a layer saw one input a patient: the norm is |a| |g|, and the
clipped sum of all patients one matrix product. ``Rows`` holds the rows of an embedding that a patient used.

*Source* Goodfellow 2015 (arXiv:1510.01799) for one input a record; Bu et al. 2023 (arXiv:2210.00038) for book-keeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from medfed.errors import UnsupportedModel
from medfed.privacy.gradients.products import outer_sums

BLOCK = 1024
"""Values added up in float32 before float64 takes over: a float32 sum over millions is wrong by 1e-4 and more."""
AT_ONCE = 64
"""Patients added up in one float32 product: what rounding does to a sum grows with the square of it."""


class Form(Protocol):
    """One parameter's gradient in a batch, patient by patient."""

    def squared_norms(self) -> Tensor:
        """float64[patients]."""
        ...

    def add_clipped(self, total: Tensor, factors: Tensor, segments: Sequence[tuple[int, slice]]) -> None:
        """Add each patient's gradient times its factor to the row of ``total`` float64[rows, size] that its segment names.

        ``factors``: float[patients]; ``segments``: (row, patients), which leave no patient out.
        """
        ...

    def drop(self, kept: Tensor) -> None:
        """Forget the patients where bool[patients] ``kept`` is false: what they hold may be no number at all."""
        ...

    def dense(self) -> Tensor:
        """[patients, size]."""
        ...

    def slots(self) -> list[Tensor]:
        """What a patient's share of the sum is made of, [patients, ...] each: for the slot test."""
        ...


class Samples:
    """The gradient itself, [patients, size]."""

    def __init__(self, each: Tensor) -> None:
        self._each = each

    def squared_norms(self) -> Tensor:
        return squares(self._each)

    def add_clipped(self, total: Tensor, factors: Tensor, segments: Sequence[tuple[int, slice]]) -> None:
        for row, patients in segments:
            for start in range(patients.start, patients.stop, AT_ONCE):
                some = slice(start, min(start + AT_ONCE, patients.stop))
                total[row] += factors[some] @ self._each[some]

    def drop(self, kept: Tensor) -> None:
        self._each = self._each.where(kept[:, None], 0.0)

    def dense(self) -> Tensor:
        return self._each

    def slots(self) -> list[Tensor]:
        return [self._each]


class Matrices:
    """The gradient of a weight [o, i] itself, as [patients, o', i'] or turned, [patients, i', o']: zeros fill it up."""

    def __init__(self, each: Tensor, shape: torch.Size, *, is_turned: bool) -> None:
        self._each, self._shape, self._is_turned = each, shape, is_turned

    def squared_norms(self) -> Tensor:
        return squares(self._each.flatten(1))

    def add_clipped(self, total: Tensor, factors: Tensor, segments: Sequence[tuple[int, slice]]) -> None:
        for row, patients in segments:
            for start in range(patients.start, patients.stop, AT_ONCE):
                some = slice(start, min(start + AT_ONCE, patients.stop))
                found = (factors[some] @ self._each[some].flatten(1)).view(self._each.shape[1:])
                total[row].view(self._shape).add_(self._of_weight(found))

    def _of_weight(self, each: Tensor) -> Tensor:
        """[..., o, i] of what lies here."""
        return (each.mT if self._is_turned else each)[..., : self._shape[0], : self._shape[1]]

    def drop(self, kept: Tensor) -> None:
        self._each = self._each.where(kept[:, None, None], 0.0)

    def dense(self) -> Tensor:
        return self._of_weight(self._each).flatten(1)

    def slots(self) -> list[Tensor]:
        return [self._each]


class Products:
    """Inputs a [patients, i] and gradients g [patients, o] of a weight [o, i] that was used once: each gradient is g a^T.

    For one use only. With several, sum_k g_k a_k^T, the same trick (norms from Gram matrices, one product over patients and
    steps) is not safe from chosen weights: terms that cancel leave a sum that is rounding, terms too small for float32 have no
    norm, and a chain of additions through all patients lets one of them push the others' terms out. Attacks moved the sum by
    up to 25 C (``tests/privacy/test_gradient_engine.py``). There the gradient is formed in full.
    """

    def __init__(self, inputs: Tensor, gradient: Tensor) -> None:
        self._inputs, self._gradient = inputs, gradient

    def squared_norms(self) -> Tensor:
        # in float64: of numbers as small as 1e-25 the square is nothing in float32
        return squares(self._inputs.double()) * squares(self._gradient.double())

    def add_clipped(self, total: Tensor, factors: Tensor, segments: Sequence[tuple[int, slice]]) -> None:
        inputs, gradient = self._inputs, self._gradient
        if inputs.shape[1] < gradient.shape[1]:  # the factors go to the narrower of the two
            inputs = inputs * factors[:, None]
        else:
            gradient = gradient * factors[:, None]
        for row, patients in segments:
            left, right = gradient[patients], inputs[patients]
            if len(left) > AT_ONCE and len(left) % AT_ONCE == 0:
                parts = [each.reshape(-1, AT_ONCE, each.shape[1]) for each in (left, right)]
                total[row] += torch.bmm(parts[0].transpose(1, 2), parts[1]).sum(0, dtype=torch.float64).flatten()
                continue
            for start in range(0, len(left), AT_ONCE):
                some = slice(start, start + AT_ONCE)
                total[row] += (left[some].T @ right[some]).flatten()

    def drop(self, kept: Tensor) -> None:
        self._inputs = self._inputs.where(kept[:, None], 0.0)
        self._gradient = self._gradient.where(kept[:, None], 0.0)

    def dense(self) -> Tensor:
        return (self._gradient[:, :, None] * self._inputs[:, None, :]).flatten(1)

    def slots(self) -> list[Tensor]:
        return [self._inputs, self._gradient]


class Rows:
    """The rows of an embedding [rows, width] that each patient used, each row once."""

    def __init__(self, index: Tensor, gradient: Tensor, shape: torch.Size) -> None:
        self._patients, used = index.shape
        self._height, self._width = shape
        self._given = gradient
        owners = torch.arange(self._patients, device=index.device).repeat_interleave(used)
        keys, place = torch.unique(owners * self._height + index.flatten(), return_inverse=True)
        # one after the other, in the order of a patient's own record: no other patient changes a bit
        self._each = gradient.new_zeros(len(keys), self._width).index_add_(0, place, gradient.flatten(0, 1))
        self._owners, self._index = keys // self._height, keys % self._height

    def squared_norms(self) -> Tensor:
        each = squares(self._each)
        return each.new_zeros(self._patients).index_add_(0, self._owners, each)

    def add_clipped(self, total: Tensor, factors: Tensor, segments: Sequence[tuple[int, slice]]) -> None:
        clipped = (self._each * factors[self._owners, None]).double()
        for row, patients in segments:
            inside = slice(
                *torch.searchsorted(self._owners, self._owners.new_tensor([patients.start, patients.stop])).tolist()
            )
            total[row].view(self._height, self._width).index_add_(0, self._index[inside], clipped[inside])

    def drop(self, kept: Tensor) -> None:
        self._each = self._each.where(kept[self._owners, None], 0.0)

    def dense(self) -> Tensor:
        whole = self._each.new_zeros(self._patients * self._height, self._width)
        whole[self._owners * self._height + self._index] = self._each
        return whole.view(self._patients, -1)

    def slots(self) -> list[Tensor]:
        return [self._given]


class PatientTape:
    """Takes what the layers of one batch leave. ``dtype`` as in ``medfed.tape.Tape``."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.forms: dict[nn.Parameter, Form] = {}
        self._shared: tuple[Tensor, Tensor] | None = None
        # of large tensors, that batches overwrite: to get megabytes anew from the system takes as long as to fill them
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._records = self._each = 0

    def start(self, records: int, of_each: int) -> None:
        """Forget everything; the next batch has ``records`` records, ``of_each`` of every patient."""
        self.forms, self._shared = {}, None
        self._records, self._each = records, of_each

    def outer(self, weight: nn.Parameter, inputs: Tensor, gradient: Tensor) -> None:
        self._expect(weight, inputs)
        self._expect(weight, gradient)
        a = _accurate(inputs).reshape(self._patients, -1, inputs.shape[-1]).contiguous()
        if self._shared is None or self._shared[0] is not gradient:  # two weights of a layer may share it
            g = _accurate(gradient).reshape(self._patients, -1, gradient.shape[-1]).contiguous()
            self._shared = gradient, g
        g = self._shared[1]
        if a.shape[1] == 1:
            self._add(weight, Products(a[:, 0], g[:, 0]))
        else:
            # a product whose rows are long is quicker: the longer side goes last
            is_turned = g.shape[2] > a.shape[2]
            kept = None if weight in self.forms else self._kept.get(weight)
            sums = outer_sums(g, a, kept) if is_turned else outer_sums(a, g, kept)
            if weight not in self.forms:
                self._kept[weight] = sums
            self._add(weight, Matrices(sums, weight.shape, is_turned=is_turned))

    def samples(self, parameter: nn.Parameter, each: Tensor) -> None:
        self._expect(parameter, each)
        flat = _accurate(each).reshape(self._records, -1)
        if flat.shape[1] != parameter.numel():
            raise UnsupportedModel(160, "a layer's samples have another size than its parameter", "mend the layer")
        if self._each > 1:
            flat = flat.view(self._patients, self._each, -1).sum(1)
        self._add(parameter, Samples(flat))

    def rows(self, parameter: nn.Parameter, index: Tensor, gradient: Tensor) -> None:
        self._expect(parameter, index)
        self._expect(parameter, gradient)
        of_patients = index.reshape(self._patients, -1)
        each = _accurate(gradient).reshape(self._patients, -1, gradient.shape[-1])
        self._add(parameter, Rows(of_patients, each, parameter.shape))

    @property
    def is_dense(self) -> bool:
        """Whether all matrices were used once a record: then a pass takes little memory, and large batches pay."""
        return all(isinstance(form, Products) for weight, form in self.forms.items() if weight.dim() > 1)

    @property
    def _patients(self) -> int:
        return self._records // self._each

    def _add(self, parameter: nn.Parameter, form: Form) -> None:
        before = self.forms.get(parameter)
        # of a parameter used twice the two gradients add up before the norm: cross terms and all
        self.forms[parameter] = form if before is None else Samples(before.dense() + form.dense())

    def _expect(self, parameter: nn.Parameter, given: Tensor) -> None:
        """A layer called without the batch's first dimension sums over records before it is asked."""
        if given.dim() < 1 or len(given) != self._records:
            what = f"a parameter of shape {tuple(parameter.shape)} sees {len(given)} records of {self._records}"
            raise UnsupportedModel(160, what, "call each layer with the batch in the first dimension")


def squares(each: Tensor) -> Tensor:
    """Squared norms of the rows of [n, size]: float64[n], off by 1e-6 of themselves at most."""
    if each.dtype == torch.float64:
        return _dots(each)
    whole = each.shape[1] // BLOCK * BLOCK
    total = _dots(each[:, whole:])
    if whole:
        total += _dots(each[:, :whole].reshape(len(each), -1, BLOCK)).sum(1)
    return total


def _dots(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms.double().square_()


def _accurate(given: Tensor) -> Tensor:
    """Norms and sums are taken in float32 or wider, whatever the pass was computed in."""
    given = given.detach()  # what a layer saved would else keep the whole pass
    return given if given.dtype == torch.float64 else given.float()
