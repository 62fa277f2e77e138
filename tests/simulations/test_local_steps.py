"""Local steps end to end, and the training without privacy that a simulation compares them with."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from medfed.advance import advance, first_state, state_bytes
from medfed.client.approval import load_approved
from medfed.client.approved import Approved
from medfed.client.ledger import Ledger
from medfed.errors import ConfigError
from medfed.models import parameters, tasks
from medfed.privacy.keystream import Keystream
from medfed.seams import system_seams
from medfed.server.planning import TaskFile, load_task
from medfed.simulations import rehearsal
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.entropy import SeededEntropy
from medfed.simulations.outcome import score_cohort
from medfed.simulations.plain_training import SharedAdvance, _batches, plain_update
from medfed.simulations.rehearsal import Rehearsal, Rehearsed, no_noise, rehearse
from medfed.study import Training

UPDATE = ('aggregate = "gradient"', 'aggregate = "update"\nlocal = { steps = 5, learning_rate = 0.5, proximal = 0.25 }')
WHOLE = (("sampling_rate = 0.5", "sampling_rate = 1.0"), ("max_records_per_patient = 2", "max_records_per_patient = 3"))
AVERAGE = {"kind": "momentum", "momentum": 0.0}


def breast_cancer(server_step: dict[str, object], rate: float) -> TaskFile:
    """The task with three private steps a round at each hospital."""
    task = load_task(system_seams().files, "breast-cancer")
    training = Training.model_validate(
        {
            "aggregate": "update",
            "rounds": 5,
            "spare_attempts": 2,
            "learning_rates": [[1, rate]],
            "average_last_rounds": 2,
            "server_step": server_step,
            "local": {"steps": 3, "learning_rate": 1.0 if rate == 1.0 else 0.5, "proximal": 0.0},
        }
    )
    return task.model_copy(update={"training": training})


def rehearsed(folder: Path, task: TaskFile, plan: Rehearsal) -> tuple[Rehearsed, float]:
    seams = system_seams()
    cohort = replace(load_cohort(seams.files, "breast-cancer", 1, 5), task=task)
    done = rehearse(folder, cohort, plan, seams)
    area = score_cohort(cohort, done.assignment.study, done.weights).metric
    assert area is not None
    return done, area


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize(
    ("server_step", "rate"),
    [
        (AVERAGE, 1.0),
        ({"kind": "fedadagrad", "beta1": 0.0, "tau": 1e-2}, 0.3),
        ({"kind": "fedyogi", "beta1": 0.9, "beta2": 0.99, "tau": 1e-2}, 0.3),
        ({"kind": "fedadam", "beta1": 0.9, "beta2": 0.99, "tau": 1e-2}, 0.3),
    ],
    ids=["fedavg", "fedadagrad", "fedyogi", "fedadam"],
)
def test_local_steps_learn_at_epsilon_8(quick_folder: Path, server_step: dict[str, object], rate: float) -> None:
    folder = quick_folder / str(server_step["kind"])
    done, area = rehearsed(folder, breast_cancer(server_step, rate), Rehearsal(8.0, "local", seed=1))
    plan = done.assignment.plan
    assert (plan.events_per_attempt, plan.attempts) == (3, 7)
    assert 7.9 < plan.epsilon <= 8.0
    assert area >= 0.97  # without privacy 0.997


def test_the_same_seed_gives_the_same_model(quick_folder: Path) -> None:
    runs = [
        rehearsed(quick_folder / f"again-{number}", breast_cancer(AVERAGE, 1.0), Rehearsal(8.0, "local", seed=4))[0]
        for number in range(2)
    ]
    assert state_bytes(runs[0].checkpoint.state) == state_bytes(runs[1].checkpoint.state)


def test_distributed_noise_is_refused_with_the_reason(quick_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"MF-203.*clipping does not bound how far one patient moves the weights"):
        rehearsed(quick_folder / "refused", breast_cancer(AVERAGE, 1.0), Rehearsal(8.0, "distributed"))


def test_ring_holds_the_updates_that_were_made(quick_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned from public numbers alone; neither private nor plain training comes near saturation, and little is lost to
    the grid."""
    for epsilon in (8.0, None):
        sent: list[NDArray[np.float64]] = []
        real = rehearsal.local_update_of(Rehearsal(epsilon, "local"))

        def kept(
            *arguments: object, real: object = real, sent: list[NDArray[np.float64]] = sent
        ) -> NDArray[np.float64]:
            sent.append(real(*arguments))
            return sent[-1]

        monkeypatch.setattr(rehearsal, "local_update_of", lambda plan, kept=kept: kept)
        done, _ = rehearsed(
            quick_folder / f"ring-{epsilon}", breast_cancer(AVERAGE, 1.0), Rehearsal(epsilon, "local", seed=2)
        )
        monkeypatch.undo()
        assert len(sent) == 5 * 5
        largest = max(np.abs(update).max() for update in sent) / 4  # the largest hospital has less than a quarter
        bound = done.assignment.study.quantization.range
        assert 2.0**-8 * bound < largest < bound


