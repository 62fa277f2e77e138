"""Clipped per-patient gradient sums of deep models, in physical batches of one fixed shape.

A convolution or a matrix product rounds a record by its place in the batch and by the batch's size; weights chosen by the
coordinator can make that count (models/rowwise.py tells how). The order in which such a kernel adds up depends on shapes,
threads and alignment, never on values. So every physical batch here has the same shape, is filled up with records of zeros
that are dropped afterwards, and runs on one thread; that all its slots then give the same bits is what
``slot_test.settle_batch`` tries out on this machine before a study begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfed.privacy.gradients.opacus_engine import CLIPPING_MARGIN, check_arguments, refuse_unsupported
from medfed.privacy.gradients.recorder import Losses, Recorder

_VALUES_AT_ONCE = 1 << 17


def clipped_sum_in_fixed_batches(
    model: nn.Module,
    losses: Losses,
    inputs: Tensor,
    labels: Tensor,
    patients: NDArray[np.int64],
    chosen: NDArray[np.int64],
    clipping_norm: float,
    *,
    batch: int,
    device: torch.device,
) -> NDArray[np.float64]:
    """The sum over patients of the mean gradient of each one's chosen records, clipped to C / (1 + 1e-4): float64[d].

    ``inputs``: [n, ...], ``labels``: [n, ...] on the CPU, ``patients``: int64[n], whose record it is; ``chosen``: int64[k],
    the rows to use. ``batch``: records at once, a number that ``settle_batch`` found for this model, loss, shape and device
    in this process. ``losses`` and the order of ``d`` are as in ``clipped_sum``. Memory: some times ``batch`` x d values of
    the model's type and 2 x d of float64, whatever the number of records; a patient with many runs through several batches.

    *Guarantees* One patient in or out moves the result by at most C in L2 norm, whatever the weights: the gradient of a
    record is the same bits whichever records are chosen beside it; a patient's mean is added up record by record in
    float64, in the order of rows; norms, factors and the sum over patients are float64. A patient with a non-finite
    gradient contributes zero; nobody chosen gives zeros; nothing that depends on values raises; ``model`` is left as it was.
    Raises ``UnsupportedModel`` (MF-160) and ``LocalProtocolError`` (MF-180) as ``clipped_sum`` does.
    """
    check_arguments(inputs, labels, patients, clipping_norm)
    refuse_unsupported(model)
    rows = chosen[np.argsort(patients[chosen], kind="stable")]
    owners = patients[rows]
    size = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = _ClippedTotal(size, clipping_norm / (1 + CLIPPING_MARGIN), device)
    with steady_arithmetic(), Recorder(model, losses, device) as recorder:
        for start in range(0, len(rows), batch):
            end = min(start + batch, len(rows))
            filled = _filled(inputs, labels, rows[start:end], batch)
            samples = recorder.gradients(*(part.to(device) for part in filled))
            goes_on = end < len(rows) and owners[end - 1] == owners[end]
            total.add([sample[: end - start] for sample in samples], owners[start:end], goes_on=bool(goes_on))
    return total.result()


@contextlib.contextmanager
def steady_arithmetic() -> Iterator[None]:
    """On this thread: one torch thread and denormal numbers flushed to zero, for bits that depend on nothing else.

    Torch's other threads would cut a batch in places of their own choice and keep denormals. Flushing saves a recurrent
    model most of its time once its gradients fade.
    """
    threads = torch.get_num_threads()
    was_flushing = not bool(torch.tensor(5e-324, dtype=torch.float64) * 1.0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushing)
        torch.set_num_threads(threads)


def _filled(inputs: Tensor, labels: Tensor, rows: NDArray[np.int64], batch: int) -> tuple[Tensor, Tensor]:
    """The records of ``rows`` in the first slots of a batch, zeros in the others."""
    filled = (inputs.new_zeros(batch, *inputs.shape[1:]), labels.new_zeros(batch, *labels.shape[1:]))
    index = torch.from_numpy(rows)
    for part, source in zip(filled, (inputs, labels), strict=True):
        torch.index_select(source, 0, index, out=part[: len(rows)])
    return filled


class _ClippedTotal:
    """Adds up patients' clipped mean gradients in float64, a block of columns at a time.

    Records come sorted by patient. The one patient whose records go on in the next batch waits as a sum of d values.
    """

    def __init__(self, size: int, bound: float, device: torch.device) -> None:
        self._bound = bound
        self._total = torch.zeros(size, dtype=torch.float64, device=device)
        self._open = torch.zeros(size, dtype=torch.float64, device=device)
        self._open_records = 0

    def result(self) -> NDArray[np.float64]:
        total: NDArray[np.float64] = self._total.cpu().numpy()
        return total

    def add(self, samples: list[Tensor], owners: NDArray[np.int64], *, goes_on: bool) -> None:
        """``samples``: of each weight [n, size]; ``owners`` int64[n], ascending; ``goes_on``: the last one's next record
        comes with the next call."""
        device = self._total.device
        _, patient, counts = np.unique(owners, return_inverse=True, return_counts=True)
        turns = _turns(patient, counts, device)
        counts[0] += self._open_records
        closed = len(counts) - 1 if goes_on else len(counts)
        is_single = int(counts.max()) == 1
        divisors = torch.from_numpy(counts[:closed]).to(device, torch.float64)[:, None]
        norms = torch.zeros(closed, dtype=torch.float64, device=device)
        for at, block in _blocks(samples):
            sums = self._sums(at, block, turns)[:closed]
            means = sums if is_single else sums.div_(divisors)
            norms += torch.linalg.vecdot(means, means)
        norms.sqrt_()
        finite = torch.isfinite(norms)
        is_clean = bool(finite.all())
        factors = torch.where(finite, (self._bound / norms).clamp(max=1.0), 0.0)
        for at, block in _blocks(samples):
            sums = self._sums(at, block, turns)
            if goes_on:
                self._open[at : at + block.shape[1]] = sums[-1]
            means = sums[:closed] if is_single else sums[:closed].div_(divisors)
            if not is_clean:  # where, not multiplication: 0 times infinity is not a number
                means = means.where(finite[:, None], 0.0)
            self._total[at : at + block.shape[1]] += factors @ means
        self._open_records = int(counts[-1]) if goes_on else 0

    def _sums(self, at: int, block: Tensor, turns: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Per-patient sums of the columns from ``at``, float64: record after record, so that no batch changes a bit."""
        if not self._open_records and len(turns) == 1:
            return block.to(torch.float64, copy=True)
        sums = torch.zeros(len(turns[0][0]), block.shape[1], dtype=torch.float64, device=block.device)
        if self._open_records:
            sums[0] = self._open[at : at + block.shape[1]]
        for rows, patients in turns:
            sums[patients] += block[rows].double()
        return sums


def _turns(patient: NDArray[np.int64], counts: NDArray[np.int64], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Each patient's first record, then each one's second, ...: (rows, patients), no patient twice in a turn."""
    rank = np.arange(len(patient)) - np.repeat(np.cumsum(counts) - counts, counts)
    turns = []
    for turn in range(int(counts.max())):
        rows = np.flatnonzero(rank == turn)
        turns.append((torch.from_numpy(rows).to(device), torch.from_numpy(patient[rows]).to(device)))
    return turns


def _blocks(samples: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(place in the flat vector, columns of one weight's samples), few enough to stay in a processor's cache as float64."""
    at = 0
    for sample in samples:
        width = max(1, _VALUES_AT_ONCE // len(sample))
        for start in range(0, sample.shape[1], width):
            yield at + start, sample[:, start : start + width]
        at += sample.shape[1]
