"""Invented pictures and volumes of patients who do not exist: several views of one, small volumes with a nodule and without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.simulations.extract import NIFTI, PATIENT_COLUMN, Extract

Generator = np.random.Generator
Floats = NDArray[np.float64]

VIEWS = 4
VIEW_PIXELS = 24
VOLUME = (16, 24, 24)  # voxels: depth, height, width
SCAN = (16, 48, 48)
PATCH = (12, 12, 12)
PATCHES = 4  # records of a patient
_TISSUE, _GRAIN = -800.0, 60.0  # as the lung in Hounsfield units
_ABSENT = 0.15
_VESSELS = 4


def views(generator: Generator, prefix: str, count: int) -> Extract:
    """Up to four small pictures a patient, some absent; a lesion is a soft disc in one of them, and any may have a bright bar."""
    lesion = generator.integers(0, 2, count)
    there = generator.random((count, VIEWS)) >= _ABSENT
    there[np.arange(count), generator.integers(0, VIEWS, count)] = True
    where = np.array([generator.choice(np.flatnonzero(row)) for row in there])
    down, across = np.mgrid[0:VIEW_PIXELS, 0:VIEW_PIXELS].astype(np.float32)
    shape = (count, VIEWS, 1, 1)
    films = generator.normal(80.0, 15.0, (count, VIEWS, VIEW_PIXELS, VIEW_PIXELS)).astype(np.float32)
    row, column = generator.uniform(5.0, VIEW_PIXELS - 5.0, (2, *shape))
    radius = generator.uniform(3.0, 4.5, shape)
    disc = 80.0 / (1.0 + np.exp(2.0 * (np.hypot(down - row, across - column) - radius)))
    bar = 60.0 / (1.0 + np.exp(2.0 * (np.abs(down - row) - 1.0)))
    is_lesion = (lesion[:, None] == 1) & (np.arange(VIEWS) == where[:, None])
    has_bar = ~is_lesion & (generator.random((count, VIEWS)) < 0.3)
    films += disc * is_lesion[..., None, None] + bar * has_bar[..., None, None]
    names = ids(prefix, count)
    columns = {
        PATIENT_COLUMN: names,
        "films": tuple(_cell(name, row) for name, row in zip(names, there.tolist(), strict=True)),
        "lesion": tuple(str(value) for value in lesion.tolist()),
    }
    return Extract(columns, np.clip(films, 0.0, 255.0).astype(np.uint8), "films")


def _cell(name: str, there: list[bool]) -> str:
    return ";".join(f"{name}-{view}.png" if present else "" for view, present in enumerate(there))


def volumes(generator: Generator, prefix: str, count: int) -> Extract:
    """Small volumes of vessels through tissue, in half of them a nodule: a ball, as bright as a vessel and a little wider."""
    nodule = generator.integers(0, 2, count)
    scans = [invented_scan(generator, VOLUME, int(value)).values for value in nodule]
    names = ids(prefix, count)
    columns = {
        PATIENT_COLUMN: names,
        "scan": tuple(f"{name}{NIFTI}" for name in names),
        "nodule": tuple(str(value) for value in nodule.tolist()),
    }
    return Extract(columns, np.stack(scans), "scan")


def patches(generator: Generator, prefix: str, count: int) -> Extract:
    """Cubes cut out of a larger scan of each patient, ``PATCHES`` a patient, all records of theirs: half of them hold a nodule,
    near the middle; the others lie on a vessel or anywhere else."""
    cubes, labels = [], []
    for _ in range(count):
        scan = invented_scan(generator, SCAN, 2)
        for place in range(PATCHES):
            label = place % 2
            cubes.append(cut(scan.values, _center(generator, scan, label), PATCH))
            labels.append(label)
    owners = [name for name in ids(prefix, count) for _ in range(PATCHES)]
    columns = {
        PATIENT_COLUMN: tuple(owners),
        "patch": tuple(f"{name}-{place % PATCHES}{NIFTI}" for place, name in enumerate(owners)),
        "nodule": tuple(map(str, labels)),
    }
    return Extract(columns, np.stack(cubes), "patch")


def ids(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}-{row:05d}" for row in range(count))


@dataclass(frozen=True, slots=True, eq=False)
class InventedScan:
    """``values``: int16[depth, height, width]; ``nodules``: float64[k, 3], middles in voxels; ``vessels``: a point on each."""

    values: NDArray[np.int16]
    nodules: Floats
    vessels: Floats


def invented_scan(generator: Generator, shape: tuple[int, int, int], nodules: int) -> InventedScan:
    """Nodules lie at least a patch's half from the border where the volume is larger than a patch."""
    grid = np.stack(np.meshgrid(*(np.arange(size, dtype=np.float64) for size in shape), indexing="ij"), axis=-1)
    size = np.array(shape, np.float64)
    inside = np.zeros(shape)
    points = generator.uniform(0.0, 1.0, (_VESSELS, 3)) * (size - 1.0)
    for point in points:
        along = generator.normal(size=3)
        along /= np.linalg.norm(along)
        away = grid - point
        distance = np.linalg.norm(away - (away @ along)[..., None] * along, axis=-1)
        inside = np.maximum(inside, _soft(distance, generator.uniform(1.0, 1.6)))
    margin = np.minimum(4.0, (size - 1.0) / 3.0)
    middles = margin + generator.uniform(0.0, 1.0, (nodules, 3)) * (size - 1.0 - 2.0 * margin)
    for middle in middles:
        inside = np.maximum(inside, _soft(np.linalg.norm(grid - middle, axis=-1), generator.uniform(2.4, 3.6)))
    values = _TISSUE + 820.0 * inside + generator.normal(0.0, _GRAIN, shape)
    return InventedScan(np.round(values).astype(np.int16), middles, points)


def _soft(distance: Floats, radius: float) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(np.minimum(3.0 * (distance - radius), 60.0))))


def _center(generator: Generator, scan: InventedScan, label: int) -> Floats:
    """Of a patch: near a nodule, or away from all of them, half the time near a vessel."""
    if label:
        return np.asarray(scan.nodules[generator.integers(len(scan.nodules))] + generator.uniform(-1.5, 1.5, 3))
    size = np.array(scan.values.shape, np.float64)
    while True:
        on_vessel = generator.random() < 0.5
        found = (
            scan.vessels[generator.integers(len(scan.vessels))] if on_vessel else generator.uniform(0.0, 1.0, 3) * size
        )
        found = np.clip(found + generator.uniform(-2.0, 2.0, 3), 0.0, size - 1.0)
        if np.linalg.norm(scan.nodules - found, axis=1).min() > 6.0:
            return np.asarray(found)


def cut(values: NDArray[np.int16], center: Floats, size: tuple[int, int, int]) -> NDArray[np.int16]:
    """The box of ``size`` voxels round ``center``, moved inside where it would stick out."""
    low = [
        int(np.clip(round(middle - side / 2), 0, whole - side))
        for middle, side, whole in zip(center.tolist(), size, values.shape, strict=True)
    ]
    return values[tuple(slice(start, start + side) for start, side in zip(low, size, strict=True))]
