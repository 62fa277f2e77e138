"""SIGTERM and SIGINT as an event that long-lived processes wait for."""

from __future__ import annotations

import signal
import threading
from types import FrameType


def stop_on_signals() -> threading.Event:
    """An event that the first SIGTERM or SIGINT sets. Call from the main thread, once a process.

    A second signal acts as usual, so that an operator can always end the process.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        # not set() here: the signal may have interrupted wait(), which holds the event's lock
        threading.Thread(target=stop.set).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop
