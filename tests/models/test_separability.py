"""What is not known to keep patients apart is refused by name, with the way out, before a gradient is taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medfed.client.trainer import gradient_sum, number_patients
from medfed.errors import UnsupportedModel
from medfed.models import catalogue, tasks
from medfed.models.records import Records
from medfed.models.rowwise import RowLinear
from medfed.models.separability import SEPARABLE_LAYERS, require_separable
from medfed.study import Study

MakeStudy = Callable[..., Study]


class Centred(nn.Module):
    """Subtracts the batch's mean: couples patients without a parameter or buffer that would show it."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(0)


class KindOfBatchNorm(nn.BatchNorm2d):
    """Renamed."""


class KindOfLinear(nn.Linear):
    """A subclass may do anything."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs - inputs.mean(0))


REFUSED: list[tuple[nn.Module, str]] = [
    (nn.BatchNorm1d(48), r"BatchNorm1d mixes patients: use LayerNorm\(48\)"),
    (nn.BatchNorm2d(48), r"BatchNorm2d mixes patients: use GroupNorm\(16, 48\)"),
    (nn.BatchNorm3d(64), r"BatchNorm3d mixes patients: use GroupNorm\(32, 64\)"),
    (nn.SyncBatchNorm(32), r"SyncBatchNorm mixes patients: use GroupNorm\(32, 32\)"),
    (nn.BatchNorm2d(8, track_running_stats=False), r"BatchNorm2d mixes patients"),
    (KindOfBatchNorm(8), r"KindOfBatchNorm mixes patients: use GroupNorm\(8, 8\)"),
    (nn.InstanceNorm2d(8, track_running_stats=True), r"InstanceNorm2d mixes patients: use GroupNorm\(8, 8\)"),
    (Centred(), r"Centred is not known to keep patients apart: use a layer of medfed/models/separability.py"),
    (KindOfLinear(8, 8), r"KindOfLinear is not known to keep patients apart"),
    # over the first dimension unless told otherwise, which is the batch
    (nn.MultiheadAttention(8, 2), r"MultiheadAttention is not known"),
    (nn.LSTM(8, 8), r"LSTM is not known"),
    (nn.Flatten(0), r"Flatten with start_dim = 0 mixes patients: use start_dim = 1"),
    (nn.Embedding(4, 2, max_norm=1.0), r"Embedding with max_norm = 1.0 mixes patients: use max_norm = None"),
    (nn.Embedding(4, 2, scale_grad_by_freq=True), r"Embedding with scale_grad_by_freq = True mixes patients"),
]


@pytest.mark.parametrize(("layer", "line"), REFUSED, ids=lambda value: str(value)[:28])
def test_layer_that_may_mix_patients_is_refused_by_name(layer: nn.Module, line: str) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(layer))
    with pytest.raises(UnsupportedModel, match=rf"MF-160 1\.0: {line}"):
        require_separable(model)
    with pytest.raises(UnsupportedModel, match=rf"MF-160 the model: {line}"):
        require_separable(layer)


def test_study_whose_model_mixes_patients_is_not_built(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault, as it would come with a new model: neither approved nor started, as both build it."""

    def with_centring(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(Centred(), RowLinear(inputs, outputs))

    monkeypatch.setattr(catalogue.tabular, "logistic_regression", with_centring)
    with pytest.raises(UnsupportedModel, match="MF-160 0: Centred is not known to keep patients apart"):
        catalogue.build(make_study())


def test_no_gradient_is_taken_of_a_model_that_mixes_patients(make_study: MakeStudy) -> None:
    """Whoever hands it to the trainer: the engine's hooks alone would let this one pass."""
    study = make_study({"privacy.sampling_rate": 1.0})
    model = nn.Sequential(Centred(), RowLinear(3, 1))
    patients = number_patients(study, Records(np.eye(3, dtype=np.float32), np.zeros(3, np.int64), ("a", "b", "c")))
    with pytest.raises(UnsupportedModel, match="MF-160 0: Centred"):
        gradient_sum(study, model, np.zeros(4, np.float32), patients, sampling_key=bytes(64))


def test_trust_document_names_the_layers_of_the_list() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "trust.md").read_text()
    section = text[text.index("## What one patient can move") :]
    listed = section[: section.index("The list is")]
    assert set(re.findall(r"`([A-Z]\w+)`", listed)) == {kind.__name__ for kind in SEPARABLE_LAYERS}


def test_loss_of_an_unknown_task_is_refused(make_study: MakeStudy) -> None:
    """Else it would be trained with whatever loss comes last in the code."""
    task = make_study().task.model_copy(update={"kind": "guesswork"})
    with pytest.raises(
        UnsupportedModel, match="MF-160 the loss of a guesswork task is not known to keep patients apart"
    ):
        tasks.losses(task)
    assert tasks.losses(make_study().task)(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)).shape == (2,)
