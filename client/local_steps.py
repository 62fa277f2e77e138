"""What a hospital computes in one attempt, at its own patients: noised sums, and the update that local steps make of them.

Of the patients nothing but noised sums is ever used: an update is made of such sums and of public numbers, so it needs no
more noise, however it is weighted, rounded or saturated on its way out.

*Source* FedAvg (McMahan et al. 2017, arXiv:1602.05629) with private steps at the hospital; FedProx's pull back to the round's
first weights (Li et al. 2020, arXiv:1812.06127).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medfed.client.approved import Approved
from medfed.client.local_optimizer import local_rule
from medfed.client.noise_beside import drawn_beside
from medfed.client.trainer import gradient_sum
from medfed.errors import LocalProtocolError
from medfed.privacy.keystream import KEY_BYTES
from medfed.privacy.quantize import dequantize, quantize, quantize_stochastic
from medfed.seams import Entropy
from medfed.study import LocalSteps

# (key of 32 fresh bytes, standard deviation in grid units, size) -> int64[size]
Noise = Callable[[bytes, float, int], NDArray[np.int64]]
# (study and patients, the round's weights float32[d], where keys come from, the noise) -> the update float64[d]
LocalUpdate = Callable[[Approved, NDArray[np.float32], Entropy, Noise], NDArray[np.float64]]
# (study and patients, weights float32[d], 64 fresh bytes to sample with) -> the clipped sum float64[d], the caller's to keep
OwnSum = Callable[[Approved, NDArray[np.float32], bytes], NDArray[np.float64]]


def own_sum(approved: Approved, weights: NDArray[np.float32], sampling_key: bytes) -> NDArray[np.float64]:
    """``gradient_sum`` of this hospital's patients: float64[d]."""
    return gradient_sum(
        approved.study,
        approved.model,
        weights,
        approved.patients,
        sampling_key=sampling_key,
        compute=approved.compute,
        expected=expected_patients(approved),
    )


def expected_patients(approved: Approved) -> float:
    """In one step at this hospital, by the number it declared: public, whatever the true number is."""
    return approved.study.privacy.sampling_rate * approved.nominal_patients


def noised_sum(
    approved: Approved,
    weights: NDArray[np.float32],
    entropy: Entropy,
    noise: Noise,
    clipped: OwnSum = own_sum,
) -> NDArray[np.int64]:
    """Clipped sum at ``weights`` -> saturated integers + fresh integer noise, never clipped again: int64[d], in units of
    2^-noise_exponent. One privacy event: sampling and noise are drawn anew at every call. ``clipped``: for simulations."""
    plan = approved.plan
    sampling_key, noise_key = entropy.draw("sampling", 64), entropy.draw("noise", 32)
    with drawn_beside(lambda: noise(noise_key, plan.noise_sd, plan.words), plan.words) as drawn:
        total = clipped(approved, weights, sampling_key)
        integers = quantize(total, plan.noise_exponent, plan.noise_limit, out=total.view(np.int64))
        integers += drawn.take()
    return integers


def private_update(
    approved: Approved, weights: NDArray[np.float32], entropy: Entropy, noise: Noise
) -> NDArray[np.float64]:
    """The way from ``weights`` through the study's local steps: float64[d]. As many privacy events as steps.

    A step's gradient is the noised sum over the patients expected in it, this hospital's declared number times the sampling
    rate: public, whatever the true number is. Arithmetic need not repeat elsewhere: nobody else does these steps. Rates so
    absurd that it overflows give an update that is not finite: noised sums and public numbers alone decide that.
    """
    local, plan = local_steps(approved), approved.plan
    expected = expected_patients(approved)
    rule = local_rule(local.step, (plan.noise_sd * 2.0**-plan.noise_exponent) ** 2 / expected / expected)
    start = weights.astype(np.float64)
    at = start.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(local.steps):
            integers = noised_sum(approved, at.astype(np.float32), entropy, noise)
            step = rule(dequantize(integers, plan.noise_exponent) / expected)
            if local.proximal:
                # beside the rule: it must not grow with the rule's momentum or scale
                step += local.proximal * (at - start)
            at -= local.learning_rate * step
        return at - start


def local_steps(approved: Approved) -> LocalSteps:
    """The study's local steps; MF-900 where it has none."""
    local = approved.study.training.local
    if local is None:
        raise LocalProtocolError(900, "a study without local steps", "report this as a fault of medfed")
    return local


def weighted_words(approved: Approved, update: NDArray[np.float64], entropy: Entropy) -> NDArray[np.int64]:
    """The update times this hospital's share of all declared patients, on the ring's grid: int64[d]. The sum over the
    hospitals is then the mean update. Its noise is in it already, so that it may be rounded at random."""
    plan = approved.plan
    weighted = update * (approved.nominal_patients / approved.roster.patients_at_start(approved.study))
    words = weighted.view(np.int64)  # the same memory
    if approved.study.quantization.rounding == "stochastic":
        return quantize_stochastic(weighted, plan.exponent, plan.limit, entropy.draw("rounding", KEY_BYTES), out=words)
    return quantize(weighted, plan.exponent, plan.limit, out=words)
