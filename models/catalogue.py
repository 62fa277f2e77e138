"""The closed table of models: a study names one, a hospital builds it from code it installed itself."""

from __future__ import annotations

import torch
from torch import nn

from medfed.data_contract import DataContract
from medfed.errors import ConfigError
from medfed.model_choice import Cnn, LogisticRegression, Mlp, Recurrent, Transformer
from medfed.models import convolutional, recurrent, tabular, transformer
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
        outline = _built(study)
    require_separable(outline)
    size = sum(weight.numel() for weight in outline.parameters())
    if size > MOST_PARAMETERS:
        raise ConfigError(203, f"model of {size} parameters, at most {MOST_PARAMETERS}", "choose a smaller one")
    return _built(study)


def _built(study: Study) -> nn.Module:
    data, outputs = study.data, study.task.outputs
    match study.model:
        case LogisticRegression() if data.kind == "table":
            return tabular.logistic_regression(data.inputs, outputs)
        case Mlp(hidden=hidden) if data.kind == "table":
            return tabular.mlp(data.inputs, outputs, list(hidden))
        case Cnn() as chosen if data.image is not None:
            return convolutional.cnn(
                data.image.height,
                data.image.width,
                outputs,
                list(chosen.channels),
                chosen.first_stride,
                chosen.groups,
                chosen.head,
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
            )
        case Transformer() as chosen:
            return _transformer(chosen, data, outputs)
    raise ConfigError(203, f"model {study.model.name} does not take records of kind {data.kind}", "choose another")


def is_rowwise(study: Study) -> bool:
    """Whether the model adds up record by record and is trained in float64, in batches of any size.

    Else it uses torch's kernels and is trained in float32, in batches of one fixed shape.
    """
    return isinstance(study.model, LogisticRegression | Mlp)


def _transformer(chosen: Transformer, data: DataContract, outputs: int) -> nn.Module:
    size = (chosen.embedding_size, chosen.heads, chosen.layers, chosen.feedforward_size)
    if data.text is not None:
        return transformer.TextTransformer(data.text.buckets + 1, outputs, *size)
    if data.series is not None:
        _, channels = data.shape
        return transformer.SeriesTransformer(channels, 2 * len(data.series.variables), outputs, *size)
    raise ConfigError(203, f"model {chosen.name} does not take records of kind {data.kind}", "choose another")
