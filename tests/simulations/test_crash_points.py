"""A hospital or the coordinator dies at every point where it touches disk or randomness; the run goes on after restart.

A crash is an exception that nothing catches, raised before or after the n-th operation on a seam; the process's memory is
then thrown away and the party is opened anew from its folder. Time is virtual.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medfed.client.daemon import open_hospital
from medfed.client.hospital import Hospital
from medfed.client.ledger import Kind, Ledger
from medfed.client.setup import open_site
from medfed.errors import EnvironmentFault
from medfed.privacy.noise import discrete_gaussian
from medfed.seams import Seams, SystemEntropy, SystemFiles, system_seams
from medfed.server.daemon import load_assignment
from medfed.server.exchange import Reply
from medfed.server.rounds import Rounds
from medfed.server.setup import load_office
from medfed.server.store import Store
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.rehearsal import Rehearsal, lay_out

ROUNDS, SPARES = 3, 2


class Killed(BaseException):
    """The process is gone."""


class Fuse:
    """Counts operations; blows at number ``at`` (before it if ``before``), once."""

    def __init__(self, at: int | None = None, before: bool = True) -> None:
        self.count, self.at, self.before = 0, at, before

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self.count += 1
        blows = self.count == self.at
        if blows and self.before:
            raise Killed
        yield
        if blows:
            raise Killed


class _Connection:
    """An SQLite connection whose commits are counted."""

    def __init__(self, inner: sqlite3.Connection, fuse: Fuse) -> None:
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_fuse", fuse)

    def execute(self, statement: str, *rest):
        if statement == "COMMIT":
            with self._fuse.around():
                return self._inner.execute(statement, *rest)
        return self._inner.execute(statement, *rest)

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._inner, name, value)


class CrashingFiles(SystemFiles):
    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse

    def write(self, path, data, *, private=False):
        with self.fuse.around():
            super().write(path, data, private=private)

    def append(self, path, data):
        with self.fuse.around():
            super().append(path, data)

    def remove(self, path):
        with self.fuse.around():
            super().remove(path)

    def database(self, path, *, create):
        return _Connection(super().database(path, create=create), self.fuse)


class CrashingEntropy(SystemEntropy):
    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse

    def draw(self, purpose, size_bytes):
        with self.fuse.around():
            return super().draw(purpose, size_bytes)


class VirtualClock:
    """Sleeping takes no time."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        self.now += 1e-4
        return self.now

    def sleep(self, seconds: float, wake: threading.Event | None = None) -> None:
        self.now += max(seconds, 0.0)


def _seams(fuse: Fuse, clock: VirtualClock) -> Seams:
    return replace(system_seams(), files=CrashingFiles(fuse), entropy=CrashingEntropy(fuse), clock=clock)


class HospitalProcess:
    """A hospital that can be killed and opened anew from its folder."""

    def __init__(self, folder: Path, seams: Seams, calm: Seams) -> None:
        self.folder, self.calm = folder, calm
        self._stack = contextlib.ExitStack()
        self.hospital: Hospital | None = None
        self.kills = 0
        try:
            self._open(seams)
        except Killed:
            self.restart()

    def _open(self, seams: Seams) -> None:
        site = open_site(seams, self.folder / "hospital.toml")
        self.hospital = self._stack.enter_context(open_hospital(site, discrete_gaussian))

    def restart(self) -> None:
        self.kills += 1
        self.close()
        self._open(self.calm)

    def handle(self, frame: bytes) -> bytes | None:
        try:
            return self.hospital.handle(frame)
        except Killed:
            self.restart()
            return None

    def close(self) -> None:
        self._stack.close()
        self._stack = contextlib.ExitStack()


