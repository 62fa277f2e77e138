"""Records from themselves: how unusual each is, and the few numbers that it is given back from. No label is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medfed.data_contract import DataContract
from medfed.models.autoencoder import DIVERGENCE, ERROR, LATENT
from medfed.models.tasks.classification import class_labels
from medfed.models.tasks.meaning import Floats, Labels, Losses, Scores
from medfed.models.tasks.scores import auc, average_precision
from medfed.task_choice import Reconstruction


@dataclass(frozen=True, slots=True)
class ReconstructionMeaning:
    """Outputs float[n, 2 + latent] as ``models/autoencoder`` gives them; labels int64[n], 1 of an unusual record.

    *Guarantee* Labels are not trained on: no loss looks at them.
    """

    task: Reconstruction
    primary = "auc"
    chance = 0.5

    def labels(self, data: DataContract, columns: Mapping[str, Sequence[str]], rows: Sequence[int]) -> Labels:
        if self.task.label is None:
            return self.unlabelled(data, len(rows))
        return class_labels(self.task.label, 2, columns[self.task.label], rows)

    def unlabelled(self, data: DataContract, count: int) -> Labels:
        return np.zeros(count, np.int64)

    def made_up_labels(self, data: DataContract, generator: torch.Generator, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def strata(self, labels: Labels) -> Labels:
        return labels

    def losses(self) -> Losses:
        """The error, and ``divergence`` times the divergence."""
        weight = self.task.divergence
        return lambda outputs, labels: outputs[:, ERROR] + outputs[:, DIVERGENCE] * weight

    def plain_losses(self) -> Losses:
        return self.losses()

    def predictions(self, outputs: Floats) -> Floats:
        """The anomaly score, which is the loss, and behind it the latent numbers: float64[n, 1 + latent]."""
        score = outputs[:, ERROR] + self.task.divergence * outputs[:, DIVERGENCE]
        return np.concatenate([score[:, None], outputs[:, LATENT:]], axis=1)

    def metrics(self, predictions: Floats, labels: Labels) -> Scores:
        """``auc`` and ``auprc`` of the score against the label, and ``error``, the mean score of the usual records."""
        unusual, scores = labels == 1, anomaly_scores(predictions)
        usual = scores[~unusual]
        return {
            "auc": auc(unusual, scores),
            "auprc": average_precision(unusual, scores),
            "error": float(usual.mean()) if len(usual) else None,
        }


def anomaly_scores(predictions: Floats) -> Floats:
    """float64[n]: more is more unusual."""
    return np.asarray(predictions[:, 0], np.float64)


def representation(predictions: Floats) -> Floats:
    """float64[n, latent]: the reduced representation of each record."""
    return np.asarray(predictions[:, 1:], np.float64)
