"""The closed table of models: a study names one, a hospital builds it from code it installed itself."""

from __future__ import annotations

from torch import nn

from medfed.errors import ConfigError
from medfed.models.tabular import logistic_regression, mlp
from medfed.study import Study


def build(study: Study) -> nn.Module:
    """The study's model with freshly initialised weights: records [n, *study.data.shape] -> logits float[n, outputs]."""
    outputs = study.task.outputs
    match study.model.name:
        case "logistic-regression":
            return logistic_regression(study.data.inputs, outputs)
        case "mlp":
            return mlp(study.data.inputs, outputs, list(study.model.hidden))
    raise ConfigError(203, f"model {study.model.name} is not built yet", "choose another")