class Wires:
    """An exchange over hospital processes; the reply of a process that dies is lost."""

    def __init__(self, processes: list[HospitalProcess]) -> None:
        self.processes, self.inbox = processes, []

    def online(self) -> frozenset[int]:
        return frozenset(range(len(self.processes)))

    def send(self, position, kind, payload, timeout_s):
        reply = self.processes[position].handle(payload)
        if reply is not None:
            self.inbox.append(Reply(position, reply, None))

    def receive(self):
        replies, self.inbox = self.inbox, []
        return replies


def _laid_out(folder: Path, hospitals: int, drop_outs: int) -> Path:
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", 1, hospitals)
    plan = Rehearsal(1.0, "local", rounds=ROUNDS, spare_attempts=SPARES, drop_outs=drop_outs)
    lay_out(folder, cohort, plan, seams)
    return folder


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    """Three hospitals, all of which are needed."""
    return _laid_out(tmp_path_factory.mktemp("federation"), 3, 0)


@pytest.fixture(scope="module")
def with_recovery(tmp_path_factory) -> Path:
    """Five hospitals, any four of which make a sum."""
    return _laid_out(tmp_path_factory.mktemp("federation"), 5, 1)


class Federation:
    """A copy of the laid-out folders, run with one party under a fuse."""

    def __init__(self, template: Path, folder: Path) -> None:
        shutil.copytree(template, folder)
        self.folder = folder
        self.names = sorted(place.name for place in folder.glob("hospital-*"))
        self.clock = VirtualClock()
        self.calm = _seams(Fuse(), self.clock)

    def run(self, hospital_fuse: Fuse, coordinator_fuse: Fuse) -> int:
        """To the end, whatever dies; returns how often the coordinator died."""
        shaky = _seams(hospital_fuse, self.clock)
        seams = [shaky] + [self.calm] * (len(self.names) - 1)
        processes = [HospitalProcess(self.folder / n, s, self.calm) for n, s in zip(self.names, seams, strict=True)]
        self.hospital_kills = 0
        try:
            return self._coordinate(Wires(processes), _seams(coordinator_fuse, self.clock))
        finally:
            self.hospital_kills = sum(process.kills for process in processes)
            for process in processes:
                process.close()

    def _coordinate(self, wires: Wires, seams: Seams) -> int:
        assignment = load_assignment(load_office(self.calm, self.folder / "coordinator" / "server.toml"))
        for deaths in range(3):
            with contextlib.suppress(Killed):
                store = Store(seams.files, self.folder / "run", assignment.study, assignment.plan.words)
                self.checkpoint = Rounds(assignment, wires, store, seams, lambda checkpoint, what: None).run()
                return deaths
        raise AssertionError("the coordinator died more often than its fuse allows")

    def check(self, kills: int) -> None:
        """I1-I3 of the design: the run ended, spends are all there, chains are whole, nothing left uncharged."""
        state = self.checkpoint.state
        assert state.completed_rounds == ROUNDS
        assert self.checkpoint.last_attempt <= ROUNDS + kills
        for position, name in enumerate(self.names):
            site = open_site(self.calm, self.folder / name / "hospital.toml")
            with Ledger.open(self.calm.files, site.ledger_path, site.identity()) as ledger:
                ledger.verify()
                entries = ledger.entries()
            charged = {entry.attempt for entry in entries if entry.kind is Kind.RESERVED}
            left = {entry.attempt for entry in entries if entry.kind is Kind.RELEASED}
            assert left <= charged
            assert len(left) >= sum(position in record.survivors for record in self.checkpoint.records)
            (final,) = (self.folder / name / "studies").glob("*/model.safetensors")
            assert final.stat().st_size > 0


def _operations(template: Path, folder: Path) -> tuple[int, int]:
    """How many seam operations a calm run has, at one hospital and at the coordinator."""
    hospital, coordinator = Fuse(), Fuse()
    federation = Federation(template, folder)
    federation.run(hospital, coordinator)
    federation.check(0)
    assert np.isfinite(federation.checkpoint.state.weights).all()
    return hospital.count, coordinator.count


