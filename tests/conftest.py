"""What tests of several rooms share: a small study, a clock that nobody waits for, and a laid-out federation to copy."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medfed.seams import Seams, SystemEntropy, SystemFiles, SystemNetwork
from medfed.study import Study

if TYPE_CHECKING:
    from medfed.client.hospital import Hospital
    from medfed.client.local_steps import Noise
    from medfed.client.site import Site
    from medfed.simulations.cohorts import Cohort

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
    "cohort": {
        "hospitals": 4,
        "colluders": 1,
        "fewest_survivors": 4,
        "most_hospitals": 4,
        "roster_sha256": "cd" * 32,
    },
    "deadlines": {"setup_s": 120.0, "round_s": 60.0},
}

Changes = tuple[tuple[str, str], ...]
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
MORE_NAMES = ("Emden", "Fulda", "Goslar")


def _cohort(number: int = len(NAMES)) -> Cohort:
    """``number`` hospitals with 5, 6, ... patients of one to three records each."""
    everybody = (*NAMES, *MORE_NAMES)[:number]
    from medfed.simulations.cohorts import Cohort, Extract
    from medfed.simulations.cohorts import Hospital as Split

    def table(hospital: int, patients: int) -> Extract:
        rows = [
            (
                f"{everybody[hospital]}-p{patient}",
                str(30 + 7 * patient + record + hospital),
                f"{patient % 5}.{record}",
                ("yes", "no")[(patient + record) % 2],
                str((patient + hospital) % 2),
            )
            for patient in range(patients)
            for record in range(1 + patient % 3)
        ]
        names = ("patient", "age", "lactate", "ventilated", "ill")
        return Extract(dict(zip(names, zip(*rows, strict=True), strict=True)))

    hospitals = tuple(Split(name, table(place, 5 + place), table(place, 2)) for place, name in enumerate(everybody))
    return Cohort("tiny", str(TASK_FILE), 1e-3, hospitals, "none", "made up")


@pytest.fixture(scope="session")
def tiny_cohort() -> Cohort:
    """The made-up patients of the laid-out federation."""
    return _cohort()


LayOut = Callable[..., Path]


@pytest.fixture(scope="session")
def quick_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where the machine has one: a federation syncs to disk hundreds of times."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path_factory.mktemp("quick")
        return
    with tempfile.TemporaryDirectory(prefix="medfed-test-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def lay_out_once(quick_folder: Path) -> LayOut:
    """Four hospitals and a coordinator laid out, enrolled and approved by the code of the commands; made once, copy it.

    The argument: what is replaced in the task's file.
    """
    from medfed.simulations.rehearsal import Rehearsal, lay_out, lay_out_hospital
    from medfed.study import load_study

    made: dict[tuple[Changes, int, int, int], Path] = {}

    def once(changes: Changes, hospitals: int = len(NAMES), drop_outs: int = 0, room: int = 0) -> Path:
        key = (changes, hospitals, drop_outs, room)
        if key not in made:
            text = TASK_FILE.read_text()
            for old, new in changes:
                assert old in text
                text = text.replace(old, new)
            folder = Path(tempfile.mkdtemp(prefix="blank-", dir=quick_folder))
            (folder / "task.toml").write_text(text)
            seams = Seams(FakeClock(), SystemNetwork(), SystemFiles(), SystemEntropy())
            cohort = replace(_cohort(hospitals), task=str(folder / "task.toml"))
            plan, study = Rehearsal(epsilon=8.0, mode="local", seed=1, drop_outs=drop_outs), None
            if room:
                study = load_study(seams.files, once(changes, hospitals, drop_outs) / "coordinator/study/study.toml")
                wider = study.cohort.model_copy(update={"most_hospitals": room})
                study = study.model_copy(update={"cohort": wider})
                for joiner in _cohort(len(NAMES + MORE_NAMES)).hospitals[hospitals:]:
                    lay_out_hospital(folder / joiner.name, joiner, seams)
            lay_out(folder, cohort, plan, seams, study)
            made[key] = folder
        return made[key]

    return once


class World:
    """A copy of the federation: opens, kills and reopens hospitals; speaks for the coordinator."""

    def __init__(self, folder: Path, clock: FakeClock, stack: contextlib.ExitStack) -> None:
        from medfed.server.daemon import load_assignment, run_folder
        from medfed.server.setup import load_office
        from medfed.server.store import Store

        self.folder = folder
        self.clock = clock
        self.stack = stack
        self.base = Seams(clock, SystemNetwork(), SystemFiles(), SystemEntropy())
        self.office = load_office(self.base, folder / "coordinator" / "server.toml")
        self.assignment = load_assignment(self.office)
        self.study = self.assignment.study
        self.study_hash = self.study.hash()
        self.run_folder = run_folder(self.office, self.assignment)
        self.store = Store(self.base.files, self.run_folder, self.study, self.assignment.plan.words)
        self.hospitals: dict[int, Hospital] = {}
        self.names = [entry.hospital for entry in self.assignment.roster.hospitals]
        self._starts: Counter[str] = Counter()
        self._open: dict[int, contextlib.ExitStack] = {}

    def seams_of(self, owner: str) -> Seams:
        """Seeded entropy of its own for every start of every process: a restart must not repeat a draw."""
        from medfed.simulations.entropy import SeededEntropy

        self._starts[owner] += 1
        return replace(self.base, entropy=SeededEntropy(1, f"{owner}/{self._starts[owner]}"))

    def extend(self, *names: str) -> None:
        """Put hospitals that are laid out at the end of the roster; the coordinator's next start reads it."""
        from medfed.server.daemon import load_assignment
        from medfed.server.study_folder import extend_roster

        documents = [self.folder / name / "enrolment.json" for name in names]
        extend_roster(self.base.files, self.office.study_path, documents)
        self.assignment = load_assignment(self.office)
        self.names = [entry.hospital for entry in self.assignment.roster.hospitals]

    def place(self, position: int) -> Path:
        """A hospital's folder for this study."""
        return self.folder / self.names[position] / "studies" / self.study_hash.hex()

    def site(self, position: int, **seams: object) -> Site:
        """``site(0, entropy=...)``: with a seam replaced."""
        from medfed.client.site import load_site

        mine = replace(self.seams_of(self.names[position]), **seams)
        return load_site(mine, self.folder / self.names[position] / "hospital.toml")

    def start(self, position: int, noise: Noise | None = None, **seams: object) -> Hospital:
        """Start (or kill and start again) a hospital's process."""
        from medfed.client.daemon import open_hospital
        from medfed.privacy.noise import discrete_gaussian

        self.kill(position)
        own = self.stack.enter_context(contextlib.ExitStack())
        site = self.site(position, **seams)
        self.hospitals[position] = own.enter_context(open_hospital(site, noise or discrete_gaussian))
        self._open[position] = own
        return self.hospitals[position]

    def start_all(self, noise: Noise | None = None) -> None:
        for position in range(len(self.names)):
            self.start(position, noise)

    def kill(self, position: int) -> None:
        """What was in memory is gone."""
        self.hospitals.pop(position, None)
        if position in self._open:
            self._open.pop(position).close()

    def rows(self, position: int) -> list[tuple[str, int]]:
        """Kind and attempt of every row of a hospital's ledger, read from its file beside the running process."""
        from medfed.client.ledger import LedgerView

        site = self.site(position)
        with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
            return [(entry.kind.value, entry.attempt) for entry in ledger.entries()]

    def charged(self, position: int) -> int:
        """Events charged at a hospital."""
        return sum(kind == "RESERVED" for kind, _ in self.rows(position))


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(lay_out_once: LayOut, quick_folder: Path, clock: FakeClock) -> Iterator[MakeWorld]:
    """``make_world()``: a fresh copy of the laid-out federation under the fake clock; closed and removed at the end.

    ``hospitals``, ``drop_outs``: of another federation than the one of four that are all needed. ``room``: so many may be summed;
    then those of ``MORE_NAMES`` that are not enrolled are laid out as well.
    """
    with contextlib.ExitStack() as stack:

        def make(*changes: tuple[str, str], hospitals: int = len(NAMES), drop_outs: int = 0, room: int = 0) -> World:
            blank = lay_out_once(changes, hospitals, drop_outs, room)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=quick_folder))
            shutil.copytree(blank, folder, dirs_exist_ok=True)
            return World(Path(folder), clock, stack)

        yield make


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """The federation with nobody started."""
    return make_world()


