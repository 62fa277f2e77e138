"""A folder of grey PNG files: read as they are; faults name row and column, never a file or what it shows."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from medfed.client.sources import images
from medfed.client.sources.images import MOST_PIXELS, read_images
from medfed.errors import MedfedError
from medfed.models.image_records import Pixels
from medfed.seams import SystemFiles

SECRET = "Erika-Mustermann"
GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
DEEP = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000


def read(folder: Path, *names: str) -> list[Pixels]:
    return list(read_images(SystemFiles(), folder, names, range(2, 2 + len(names)), "film"))


def png(pixels: object = GREY, **options: object) -> bytes:
    out = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(out, "PNG", **options)
    return out.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(width: int = 4, height: int = 3, bits: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))


END = chunk(b"IEND", b"")
ROWS = zlib.compress(b"".join(b"\0" + row.tobytes() for row in GREY))


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "inner" / f"{SECRET} #1.PNG").write_bytes(png(DEEP))
    (tmp_path / "made.png").write_bytes(header() + chunk(b"IDAT", ROWS[:5]) + chunk(b"IDAT", ROWS[5:]) + END)
    grey, deep, made = read(tmp_path, "a.png", f"inner/{SECRET} #1.PNG", "made.png")
    assert grey.dtype == np.uint8 and np.array_equal(grey, GREY)
    assert deep.dtype == np.uint16 and np.array_equal(deep, DEEP)
    assert np.array_equal(made, GREY)


def test_nothing_but_the_picture_is_looked_at(tmp_path: Path) -> None:
    """Text that unpacks to megabytes, a profile, a wrong gamma and trailing bytes change nothing."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", SECRET * 200_000, zip=True)
    text.add(b"gAMA", struct.pack(">I", 1))
    text.add(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 20)))
    (tmp_path / "a.png").write_bytes(png(pnginfo=text) + b"#!/bin/sh\n")
    assert np.array_equal(read(tmp_path, "a.png")[0], GREY)


def test_folder_and_files_inside_it_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(png())
    (tmp_path / "real" / "b.png").symlink_to("a.png")
    (tmp_path / "films").symlink_to("real")
    assert np.array_equal(read(tmp_path / "films", "b.png")[0], GREY)


def test_files_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    reading = read_images(SystemFiles(), tmp_path, ["a.png", "none.png"], [2, 3], "film")
    assert np.array_equal(next(reading), GREY)
    with pytest.raises(MedfedError, match="row 3"):
        next(reading)


# --------------------------------------------------------------------------------------------------------- bad inputs


def _palette() -> bytes:
    return png(Image.fromarray(GREY).convert("P"))


def _animated() -> bytes:
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    return png(frames[0], save_all=True, append_images=frames[1:])


