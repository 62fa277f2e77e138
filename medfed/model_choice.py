"""The models that a study may name, each with the numbers that shape it: a closed list, built by ``models/catalogue.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medfed.errors import ConfigError
from medfed.toml_files import StrictModel, without_unset

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Width = Annotated[int, Field(ge=1, le=4096)]


PackageName = Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)*$")]


class Pretrained(StrictModel):
    """Weights that stay as they are, from ``file`` of an installed package whose files hash to ``package_sha256``.

    ``trained``: names of the layers that are trained as they are, such as ``head``; all others are frozen. ``adapters``: of each
    other ``nn.Linear`` a detour of this rank is trained (``models/lora.py``).
    """

    package: PackageName
    package_sha256: Sha256
    file: Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9_]+(?:/[A-Za-z0-9_.-]+)*\.safetensors$")]
    trained: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,128}$")]], Field(max_length=64)]
    adapters: Annotated[int, Field(ge=1, le=256)] | None = None


class _Model(StrictModel):
    """``first_model_sha256`` pins the safetensors file of the first weights; only a task's model, not a study's, lacks it."""

    first_model_sha256: Sha256 | None = None
    pretrained: Pretrained | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), "pretrained")


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


class ResNet(_Model):
    """Residual blocks of weight-standardised convolutions with GroupNorm over an image.

    ``channels``: of each stage, every one after the first with half the places a side; ``blocks``: of each stage, two 3 x 3
    convolutions a block; ``first_stride``: of the convolution before them. ``groups``, ``head``: as of ``Cnn``.
    """

    name: Literal["resnet"]
    channels: Annotated[list[Annotated[int, Field(ge=2, le=512)]], Field(min_length=1, max_length=5)]
    blocks: Annotated[int, Field(ge=1, le=8)]
    first_stride: Literal[1, 2]
    groups: Annotated[int, Field(ge=1, le=256)]
    head: Literal["mean", "places"]

    @model_validator(mode="after")
    def _divides(self) -> ResNet:
        if any(channels % self.groups for channels in self.channels):
            raise ValueError("groups must divide every number of channels")
        return self


class Cnn3d(_Model):
    """Weight-standardised convolutions with GroupNorm over a volume.

    ``channels``, ``first_stride``, ``groups``: as of ``Cnn``, in three dimensions. The last layer sees each channel's mean over
    all places or its largest value (``head``): the second finds what is small.
    """

    name: Literal["cnn3d"]
    channels: Annotated[list[Annotated[int, Field(ge=1, le=512)]], Field(min_length=1, max_length=6)]
    first_stride: Literal[1, 2]
    groups: Annotated[int, Field(ge=1, le=256)]
    head: Literal["mean", "largest"]

    @model_validator(mode="after")
    def _divides(self) -> Cnn3d:
        if any(channels % self.groups for channels in self.channels):
            raise ValueError("groups must divide every number of channels")
        return self


class MultiView(_Model):
    """One encoder over all views or tiles of a record, pooled by gated attention of ``attention_size`` or by their mean.

    ``channels``, ``first_stride``, ``groups``: of the encoder, as of ``Cnn``. Of a view each channel's mean over all places
    or its largest value is pooled (``head``).
    """

    name: Literal["multi-view"]
    channels: Annotated[list[Annotated[int, Field(ge=1, le=512)]], Field(min_length=1, max_length=6)]
    first_stride: Literal[1, 2]
    groups: Annotated[int, Field(ge=1, le=256)]
    head: Literal["mean", "largest"]
    pooling: Literal["attention", "mean"]
    attention_size: Annotated[int, Field(ge=1, le=1024)]

    @model_validator(mode="after")
    def _divides(self) -> MultiView:
        if any(channels % self.groups for channels in self.channels):
            raise ValueError("groups must divide every number of channels")
        return self


class Recurrent(_Model):
    """An LSTM or GRU over a series.

    ``summaries``: the last layer also sees what ``Summaries`` sees. ``bidirectional``: layers go through the stay both ways.
    ``decay``: a value that is carried forward fades with the time since it was observed, and that time is seen (after
    GRU-D); for ``fill = "forward"``.
    """

    name: Literal["lstm", "gru"]
    hidden_size: Annotated[int, Field(ge=1, le=1024)]
    layers: Annotated[int, Field(ge=1, le=4)]
    summaries: bool
    bidirectional: Literal[True] | None = None
    decay: Literal[True] | None = None

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(handler(self), "pretrained", "bidirectional", "decay")


class Summaries(_Model):
    """A linear layer on what a series comes to: of each variable mean, last value, spread, change and share of steps observed."""

    name: Literal["summaries"]


class Transformer(_Model):
    """A Transformer encoder over a text, a series or a history of events: blocks with the normalisation first, the mean over
    what is not padding."""

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


class TextBag(_Model):
    """A linear layer on which tokens a text holds, whatever their order."""

    name: Literal["text-bag"]


class TextCnn(_Model):
    """Windows of ``widths`` words over a text, ``channels`` of each width, and the greatest value of each (Kim 2014)."""

    name: Literal["text-cnn"]
    embedding_size: Annotated[int, Field(ge=2, le=1024)]
    widths: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=1, max_length=8)]
    channels: Annotated[int, Field(ge=1, le=1024)]


class Tagger(_Model):
    """Dilated convolutions over the words of a text whose words are given; a tag for each word.

    ``dilations``: how far the neighbours are that each layer of three words looks at. ``embedding_size``: of each part of a word.
    """

    name: Literal["tagger"]
    embedding_size: Annotated[int, Field(ge=2, le=1024)]
    hidden_size: Annotated[int, Field(ge=4, le=1024)]
    dilations: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=12)]


class MessagePassing(_Model):
    """A message-passing network over a molecule's atoms and bonds."""

    name: Literal["message-passing"]
    hidden_size: Annotated[int, Field(ge=1, le=1024)]
    layers: Annotated[int, Field(ge=1, le=12)]


