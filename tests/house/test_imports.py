"""The doors of the house: who may import whom, and that the machine is reached through the four seams only.

Every source file is parsed, none is trusted. Exceptions are listed here with their reason; an exception that is no longer
needed fails too, so that the lists stay short.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("medfed", "models", "privacy", "client", "server", "simulations")

# room -> rooms it may import from; the hall is "medfed"
DOORS = {
    "medfed": {"medfed"},
    "models": {"medfed", "models"},
    "privacy": {"medfed", "privacy"},
    "client": {"medfed", "models", "privacy", "client"},
    "server": {"medfed", "models", "privacy", "server"},
    "simulations": set(ROOMS),
}

# package -> files or folders that may import it
LIBRARIES = {
    "flwr": (
        "client/node.py",
        "client/supernode.py",
        "server/link/",
        "simulations/",
        "medfed/flower_pieces.py",  # for the first and the third
    ),
    "ray": ("simulations/backends/",),
    "cryptography": (
        "privacy/",
        "medfed/identity.py",
        "server/certificates.py",
        "client/node.py",  # reads the node key for Flower's interceptor
        "server/link/",  # reads the enrolled node keys for Flower's registry
    ),
    "opacus": (
        "privacy/gradients/",
        "simulations/benchmarks/gradients_peers.py",  # both compare with it, and nothing that is released uses them
        "simulations/results/opacus_peer.py",
    ),
    "dp_accounting": ("privacy/",),
    "sqlite3": ("medfed/seams.py", "client/ledger/"),
    "httpx": ("medfed/seams.py", "client/", "server/link/", "simulations/fetch.py"),
    "sklearn": ("simulations/",),
    "matplotlib": ("simulations/", "client/explanation_pictures.py"),
    "nibabel": ("client/sources/volumes.py", "simulations/extract.py"),
    "rdkit": ("models/molecule_records.py", "simulations/molecule_cohort.py"),
    "captum": ("models/attribution.py",),
    "onnx": ("models/export.py",),
    "onnxruntime": ("models/export.py",),
    "onnxscript": ("models/export.py",),
    "PIL": ("client/sources/", "simulations/"),
    "torch": (
        "models/",
        "privacy/gradients/",
        "client/",
        "simulations/",
        "medfed/tape.py",  # what models and privacy/gradients share, and neither owns
        "medfed/recurren",
    ),
    "grpc": ("medfed/rpc.py", "client/control.py", "client/bridge.py"),
    "grpc_health": ("medfed/health.py",),
    "rich": ("medfed/progress.py", "simulations/"),
}


@dataclass(frozen=True)
class Source:
    """One source file, parsed."""

    path: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.path.split("/")[0]


@functools.cache
def sources() -> tuple[Source, ...]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return tuple(Source(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in files)


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, wherever in the file it stands."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}"


def room_of(name: str) -> str | None:
    """The room that a dotted name lies in; None for other packages."""
    parts = name.split(".")
    if parts[0] != "medfed":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS[1:] else "medfed"


def names(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain; empty parts for anything that is no name."""
    if isinstance(node, ast.Attribute):
        return f"{names(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_all_rooms_were_read() -> None:
    assert {source.room for source in sources()} == set(ROOMS)
    assert len(sources()) > 60


# ------------------------------------------------------------------------------------------------------------- doors


def wrong_doors(source: Source) -> list[str]:
    return [
        f"{source.path}:{line} imports {name}"
        for line, name in imports(source)
        if (room := room_of(name)) is not None and room not in DOORS[source.room]
    ]


def test_rooms_import_through_their_doors_only() -> None:
    assert [fault for source in sources() for fault in wrong_doors(source)] == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("models/a.py", "from medfed.privacy import noise"),
        ("privacy/a.py", "import medfed.models.records"),
        ("client/a.py", "from medfed import server"),
        ("server/a.py", "def f():\n    from medfed.client.ledger import Ledger"),
        ("medfed/a.py", "import medfed.client"),
        ("server/a.py", "if TYPE_CHECKING:\n    from medfed.simulations.grid import LocalGrid"),
    ],
)
def test_wrong_door_would_be_noticed(path: str, line: str) -> None:
    """The positive control: the same check on a file that breaks the rule."""
    assert len(wrong_doors(Source(path, ast.parse(line)))) == 1


