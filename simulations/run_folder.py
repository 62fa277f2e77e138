"""The folder that a run leaves: built beside its place, put there when all is well, so that a failed run changes nothing."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from medfed.errors import ConfigError, EnvironmentFault
from medfed.seams import Seams

log = logging.getLogger("medfed.simulations")

RESULT_NAME = "result.json"
_KEYS = ({"cohort", "hospitals", "evaluation"}, {"audit", "stamps"})  # of a run's result, and of an audit's


@contextlib.contextmanager
def new_run_folder(out: Path, seams: Seams) -> Iterator[Path]:
    """An empty folder to fill. At the end of the block it becomes ``out``, in place of an earlier run, which is said.

    *Guarantees* If the block raises, ``out`` is as it was and the new folder is gone. Raises ``ConfigError`` MF-212 at
    once if ``out`` holds anything that is not a run: nothing of anybody else's is ever replaced.
    """
    out = out.resolve()
    require_replaceable(out, seams)
    _say_what_is_replaced(out, seams)
    partial = out.parent / f".{out.name}.{seams.entropy.draw('run-folder', 4).hex()}.partial"
    seams.files.make_folder(partial)
    try:
        yield partial
        _put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_replaceable(out: Path, seams: Seams) -> None:
    """Raise ``ConfigError`` MF-212 unless ``out`` is not there, is empty, or holds an earlier run."""
    if not seams.files.exists(out):
        return
    if not out.is_dir() or (any(out.iterdir()) and not _is_run(out, seams)):
        raise ConfigError(212, f"{out.name} is there and is not a run of medfed-simulate", "choose another --out")


def _say_what_is_replaced(out: Path, seams: Seams) -> None:
    if seams.files.exists(out / RESULT_NAME):
        when = datetime.datetime.fromtimestamp((out / RESULT_NAME).stat().st_mtime, datetime.UTC)
        log.info("%s: replaces the run of %s there, once this one is complete", out.name, f"{when:%Y-%m-%d %H:%M UTC}")


def _is_run(folder: Path, seams: Seams) -> bool:
    path = folder / RESULT_NAME
    if not seams.files.exists(path):
        return False
    try:
        result: object = json.loads(seams.files.read(path))
    except ValueError:
        return False
    return isinstance(result, dict) and any(keys <= set(result) for keys in _KEYS)


def _put_in_place(partial: Path, out: Path) -> None:
    earlier = partial.with_suffix(".earlier")
    try:
        if out.exists():
            out.rename(earlier)
        try:
            partial.rename(out)
        except OSError:
            if earlier.exists():
                earlier.rename(out)
            raise
    except OSError as error:
        raise EnvironmentFault(608, f"{out.name} could not be put in place", "choose another --out") from error
    shutil.rmtree(earlier, ignore_errors=True)
