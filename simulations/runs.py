"""``simulate``: a study, or a cohort's own task, rehearsed on several splits of a public cohort, with a report.

What runs is production code (``rehearsal.py``); what is added here looks at the released model from outside the
federation, which only public test patients allow.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medfed.client.model_card import CARD_NAME, model_card
from medfed.errors import ConfigError, LocalProtocolError
from medfed.models import catalogue, parameters
from medfed.progress import Progress
from medfed.seams import Seams, system_seams
from medfed.server.assignment import Assignment
from medfed.server.results import write_record
from medfed.server.store import Checkpoint
from medfed.server.study_file import render
from medfed.simulations import plots, report
from medfed.simulations.cohorts import COHORTS, Cohort, CohortInfo, load_cohort
from medfed.simulations.outcome import Outcome, Result, make_outcome, summarize
from medfed.simulations.rehearsal import Backend, Rehearsal, rehearse, sums_jointly, task_of
from medfed.simulations.run_folder import RESULT_NAME, new_run_folder
from medfed.simulations.threads import one_torch_thread
from medfed.study import Study
from medfed.wording import named

log = logging.getLogger("medfed.simulations")

MODEL_NAME = "model.safetensors"
STUDY_NAME = "study.toml"
RUNS = Path("runs")
PARTIES = "parties"
SEED_STRIDE = 1 << 32  # the randomness of split n comes from seed + n * SEED_STRIDE


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """A finished run: what ``result.json`` says, each split's outcome, and the folder that holds it all."""

    result: Result
    outcomes: tuple[Outcome, ...]
    folder: Path


def simulate(
    study: Study | None,
    data: str | Cohort | Sequence[Cohort],
    plan: Rehearsal | None = None,
    *,
    hospitals: int | None = None,
    patients: int | None = None,
    split_seeds: Sequence[int] | None = None,
    out: Path | None = None,
    keep_parties: bool = False,
    has_baseline: bool = True,
    seams: Seams | None = None,
    backend: Backend | None = None,
    task: str | None = None,
) -> Simulation:
    """Rehearse on one machine, by the production code of client and server, and score on test patients.

    ``study``: an existing plan, or None for the cohort's own task with what ``plan`` decides (default: epsilon 1, mode
    local). A given study is rehearsed as it stands, on the rehearsal's roster; of ``plan`` then only ``epsilon=None`` (no
    noise), ``seed``, ``absences``, ``exact`` and ``start`` count. ``data``: a cohort's name, split once for each of
    ``split_seeds`` (default: its protocol's), or cohorts that were split already. ``task``: a template's name or a file, in
    the place of the task of a cohort that ``data`` names. ``patients``: training patients of each hospital, of a synthetic
    cohort. ``out``: the run's folder (default ``runs/<id>``); an earlier run there is replaced once this one is complete.
    ``keep_parties``: keep the folders of hospitals and coordinator, keys and patients included. ``has_baseline``:
    also train the same model on everybody's data in one place. ``backend``: what carries the messages (default: this
    process); ``ray_backend`` of ``medfed.simulations.backends.ray_engine`` takes Flower's simulation engine.

    *Guarantees* A run that fails leaves ``out`` as it was. With ``plan.seed`` everything repeats bit for bit, and the run
    says so. Raises ``ConfigError`` MF-203 for decisions that make no study, MF-212 if ``out`` is no run, MF-320 if data or
    an extra are missing, and whatever the rounds raise.
    """
    plots.require_matplotlib()
    seams = system_seams() if seams is None else seams
    plan = _decided(study, plan)
    cohorts = _cohorts(seams, data, hospitals, patients, split_seeds, plan)
    if task is not None:
        cohorts = [replace(cohort, task=task) for cohort in cohorts]
    place = RUNS / _run_id(cohorts[0], plan, seams) if out is None else out
    with new_run_folder(place, seams) as folder, one_torch_thread():
        outcomes = _rehearse_all(folder / PARTIES, cohorts, plan, seams, study, keep_parties, has_baseline, backend)
        joint = backend is None and sums_jointly(plan, outcomes[0].assignment.study)
        result = summarize(outcomes, noise=plan.epsilon is not None, seeded=plan.seed is not None, joint=joint)
        _write(folder, outcomes, result, seams)
    return Simulation(result, outcomes, place)


