"""The same ClientApp and ServerApp under Flower's own SuperLink and SuperNodes: its processes, its polling, its app bundle."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from medfed_test_seeded import SEED

from medfed.seams import system_seams
from medfed.server.daemon import load_assignment, run_folder
from medfed.server.setup import load_office
from medfed.server.store import Store
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.federation import free_ports
from medfed.simulations.rehearsal import Rehearsal, lay_out, rehearse

pytestmark = pytest.mark.soak

APP = Path(__file__).parent.parent.parent / "deploy" / "flower"
TASKS = Path(__file__).parent / "tasks"
PLAN = Rehearsal(epsilon=1.0, mode="distributed", rounds=3, seed=SEED)
GIVE_UP_S = 400.0  # a busy machine is slow, not broken
NAMES = ["hospital-1", "hospital-2", "hospital-3"]


class Flower:
    """Flower's own commands as processes with a log file each, which end with the block."""

    def __init__(self, folder: Path) -> None:
        self._bin = Path(sys.executable).parent
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",  # they start further commands by name
            "PYTHONPATH": str(TASKS),
            "FLWR_HOME": str(folder / "flower-home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def start(self, name: str, *command: str) -> None:
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        self._processes.append(process)

    def check(self) -> None:
        """Nobody has ended."""
        assert [process.args for process in self._processes if process.poll() is not None] == [], self.logs()

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self._logs.iterdir()))

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def flower(folder: Path) -> Iterator[Flower]:
    one = Flower(folder)
    try:
        yield one
    finally:
        one.close()


def status(folder: Path) -> dict:
    path = folder / "coordinator" / "status.json"
    return json.loads(path.read_bytes()) if path.exists() else {"what": "nothing", "round": 0}


def test_model_of_stock_superlink_and_supernodes_is_the_simulation_s_bit_for_bit(tmp_path):
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", SEED, len(NAMES))
    simulated = rehearse(tmp_path / "simulated", cohort, PLAN, seams)
    folder = tmp_path / "real"
    lay_out(folder, cohort, PLAN, seams)
    link, *ports = free_ports(1 + len(NAMES))
    with flower(folder) as processes:
        run(processes, folder, link, ports)
        office = load_office(seams, folder / "coordinator" / "server.toml")
        assignment = load_assignment(office)
        store = Store(seams.files, run_folder(office, assignment), assignment.study, assignment.plan.words)
        real = store.load_checkpoint()
        assert real.state.completed_rounds == PLAN.rounds, processes.logs()
        assert real.last_attempt == PLAN.rounds, processes.logs()
    print("seconds by round:", [round(record.seconds, 1) for record in real.records])
    for name in ("weights", "first", "second", "tail"):
        a, b = getattr(simulated.checkpoint.state, name), getattr(real.state, name)
        assert a.tobytes() == b.tobytes(), name


def run(processes: Flower, folder: Path, link: int, ports: list[int]) -> None:
    """SuperLink, hospitals, SuperNodes; then the study by ``flwr run``, until it is done."""
    address = f"127.0.0.1:{link}"
    no_installs = "--disable-runtime-dependency-installation"  # the SuperNode's default
    processes.start("superlink", "flower-superlink", "--insecure", "--port", str(link), no_installs)
    for name, port in zip(NAMES, ports, strict=True):
        processes.start(name, sys.executable, str(TASKS / "medfed_test_bridged.py"), str(folder / name))
        processes.start(
            f"node-{name}",
            *("flower-supernode", "--insecure", "--superlink", address, "--port", str(port)),
            *("--node-config", f"bridge='{folder / name / 'bridge.sock'}'"),
        )
    home = Path(processes.environment["FLWR_HOME"])
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "{address}"\ninsecure = true\n')
    app = folder / "app"
    shutil.copytree(APP, app)
    end = time.monotonic() + GIVE_UP_S
    command = ["flwr", "run", str(app), "here", "--run-config", f"server='{folder / 'coordinator' / 'server.toml'}'"]
    while subprocess.run(command, env=processes.environment, capture_output=True, cwd=folder).returncode != 0:
        assert time.monotonic() < end, processes.logs()  # the SuperLink is not up yet
        time.sleep(0.5)
    while status(folder)["what"] != "done":
        processes.check()
        assert status(folder)["what"] != "stopped", processes.logs()
        assert time.monotonic() < end, processes.logs()
        time.sleep(0.2)
