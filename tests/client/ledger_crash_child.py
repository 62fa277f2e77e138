"""Run by test_ledger_crash.py in a process of its own: fork children that spend, kill them, look at what is left.

Prints one JSON object. Forking here, where no other thread runs, saves an interpreter start a cycle.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import sys
from pathlib import Path

from medfed.client.ledger import Approval, AttemptState, Caps, Ledger, PatientIds
from medfed.errors import MedfedError
from medfed.identity import Identity
from medfed.privacy.accounting import Mechanism
from medfed.seams import SystemFiles

IDENTITY = Identity.from_seed(bytes(32))
IDS = PatientIds(bytes(32), "patient")
CAPS = Caps(100.0, 100.0, 1e-5)
STUDY = bytes(32)
ATTEMPTS = 100_000
CYCLES_A_LEDGER = 25  # each is read from its first row at every start
MECHANISM = Mechanism(sampling_rate=1.0, sigma=1e6, shares=1, sensitivity=1000.0, dimensions=10)


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def approval() -> Approval:
    return Approval(STUDY, "crash", bytes(32), bytes(32), MECHANISM, ATTEMPTS, 1e-5, 100, (), 0.0, IDS)


class Files(SystemFiles):
    """Dies by SIGKILL before SQL statement number ``die_before`` of the connection; 0: lives."""

    def __init__(self, die_before: int) -> None:
        self._left = die_before

    def database(self, path: Path, *, create: bool) -> sqlite3.Connection:
        connection = super().database(path, create=create)
        if self._left:
            connection.set_trace_callback(self._count)
        return connection

    def _count(self, _: str) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def spend(path: Path, pipe: int, die_before: int) -> None:
    """The child: one attempt after the other; a line in the pipe only after the ledger said it is on disk."""

    def tell(line: str) -> None:
        os.write(pipe, f"{line}\n".encode())

    with Ledger.open(Files(die_before), path, IDENTITY) as ledger:
        first = ledger.highest_attempt(STUDY) + 1
        for attempt in range(first, first + 50):
            ledger.reserve(STUDY, attempt, attempt, CAPS, 0.0)
            tell(f"RESERVED {attempt}")
            ledger.seal_and_release(STUDY, attempt, digest("v", attempt), digest("p", attempt), digest("r", attempt))
            tell(f"RELEASED {attempt}")
            if attempt % 2:
                ledger.acknowledge(STUDY, attempt)
                tell(f"ACKED {attempt}")


def cycle(path: Path, die_before: int, kill_after: int) -> list[tuple[str, int]]:
    """Start a child, kill it in the middle, return what it said was on disk."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        spend(path, writing, die_before)
        os._exit(0)
    os.close(writing)
    said: list[tuple[str, int]] = []
    with os.fdopen(reading, "r") as lines:
        for line in lines:
            word, attempt = line.split()
            said.append((word, int(attempt)))
            if kill_after and len(said) == kill_after:
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WTERMSIG(status) != signal.SIGKILL:
        raise SystemExit("child was not killed")
    return said


def main(folder: Path, cycles: int) -> None:
    chance = random.Random(3)
    faults: list[str] = []
    spent, events, promised, total = 0.0, 0, 0, 0
    for number in range(cycles):
        path = folder / f"{number // CYCLES_A_LEDGER}" / "ledger.db"
        if number % CYCLES_A_LEDGER == 0:
            spent, events = 0.0, 0
            path.parent.mkdir()
            with Ledger.create(SystemFiles(), path, IDENTITY) as ledger:
                ledger.approve(approval(), [bytes(32)], CAPS)
        by_statement = chance.randrange(12, 80) if number % 2 else 0
        said = cycle(path, by_statement, 0 if by_statement else chance.randrange(1, 24))
        promised += len(said)
        with Ledger.open(SystemFiles(), path, IDENTITY) as ledger:
            ledger.verify()
            for word, attempt in said:
                status = ledger.attempt_status(STUDY, attempt)
                order = list(AttemptState)
                if status is None or order.index(status) < order.index(AttemptState(word)):
                    faults.append(f"{word} {attempt} was lost")
            account = ledger.account(STUDY, CAPS)
            if account.epsilon_spent < spent or account.attempts_used < events:
                faults.append("spending fell")
            if account.attempts_used > len({attempt for _, attempt in said}) + events + 1:
                faults.append("more was charged than one interrupted attempt")
            total += account.attempts_used - events
            spent, events = account.epsilon_spent, account.attempts_used
            attempt = ledger.highest_attempt(STUDY)
            if attempt and ledger.attempt_status(STUDY, attempt) is AttemptState.RESERVED:
                try:  # a restarted hospital may not charge it twice, only give it up or finish it
                    ledger.reserve(STUDY, attempt, attempt, CAPS, 0.0)
                    faults.append("double debit")
                except MedfedError:
                    ledger.abandon(STUDY, attempt, "interrupted")
    print(json.dumps({"cycles": cycles, "promised": promised, "events": total, "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
