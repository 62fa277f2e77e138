"""The three pictures of a run's report: what was learned by round, what it cost a patient, how each hospital fares."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medfed.errors import ConfigError
from medfed.simulations.outcome import Outcome, Result, mean
from medfed.wording import counted, named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from medfed.client.outlook import Outlook

_BLUE, _GRAY, _RED = "#1f5fa8", "#6b6b6b", "#b8432f"
_WIDTH_IN = 6.4
_NAMED_HOSPITALS = 40
_LEAST_SPAN = 0.05


def require_matplotlib() -> None:
    """Raise ``ConfigError`` MF-320 before a run rather than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "matplotlib is not installed", "pip install 'medfed[sim]'") from error


def metric_by_round(outcomes: Sequence[Outcome], result: Result) -> bytes:
    """PNG: the test metric after each round, mean and range over splits, against the pooled baseline."""
    figure, axes = _canvas(4.0)
    # the last value is the released model; splits all have the same rounds
    curves = np.array([[np.nan if value is None else value for value in one.metric_by_round] for one in outcomes])
    rounds = np.array(outcomes[0].rounds_scored)
    many = len(outcomes) > 1
    if many:
        axes.fill_between(rounds, curves.min(0), curves.max(0), color=_BLUE, alpha=0.15, linewidth=0)
    average = curves.mean(0)
    label = f"federated, mean of {len(outcomes)} splits (band: lowest to highest)" if many else "federated"
    axes.plot(rounds, average, color=_BLUE, linewidth=2, label=label, zorder=3)
    axes.plot(rounds[-1:], average[-1:], "o", color=_BLUE, markersize=7, label="the released model", zorder=3)
    if result.pooled_metric is not None:
        text = "everybody's data in one place, no privacy"
        axes.axhline(result.pooled_metric, color=_GRAY, linewidth=1.5, linestyle=(0, (5, 3)), label=text)
    low, high = axes.get_ylim()
    if high - low < _LEAST_SPAN:  # or noise of the third decimal would fill the plot
        middle = (low + high) / 2
        axes.set_ylim(middle - _LEAST_SPAN / 2, min(middle + _LEAST_SPAN / 2, 1.005))
    axes.set_xlabel("round")
    axes.set_ylabel(f"{named(result.metric)} on test patients")
    _whole_numbers(axes)
    _legend(figure)
    return _png(figure)


def epsilon_by_attempt(outcome: Outcome) -> bytes:
    """PNG: epsilon spent by attempt at training in the first split, and what the spare attempts could still cost."""
    figure, axes = _canvas(3.2)
    costs, plan = outcome.epsilon_by_attempt(), outcome.assignment.plan
    used, approved = outcome.trained_attempts, outcome.assignment.study.training.attempts
    has_metrics = plan.metrics_epsilon is not None
    spent = {attempts: cost for attempts, cost in costs.items() if attempts <= used}
    left = {attempts: cost for attempts, cost in costs.items() if attempts >= used}
    label = "spent by a patient who trains" if has_metrics else "spent"
    axes.plot([*spent], [*spent.values()], color=_RED, linewidth=2, marker="o", markersize=4, label=label)
    if approved > used:
        label = f"{counted(approved - used, 'spare attempt')}, not needed"
        axes.plot([*left], [*left.values()], color=_RED, linewidth=1.5, linestyle=(0, (1, 2)), label=label)
    if plan.metrics_epsilon is not None:
        paid, label = [0.0] + [plan.metrics_epsilon] * 2, "spent by a patient held out for the metrics"
        axes.plot([0, 1, used], paid, color=_BLUE, linewidth=2, label=label)
    axes.axhline(
        plan.epsilon, color=_GRAY, linewidth=1.5, linestyle=(0, (5, 3)), label="approved by every hospital in advance"
    )
    axes.set_xlabel("attempts at training (one a round, unless a round is lost)")
    axes.set_ylabel(f"epsilon of a {outcome.assignment.study.privacy.unit}")
    axes.set_ylim(0, plan.epsilon * 1.08)
    axes.set_xlim(0, approved + 0.3)
    _whole_numbers(axes)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    return _png(figure)


def epsilon_planned(planned: Outlook, rounds: int, delta: float) -> bytes:
    """PNG: epsilon of a study that nobody has joined yet, by attempt."""
    figure, axes = _canvas(3.2)
    points = [(0, 0.0), *((spent["attempts"], spent["epsilon"]) for spent in planned["epsilon_by_attempt"])]
    own = [point for point in points if point[0] <= rounds]
    axes.plot(
        *zip(*own, strict=True), color=_RED, linewidth=2, marker="o", markersize=4, label=counted(rounds, "round")
    )
    spares = points[len(own) - 1 :]
    if len(spares) > 1:
        label = counted(spares[-1][0] - rounds, "spare attempt")
        axes.plot(*zip(*spares, strict=True), color=_RED, linewidth=1.5, linestyle=(0, (1, 2)), marker=".", label=label)
    axes.set_xlabel("attempts spent")
    axes.set_ylabel(f"epsilon of one who trains (delta {delta:g})")
    axes.set_ylim(0, points[-1][1] * 1.08)
    axes.set_xlim(0, points[-1][0] + 0.3)
    _whole_numbers(axes)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    return _png(figure)


def metric_by_hospital(outcomes: Sequence[Outcome], result: Result) -> bytes:
    """PNG: the metric of the released model on each hospital's own test patients, mean and range over splits."""
    names = list(result.per_hospital)
    figure, axes = _canvas(min(1.5 + 0.3 * len(names), 12.0))
    for place, name in enumerate(names):
        known = [value for one in outcomes if (value := one.scores.hospitals[place].metric) is not None]
        if known:
            axes.plot(
                [min(known), max(known)], [place, place], color=_BLUE, alpha=0.35, linewidth=4, solid_capstyle="butt"
            )
            axes.plot([float(np.mean(known))], [place], "o", color=_BLUE, markersize=7)
        else:
            axes.text(
                0.02,
                place,
                f"one class only: no {named(result.metric)}",
                color=_GRAY,
                fontsize=9,
                va="center",
                transform=_rows(axes),
            )
        patients = mean([float(one.scores.hospitals[place].records) for one in outcomes]) or 0.0
        names[place] = f"{name} ({patients:.0f})"
    if result.test_metric is not None:
        axes.axvline(
            result.test_metric, color=_GRAY, linewidth=1.5, linestyle=(0, (5, 3)), label="all test patients together"
        )
        _legend(figure)
    if len(names) <= _NAMED_HOSPITALS:
        axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    spread = " (bar: lowest to highest split)" if len(outcomes) > 1 else ""
    axes.set_xlabel(f"{named(result.metric)} on the hospital's test patients{spread}")
    axes.set_ylabel("hospital (test records)")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e4e4e4")
    return _png(figure)


def _canvas(height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure) -> None:
    """Above the plot, where it hides nothing."""
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def _rows(axes: Axes) -> object:
    """x as a share of the width, y in data units."""
    return axes.get_yaxis_transform()


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
