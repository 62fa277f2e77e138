"""The closed table of models: what a study may name, and nothing that would couple patients."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from medfed.models.catalogue import CATALOGUE, build
from medfed.models.parameters import count, flatten
from medfed.privacy.gradients.opacus_engine import clipped_sum
from medfed.study import ModelChoice, Study

MakeStudy = Callable[..., Study]
CHOICES: dict[str, dict[str, object]] = {
    "logistic-regression": {"model.name": "logistic-regression", "model.hidden": []},
    "mlp": {"model.name": "mlp", "model.hidden": [8, 4]},
}


def test_catalogue_is_what_a_study_may_name() -> None:
    assert set(CATALOGUE) == set(get_args(ModelChoice.model_fields["name"].annotation)) == set(CHOICES)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("kind", "classes", "outputs"), [("binary", 2, 1), ("multiclass", 5, 5)])
def test_model_takes_records_and_gives_logits(
    make_study: MakeStudy, name: str, kind: str, classes: int, outputs: int
) -> None:
    study = make_study({**CHOICES[name], "task.kind": kind, "task.classes": classes})
    assert build(study)(torch.zeros(6, study.data.inputs)).shape == (6, outputs)


def test_sizes_are_the_layers(make_study: MakeStudy) -> None:
    assert count(build(make_study(CHOICES["logistic-regression"]))) == 3 + 1
    assert count(build(make_study(CHOICES["mlp"]))) == 3 * 8 + 8 + 8 * 4 + 4 + 4 + 1


def test_logistic_regression_begins_at_zero(make_study: MakeStudy) -> None:
    assert not flatten(build(make_study())).any()


@pytest.mark.parametrize("name", CHOICES)
def test_model_holds_parameters_only(make_study: MakeStudy, name: str) -> None:
    """No buffer: statistics of patients have no place to hide in (threats.md, T21)."""
    assert list(build(make_study(CHOICES[name])).buffers()) == []


@pytest.mark.parametrize("name", CHOICES)
def test_model_can_be_clipped_by_patient(make_study: MakeStudy, name: str) -> None:
    """Every model of the catalogue passes through the gradient engine; a record's outputs depend on it alone."""
    torch.manual_seed(3)
    model = build(make_study(CHOICES[name]))
    inputs = torch.randn(6, 3)
    alone = torch.cat([model(inputs[i : i + 1]) for i in range(6)])
    assert torch.allclose(model(inputs), alone, atol=1e-6)
    total = clipped_sum(
        model,
        lambda logits, labels: nn.functional.softplus(logits[:, 0]) * (1 + labels),
        inputs,
        torch.zeros(6, dtype=torch.int64),
        np.arange(6),
        6,
        0.01,
    )
    assert total.shape == (count(model),)
    assert 0 < np.linalg.norm(total) <= 0.06
