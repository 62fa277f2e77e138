"""The tape the engine reads: each parameter's gradient patient by patient, in the cheapest form that is exact.

Three forms. ``Samples`` holds the gradient itself, [patients, size]: its norm is that of the very numbers that are summed.
``Products`` holds a layer's inputs a and its result's gradients g, of which the patient's gradient is sum_k g_k a_k^T; its
squared norm is <a a^T, g g^T>, and the clipped sum of all patients one matrix product. ``Rows`` holds the rows of an
embedding that a patient used.

*Source* Goodfellow 2015 (arXiv:1510.01799) for one input a record; Li et al. 2022 (arXiv:2110.05679, section 4) and Bu et
al. 2023 (arXiv:2210.00038) for Gram matrices and book-keeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from medfed.errors import UnsupportedModel
from medfed.privacy.gradients.products import gram, outer_sums

BLOCK = 1024
"""Values added up in float32 before float64 takes over: a float32 sum over millions is wrong by 1e-4 and more."""
AT_ONCE = 64
"""Patients added up in one float32 product: what rounding does to a sum grows with the square of it."""
MOST_CANCELLING = 64.0
"""Of ``Products`` with several terms a patient: how much larger than the clipped gradient its terms may be (see ``floor``)."""
_LEAST_SQUARE = 1e-32
_GRAM_PAYS = 40


class Form(Protocol):
    """One parameter's gradient in a batch, patient by patient."""

    def squared_norms(self) -> Tensor:
        """float64[patients]."""
        ...

    def floor(self) -> Tensor | None:
        """float64[patients]: least norm the patient is clipped as if it had; None: its norm is enough. Once norms are taken."""
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
    """The gradient itself: [patients, size]."""

    def __init__(self, each: Tensor) -> None:
        self._each = each

    def squared_norms(self) -> Tensor:
        return squares(self._each)

    def floor(self) -> Tensor | None:
        return None

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


class Side:
    """Gradients g [patients, k, o] of a layer's result, which one or two weights of the layer share."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._gram: Tensor | None = None
        self._clipped: tuple[Tensor, Tensor] | None = None

    @property
    def has_gram(self) -> bool:
        return self._gram is not None

    def gram(self) -> Tensor:
        """[patients, k, k]. A patient's gradients that are too small for their squares count as none."""
        if self._gram is None:
            self._gram = gram(self.values)
            vanishing = self._gram.diagonal(dim1=1, dim2=2).amax(1) < _LEAST_SQUARE
            if bool(vanishing.any()):
                self.drop(~vanishing)
                self._gram = self._gram.where(~vanishing[:, None, None], 0.0)
        return self._gram

    def clipped(self, factors: Tensor) -> Tensor:
        if self._clipped is None or self._clipped[0] is not factors:
            self._clipped = factors, self.values * factors[:, None, None]
        return self._clipped[1]

    def drop(self, kept: Tensor) -> None:
        self.values = self.values.where(kept[:, None, None], 0.0)


