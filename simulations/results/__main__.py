"""``python -m medfed.simulations.results measure`` and ``write``: the figures of ``docs/results.md``, and the page itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medfed.command import new_parser, report, run_command
from medfed.errors import ConfigError, ExitStatus
from medfed.seams import system_seams
from medfed.simulations.results.measure import Todo, measure, plan
from medfed.simulations.results.page import PAGE, write_page
from medfed.simulations.results.protocol import ARMS, MODES, ROWS, row_named

FOLDER = Path("docs/results")


def _measure(arguments: argparse.Namespace) -> int:
    rows = [row_named(name) for name in arguments.cohort] or list(ROWS)
    seams = system_seams()
    todo = plan(
        seams.files,
        arguments.folder,
        rows,
        arms=arguments.part,
        mode=arguments.mode,
        splits=arguments.splits,
        again=arguments.again,
    )
    if not arguments.plan:
        measure(arguments.folder, todo, seams)
        return ExitStatus.HANDLED
    report(arguments.json, [_as_json(each) for each in todo], _in_words(todo))
    return ExitStatus.HANDLED


def _in_words(todo: Sequence[Todo]) -> list[str]:
    lines = []
    for each in todo:
        to_do = f"{len(each.keys)} of {each.total} cells to measure, about {sum(each.seconds) / 60:.1f} min of one core"
        lines.append(f"{each.row.name}: {each.absent or to_do}")
    return [*lines, f"together about {sum(sum(each.seconds) for each in todo) / 60:.0f} min"]


def _as_json(todo: Todo) -> dict[str, object]:
    return {
        "cohort": todo.row.name,
        "cells_to_measure": len(todo.keys),
        "cells": todo.total,
        "seconds": round(sum(todo.seconds), 1),
        "absent": todo.absent,
    }


def _write(arguments: argparse.Namespace) -> int:
    written = write_page(system_seams().files, arguments.folder, ROWS)
    report(arguments.json, {"files": [str(path) for path in written]}, [str(path) for path in written])
    return ExitStatus.HANDLED


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(100, f"{text!r} is no number of splits", "give 1 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, or write the page from what there is."""
    parser, commands = new_parser("python -m medfed.simulations.results", "What accuracy is left under privacy.")
    measured = commands.add_parser("measure", help="measure the cells that are missing; every finished one is kept")
    measured.add_argument("--cohort", nargs="+", default=[], metavar="NAME", help="default: all")
    measured.add_argument("--part", nargs="+", default=[], choices=ARMS, help="only these arms; default: all")
    measured.add_argument("--mode", choices=MODES, help="of the federation, only this mode; default: both")
    measured.add_argument("--splits", type=_positive, help="only the first so many splits of each cohort")
    measured.add_argument("--again", action="store_true", help="measure finished cells, too")
    measured.add_argument(
        "--plan", action="store_true", help="say what there is to do and how long it takes; do nothing"
    )
    measured.set_defaults(action=_measure)
    written = commands.add_parser("write", help=f"write {PAGE} and its pictures beside the folder with the figures")
    written.set_defaults(action=_write)
    for each in (measured, written):
        each.add_argument("--folder", type=Path, default=FOLDER, help=f"with the figures as JSON; default: {FOLDER}")
        each.add_argument("--json", action="store_true")
    return run_command(parser, argv, interrupted="interrupted; finished cells are kept, start again to go on")


if __name__ == "__main__":
    sys.exit(main())
