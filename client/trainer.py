"""Global model + this hospital's patients -> one clipped gradient sum. Randomness comes in as keys."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medfed.models import parameters, tasks
from medfed.models.records import Records
from medfed.privacy.gradients.opacus_engine import clipped_sum
from medfed.privacy.keystream import Keystream
from medfed.privacy.sampling import poisson_mask
from medfed.study import Study


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
    study: Study, model: nn.Module, weights: NDArray[np.float32], patients: Patients, *, sampling_key: bytes
) -> NDArray[np.float64]:
    """Sum over sampled patients of each one's mean gradient, clipped to the study's norm: float64[d].

    Each patient is in with probability ``sampling_rate``, independently (secret coins from ``sampling_key``,
    64 fresh bytes). Of a patient with more records than the study's cap a fresh random subset of that size is used. No
    patient sampled gives zeros: the caller adds noise all the same.
    """
    sampled = poisson_mask(sampling_key[:32], patients.count, study.privacy.sampling_rate)
    lots = Keystream(sampling_key[32:])
    keep = sampled[patients.unit] & _within_cap(patients, study.data.max_records_per_patient, lots)
    chosen = np.flatnonzero(keep)
    # float64: what is left of rounding (norms, factors, the order of adding patients up) is far inside the clip's margin
    precise = copy.deepcopy(model).double()
    parameters.assign(precise, weights)
    return clipped_sum(
        precise,
        tasks.losses(study.task),
        torch.from_numpy(patients.records.inputs[chosen].astype(np.float64)),
        torch.from_numpy(patients.records.labels[chosen]),
        patients.unit[chosen],
        patients.count,
        study.privacy.clipping_norm,
    )


def _within_cap(patients: Patients, cap: int, lots: Keystream) -> NDArray[np.bool_]:
    """Which records to use, at most ``cap`` a patient: the first ``cap`` in a random order drawn for this step."""
    order = np.lexsort((lots.words(len(patients.unit)), patients.unit))
    starts = np.searchsorted(patients.unit[order], np.arange(patients.count))
    rank = np.arange(len(order)) - starts[patients.unit[order]]
    keep = np.empty(len(order), np.bool_)
    keep[order] = rank < cap
    return keep


def warm_up(study: Study, model: nn.Module) -> None:
    """Load and run everything a round needs once, on one made-up record of zeros, so that round 1 is as fast as all."""
    weights = parameters.flatten(model)
    zeros = Records(np.zeros((1, study.data.inputs), np.float32), np.zeros(1, np.int64), ("nobody",))
    gradient_sum(study, model, weights, number_patients(study, zeros), sampling_key=bytes(64))
