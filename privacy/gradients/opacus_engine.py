"""Clipped per-patient gradient sums through Opacus's per-record gradients, for hospitals.

The exact and slow engine: it takes any model whose layers keep records apart, and is the oracle for faster ones.
What it bounds is the L2 norm of one patient's share of the sum; the noise that hides it is added later, on integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfed.errors import LocalProtocolError, UnsupportedModel
from medfed.privacy.gradients.recorder import Losses, Recorder

# clipping to slightly less than C leaves room for the float error of norms, factors and of adding up the patients, which
# may differ in the last places with one patient more. It is no room for a gradient that depends on the rest of the batch:
# the model and loss must give each record the same bits in every batch (models/rowwise.py)
CLIPPING_MARGIN = 1e-4
_VALUES_AT_ONCE = 1 << 26
LEAST_CLIPPING_NORM = 1e-6


def clipped_sum(
    model: nn.Module,
    losses: Losses,
    inputs: Tensor,
    labels: Tensor,
    patients: NDArray[np.int64],
    patient_count: int,
    clipping_norm: float,
    max_batch: int = 1024,
) -> NDArray[np.float64]:
    """The sum over patients of each one's mean gradient, clipped to C / (1 + 1e-4): float64[d].

    ``inputs``: [B, ...], ``labels``: [B, ...], record by record; ``patients``: int64[B], whose record it is (0 to
    ``patient_count`` - 1). ``losses(logits, labels)`` gives one loss a record, float[B], and must not let records see
    each other. ``d`` runs over ``model.named_parameters()`` that require gradients, flattened, in that order.
    ``max_batch``: records processed at once (fewer where their gradients would pass 512 MiB); a patient is never split,
    so one with more records is a batch of its own.

    *Guarantees* One patient in or out moves the result by at most C in L2 norm, however many records, provided that model
    and losses give a record the same bits in every batch (the catalogue's do: models/rowwise.py, models/tasks.py; torch's own
    layers do not, and chosen weights can make that count); a patient with
    a non-finite gradient contributes zero; no patients give zeros; ``model`` is left as it was.
    Raises ``UnsupportedModel`` (MF-160) for layers or losses that couple records, ``LocalProtocolError`` (MF-180)
    for arguments that do not fit together.
    """
    check_arguments(inputs, labels, patients, clipping_norm)
    if len(patients) and not 0 <= int(patients.min()) <= int(patients.max()) < patient_count:
        raise LocalProtocolError(180, "a record of a patient outside the index", "number patients from 0")
    refuse_unsupported(model)
    total = np.zeros(sum(weight.numel() for weight in model.parameters() if weight.requires_grad))
    if len(patients) == 0:
        return total
    order = np.argsort(patients, kind="stable")
    max_batch = max(1, min(max_batch, _VALUES_AT_ONCE // max(1, len(total))))
    with Recorder(model, losses) as recorder:
        for chosen in _whole_patients(patients[order], max_batch):
            rows = torch.from_numpy(order[chosen]).to(inputs.device)
            gradients = recorder.checked_gradients(inputs[rows], labels[rows.to(labels.device)])
            total += _clip_and_sum(gradients, patients[order[chosen]], clipping_norm / (1 + CLIPPING_MARGIN))
    return total


def refuse_unsupported(model: nn.Module) -> None:
    """As ``refuse_mixing``, and for a parameter of two layers: their hooks would not see each other."""
    refuse_mixing(model)
    seen: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(weight), name)
        if first != name:
            raise UnsupportedModel(160, f"{name} is the same parameter as {first}", "give each layer its own")


def refuse_mixing(model: nn.Module) -> None:
    """Raise ``UnsupportedModel`` (MF-160) naming the layer that would mix patients."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            if module.track_running_stats:
                raise UnsupportedModel(160, f"{name}: {kind} keeps statistics of patients", "switch them off")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedModel(160, f"{name}: {kind} mixes patients", f"use {_replacement(module)}")


def _replacement(module: nn.modules.batchnorm._BatchNorm) -> str:
    channels = module.num_features
    if isinstance(module, nn.BatchNorm1d):
        return f"LayerNorm({channels})"
    return f"GroupNorm({math.gcd(32, channels)}, {channels})"


def check_arguments(inputs: Tensor, labels: Tensor, patients: NDArray[np.int64], clipping_norm: float) -> None:
    """Raise ``LocalProtocolError`` (MF-180) for arguments that do not fit together."""
    if not len(inputs) == len(labels) == len(patients):
        what = f"{len(inputs)} inputs, {len(labels)} labels, {len(patients)} owners of records"
        raise LocalProtocolError(180, what, "give one of each a record")
    if not LEAST_CLIPPING_NORM <= clipping_norm < math.inf:
        what = f"clipping norm {clipping_norm}, at least {LEAST_CLIPPING_NORM}"
        raise LocalProtocolError(180, what, "use a larger one: float32 has no squares of numbers far below")


def _whole_patients(owners: NDArray[np.int64], max_batch: int) -> Iterator[slice]:
    """Cut records that are sorted by patient into slices of at most ``max_batch``, never inside a patient."""
    ends = [*(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
    start = previous = 0
    for end in ends:
        if end - start > max_batch and previous > start:
            yield slice(start, previous)
            start = previous
        previous = end
    yield slice(start, len(owners))


def _clip_and_sum(gradients: list[Tensor], owners: NDArray[np.int64], bound: float) -> NDArray[np.float64]:
    """Mean by patient, one flat norm over all weights, clip to ``bound``, sum; all in float64 on the CPU."""
    _, index, counts = np.unique(owners, return_inverse=True, return_counts=True)
    records = torch.cat([gradient.to("cpu", torch.float64) for gradient in gradients], dim=1)
    means = torch.zeros(len(counts), records.shape[1], dtype=torch.float64)
    means.index_add_(0, torch.from_numpy(index), records)
    means /= torch.from_numpy(counts).to(torch.float64)[:, None]
    norms = torch.linalg.vector_norm(means, dim=1)
    finite = torch.isfinite(norms)
    # where, not multiplication: 0 times infinity is not a number
    means = torch.where(finite[:, None], means, 0.0)
    factors = torch.where(finite, (bound / norms).clamp(max=1.0), 0.0)
    clipped: NDArray[np.float64] = (factors @ means).numpy()
    return clipped
