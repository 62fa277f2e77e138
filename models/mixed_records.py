"""Records of several parts -> float32[n, total], by the study's contract: what is there of each, and that it is there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import DataContract
from medfed.models.cells import MISSING, fault
from medfed.models.image_records import Pixels, encode_images
from medfed.models.series_records import Measurements, encode_series
from medfed.models.text_records import encode_texts
from medfed.record_parts import Block, MixedPart

Floats = NDArray[np.float32]


def encode_mixed(
    data: DataContract,
    features: NDArray[np.float64],
    columns: Mapping[str, Sequence[str]],
    rows: Sequence[int],
    images: Iterable[Pixels],
    series: Measurements | None,
) -> Floats:
    """float32[n, total] as ``medfed.record_parts.Mixed`` documents.

    ``features``: float64[n, p], encoded; ``images``: of the records that name one, in their order; ``series``: of those that have
    one. Raises: ``DataError`` MF-301 as each part's encoder, and for a part that is not there and may not be lacking.
    """
    there, parts = _there(data, columns, rows, series), []
    for part in data.mixed_parts:
        own = np.flatnonzero(there[part]).tolist()
        encoded = np.zeros((len(rows), math.prod(data.mixed_parts[part])), np.float32)
        if own:
            encoded[own] = _encoded(data, part, columns, rows, own, images, series).reshape(len(own), -1)
        parts.append(encoded)
    flags = np.stack([there[part] for part in data.mixed_parts], axis=1).astype(np.float32)
    return np.concatenate([flags, features.astype(np.float32), *parts], axis=1)


def names_image(cell: str) -> bool:
    """Whether a record has an image."""
    return cell.strip() not in MISSING


def _there(
    data: DataContract, columns: Mapping[str, Sequence[str]], rows: Sequence[int], series: Measurements | None
) -> dict[MixedPart, NDArray[np.bool_]]:
    found: dict[MixedPart, tuple[str, NDArray[np.bool_]]] = {}
    if data.image is not None:
        found["image"] = data.image.column, _filled(columns[data.image.column])
    if data.series is not None:
        measured = np.zeros(len(rows), np.bool_)
        measured[[] if series is None else series.records] = True
        found["series"] = "of the series", measured
    if data.text is not None:
        found["text"] = data.text.column, _filled(columns[data.text.column])
    if data.block is not None:
        names = data.block.columns
        found["block"] = names[0], np.any([_filled(columns[name]) for name in names], axis=0)
    may_lack = [] if data.mixed is None else data.mixed.may_lack
    for part, (column, is_there) in found.items():
        if part not in may_lack and not is_there.all():
            row = rows[int(np.argmin(is_there))]
            raise fault(row, column, "is missing", f"the study wants the {part} of every record; drop the row")
    return {part: is_there for part, (_, is_there) in found.items()}


def _filled(cells: Sequence[str]) -> NDArray[np.bool_]:
    return np.array([cell.strip() not in MISSING for cell in cells], np.bool_)


def _encoded(
    data: DataContract,
    part: MixedPart,
    columns: Mapping[str, Sequence[str]],
    rows: Sequence[int],
    own: Sequence[int],
    images: Iterable[Pixels],
    series: Measurements | None,
) -> NDArray[np.float32] | NDArray[np.int64]:
    """Of the records ``own``."""
    named = [rows[record] for record in own]
    if part == "image" and data.image is not None:
        return encode_images(data.image, images, named)
    if part == "series" and data.series is not None and series is not None:
        return encode_series(data.series, np.zeros((len(rows), 0)), series)[own]
    if part == "text" and data.text is not None:
        return encode_texts(data.text, [columns[data.text.column][record] for record in own], named)
    if data.block is None:
        raise ValueError(f"a record without {part}")
    return _block(data.block, columns, named, own)


def _block(block: Block, columns: Mapping[str, Sequence[str]], named: Sequence[int], own: Sequence[int]) -> Floats:
    values = np.empty((len(own), block.count))
    for place, name in enumerate(block.columns):
        cells = columns[name]
        values[:, place] = [_number(block, cells[record], row, name) for record, row in zip(own, named, strict=True)]
    return ((values - block.center) / block.scale).astype(np.float32)


def _number(block: Block, cell: str, row: int, name: str) -> float:
    if cell.strip() in MISSING:
        if block.missing is None:
            raise fault(row, name, "is missing", "the study names no value for missing ones; leave out the whole block")
        return block.missing
    try:
        value = float(cell)
    except ValueError:
        raise fault(row, name, "is not a number", "write numbers with a decimal point") from None
    if not math.isfinite(value):
        raise fault(row, name, "is not finite", "leave the cell empty or drop the row")
    if block.outside == "refuse" and not block.minimum <= value <= block.maximum:
        limits = f"[{block.minimum:g}, {block.maximum:g}] {block.unit}"
        raise fault(row, name, f"is outside {limits}", "check the unit of the column")
    return min(max(value, block.minimum), block.maximum)
