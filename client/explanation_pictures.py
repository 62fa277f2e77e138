"""Explanations for people: a picture or a page for each record, and one table of all of them.

Files are called by the line of the table where their record begins, never by a patient. Red raises the output, blue lowers it.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError
from medfed.models.explanations import explain
from medfed.models.reasons import ImageReasons, Reasons, SeriesReasons, TableReasons, TextReasons

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from medfed.client.prediction import NewRecords
    from medfed.models.loading import TrainedModel

EXPLANATIONS_NAME = "explanations.csv"
_MOST_BARS = 20
_RED, _BLUE = "#b8432f", "#1f5fa8"
_COLORS = "RdBu_r"


def explained_files(
    trained: TrainedModel, new: NewRecords, values: NDArray[np.float64], count: int
) -> dict[str, bytes]:
    """File name -> content: of the first ``count`` records a picture or page each, and ``EXPLANATIONS_NAME``.

    Raises ``ConfigError`` MF-320 without captum or matplotlib.
    """
    require_matplotlib()
    pages: dict[str, bytes] = {}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["row", "record", "output", "method", "what", "where", "value", "contribution"])
    for place in range(count):
        row = new.rows[place]
        found = explain(trained, new.inputs[place], new.texts[place])
        ending, draw = _DRAWERS[type(found)]
        pages[f"explanation-row-{row}.{ending}"] = draw(found, f"row {row}: {_said(values[place])}")
        for line in found.lines():
            cells = [line.method, line.what, line.where, line.value, f"{line.contribution:.6g}"]
            writer.writerow([row, new.records[place], found.output, *cells])
    pages[EXPLANATIONS_NAME] = table.getvalue().encode()
    return pages


def require_matplotlib() -> None:
    """Raise ``ConfigError`` MF-320 before the work rather than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "matplotlib is not installed, which draws", "pip install 'medfed[explain]'") from error


def _said(values: NDArray[np.float64]) -> str:
    """What was predicted, in few numbers."""
    shown = ", ".join(f"{value:.3f}" for value in values[:6])
    return f"predicted {shown}{' ...' if len(values) > 6 else ''}"


