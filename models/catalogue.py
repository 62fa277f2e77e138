"""The closed table of models: a study names one, a hospital builds it from code it installed itself."""

from __future__ import annotations

import math

import torch
from torch import nn

from medfed.data_contract import WORD_PARTS, DataContract
from medfed.errors import ConfigError
from medfed.model_choice import (
    Autoencoder,
    Cnn,
    Cnn3d,
    Fusion,
    LogisticRegression,
    MessagePassing,
    Mlp,
    MultiView,
    Own,
    Recurrent,
    ResNet,
    Summaries,
    Tagger,
    TextBag,
    TextCnn,
    Transformer,
    TwoArm,
)
from medfed.models import (
    autoencoder,
    convolutional,
    fusion,
    graph,
    multi_view,
    own_models,
    recurrent,
    residual,
    summaries,
    tabular,
    tagger,
    text_bag,
    text_cnn,
    transformer,
    two_arm,
    volumetric,
)
from medfed.models.pretrained import take_pretrained
from medfed.models.separability import require_separable
from medfed.study import Study

MOST_PARAMETERS = 1 << 26
"""256 MiB: a study's numbers, which a stranger may have chosen, multiply to terabytes."""


def build(study: Study) -> nn.Module:
    """The study's model with freshly initialised weights: records [n, *study.data.shape] -> logits float[n, outputs].

    Torch's global generator draws the weights. A model holds float32 parameters and no buffer, and looks at each record
    alone: of layers only that ``separability`` lists (else ``UnsupportedModel`` MF-160). Raises ``ConfigError`` MF-203 where
    the model does not take the study's kind of record, or has more than ``MOST_PARAMETERS``, before memory is taken for them.
    """
    with torch.device("meta"):  # shapes without contents; nothing is drawn
        outline = _begun(study)
    require_separable(outline)
    size = sum(weight.numel() for weight in outline.parameters())
    if size > MOST_PARAMETERS:
        raise ConfigError(203, f"model of {size} parameters, at most {MOST_PARAMETERS}", "choose a smaller one")
    return _begun(study)


def _begun(study: Study) -> nn.Module:
    model = _built(study)
    if study.model.pretrained is not None:
        take_pretrained(model, study.model.pretrained)
    return model


def _built(study: Study) -> nn.Module:
    data, outputs = study.data, study.task.outputs
    match study.model:
        case LogisticRegression() if data.kind in ("table", "fingerprint"):
            return tabular.logistic_regression(math.prod(data.shape), outputs)
        case Mlp(hidden=hidden) if data.kind in ("table", "fingerprint"):
            return tabular.mlp(math.prod(data.shape), outputs, list(hidden))
        case Cnn() as chosen if data.image is not None and data.kind == "image":
            return convolutional.cnn(
                data.image.height,
                data.image.width,
                outputs,
                list(chosen.channels),
                chosen.first_stride,
                chosen.groups,
                chosen.head,
            )
        case ResNet() as chosen if data.image is not None and data.kind == "image":
            return residual.resnet(
                data.image.height,
                data.image.width,
                outputs,
                list(chosen.channels),
                chosen.blocks,
                chosen.first_stride,
                chosen.groups,
                chosen.head,
            )
        case Cnn3d() as chosen if data.kind == "volume":
            return volumetric.cnn3d(outputs, list(chosen.channels), chosen.first_stride, chosen.groups, chosen.head)
        case MultiView() as chosen if data.kind == "views":
            size = chosen.attention_size
            return multi_view.multi_view(
                outputs, list(chosen.channels), chosen.first_stride, chosen.groups, chosen.head, chosen.pooling, size
            )
        case Recurrent() as chosen if data.series is not None:
            return recurrent.Recurrent(
                chosen.name,
                len(data.series.variables),
                data.inputs,
                outputs,
                chosen.hidden_size,
                chosen.layers,
                chosen.summaries,
                both_ways=chosen.bidirectional is True,
                decay=chosen.decay is True,
            )
        case Summaries() if data.series is not None:
            return summaries.SeriesSummaries(len(data.series.variables), data.inputs, outputs)
        case Transformer() as chosen:
            return _transformer(chosen, data, outputs)
        case TextBag() if data.text is not None and data.text.tokens != "given-words":
            return text_bag.TextBag(data.text.buckets + 1, outputs)
        case TextCnn() as chosen if data.text is not None:
            widths = list(chosen.widths)
            return text_cnn.TextCnn(data.text.buckets + 1, outputs, chosen.embedding_size, widths, chosen.channels)
        case Tagger() as chosen if data.text is not None:
            parts = (chosen.embedding_size, chosen.hidden_size, list(chosen.dilations))
            return tagger.Tagger(data.text.buckets + 1, WORD_PARTS, outputs, *parts)
        case MessagePassing() as chosen if data.molecule is not None:
            return graph.MessagePassing(outputs, chosen.hidden_size, chosen.layers)
        case Autoencoder(name="autoencoder") as chosen if data.kind == "table":
            return autoencoder.Autoencoder(data.inputs, list(chosen.hidden), chosen.latent)
        case Autoencoder() as chosen if data.kind == "table":
            return autoencoder.VariationalAutoencoder(data.inputs, list(chosen.hidden), chosen.latent)
        case TwoArm() as chosen if data.kind == "table":
            return two_arm.TwoArm(data.inputs, list(chosen.hidden), list(chosen.arm_hidden))
        case Fusion() as chosen if data.mixed is not None:
            sizes = (chosen.width, chosen.embedding_size, list(chosen.image_channels), chosen.groups)
            return fusion.fusion(data, outputs, chosen.how, *sizes)
        case Own() as chosen:
            return own_models.make(chosen, data, outputs)
    raise ConfigError(203, f"model {study.model.name} does not take records of kind {data.kind}", "choose another")


def is_rowwise(study: Study) -> bool:
    """Whether the model adds up record by record and is trained in float64, in batches of any size.

    Else it uses torch's kernels and is trained in float32, in batches of one fixed shape.
    """
    return isinstance(study.model, LogisticRegression | Mlp | Autoencoder | TwoArm)


def _transformer(chosen: Transformer, data: DataContract, outputs: int) -> nn.Module:
    size = (chosen.embedding_size, chosen.heads, chosen.layers, chosen.feedforward_size)
    if data.text is not None:
        return transformer.TextTransformer(data.text.buckets + 1, outputs, *size)
    if data.events is not None:
        return transformer.EventTransformer(data.events.tokens, outputs, *size)
    if data.series is not None:
        _, channels = data.shape
        return transformer.SeriesTransformer(channels, 2 * len(data.series.variables), outputs, *size)
    raise ConfigError(203, f"model {chosen.name} does not take records of kind {data.kind}", "choose another")
