"""What a prediction of survival, of the unusual and of an effect is called, and what must be said with it."""

from __future__ import annotations

import numpy as np

from medfed.client.prediction import names_of
from medfed.models.tasks import meaning
from medfed.task_choice import Effect, Reconstruction, Survival, Task, cautions


def named(task: Task, outputs: int) -> list[str]:
    found = meaning(task).predictions(np.zeros((2, outputs)))
    names = names_of(task, found.shape[1:])
    assert len(names) == found.shape[1]
    return names


def test_survival_is_named_by_its_edges() -> None:
    keys = {"kind": "survival", "time": "days", "event": "died", "unit": "days", "edges": [365.0, 730.0]}
    expected = ["without_event_at_365_days", "without_event_at_730_days"]
    assert named(Survival.model_validate({**keys, "head": "hazard"}), 2) == expected
    assert named(Survival.model_validate({**keys, "head": "weibull", "shape": 1.0}), 1) == expected


def test_anomaly_score_stands_before_the_latent_numbers() -> None:
    task = Reconstruction(kind="reconstruction", divergence=0.0)
    assert named(task, 2 + 3) == ["anomaly_score", "latent_1", "latent_2", "latent_3"]
    assert "not what is wrong with it" in cautions(task)[0]


def test_effect_is_named_by_its_treatment_and_carries_its_assumptions() -> None:
    task = Effect(
        kind="effect", outcome="died", treatment="fluids", assumptions="Nobody was chosen by what is not here."
    )
    assert named(task, 2) == ["probability_without_fluids", "probability_with_fluids", "effect_of_fluids"]
    assert cautions(task) == ["Assumptions: Nobody was chosen by what is not here."]
