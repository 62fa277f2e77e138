"""The mechanism audit: does one attempt hide one patient as well as the account says, measured on the code itself?

Patients with worst-case gradients, each on words of its own, are in or out of attempts that take the real path (clip,
round, noise, mask, unmask). For each of them every attempt is one draw of the same event, seen along the direction of the
patient's gradient by an attacker who knows everything else, colluders' vectors included. Counts at a threshold that was
fixed beforehand give a lower bound on mu, and so on epsilon. Beside it stand what makes an account wrong more subtly:
noise that is too small in sum or in one direction, that repeats, and masks that hide nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, chi2

from medfed.client.local_steps import Noise
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import Plan
from medfed.simulations.audits.bounds import (
    any_shape_lower_bound,
    best_threshold,
    gaussian_epsilon,
    mu_lower_bound,
)
from medfed.simulations.audits.draws import DIRECTION, NEAR, PATIENTS, WORDS, Sample, observe
from medfed.simulations.audits.real_path import RealPath, Shape, audited_study
from medfed.simulations.audits.setting import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIDENCE = 0.95
DRAWS = 20_000
LEAST_SHARE = {(2.0, 1.0): 0.93, (2.0, 0.5): 0.85}
"""By mu and sampling rate: a lower bound below this share of the claim means that the audit has gone blind (chance below
1e-3). Elsewhere the bound is looser, and ``LEAST_ELSEWHERE`` holds."""
LEAST_ELSEWHERE = 0.75
ALARM = 1e-4
"""Chance that one of the other tests raises a false alarm, each."""

Mode = Literal["local", "distributed"]


class CaseResult(TypedDict):
    """One mode and sampling rate. ``share``: lower bound over claim. Noise ratios are measured over stated sd.
    ``looked_twice``: the first sample raised an alarm, and these figures are of a second one."""

    mode: Mode
    sampling_rate: float
    hospitals: int
    colluders: int
    drop_outs: int
    draws_a_side: int
    mu: float
    claimed_epsilon: float
    accounted_epsilon: float
    lower_bound: float
    mu_lower_bound: float
    share: float
    any_shape_lower_bound: float
    noise_ratio: float
    noise_ratio_least: float
    weakest_direction_ratio: float
    weakest_direction_least: float
    repeated_noise_words: int
    repeated_noise_words_most: int
    bare_upload_words: int
    bare_upload_words_most: int
    sums_are_exact: bool
    looked_twice: bool
    histogram: dict[str, list[float]]


class MechanismResult(TypedDict):
    """The first case's figures on top: local noise, everybody sampled."""

    claimed_epsilon: float
    lower_bound: float
    mu: float
    confidence: float
    delta: float
    cases: list[CaseResult]
    violations: list[str]
    weak: list[str]


def cases(mu: float, quick: bool) -> list[Shape]:
    """The audited studies: noise of one hospital, shares of the honest ones, Poisson sampling, and shares with a drop-out."""
    whole = Shape(PATIENTS * WORDS, "local", 1 / mu)
    shares = Shape(PATIENTS * WORDS, "distributed", 1 / mu, hospitals=5, colluders=2)
    sampled = Shape(PATIENTS * WORDS, "local", 1 / mu, sampling_rate=0.5)
    recovered = Shape(PATIENTS * WORDS, "distributed", 1 / mu, hospitals=5, colluders=1, drop_outs=1)
    return [whole, shares] if quick else [whole, shares, sampled, recovered]


def mechanism_audit(
    setting: Setting, *, mu: float = 2.0, draws: int = DRAWS, noise: Noise = discrete_gaussian
) -> MechanismResult:
    """Audit all cases; ``noise``: a broken one must be found out."""
    shapes = cases(mu, setting.quick)
    done: list[CaseResult] = []
    violations: list[str] = []
    weak: list[str] = []
    for number, shape in enumerate(shapes):
        called = case_name(shape.mode, shape.sampling_rate, shape.drop_outs)

        def tell(share: float, number: int = number, name: str = called) -> None:
            setting.tell((number + share) / len(shapes), f"mechanism, {name}")

        def look(
            which: str, number: int = number, shape: Shape = shape, tell: Callable[[float], None] = tell
        ) -> CaseResult:
            path = RealPath(audited_study(shape), setting, f"mechanism/{number}{which}", noise)
            return judge(observe(path, shape, draws, tell), path.plan, shape)

        result = look("")
        broken, blind = verdict(result)
        if (
            broken or blind
        ):  # chance does this in about one audit of a hundred, and hardly ever twice: look again, afresh
            result = {**look("/again"), "looked_twice": True}
            again = verdict(result)
            broken, blind = again[0] if broken else [], again[1] if blind else []
        done.append(result)
        violations += broken
        weak += blind
    first = done[0]
    return {
        "claimed_epsilon": first["claimed_epsilon"],
        "lower_bound": first["lower_bound"],
        "mu": first["mu"],
        "confidence": CONFIDENCE,
        "delta": shapes[0].delta,
        "cases": done,
        "violations": violations,
        "weak": weak,
    }


