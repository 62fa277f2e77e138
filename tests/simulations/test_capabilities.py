"""The catalogue's contract: every row trains privately in a federation, beats what guessing reaches, and explains itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medfed.errors import ExitStatus, MedfedError
from medfed.model_choice import EXPERIMENTAL
from medfed.models.explanations import explain
from medfed.models.loading import load
from medfed.models.tasks import meaning
from medfed.seams import system_seams
from medfed.server.planning import load_task, template_names
from medfed.simulations import cohorts
from medfed.simulations.capabilities import CAPABILITIES, MOST_EXPERIMENTAL, Capability
from medfed.simulations.cli import main
from medfed.simulations.extract import Hospital
from medfed.simulations.rehearsal import Rehearsal
from medfed.simulations.runs import simulate

ROWS = pytest.mark.parametrize("row", CAPABILITIES, ids=[row.name for row in CAPABILITIES])
# what is experimental is trained by `make soak`
TRAINED = pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[pytest.mark.soak] * (row.status == "experimental")) for row in CAPABILITIES],
)


def _cohort(row: Capability) -> cohorts.Cohort:
    files = system_seams().files
    lacking = cohorts.missing(files, row.cohort)
    if lacking is not None:
        pytest.skip(lacking)
    for extra in row.extras:
        pytest.importorskip({"molecules": "rdkit", "nifti": "nibabel"}.get(extra, extra))
    quick, is_synthetic = row.quick, cohorts.COHORTS[row.cohort].is_synthetic
    patients = quick.patients if is_synthetic else None
    cohort = cohorts.load_cohort(files, row.cohort, quick.seed, quick.hospitals, patients)
    hospitals = cohort.hospitals if is_synthetic else tuple(_fewer(each, quick.patients) for each in cohort.hospitals)
    return replace(cohort, task=row.study, hospitals=hospitals)


def _fewer(hospital: Hospital, most: int | None) -> Hospital:
    """The first ``most`` of its training records and of its test records."""
    kept = (extract.rows(np.arange(len(extract.patients))[:most]) for extract in (hospital.training, hospital.test))
    return Hospital(hospital.name, *kept)


@TRAINED
def test_capability_trains_privately_beats_guessing_and_explains_itself(row: Capability, quick_folder) -> None:
    cohort, quick = _cohort(row), row.quick
    plan = Rehearsal(epsilon=quick.epsilon, mode="distributed", rounds=quick.rounds, seed=quick.seed)
    run = simulate(None, cohort, plan, has_baseline=False, out=quick_folder / f"capability-{row.study}")
    result = run.result
    assert result.epsilon is not None and 0.5 * quick.epsilon < result.epsilon <= quick.epsilon
    assert result.test_metric is not None and result.test_metric > quick.above >= result.chance
    _explains(run.folder, cohort)


def _explains(folder: Path, cohort: cohorts.Cohort) -> None:
    """The run's model, opened anew, says of test patients what the federation's did, and why."""
    pytest.importorskip("captum")
    trained = load(folder)
    test = cohort.hospitals[0].test.encode(trained.study)
    predicted = trained.predict(test.inputs[:3])
    assert np.isfinite(predicted).all() and len(predicted) == 3
    text = trained.study.data.text
    words = "" if text is None else cohort.hospitals[0].test.columns[text.column][0]
    assert explain(trained, test.inputs[0], words)


def test_capabilities_are_distinct_and_few_are_experimental() -> None:
    names = [row.name for row in CAPABILITIES]
    assert len(set(names)) == len(names)
    assert sum(row.status == "experimental" for row in CAPABILITIES) <= MOST_EXPERIMENTAL


@ROWS
def test_capability_is_experimental_where_its_model_is(row: Capability) -> None:
    name = load_task(system_seams().files, row.study).model.name
    assert (row.status == "experimental") == (name in EXPERIMENTAL)


def test_experimental_model_that_nobody_asked_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--model", "message-passing"], ["--task", "breast-anomaly-variational"]):
        assert main(["run", "--cohort", "breast-cancer", *options]) == ExitStatus.USAGE
        assert "MF-203" in (said := capsys.readouterr().err) and "--experimental" in said


@ROWS
def test_capability_names_a_study_and_a_cohort_that_exist(row: Capability) -> None:
    files = system_seams().files
    assert row.study in template_names()
    assert row.cohort in cohorts.COHORTS
    task = load_task(files, row.study)
    assert row.quick.above >= meaning(task.task).chance
    with pytest.raises(MedfedError):
        load_task(files, f"{row.study}-no-such")
