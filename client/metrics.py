"""The sum after the last round: how the released model does on this hospital's held-out patients, in noised counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medfed import metrics
from medfed.advance import ModelState, released_weights
from medfed.client.approved import Approved
from medfed.client.local_steps import Noise
from medfed.models import parameters, tasks
from medfed.privacy.quantize import quantize
from medfed.seams import Entropy


def metrics_sum(approved: Approved, state: ModelState, entropy: Entropy, noise: Noise) -> NDArray[np.int64]:
    """Every held-out patient's share of the cells, in whole grid units, summed, saturated and noised: int64[cells].

    One privacy event of the held-out patients, who are in no other of this study. Records go through the model one by one, and
    integers are added up: a patient more moves the sum by exactly that patient's share, whoever else is in it. A hospital
    that holds nobody out adds its noise alone.
    """
    plan, records = approved.plan, approved.holdout
    total = np.zeros(plan.metrics_words, np.int64)
    if len(records.labels):
        parameters.assign(approved.model, released_weights(state, approved.study))
        chances = tasks.predictions(approved.model, approved.study.task, records.inputs, at_once=1)
        ids, unit = np.unique(np.array(records.patients, np.str_), return_inverse=True)
        shares = metrics.shares(approved.study, chances, records.labels, unit.astype(np.int64), len(ids))
        total = quantize(shares.ravel(), plan.metrics_exponent, plan.limit).reshape(shares.shape).sum(axis=0)
    saturated: NDArray[np.int64] = np.clip(total, -plan.limit, plan.limit)
    return saturated + noise(entropy.draw("noise", 32), plan.metrics_noise_sd, plan.metrics_words)
