"""What a run leaves: model, study, signed privacy statement, journal, result, report. Written once all is well, never half."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from medfed import metrics
from medfed.privacy.page import page
from medfed.privacy.statement import Statement
from medfed.seams import Files
from medfed.server.assignment import Assignment
from medfed.server.ending import RunRecord, model_file
from medfed.server.store import Checkpoint
from medfed.server.study_file import render
from medfed.study import Study
from medfed.wording import counted, rounded_up, rounds_by_kind, times

MODEL_NAME, STUDY_NAME = "model.safetensors", "study.toml"
RECORD_NAMES = ("privacy.json", "privacy.md", "study.json", "roster.json", "journal.jsonl")
"""What proves a run, beside its model and its study: docs/privacy_statement.md."""


def write_results(
    files: Files, folder: Path, assignment: Assignment, checkpoint: Checkpoint, record: RunRecord
) -> None:
    """``model.safetensors``, ``study.toml``, ``RECORD_NAMES``, ``result.json`` and ``report.md`` of a finished run."""
    files.make_folder(folder)
    study = assignment.study
    files.write(folder / MODEL_NAME, model_file(study, checkpoint.state))
    files.write(folder / STUDY_NAME, render(study).encode())
    write_record(files, folder, study, record)
    files.write(folder / "report.md", _report(assignment, checkpoint, record.said).encode())
    files.write(folder / "result.json", _json(_result(assignment, checkpoint, record.said)))


def write_record(files: Files, folder: Path, study: Study, record: RunRecord) -> None:
    """``RECORD_NAMES``: what ``medfed-client verify`` reads."""
    file = record.privacy_file
    contents = (
        file.to_bytes(),
        page(file, record.roster).encode(),
        study.canonical_bytes(),
        record.roster.to_bytes(),
        record.journal,
    )
    for name, data in zip(RECORD_NAMES, contents, strict=True):
        files.write(folder / name, data)


def held_out_metrics(assignment: Assignment, checkpoint: Checkpoint, *, noised: bool = True) -> metrics.Metrics | None:
    """What the released cells say of the model; None where the study asks for none, or they are still to come.

    ``noised``: False where a simulation left the noise out.
    """
    study, plan = assignment.study, assignment.plan
    if study.metrics is None or checkpoint.state.completed_rounds < study.released_sums:
        return None
    hospitals = len(checkpoint.records[-1].survivors) if noised else 0  # each adds its share of noise to the cells
    noise_sd = metrics.noise_sd_of_cell(plan.metrics_noise_sd, plan.metrics_exponent, hospitals)
    return metrics.from_cells(study, checkpoint.state.metrics, noise_sd)


def _result(assignment: Assignment, checkpoint: Checkpoint, said: Statement) -> dict[str, object]:
    """The keys of every run; metrics are null, as exact metrics never leave a hospital."""
    seconds = sum(record.seconds for record in checkpoint.records)
    rounds = len(checkpoint.records)
    study, found = assignment.study, held_out_metrics(assignment, checkpoint)
    return {
        "cohort": study.study.name,
        "hospitals": study.cohort.hospitals,
        "rounds": study.training.rounds,
        "released_sums": rounds,
        "test_auc": None,
        "test_auc_sd": None,
        "pooled_auc": None,
        "epsilon": said.epsilon,
        "epsilon_spent": said.epsilon_spent,
        "delta": said.delta,
        "unit": said.unit,
        "mode": said.mode,
        "accountant": said.accountant,
        "colluders": said.colluders,
        "seconds": round(seconds, 4),
        "seconds_per_round": round(seconds / max(rounds, 1), 4),
        "overhead_s_per_round": None,
        "upload_bytes_per_round": max((record.upload_bytes for record in checkpoint.records), default=0),
        "dropped": sum(max(0, study.cohort.hospitals - len(record.survivors)) for record in checkpoint.records),
        "attempts": checkpoint.last_attempt,
        "evaluation": _EVALUATIONS[found is not None],
        "held_out_metrics": [] if found is None else [found.to_json()],
    }


_EVALUATIONS = {
    False: "none: exact metrics stay at the hospitals",
    True: "noised counts over the hospitals' held-out patients",
}


def _report(assignment: Assignment, checkpoint: Checkpoint, said: Statement) -> str:
    study = assignment.study
    lines = [
        f"# {study.study.name}",
        "",
        study.study.purpose,
        "",
        f"A patient's data make no conclusion drawn from this model more than {times(said.epsilon)} times as likely (epsilon "
        f"{rounded_up(said.epsilon)}), up to delta = {said.delta:g} (unit: {said.unit}, adjacency: {said.adjacency}, mode: "
        f"{said.mode}).",
        f"It holds against {said.holds_against}. Not claimed: {said.not_claimed}.",
        "",
        f"{counted(len(checkpoint.records), 'round')}{rounds_by_kind(study.rounds_by_kind)}, {checkpoint.last_attempt} of "
        f"{said.attempts_approved} attempts used, "
        f"epsilon spent {rounded_up(said.epsilon_spent)}. This page is signed by nobody: `privacy.json` is.",
        "",
        "| attempt | round | of | hospitals in the sum | seconds | upload bytes a hospital |",
        "|-|-|-|-|-|-|",
        *_attempts(study, checkpoint),
    ]
    found = held_out_metrics(assignment, checkpoint)
    if found is not None:
        lines += [
            "",
            "On held-out patients, from noised counts (and between which figures it lies in 95 of 100 cases):",
            "",
        ]
        lines += [f"- {line}" for line in metrics.in_words(found)]
    lines += ["", "| hospital | declared patients |", "|-|-|"]
    lines += [f"| {entry.hospital} | {entry.nominal_patients} |" for entry in assignment.roster.hospitals]
    return "\n".join(lines) + "\n"


def _attempts(study: Study, checkpoint: Checkpoint) -> Iterator[str]:
    """A line an attempt; those that were lost are charged like the others."""
    done = {record.attempt: record for record in checkpoint.records}
    for attempt in range(1, checkpoint.last_attempt + 1):
        found = done.get(attempt)
        if found is None:
            yield f"| {attempt} | lost |  |  |  |  |"
        else:
            kind, summed = study.kind_of_round(found.round), len(found.survivors)
            yield f"| {attempt} | {found.round} | {kind} | {summed} | {found.seconds:.3f} | {found.upload_bytes} |"


def _json(value: dict[str, object]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