def test_libraries_are_imported_in_their_rooms_only() -> None:
    faults = [
        f"{source.path}:{line} imports {name}"
        for source in sources()
        for line, name in imports(source)
        if (allowed := LIBRARIES.get(name.split(".")[0])) and not source.path.startswith(allowed)
    ]
    assert faults == []


@pytest.mark.parametrize("package", LIBRARIES)
def test_files_that_may_import_a_library_still_do(package: str) -> None:
    """Only the exceptions made for single files: whole rooms stay open to theirs."""
    users = {source.path for source in sources() for _, name in imports(source) if name.split(".")[0] == package}
    assert {place for place in LIBRARIES[package] if place.endswith(".py")} - users == set()


def test_nobody_imports_a_bare_room_relatively_or_the_tests() -> None:
    bare = {*ROOMS[1:], "tests", "deploy"}
    faults = [
        f"{source.path}:{line} imports {name}"
        for source in sources()
        for line, name in imports(source)
        if name.startswith(".") or name.split(".")[0] in bare
    ]
    assert faults == []


# ------------------------------------------------------------------------------------------------------------- seams

# what reaches the machine: dotted names, and modules that have no other use
CALLS = {
    *(f"time.{name}" for name in ("time", "monotonic", "sleep", "perf_counter", "time_ns", "monotonic_ns")),
    *(f"datetime.datetime.{name}" for name in ("now", "utcnow", "today")),
    *(f"datetime.{name}" for name in ("now", "utcnow", "today")),
    *(f"{owner}.today" for owner in ("datetime.date", "date")),
    *(f"os.{name}" for name in ("urandom", "getrandom", "open", "remove", "unlink", "rename", "replace", "environ")),
    *(f"os.{name}" for name in ("getenv", "mkdir", "makedirs", "fork", "kill", "listdir", "path.exists", "fsync")),
    *(f"{owner}.random" for owner in ("np", "numpy")),
    *(f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "manual_seed", "bernoulli", "normal")),
    "open",
    "input",
    "uuid.uuid4",
    "uuid.uuid1",
}
PATH_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "unlink", "touch", "mkdir", "rmdir", "rename"}
MODULES = {"time", "secrets", "random", "socket", "subprocess", "shutil", "tempfile", "urllib", "requests", "http"}

SIMULATIONS = "simulations/"  # plays with what production may not touch; it is no part of a hospital or coordinator
ALLOWED = {
    ("medfed/command.py", "os.open"): "a closed pipe's descriptor is pointed at the null device while the process ends",
    ("medfed/flower.py", "os.environ"): "switches Flower's telemetry off before its import",
    ("medfed/rpc.py", "os.environ"): "tells gRPC, which reads nothing else, to keep its lines off standard error",
    ("client/compute.py", "os.environ"): "tells cuBLAS, which reads nothing else, to add up in one order",
    ("client/channel.py", "socket"): "names the error of a failed name look-up; opens nothing",
    ("server/link/superlink.py", "socket"): "asks for free loopback ports, as Flower's server wants numbers",
    ("server/link/serve.py", "os.environ"): "hands the parent's environment on to the training child",
    ("server/link/serve.py", "subprocess"): "the training child; its life is the parent's business",
}


