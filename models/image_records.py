"""Grey images -> float32[n, 1, height, width], or several views of a record, by the study's contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import Image
from medfed.models.cells import MISSING, fault

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


def encode_images(contract: Image, images: Iterable[Pixels], rows: Sequence[int]) -> NDArray[np.float32]:
    """``(value - center) / scale`` with 0 black and 1 white; ``images`` (uint8 or uint16[any, any]) are taken one by one.

    Raises: ``DataError`` MF-301 for what is no grey image, or not of the contract's size where that is not to be changed.

    *Guarantees*: areas are averaged in whole numbers, so an image's encoding is the same on every machine.
    """
    encoded = np.empty((len(rows), 1, contract.height, contract.width), np.float32)
    for index, (row, pixels) in enumerate(zip(rows, images, strict=True)):
        encoded[index, 0] = _encoded(contract, pixels, row)
    return encoded


def encode_views(
    contract: Image, cells: Sequence[str], images: Iterable[Pixels], rows: Sequence[int]
) -> NDArray[np.float32]:
    """float32[n, views + 1, height, width] as ``Image.shape`` says; ``images`` are all that ``cells`` name, one after the other.

    Raises: as ``encode_images``.
    """
    most = contract.views or 1
    encoded = np.zeros((len(rows), most + 1, contract.height, contract.width), np.float32)
    pixels = iter(images)
    for index, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        present = encoded[index, most].reshape(-1)
        for view, name in enumerate(view_names(contract, cell, row)):
            if name:
                encoded[index, view], present[view] = _encoded(contract, next(pixels), row), 1.0
    return encoded


def view_names(contract: Image, cell: str, row: int) -> list[str]:
    """The files that a cell names, "" for a view that is absent. Raises ``DataError`` MF-301 for none or too many."""
    names = [name.strip() for name in cell.split(";")]
    names = ["" if name in MISSING else name for name in names]
    if not any(names):
        raise fault(row, contract.column, "names no image", "drop rows without an image")
    if contract.views is not None and len(names) > contract.views:
        raise fault(row, contract.column, f"names more than {contract.views} images", "name the study's views only")
    return names


def _encoded(contract: Image, pixels: Pixels, row: int) -> NDArray[np.float64]:
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16) or not pixels.size:
        raise fault(row, contract.column, "is no grey image of 8 or 16 bits", "export grey images")
    white = int(np.iinfo(pixels.dtype).max)
    values = pixels.astype(np.int64)
    if pixels.shape != (contract.height, contract.width):
        if contract.resize == "refuse":
            what = f"is an image of another size than {contract.height} x {contract.width} pixels"
            raise fault(row, contract.column, what, "bring it to that height and width")
        values = _area_sums(_area_sums(values, contract.height).T, contract.width).T
        white *= pixels.size
    return np.asarray((values / white - contract.center) / contract.scale)


def _area_sums(values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """int64[size, b] from int64[a, b]: row i sums what lies from i * a / size to (i + 1) * a / size, times ``size``.

    Exact: a whole image of 16 bits stays below 2**63 as long as it has at most 2**25 pixels and ``size`` is at most 2**10.
    """
    rows = values.shape[0]
    before = np.zeros((rows + 1, values.shape[1]), np.int64)
    np.cumsum(values, axis=0, out=before[1:])
    whole, part = np.divmod(np.arange(size + 1) * rows, size)
    edges = size * before[whole] + part[:, None] * values[np.minimum(whole, rows - 1)]  # part is 0 at the last edge
    return np.asarray(np.diff(edges, axis=0))
