"""What an explanation consists of, by kind of record: numbers to be drawn, and the rows of a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FIELDS = 4  # an image's table has so many fields a side


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table of explanations. ``contribution``: in units of the output; of Grad-CAM a share of its largest."""

    method: str
    what: str
    where: str
    value: str
    contribution: float


@dataclass(frozen=True, slots=True, eq=False)
class TableReasons:
    """``names``, ``values`` (as text, decoded) and ``contributions`` of each feature. ``left_out``: of a mixed record, by how
    much the output is lower where a whole part is left out."""

    output: str
    names: tuple[str, ...]
    values: tuple[str, ...]
    contributions: Floats
    left_out: tuple[tuple[str, float], ...] = ()

    def lines(self) -> Iterator[Line]:
        for part, each in self.left_out:
            yield Line("leaving out", part, "", "there", each)
        for name, value, each in zip(self.names, self.values, self.contributions, strict=True):
            yield Line("integrated gradients", name, "", value, float(each))


@dataclass(frozen=True, slots=True, eq=False)
class SeriesReasons:
    """``steps``: float64[steps, V], of a variable's value and of its having been measured, together; ``values`` the same
    shape, NaN where nothing was measured; ``features``: of what holds for the whole stay; ``inside``: steps of the stay."""

    output: str
    variables: tuple[str, ...]
    step_hours: float
    steps: Floats
    values: Floats
    inside: int
    features: TableReasons

    def lines(self) -> Iterator[Line]:
        for step, place in zip(*np.nonzero(self.steps), strict=True):
            value = self.values[step, place]
            shown = "" if np.isnan(value) else f"{value:.6g}"
            where = f"from hour {step * self.step_hours:g}"
            yield Line("integrated gradients", self.variables[place], where, shown, float(self.steps[step, place]))
        yield from self.features.lines()


@dataclass(frozen=True, slots=True, eq=False)
class ImageReasons:
    """``picture``: float64[height, width], 0 black, 1 white; ``contributions`` and ``attention`` (Grad-CAM, 0 to 1) the same
    shape; ``attention`` is None where no layer has places. ``views``: number and weight of each, from left to right."""

    output: str
    picture: Floats
    contributions: Floats
    attention: Floats | None
    views: tuple[tuple[int, float], ...] = ()

    def lines(self) -> Iterator[Line]:
        for view, weight in self.views:
            yield Line("attention", f"view {view}", "", "", weight)
        height, width = self.picture.shape
        for top, bottom in _parts(height):
            for left, right in _parts(width):
                field = (slice(top, bottom), slice(left, right))
                where, value = (
                    f"rows {top}-{bottom - 1}, columns {left}-{right - 1}",
                    f"{self.picture[field].mean():.3f}",
                )
                yield Line("integrated gradients", "field", where, value, float(self.contributions[field].sum()))
                if self.attention is not None:
                    yield Line("Grad-CAM", "field", where, value, float(self.attention[field].mean()))


@dataclass(frozen=True, slots=True, eq=False)
class TextReasons:
    """``words`` as the model was given them (of bytes: characters), and their ``contributions``; ``joined``: by nothing, or
    by blanks."""

    output: str
    words: tuple[str, ...]
    contributions: Floats
    joined: str

    def lines(self) -> Iterator[Line]:
        for place, (word, each) in enumerate(zip(self.words, self.contributions, strict=True)):
            yield Line("integrated gradients", word, f"place {place + 1}", "", float(each))


Reasons = TableReasons | SeriesReasons | ImageReasons | TextReasons


def _parts(size: int) -> Iterator[tuple[int, int]]:
    edges = np.linspace(0, size, FIELDS + 1).round().astype(int).tolist()
    return itertools.pairwise(edges)
