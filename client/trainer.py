"""Global model + this hospital's patients -> one clipped gradient sum. Randomness comes in as keys."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medfed.client.compute import Compute
from medfed.models import catalogue, parameters, tasks
from medfed.models.records import Records
from medfed.models.separability import require_separable
from medfed.privacy.gradients.fixed_batches import clipped_sum_in_fixed_batches
from medfed.privacy.gradients.opacus_engine import clipped_sum
from medfed.privacy.gradients.slot_test import Examples, settle_batch
from medfed.privacy.keystream import Keystream
from medfed.privacy.sampling import poisson_mask
from medfed.study import Study

log = logging.getLogger("medfed.client")


@dataclass(frozen=True, slots=True, eq=False)
class Patients:
    """This hospital's training records with their patients numbered: ``unit`` int64[n] in 0..count-1.

    With the privacy unit ``record`` every record counts as a patient of its own.
    """

    records: Records
    unit: NDArray[np.int64]
    count: int


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
) -> NDArray[np.float64]:
    """Sum over sampled patients of each one's mean gradient, clipped to the study's norm: float64[d].

    Each patient is in with probability ``sampling_rate``, independently (secret coins from ``sampling_key``,
    64 fresh bytes). Of a patient with more records than the study's cap a fresh random subset of that size is used. No
    patient sampled gives zeros: the caller adds noise all the same. ``compute``: for deep models; without it the processor,
    with a batch tried out anew. Raises ``UnsupportedModel`` (MF-160) for a model not known to keep patients apart.
    """
    require_separable(model)
    sampled = poisson_mask(sampling_key[:32], patients.count, study.privacy.sampling_rate)
    lots = Keystream(sampling_key[32:])
    keep = sampled[patients.unit] & _within_cap(patients, study.data.max_records_per_patient, lots)
    chosen = np.flatnonzero(keep)
    at_weights = copy.deepcopy(model)
    parameters.assign(at_weights, weights)
    if catalogue.is_rowwise(study):
        return _rowwise_sum(study, at_weights, patients, chosen)
    compute = compute or Compute()
    return compute.run(lambda device: _deep_sum(study, at_weights, patients, chosen, compute, device))


def _rowwise_sum(study: Study, model: nn.Module, patients: Patients, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    # float64: what is left of rounding (norms, factors, the order of adding patients up) is far inside the clip's margin
    return clipped_sum(
        model.double(),
        tasks.losses(study.task),
        torch.from_numpy(patients.records.inputs[chosen].astype(np.float64)),
        torch.from_numpy(patients.records.labels[chosen]),
        patients.unit[chosen],
        patients.count,
        study.privacy.clipping_norm,
    )


def _deep_sum(
    study: Study,
    model: nn.Module,
    patients: Patients,
    chosen: NDArray[np.int64],
    compute: Compute,
    device: torch.device,
) -> NDArray[np.float64]:
    """float32 on the device, in the physical batch that was tried out for this study's form in this process."""
    losses = tasks.losses(study.task)
    form = _form(study, device)
    if form not in compute.batches:
        compute.batches[form] = settle_batch(model, losses, _examples(study), device=device)
        log.info("%s: physical batches of %d records on %s", study.study.name, compute.batches[form], device)
    return clipped_sum_in_fixed_batches(
        model,
        losses,
        torch.from_numpy(patients.records.inputs),
        torch.from_numpy(patients.records.labels),
        patients.unit,
        chosen,
        study.privacy.clipping_norm,
        batch=compute.batches[form],
        device=device,
    )


def _form(study: Study, device: torch.device) -> str:
    """Everything that the shapes of a study's computation depend on."""
    model = study.model.model_dump_json(exclude={"first_model_sha256"})
    return "\n".join([model, study.data.model_dump_json(), study.task.model_dump_json(), str(device)])


def _examples(study: Study) -> Examples:
    """Made-up records of a study's form; of series and texts the last steps are padding, as many as chance has it."""

    def draw(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count, *study.data.shape)
        if study.data.text is not None:
            inputs = torch.empty(shape, dtype=torch.int64).random_(1, study.data.text.buckets + 1, generator=generator)
        else:
            inputs = torch.empty(shape).normal_(generator=generator)
        if study.data.kind in ("series", "text"):
            ends = torch.empty(count, 1, dtype=torch.int64).random_(1, shape[1] + 1, generator=generator)
            inputs[torch.arange(shape[1]) >= ends] = 0
        return inputs, torch.empty(count, dtype=torch.int64).random_(study.task.classes, generator=generator)

    return draw


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
    weights = parameters.flatten(model)
    shape = (1, *study.data.shape)
    inputs = np.zeros(shape, np.float32) if study.data.text is None else np.zeros(shape, np.int64)
    zeros = Records(inputs, np.zeros(1, np.int64), ("nobody",))
    gradient_sum(study, model, weights, number_patients(study, zeros), sampling_key=bytes(64), compute=compute)