def _points(total: int, every: int) -> list[tuple[int, bool]]:
    """Which operation, and whether to die before or after it: all of them, or a spread over all phases."""
    return [(at, before) for at in range(1, total + 1) for before in (True, False)][::every]


# a stride prime to the number of operations a round walks through all phases over the rounds
SOME, FEW, ALL = 7, 17, pytest.param(1, marks=pytest.mark.soak)


@pytest.mark.parametrize("every", [SOME, ALL])
def test_a_hospital_killed_at_any_seam_operation_costs_at_most_one_spare(laid_out, tmp_path, every):
    total, _ = _operations(laid_out, tmp_path / "calm")
    assert total > 20
    for at, before in _points(total, every):
        federation = Federation(laid_out, tmp_path / f"{at}-{before}")
        federation.run(Fuse(at, before), Fuse())
        assert federation.hospital_kills == 1, (at, before)
        federation.check(1)


@pytest.mark.parametrize("every", [SOME, ALL])
def test_the_coordinator_killed_at_any_seam_operation_loses_no_attempt_that_was_begun(laid_out, tmp_path, every):
    _, total = _operations(laid_out, tmp_path / "calm")
    assert total > 8
    for at, before in _points(total, every):
        federation = Federation(laid_out, tmp_path / f"{at}-{before}")
        deaths = federation.run(Fuse(), Fuse(at, before))
        assert deaths == 1, (at, before)
        federation.check(0)


@pytest.mark.parametrize("every", [FEW, ALL])
def test_a_hospital_killed_at_any_operation_of_a_recovery_study_misses_a_round_at_most(with_recovery, tmp_path, every):
    """The others go on without it, and it is back for the next round."""
    total, _ = _operations(with_recovery, tmp_path / "calm")
    for at, before in _points(total, every):
        federation = Federation(with_recovery, tmp_path / f"{at}-{before}")
        federation.run(Fuse(at, before), Fuse())
        assert federation.hospital_kills == 1, (at, before)
        federation.check(1)
        assert all(len(record.survivors) >= 4 for record in federation.checkpoint.records)
        assert sum(5 - len(record.survivors) for record in federation.checkpoint.records) <= 1


@pytest.mark.parametrize("every", [FEW, ALL])
def test_the_coordinator_killed_at_any_operation_of_a_recovery_study_loses_no_attempt(with_recovery, tmp_path, every):
    _, total = _operations(with_recovery, tmp_path / "calm")
    for at, before in _points(total, every):
        federation = Federation(with_recovery, tmp_path / f"{at}-{before}")
        assert federation.run(Fuse(), Fuse(at, before)) == 1, (at, before)
        federation.check(0)
        assert all(len(record.survivors) == 5 for record in federation.checkpoint.records)


def test_a_hospital_killed_more_often_than_there_are_spares_ends_the_run_with_its_reason(laid_out, tmp_path):
    federation = Federation(laid_out, tmp_path / "run")

    def dies(key, sd, size):
        raise Killed

    site = open_site(federation.calm, federation.folder / "hospital-1" / "hospital.toml")

    class Dying(HospitalProcess):
        def _open(self, seams):
            self.hospital = self._stack.enter_context(open_hospital(site, dies))

    others = [HospitalProcess(federation.folder / f"hospital-{i}", federation.calm, federation.calm) for i in (2, 3)]
    dying = Dying(federation.folder / "hospital-1", federation.calm, federation.calm)
    try:
        with pytest.raises(EnvironmentFault, match="MF-190"):
            federation._coordinate(Wires([dying, *others]), federation.calm)
        assert dying.kills == ROUNDS + SPARES
    finally:
        for process in (dying, *others):
            process.close()
    with Ledger.open(federation.calm.files, site.ledger_path, site.identity()) as ledger:
        (study,) = ledger.studies()
        assert study.events == ROUNDS + SPARES  # every attempt is charged, though none completed