def canvas(width_in: float, height_in: float) -> Figure:
    """An empty figure without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=130, layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _bars(axes: Axes, names: Sequence[str], contributions: NDArray[np.float64]) -> None:
    """The largest first, at most ``_MOST_BARS``; the others together in the last."""
    order = np.argsort(-np.abs(contributions), kind="stable")
    labels = [names[place] for place in order[:_MOST_BARS]]
    widths = contributions[order[:_MOST_BARS]].tolist()
    if len(order) > _MOST_BARS:
        labels.append(f"{len(order) - _MOST_BARS} others together")
        widths.append(float(contributions[order[_MOST_BARS:]].sum()))
    places = range(len(labels))
    axes.barh(places, widths, color=[_RED if width > 0 else _BLUE for width in widths], height=0.65)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.axvline(0.0, color="#6b6b6b", linewidth=1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_table(found: TableReasons, title: str) -> bytes:
    bars = min(len(found.names), _MOST_BARS + 1)
    figure = canvas(6.4, 1.5 + 0.28 * bars)
    axes = figure.add_subplot()
    _bars(
        axes,
        [_cut(f"{name} = {value}") for name, value in zip(found.names, found.values, strict=True)],
        found.contributions,
    )
    axes.set_xlabel(f"contribution to the {found.output} (integrated gradients)", fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return png(figure)


def _cut(text: str) -> str:
    return text if len(text) <= 42 else text[:40] + "…"


def _draw_series(found: SeriesReasons, title: str) -> bytes:
    """Hours to the right, variables downwards, a dot where something was measured; beside it what each comes to."""
    steps, count = found.steps.shape
    figure = canvas(9.6, 1.9 + 0.22 * (count + len(found.features.names)))
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    # one step far above all others would leave the rest without color
    most = float(np.quantile(np.abs(found.steps), 0.998)) or float(np.abs(found.steps).max()) or 1.0
    span = (0.0, steps * found.step_hours)
    shown = left.imshow(
        found.steps.T,
        aspect="auto",
        cmap=_COLORS,
        vmin=-most,
        vmax=most,
        extent=(*span, count - 0.5, -0.5),
        interpolation="nearest",
    )
    at, which = np.nonzero(~np.isnan(found.values))
    left.plot((at + 0.5) * found.step_hours, which, "k.", markersize=1.6, alpha=0.6)
    if found.inside < steps:
        left.axvspan(found.inside * found.step_hours, span[1], color="#e4e4e4")
    left.set_xlim(*span)
    left.set_yticks(range(count), found.variables, fontsize=8)
    left.set_xlabel("hours (dots: measured; grey: after the stay)", fontsize=9)
    figure.colorbar(shown, ax=left, pad=0.01, fraction=0.04).ax.tick_params(labelsize=7)
    static = [f"{name} = {value}" for name, value in zip(found.features.names, found.features.values, strict=True)]
    sums = np.concatenate([found.steps.sum(0), found.features.contributions])
    _bars(right, [_cut(name) for name in [*found.variables, *static]], sums)
    right.set_xlabel("over the whole stay", fontsize=9)
    figure.suptitle(
        f"{title}\ncontribution to the {found.output} (integrated gradients)", fontsize=10, x=0.01, ha="left"
    )
    return png(figure)


def _draw_image(found: ImageReasons, title: str) -> bytes:
    """The image, and over it what raises and lowers the output, and where the last layer looked."""
    panels = 2 if found.attention is None else 3
    height, width = found.picture.shape
    if width > 1.5 * height:  # views or slices side by side
        figure = canvas(7.2, 0.6 + panels * (0.4 + 6.8 * height / width))
        all_axes = figure.subplots(panels, 1)
    else:
        figure = canvas(3.3 * panels, 0.9 + 3.2 * min(2.0, height / width))
        all_axes = figure.subplots(1, panels)
    for axes in all_axes:
        axes.imshow(found.picture, cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_axis_off()
    # a few pixels far above all others would leave the rest without color
    most = float(np.quantile(np.abs(found.contributions), 0.99)) or 1.0
    strength = np.clip(np.abs(found.contributions) / most, 0.0, 1.0)
    all_axes[0].set_title("image", fontsize=9)
    all_axes[1].imshow(found.contributions, cmap=_COLORS, vmin=-most, vmax=most, alpha=0.85 * strength)
    all_axes[1].set_title("integrated gradients", fontsize=9)
    if found.attention is not None:
        all_axes[2].imshow(found.attention, cmap="inferno", vmin=0.0, vmax=1.0, alpha=0.55 * np.sqrt(found.attention))
        all_axes[2].set_title("Grad-CAM", fontsize=9)
    figure.suptitle(f"{title}: {found.output}", fontsize=10, x=0.01, ha="left")
    return png(figure)


_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.9 sans-serif;margin:2em;max-width:52em}}span{{padding:.1em .15em;border-radius:.2em}}
small{{color:#555}}</style></head><body>
<p><b>{title}</b><br><small>{output}; red raises it, blue lowers it; point at a word for its number.</small></p>
<p>{words}</p>
</body></html>
"""


def _draw_text(found: TextReasons, title: str) -> bytes:
    """A page that needs nothing else: every word on its color."""
    most = float(np.abs(found.contributions).max()) if len(found.contributions) else 0.0
    words = []
    for word, each in zip(found.words, found.contributions.tolist(), strict=True):
        share = abs(each) / (most or 1.0)
        color = f"rgba({'184,67,47' if each > 0 else '31,95,168'},{0.75 * share:.2f})"
        words.append(f'<span style="background:{color}" title="{each:+.4f}">{html.escape(word)}</span>')
    output = html.escape(f"contribution to the {found.output} (integrated gradients)")
    return _PAGE.format(title=html.escape(title), output=output, words=found.joined.join(words)).encode()


_DRAWERS: dict[type[Reasons], tuple[str, Callable[..., bytes]]] = {
    TableReasons: ("png", _draw_table),
    SeriesReasons: ("png", _draw_series),
    ImageReasons: ("png", _draw_image),
    TextReasons: ("html", _draw_text),
}
"""By what was explained: the ending of a file, and (reasons, title) -> its content."""
