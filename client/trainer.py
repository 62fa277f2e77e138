"""Global model + this hospital's patients -> one clipped gradient sum. Randomness comes in as keys."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medfed.client.compute import Compute
from medfed.models import catalogue, parameters, tasks
from medfed.models.augmentation import augmented
from medfed.models.made_up import made_up_records
from medfed.models.records import Records
from medfed.models.separability import require_separable
from medfed.privacy.gradients.engine import Engine
from medfed.privacy.gradients.fixed_batches import clipped_sum_in_fixed_batches
from medfed.privacy.gradients.layers import without_rule
from medfed.privacy.gradients.opacus_engine import clipped_sum
from medfed.privacy.gradients.slot_test import MANY, Examples, settle_batch, settle_taped_batch
from medfed.privacy.keystream import Keystream
from medfed.privacy.sampling import poisson_mask
from medfed.study import Study

log = logging.getLogger("medfed.client")

# records at once of models of tables
_BATCH, _BATCH_OF_MANY = 64, 256


@dataclass(frozen=True, slots=True, eq=False)
class Patients:
    """This hospital's training records with their patients numbered: ``unit`` int64[n] in 0..count-1.

    With the privacy unit ``record`` every record counts as a patient of its own.
    """

    records: Records
    unit: NDArray[np.int64]
    count: int


Part = tuple[Patients, NDArray[np.int64]]
"""Patients of one hospital and the rows chosen of them, as ``chosen_rows`` gives them."""


def number_patients(study: Study, records: Records) -> Patients:
    """Number the units of privacy in order of first appearance of their sorted ids."""
    if study.privacy.unit == "record":
        return Patients(records, np.arange(len(records.patients), dtype=np.int64), len(records.patients))
    ids, unit = np.unique(np.array(records.patients, dtype=np.str_), return_inverse=True)
    return Patients(records, unit.astype(np.int64), len(ids))


def gradient_sum(
    study: Study,
    model: nn.Module,
    weights: NDArray[np.float32],
    patients: Patients,
    *,
    sampling_key: bytes,
    compute: Compute | None = None,
    expected: float = 0.0,
) -> NDArray[np.float64]:
    """Sum over sampled patients of each one's mean gradient, clipped to the study's norm: float64[d].

    ``sampling_key``: as for ``chosen_rows``. No patient sampled gives zeros: the caller adds noise all the same.
    ``compute``, ``expected``, ``Raises``: as for ``sums_of``.
    """
    total: NDArray[np.float64]
    part = with_copies(study, (patients, chosen_rows(study, patients, sampling_key)), sampling_key)
    (total,) = sums_of(study, model, weights, [part], compute, expected)
    return total


def chosen_rows(study: Study, patients: Patients, sampling_key: bytes) -> NDArray[np.int64]:
    """The records to use in one step, those of one patient together and the patients in a secret random order: int64[k].

    Each patient is in with probability ``sampling_rate``, independently (secret coins from ``sampling_key``, 64 fresh
    bytes). Of a patient with more records than the study's cap a fresh random subset of that size is used. In a random order
    one patient more or less changes what stands in two batches, not in all (``privacy/gradients/engine.py``).
    """
    sampled = poisson_mask(sampling_key[:32], patients.count, study.privacy.sampling_rate)
    lots = Keystream(sampling_key[32:])
    keep = sampled[patients.unit] & _within_cap(patients, study.data.max_records_per_patient, lots)
    rows = np.flatnonzero(keep)
    turns = lots.words(patients.count)[patients.unit[rows]]
    return rows[np.lexsort((patients.unit[rows], turns))]


def with_copies(study: Study, part: Part, sampling_key: bytes) -> Part:
    """The chosen records and changed copies of them, if the study augments; all of a record belong to its patient.

    Draws come from another key than the one that chose the rows, made from the same secret bytes.
    """
    augmentation, (patients, rows) = study.training.augmentation, part
    if augmentation is None:
        return part
    lots = Keystream(hashlib.sha256(b"medfed augmentation" + sampling_key).digest())
    images = np.asarray(patients.records.inputs[rows], np.float32)
    last = images.shape[1] - (study.data.kind == "views")  # which views are there stays as it is
    inputs = np.repeat(images, augmentation.copies, axis=0)
    planes = last * (images.shape[2] if images.ndim == 5 else 1)
    flat = images[:, :last].reshape(len(images), planes, *images.shape[-2:])
    inputs[:, :last] = augmented(augmentation, flat, lots.words).reshape(len(inputs), last, *images.shape[2:])
    copied = np.repeat(rows, augmentation.copies)
    ids = tuple(patients.records.patients[row] for row in copied.tolist())
    records = Records(inputs, patients.records.labels[copied], ids)
    return Patients(records, patients.unit[copied], patients.count), np.arange(len(copied))


def sums_of(
    study: Study,
    model: nn.Module,
    weights: NDArray[np.float32],
    parts: Sequence[Part],
    compute: Compute | None = None,
    expected: float = 0.0,
) -> NDArray[np.float64]:
    """For each of ``parts``, patients and the rows chosen of them, the sum of clipped gradients: float64[parts, d].

    A hospital has one part; a simulation works out those of many hospitals in the same batches. ``compute``: without it the
    processor, with a batch tried out anew. ``expected``: patients expected in the step, a public number; with many of them
    larger batches may pay. Raises ``UnsupportedModel`` (MF-160) for a model not known to keep patients apart.
    """
    require_separable(model)
    compute = compute or Compute()
    own = functools.partial(_sums, are_many=expected >= MANY)
    lacking = without_rule(model) if compute.engine == "bookkeeping" else None
    sums = own if compute.engine == "bookkeeping" and lacking is None else _sums_by_opacus
    if lacking is not None and not compute.batches:
        log.warning("%s: %s is unknown to the gradient engine: Opacus, slower", study.study.name, lacking)
    if catalogue.is_rowwise(study):
        # such small models stay on the processor
        return sums(study, model, weights, parts, compute, torch.device("cpu"))
    return compute.run(lambda device: sums(study, model, weights, parts, compute, device))


def _sums(
    study: Study,
    model: nn.Module,
    weights: NDArray[np.float32],
    parts: Sequence[Part],
    compute: Compute,
    device: torch.device,
    *,
    are_many: bool,
) -> NDArray[np.float64]:
    """By the gradient engine, which is kept for the next step: of tables in float64, where rounding is far below the margin."""
    form = f"{_form(study, device)}\n{are_many}"
    try:
        engine = compute.engines.setdefault(form, []).pop()
    except IndexError:  # the first, or all are at work in other threads
        own = copy.deepcopy(model).double() if catalogue.is_rowwise(study) else model
        losses, dtype = tasks.losses(study.task), compute.dtype_of(own)
        if form not in compute.batches and catalogue.is_rowwise(study):
            # sums row by row are alike in batches of any size (models/rowwise.py): nothing to try out
            compute.batches[form] = _BATCH_OF_MANY if are_many else _BATCH
        elif form not in compute.batches:
            compute.batches[form] = settle_taped_batch(
                own,
                losses,
                _examples(study),
                device=device,
                dtype=dtype,
                most_records=_records_of_one(study),
                are_many=are_many,
            )
            log.info("%s: physical batches of %d records on %s", study.study.name, compute.batches[form], device)
        engine = Engine(own, losses, device, dtype)
    engine.load(weights)
    inputs, labels, owners, segments = _joined(parts, double=catalogue.is_rowwise(study))
    sums, _ = engine.clipped_sums(
        inputs,
        labels,
        owners,
        np.arange(len(owners)),
        segments,
        len(parts),
        study.privacy.clipping_norm,
        batch=compute.batches[form],
    )
    compute.engines[form].append(engine)
    return sums


def _sums_by_opacus(
    study: Study,
    model: nn.Module,
    weights: NDArray[np.float32],
    parts: Sequence[Part],
    compute: Compute,
    device: torch.device,
) -> NDArray[np.float64]:
    """By Opacus's gradients of each record: of tables in float64, of deep models in batches of one size tried out before."""
    losses, clipping_norm = tasks.losses(study.task), study.privacy.clipping_norm
    model = copy.deepcopy(model)
    parameters.assign(model, weights)
    is_rowwise, form, each = catalogue.is_rowwise(study), _form(study, device), []
    if not is_rowwise and form not in compute.batches:
        compute.batches[form] = settle_batch(model, losses, _examples(study), device=device)
        log.info("%s: physical batches of %d records on %s, by Opacus", study.study.name, compute.batches[form], device)
    for part in parts:
        inputs, labels, owners, _ = _joined([part], double=is_rowwise)
        if is_rowwise:
            found = clipped_sum(model.double(), losses, inputs, labels, owners, part[0].count, clipping_norm)
        else:
            rows = np.arange(len(owners))
            found = clipped_sum_in_fixed_batches(
                model,
                losses,
                inputs,
                labels,
                owners,
                rows,
                clipping_norm,
                batch=compute.batches[form],
                device=device,
            )
        each.append(found)
    return np.stack(each)


