"""The one-run audit: does a whole training hide its patients as well as its account says, found out by training once?

Each of many canaries, patients whose gradients have the full norm and are orthogonal to each other, is in the training or
not by a fair coin. An attacker who sees every released sum of all rounds scores each canary by what the sums hold along its
gradient, calls the highest "in", the lowest "out", and says nothing of the others. How often that is right bounds epsilon
from below, for the list of all rounds together. Weaker than the mechanism audit by far: it is here for what that one does
not see, composition over rounds and patients among each other.

*Source* Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846): Algorithm 1, Theorem 5.2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from medfed.client.local_steps import Noise
from medfed.client.trainer import Patients
from medfed.models import catalogue
from medfed.models.parameters import count
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import calibrate
from medfed.simulations.audits.bounds import one_run_lower_bound
from medfed.simulations.audits.real_path import RealPath, Shape, audited_study
from medfed.simulations.audits.setting import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIDENCE = 0.95
CANARIES = 5000
EPSILONS = (1.0, 3.0, 8.0)
CONTROL_EPSILON = 3.0
"""Whose audit is repeated with a tenth of the noise: the bound must then pass the claim, or the audit sees nothing."""
CONTROL_SHARE = 0.1
ROUNDS = 4

_SIZE = 1e4
_RATE = 1e-9  # of learning, so small that the canaries' gradients keep their full norm: the worst models for them


class RunResult(TypedDict):
    """One training. ``sums``: released sums that the attacker saw."""

    claimed_epsilon: float
    lower_bound: float
    guesses: int
    correct: int
    sums: int


class OneRunResult(TypedDict):
    """The figures of epsilon 3 on top; ``control`` is the same with a tenth of the noise."""

    claimed_epsilon: float
    lower_bound: float
    canaries: int
    confidence: float
    delta: float
    runs: list[RunResult]
    control: RunResult
    violations: list[str]
    weak: list[str]


def one_run_audit(setting: Setting, *, canaries: int = CANARIES, noise: Noise = discrete_gaussian) -> OneRunResult:
    """Audit a training for each of ``EPSILONS`` (quick: one), and the control."""
    claims = (CONTROL_EPSILON,) if setting.quick else EPSILONS
    runs = []
    for number, claim in enumerate((*claims, CONTROL_EPSILON)):
        is_control = number == len(claims)

        def tell(share: float, number: int = number, claim: float = claim) -> None:
            setting.tell((number + share) / (len(claims) + 1), f"one run, epsilon {claim:g}")

        share = CONTROL_SHARE if is_control else 1.0
        runs.append(_audited_run(setting, claim, canaries, noise, share, f"one-run/{number}", tell))
    *audited, control = runs
    violations, weak = _verdict(audited, control)
    top = next(run for run, claim in zip(audited, claims, strict=True) if claim == CONTROL_EPSILON)
    return {
        "claimed_epsilon": top["claimed_epsilon"],
        "lower_bound": top["lower_bound"],
        "canaries": canaries,
        "confidence": CONFIDENCE,
        "delta": _shape(canaries).delta,
        "runs": audited,
        "control": control,
        "violations": violations,
        "weak": weak,
    }


def _shape(canaries: int) -> Shape:
    return Shape(canaries, "local", 1.0, rounds=ROUNDS, learning_rate=_RATE)


def _scaled(noise: Noise, share: float) -> Noise:
    """Noise whose standard deviation is only that share of what was asked for."""
    return lambda key, standard_deviation, size: noise(key, share * standard_deviation, size)


def _verdict(runs: list[RunResult], control: RunResult) -> tuple[list[str], list[str]]:
    broken = [
        f"one run: epsilon is at least {run['lower_bound']:.3f}, above the claim {run['claimed_epsilon']:.3f}"
        for run in runs
        if run["lower_bound"] > run["claimed_epsilon"]
    ]
    blind = []
    if control["lower_bound"] <= control["claimed_epsilon"]:
        share = f"{CONTROL_SHARE:g} of the noise"
        blind.append(f"one run: with {share} the bound is {control['lower_bound']:.3f}, not above the claim")
    return broken, blind


# ----------------------------------------------------------------------------------------------------------- a training


def _audited_run(
    setting: Setting,
    claim: float,
    canaries: int,
    noise: Noise,
    noise_share: float,
    owner: str,
    tell: Callable[[float], None],
) -> RunResult:
    """A training of a study planned for ``claim``, with ``noise_share`` of its noise; the attacker knows that share."""
    draft = audited_study(_shape(canaries))
    study = calibrate(draft, count(catalogue.build(draft)), claim)
    path = RealPath(study, setting, owner, noise if noise_share == 1.0 else _scaled(noise, noise_share))
    is_in = setting.generator(f"{owner}/coins").random(canaries) < 0.5
    scores = _scores(path, _canaries(path, is_in), canaries, tell)
    event = path.plan.mechanism
    mu = math.sqrt(ROUNDS) * event.sensitivity / (noise_share * event.sigma)
    guesses = best_guesses(canaries, mu, path.plan.delta)
    correct = right_guesses(scores, is_in, guesses)
    bound = one_run_lower_bound(canaries, guesses, correct, path.plan.delta, CONFIDENCE)
    return {
        "claimed_epsilon": path.plan.epsilon,
        "lower_bound": bound,
        "guesses": guesses,
        "correct": correct,
        "sums": ROUNDS,
    }


def _canaries(path: RealPath, is_in: NDArray[np.bool_]) -> Patients:
    """Each that is in has one record, large in its own feature and 0 in all others."""
    chosen = np.flatnonzero(is_in)
    inputs = np.zeros((len(chosen), len(is_in)), np.float32)
    inputs[np.arange(len(chosen)), chosen] = _SIZE
    return path.patients(inputs, [0] * len(chosen), [f"canary-{number}" for number in chosen])


def _scores(path: RealPath, patients: Patients, canaries: int, tell: Callable[[float], None]) -> NDArray[np.float64]:
    """Of each canary: what all released sums hold along its gradient, after a training of all rounds; float64[canaries].

    The attacker knows what the other hospitals sent, and is left with this one's.
    """
    state = path.first
    scores = np.zeros(canaries)
    for number in range(ROUNDS):
        opened = path.attempt(state, patients)
        scores += (opened.total - opened.vectors[1:].sum(0))[:canaries]
        state = path.next_state(state, opened)
        tell((number + 1) / ROUNDS)
    return scores


# ---------------------------------------------------------------------------------------------------------- the attacker


def right_guesses(scores: NDArray[np.float64], is_in: NDArray[np.bool_], guesses: int) -> int:
    """The highest half of ``guesses`` scores are called "in", the lowest half "out": how many of them rightly."""
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    return int((~is_in[order[:half]]).sum() + is_in[order[len(order) - half :]].sum())


@functools.cache
def best_guesses(canaries: int, mu: float, delta: float) -> int:
    """How many guesses promise most, if the claim is exact: from public numbers alone, so chosen before any draw.

    Scores are then N(0, 1) or N(mu, 1); those further than some distance from mu / 2 are called.
    """

    def promise(guesses: int, accuracy: float) -> float:
        return one_run_lower_bound(canaries, guesses, int(guesses * accuracy), delta, CONFIDENCE)

    choices: dict[int, float] = {}
    for distance in np.arange(0.0, mu / 2 + 3.5, 0.2):
        right, wrong = ndtr(mu / 2 - distance), ndtr(-mu / 2 - distance)
        guesses = 2 * round(canaries * (right + wrong) / 2)
        if guesses:
            choices[guesses] = promise(guesses, float(right / (right + wrong)))
    return max(choices, key=lambda guesses: choices[guesses])


# ------------------------------------------------------------------------------------------------------- table and plot


def one_run_rows(result: OneRunResult) -> list[tuple[str, str]]:
    """What the printed table says, (what, figure)."""
    rows = [
        (
            f"training of {run['sums']} rounds",
            f"epsilon {run['lower_bound']:.3f} at least, {run['claimed_epsilon']:.3f} claimed "
            f"({run['correct']} of {run['guesses']} guesses right)",
        )
        for run in result["runs"]
    ]
    control = result["control"]
    figure = (
        f"epsilon {control['lower_bound']:.3f} at least, {control['claimed_epsilon']:.3f} claimed, must be exceeded"
    )
    return [*rows, (f"control with {CONTROL_SHARE:g} of the noise", figure)]


def one_run_plot(axes: Axes, result: OneRunResult) -> None:
    """Bounds against claims; the control above the line."""
    claims = [run["claimed_epsilon"] for run in result["runs"]]
    most = max(*claims, result["control"]["lower_bound"]) * 1.1
    axes.plot([0, most], [0, most], color="#6b6b6b", linewidth=1.5, linestyle=(0, (5, 3)), label="claim")
    axes.plot(claims, [run["lower_bound"] for run in result["runs"]], "o", color="#1f5fa8", label="lower bound")
    control = result["control"]
    label = f"control: {CONTROL_SHARE:g} of the noise"
    axes.plot([control["claimed_epsilon"]], [control["lower_bound"]], "x", color="#b8432f", markersize=8, label=label)
    axes.set_xlabel("epsilon that the account claims for the training")
    axes.set_ylabel("epsilon at least")
    axes.set_title(f"one run: {result['canaries']} canaries, {result['confidence']:.0%} confidence", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
