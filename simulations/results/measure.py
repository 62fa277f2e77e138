"""Measures the cells that are missing, one after the other, and writes each down as soon as it is finished."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from medfed.errors import ConfigError
from medfed.models import catalogue
from medfed.progress import Progress
from medfed.seams import Files, Seams
from medfed.server.ending import versions
from medfed.server.planning import TaskFile, load_task, template_names, template_text
from medfed.simulations.cohorts import COHORTS, missing
from medfed.simulations.results import cells
from medfed.simulations.results.arms import Found, Split, measure_cell, open_split
from medfed.simulations.results.cells import Cell, Environment, Measured
from medfed.simulations.results.protocol import CHOICE_EPSILON, Arm, Key, Mode, Row, keys
from medfed.study import Study

log = logging.getLogger("medfed.simulations")

_ALSO_VERSIONED = ("scikit-learn",)


@dataclass(frozen=True, slots=True)
class Todo:
    """A cohort's cells that are to be measured, with the seconds each is expected to take; ``absent``: why none can be."""

    row: Row
    keys: tuple[Key, ...]
    seconds: tuple[float, ...]
    total: int
    absent: str | None = None


def plan(
    files: Files,
    folder: Path,
    rows: Sequence[Row],
    *,
    arms: Sequence[Arm] = (),
    mode: Mode | None = None,
    splits: int | None = None,
    again: bool = False,
) -> list[Todo]:
    """What is still to do: of some ``arms``, one ``mode``, the first ``splits``, where so asked.

    A cell of an older study counts as missing; ``again``: all do.
    """
    found = []
    for row in rows:
        wanted = [key for key in keys(row) if _is_wanted(row, key, arms, mode, splits)]
        absent = _absent(files, row)
        if absent is not None:
            found.append(Todo(row, (), (), len(wanted), absent))
            continue
        measured, now = cells.load(files, folder, row.name), recipe(files, row)
        todo = tuple(key for key in wanted if again or not _is_done(measured, key, now))
        found.append(Todo(row, todo, tuple(expected(row, measured, key) for key in todo), len(wanted)))
    return found


def _is_wanted(row: Row, key: Key, arms: Sequence[Arm], mode: Mode | None, splits: int | None) -> bool:
    is_in_mode = mode is None or key.mode in (None, mode)
    return (not arms or key.arm in arms) and is_in_mode and key.seed in row.seeds[:splits]


def _is_done(measured: Measured, key: Key, recipe_now: str) -> bool:
    cell = measured.cell(key)
    return cell is not None and cell.recipe == recipe_now


def _absent(files: Files, row: Row) -> str | None:
    if row.cohort not in COHORTS:
        return "this tree has no such cohort"
    return missing(files, row.cohort)


def expected(row: Row, measured: Measured, key: Key) -> float:
    """Seconds of one core: the median of this arm's finished cells, best at the same epsilon, else the table's rough figure."""
    same_arm = [cell for cell in measured.cells if cell.arm == key.arm and cell.failed is None]
    same = [cell.processor_s for cell in same_arm if cell.epsilon == key.epsilon]
    known = same or [cell.processor_s for cell in same_arm]
    return statistics.median(known) if known else row.seconds.of(key.arm)


def recipe(files: Files, row: Row) -> str:
    """SHA-256 of what the task file says: its comments may change without a figure being out of date."""
    task: TaskFile = load_task(files, row.task)
    return hashlib.sha256(task.model_dump_json().encode()).hexdigest()


def measure(files_folder: Path, todo: Sequence[Todo], seams: Seams) -> None:
    """Measure all of ``todo``; interrupted, whatever is finished stays.

    Raises whatever a cell raises: no figure is made up for it, and the next start tries it again.
    """
    environment = this_environment()
    total = sum(sum(each.seconds) for each in todo)
    cells_total, number, before = sum(len(each.keys) for each in todo), 0, 0.0
    with Progress("seconds of work", max(1, round(total)), sys.stderr) as progress:
        for each in todo:
            for key, seconds, cell in _cells(files_folder, each, environment, seams, progress, before):
                number, before = number + 1, before + seconds
                left = f"about {max(0.0, total - before) / 60:.0f} min left"
                log.info(
                    "%s: %s: %.1f s of a core, cell %d of %d, %s",
                    *(each.row.name, key.in_words(), cell.processor_s, number, cells_total, left),
                )
                progress.update(round(before), f"{each.row.name}: {key.in_words()}")


