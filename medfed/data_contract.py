"""The data contract of a study: what a record must look like at every hospital. All constants are public.

A record is one of four things: a row of a table (``features`` alone), a grey image, a series of regular time steps (with
``features`` that hold for the whole of it, such as age), or a text. Its encoded form has one fixed shape for all hospitals.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medfed.toml_files import StrictModel

Column = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_ .-]*$")]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e12, le=1e12)]
Scale = Annotated[float, Field(gt=1e-12, le=1e12, allow_inf_nan=False)]
MOST_VALUES = 1 << 22  # of one encoded record: 16 MiB


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
    """

    column: Column
    height: Annotated[int, Field(ge=8, le=1024)]
    width: Annotated[int, Field(ge=8, le=1024)]
    center: Finite
    scale: Scale
    resize: Literal["refuse", "area"] = "refuse"

    @property
    def shape(self) -> tuple[int, ...]:
        """float32[1, height, width]."""
        return (1, self.height, self.width)


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
    SHA-256, big-endian: a vocabulary that is made from nobody's text.
    """

    column: Column
    tokens: Literal["bytes", "hashed-words"]
    buckets: Annotated[int, Field(ge=256, le=1 << 18)]
    length: Annotated[int, Field(ge=8, le=4096)]

    @model_validator(mode="after")
    def _byte_values(self) -> Text:
        if self.tokens == "bytes" and self.buckets != 256:
            raise ValueError("bytes have buckets = 256")
        return self


class DataContract(StrictModel):
    """What a record must look like at every hospital."""

    max_records_per_patient: Annotated[int, Field(ge=1, le=10_000)]
    features: Annotated[list[Feature], Field(max_length=10_000)]
    image: Image | None = None
    series: Series | None = None
    text: Text | None = None

    @model_validator(mode="after")
    def _whole(self) -> DataContract:
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError("a feature is listed twice")
        kinds = [part for part in (self.image, self.series, self.text) if part is not None]
        if len(kinds) > 1:
            raise ValueError("a record is one of image, series and text")
        if not kinds and not self.features:
            raise ValueError("features must not be empty where a record is neither image, series nor text")
        if self.features and (self.image is not None or self.text is not None):
            raise ValueError("features go with a table or a series")
        size = 1
        for width in self.shape:
            size *= width
        if size > MOST_VALUES:
            raise ValueError(f"a record has more than {MOST_VALUES} values")
        return self

    @property
    def kind(self) -> Literal["table", "image", "series", "text"]:
        """What a record is."""
        if self.image is not None:
            return "image"
        if self.series is not None:
            return "series"
        return "text" if self.text is not None else "table"

    @property
    def inputs(self) -> int:
        """Number of values that a record's features take, encoded."""
        return sum(feature.width for feature in self.features)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one encoded record: table (p,), image (1, height, width), series (steps, channels), text (length,).

        All float32, but text, which is int64 tokens.
        """
        if self.image is not None:
            return self.image.shape
        if self.series is not None:
            return (self.series.steps, self.series.channels(self.inputs))
        return (self.text.length,) if self.text is not None else (self.inputs,)
