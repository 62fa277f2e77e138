"""Volumes -> float32[n, 1, depth, height, width], by the study's contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.models.cells import fault
from medfed.volume_part import Volume

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """``values``: numbers [depth, height, width] from foot to head, back to front, left to right; ``slope`` times these and
    ``intercept`` more is what the scanner measured."""

    values: NDArray[np.generic]
    slope: float = 1.0
    intercept: float = 0.0


def encode_volumes(contract: Volume, scans: Iterable[Scan], rows: Sequence[int]) -> NDArray[np.float32]:
    """``scans`` are taken one by one. Raises: ``DataError`` MF-301 for a value that is no finite number, or another size where
    that is not to be changed.

    *Guarantees*: sums run in one order, so a scan's encoding is the same on every machine.
    """
    encoded = np.empty((len(rows), *contract.shape), np.float32)
    for index, (row, scan) in enumerate(zip(rows, scans, strict=True)):
        encoded[index, 0] = _encoded(contract, scan, row)
    return encoded


def _encoded(contract: Volume, scan: Scan, row: int) -> Floats:
    size, wanted = scan.values.shape, contract.shape[1:]
    if size != wanted and contract.resize == "refuse":
        what = f"is a volume of another size than {' x '.join(map(str, wanted))} voxels"
        raise fault(row, contract.column, what, "bring it to that depth, height and width")
    slices = np.empty((size[0], *wanted[1:]))
    for place in range(size[0]):  # slice by slice: a whole scan in float64 may be gigabytes
        shares = _share(contract, scan, scan.values[place], row)
        slices[place] = shares if size[1:] == wanted[1:] else _area_means(_area_means(shares, wanted[1]).T, wanted[2]).T
    if size[0] != wanted[0]:
        slices = _area_means(slices.reshape(size[0], -1), wanted[0]).reshape(wanted)
    return (slices - contract.center) / contract.scale


def _share(contract: Volume, scan: Scan, values: NDArray[np.generic], row: int) -> Floats:
    """Where in the window each value lies: float64, 0 to 1."""
    with np.errstate(over="ignore", invalid="ignore"):
        measured = values.astype(np.float64) * scan.slope + scan.intercept
    if not np.isfinite(measured).all():
        raise fault(row, contract.column, "holds voxels that are no finite number", "export it without them")
    return (np.clip(measured, contract.lower, contract.upper) - contract.lower) / (contract.upper - contract.lower)


def _area_means(values: Floats, size: int) -> Floats:
    """float64[size, b] from float64[a, b]: row i is the mean of what lies from i * a / size to (i + 1) * a / size."""
    rows = values.shape[0]
    before = np.zeros((rows + 1, values.shape[1]))
    np.cumsum(values, axis=0, out=before[1:])
    whole, part = np.divmod(np.arange(size + 1) * rows, size)
    edges = before[whole] + (part / size)[:, None] * values[np.minimum(whole, rows - 1)]  # part is 0 at the last edge
    return np.asarray(np.diff(edges, axis=0) * (size / rows))
