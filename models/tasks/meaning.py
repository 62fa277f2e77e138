"""What there is to know of a kind of task, whoever asks: training, scoring, prediction, the coordinator's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed.data_contract import DataContract

Losses = Callable[[Tensor, Tensor], Tensor]
Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Scores = dict[str, float | None]


class Meaning(Protocol):
    """A task, made of a study's public constants alone.

    Labels are int64[n, ...], whatever they stand for; a model's outputs float[n, ...].
    """

    @property
    def primary(self) -> str:
        """The metric that stands for the task; more is better."""
        ...

    @property
    def chance(self) -> float:
        """What guessing reaches of it."""
        ...

    def labels(self, data: DataContract, columns: Mapping[str, Sequence[str]], rows: Sequence[int]) -> Labels:
        """Raw text columns -> labels. Raises ``DataError`` MF-301 that names row and column, never a value."""
        ...

    def unlabelled(self, data: DataContract, count: int) -> Labels:
        """In place of the labels of ``count`` records that have none."""
        ...

    def made_up_labels(self, data: DataContract, generator: torch.Generator, count: int) -> Tensor:
        """Possible labels without any meaning, to try a computation out."""
        ...

    def strata(self, labels: Labels) -> Labels:
        """int64[n] >= 0: what splits should keep in balance, such as the class."""
        ...

    def losses(self) -> Losses:
        """(outputs, labels) -> float[n], each record's own loss.

        *Guarantee*: the gradient by a record's outputs is a function of that record alone, to the last bit.
        """
        ...

    def plain_losses(self) -> Losses:
        """The same numbers by torch's own gradients, for training without privacy."""
        ...

    def predictions(self, outputs: Floats) -> Floats:
        """What a model's outputs say, float64[n, ...], each record's of its own."""
        ...

    def metrics(self, predictions: Floats, labels: Labels) -> Scores:
        """By name, the primary one among them; None where undefined."""
        ...