def federation_result(
    cohort: Cohort,
    assignment: Assignment,
    checkpoint: Checkpoint,
    train_seconds: Mapping[int, float],
    seconds: float,
    run: Path,
) -> dict[str, object]:
    """``result.json`` of a federation of processes whose coordinator left its model in the folder ``run``."""
    model_file = (run / MODEL_NAME).read_bytes()
    weights = parameters.from_safetensors(catalogue.build(assignment.study), model_file)
    outcome = make_outcome(cohort, assignment, checkpoint, weights, {}, train_seconds, seconds, None)
    return summarize([outcome], noise=True, seeded=False).to_json()


def _decided(study: Study | None, plan: Rehearsal | None) -> Rehearsal:
    """What is rehearsed: a given study's own decisions stand."""
    if study is None:
        return plan or Rehearsal(epsilon=1.0, mode="local")
    return Rehearsal(
        epsilon=None if plan is not None and plan.epsilon is None else study.privacy.epsilon,
        mode=study.privacy.mode,
        colluders=study.cohort.colluders,
        drop_outs=study.cohort.drop_outs,
        absences=() if plan is None else plan.absences,
        seed=None if plan is None else plan.seed,
        exact=plan is not None and plan.exact,
        start=None if plan is None else plan.start,
    )


def _cohorts(
    seams: Seams,
    data: str | Cohort | Sequence[Cohort],
    hospitals: int | None,
    patients: int | None,
    split_seeds: Sequence[int] | None,
    plan: Rehearsal,
) -> list[Cohort]:
    if not isinstance(data, str):
        if hospitals is not None or patients is not None or split_seeds is not None:
            raise ConfigError(203, "these cohorts are split already", "leave hospitals, patients and split_seeds out")
        given = [data] if isinstance(data, Cohort) else list(data)
        if not given:
            raise ConfigError(203, "there is no cohort to train on", "give a cohort, or the name of one")
        return given
    if data not in COHORTS:
        raise ConfigError(203, f"cohort {data} is not known", f"choose one of {', '.join(COHORTS)}")
    if split_seeds is None:
        split_seeds = _default_seeds(COHORTS[data], plan)
    if not split_seeds:
        raise ConfigError(203, "there is no split to train on", "give at least one split seed")
    return [load_cohort(seams.files, data, seed, hospitals, patients) for seed in split_seeds]


def _default_seeds(info: CohortInfo, plan: Rehearsal) -> tuple[int, ...]:
    """The cohort's protocol; of a run from one seed that split, or the first where splits are folds."""
    if plan.seed is None:
        return info.protocol_seeds
    return info.protocol_seeds[:1] if info.folds else (plan.seed,)


def _run_id(cohort: Cohort, plan: Rehearsal, seams: Seams) -> str:
    """When and what, to read and to sort by."""
    when = time.strftime("%Y%m%d-%H%M%S", time.gmtime(seams.clock.wall()))
    epsilon = "no-noise" if plan.epsilon is None else f"epsilon-{plan.epsilon:g}"
    return f"{when}-{cohort.name}-{epsilon}-{plan.mode}"


class _Onlooker:
    """Shows one split's rounds, and the epsilon they cost, on the bar of the whole run."""

    def __init__(self, progress: Progress, split: str, before: int, plan: Rehearsal) -> None:
        self._progress = progress
        self._split = split
        self._before = before
        self._is_private = plan.epsilon is not None
        self._shown: tuple[int, int] | None = None

    def __call__(self, assignment: Assignment, checkpoint: Checkpoint, what: str) -> None:
        now = (checkpoint.last_attempt, checkpoint.state.completed_rounds)
        if now == self._shown:
            return
        self._shown = now
        spent = f"epsilon at most {assignment.plan.running_epsilon(now[0]):.2f}" if self._is_private else "no noise"
        self._progress.update(self._before + now[1], f"{self._split}, {spent}")


