"""Parts of a record beside those of ``data_contract.py``: molecules, histories of events, blocks of numbers. All constants are
public."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medfed.bounds import Column, Finite, Scale
from medfed.toml_files import StrictModel

ATOM_VALUES = 40
"""What is said of an atom (``models/molecule_records`` tells what)."""
BOND_KINDS = 4
"""Single, double, triple, aromatic."""
GAPS = 16
"""Tokens for the time between events: powers of two of a day."""


class Molecule(StrictModel):
    """A molecule, by the SMILES in ``column``: as a graph of at most ``atoms`` atoms without hydrogen.

    A larger one is an error, or only its first atoms in the order of the SMILES, and the bonds among these, are taken
    (``larger = "cut"``).
    """

    column: Column
    atoms: Annotated[int, Field(ge=2, le=512)]
    larger: Literal["refuse", "cut"]

    @property
    def shape(self) -> tuple[int, ...]:
        """float32[atoms, ATOM_VALUES + atoms]: of each atom 1 (0 where there is none), what is said of it, and the kind of
        bond to each atom, 1 to ``BOND_KINDS``, 0 for none."""
        return (self.atoms, ATOM_VALUES + self.atoms)


class Fingerprint(StrictModel):
    """A molecule, by the SMILES in ``column``: which neighborhoods of up to ``radius`` bonds it has, hashed to ``bits`` numbers.

    *Source* Morgan (circular) fingerprints, Rogers and Hahn 2010, doi 10.1021/ci100050t, as RDKit makes them.
    """

    column: Column
    bits: Annotated[int, Field(ge=16, le=16384)]
    radius: Annotated[int, Field(ge=0, le=6)]
    center: Finite
    scale: Scale

    @property
    def shape(self) -> tuple[int, ...]:
        """float32[bits], (1 or 0 - center) / scale."""
        return (self.bits,)


class Events(StrictModel):
    """A history of coded events, such as diagnoses, drugs and procedures: the last ``length`` of each record.

    A code is 1 + h modulo ``buckets``, h the first 8 bytes of its SHA-256 in upper case, big-endian: no list of codes is made.
    Its time is how many days before the record's last event it was, as a power of two.
    """

    buckets: Annotated[int, Field(ge=64, le=1 << 18)]
    length: Annotated[int, Field(ge=2, le=4096)]

    @property
    def tokens(self) -> int:
        """How many tokens there are: padding 0, codes, times."""
        return 1 + self.buckets + GAPS

    @property
    def shape(self) -> tuple[int, ...]:
        """int64[length, 2]: the code and the time of each event in the order of time, 0 and 0 behind the last."""
        return (self.length, 2)


class Block(StrictModel):
    """``count`` numbers of one kind, such as expression values: columns ``prefix`` 1 to ``prefix`` count, with one range for all.

    ``(value - center) / scale`` enters. ``missing``: what an empty cell counts as; without it one is an error.
    """

    prefix: Annotated[str, Field(min_length=1, max_length=48, pattern=r"^[A-Za-z_][A-Za-z0-9_ .-]*$")]
    count: Annotated[int, Field(ge=1, le=20_000)]
    unit: Annotated[str, Field(max_length=32)]
    minimum: Finite
    maximum: Finite
    center: Finite
    scale: Scale
    outside: Literal["refuse", "clip"]
    missing: Finite | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Block:
        if self.minimum >= self.maximum:
            raise ValueError("minimum must lie below maximum")
        return self

    @property
    def columns(self) -> list[str]:
        return [f"{self.prefix}{number}" for number in range(1, self.count + 1)]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count,)


MixedPart = Literal["image", "series", "text", "block"]


class Mixed(StrictModel):
    """A record has several parts, and features. ``may_lack``: parts that a record may be without; any other that is not there
    is an error.

    Encoded as float32[total]: for each part 1 if it is there, else 0; the features; each part's values in a row, 0 where it is
    not there. Parts stand in the order image, series, text, block.
    """

    may_lack: Annotated[list[MixedPart], Field(max_length=4)]

    @model_validator(mode="after")
    def _distinct(self) -> Mixed:
        if len(set(self.may_lack)) != len(self.may_lack):
            raise ValueError("a part is listed twice")
        return self
