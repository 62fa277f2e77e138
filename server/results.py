"""What a run leaves: model, study, privacy statement, result, report. Written once all is well, never half."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from medfed.advance import released_weights
from medfed.models import catalogue, parameters
from medfed.privacy.statement import Statement, statement
from medfed.seams import Files
from medfed.server.rounds import Assignment
from medfed.server.store import Checkpoint
from medfed.server.study_file import render

_VERSIONED = ("medfed", "flwr", "torch", "opacus", "dp-accounting", "cryptography", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the guarantee was computed with."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def privacy_statement(assignment: Assignment, checkpoint: Checkpoint) -> Statement:
    return statement(assignment.study, assignment.plan, checkpoint.last_attempt, versions())


def write_results(files: Files, folder: Path, assignment: Assignment, checkpoint: Checkpoint) -> None:
    """``model.safetensors``, ``study.toml``, ``privacy.json``, ``result.json`` and ``report.md`` of a finished run."""
    files.make_folder(folder)
    study = assignment.study
    weights = released_weights(checkpoint.state, study)
    said = privacy_statement(assignment, checkpoint)
    files.write(folder / "model.safetensors", parameters.to_safetensors(catalogue.build(study), weights))
    files.write(folder / "study.toml", render(study).encode())
    files.write(folder / "privacy.json", _json(dict(said)))
    files.write(folder / "report.md", _report(assignment, checkpoint, said).encode())
    files.write(folder / "result.json", _json(_result(assignment, checkpoint, said)))


def _result(assignment: Assignment, checkpoint: Checkpoint, said: Statement) -> dict[str, object]:
    """The keys of every run; metrics are null, as exact metrics never leave a hospital."""
    seconds = sum(record.seconds for record in checkpoint.records)
    rounds = len(checkpoint.records)
    return {
        "cohort": assignment.study.study.name,
        "hospitals": assignment.study.cohort.hospitals,
        "rounds": rounds,
        "test_auc": None,
        "test_auc_sd": None,
        "pooled_auc": None,
        "epsilon": said["epsilon"],
        "epsilon_spent": said["epsilon_spent"],
        "delta": said["delta"],
        "unit": said["unit"],
        "mode": said["mode"],
        "accountant": said["accountant"],
        "colluders": said["colluders"],
        "seconds": round(seconds, 4),
        "seconds_per_round": round(seconds / max(rounds, 1), 4),
        "overhead_s_per_round": None,
        "upload_bytes_per_round": max((record.upload_bytes for record in checkpoint.records), default=0),
        "dropped": 0,
        "attempts": checkpoint.last_attempt,
        "evaluation": "none: exact metrics stay at the hospitals",
    }


def _report(assignment: Assignment, checkpoint: Checkpoint, said: Statement) -> str:
    study = assignment.study
    lines = [
        f"# {study.study.name}",
        "",
        study.study.purpose,
        "",
        f"A patient's data can change the odds of any conclusion drawn from this model by at most e^{said['epsilon']:.4g}, "
        f"up to delta = {said['delta']:g} (unit: {said['unit']}, adjacency: {said['adjacency']}, mode: {said['mode']}).",
        f"It holds against {said['holds_against']}. Not claimed: {said['not_claimed']}.",
        "",
        f"{len(checkpoint.records)} rounds, {checkpoint.last_attempt} of {said['attempts_approved']} attempts used, "
        f"epsilon spent {said['epsilon_spent']:.4g}.",
        "",
        "| round | attempt | seconds | upload bytes a hospital |",
        "|-|-|-|-|",
    ]
    lines += [f"| {r.round} | {r.attempt} | {r.seconds:.3f} | {r.upload_bytes} |" for r in checkpoint.records]
    lines += ["", "| hospital | declared patients |", "|-|-|"]
    lines += [f"| {entry.hospital} | {entry.nominal_patients} |" for entry in assignment.roster.hospitals]
    return "\n".join(lines) + "\n"


def _json(value: dict[str, object]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