class Autoencoder(_Model):
    """A table's record given back through ``latent`` numbers, layers of ``hidden`` widths before and behind.

    ``variational-autoencoder``: each latent number has a mean and a variance, drawn towards the standard normal distribution.
    """

    name: Literal["autoencoder", "variational-autoencoder"]
    hidden: Annotated[list[Width], Field(max_length=8)]
    latent: Annotated[int, Field(ge=1, le=64)]


class TwoArm(_Model):
    """Over a table, for effects of a treatment: layers of ``hidden`` widths that both arms share, and a head for each with layers
    of ``arm_hidden`` widths."""

    name: Literal["two-arm"]
    hidden: Annotated[list[Width], Field(max_length=8)]
    arm_hidden: Annotated[list[Width], Field(max_length=8)]


class Fusion(_Model):
    """Over records of several parts: an encoder for each, put together by ``how``.

    ``width``: numbers that each encoder ends in. ``image_channels`` and ``groups``: of the images' convolutions as in ``Cnn``;
    ``embedding_size``: of the texts' words.
    """

    name: Literal["fusion"]
    how: Literal["early", "late", "hybrid"]
    width: Annotated[int, Field(ge=1, le=1024)]
    image_channels: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=8)]
    groups: Annotated[int, Field(ge=1, le=256)]
    embedding_size: Annotated[int, Field(ge=2, le=1024)]

    @model_validator(mode="after")
    def _divides(self) -> Fusion:
        if any(channels % self.groups for channels in self.image_channels):
            raise ValueError("groups must divide every number of channels")
        return self


OwnText = Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9 ._:/+-]*$")]
OwnNumber = Annotated[float, Field(ge=-1e12, le=1e12)]
OwnSettings = dict[
    Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")],
    bool | Annotated[int, Field(ge=-(1 << 40), le=1 << 40)] | OwnNumber | OwnText,
]


