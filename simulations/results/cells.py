"""Finished cells on disk: ``docs/results/COHORT.json``, one cell a line, so that a difference shows which were measured anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medfed.errors import ConfigError
from medfed.seams import Files
from medfed.simulations.results.protocol import Arm, Key, Mode


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class GroupFigure(_Strict):
    """One hospital's or subgroup's test patients. ``fewest``: those of the rarest class, where there are classes."""

    value: float | None
    records: int
    fewest: int


class Cell(_Strict):
    """One training, scored on the test patients of all hospitals.

    ``hospitals``: of the arm ``single``, by the hospital that trained, its model on *everybody's* test patients; of the others,
    the one model on each hospital's own. ``metrics`` of ``single`` are those of its best model. ``tried``: what a choice of a
    setting was made by. ``failed``: why there is no figure. ``recipe``: SHA-256 of the task file as it was read.
    ``environment``: key of the versions that this was measured with. ``spent``: epsilon of the attempts that were used.
    ``seconds``: on the clock; ``processor_s``: of all threads together, which a busy machine does not change.
    """

    arm: Arm
    epsilon: float | None
    mode: Mode | None
    seed: int
    metrics: dict[str, float | None]
    hospitals: dict[str, GroupFigure]
    subgroups: dict[str, GroupFigure]
    classes: list[int]
    spent: float | None
    setting: str | None
    tried: dict[str, float | None]
    failed: str | None
    recipe: str
    study: str
    environment: str
    seconds: float
    processor_s: float

    @property
    def key(self) -> Key:
        return Key(self.arm, self.epsilon, self.mode, self.seed)


class Environment(_Strict):
    """What a cell was measured with. ``tree``: the commit, with ``-dirty`` where files differed from it."""

    tree: str
    machine: str
    versions: dict[str, str]

    @property
    def name(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]


class Measured(_Strict):
    """All cells of one cohort. ``settings``: the study's head comment, which says how its settings were chosen."""

    format: Literal[1]
    cohort: str
    settings: str
    model: str
    patients: int
    environments: dict[str, Environment]
    cells: list[Cell]

    def cell(self, key: Key) -> Cell | None:
        return next((cell for cell in self.cells if cell.key == key), None)

    def with_cell(self, cell: Cell, environment: Environment) -> Measured:
        """The same with this cell in the place of an older one."""
        cells = [other for other in self.cells if other.key != cell.key] + [cell]
        used = {one.environment for one in cells}
        known = self.environments | {environment.name: environment}
        cells.sort(key=lambda one: (one.seed, one.arm, one.epsilon or 0.0, one.mode or ""))
        kept = {name: known[name] for name in sorted(used)}
        return self.model_copy(update={"cells": cells, "environments": kept})


def nothing(cohort: str) -> Measured:
    """Before the first cell."""
    return Measured(format=1, cohort=cohort, settings="", model="", patients=0, environments={}, cells=[])


def load(files: Files, folder: Path, cohort: str) -> Measured:
    """What was measured of a cohort so far. Raises ``ConfigError`` MF-203 for a file that is not of this form."""
    path = folder / f"{cohort}.json"
    if not files.exists(path):
        return nothing(cohort)
    try:
        return Measured.model_validate_json(files.read(path))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(203, f"{path.name} is not a file of results: {where}", "measure the cohort anew") from None


def save(files: Files, folder: Path, measured: Measured) -> None:
    """Replace the cohort's file at once: an interrupted measurement keeps every finished cell."""
    files.make_folder(folder)
    head = measured.model_dump(exclude={"cells"})
    lines = [json.dumps(head, indent=1)[:-2] + ",", ' "cells": [']
    cells = [json.dumps(cell.model_dump(), separators=(",", ":")) for cell in measured.cells]
    text = "\n".join([*lines, ",\n".join(cells), " ]", "}"]) + "\n"
    files.write(folder / f"{measured.cohort}.json", text.encode())
