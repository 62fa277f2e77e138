"""A volume as a part of a record: what a study says of it. All constants are public."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medfed.bounds import Column, Finite, Scale
from medfed.toml_files import StrictModel

Side = Annotated[int, Field(ge=4, le=512)]


class Volume(StrictModel):
    """A volume of a CT or MR scanner: ``column`` of the table names its NIfTI file. ``depth``: voxels from the feet to the head,
    ``height``: from back to front, ``width``: from left to right.

    A value, in the scanner's units, is set to the nearer bound of [``lower``, ``upper``]; 0 is then ``lower``, 1 ``upper``, and
    ``(value - center) / scale`` enters. A volume of another size is refused, or brought to it by averaging (``resize = "area"``).
    """

    column: Column
    depth: Side
    height: Side
    width: Side
    lower: Finite
    upper: Finite
    center: Finite
    scale: Scale
    resize: Literal["refuse", "area"]

    @model_validator(mode="after")
    def _ordered(self) -> Volume:
        if self.lower >= self.upper:
            raise ValueError("lower must lie below upper")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """float32[1, depth, height, width]."""
        return (1, self.depth, self.height, self.width)
