"""The three files that make a study: plan, roster and first model, written together or not at all."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from medfed.errors import ConfigError, MedfedError, PrivacyError
from medfed.models import parameters
from medfed.roster import Roster, load_roster
from medfed.seams import Files
from medfed.server.setup import MODEL_NAME, ROSTER_NAME, STUDY_NAME
from medfed.server.study_file import render
from medfed.study import Study


@dataclass(frozen=True, slots=True, eq=False)
class StudySet:
    """A study with what it pins."""

    study: Study
    roster: Roster
    model_file: bytes


def write_study(files: Files, folder: Path, made: StudySet, *, replace: bool) -> None:
    """Write ``made`` into ``folder``; a fault leaves there what was there.

    Raises MF-212 where another study lies, unless ``replace``. Each file is replaced atomically, the plan last; should
    the machine die in between, the hashes in the plan no longer fit its attachments and every start refuses it (MF-124).
    """
    new = {
        MODEL_NAME: made.model_file,
        ROSTER_NAME: made.roster.to_bytes(),
        STUDY_NAME: render(made.study).encode(),
    }
    if files.exists(folder / STUDY_NAME) and not replace:
        raise ConfigError(212, f"{STUDY_NAME} exists there", "name another folder, or replace it with --replace")
    files.make_folder(folder)
    old = {name: files.read(folder / name) if files.exists(folder / name) else None for name in new}
    try:
        for name, data in new.items():
            files.write(folder / name, data)
    except MedfedError:
        _put_back(files, folder, old)
        raise


def _put_back(files: Files, folder: Path, old: dict[str, bytes | None]) -> None:
    for name, data in old.items():
        with contextlib.suppress(MedfedError):  # what cannot be put back is refused by its hash
            if data is None:
                files.remove(folder / name)
            else:
                files.write(folder / name, data)


def check_attachments(files: Files, study: Study, folder: Path) -> Roster | None:
    """Compare what lies beside a study with what it pins (MF-124); the roster, if it is there."""
    if files.exists(folder / MODEL_NAME):
        found = parameters.file_hash(files.read(folder / MODEL_NAME))
        if found != study.model.first_model_sha256:
            raise PrivacyError(124, f"{MODEL_NAME} is not the study's first model", "restore it beside study.toml")
    if not files.exists(folder / ROSTER_NAME):
        return None
    roster = load_roster(files, folder / ROSTER_NAME)
    if roster.hash().hex() != study.cohort.roster_sha256:
        raise PrivacyError(124, f"{ROSTER_NAME} is not the study's roster", "restore it beside study.toml")
    return roster
