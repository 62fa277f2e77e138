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
from medfed.models.autoencoder import Autoencoder, VariationalAutoencoder
from medfed.models.convolutional import MeanOverPlaces, StandardizedConv2d
from medfed.models.fusion import Fusion, WordMean
from medfed.models.graph import MessagePassing, Messages
from medfed.models.gru_d import InputDecay
from medfed.models.lora import LoraLinear
from medfed.models.multi_view import EqualAttention, GatedAttention, MultiView, NormOfEachView, PoolOfEachView
from medfed.models.own_model import OwnModel
from medfed.models.recurrent import GruLayer, LstmLayer, Recurrent
from medfed.models.residual import ResidualBlock
from medfed.models.rowwise import RowLinear
from medfed.models.summaries import SeriesSummaries
from medfed.models.tagger import Surroundings, Tagger
from medfed.models.text_bag import TextBag
from medfed.models.text_cnn import TextCnn
from medfed.models.transformer import Block, Encoder, EventTransformer, SeriesTransformer, TextTransformer
from medfed.models.two_arm import TwoArm
from medfed.models.volumetric import LargestOfVolume, MeanOverVolume, StandardizedConv3d

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
    StandardizedConv3d: "neighbouring places of one record; its filters are standardised over themselves",
    MeanOverVolume: "mean over the places of one record",
    LargestOfVolume: "largest values of one record",
    NormOfEachView: "mean and variance of channels of one view of one record",
    GatedAttention: "weighs the views of one record among each other",
    PoolOfEachView: "mean or largest values of one view of one record",
    EqualAttention: "the same weight for each view that one record has",
    MultiView: "its layers, and a weighted sum over the views of one record",
    ResidualBlock: "its layers, and a sum place by place",
    MeanOverPlaces: "mean over the places of one record",
    LstmLayer: "runs through the steps of each record by itself",
    GruLayer: "runs through the steps of each record by itself",
    Recurrent: "its layers, and summaries of one record's steps",
    SeriesSummaries: "a linear layer on summaries of one record's steps",
    Encoder: "its blocks, and the mean over one record's places",
    Block: "attention among the places of one record",
    InputDecay: "value by value of one record, by the time since it was observed",
    MessagePassing: "its layers, and the mean and sum over one molecule's atoms",
    Messages: "sums over the neighbors of an atom of one molecule",
    Fusion: "the encoders of one record's parts, each part's share by itself",
    WordMean: "its embedding, and the mean over one record's words",
    TextTransformer: "its embedding and encoder",
    SeriesTransformer: "its embedding and encoder",
    EventTransformer: "its embedding and encoder",
    nn.Conv1d: "neighbouring steps of one record",
    TextBag: "its embedding, and a weighted sum over one record's tokens",
    TextCnn: "its embedding, and the greatest over the windows of one record",
    Surroundings: "neighbouring words of one record, added to each",
    Tagger: "its embedding, and its blocks word by word",
    Autoencoder: "its layers, and the mean over one record's values",
    VariationalAutoencoder: "its layers at public points around one record's latent numbers, and means over these and its values",
    TwoArm: "its layers, one after the other for each arm",
    LoraLinear: "its linear layers",
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
    # an own model's layers were looked over and tried out when it was made (own_proof.py): these types, and no others
    own = {OwnModel, *model.known} if type(model) is OwnModel else set()
    for name, layer in model.named_modules():
        at = name or "the model"
        kind = type(layer)
        if kind not in SEPARABLE_LAYERS and kind not in own:
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
