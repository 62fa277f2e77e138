"""Clipped per-patient gradient sums by book-keeping: one forward and one backward pass, no gradient of the whole batch.

Layers write to a tape (``medfed/tape.py``) what each patient's gradient is made of; norms come from it, then the sum of the
clipped gradients. This is exact flat clipping, and what most models of ``models`` are trained with; Opacus's engine
(``opacus_engine``, ``fixed_batches``) is the oracle, and takes layers that have no rule here.

*Why one patient moves the sum by at most C, whatever the weights.* Physical batches all have one shape, on one thread, and
``slot_test`` has tried out that a slot's terms and norm do not depend on the other slots: so a patient's factor and gradient
are the same bits in every batch (``fixed_batches`` tells why a chosen weight would else make that count). What is left is the
order of adding patients up: 64 at a time (``AT_ONCE``) in float32, then in float64. A float32 sum of 64 is off by
66 x 2^-24 of the sum of its norms at most (Higham 2002, section 3.1), which is 64 C: 2.5e-4 C, were all their gradients alike.
Patients come in a secret random order; the orders with one patient more can be paired with those without it so that two of
these sums differ, its own and the last (the last patient takes the place of the one who is gone). So rounding moves the
result by 4 x 2.5e-4 C at most, and ``CLIPPING_MARGIN`` is twice that. Whoever calls this has settled the batch, and the
labels and tokens are within the study's bounds.

*Source* Li et al. 2022 (arXiv:2110.05679), Bu et al. 2023 (arXiv:2210.00038); as in them no second backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfed.errors import LocalProtocolError
from medfed.privacy.gradients.fixed_batches import steady_arithmetic
from medfed.privacy.gradients.opacus_engine import check_arguments, refuse_mixing
from medfed.privacy.gradients.recorder import Losses
from medfed.privacy.gradients.taped_model import TapedModel

CLIPPING_MARGIN = 2.0**-9
"""Patients are clipped to C / (1 + this): room for what rounding does to norms and sums (above)."""

_LEAST_FACTOR = 1e-37

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one call, for rehearsals and benchmarks: these are the patients' secrets, and nothing of a real run may show them."""

    patients: int
    clipped: int
    not_finite: int
    batches: int


@dataclass(frozen=True, slots=True, eq=False)
class ClippedSum:
    """``total``: float64[d], the trainable parameters flattened in the model's order."""

    total: NDArray[np.float64]
    statistics: Statistics