def _joined(
    parts: Sequence[Part], *, double: bool
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """The chosen records of all parts one after the other: inputs, labels, whose they are, numbered anew, and of which part."""
    inputs = torch.from_numpy(np.concatenate([patients.records.inputs[chosen] for patients, chosen in parts]))
    labels = torch.from_numpy(np.concatenate([patients.records.labels[chosen] for patients, chosen in parts]))
    before = np.cumsum([0, *(patients.count for patients, _ in parts)])
    owners = np.concatenate(
        [patients.unit[chosen] + start for (patients, chosen), start in zip(parts, before, strict=False)]
    )
    segments = np.repeat(np.arange(len(parts)), [len(chosen) for _, chosen in parts])
    return (inputs.double() if double else inputs), labels, owners, segments


def _records_of_one(study: Study) -> int:
    """Most that a patient has in a step, copies counted."""
    augmentation = study.training.augmentation
    return study.data.max_records_per_patient * (1 if augmentation is None else augmentation.copies)


def _form(study: Study, device: torch.device) -> str:
    """Everything that the shapes of a study's computation depend on."""
    model = study.model.model_dump_json(exclude={"first_model_sha256"})
    parts = [
        model,
        study.data.model_dump_json(),
        study.task.model_dump_json(),
        str(_records_of_one(study)),
        str(device),
    ]
    return "\n".join(parts)


def _examples(study: Study) -> Examples:
    return functools.partial(made_up_records, study)


def _within_cap(patients: Patients, cap: int, lots: Keystream) -> NDArray[np.bool_]:
    """Which records to use, at most ``cap`` a patient: the first ``cap`` in a random order drawn for this step."""
    order = np.lexsort((lots.words(len(patients.unit)), patients.unit))
    starts = np.searchsorted(patients.unit[order], np.arange(patients.count))
    rank = np.arange(len(order)) - starts[patients.unit[order]]
    keep = np.empty(len(order), np.bool_)
    keep[order] = rank < cap
    return keep


def made_up_patients(study: Study, count: int) -> Patients:
    """``count`` patients of one record each, of the study's form and without any meaning: to try a step's time out."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = _examples(study)(generator, count)
    records = Records(inputs.numpy(), labels.numpy(), tuple(str(number) for number in range(count)))
    return number_patients(study, records)


def warm_up(study: Study, model: nn.Module, compute: Compute | None = None) -> None:
    """Load, run and try out everything a round needs, on made-up records, so that round 1 is as fast as all."""
    weights, nobody = parameters.flatten(model), made_up_patients(study, 1)
    gradient_sum(study, model, weights, nobody, sampling_key=bytes(64), compute=compute)