def _cells(
    folder: Path, todo: Todo, environment: Environment, seams: Seams, progress: Progress, before: float
) -> Iterator[tuple[Key, float, Cell]]:
    split: Split | None = None
    now = recipe(seams.files, todo.row)
    for key, seconds in zip(todo.keys, todo.seconds, strict=True):
        progress.update(round(before), f"{todo.row.name}: {key.in_words()}")
        if split is None or split.cohort.seed != key.seed:
            split = open_split(todo.row, key.seed, seams)
        measured = cells.load(seams.files, folder, todo.row.name)  # read again: another process may have added cells
        _require_choice(measured, todo.row, key)
        started, worked = seams.clock.monotonic(), time.process_time()
        found = measure_cell(split, key, seams, _setting(measured, todo.row))
        cell = _cell(key, found, now, environment).model_copy(
            update={
                "seconds": round(seams.clock.monotonic() - started, 2),
                "processor_s": round(time.process_time() - worked, 2),
            }
        )
        measured = cells.load(seams.files, folder, todo.row.name).with_cell(cell, environment)
        cells.save(seams.files, folder, _described(seams.files, todo.row, split, measured))
        before += seconds
        yield key, seconds, cell


def _setting(measured: Measured, row: Row) -> str | None:
    chosen = measured.cell(Key("opacus-choice", CHOICE_EPSILON, None, row.seeds[0]))
    return None if chosen is None else chosen.setting


def _require_choice(measured: Measured, row: Row, key: Key) -> None:
    if key.arm == "opacus" and measured.cell(Key("opacus-choice", CHOICE_EPSILON, None, row.seeds[0])) is None:
        raise ConfigError(203, f"no setting of Opacus is chosen for {row.name}", "measure --part opacus-choice first")


def _cell(key: Key, found: Found, recipe_now: str, environment: Environment) -> Cell:
    figures = found.figures
    return Cell(
        arm=key.arm,
        epsilon=key.epsilon,
        mode=key.mode,
        seed=key.seed,
        metrics={} if figures is None else figures.metrics,
        hospitals={} if figures is None else figures.hospitals,
        subgroups={} if figures is None else figures.subgroups,
        classes=[] if figures is None else figures.classes,
        spent=None if found.spent is None else round(found.spent, 4),
        setting=found.setting,
        tried=found.tried or {},
        failed=found.failed,
        recipe=recipe_now,
        study=found.study,
        environment=environment.name,
        seconds=0.0,
        processor_s=0.0,
    )


def _described(files: Files, row: Row, split: Split, measured: Measured) -> Measured:
    """With what the page says of the cohort's study."""
    patients = sum(len(set(hospital.training.patients)) for hospital in split.cohort.hospitals)
    update = {
        "settings": head_comment(files, row),
        "model": _model(split.study, split.first.size),
        "patients": patients,
    }
    return measured.model_copy(update=update)


def _model(study: Study, size: int) -> str:
    kind = "" if catalogue.is_rowwise(study) else ", deep"
    return f"{study.model.name} of {size:,} parameters{kind}"


def head_comment(files: Files, row: Row) -> str:
    """The comment that a study begins with, which says how its settings were chosen; "" where there is no template."""
    if row.task not in template_names():
        return ""
    lines = []
    for line in template_text(files, row.task).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def this_environment() -> Environment:
    """The tree, the machine and the packages that figures come from."""
    also = {name: metadata.version(name) for name in _ALSO_VERSIONED}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return Environment(tree=_tree(), machine=machine, versions=versions() | also)


def _tree() -> str:
    """The commit that this code was checked out from; "unknown" of an installed wheel."""
    place = Path(__file__).resolve().parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=place, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()
