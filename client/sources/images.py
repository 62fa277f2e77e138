"""Grey PNG files of a folder -> pixels. Errors name the row and column that name a file, never the file.

A picture is taken apart before it is decoded: size, depth and colour from its header, checksums of all parts, and only the
parts that make a still picture reach the decoder. No text, profile, second frame or trailing data is ever looked at.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from medfed.errors import ConfigError, DataError, EnvironmentFault
from medfed.models.cells import MISSING
from medfed.models.image_records import Pixels
from medfed.seams import Files

LIMIT_BYTES = 1 << 26
MOST_PIXELS = 1 << 25
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">IIBBBBB")
_GREY = 0


def read_images(files: Files, folder: Path, names: Sequence[str], rows: Sequence[int], column: str) -> Iterator[Pixels]:
    """uint8 or uint16[height, width] of each of ``names``, read when it is asked for.

    Raises: ``DataError`` 301 (no name; no PNG, not grey with 8 or 16 bits, animated, too many pixels, damaged), 204 (a
    name that leads out of ``folder``), ``EnvironmentFault`` 606-609 (not there, not readable, over 64 MiB), ``ConfigError``
    320 without Pillow.
    """
    _require_pillow()
    for row, name in zip(rows, names, strict=True):
        place = f"row {row}, column {column}"
        yield _decode(_still_picture(read_named(files, folder, name, place, LIMIT_BYTES), place), place)


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "Pillow is not installed, which reads images", "pip install 'medfed[images]'") from error


def read_named(files: Files, folder: Path, name: str, place: str, limit_bytes: int) -> bytes:
    """The file of a cell, which is named as ``place`` in errors; ``Raises`` as ``read_images``."""
    root = folder.resolve()
    if name in MISSING:
        raise DataError(301, f"{place}: no image is named", "drop rows without an image")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise _outside(place)
    try:
        path = (root / parts).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL
        raise _outside(place) from None
    if not path.is_relative_to(root):
        raise _outside(place)
    try:
        return files.read(path, limit_bytes=limit_bytes)
    except EnvironmentFault as error:  # its own words name the file, which may hold a patient's name
        what, remedy = _FILE_FAULTS.get(error.code, ("its file cannot be read", "check the volume"))
        if error.code == 609:
            what = f"its file is larger than {limit_bytes} bytes"
        raise EnvironmentFault(error.code, f"{place}: {what}", remedy) from None


_FILE_FAULTS = {
    204: ("what it names is no regular file", "name a plain file"),
    606: ("its file is not in the folder of images", "add the file or drop the row"),
    607: ("no permission for its file", "check owner and mode"),
    609: ("its file is too large", "export a smaller image"),
}


def _outside(place: str) -> DataError:
    return DataError(204, f"{place}: its file lies outside the folder of images", "name a file inside it")


def _fault(place: str, reason: str) -> DataError:
    return DataError(301, f"{place}: its file {reason}", "export it as a grey PNG of 8 or 16 bits")


def _still_picture(data: bytes, place: str) -> bytes:
    """The parts of a PNG file that make a grey still picture of a bounded size (PNG specification, third edition)."""
    if not data.startswith(_SIGNATURE):
        raise _fault(place, "is no PNG")
    kept, pixels, size = [_SIGNATURE], zlib.decompressobj(), 0
    for kind, chunk in _chunks(data, place):
        if len(kept) == 1:
            size = _unpacked_bytes(kind, chunk[8:-4], place)
        elif kind == b"acTL":
            raise _fault(place, "is animated")
        elif kind == b"IDAT":
            size -= _inflate(pixels, chunk[8:-4], size, place)
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(chunk)
    if size:  # the decoder would make the missing rows black
        raise _fault(place, "is cut off")
    return b"".join(kept)


def _inflate(pixels: zlib._Decompress, content: bytes, most: int, place: str) -> int:
    """Number of bytes that this part of the pixels unpacks to, at most ``most``: a bomb is not unpacked."""
    try:
        return len(pixels.decompress(content, most)) if most else 0
    except zlib.error:
        raise _fault(place, "is damaged") from None


def _chunks(data: bytes, place: str) -> Iterator[tuple[bytes, bytes]]:
    """Kind and whole bytes (length, kind, content, checksum) of each chunk up to the end of the picture."""
    position, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        head = data[position : position + 8]
        end = position + 12 + int.from_bytes(head[:4], "big")
        if len(head) < 8 or end > len(data):
            raise _fault(place, "is cut off")
        kind = head[4:]
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise _fault(place, "is damaged")
        yield kind, data[position:end]
        position = end


def _unpacked_bytes(kind: bytes, content: bytes, place: str) -> int:
    """What the pixels behind a header unpack to: each row's, and the number of its filter before them."""
    if kind != b"IHDR" or len(content) != _HEADER.size:
        raise _fault(place, "is damaged")
    width, height, bits, colour, _, _, interlace = _HEADER.unpack(content)
    if colour != _GREY:
        raise _fault(place, "is not grey: it has colours, a palette or an alpha channel")
    if bits not in (8, 16):
        raise _fault(place, "has neither 8 nor 16 bits a pixel")
    if not 0 < width * height <= MOST_PIXELS:
        raise _fault(place, f"has no pixels, or more than {MOST_PIXELS}")
    if interlace:
        raise _fault(place, "is interlaced")
    return int(height * (1 + width * bits // 8))


def _decode(data: bytes, place: str) -> Pixels:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            picture.load()
            pixels = np.asarray(picture)
    except (OSError, SyntaxError, ValueError):
        raise _fault(place, "is damaged") from None
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)
