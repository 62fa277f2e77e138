"""Invented patients with several parts each: a row, vital signs, a picture, a note and expression values, some parts missing.

Each part tells a little of the outcome, none tells all. They say nothing about medicine.
"""

from __future__ import annotations

import numpy as np

from medfed.simulations.extract import PATIENT_COLUMN, Extract, SeriesRows

Generator = np.random.Generator

GENES = 1000
_TELLING = 25  # genes that differ
PIXELS = 16
STEPS = 12
SIGNS = ("heart_rate", "lactate")
_LACKING = 0.2  # chance of each part but the row and the note to be absent
_BAD = ("short of breath", "confused", "swollen legs", "grey and clammy")
_GOOD = ("walks the dog", "eats well", "sleeps well", "no complaints")
_COMMON = ("seen today", "lives alone", "pressure normal", "here with family", "no known allergies")


def parts(generator: Generator, prefix: str, count: int) -> Extract:
    """Column ``worse`` is what a model is to tell; an empty cell, or no row of the series, where a part is missing."""
    worse = generator.integers(0, 2, count)
    names = tuple(f"{prefix}-{row:05d}" for row in range(count))
    there = generator.random((count, 3)) >= _LACKING
    columns = {
        PATIENT_COLUMN: names,
        "age": tuple(f"{value:.0f}" for value in np.clip(generator.normal(60 + 5 * worse, 13), 18, 100).tolist()),
        "film": tuple(f"{name}.png" if is_there else "" for name, is_there in zip(names, there[:, 0], strict=True)),
        "note": tuple(_note(generator, bool(value)) for value in worse),
        "worse": tuple(str(value) for value in worse.tolist()),
    }
    columns |= _genes(generator, worse, there[:, 2])
    return Extract(columns, _films(generator, worse), "film", _signs(generator, worse, there[:, 1]))


def _films(generator: Generator, worse: np.ndarray) -> np.ndarray:
    """uint8[n, PIXELS, PIXELS]: noise, and a shadow in one corner of many who are worse."""
    films = generator.normal(90.0, 25.0, (len(worse), PIXELS, PIXELS))
    has_shadow = generator.random(len(worse)) < np.where(worse == 1, 0.75, 0.25)
    films[has_shadow, -7:-1, 1:7] += 60.0
    return np.clip(films, 0, 255).astype(np.uint8)


def _signs(generator: Generator, worse: np.ndarray, is_there: np.ndarray) -> SeriesRows:
    """Two signs an hour, rising with time in those who are worse."""
    rise = (
        np.linspace(0.0, 1.0, STEPS)[None, :, None] * (worse * generator.uniform(0.0, 2.0, len(worse)))[:, None, None]
    )
    values = np.array([80.0, 1.5]) + np.array([12.0, 0.6]) * (generator.normal(size=(len(worse), STEPS, 2)) + rise)
    values[generator.random(values.shape) < 0.3] = np.nan
    values[~is_there] = np.nan
    owner, hour = np.nonzero(~np.isnan(values).all(2))
    rounded = np.round(np.maximum(values, 0.1), 1).astype(np.float32)
    return SeriesRows(owner, hour.astype(np.float64), rounded[owner, hour], SIGNS)


def _genes(generator: Generator, worse: np.ndarray, is_there: np.ndarray) -> dict[str, tuple[str, ...]]:
    """Expression values of which a few differ a little."""
    values = generator.normal(size=(len(worse), GENES))
    values[:, :_TELLING] += 0.5 * (worse[:, None] - 0.5)
    cells = np.char.mod("%.2f", values)
    cells[~is_there] = ""
    return {f"gene_{place + 1}": tuple(cells[:, place].tolist()) for place in range(GENES)}


def _note(generator: Generator, is_worse: bool) -> str:
    own, other = (_BAD, _GOOD) if is_worse else (_GOOD, _BAD)
    said = [
        _pick(generator, own if generator.random() < 0.7 else other),
        *(_pick(generator, _COMMON) for _ in range(3)),
    ]
    return f"{', '.join(said[place] for place in generator.permutation(len(said)))}."


def _pick(generator: Generator, texts: tuple[str, ...]) -> str:
    return texts[int(generator.integers(len(texts)))]
