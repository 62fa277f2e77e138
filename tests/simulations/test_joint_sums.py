"""Sums of many hospitals in one call of the engine: each hospital's own, to within one step of the grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.advance import state_bytes
from medfed.client import trainer
from medfed.client.approved import Approved
from medfed.client.local_steps import own_sum
from medfed.errors import MedfedError
from medfed.privacy.quantize import quantize
from medfed.seams import system_seams
from medfed.server.planning import load_task
from medfed.simulations import joint_sums
from medfed.simulations.cli import main
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.extract import PATIENT_COLUMN, Cohort, Extract
from medfed.simulations.joint_sums import JointSums, Wanted, portions
from medfed.simulations.rehearsal import Rehearsal, Rehearsed, rehearse

HOSPITALS, ROUNDS = 5, 3


def cohort_of(name: str, records: int) -> Cohort:
    """Five hospitals whose patients have ``records`` records each; the third one has two patients."""
    patients = {} if name == "breast-cancer" else {"patients": 24}
    cohort = load_cohort(system_seams().files, name, 3, HOSPITALS, **patients)
    hospitals = []
    for at, hospital in enumerate(cohort.hospitals):
        extract = hospital.training.rows(np.arange(2 * records)) if at == 2 else hospital.training
        hospitals.append(replace(hospital, training=_with_records(extract, records)))
    task = load_task(system_seams().files, cohort.task) if isinstance(cohort.task, str) else cohort.task
    data = task.data.model_copy(update={"max_records_per_patient": min(2, records)})
    task = task.model_copy(update={"data": data, "sampling_rate": 0.3})
    return replace(cohort, task=task, hospitals=tuple(hospitals))


def _with_records(extract: Extract, records: int) -> Extract:
    """Neighbors become one patient."""
    names = extract.columns[PATIENT_COLUMN]
    owners = tuple(names[at // records] for at in range(len(names)))
    return replace(extract, columns=extract.columns | {PATIENT_COLUMN: owners})


class Compared:
    """Stands before ``JointSums``: works every sum out by itself as well, and keeps both on the grid."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self.sampled: list[int] = []
        self.calls: list[int] = []
        joint, in_one_call = JointSums.__call__, trainer.sums_of

        def compared(
            sums: JointSums, approved: Approved, weights: NDArray[np.float32], key: bytes
        ) -> NDArray[np.float64]:
            plan = approved.plan
            alone = own_sum(approved, weights, key)
            together = joint(sums, approved, weights, key)
            self.pairs.append(
                tuple(quantize(each, plan.noise_exponent, plan.noise_limit) for each in (together, alone))
            )
            self.sampled.append(len(trainer.chosen_rows(approved.study, approved.patients, key)))
            return together

        def counted(*arguments: object) -> NDArray[np.float64]:
            found = in_one_call(*arguments)
            self.calls.append(len(found))
            return found

        monkeypatch.setattr(JointSums, "__call__", compared)
        monkeypatch.setattr(joint_sums, "trainer", SimpleNamespace(sums_of=counted, chosen_rows=trainer.chosen_rows))


def rehearsed(folder: Path, cohort: Cohort, plan: Rehearsal) -> Rehearsed:
    return rehearse(folder, cohort, plan, system_seams())