# ---------------------------------------------------------------------------------------------------------- the verdict


def judge(sample: Sample, plan: Plan, shape: Shape) -> CaseResult:
    """The figures of one case, against what its plan states."""
    mechanism, draws = plan.mechanism, len(sample.without)
    noise_sd = mechanism.sigma * math.sqrt(mechanism.shares)
    mu, rate, delta = mechanism.sensitivity / noise_sd, mechanism.sampling_rate, plan.delta
    direction = DIRECTION / np.linalg.norm(DIRECTION) / noise_sd
    without, present = sample.without @ direction, sample.present @ direction

    def counts(threshold: float) -> tuple[int, int]:
        return int((without > threshold).sum()), int((present <= threshold).sum())

    middle, tail = _thresholds(mu, draws, rate, delta)
    mu_bound = mu_lower_bound(*counts(middle), draws, CONFIDENCE, rate)
    claimed, bound = gaussian_epsilon(mu, delta, rate), gaussian_epsilon(mu_bound, delta, rate)
    scaled = sample.without / noise_sd
    return {
        "mode": shape.mode,
        "sampling_rate": rate,
        "hospitals": shape.hospitals,
        "colluders": shape.colluders,
        "drop_outs": shape.drop_outs,
        "draws_a_side": draws,
        "mu": mu,
        "claimed_epsilon": claimed,
        "accounted_epsilon": plan.epsilon_after(1),
        "lower_bound": bound,
        "mu_lower_bound": mu_bound,
        "share": bound / claimed,
        "any_shape_lower_bound": any_shape_lower_bound(*counts(tail), draws, CONFIDENCE, delta),
        "noise_ratio": float(np.sqrt((scaled**2).mean())),
        "noise_ratio_least": math.sqrt(chi2.ppf(ALARM, scaled.size) / scaled.size),
        "weakest_direction_ratio": float(np.linalg.svd(scaled, compute_uv=False)[-1] / math.sqrt(draws)),
        "weakest_direction_least": _weakest_least(draws),
        "repeated_noise_words": sample.repeated,
        # the difference of two fresh ones is sqrt(2) as wide
        "repeated_noise_words_most": int(binom.isf(ALARM, sample.compared, math.erf(NEAR / 2))),
        "bare_upload_words": sample.bare,
        "bare_upload_words_most": int(binom.isf(ALARM, sample.sent, NEAR)),
        "sums_are_exact": sample.sums_are_exact,
        "looked_twice": False,
        "histogram": _histogram(without, present, middle, mu),
    }


@functools.cache
def _thresholds(mu: float, draws: int, rate: float, delta: float) -> tuple[float, float]:
    """For the bound on mu, and for the one that knows nothing of the noise's shape."""
    middle = best_threshold(mu, draws, rate, lambda a, b: mu_lower_bound(a, b, draws, CONFIDENCE, rate))
    tail = best_threshold(mu, draws, rate, lambda a, b: any_shape_lower_bound(a, b, draws, CONFIDENCE, delta))
    return middle, tail


def _weakest_least(draws: int) -> float:
    """What the least singular value of fresh standard normals falls below with a chance of ``ALARM`` at most.

    *Source* Davidson, Szarek 2001 (Handbook of the geometry of Banach spaces, Theorem 2.13).
    """
    return 1 - math.sqrt(WORDS / draws) - math.sqrt(2 * math.log(1 / ALARM) / draws)


