"""What a debit costs: seconds from the call of ``reserve`` until it is on disk, in ledgers of several lengths.

``python -m medfed.simulations.benchmarks ledger --rows 100 1000 10000 --debits 300 --json``

One ledger grows over many studies on the same patients, and at each length debits are timed. Before each of them, as the
baseline, 4 KiB are appended to a file of the same disk and synced. The disk is that of ``--folder``: most machines keep
their temporary files in memory, where a sync costs nothing.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from medfed.client.ledger import Approval, Caps, Ledger, PatientIds
from medfed.identity import Identity
from medfed.privacy.accounting import Mechanism
from medfed.seams import Seams

ATTEMPTS, PATIENTS = 100, 1000
CAPS = Caps(max_epsilon_study=100.0, max_epsilon_lifetime=10_000.0, lifetime_delta=1e-5)
MECHANISM = Mechanism(sampling_rate=0.1, sigma=4000.0, shares=1, sensitivity=1000.0, dimensions=10_000)
IDS = PatientIds(bytes(32), "patient")
BLOCK = bytes(4096)


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _studies(ledger: Ledger) -> Iterator[tuple[bytes, int]]:
    """Study and attempt to charge next, without end: a study of ``ATTEMPTS`` is approved, used up, closed."""
    number, patients = 0, [_digest("patient", patient) for patient in range(PATIENTS)]
    while True:
        study = _digest("study", number)
        approval = Approval(
            study, f"study-{number}", bytes(32), bytes(32), MECHANISM, ATTEMPTS, 1e-5, PATIENTS, (), 0.0, IDS
        )
        ledger.approve(approval, patients, CAPS)
        yield from ((study, attempt) for attempt in range(1, ATTEMPTS + 1))
        ledger.close_study(study, "done")
        number += 1


def _finish(ledger: Ledger, study: bytes, attempt: int) -> None:
    """The rest of an attempt that arrived: three rows more."""
    vector, pad, reply = (_digest(what, study, attempt) for what in ("vector", "pad", "reply"))
    ledger.seal_and_release(study, attempt, vector, pad, reply)
    ledger.acknowledge(study, attempt)


def _timed_ms(seams: Seams, ledger: Ledger, baseline: Path, study: bytes, attempt: int) -> tuple[float, float]:
    """Of one debit, and of the baseline just before it."""
    clock = seams.clock
    started = clock.monotonic()
    seams.files.append(baseline, BLOCK)
    appended = clock.monotonic()
    ledger.reserve(study, attempt, attempt, CAPS, clock.wall())
    return (clock.monotonic() - appended) * 1e3, (appended - started) * 1e3


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


def _row(rows: int, timed: Sequence[tuple[float, float]]) -> dict[str, object]:
    debits, syncs = zip(*timed, strict=True)
    return {
        "rows": rows,
        "debit_p50_ms": round(statistics.median(debits), 2),
        "debit_p99_ms": round(_p99(debits), 2),
        "sync_p50_ms": round(statistics.median(syncs), 2),
        "sync_p99_ms": round(_p99(syncs), 2),
        "ratio": round(statistics.median(debit / sync for debit, sync in timed), 2),
    }


def run(rows: Sequence[int], debits: int, folder: Path, seams: Seams) -> dict[str, object]:
    """All figures as a JSON object; ``debit_*`` are those of the longest ledger."""
    lengths: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path, baseline = Path(place) / "ledger.db", Path(place) / "baseline"
        with Ledger.create(seams.files, path, Identity.from_seed(bytes(32))) as ledger:
            attempts = _studies(ledger)
            for length in sorted(rows):
                for study, attempt in attempts:
                    ledger.reserve(study, attempt, attempt, CAPS, seams.clock.wall())
                    _finish(ledger, study, attempt)
                    if ledger.head().seq >= length:
                        break
                timed: list[tuple[float, float]] = []
                for (study, attempt), _ in zip(attempts, range(debits), strict=False):
                    timed.append(_timed_ms(seams, ledger, baseline, study, attempt))
                    _finish(ledger, study, attempt)
                lengths.append(_row(length, timed))
    longest = lengths[-1]
    return {
        "debits": debits,
        "rows": longest["rows"],
        "debit_p50_ms": longest["debit_p50_ms"],
        "debit_p99_ms": longest["debit_p99_ms"],
        "ratio": longest["ratio"],
        "lengths": lengths,
    }
