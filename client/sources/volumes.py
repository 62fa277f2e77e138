"""NIfTI files of a folder -> volumes. Errors name the row and column that name a file, never the file.

A file is unpacked up to a bound, and of it only the header's shape, type, scaling and orientation and the voxels are read: no
description, no extension, nothing that could tell who was scanned. nibabel reads the header.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medfed.client.sources.images import read_named
from medfed.errors import ConfigError, DataError
from medfed.models.volume_records import Scan
from medfed.seams import Files

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

LIMIT_BYTES = 1 << 29
MOST_VOXELS = 1 << 27
_MOST_UNPACKED = 1 << 30
_GZIP = b"\x1f\x8b"
_FIRST, _SECOND = 348, 540  # bytes of a header of NIfTI-1 and 2, as its first number says


def read_volumes(files: Files, folder: Path, names: Sequence[str], rows: Sequence[int], column: str) -> Iterator[Scan]:
    """Of each of ``names``, read when it is asked for: its voxels, turned to run from foot to head, back to front, left to right.

    Raises: as ``read_images``, with ``DataError`` 301 for what is no NIfTI file of one volume of real numbers, is damaged or too
    large; ``ConfigError`` 320 without nibabel.
    """
    _require_nibabel()
    for row, name in zip(rows, names, strict=True):
        place = f"row {row}, column {column}"
        yield _scan(_unpacked(read_named(files, folder, name, place, LIMIT_BYTES), place), place)


def _require_nibabel() -> None:
    try:
        import nibabel  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            320, "nibabel is not installed, which reads volumes", "pip install 'medfed[nifti]'"
        ) from error


def _fault(place: str, reason: str) -> DataError:
    return DataError(301, f"{place}: its file {reason}", "export it as NIfTI (.nii or .nii.gz), one volume a file")


def _unpacked(data: bytes, place: str) -> bytes:
    """Of a gzip file its content, as far as a volume may be large: a bomb is not unpacked."""
    if not data.startswith(_GZIP):
        return data
    packed = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        content = packed.decompress(data, _MOST_UNPACKED)
    except zlib.error:
        raise _fault(place, "is damaged") from None
    if not packed.eof:
        raise _fault(place, "is cut off, or unpacks to too much")
    return content


def _scan(data: bytes, place: str) -> Scan:
    header = _header(data, place)
    shape = tuple(int(size) for size in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise _fault(place, "holds no volume, or several")
    kind, voxels = header.get_data_dtype(), math.prod(shape)
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise _fault(place, "does not hold real numbers")
    if voxels > MOST_VOXELS:
        raise _fault(place, f"has more than {MOST_VOXELS} voxels")
    start = int(header["vox_offset"])
    if start < header.sizeof_hdr or start + voxels * kind.itemsize > len(data):
        raise _fault(place, "is cut off")
    values = np.frombuffer(data, kind, voxels, start).reshape(shape, order="F")
    return _upright(values, header, place)


def _header(data: bytes, place: str) -> Nifti1Header:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header
    from nibabel.spatialimages import HeaderDataError

    sizes = {int.from_bytes(data[:4], order) for order in ("little", "big")}
    kind = Nifti2Header if _SECOND in sizes else Nifti1Header
    at = 4 if _SECOND in sizes else _FIRST - 4
    if not sizes & {_FIRST, _SECOND} or len(data) < kind.sizeof_hdr or not data.startswith(kind.single_magic, at):
        raise _fault(place, "is no NIfTI file of one piece")
    try:
        header = kind(data[: kind.sizeof_hdr], check=False)
        header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
    except (HeaderDataError, KeyError, ValueError, OverflowError, TypeError):
        raise _fault(place, "has a damaged header") from None
    return header


def _upright(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], header: Nifti1Header, place: str) -> Scan:
    """Turned and mirrored, by the nearest right angles, to run from left to right, back to front, foot to head; then reversed."""
    from nibabel.orientations import apply_orientation, io_orientation
    from nibabel.spatialimages import HeaderDataError

    try:
        with np.errstate(all="ignore"):
            orientation = io_orientation(header.get_best_affine())
            slope, intercept = header.get_slope_inter()
        if np.isnan(orientation).any():
            raise _fault(place, "does not say how it lies")
        upright = apply_orientation(values, orientation)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        raise _fault(place, "has a damaged header") from None
    return Scan(upright.transpose(2, 1, 0), 1.0 if slope is None else float(slope), float(intercept or 0.0))
