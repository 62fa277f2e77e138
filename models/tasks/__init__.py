"""What a task means: its labels, its loss per record, what is predicted, its metrics. Every loss here is a sum over records.

One module a kind; ``meaning`` finds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medfed.errors import UnsupportedModel
from medfed.models.tasks.classification import ClassificationMeaning
from medfed.models.tasks.effect import EffectMeaning
from medfed.models.tasks.meaning import Floats, Labels, Losses, Meaning, Scores
from medfed.models.tasks.multilabel import MultiLabelMeaning
from medfed.models.tasks.reconstruction import ReconstructionMeaning
from medfed.models.tasks.survival import SurvivalMeaning
from medfed.models.tasks.tagging import TaggingMeaning
from medfed.task_choice import Classification, Effect, MultiLabel, Reconstruction, Survival, Tagging, Task

if TYPE_CHECKING:
    from medfed.models.records import Records

_VALUES_AT_ONCE = 1 << 17  # encoded values that a model takes in one call outside training

SEPARABLE_LOSSES: dict[str, str] = {
    "binary": "cross-entropy of a record's own logit and label, times a public weight",
    "multiclass": "cross-entropy of a record's own logits and label, times a public weight",
    "multilabel": "mean of cross-entropies of a record's own log-odds and known findings, times public weights",
    "tagging": "mean over a record's own words of cross-entropies of their own logits and tags, times public weights",
    "survival": "minus log likelihood of a record's own time by its own hazards, or its own Weibull scale and shape",
    "reconstruction": "squared distance of a record's own values from what is given back, and its own latent divergence",
    "effect": "cross-entropy of a record's own outcome and the logit of the arm that it was in",
}
"""Every loss by kind of task, and why it keeps patients apart (``models/separability`` says what that means)."""


def meaning(task: Task) -> Meaning:
    """Raises ``UnsupportedModel`` (MF-160) for a kind of task whose loss is not known to keep patients apart."""
    if task.kind not in SEPARABLE_LOSSES:
        what = f"the loss of a {task.kind} task is not known to keep patients apart"
        raise UnsupportedModel(160, what, f"use one of {', '.join(SEPARABLE_LOSSES)}")
    match task:
        case Classification():
            return ClassificationMeaning(task)
        case MultiLabel():
            return MultiLabelMeaning(task)
        case Tagging():
            return TaggingMeaning(task)
        case Reconstruction():
            return ReconstructionMeaning(task)
        case Effect():
            return EffectMeaning(task)
        case Survival():
            return SurvivalMeaning(task)
    raise UnsupportedModel(160, f"a {task.kind} task has no loss", f"use one of {', '.join(SEPARABLE_LOSSES)}")


def losses(task: Task) -> Losses:
    """(outputs, labels) -> float[n]: each record's own loss, separable by patient; see ``Meaning.losses``."""
    return meaning(task).losses()


def predictions(
    model: nn.Module,
    task: Task,
    inputs: NDArray[np.float32] | NDArray[np.int64],
    *,
    at_once: int | None = None,
) -> Floats:
    """What the model says of encoded records [n, ...]: float64[n, ...], of a classification the probability of each class.

    ``at_once``: how many records a call of the model takes; None for a few, to bound memory. With 1 every call has one shape, so
    that a record's predictions are the same bits whatever other records there are.
    """
    at_once = at_once or max(1, _VALUES_AT_ONCE // max(1, inputs[:1].size))
    model.eval()
    with torch.no_grad():
        # of no records one call, for the shape
        starts = range(0, len(inputs), at_once) if len(inputs) else range(1)
        parts = [model(torch.from_numpy(inputs[start : start + at_once])) for start in starts]
        outputs = torch.cat(parts).double().numpy()
    return meaning(task).predictions(outputs)


def evaluate(model: nn.Module, task: Task, records: Records) -> Scores:
    """A task's metrics on labelled records."""
    return metrics(task, predictions(model, task, records.inputs), records.labels)


def metrics(task: Task, predicted: Floats, labels: Labels) -> Scores:
    """As ``evaluate``, from what ``predictions`` gave, and the labels."""
    return meaning(task).metrics(predicted, labels)
