"""The models that a study may name, each with the numbers that shape it: a closed list, built by ``models/catalogue.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medfed.toml_files import StrictModel

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Width = Annotated[int, Field(ge=1, le=4096)]


class _Model(StrictModel):
    """``first_model_sha256`` pins the safetensors file of the first weights; only a task's model, not a study's, lacks it."""

    first_model_sha256: Sha256 | None = None


class LogisticRegression(_Model):
    """One linear layer over a table."""

    name: Literal["logistic-regression"]
    hidden: Annotated[list[Width], Field(max_length=0)]


class Mlp(_Model):
    """Linear layers with ReLU between over a table."""

    name: Literal["mlp"]
    hidden: Annotated[list[Width], Field(min_length=1, max_length=8)]


class Cnn(_Model):
    """Weight-standardised convolutions with GroupNorm over an image.

    ``channels``: of each 3 x 3 convolution, the first with stride ``first_stride``, all others with stride 2. ``groups`` of
    GroupNorm divides each. The last layer sees the mean over all places (``head = "mean"``: where in the image something
    lies does not count) or each place on its own (``"places"``).
    """

    name: Literal["cnn"]
    channels: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=8)]
    first_stride: Literal[1, 2]
    groups: Annotated[int, Field(ge=1, le=256)]
    head: Literal["mean", "places"]

    @model_validator(mode="after")
    def _divides(self) -> Cnn:
        if any(channels % self.groups for channels in self.channels):
            raise ValueError("groups must divide every number of channels")
        return self


class Recurrent(_Model):
    """An LSTM or GRU over a series.

    ``summaries``: the last layer also sees each channel's mean over the stay, the stay's share of all steps, and each
    variable's last observed value.
    """

    name: Literal["lstm", "gru"]
    hidden_size: Annotated[int, Field(ge=1, le=1024)]
    layers: Annotated[int, Field(ge=1, le=4)]
    summaries: bool


class Transformer(_Model):
    """A Transformer encoder over a text or a series: blocks with the normalisation first, the mean over what is not padding."""

    name: Literal["transformer"]
    embedding_size: Annotated[int, Field(ge=4, le=1024)]
    heads: Annotated[int, Field(ge=1, le=64)]
    layers: Annotated[int, Field(ge=1, le=12)]
    feedforward_size: Annotated[int, Field(ge=4, le=4096)]

    @model_validator(mode="after")
    def _divides(self) -> Transformer:
        if self.embedding_size % self.heads:
            raise ValueError("heads must divide embedding_size")
        return self


ModelChoice = Annotated[LogisticRegression | Mlp | Cnn | Recurrent | Transformer, Field(discriminator="name")]

ModelName = Literal["logistic-regression", "mlp", "cnn", "lstm", "gru", "transformer"]

READS: dict[str, frozenset[str]] = {
    "logistic-regression": frozenset({"table"}),
    "mlp": frozenset({"table"}),
    "cnn": frozenset({"image"}),
    "lstm": frozenset({"series"}),
    "gru": frozenset({"series"}),
    "transformer": frozenset({"series", "text"}),
}
"""What kinds of record (``DataContract.kind``) each model takes."""


def described(model: ModelChoice) -> str:
    """The model in a line for people: its name and its numbers."""
    numbers = {key: value for key, value in model if key not in ("name", "first_model_sha256") and value != []}
    return " ".join([model.name, *(f"{key}={value}" for key, value in numbers.items())])
