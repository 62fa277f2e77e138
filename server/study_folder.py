"""The three files that make a study: plan, roster and first model, written together or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medfed.errors import ConfigError, MedfedError, PrivacyError
from medfed.models import parameters
from medfed.privacy.secagg.protocol import MOST_HOSPITALS
from medfed.roster import Roster, load_enrolment, load_roster, require_small_delta
from medfed.seams import Files
from medfed.server.setup import MODEL_NAME, ROSTER_NAME, STUDY_NAME
from medfed.server.study_file import render
from medfed.study import Study, load_study


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
    if not roster.extends(study):
        raise PrivacyError(124, f"{ROSTER_NAME} is not the study's roster", "restore it beside study.toml")
    return roster


@dataclass(frozen=True, slots=True)
class Extension:
    """A study's roster with ``joined`` hospitals at its end."""

    study: Study
    roster: Roster
    joined: int


def extend_roster(files: Files, study_path: Path, documents: Sequence[Path]) -> Extension:
    """Put hospitals at the end of the roster beside a study that goes on; nobody's position changes.

    Raises, with nothing written: MF-606 without a roster there, MF-124 where it is not the study's, MF-143 for a hospital, an
    identity or a node key that it lists already, MF-140 for more than 128, MF-131 for a hospital too large for the study's delta.
    """
    study, path = load_study(files, study_path), study_path.parent / ROSTER_NAME
    before = check_attachments(files, study, study_path.parent)
    if before is None:
        raise ConfigError(606, f"{ROSTER_NAME} not found", "restore it beside study.toml")
    joining = [load_enrolment(files, document) for document in documents]
    hospitals = [*before.hospitals, *joining]
    if len(hospitals) > MOST_HOSPITALS:
        raise ConfigError(140, f"{len(hospitals)} hospitals", f"a roster holds 1 to {MOST_HOSPITALS}")
    roster = before.model_copy(update={"hospitals": hospitals})
    roster.check()
    for entry in joining:
        require_small_delta(
            study.privacy.delta, entry.nominal_patients, f"{entry.hospital} could not approve the study"
        )
    files.write(path, roster.to_bytes())
    return Extension(study, roster, len(joining))
