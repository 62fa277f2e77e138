"""Hospitals' and coordinator's daily logs are left out of a rehearsal's terminal, until it fails: then they say why."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator

_LAST_WORDS = 10


class _Quiet(logging.Filter):
    """Holds back what the simulated parties log below a warning, and remembers the end of it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: deque[logging.LogRecord] = deque(maxlen=_LAST_WORDS)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING or not record.name.startswith(("medfed.client", "medfed.server")):
            return True
        if not (self.held and self.held[-1] is record):  # each handler asks
            self.held.append(record)
        return False


@contextlib.contextmanager
def quiet_parties() -> Iterator[None]:
    """No party's information on standard error within the block; its last lines if the block raises.

    With ``--debug`` (root logger at DEBUG) nothing is held back.
    """
    root, quiet = logging.getLogger(), _Quiet()
    if root.isEnabledFor(logging.DEBUG):
        yield
        return
    handlers = list(root.handlers)
    for handler in handlers:
        handler.addFilter(quiet)
    try:
        yield
    except BaseException:
        for handler in handlers:
            handler.removeFilter(quiet)
            for record in quiet.held:
                handler.handle(record)
        raise
    finally:
        for handler in handlers:
            handler.removeFilter(quiet)
