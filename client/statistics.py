"""The sum before round 1, and this hospital's patients as they train after it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medfed import standardization
from medfed.client.approved import Approved
from medfed.client.local_steps import Noise
from medfed.models.records import Records
from medfed.privacy.quantize import quantize
from medfed.seams import Entropy


def statistics_sum(approved: Approved, entropy: Entropy, noise: Noise) -> NDArray[np.int64]:
    """Every patient's share of means, squares and number, in whole grid units, summed, saturated and noised: int64[2f + 1].

    One privacy event without sampling. Integers are added up, so that a patient more moves the sum by exactly that patient's
    share, whoever else is in it. A patient who is not a number adds nothing, silently: a refusal would tell of that patient.
    """
    plan, patients = approved.plan, approved.patients
    inputs = np.asarray(patients.records.inputs, np.float32)
    shares = standardization.shares(approved.study, inputs, patients.unit, patients.count)
    shares = np.where(np.isfinite(shares).all(axis=1, keepdims=True), shares, 0.0)
    units = quantize(shares.ravel(), plan.statistics_exponent, plan.limit).reshape(shares.shape)
    total = units.sum(axis=0)
    saturated: NDArray[np.int64] = np.clip(total, -plan.limit, plan.limit)
    return saturated + noise(entropy.draw("noise", 32), plan.statistics_noise_sd, plan.statistics_words)


def with_standardized_patients(approved: Approved, statistics: NDArray[np.float32]) -> Approved:
    """The same study with its training patients' inputs standardised; ``holdout`` stays as it is."""
    records = approved.patients.records
    inputs = standardization.standardized(approved.study, statistics, np.asarray(records.inputs, np.float32))
    patients = replace(approved.patients, records=Records(inputs, records.labels, records.patients))
    return replace(approved, patients=patients)