class Engine:
    """Takes sums of one model at many weights. ``device``, ``dtype``: as in ``TapedModel``. For one thread at a time.

    Raises ``UnsupportedModel`` (MF-160) for layers that couple records or have no rule here.
    """

    def __init__(
        self, model: nn.Module, losses: Losses, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        refuse_mixing(model)
        self._taped = TapedModel(model, losses, device, dtype)
        self._device = device

    def load(self, weights: NDArray[np.float32]) -> None:
        """Take other weights: float32[d], flattened in the model's order."""
        self._taped.load(weights)

    def clipped_sums(
        self,
        inputs: Tensor,
        labels: Tensor,
        patients: Indices,
        chosen: Indices,
        segments: Indices,
        count: int,
        clipping_norm: float,
        *,
        batch: int,
    ) -> tuple[NDArray[np.float64], Statistics]:
        """As the function ``clipped_sum``, of ``count`` hospitals at once (a simulation has many): float64[count, d].

        ``segments``: int64[k], ascending, which hospital's patient each of ``chosen`` belongs to. ``patients`` are numbered
        through all hospitals.
        """
        check_arguments(inputs, labels, patients, clipping_norm)
        _check_order(patients[chosen], segments)
        with steady_arithmetic():
            total = _Total(self._taped, count, clipping_norm / (1 + CLIPPING_MARGIN), self._device)
            for each in _batches(patients[chosen], segments, batch):
                filled = _filled(inputs, labels, chosen, each, self._device)
                self._taped.run(*filled, of_each=each.of_each)
                with torch.no_grad():
                    total.add(each)
            self._taped.tape.start(0, 1)
        return total.result()


def clipped_sum(
    model: nn.Module,
    losses: Losses,
    inputs: Tensor,
    labels: Tensor,
    patients: Indices,
    chosen: Indices,
    clipping_norm: float,
    *,
    batch: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> ClippedSum:
    """The sum over patients of the mean gradient of each one's chosen records, clipped to C / (1 + ``CLIPPING_MARGIN``).

    ``inputs``: [n, ...], ``labels``: [n, ...] on the CPU, ``patients``: int64[n], whose record it is; ``chosen``: int64[k],
    the rows to use, those of one patient together, patients in a secret random order. ``batch``: records at once, a power of
    two that ``slot_test.settle_taped_batch`` found for this model, loss, shape and device in this process. ``losses(logits,
    labels)``: one loss a record, float[n]. ``dtype``: as in ``TapedModel``. Memory: a few times what a pass over one batch
    takes, and 8 bytes a parameter.

    *Guarantees* One patient in or out moves the result by at most C in L2 norm (above); a patient with a non-finite gradient
    contributes zero; nobody chosen gives zeros; nothing that depends on values raises; ``model`` is left as it was.
    Raises ``UnsupportedModel`` (MF-160) for layers or losses that couple records or have no rule here,
    ``LocalProtocolError`` (MF-180) for arguments that do not fit together.
    """
    engine, segments = Engine(model, losses, device, dtype), np.zeros(len(chosen), np.int64)
    totals, statistics = engine.clipped_sums(inputs, labels, patients, chosen, segments, 1, clipping_norm, batch=batch)
    return ClippedSum(totals[0], statistics)


def _check_order(owners: Indices, segments: Indices) -> None:
    """A patient in two places would be clipped as two."""
    runs = 1 + int(np.count_nonzero(owners[1:] != owners[:-1])) if len(owners) else 0
    if runs != len(np.unique(owners)) or bool((segments[1:] < segments[:-1]).any()):
        raise LocalProtocolError(180, "records of a patient that do not stand together", "put them in order")


# -------------------------------------------------------------------------------------------------- patients into batches


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """``places``: int64[patients, of_each] into the chosen rows, -1 for none; ``shares``: float64 alike, what a record's loss
    counts; ``segments``: int64[patients] of those present, which come first. ``goes_on``: the one patient has more records in
    the next batch."""

    places: Indices
    shares: NDArray[np.float64]
    segments: Indices
    goes_on: bool = False

    @property
    def of_each(self) -> int:
        return int(self.places.shape[1])


def _batches(owners: Indices, segments: Indices, batch: int) -> Iterator[_Batch]:
    """Patients of 1, 2, 3 to 4, 5 to 8, ... records apart, in the order given, each filled up to a power of two.

    A patient with more records than a batch holds has batches to itself. So every batch has ``batch`` records, and how many
    places a patient has in one depends on its own records alone.
    """
    if not len(owners):
        return
    new = owners[1:] != owners[:-1]
    if new.all():  # one record each
        for at in range(0, len(owners), batch):
            end = min(at + batch, len(owners))
            places = np.full((batch, 1), -1, np.int64)
            places[: end - at, 0] = np.arange(at, end)
            yield _Batch(places, (places >= 0).astype(np.float64), segments[at:end])
        return
    starts = np.flatnonzero(np.r_[True, new])
    counts = np.diff(np.r_[starts, len(owners)])
    widths = 1 << np.ceil(np.log2(counts)).astype(np.int64)
    for width in np.unique(widths[widths <= batch]).tolist():
        members = np.flatnonzero(widths == width)
        at_once = batch // width
        steps = np.arange(width)
        for at in range(0, len(members), at_once):
            group = members[at : at + at_once]
            places = np.full((at_once, width), -1, np.int64)
            shares = np.zeros((at_once, width))
            present = steps < counts[group, None]
            places[: len(group)] = np.where(present, starts[group, None] + steps, -1)
            shares[: len(group)] = present / counts[group, None]
            yield _Batch(places, shares, segments[starts[group]])
    for member in np.flatnonzero(widths > batch).tolist():
        start, records = int(starts[member]), int(counts[member])
        for at in range(0, records, batch):
            here = np.arange(at, at + batch)
            places = np.where(here < records, start + here, -1)[None]
            shares = (here < records)[None] / records
            yield _Batch(places, shares, segments[start : start + 1], goes_on=at + batch < records)


def _filled(
    inputs: Tensor, labels: Tensor, chosen: Indices, batch: _Batch, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The records of a batch in their places, zeros in the others; and their shares, if not all are 1."""
    places = batch.places.ravel()
    present = np.flatnonzero(places >= 0)
    rows = torch.from_numpy(chosen[places[present]])
    parts = []
    for source in (inputs, labels):
        if len(present) == len(places):
            parts.append(source[rows].to(device))
        else:
            filled = source.new_zeros(len(places), *source.shape[1:])
            filled[torch.from_numpy(present)] = source[rows]
            parts.append(filled.to(device))
    if batch.of_each == 1 and batch.shares.max() == 1.0:  # an empty place is left out of the sum as a whole
        return parts[0], parts[1], None
    return parts[0], parts[1], torch.from_numpy(batch.shares.ravel()).to(device)


# ------------------------------------------------------------------------------------------------------ norms and sums


class _Total:
    """Adds up patients' clipped gradients by segment, in float64 over batches."""

    def __init__(self, taped: TapedModel, count: int, bound: float, device: torch.device) -> None:
        self._taped, self._bound = taped, bound
        self._weights = taped.weights()
        ends = np.cumsum([weight.numel() for weight in self._weights])
        self._slices = [
            slice(int(end) - weight.numel(), int(end)) for end, weight in zip(ends, self._weights, strict=True)
        ]
        size = int(ends[-1]) if len(ends) else 0
        self._totals = torch.zeros(count, size, dtype=torch.float64, device=device)
        self._open: Tensor | None = None
        self._patients = self._clipped = self._not_finite = self._batches = 0

    def result(self) -> tuple[NDArray[np.float64], Statistics]:
        totals: NDArray[np.float64] = self._totals.cpu().numpy()
        return totals, Statistics(self._patients, self._clipped, self._not_finite, self._batches)

    def add(self, batch: _Batch) -> None:
        """What the tape holds, of a batch's patients."""
        self._batches += 1
        if batch.goes_on or self._open is not None:
            self._add_part(batch)
            return
        forms = self._taped.tape.forms
        if not forms:
            self._count(torch.zeros(len(batch.segments)))
            return
        norms = torch.stack([form.squared_norms() for form in forms.values()]).sum(0).sqrt_()
        finite = torch.isfinite(norms)
        factors = clip_factors(norms, self._bound)
        present = len(batch.segments)
        factors[present:] = 0.0
        self._count(norms[:present])
        if not bool(finite.all()):
            for form in forms.values():
                form.drop(finite)
        segments = list(_runs(batch.segments, len(factors)))
        kind = torch.float64 if self._weights[0].dtype == torch.float64 else torch.float32
        factors = factors.to(kind)
        for weight, at in zip(self._weights, self._slices, strict=True):
            if weight in forms:
                forms[weight].add_clipped(self._totals[:, at], factors, segments)

    def _add_part(self, batch: _Batch) -> None:
        """One patient through several batches: its gradient adds up in float64, and is clipped when it is whole."""
        if self._open is None:
            self._open = torch.zeros(self._totals.shape[1], dtype=torch.float64, device=self._totals.device)
        for weight, at in zip(self._weights, self._slices, strict=True):
            form = self._taped.tape.forms.get(weight)
            if form is not None:
                self._open[at] += form.dense()[0]
        if batch.goes_on:
            return
        norm = torch.linalg.vector_norm(self._open)[None]
        if bool(torch.isfinite(norm)):
            self._totals[int(batch.segments[0])] += self._open * clip_factors(norm, self._bound)
        self._count(norm)
        self._open = None

    def _count(self, norms: Tensor) -> None:
        self._patients += len(norms)
        self._clipped += int((norms > self._bound).sum())
        self._not_finite += int((~torch.isfinite(norms)).sum())


def clip_factors(norms: Tensor, bound: float) -> Tensor:
    """What each gradient is multiplied with so that its norm is at most ``bound``; 0 for one that is not finite, or so large
    that float32 has no such factor."""
    factors = (bound / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms) & (factors > _LEAST_FACTOR), factors, 0.0)


def _runs(segments: Indices, places: int) -> Iterator[tuple[int, slice]]:
    """(segment, its places) in order; empty places at the end go with the last, as their factors are zero."""
    cuts: Sequence[int] = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), places]
    for start, end in itertools.pairwise(cuts):
        yield int(segments[start]), slice(start, end)
