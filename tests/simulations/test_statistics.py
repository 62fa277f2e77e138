"""Statistics before round 1, end to end: a rehearsal, its baseline and its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medfed import standardization
from medfed.models import catalogue, parameters
from medfed.seams import system_seams
from medfed.server.planning import TaskFile, load_task
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.outcome import score_cohort
from medfed.simulations.pooled import pooled_records, score, train_pooled
from medfed.simulations.rehearsal import Rehearsal, rehearse
from medfed.study import Statistics


def far_off(statistics: Statistics | None) -> TaskFile:
    """The breast cancer task with constants from a guess that is wrong: centers at the least value, scales the whole range."""
    task = load_task(system_seams().files, "breast-cancer")
    features = [
        feature.model_copy(update={"center": feature.minimum, "scale": feature.maximum - feature.minimum})
        for feature in task.data.features
    ]
    data = task.data.model_copy(update={"features": features})
    training = task.training.model_copy(update={"rounds": 6, "spare_attempts": 1, "average_last_rounds": 2})
    return task.model_copy(update={"data": data, "training": training, "statistics": statistics})


ASKED = Statistics(noise_multiplier=4.0, attempts=2, least_scale=0.02)


def test_without_noise_statistics_make_up_for_wrong_constants(quick_folder: Path) -> None:
    """Nobody's noise: the statistics are those of the training patients, and the model learns in few rounds."""
    seams, scores = system_seams(), []
    for number, statistics in enumerate((None, ASKED)):
        cohort = replace(load_cohort(seams.files, "breast-cancer", 1, 4), task=far_off(statistics))
        done = rehearse(quick_folder / f"exact-{number}", cohort, Rehearsal(None, "local", seed=1), seams)
        scores.append(score_cohort(cohort, done.assignment.study, done.weights))
    assert done.checkpoint.state.completed_rounds == 7
    study = done.assignment.study
    training = pooled_records([hospital.training.encode(study) for hospital in cohort.hospitals])
    found, features = done.checkpoint.state.statistics, standardization.count(study)
    np.testing.assert_allclose(found[:features], training.inputs.mean(axis=0), rtol=1e-3, atol=1e-4)
    least = 0.02 * 0.5  # of halves of a range that is one unit of the encoded inputs
    np.testing.assert_allclose(found[features:], np.maximum(training.inputs.std(axis=0), least), rtol=1e-2, atol=1e-4)
    assert scores[0].metrics["accuracy"] < 0.8 < 0.9 < scores[1].metrics["accuracy"]
    assert scores[1].metric >= 0.98


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_private_statistics_leave_a_model_that_stands_alone(quick_folder: Path, mode: str) -> None:
    """Within epsilon, in both modes; the released file needs nothing beside it."""
    seams = system_seams()
    cohort = replace(load_cohort(seams.files, "breast-cancer", 1, 4), task=far_off(ASKED))
    done = rehearse(quick_folder / f"private-{mode}", cohort, Rehearsal(8.0, mode, seed=1), seams)
    plan, study = done.assignment.plan, done.assignment.study
    assert (plan.statistics_words, plan.words, plan.ring_words) == (61, 31, 61)
    assert 7.9 < plan.epsilon <= 8.0
    assert plan.mechanism.once
    assert [record.round for record in done.checkpoint.records] == list(range(1, 8))
    assert len({record.upload_bytes for record in done.checkpoint.records}) == 1
    held = {
        (
            quick_folder / f"private-{mode}" / hospital.name / "studies" / study.hash().hex() / "model.safetensors"
        ).read_bytes()
        for hospital in cohort.hospitals
    }
    assert len(held) == 1
    weights = parameters.from_safetensors(catalogue.build(study), held.pop())
    assert weights.tobytes() == done.weights.tobytes()
    area = score_cohort(cohort, study, weights).metric
    assert area is not None
    assert area >= (0.85 if mode == "local" else 0.95)


def test_baseline_uses_exact_statistics(quick_folder: Path) -> None:
    seams = system_seams()
    cohort = replace(load_cohort(seams.files, "breast-cancer", 1, 4), task=far_off(ASKED))
    done = rehearse(quick_folder / "baseline", cohort, Rehearsal(None, "local", seed=1), seams)
    study = done.assignment.study
    training = pooled_records([hospital.training.encode(study) for hospital in cohort.hospitals])
    test = pooled_records([hospital.test.encode(study) for hospital in cohort.hospitals])
    pooled = train_pooled(study, done.assignment.first.weights, training)
    assert pooled is not None
    scored = score(study, pooled.weights, test)
    assert scored is not None and scored >= 0.98
