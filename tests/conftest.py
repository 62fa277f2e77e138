"""What tests of several rooms share: a small study, a clock that nobody waits for, and a laid-out federation to copy."""

from __future__ import annotations

import contextlib
import copy
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from medfed.seams import Seams, SystemEntropy, SystemFiles, SystemNetwork
from medfed.study import Study

_STUDY = {
    "study": {"format": 1, "name": "sepsis", "purpose": "Predict sepsis.", "expires": "2099-12-31"},
    "task": {"kind": "binary", "label": "ill", "classes": 2},
    "data": {
        "max_records_per_patient": 2,
        "features": [
            {
                "name": "age",
                "kind": "number",
                "unit": "years",
                "minimum": 0.0,
                "maximum": 120.0,
                "center": 60.0,
                "scale": 20.0,
                "outside": "refuse",
            },
            {
                "name": "lactate",
                "kind": "number",
                "unit": "mmol/l",
                "minimum": 0.0,
                "maximum": 30.0,
                "center": 2.0,
                "scale": 2.0,
                "outside": "clip",
                "missing": 1.0,
            },
            {"name": "ventilated", "kind": "category", "levels": ["no", "yes"], "center": 0.25, "scale": 0.5},
        ],
    },
    "model": {"name": "logistic-regression", "hidden": [], "first_model_sha256": "ab" * 32},
    "training": {
        "aggregate": "gradient",
        "rounds": 3,
        "spare_attempts": 2,
        "learning_rates": [[1, 0.5], [3, 0.25]],
        "average_last_rounds": 2,
        "server_step": {"kind": "momentum", "momentum": 0.9},
    },
    "privacy": {
        "unit": "patient",
        "adjacency": "add-remove",
        "mode": "local",
        "sampling_rate": 0.5,
        "clipping_norm": 1.0,
        "noise_multiplier": 2.0,
        "delta": 0.001,
        "epsilon": 8.0,
    },
    "quantization": {"ring_bits": 32, "range": 32.0},
    "cohort": {"hospitals": 4, "colluders": 1, "roster_sha256": "cd" * 32},
    "deadlines": {"setup_s": 120.0, "round_s": 60.0},
}

StudyValues = dict[str, dict[str, object]]
MakeStudy = Callable[..., Study]


def with_values(values: StudyValues, changes: Mapping[str, object]) -> StudyValues:
    """``values`` with dotted keys replaced: ``{"privacy.mode": "distributed"}``; ``...`` removes a key."""
    changed = copy.deepcopy(values)
    for path, value in changes.items():
        *parents, key = path.split(".")
        table: object = changed
        for parent in parents:
            table = table[int(parent)] if isinstance(table, list) else table[parent]
        if value is ...:
            del table[key]
        else:
            table[key] = value
    return changed


@pytest.fixture
def study_values() -> StudyValues:
    """A whole study as nested tables, to be changed at will."""
    return copy.deepcopy(_STUDY)


@pytest.fixture(scope="session")
def make_study() -> MakeStudy:
    """``make_study({"training.rounds": 5})``: the small study with dotted keys replaced."""

    def make(changes: Mapping[str, object] | None = None) -> Study:
        return Study.model_validate(with_values(_STUDY, changes or {}))

    return make


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, wall_s: float = 1_900_000_000.0) -> None:
        self.now_s = 0.0
        self.wall_from_s = wall_s
        self.slept: list[float] = []

    def wall(self) -> float:
        return self.wall_from_s + self.now_s

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float, wake: threading.Event | None = None) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def seams(clock: FakeClock) -> Seams:
    """The real disk and entropy under a clock that nobody waits for."""
    return Seams(clock, SystemNetwork(), SystemFiles(), SystemEntropy())


# ---------------------------------------------------------------------------------------- a federation in folders

TASK_FILE = Path(__file__).parent / "tiny_task.toml"
NAMES = ("Ahaus", "Bonn", "Celle", "Daun")


def _cohort() -> object:
    """Four hospitals with 5 to 8 patients of one to three records each; a mark in every cell that could leak."""
    from medfed.simulations.cohorts import Cohort, Hospital, Table

    def table(hospital: int, patients: int) -> Table:
        rows = [
            (f"{NAMES[hospital]}-p{patient}", str(30 + 7 * patient + record + hospital), f"{patient % 5}.{record}")
            + (("yes", "no")[(patient + record) % 2], str((patient + hospital) % 2))
            for patient in range(patients)
            for record in range(1 + patient % 3)
        ]
        names = ("patient", "age", "lactate", "ventilated", "ill")
        return Table(dict(zip(names, zip(*rows, strict=True), strict=True)))

    hospitals = tuple(
        Hospital(name, table(place, 5 + place), table(place, 2)) for place, name in enumerate(NAMES)
    )
    return Cohort("tiny", str(TASK_FILE), 1e-3, hospitals, "none", "made up")


@pytest.fixture(scope="session")
def blank_federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hospitals and a coordinator laid out, enrolled and approved by the code of the commands; copy it."""
    from medfed.simulations.rehearsal import Rehearsal, lay_out

    folder = tmp_path_factory.mktemp("federation")
    seams = Seams(FakeClock(), SystemNetwork(), SystemFiles(), SystemEntropy())
    lay_out(folder, _cohort(), Rehearsal(epsilon=8.0, mode="local", seed=1), seams)
    return folder


class World:
    """A copy of the federation: opens, kills and reopens hospitals; speaks for the coordinator."""

    def __init__(self, folder: Path, clock: FakeClock, seed: int = 1) -> None:
        from medfed.server.daemon import load_assignment, run_folder
        from medfed.server.setup import load_office
        from medfed.server.store import Store

        self.folder = folder
        self.clock = clock
        self.seed = seed
        self.starts = dict.fromkeys(NAMES, 0)
        self.coordinator_starts = 0
        self.base = Seams(clock, SystemNetwork(), SystemFiles(), SystemEntropy())
        self.office = load_office(self.base, folder / "coordinator" / "server.toml")
        self.assignment = load_assignment(self.office)
        self.study = self.assignment.study
        self.study_hash = self.study.hash()
        self.run_folder = run_folder(self.office, self.assignment)
        self.store = Store(self.base.files, self.run_folder, self.assignment.plan.words)

    def seams_of(self, owner: str, start: int) -> Seams:
        """Seeded entropy of its own for every start of every process: a restart must not repeat a draw."""
        from medfed.simulations.entropy import SeededEntropy

        return replace(self.base, entropy=SeededEntropy(self.seed, f"{owner}/{start}"))

    def site(self, position: int) -> object:
        from medfed.client.site import load_site

        name = NAMES[position]
        self.starts[name] += 1
        return load_site(self.seams_of(name, self.starts[name]), self.folder / name / "hospital.toml")

    def coordinator_seams(self) -> Seams:
        self.coordinator_starts += 1
        return self.seams_of("coordinator", self.coordinator_starts)


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(blank_federation: Path, tmp_path: Path, clock: FakeClock) -> MakeWorld:
    """``make_world()``: a fresh copy of the laid-out federation under the fake clock."""
    copies = 0

    def make(seed: int = 1) -> World:
        nonlocal copies
        copies += 1
        folder = tmp_path / f"world-{copies}"
        shutil.copytree(blank_federation, folder)
        return World(folder, clock, seed)

    return make


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    """Closes what a test opened."""
    with contextlib.ExitStack() as stack:
        yield stack