# ------------------------------------------------------------------------------------ a package of own models, installed


@pytest.fixture(scope="session")
def ward_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel of ``tests/ward_models`` was installed into, without network."""
    place = tmp_path_factory.mktemp("ward")
    shutil.copytree(Path(__file__).parent / "ward_models", place / "source")
    (place / "source" / "ward_models" / "backbone.safetensors").write_bytes(_backbone())
    (place / "source" / "ward_models" / "notes.safetensors").write_bytes(_notes())
    _python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(place / "wheels"), str(place / "source"))
    (wheel,) = (place / "wheels").glob("*.whl")
    plain = ["--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(place / "installed")]
    _python("-m", "pip", "install", *plain, str(wheel))
    return place / "installed"


def _backbone() -> bytes:
    """As if pretrained: of 3 inputs."""
    import numpy as np
    from safetensors.numpy import save

    shapes = {"first.weight": (8, 3), "first.bias": (8,), "second.weight": (6, 8), "second.bias": (6,)}
    draws = np.random.default_rng(4)
    return bytes(save({name: draws.normal(0.0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}))


def _notes() -> bytes:
    """As if pretrained: a small Transformer over texts of 256 buckets."""
    import torch

    from medfed.models.parameters import flatten, to_safetensors
    from medfed.models.transformer import TextTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = TextTransformer(257, 1, 8, 2, 1, 12)
        return to_safetensors(model, flatten(model))


def _python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture
def ward_models(ward_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the installed package that Python finds; forgotten afterwards, as if the process ended."""
    from medfed.models import own_models

    place = tmp_path / "installed"
    shutil.copytree(ward_wheel, place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(own_models, "_apart", set())
    yield place
    for name in [name for name in sys.modules if name.split(".")[0] == "ward_models"]:
        del sys.modules[name]


Release = Callable[..., Path]


@pytest.fixture
def release() -> Release:
    """``release(folder, study, weights)``: a run's folder with this model, of fresh weights without any given."""

    def make(folder: Path, study: Study, weights: object = None) -> Path:
        import torch

        from medfed.models import catalogue, parameters

        torch.manual_seed(5)
        model = catalogue.build(study)
        flat = parameters.flatten(model) if weights is None else weights
        folder.mkdir(parents=True)
        (folder / "study.json").write_bytes(study.canonical_bytes())
        (folder / "model.safetensors").write_bytes(parameters.to_safetensors(model, flat))
        return folder

    return make