def _rehearse_all(
    parties: Path,
    cohorts: Sequence[Cohort],
    plan: Rehearsal,
    seams: Seams,
    study: Study | None,
    keep: bool,
    has_baseline: bool,
    backend: Backend | None,
) -> tuple[Outcome, ...]:
    """One federation a split, each in folders of its own, under one progress bar."""
    rounds = _rounds(cohorts[0], plan, seams, study)
    outcomes = []
    is_watched = sys.stderr.isatty()  # asked now: the bar puts itself in the place of sys.stderr
    with Progress(cohorts[0].name, rounds * len(cohorts), sys.stderr) as progress:
        for number, cohort in enumerate(cohorts):
            folder = parties / f"split-{number + 1 if cohort.seed is None else cohort.seed}"
            mine = plan if plan.seed is None else replace(plan, seed=plan.seed + number * SEED_STRIDE)
            onlooker = _Onlooker(progress, f"split {number + 1}/{len(cohorts)}", number * rounds, plan)
            done = rehearse(folder, cohort, mine, seams, study, onlooker, backend)
            if not keep:
                shutil.rmtree(parties)
            progress.update((number + 1) * rounds, f"split {number + 1}/{len(cohorts)}: scoring")
            outcome = make_outcome(
                cohort,
                done.assignment,
                done.checkpoint,
                done.weights,
                done.history,
                done.train_seconds,
                done.seconds,
                done.record,
                has_baseline,
            )
            outcomes.append(outcome)
            progress.update((number + 1) * rounds, f"split {number + 1}/{len(cohorts)}: {_scored(outcome)}")
            if not is_watched:  # else the bar says it
                split = f"split {number + 1} of {len(cohorts)}"
                log.info("%s: %s done, test %s", cohort.name, split, _scored(outcome))
    return tuple(outcomes)


def _scored(outcome: Outcome) -> str:
    return f"{named(outcome.scores.primary)} {report.number(outcome.scores.metric)}"


def _rounds(cohort: Cohort, plan: Rehearsal, seams: Seams, study: Study | None) -> int:
    """Rounds of one federation, for the bar."""
    if study is not None:
        return study.released_sums
    task = task_of(seams.files, cohort)
    return (plan.rounds or task.training.rounds) + (task.statistics is not None)


def _write(folder: Path, outcomes: Sequence[Outcome], result: Result, seams: Seams) -> None:
    """All files of the run's folder; model, study and privacy statement are the first split's."""
    first, files = outcomes[0], seams.files
    study = first.assignment.study
    stamps = "".join(f"# {line}\n" for line in report.stamp_lines(result))
    files.write(folder / MODEL_NAME, parameters.to_safetensors(catalogue.build(study), first.weights))
    files.write(folder / STUDY_NAME, (stamps + render(study)).encode())
    _write_record(folder, first, result, seams)
    files.write(folder / report.METRIC_PLOT, plots.metric_by_round(outcomes, result))
    files.write(folder / report.HOSPITAL_PLOT, plots.metric_by_hospital(outcomes, result))
    if result.epsilon is not None:
        files.write(folder / report.EPSILON_PLOT, plots.epsilon_by_attempt(first))
    files.write(folder / "report.md", report.report(outcomes, result).encode())
    files.write(folder / RESULT_NAME, _json(result.to_json()))
    files.write(folder / CARD_NAME, model_card(files, folder, first.cohort.source).encode())


def _write_record(folder: Path, first: Outcome, result: Result, seams: Seams) -> None:
    """Statement, signatures and journal, stamped. Without noise there is no epsilon to state: nobody signs that."""
    record, study = first.record, first.assignment.study
    if record is None:
        raise LocalProtocolError(900, "a rehearsal left no record", "please report this")
    if result.epsilon is not None:
        write_record(seams.files, folder, study, record)
        return
    nothing = dict.fromkeys(
        field
        for field, _ in record.said
        if field.startswith("epsilon") or field in ("noise_multiplier", "excess_noise")
    )
    stated = record.said.model_dump() | nothing
    stated |= {
        "mechanism": "Poisson sampling, per-patient clipping, no noise",
        "holds_against": "nobody",
        "accountant": None,
    }
    seams.files.write(folder / "privacy.json", _json(stated | {"hospitals": []}))
    page = "\n".join(
        [f"# No privacy: {study.study.name}", "", *(f"> **{line}**  " for line in report.stamp_lines(result))]
    )
    seams.files.write(folder / "privacy.md", (page + "\n").encode())


def _json(value: dict[str, object]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
