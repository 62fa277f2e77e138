"""Noise of large models, drawn in a second thread while the gradient is computed: for one sum, used once, never kept.

Its key is drawn in the hospital's own thread, after the debit and after everything that a coordinator chose is fixed, as it
would be without the thread. Nothing is drawn ahead of that: what lies in a snapshot of this machine is the noise of the
attempt that runs, beside the very weights and patients it was drawn for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from medfed.errors import LocalProtocolError

BESIDE_FROM = 1 << 18
"""Vectors from here on get the thread: 2 ms of drawing and more, where starting and ending it takes a tenth of one."""


class OneNoise:
    """Noise for one sum. Whoever has taken it cannot take it again, nor can a fork of the process it was drawn in."""

    __slots__ = ("_draw", "_process")

    def __init__(self, draw: Callable[[], NDArray[np.int64]]) -> None:
        self._draw: Callable[[], NDArray[np.int64]] | None = draw
        self._process = os.getpid()

    def take(self) -> NDArray[np.int64]:
        """Wait for it: int64[size]. What drawing raised is raised here; a second call is MF-900."""
        draw = self._draw
        self.discard()
        if draw is None or os.getpid() != self._process:
            raise LocalProtocolError(900, "noise taken twice or after a fork", "report this as a fault of medfed")
        return draw()

    def discard(self) -> None:
        self._draw = None


@contextlib.contextmanager
def drawn_beside(draw: Callable[[], NDArray[np.int64]], size: int) -> Iterator[OneNoise]:
    """``draw()``, int64[size], under way in a thread of its own; of short vectors done when it is taken.

    *Guarantees* The thread has ended and its noise is forgotten when the block ends, however it ends.
    """
    if size < BESIDE_FROM:
        yield OneNoise(draw)
        return
    with ThreadPoolExecutor(1, "noise") as pool:
        drawn = OneNoise(pool.submit(draw).result)
        try:
            yield drawn
        finally:
            drawn.discard()