def _histogram(
    without: NDArray[np.float64], present: NDArray[np.float64], threshold: float, mu: float
) -> dict[str, list[float]]:
    """Counts of both sides along the patient's direction, for the plot; the ends take what lies beyond."""
    edges = np.linspace(-4.0, mu + 4.0, 61)
    counts = [np.histogram(np.clip(side, edges[0], edges[-1]), edges)[0] for side in (without, present)]
    return {
        "edges": edges.tolist(),
        "without": counts[0].astype(float).tolist(),
        "present": counts[1].astype(float).tolist(),
        "threshold": [threshold],
    }


def verdict(result: CaseResult) -> tuple[list[str], list[str]]:
    """What is broken, and where the audit itself no longer sees: sentences."""
    name = case_name(result["mode"], result["sampling_rate"], result["drop_outs"])
    broken = []
    if result["lower_bound"] > result["claimed_epsilon"]:
        broken.append(
            f"epsilon is at least {result['lower_bound']:.3f}, above the claim {result['claimed_epsilon']:.3f}"
        )
    if result["claimed_epsilon"] > result["accounted_epsilon"]:
        broken.append(
            f"the account says {result['accounted_epsilon']:.3f}, the event costs {result['claimed_epsilon']:.3f}"
        )
    if result["noise_ratio"] < result["noise_ratio_least"]:
        broken.append(f"noise is {result['noise_ratio']:.4f} of what is stated")
    if result["weakest_direction_ratio"] < result["weakest_direction_least"]:
        broken.append(f"noise is {result['weakest_direction_ratio']:.4f} of what is stated in one direction")
    if result["repeated_noise_words"] > result["repeated_noise_words_most"]:
        broken.append(f"{result['repeated_noise_words']} words of noise repeat or nearly do")
    if result["bare_upload_words"] > result["bare_upload_words_most"]:
        broken.append(
            f"{result['bare_upload_words']} words of uploads are masked with nothing, or with a pad used before"
        )
    if not result["sums_are_exact"]:
        broken.append("opened sums are not the sums of what was masked")
    least = LEAST_SHARE.get((round(result["mu"], 6), result["sampling_rate"]), LEAST_ELSEWHERE)
    blind = [f"the lower bound is {result['share']:.3f} of the claim, not {least}"] if result["share"] < least else []
    return [f"mechanism, {name}: {each}" for each in broken], [f"mechanism, {name}: {each}" for each in blind]


def case_name(mode: str, sampling_rate: float, drop_outs: int) -> str:
    """How a case is called in tables."""
    sampled = "all sampled" if sampling_rate == 1.0 else f"sampling rate {sampling_rate:g}"
    return f"{mode} noise, {sampled}" + (f", drop-outs {drop_outs}" if drop_outs else "")


# ------------------------------------------------------------------------------------------------------ table and plot


def mechanism_rows(result: MechanismResult) -> list[tuple[str, str]]:
    """What the printed table says, (what, figure)."""
    rows = []
    for case in result["cases"]:
        rows.append(
            (
                case_name(case["mode"], case["sampling_rate"], case["drop_outs"]),
                f"epsilon {case['lower_bound']:.3f} at least, {case['claimed_epsilon']:.3f} claimed ({case['share']:.1%})",
            )
        )
        rows.append(
            (
                f"  {case['draws_a_side']} draws a side, mu {case['mu']:.3g}",
                f"noise {case['noise_ratio']:.4f} of its claim, {case['weakest_direction_ratio']:.4f} in the weakest direction",
            )
        )
    return rows


def mechanism_plot(axes: Axes, result: MechanismResult) -> None:
    """Both sides of the first case, and the threshold between them."""
    case = result["cases"][0]
    seen = case["histogram"]
    for side, color in (("without", "#6b6b6b"), ("present", "#1f5fa8")):
        label = "without the patient" if side == "without" else "with the patient"
        axes.stairs(seen[side], seen["edges"], fill=True, color=color, alpha=0.35, label=label)
    axes.axvline(seen["threshold"][0], color="#b8432f", linewidth=1.5, linestyle=(0, (5, 3)), label="threshold")
    axes.set_xlabel("released sum along the patient's gradient, in standard deviations of the noise")
    axes.set_ylabel("draws")
    axes.set_title(
        f"mechanism: epsilon at least {case['lower_bound']:.2f} of {case['claimed_epsilon']:.2f} claimed", fontsize=10
    )
    axes.legend(frameon=False, fontsize=9)