@pytest.mark.parametrize(
    ("name", "model", "records"),
    [
        ("synthetic-images", "cnn", 1),
        ("synthetic-images", "cnn", 3),
        ("synthetic-series", "lstm", 1),
        ("breast-cancer", None, 3),
        ("breast-cancer", "mlp", 1),
    ],
)
def test_joint_sums_are_each_hospital_s_own_to_within_one_grid_step(
    name: str, model: str | None, records: int, quick_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a hospital that samples nobody, and with one that takes no part in the second round."""
    compared = Compared(monkeypatch)
    absent = (("hospital-2", frozenset({2})),)
    plan = Rehearsal(8.0, "local", drop_outs=1, rounds=ROUNDS, seed=5, model=model, absences=absent)
    done = rehearsed(quick_folder / f"joint-{name}-{model}-{records}", cohort_of(name, records), plan)
    assert sorted(len(record.survivors) for record in done.checkpoint.records[-ROUNDS:]) == [4, 5, 5]
    assert sorted(compared.calls) == [1, 4, 4, 5], "who comes back gets the state first: the others are through by then"
    assert len(compared.pairs) == 14
    assert 0 in compared.sampled and max(compared.sampled) > 3
    for together, alone in compared.pairs:
        assert np.abs(together - alone).max() <= 1
    assert max(np.abs(alone).max() for _, alone in compared.pairs) > 1000, "the control: sums are not zeros"


def test_exact_run_is_hospital_by_hospital(quick_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = Compared(monkeypatch)
    plan = Rehearsal(8.0, "local", rounds=1, seed=5, exact=True)
    rehearsed(quick_folder / "exact", cohort_of("synthetic-images", 1), plan)
    assert compared.calls == [] and compared.pairs == []


def test_joint_run_with_a_seed_repeats_bit_for_bit(quick_folder: Path) -> None:
    cohort, plan = cohort_of("synthetic-images", 3), Rehearsal(8.0, "distributed", rounds=2, seed=5)
    states = [rehearsed(quick_folder / f"joint-again-{number}", cohort, plan).checkpoint.state for number in range(2)]
    assert state_bytes(states[0]) == state_bytes(states[1])


def test_sums_that_fail_cost_the_attempt_of_every_hospital_in_the_call(
    quick_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that fails by itself: the attempt is spent, and the next one goes well."""
    true, failed = trainer.sums_of, []

    def once(*arguments: object) -> NDArray[np.float64]:
        if not failed:
            failed.append(len(arguments[3]))
            raise MemoryError("out of memory")
        return true(*arguments)

    monkeypatch.setattr(joint_sums, "trainer", SimpleNamespace(sums_of=once, chosen_rows=trainer.chosen_rows))
    cohort = cohort_of("synthetic-images", 1)
    done = rehearsed(quick_folder / "failed", cohort, Rehearsal(8.0, "local", rounds=1, seed=5))
    assert failed == [HOSPITALS]
    assert [record.attempt for record in done.checkpoint.records] == [2]
    assert len(done.checkpoint.records[0].survivors) == HOSPITALS


# ------------------------------------------------------------------------------------------------------------ portions


def wanted(position: int, records: int, weights: NDArray[np.float32], study: str = "a", size: int = 4) -> Wanted:
    """A question as far as it matters to how questions are put together."""
    inputs = np.zeros((records, size), np.float32)
    patients = SimpleNamespace(records=SimpleNamespace(inputs=inputs))
    approved = SimpleNamespace(study=study, position=position, patients=patients)
    return Wanted(approved, weights, np.arange(records))


def positions(questions: Sequence[Wanted], at_work: int = 1) -> list[list[int]]:
    return [[questions[number].approved.position for number in part] for part in portions(questions, at_work)]


def test_portions_do_not_depend_on_who_came_first() -> None:
    weights, other = np.zeros(3, np.float32), np.ones(3, np.float32)
    questions = [wanted(at, 400 + at, weights if at % 3 else other) for at in range(12)]
    found = {str(positions([questions[at] for at in np.random.default_rng(n).permutation(12)], 2)) for n in range(20)}
    assert len(found) == 1


def test_hospitals_at_other_weights_or_of_another_study_are_summed_apart() -> None:
    weights = np.array([0.0, 1.0], np.float32)
    minus = np.array([-0.0, 1.0], np.float32)
    questions = [
        wanted(0, 5, weights),
        wanted(1, 5, minus),
        wanted(2, 5, weights.copy()),
        wanted(3, 5, weights, study="b"),
        wanted(4, 0, minus),
    ]
    assert positions(questions) == [[0, 2], [1, 4], [3]], "equal bits are what counts"


def test_few_records_are_one_call_and_many_are_shared_among_threads_and_bounded_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = np.zeros(3, np.float32)
    assert positions([wanted(at, 0, weights) for at in range(3)], 2) == [[0, 1, 2]]
    assert positions([wanted(at, 500, weights) for at in range(4)], 2) == [[0, 1, 2, 3]]
    assert positions([wanted(at, 600, weights) for at in range(4)], 2) == [[0, 1], [2, 3]]
    assert positions([wanted(0, 9000, weights), *(wanted(at, 10, weights) for at in (1, 2))], 2) == [[0], [1, 2]]
    monkeypatch.setattr(joint_sums, "RECORDS_BYTES", 1600)
    assert positions([wanted(at, 50, weights) for at in range(6)]) == [[0, 1], [2, 3], [4, 5]]
    assert positions([wanted(0, 1000, weights), wanted(1, 1, weights)]) == [[0], [1]]


def test_most_hospitals_under_way_follow_from_the_size_of_their_sums() -> None:
    assert JointSums(2).meet(1000).most == 256
    assert JointSums(2).meet(1 << 20).most == 32
    assert JointSums(2).meet(1 << 30).most == 2


def test_joint_sum_before_the_hospitals_met_is_refused() -> None:
    with pytest.raises(MedfedError, match="MF-900"):
        JointSums(1)(SimpleNamespace(), np.zeros(1, np.float32), bytes(64))


# -------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("options", "joint"),
    [([], True), (["--exact"], False), (["--epsilon", "none"], True)],
    ids=["joint", "exact", "plain"],
)
def test_run_says_how_its_sums_were_worked_out(
    options: list[str], joint: bool, quick_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "--rounds", "1", "--hospitals", "3", "--split-seeds", "1", "--no-baseline", "--json"]
    assert main([*run, *options, "--out", str(quick_folder / f"said-{'-'.join(options)}")]) == 0
    assert json.loads(capsys.readouterr().out)["joint_sums"] is joint
