"""What ``study check`` says of the steps that a study takes."""

from __future__ import annotations

import math

import pytest

from medfed.server.explain import check, in_words
from medfed.server.planning import Decisions, load_task, plan_study
from medfed.study import Study, Training

DECISIONS = Decisions("a", "2099-12-31", 8.0, 1e-3, "local", "patient", 1)
ADAM_BC = {"kind": "dp-adambc", "beta1": 0.9, "beta2": 0.99, "floor": 1e-4}
MOMENTUM = {"kind": "momentum", "momentum": 0.5}


def planned(world, template: str, **changes: object) -> Study:
    task = load_task(world.base.files, template)
    values = {**task.training.model_dump(), **changes}
    wanted = task.model_copy(update={"training": Training.model_validate(values)})
    return plan_study(wanted, DECISIONS, world.assignment.roster)[0]


def test_check_names_step_and_average(world) -> None:
    study = planned(world, "example", server_step=ADAM_BC, ema_decay=0.9, average_last_rounds=1)
    checked = check(study, world.assignment.roster, 0.0)
    assert checked["server_step"] == "dp-adambc (beta1 0.9, beta2 0.99, floor 0.0001)"
    assert checked["local_step"] is None
    assert "the exponential moving average over all rounds (decay 0.9)" in "\n".join(in_words(checked))
    plain = check(planned(world, "example"), world.assignment.roster, 0.0)
    assert (plain["server_step"], plain["released"]) == ("momentum (momentum 0.9)", "the mean over the last 5 rounds")
    last = check(planned(world, "example", average_last_rounds=1), None, 0.0)
    assert last["released"] == "the model after the last round"


@pytest.mark.parametrize("step", [None, MOMENTUM, ADAM_BC], ids=["plain", "momentum", "dp-adambc"])
def test_noise_of_an_update_is_that_of_its_steps(world, step: dict[str, object] | None) -> None:
    local = {"steps": 4, "learning_rate": 0.5, "proximal": 0.0, "step": step}
    study = planned(world, "example-update", local=local)
    checked, roster = check(study, world.assignment.roster, 0.0), world.assignment.roster
    if step == ADAM_BC:
        assert checked["noise_sd_of_mean"] is None, "it depends on the data"
        assert "these steps follow dp-adambc" in "\n".join(in_words(checked))
        return
    reach = [1.0, 1.0, 1.0, 1.0] if step is None else [1.0, 1.5, 1.75, 1.875]
    of_a_step = study.privacy.noise_multiplier * study.privacy.clipping_norm * math.sqrt(len(roster.hospitals))
    expected = of_a_step / (study.privacy.sampling_rate * roster.nominal_patients) * 0.5 * math.hypot(*reach)
    assert checked["noise_sd_of_mean"] == pytest.approx(expected, rel=1e-3)
    assert (checked["local_step"] is None) == (step is None)
