"""Which layers and losses keep patients apart: a closed list. What is not on it is refused, by name and with a way out.

A model is separable by patient if what comes out for a record, and the gradient it takes, are functions of that record
alone. Without it there is no gradient *of a patient* that could be clipped, and the noise hides nobody. Hooks record what a
layer does and cannot see what it means, so each layer type is declared here with the reason; ``tests/models`` proves it of
every model and loss of the catalogue with autograd.
"""

from __future__ import annotations

import math

from torch import nn

from medfed.errors import UnsupportedModel
from medfed.models.convolutional import MeanOverPlaces, StandardizedConv2d
from medfed.models.recurrent import GruLayer, LstmLayer, Recurrent
from medfed.models.rowwise import RowLinear
from medfed.models.transformer import Block, Encoder, SeriesTransformer, TextTransformer

SEPARABLE_LAYERS: dict[type[nn.Module], str] = {
    nn.Sequential: "calls its layers one after the other",
    nn.ModuleList: "holds layers",
    nn.Identity: "gives back what it gets",
    nn.ReLU: "value by value",
    nn.Flatten: "writes the values of each record in a row",
    nn.Linear: "multiplies each record, or each step of it, by itself",
    RowLinear: "multiplies each record by itself, added up in one order",
    nn.Embedding: "looks up each token by itself",
    nn.LayerNorm: "mean and variance of one place of one record",
    nn.GroupNorm: "mean and variance of channels of one record",
    StandardizedConv2d: "neighbouring places of one record; its filters are standardised over themselves",
    MeanOverPlaces: "mean over the places of one record",
    LstmLayer: "runs through the steps of each record by itself",
    GruLayer: "runs through the steps of each record by itself",
    Recurrent: "its layers, and summaries of one record's steps",
    Encoder: "its blocks, and the mean over one record's places",
    Block: "attention among the places of one record",
    TextTransformer: "its embedding and encoder",
    SeriesTransformer: "its embedding and encoder",
}
"""Every layer type of the catalogue, exactly (a subclass may do anything), and why it keeps records apart."""

SETTINGS: dict[type[nn.Module], dict[str, object]] = {
    nn.Flatten: {"start_dim": 1},  # 0 makes one record of all
    # rescaled when looked up, and a gradient divided by how often a token is in the batch: both tell of other patients
    nn.Embedding: {"max_norm": None, "scale_grad_by_freq": False},
}
"""What a layer of the list must be set to."""

COUPLING_LAYERS: dict[str, str] = {
    "BatchNorm1d": "LayerNorm({channels})",
    "BatchNorm2d": "GroupNorm({groups}, {channels})",
    "BatchNorm3d": "GroupNorm({groups}, {channels})",
    "SyncBatchNorm": "GroupNorm({groups}, {channels})",
    "InstanceNorm1d": "LayerNorm({channels})",
    "InstanceNorm2d": "GroupNorm({channels}, {channels})",
    "InstanceNorm3d": "GroupNorm({channels}, {channels})",
}
"""Layers that mix patients, by the batch's statistics or by running ones, and what to take instead."""


def require_separable(model: nn.Module) -> None:
    """Raise ``UnsupportedModel`` (MF-160) that names the first layer not known to keep patients apart, and the way out."""
    for name, layer in model.named_modules():
        at = name or "the model"
        kind = type(layer)
        if kind not in SEPARABLE_LAYERS:
            raise _unknown(at, layer)
        for setting, wanted in SETTINGS.get(kind, {}).items():
            if getattr(layer, setting) != wanted:
                what = f"{at}: {kind.__name__} with {setting} = {getattr(layer, setting)} mixes patients"
                raise UnsupportedModel(160, what, f"use {setting} = {wanted}")


def _unknown(at: str, layer: nn.Module) -> UnsupportedModel:
    kind = type(layer).__name__
    # by name along the ancestors: a kind of BatchNorm is one
    replacement = next((found for each in type(layer).__mro__ if (found := COUPLING_LAYERS.get(each.__name__))), None)
    if replacement is None:
        what = f"{at}: {kind} is not known to keep patients apart"
        return UnsupportedModel(
            160, what, "use a layer of medfed/models/separability.py, or declare and prove this one"
        )
    channels = int(getattr(layer, "num_features", 1))
    advice = replacement.format(channels=channels, groups=math.gcd(32, channels))
    return UnsupportedModel(160, f"{at}: {kind} mixes patients", f"use {advice}")
