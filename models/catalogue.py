"""The closed table of models: a study names one, a hospital builds it from code it installed itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from medfed.models.tabular import logistic_regression, mlp
from medfed.study import Study

_Constructor = Callable[[int, int, list[int]], nn.Module]

CATALOGUE: dict[str, _Constructor] = {"logistic-regression": logistic_regression, "mlp": mlp}


def build(study: Study) -> nn.Module:
    """The study's model with freshly initialised weights; inputs float32[n, p] -> logits float32[n, outputs]."""
    return CATALOGUE[study.model.name](study.data.inputs, study.task.outputs, list(study.model.hidden))
