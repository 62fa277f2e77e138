"""Shifted, flipped, turned, enlarged and brightened copies of encoded images: float32[n, planes, h, w], all planes changed alike.

Copies of a patient's record count as records of that patient, so that their gradients are averaged before the clip (De et al.
2022, arXiv:2204.13650, section 3.2): more of them give no patient a larger share of a sum. A volume is changed within its slices,
a record of several views in all views alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medfed.study import Augmentation

Floats = NDArray[np.float64]
Words = Callable[[int], NDArray[np.uint64]]
"""How many -> so many secret uniform words of 64 bits."""


def augmented(augmentation: Augmentation, images: NDArray[np.float32], words: Words) -> NDArray[np.float32]:
    """float32[n * copies, planes, h, w], the copies of an image one after the other, the first of them as it is.

    *Guarantees*: a copy is a function of its image and of its own draws alone, to the last bit.
    """
    copies = augmentation.copies
    out = np.repeat(images, copies, axis=0)
    draws = _uniform(words, (len(images), copies, _DRAWS))
    for place, image in enumerate(images):
        for copy in range(1, copies):
            out[place * copies + copy] = _changed(augmentation, image, draws[place, copy].tolist())
    return out


_DRAWS = 8


def _uniform(words: Words, shape: tuple[int, ...]) -> Floats:
    """-1 to 1."""
    drawn = words(math.prod(shape)) >> np.uint64(11)
    return (drawn.astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)


def _changed(augmentation: Augmentation, image: NDArray[np.float32], draws: list[float]) -> Floats:
    """``draws``: 8 numbers from -1 to 1."""
    down, across, turn, zoom, bright, contrast, flip, quarter = draws
    changed = image.astype(np.float64)
    if augmentation.flip and flip < 0:
        changed = changed[:, :, ::-1]
    if augmentation.quarter_turns:
        changed = np.rot90(changed, int((quarter + 1.0) * 2.0) % 4, axes=(1, 2))
    angle = math.radians(augmentation.turn_degrees * turn)
    size = 1.0 - augmentation.crop * (zoom + 1.0) / 2.0
    if augmentation.shift or angle or size != 1.0:
        changed = _moved(changed, augmentation.shift * down, augmentation.shift * across, angle, size)
    return changed * (1.0 + augmentation.contrast * contrast) + augmentation.brightness * bright


def _moved(image: Floats, down: float, across: float, angle: float, size: float) -> Floats:
    """What lies round the middle, ``down`` and ``across`` pixels away, ``size`` times as large and turned by ``angle``, fills the
    image; between pixels linearly, beyond the edge as at the edge."""
    _, height, width = image.shape
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    rows, columns = rows - (height - 1) / 2, columns - (width - 1) / 2
    cosine, sine = size * math.cos(angle), size * math.sin(angle)
    above = np.clip(cosine * rows - sine * columns + down + (height - 1) / 2, 0.0, height - 1)
    left = np.clip(sine * rows + cosine * columns + across + (width - 1) / 2, 0.0, width - 1)
    row, column = np.minimum(above.astype(np.int64), height - 2), np.minimum(left.astype(np.int64), width - 2)
    lower, right = above - row, left - column
    top = image[:, row, column] * (1.0 - right) + image[:, row, column + 1] * right
    bottom = image[:, row + 1, column] * (1.0 - right) + image[:, row + 1, column + 1] * right
    return np.asarray(top * (1.0 - lower) + bottom * lower)
