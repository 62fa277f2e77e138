"""The data contract of a study: what a record must look like at every hospital. All constants are public.

A record is a row of a table (``features`` alone), a grey image, a series of regular time steps (with ``features`` that hold for
the whole of it, such as age), a text, a molecule, a history of events, or several of these together (``mixed``). Its encoded form
has one fixed shape for all hospitals.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medfed.bounds import Column as Column
from medfed.bounds import Finite as Finite
from medfed.bounds import Scale as Scale
from medfed.record_parts import Block, Events, Fingerprint, Mixed, MixedPart, Molecule
from medfed.toml_files import StrictModel, without_unset
from medfed.volume_part import Volume

RecordKind = Literal[
    "table", "image", "views", "volume", "series", "text", "molecule", "fingerprint", "events", "mixed"
]
MOST_VALUES = 1 << 22  # of one encoded record: 16 MiB
WORD_PARTS = 8  # tokens of a word where the words are given


class NumericFeature(StrictModel):
    """A number: ``(value - center) / scale`` enters the model. All constants are public, never computed from patients.

    A value outside [minimum, maximum] is an error (``outside = "refuse"``) or set to the nearer bound (``"clip"``). A
    missing value is an error unless ``missing`` names the public value that stands for it.
    """

    name: Column
    kind: Literal["number"]
    unit: Annotated[str, Field(max_length=32)]
    minimum: Finite
    maximum: Finite
    center: Finite
    scale: Scale
    outside: Literal["refuse", "clip"]
    missing: Finite | None = None

    @model_validator(mode="after")
    def _ordered(self) -> NumericFeature:
        if self.minimum >= self.maximum:
            raise ValueError("minimum must lie below maximum")
        return self

    @property
    def width(self) -> int:
        return 1

    @property
    def is_resolved(self) -> bool:
        """Whether the range's ends, encoded, are apart by more than float32's rounding of either, and than 1e-30."""
        low, high = (self.minimum - self.center) / self.scale, (self.maximum - self.center) / self.scale
        return high - low > max(1e-6 * max(abs(low), abs(high)), 1e-30)


class CategoryFeature(StrictModel):
    """A category: one indicator for each level after the first, each entered as ``(indicator - center) / scale``."""

    name: Column
    kind: Literal["category"]
    levels: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(min_length=2, max_length=256)]
    center: Finite
    scale: Scale
    missing: str | None = None

    @model_validator(mode="after")
    def _distinct(self) -> CategoryFeature:
        if len(set(self.levels)) != len(self.levels):
            raise ValueError("levels must differ")
        if self.missing is not None and self.missing not in self.levels:
            raise ValueError("missing must be one of the levels")
        return self

    @property
    def width(self) -> int:
        return len(self.levels) - 1


Feature = Annotated[NumericFeature | CategoryFeature, Field(discriminator="kind")]


class Image(StrictModel):
    """A grey image: ``column`` of the table names its file. ``(value - center) / scale`` enters, with 0 black and 1 white.

    A file of another size is refused, or brought to ``height`` x ``width`` pixels by averaging areas (``resize = "area"``).
    ``views``: a cell names so many files at most, parted by ";": the views, or tiles, of one patient. Where a name is left empty,
    or the cell ends, a view is absent.
    """

    column: Column
    height: Annotated[int, Field(ge=8, le=1024)]
    width: Annotated[int, Field(ge=8, le=1024)]
    center: Finite
    scale: Scale
    resize: Literal["refuse", "area"] = "refuse"
    views: Annotated[int, Field(ge=2, le=64)] | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), "views")

    @property
    def shape(self) -> tuple[int, ...]:
        """float32[1, height, width]; of views float32[views + 1, height, width], the last of which begins with 1 for each view
        that is there and 0 for each that is absent, row by row, and is 0 after that."""
        return (1 if self.views is None else self.views + 1, self.height, self.width)


class Variable(StrictModel):
    """One measured variable of a series; as ``NumericFeature``, but often not observed."""

    name: Column
    unit: Annotated[str, Field(max_length=32)]
    minimum: Finite
    maximum: Finite
    center: Finite
    scale: Scale
    outside: Literal["refuse", "clip"]

    @model_validator(mode="after")
    def _ordered(self) -> Variable:
        if self.minimum >= self.maximum:
            raise ValueError("minimum must lie below maximum")
        return self


class Series(StrictModel):
    """A series of ``steps`` time steps of ``step_hours``; several measurements of a variable in one step are averaged.

    Step k = 0, 1, ... holds the measurements at the hours t with floor(t / step_hours) = k; those before time 0 or after
    the last step are left out. A value outside its variable's [minimum, maximum] is an error or set to the nearer bound,
    before averaging. A variable that is not observed in a step enters as 0 (its center), or as its last value, 0 before
    the first (``fill = "forward"``); a second channel says whether it was observed. The stay reaches to the last step in
    which any of the variables was observed; the first step is always inside, so that a record without a measurement is one.

    Channels of a step, in this order: the variables' values, whether each was observed (1 or 0), whether the step lies
    inside the stay (1 or 0), the encoded features, the same at every step.
    """

    steps: Annotated[int, Field(ge=2, le=4096)]
    step_hours: Annotated[float, Field(gt=0.0, le=8760.0)]
    variables: Annotated[list[Variable], Field(min_length=1, max_length=1024)]
    fill: Literal["center", "forward"]

    @model_validator(mode="after")
    def _distinct(self) -> Series:
        if len({variable.name for variable in self.variables}) != len(self.variables):
            raise ValueError("a variable is listed twice")
        return self

    def channels(self, features: int) -> int:
        """Values a step: each variable, whether it was observed, whether the step lies inside the stay, the features."""
        return 2 * len(self.variables) + 1 + features


class Text(StrictModel):
    """A text of ``column``, cut or padded to ``length`` tokens. Token 0 is padding; every record has a token before it.

    ``bytes``: token = 1 + byte of the UTF-8 text (``buckets`` = 256). ``hashed-words``: a word is a run of letters and digits
    of the text in Unicode form NFKC and lower case; token = 1 + h modulo ``buckets``, h the first 8 bytes of the word's
    SHA-256, big-endian: a vocabulary that is made from nobody's text. ``hashed-pieces``: the same of words of more than three
    characters alone, which leaves most of those out that say nothing; one of more than five is three tokens: the word, its
    first five characters and its last five, marked as such. ``given-words``: the text was divided into words before, parted by
    blanks; ``length`` counts words, and each is ``WORD_PARTS`` tokens (``models/text_records`` says which): the word, its
    beginnings and ends, and its shape, so that words never met before are like those they resemble.
    ``public-vocabulary``: word pieces of a public file of ``buckets`` lines with hash ``vocabulary_sha256``, of which every
    hospital has a copy (``models/vocabulary``).
    """

    column: Column
    tokens: Literal["bytes", "hashed-words", "hashed-pieces", "given-words", "public-vocabulary"]
    buckets: Annotated[int, Field(ge=256, le=1 << 18)]
    length: Annotated[int, Field(ge=8, le=4096)]
    vocabulary_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), "vocabulary_sha256")

    @property
    def shape(self) -> tuple[int, ...]:
        """int64[length], of given words int64[length, WORD_PARTS]."""
        return (self.length, WORD_PARTS) if self.tokens == "given-words" else (self.length,)

    @model_validator(mode="after")
    def _byte_values(self) -> Text:
        if self.tokens == "bytes" and self.buckets != 256:
            raise ValueError("bytes have buckets = 256")
        if (self.tokens == "public-vocabulary") != (self.vocabulary_sha256 is not None):
            raise ValueError("vocabulary_sha256 goes with public-vocabulary, and only with it")
        return self


class DataContract(StrictModel):
    """What a record must look like at every hospital."""

    max_records_per_patient: Annotated[int, Field(ge=1, le=10_000)]
    features: Annotated[list[Feature], Field(max_length=10_000)]
    image: Image | None = None
    series: Series | None = None
    text: Text | None = None
    volume: Volume | None = None
    molecule: Molecule | None = None
    fingerprint: Fingerprint | None = None
    events: Events | None = None
    block: Block | None = None
    mixed: Mixed | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), "volume", "molecule", "fingerprint", "events", "block", "mixed")

    @model_validator(mode="after")
    def _whole(self) -> DataContract:
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError("a feature is listed twice")
        self._check_parts()
        if math.prod(self.shape) > MOST_VALUES:
            raise ValueError(f"a record has more than {MOST_VALUES} values")
        return self

    def _check_parts(self) -> None:
        kinds = self._parts
        if self.mixed is not None:
            if self._alone or not self.mixed_parts or len(self.mixed_parts) + bool(self.features) < 2:
                raise ValueError("a mixed record has features and any of image, series, text and block, two at least")
            if not set(self.mixed.may_lack) <= set(self.mixed_parts):
                raise ValueError("may_lack names a part that no record has")
            if self.text is not None and self.text.tokens not in ("bytes", "hashed-words"):
                raise ValueError("the text of a mixed record is of bytes or hashed words")
            return
        if self.block is not None:
            raise ValueError("a block of numbers goes with [data.mixed]")
        if len(kinds) > 1:
            raise ValueError(f"a record is one of {', '.join(kinds)}, or write [data.mixed]")
        if not kinds and not self.features:
            raise ValueError("features must not be empty where a record is nothing else")
        if self.features and kinds not in ([], ["series"]):
            raise ValueError("features go with a table or a series, or write [data.mixed]")

    @property
    def _parts(self) -> list[RecordKind]:
        """Which parts but features a record has; of a mixed one, mixed."""
        if self.mixed is not None:
            return ["mixed"]
        found: list[tuple[RecordKind, object]] = [
            ("image", self._one_image),
            ("series", self.series),
            ("text", self.text),
        ]
        return [kind for kind, part in found if part is not None] + self._alone

    @property
    def _one_image(self) -> Image | None:
        return self.image if self.image is not None and self.image.views is None else None

    @property
    def _alone(self) -> list[RecordKind]:
        """Parts that never go with others."""
        found: list[tuple[RecordKind, object]] = [
            ("views", None if self._one_image is not None else self.image),
            ("volume", self.volume),
            ("molecule", self.molecule),
            ("fingerprint", self.fingerprint),
            ("events", self.events),
        ]
        return [kind for kind, part in found if part is not None]

    @property
    def mixed_parts(self) -> dict[MixedPart, tuple[int, ...]]:
        """The shape of each part of a mixed record, in the order in which they are encoded; a series' without features."""
        parts: dict[MixedPart, tuple[int, ...]] = {}
        if self.image is not None:
            parts["image"] = self.image.shape
        if self.series is not None:
            parts["series"] = (self.series.steps, self.series.channels(0))
        if self.text is not None:
            parts["text"] = self.text.shape
        if self.block is not None:
            parts["block"] = self.block.shape
        return parts

    @property
    def kind(self) -> RecordKind:
        """What a record is."""
        return next(iter(self._parts), "table")

    @property
    def is_tokens(self) -> bool:
        """Whether an encoded record is int64 numbers of tokens; all others are float32."""
        return self.kind in ("text", "events")

    @property
    def inputs(self) -> int:
        """Number of values that a record's features take, encoded."""
        return sum(feature.width for feature in self.features)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one encoded record: table (p,), image (1, height, width), series (steps, channels), text (length,), and as the
        other parts say.

        All float32, but texts and events, which are int64 tokens.
        """
        if self.mixed is not None:
            parts = self.mixed_parts.values()
            return (len(parts) + self.inputs + sum(math.prod(shape) for shape in parts),)
        if self.series is not None:
            return (self.series.steps, self.series.channels(self.inputs))
        for part in (self.image, self.volume, self.text, self.molecule, self.fingerprint, self.events):
            if part is not None:
                return part.shape
        return (self.inputs,)