class Products:
    """Inputs a [patients, k, i] and gradients g of a weight [o, i]."""

    def __init__(self, inputs: Tensor, side: Side) -> None:
        self._inputs, self._side = inputs, side
        self.is_one = inputs.shape[1] == 1
        self._sizes = inputs.new_zeros(len(inputs), dtype=torch.float64)

    def squared_norms(self) -> Tensor:
        if self.is_one:  # in float64: of numbers as small as 1e-25 the square is nothing in float32
            return squares(self._inputs[:, 0].double()) * squares(self._side.values[:, 0].double())
        of_inputs, of_gradient = gram(self._inputs), self._side.gram()
        diagonals = [each.diagonal(dim1=1, dim2=2).double() for each in (of_inputs, of_gradient)]
        self._sizes = (diagonals[0] * diagonals[1]).clamp_(min=0.0).sqrt_().sum(1)
        found: Tensor = torch.linalg.vecdot(of_inputs.double().flatten(1), of_gradient.double().flatten(1))
        return found.clamp_(min=0.0)

    def floor(self) -> Tensor | None:
        """Terms that cancel leave a gradient that is mostly their rounding, and chosen weights can make them cancel.

        So a patient is clipped as if its norm were at least 1 / ``MOST_CANCELLING`` of the sum of its terms' norms. With one
        term there is nothing to cancel. Ordinary terms of k steps add up to 1 / sqrt(k) of that sum, and more.
        """
        if self.is_one:
            return None
        return self._sizes / MOST_CANCELLING

    def add_clipped(self, total: Tensor, factors: Tensor, segments: Sequence[tuple[int, slice]]) -> None:
        if self._inputs.shape[2] < self._side.values.shape[2]:  # the factors go to the narrower of the two
            whole, clipped = self._inputs * factors[:, None, None], self._side.values
        else:
            whole, clipped = self._inputs, self._side.clipped(factors)
        for row, patients in segments:
            inputs, gradient = whole[patients], clipped[patients]
            if self.is_one and len(inputs) > AT_ONCE and len(inputs) % AT_ONCE == 0:
                left, right = (each.reshape(-1, AT_ONCE, each.shape[2]) for each in (gradient, inputs))
                total[row] += torch.bmm(left.transpose(1, 2), right).sum(0).flatten()
                continue
            for start in range(0, len(inputs), AT_ONCE):
                some = slice(start, start + AT_ONCE)
                left, right = _in_its_order(gradient[some], inputs[some])
                total[row] += (left.T @ right).flatten()

    def drop(self, kept: Tensor) -> None:
        self._inputs = self._inputs.where(kept[:, None, None], 0.0)
        self._side.drop(kept)

    def dense(self) -> Tensor:
        return outer_sums(self._inputs, self._side.values).flatten(1)

    def slots(self) -> list[Tensor]:
        return [self._inputs, self._side.values]


def _in_its_order(gradient: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k, o] and [n, k, i] as rows, [n * k, o] and [n * k, i]: in the order in which they lie in memory."""
    if gradient.stride(0) < gradient.stride(1):
        gradient, inputs = gradient.transpose(0, 1), inputs.transpose(0, 1)
    return gradient.flatten(0, 1), inputs.flatten(0, 1)


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

    def floor(self) -> Tensor | None:
        return None

    def add_clipped(self, total: Tensor, factors: Tensor, segments: Sequence[tuple[int, slice]]) -> None:
        clipped = (self._each * factors[self._owners, None]).double()
        for row, patients in segments:
            inside = slice(*torch.searchsorted(self._owners, torch.tensor([patients.start, patients.stop])).tolist())
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
        self._records = self._each = 0
        self._side: tuple[Tensor, Side] | None = None

    def start(self, records: int, of_each: int) -> None:
        """Forget everything; the next batch has ``records`` records, ``of_each`` of every patient."""
        self.forms, self._side = {}, None
        self._records, self._each = records, of_each

    def outer(self, weight: nn.Parameter, inputs: Tensor, gradient: Tensor) -> None:
        self._expect(weight, inputs)
        self._expect(weight, gradient)
        a = _accurate(inputs)
        a = a.reshape(self._patients, -1, a.shape[-1])
        if self._side is None or self._side[0] is not gradient:
            g = _accurate(gradient)
            self._side = gradient, Side(g.reshape(self._patients, -1, g.shape[-1]))
        side = self._side[1]
        products, terms = Products(a, side), a.shape[1]
        # measured: the way through a gradient in full takes as long as some forty multiplications a number of it more
        multiplications = terms * terms * (a.shape[2] + (0 if side.has_gram else side.values.shape[2]))
        is_gram = terms == 1 or multiplications < _GRAM_PAYS * weight.numel()
        if is_gram and terms > 1:
            side.gram()
        self._add(weight, products if is_gram else Samples(products.dense()))

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
        return all(
            isinstance(form, Products) and form.is_one for weight, form in self.forms.items() if weight.dim() > 1
        )

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
