"""A progress bar with the time left, for anything that takes more than two seconds; silent where nobody watches."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO


class Progress:
    """``with Progress("heart", 10, sys.stderr) as bar: bar.update(3, "round 4")``.

    Draws only when ``stream`` is a terminal. Otherwise completed steps are not mentioned: logs tell them.
    """

    def __init__(self, title: str, total: int, stream: TextIO) -> None:
        self._title = title
        self._total = total
        self._stream = stream
        self._bar: _Bar | None = None

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            self._bar = _Bar(self._title, self._total, self._stream)
        return self

    def update(self, completed: int, what: str) -> None:
        if self._bar is not None:
            self._bar.update(completed, what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Bar:
    """The drawing, imported when somebody watches."""

    def __init__(self, title: str, total: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}", markup=False),
        )
        self._progress = RichProgress(*columns, console=Console(file=stream))
        self._task = self._progress.add_task(title, total=total, what="")
        self._progress.start()

    def update(self, completed: int, what: str) -> None:
        self._progress.update(self._task, completed=completed, what=what)

    def stop(self) -> None:
        self._progress.stop()