def machine_uses(source: Source) -> Iterator[tuple[int, str]]:
    """Line and name of every way past the seams."""
    for line, name in imports(source):
        if name.split(".")[0] in MODULES:
            yield line, name.split(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            dotted = names(node)
            if dotted in CALLS:
                yield node.lineno, dotted
            elif node.attr in PATH_METHODS:
                yield node.lineno, f".{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.lineno, node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "open":
            mode = node.args[0] if node.args else None
            if isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwabx+t"):
                yield node.lineno, ".open"


def past_the_seams() -> list[tuple[str, int, str]]:
    return [
        (source.path, line, name)
        for source in sources()
        if source.path != "medfed/seams.py" and not source.path.startswith(SIMULATIONS)
        for line, name in machine_uses(source)
    ]


def test_machine_is_reached_through_the_seams_only() -> None:
    faults = [f"{path}:{line} uses {name}" for path, line, name in past_the_seams() if (path, name) not in ALLOWED]
    assert faults == []


def test_exceptions_from_the_seams_are_still_needed() -> None:
    assert set(ALLOWED) - {(path, name) for path, _, name in past_the_seams()} == set()


@pytest.mark.parametrize(
    "line",
    [
        "import time\ntime.sleep(1)",
        "from time import monotonic",
        "import os\nkey = os.urandom(32)",
        "import secrets",
        "from random import random",
        "import numpy as np\nnoise = np.random.default_rng()",
        "import datetime\nnow = datetime.datetime.now()",
        "data = open('ledger')",
        "with path.open('rb') as file: pass",
        "text = path.read_text()",
        "path.write_bytes(b'')",
        "import socket",
        "import torch\ntorch.manual_seed(1)",
        "import os\nx = os.environ['HOME']",
    ],
)
def test_way_past_the_seams_would_be_noticed(line: str) -> None:
    assert list(machine_uses(Source("client/a.py", ast.parse(line))))


# --------------------------------------------------------------------------------------------------------- dangerous

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "pty"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system"}
FORBIDDEN_CALLS |= {"torch.hub.load", "torch.jit.load", "os.popen", "breakpoint"}


def dangers(source: Source) -> list[str]:
    found = [
        f"{source.path}:{line} imports {name}"
        for line, name in imports(source)
        if name.split(".")[0] in FORBIDDEN_MODULES or name.startswith("multiprocessing")
    ]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            if names(node.func) in FORBIDDEN_CALLS:
                found.append(f"{source.path}:{node.lineno} calls {names(node.func)}")
            found += [
                f"{source.path}:{node.lineno} sets {word.arg}"
                for word in node.keywords
                if word.arg in {"shell", "allow_pickle"}
                and not (isinstance(word.value, ast.Constant) and word.value.value is False)
            ]
        elif isinstance(node, ast.Assert):
            found.append(f"{source.path}:{node.lineno} validates with assert")
    return found


def test_nothing_received_can_become_code() -> None:
    assert [fault for source in sources() for fault in dangers(source)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "exec('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "assert signature",
        "from multiprocessing import Queue",
    ],
)
def test_danger_would_be_noticed(line: str) -> None:
    assert dangers(Source("client/a.py", ast.parse(line)))


IMPORTERS = {
    "server/link/child.py": "the task that its parent process names through the pipe",
    "simulations/__init__.py": "the public names, by a closed table, when they are first used",
    "models/own_packages.py": "an own model's module, from verified bytes of the package that study and policy name",
}


def test_modules_are_imported_by_name_in_three_places_only() -> None:
    """``import_module`` with anything but a constant runs what its argument says."""
    users = {
        source.path
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and names(node.func).endswith("import_module")
    }
    assert users == set(IMPORTERS)


# ----------------------------------------------------------------------------------------------------------- start-up

HEAVY = (
    "torch",
    "flwr",
    "opacus",
    "dp_accounting",
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "pydantic",
    "cryptography",
    "grpc",
    "grpc_health",
    "ray",
)
_PROGRAM = """
import contextlib, io, json, sys
from medfed.{room}.cli import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    try:
        main(["--help"])
    except SystemExit:
        pass
print(json.dumps({{"help": out.getvalue(), "modules": sorted({{name.split(".")[0] for name in sys.modules}})}}))
"""


@pytest.mark.parametrize("room", ["client", "server", "simulations"])
def test_help_is_shown_without_heavy_imports(room: str) -> None:
    """What takes seconds to import is imported by the command that needs it, not by ``--help``."""
    done = subprocess.run([sys.executable, "-P", "-c", _PROGRAM.format(room=room)], capture_output=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert "usage: medfed-" in told["help"]
    assert sorted(set(told["modules"]) & set(HEAVY)) == []
