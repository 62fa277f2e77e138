"""Seeded randomness for rehearsals that must repeat. Real hospitals and coordinators refuse it (MF-701)."""

from __future__ import annotations

import hashlib
import threading


class SeededEntropy:
    """A stream of bytes for each purpose, from one seed: SHAKE-256 over (seed, owner, purpose, draw number).

    One stream a purpose: a draw more or less in one place (a retry's jitter) leaves all other streams as they are, so
    that a run over real sockets draws the same noise as a simulation.
    """

    def __init__(self, seed: int, owner: str) -> None:
        self._root = hashlib.sha256(f"medfed/seeded-entropy/v1/{seed}/{owner}".encode()).digest()
        self._draws: dict[str, int] = {}
        self._lock = threading.Lock()

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        with self._lock:
            number = self._draws.get(purpose, 0)
            self._draws[purpose] = number + 1
        block = self._root + number.to_bytes(8, "big") + purpose.encode()
        return hashlib.shake_256(block).digest(size_bytes)