class Own(_Model):
    """A model of a hospital group's own, in an installed package that is not medfed's (``models/own_packages.py``).

    ``package``: its name in pip's normal form; ``package_sha256``: the hash of its files, which approval pins; ``entry_point``: a
    name in its group ``medfed.models``, that of the function that makes the model; ``settings``: public numbers and words for it.
    """

    name: Literal["own"]
    package: PackageName
    entry_point: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    package_sha256: Sha256
    settings: Annotated[OwnSettings, Field(max_length=64)]

    @model_validator(mode="after")
    def _brings_weights(self) -> Own:
        if self.pretrained is not None:
            raise ValueError("an own model loads pretrained weights itself")
        return self


ModelChoice = Annotated[
    LogisticRegression
    | Mlp
    | Cnn
    | ResNet
    | Cnn3d
    | MultiView
    | Recurrent
    | Summaries
    | Transformer
    | TextBag
    | TextCnn
    | Tagger
    | MessagePassing
    | Fusion
    | Autoencoder
    | TwoArm
    | Own,
    Field(discriminator="name"),
]

ModelName = Literal[
    "logistic-regression",
    "mlp",
    "cnn",
    "resnet",
    "cnn3d",
    "multi-view",
    "lstm",
    "gru",
    "summaries",
    "transformer",
    "text-bag",
    "text-cnn",
    "tagger",
    "message-passing",
    "autoencoder",
    "variational-autoencoder",
    "two-arm",
    "fusion",
    "own",
]

READS: dict[str, frozenset[str]] = {
    "logistic-regression": frozenset({"table", "fingerprint"}),
    "mlp": frozenset({"table", "fingerprint"}),
    "cnn": frozenset({"image"}),
    "resnet": frozenset({"image"}),
    "cnn3d": frozenset({"volume"}),
    "multi-view": frozenset({"views"}),
    "lstm": frozenset({"series"}),
    "gru": frozenset({"series"}),
    "summaries": frozenset({"series"}),
    "transformer": frozenset({"series", "text", "events"}),
    "text-bag": frozenset({"text"}),
    "text-cnn": frozenset({"text"}),
    "tagger": frozenset({"text"}),
    "message-passing": frozenset({"molecule"}),
    "fusion": frozenset({"mixed"}),
    "autoencoder": frozenset({"table"}),
    "variational-autoencoder": frozenset({"table"}),
    "two-arm": frozenset({"table"}),
}
READS["own"] = frozenset[str]().union(*READS.values())
"""What kinds of record (``DataContract.kind``) each model takes."""

CLASSIC = frozenset({"binary", "multiclass", "multilabel", "survival", "effect"})
"""Kinds of task that need some numbers of each record, whatever the model."""

SOLVES: dict[str, frozenset[str]] = {
    "tagger": frozenset({"tagging"}),
    "autoencoder": frozenset({"reconstruction"}),
    "variational-autoencoder": frozenset({"reconstruction"}),
    "two-arm": frozenset({"effect"}),
}
"""What kinds of task a model is for, where these are not ``CLASSIC``."""


def described(model: ModelChoice) -> str:
    """The model in a line for people: its name and its numbers."""
    numbers = {
        key: value for key, value in model if key not in ("name", "first_model_sha256") and value not in ([], None)
    }
    return " ".join([model.name, *(f"{key}={value}" for key, value in numbers.items())])


EXPERIMENTAL: dict[str, str] = {
    "message-passing": "on bbbp it stays behind a linear layer on fingerprints",
    "variational-autoencoder": "at small epsilon its score loses its scale",
}
"""Models that train privately and yet are not to be relied on, and why: who wants one says so."""


def refuse_experimental(name: str, *, asked: bool) -> None:
    """Raise ``ConfigError`` MF-203 for an experimental model that nobody ``asked`` for."""
    if name in EXPERIMENTAL and not asked:
        raise ConfigError(203, f"model {name} is experimental: {EXPERIMENTAL[name]}", "say --experimental to have it")
