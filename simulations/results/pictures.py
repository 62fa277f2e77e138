"""The picture of a cohort: its metric against epsilon, both modes and Opacus, with pooled and single-hospital training."""

from __future__ import annotations

import io

from medfed.simulations.plots import require_matplotlib
from medfed.simulations.results.cells import Measured
from medfed.simulations.results.figures import Mean, cells_of, metric
from medfed.simulations.results.protocol import Arm, Mode, Row

_BLUE, _LIGHT, _RED, _GRAY = "#1f5fa8", "#79a9d8", "#b8432f", "#6b6b6b"
_LEAST_SPAN = 0.05
_CURVES: tuple[tuple[str, Arm, Mode | None, str, str], ...] = (
    ("federation, distributed noise", "federation", "distributed", _BLUE, "o"),
    ("federation, local noise", "federation", "local", _LIGHT, "s"),
    ("plain Opacus, all records in one place", "opacus", None, _RED, "^"),
)


def metric_by_epsilon(row: Row, measured: Measured) -> bytes:
    """PNG: means over splits with their deviation; the strongest privacy on the left, none on the right."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    epsilons: list[float | None] = [*sorted(row.epsilons), None]
    for place, (label, arm, mode, color, marker) in enumerate(_CURVES):
        known = {
            number: found
            for number, epsilon in enumerate(epsilons)
            if (found := metric(cells_of(measured, row, arm, epsilon, mode), row.metric)) is not None
        }
        if known:
            places = [number + (place - 1) * 0.06 for number in known]  # beside each other, or bars would hide bars
            bars = [found.deviation or 0.0 for found in known.values()]
            means = [found.value for found in known.values()]
            axes.errorbar(places, means, bars, color=color, marker=marker, label=label, linewidth=1.8, capsize=3)
    for label, arm, style in (
        ("everybody's data in one place, no privacy", "pooled", (0, (5, 3))),
        ("best single hospital alone, no privacy", "single", (0, (1, 2))),
    ):
        line = _line(row, measured, "pooled" if arm == "pooled" else "single")
        if line is not None:
            axes.axhline(line.value, color=_GRAY, linewidth=1.5, linestyle=style, label=label)
    for floors in row.floors[:1]:
        least = {number: floors.least[epsilon] for number, epsilon in enumerate(epsilons) if epsilon in floors.least}
        axes.plot([*least], [*least.values()], "_", color="black", markersize=22, label=f"floor, {floors.what}")
    low, high = axes.get_ylim()
    if high - low < _LEAST_SPAN:  # or noise of the third decimal would fill the plot
        middle = (low + high) / 2
        axes.set_ylim(middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2)
    axes.set_xticks(range(len(epsilons)), ["none" if epsilon is None else f"{epsilon:g}" for epsilon in epsilons])
    axes.set_xlabel(f"epsilon of a patient (delta {row.delta:g}); bars: one standard deviation over splits")
    axes.set_ylabel(row.metric_name)
    figure.legend(loc="outside upper left", frameon=False, fontsize=9, ncols=2)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _line(row: Row, measured: Measured, arm: Arm) -> Mean | None:
    return metric(cells_of(measured, row, arm, None, None), row.metric)
