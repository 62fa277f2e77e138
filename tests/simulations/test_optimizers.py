"""Steps that know of the noise and the average over all rounds, in whole runs, and a baseline without noise beside them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from medfed.advance import advance, first_state, released_weights
from medfed.client.approval import load_approved
from medfed.client.approved import Approved
from medfed.client.ledger import Ledger
from medfed.models import parameters
from medfed.models.records import Records
from medfed.seams import system_seams
from medfed.server.planning import TaskFile, load_task
from medfed.server.study_file import render
from medfed.simulations import pooled
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.entropy import SeededEntropy
from medfed.simulations.outcome import score_cohort
from medfed.simulations.plain_training import SharedAdvance, plain_update
from medfed.simulations.rehearsal import Rehearsal, Rehearsed, no_noise, rehearse
from medfed.study import Training

ADAM_BC = {"kind": "dp-adambc", "beta1": 0.9, "beta2": 0.99, "floor": 1e-3}
AVERAGE = {"kind": "momentum", "momentum": 0.0}


def breast_cancer(**changes: object) -> TaskFile:
    task = load_task(system_seams().files, "breast-cancer")
    training = {
        "aggregate": "gradient",
        "rounds": 8,
        "spare_attempts": 2,
        "learning_rates": [[1, 0.1]],
        "average_last_rounds": 1,
        "ema_decay": 0.7,
        "server_step": ADAM_BC,
        **changes,
    }
    return task.model_copy(update={"training": Training.model_validate(training)})


def rehearsed(folder: Path, task: TaskFile, plan: Rehearsal) -> tuple[Rehearsed, float]:
    seams = system_seams()
    cohort = replace(load_cohort(seams.files, "breast-cancer", 1, 5), task=task)
    done = rehearse(folder, cohort, plan, seams)
    area = score_cohort(cohort, done.assignment.study, done.weights).metric
    assert area is not None
    return done, area


# ------------------------------------------------------------------------------------------------------------ whole runs


def test_corrected_steps_and_moving_average_learn_at_epsilon_3(quick_folder: Path) -> None:
    """Hospitals and coordinator each take off the noise of those who survive, one fewer in round 3: else they would part."""
    task = breast_cancer()
    lost = load_cohort(system_seams().files, "breast-cancer", 1, 5).hospitals[3].name
    plan = Rehearsal(3.0, "distributed", drop_outs=1, absences=((lost, frozenset({3})),), seed=1)
    done, area = rehearsed(quick_folder / "dp-adambc", task, plan)
    state, study = done.checkpoint.state, done.assignment.study
    assert state.completed_rounds == 8
    assert study.training.server_step.kind == "dp-adambc"
    expected = state.tail.astype(np.float64) / (1.0 - 0.7**8)
    np.testing.assert_allclose(done.weights, expected, rtol=1e-6)
    assert np.abs(done.weights - state.weights).max() > 1e-3
    assert area >= 0.97  # without privacy 0.997


@pytest.mark.parametrize(
    ("step", "rate"), [({"kind": "momentum", "momentum": 0.5}, 0.5), ({**ADAM_BC, "floor": 1e-2}, 0.1)], ids=["m", "bc"]
)
def test_rules_of_local_steps_learn_at_epsilon_8(quick_folder: Path, step: dict[str, object], rate: float) -> None:
    local = {"steps": 3, "learning_rate": rate, "proximal": 0.0, "step": step}
    task = breast_cancer(
        aggregate="update", rounds=5, learning_rates=[[1, 1.0]], server_step=AVERAGE, ema_decay=None, local=local
    )
    done, area = rehearsed(quick_folder / f"local-{step['kind']}", task, Rehearsal(8.0, "local", seed=1))
    assert (done.assignment.plan.events_per_attempt, done.assignment.plan.attempts) == (3, 7)
    assert area >= 0.97


def test_run_without_noise_takes_none_off(quick_folder: Path) -> None:
    """The study that all sides hold says Adam, and a study given as it stands is treated alike."""
    done, area = rehearsed(quick_folder / "noiseless", breast_cancer(), Rehearsal(None, "local", seed=1))
    rule = done.assignment.study.training.server_step
    assert rule.model_dump() == {"kind": "adam", "beta1": 0.9, "beta2": 0.99, "stabilizer": math.sqrt(1e-3)}
    assert area >= 0.97
    private, _ = rehearsed(quick_folder / "given-first", breast_cancer(), Rehearsal(8.0, "local", seed=1))
    cohort = load_cohort(system_seams().files, "breast-cancer", 1, 5)
    given = private.assignment.study
    assert "dp-adambc" in render(given)
    again = rehearse(quick_folder / "given-average", cohort, Rehearsal(None, "local", seed=1), system_seams(), given)
    assert again.assignment.study.training.server_step == rule


def test_shared_server_step_tells_noises_apart(make_study) -> None:
    study = make_study({"training.server_step": ADAM_BC})
    shared, state = SharedAdvance(), first_state(np.zeros(5, np.float32), study)
    total = np.arange(5)
    for variance in (0.0, 3.0, 0.0):
        settings = {"grid_exponent": 3, "nominal_patients": 9, "noise_variance": variance}
        own = advance(state, total, study, **settings)
        assert shared(state, total, study, **settings).weights.tobytes() == own.weights.tobytes()


# --------------------------------------------------------------------------------------------------------- without noise


@pytest.fixture
def approved(make_world) -> Approved:
    """A hospital of seven patients, all of them in every step."""
    world = make_world(
        (
            'aggregate = "gradient"',
            'aggregate = "update"\nlocal = { steps = 5, learning_rate = 0.1, proximal = 0.25, step = '
            '{ kind = "momentum", momentum = 0.5 } }',
        ),
        ("sampling_rate = 0.5", "sampling_rate = 1.0"),
        ("max_records_per_patient = 2", "max_records_per_patient = 3"),
    )
    site = world.site(2)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        return load_approved(site, world.study_hash, ledger)


@pytest.mark.parametrize("kind", ["momentum", "dp-adambc"])
def test_plain_steps_follow_the_rule(approved: Approved, kind: str) -> None:
    """The baseline without privacy makes the same steps: momentum is torch's own, DP-AdamBC has nothing to take off."""
    if kind == "dp-adambc":
        training = approved.study.training.model_dump()
        training["local"]["step"] = {"kind": kind, "beta1": 0.5, "beta2": 0.75, "floor": 1e-4}
        changed = approved.study.model_copy(update={"training": Training.model_validate(training)})
        approved = replace(approved, study=changed)
    start = np.random.default_rng(1).normal(size=approved.plan.words).astype(np.float32)
    update = plain_update(approved, start, SeededEntropy(1, "x"), no_noise)
    records, model = approved.patients.records, copy.deepcopy(approved.model)
    parameters.assign(model, start)
    trained = list(model.parameters())
    first = [weight.detach().clone() for weight in trained]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.5)
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in trained]
    people = sorted(set(records.patients))
    for number in range(1, 6):
        optimizer.zero_grad()
        logits = model(torch.from_numpy(records.inputs))[:, 0]
        losses = functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(records.labels).float(), reduction="none"
        )
        means = [losses[[owner == patient for owner in records.patients]].mean() for patient in people]
        (sum(means) / len(people)).backward()
        pulls = [0.25 * (weight.detach() - before) for weight, before in zip(trained, first, strict=True)]
        with torch.no_grad():
            if kind == "momentum":
                optimizer.step()
            else:
                for weight, (one, two) in zip(trained, moments, strict=True):
                    one.mul_(0.5).add_(0.5 * weight.grad)
                    two.mul_(0.75).add_(0.25 * weight.grad**2)
                    spread = (two / (1 - 0.75**number)).clamp(min=1e-4)
                    weight -= 0.1 * one / (1 - 0.5**number) / spread.sqrt()
            for weight, pull in zip(trained, pulls, strict=True):
                weight -= 0.1 * pull
    assert np.abs(update).max() > 0.05
    np.testing.assert_allclose(update, parameters.flatten(model).astype(np.float64) - start, rtol=0, atol=1e-5)


def test_pooled_moving_average_goes_on_from_length_to_length(make_study) -> None:
    """One training run stands for several lengths: each one's average is over all rounds up to it."""
    study = make_study(
        {
            "training.server_step": ADAM_BC,
            "training.learning_rates": [[1, 0.05]],
            "training.average_last_rounds": 1,
            "training.ema_decay": 0.8,
        }
    )
    rng = np.random.default_rng(5)
    records = Records(
        rng.normal(size=(40, 3)).astype(np.float32), rng.integers(0, 2, 40), tuple(f"p{row}" for row in range(40))
    )
    first = np.zeros(4, np.float32)
    together = pooled._path(study, first, records, (2, 5, 9))
    for rounds, weights in zip((2, 5, 9), together, strict=True):
        alone = pooled._path(study, first, records, (rounds,))[0]
        assert weights.tobytes() == alone.tobytes()
        assert np.isfinite(weights).all()
    last = first_state(first, study)
    assert released_weights(last, study).tobytes() == first.tobytes()