# ------------------------------------------------------------------------------------------------------ without privacy


@pytest.fixture
def approved(make_world) -> Approved:
    """A hospital of seven patients with one to three records each, all of them used."""
    world = make_world(UPDATE, *WHOLE)
    site = world.site(2)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        return load_approved(site, world.study_hash, ledger)


def test_plain_steps_are_the_bare_loop(approved: Approved) -> None:
    """Every patient in every step: then the order of a pass plays no part."""
    start = np.random.default_rng(1).normal(size=approved.plan.words).astype(np.float32)
    update = plain_update(approved, start, SeededEntropy(1, "x"), no_noise)
    records, model = approved.patients.records, copy.deepcopy(approved.model)
    parameters.assign(model, start)
    first = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    people = sorted(set(records.patients))
    for _ in range(5):
        optimizer.zero_grad()
        logits = model(torch.from_numpy(records.inputs))[:, 0]
        losses = functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(records.labels).float(), reduction="none"
        )
        means = [losses[[owner == patient for owner in records.patients]].mean() for patient in people]
        pull = sum(((weight - before) ** 2).sum() for weight, before in zip(model.parameters(), first, strict=True))
        (sum(means) / len(people) + 0.25 / 2 * pull).backward()
        optimizer.step()
    assert np.abs(update).max() > 0.05
    np.testing.assert_allclose(update, parameters.flatten(model).astype(np.float64) - start, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rate", "cap"), [(1.0, 3), (0.5, 2), (0.34, 1), (0.1, 2)])
def test_passes_take_every_patient_once(approved: Approved, rate: float, cap: int) -> None:
    study, patients = approved.study, approved.patients
    study = study.model_copy(
        update={
            "privacy": study.privacy.model_copy(update={"sampling_rate": rate}),
            "data": study.data.model_copy(update={"max_records_per_patient": cap}),
        }
    )
    steps = round(1 / rate)
    batches = _batches(study, patients, Keystream(bytes(32)))
    orders = []
    for _ in range(3):
        rows: list[int] = []
        for chosen, shares in itertools.islice(batches, steps):
            assert float(shares.sum()) == pytest.approx(1.0 if len(chosen) else 0.0)
            rows += chosen.tolist()
        taken = np.bincount(patients.unit[rows], minlength=patients.count)
        assert taken.tolist() == np.minimum(np.bincount(patients.unit), cap).tolist()
        assert len(set(rows)) == len(rows)
        orders.append(rows)
    assert len({tuple(rows) for rows in orders}) == 3, "each pass is shuffled anew"


def test_shared_server_step_gives_the_same_bits(make_study) -> None:
    study = make_study()
    shared, rng = SharedAdvance(), np.random.default_rng(1)
    state = first_state(np.zeros(5, np.float32), study)
    for _ in range(3):
        totals = [rng.integers(-100, 100, 5).astype(np.int32) for _ in range(2)]
        answers = [
            [shared(state, total.copy(), study, grid_exponent=3, nominal_patients=9) for _ in range(3)]
            for total in totals
        ]
        for total, answer in zip(totals, answers, strict=True):
            own = advance(state, total, study, grid_exponent=3, nominal_patients=9)
            assert {state_bytes(each) for each in answer} == {state_bytes(own)}
            assert len({id(each) for each in answer}) == 1
        state = answers[1][0]


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.5]])
@pytest.mark.parametrize("classes", [2, 3])
def test_plain_losses_are_the_tasks(classes: int, weights: list[float] | None, make_study) -> None:
    weights = None if weights is None else weights[:classes]
    task = make_study().task.model_copy(
        update={"kind": "binary" if classes == 2 else "multiclass", "classes": classes, "class_weights": weights}
    )
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(9) % classes
    seen = []
    for losses in (tasks.meaning(task).plain_losses(), tasks.losses(task)):
        logits = torch.randn(9, task.outputs, generator=draw.manual_seed(1)).requires_grad_()
        values = losses(logits, labels)
        values.sum().backward()
        seen.append((values.detach().numpy(), logits.grad.numpy()))
    for one, other in zip(*seen, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_plain_training_serves_runs_without_noise_only() -> None:
    assert rehearsal.local_update_of(Rehearsal(None, "local")) is plain_update
    assert rehearsal.local_update_of(Rehearsal(8.0, "local")) is not plain_update