BAD: dict[str, tuple[bytes | Callable[[], bytes], int, str]] = {
    "empty": (b"", 301, "is no PNG"),
    "one byte": (b"\x89", 301, "is no PNG"),
    "text": (SECRET.encode() * 9, 301, "is no PNG"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(99), 301, "is no PNG"),
    "DICOM": (bytes(128) + b"DICM" + bytes(99), 301, "is no PNG"),
    "signature alone": (b"\x89PNG\r\n\x1a\n", 301, "is cut off"),
    "no header": (b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", ROWS) + END, 301, "is damaged"),
    "short header": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(12)) + END, 301, "is damaged"),
    "colour": (lambda: png(Image.new("RGB", (4, 3))), 301, "is not grey"),
    "alpha": (lambda: png(Image.new("RGBA", (4, 3))), 301, "is not grey"),
    "grey with alpha": (lambda: png(Image.new("LA", (4, 3))), 301, "is not grey"),
    "palette": (_palette, 301, "is not grey"),
    "one bit": (lambda: png(Image.new("1", (4, 3))), 301, "neither 8 nor 16 bits"),
    "four bits": (lambda: png(Image.new("L", (4, 3)), bits=4), 301, "neither 8 nor 16 bits"),
    "animated": (_animated, 301, "is animated"),
    "no width": (header(0, 3) + END, 301, "has no pixels"),
    "no height": (header(4, 0) + END, 301, "has no pixels"),
    "bomb": (header(65535, 65535) + chunk(b"IDAT", ROWS) + END, 301, "more than"),
    "one pixel too many": (header(MOST_PIXELS + 1, 1) + chunk(b"IDAT", ROWS) + END, 301, "more than"),
    "widest number": (header(2**32 - 1, 2**32 - 1) + END, 301, "more than"),
    "half": (lambda: png()[: len(png()) // 2], 301, "is cut off"),
    "without its end": (lambda: png()[:-12], 301, "is cut off"),
    "no picture": (header() + END, 301, "is cut off"),
    "too few rows": (header() + chunk(b"IDAT", zlib.compress(b"\0abcd")) + END, 301, "is cut off"),
    "no deflate": (header() + chunk(b"IDAT", b"abcdefgh") + END, 301, "is damaged"),
    "unknown filter": (header() + chunk(b"IDAT", zlib.compress(b"\x09abcd" * 3)) + END, 301, "is damaged"),
    "interlaced": (header(interlace=1) + chunk(b"IDAT", ROWS) + END, 301, "is interlaced"),
    "flipped bit": (lambda: png()[:45] + bytes([png()[45] ^ 4]) + png()[46:], 301, "is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_by_row_and_column(tmp_path: Path, case: str) -> None:
    data, code, reason = BAD[case]
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / f"{SECRET}.png").write_bytes(data if isinstance(data, bytes) else data())
    refused(tmp_path, f"{SECRET}.png", code, reason)


def refused(folder: Path, name: str, code: int, reason: str) -> None:
    with pytest.raises(MedfedError) as caught:
        read(folder, "a.png", name)
    line = str(caught.value)
    assert caught.value.code == code
    assert line.startswith(f"MF-{code} row 3, column film: ") and reason in line
    assert "\n" not in line and SECRET not in line and "Mustermann" not in line
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ is not None
    assert str(folder) not in line


NAMES: dict[str, tuple[str, int, str]] = {
    "no name": ("", 301, "no image is named"),
    "missing": ("NA", 301, "no image is named"),
    "parent": (f"../{SECRET}.png", 204, "outside the folder"),
    "parent inside": (f"inner/../{SECRET}.png", 204, "outside the folder"),
    "absolute": (f"/tmp/{SECRET}.png", 204, "outside the folder"),
    "link out": ("link.png", 204, "outside the folder"),
    "link to a folder outside": ("out/a.png", 204, "outside the folder"),
    "loop of links": ("loop.png", 204, ""),
    "not there": (f"{SECRET}.png", 606, "not in the folder of images"),
    "folder": ("inner", 204, "no regular file"),
    "the folder itself": (".", 204, "no regular file"),
    "pipe": ("pipe", 204, "no regular file"),
    "file as a folder": (f"a.png/{SECRET}", 608, "cannot be read"),
    "very long": (SECRET * 300, 608, "cannot be read"),
    "NUL": (f"a\0{SECRET}", 204, "outside the folder"),
}


@pytest.mark.parametrize("case", NAMES)
def test_name_that_leads_nowhere_or_out_of_the_folder_is_refused(tmp_path: Path, case: str) -> None:
    import os

    films = tmp_path / "films"
    (films / "inner").mkdir(parents=True)
    for place in (films, tmp_path):
        (place / "a.png").write_bytes(png())
    (tmp_path / f"{SECRET}.png").write_bytes(png())
    (films / "link.png").symlink_to(tmp_path / f"{SECRET}.png")
    (films / "out").symlink_to(tmp_path)
    (films / "loop.png").symlink_to("loop.png")
    os.mkfifo(films / "pipe")
    name, code, reason = NAMES[case]
    if case == "loop of links":  # Python's versions differ in who notices
        with pytest.raises(MedfedError, match="row 3, column film") as caught:
            read(films, "a.png", name)
        assert caught.value.code in (204, 608)
        return
    refused(films, name, code, reason)


def test_file_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LIMIT_BYTES", 100)
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / f"{SECRET}.png").write_bytes(png() + bytes(100))
    refused(tmp_path, f"{SECRET}.png", 609, "larger than")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(noise=st.binary(max_size=8), place=st.integers(0, 75), cut=st.integers(0, 8), mend=st.booleans())
def test_any_bytes_give_pixels_or_one_line(
    noise: bytes, place: int, cut: int, mend: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Damage anywhere, with the checksums mended or not."""
    data = png()[:place] + noise + png()[place + cut :]
    folder = tmp_path_factory.mktemp("films")
    (folder / "a.png").write_bytes(_mended(data) if mend else data)
    try:
        (pixels,) = read(folder, "a.png")
    except MedfedError as error:
        assert str(error).isprintable()
    else:
        assert pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16)


def _mended(data: bytes) -> bytes:
    whole, position = data[:8], 8
    while position + 12 <= len(data):
        size = struct.unpack(">I", data[position : position + 4])[0]
        if position + 12 + size > len(data):
            break
        whole += chunk(data[position + 4 : position + 8], data[position + 8 : position + 8 + size])
        position += 12 + size
    return whole + data[position:]
