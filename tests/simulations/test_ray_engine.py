"""Rehearsals on Flower's simulation engine: the same model as in one process, on its own cluster and on one that is there."""

import contextlib
import importlib.util
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from medfed.client.ledger import Ledger
from medfed.client.site import Site
from medfed.errors import ConfigError, EnvironmentFault, MedfedError
from medfed.seams import system_seams
from medfed.server.exchange import Exchange
from medfed.simulations.cli import main
from medfed.simulations.cohorts import Cohort, load_cohort
from medfed.simulations.rehearsal import Backend, Rehearsal, Train, rehearse

PLAN = Rehearsal(epsilon=8.0, mode="distributed", rounds=2, seed=5)
has_ray = importlib.util.find_spec("ray") is not None
on_ray = pytest.mark.skipif(not has_ray, reason="needs the extra ray: make soak")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine and the backend change the environment of the process."""
    for name in ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_USAGE_STATS_ENABLED", "PYTHONPATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    root = logging.getLogger()  # a command logs to the standard error of its own test
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)


def a_cohort() -> Cohort:
    return load_cohort(system_seams().files, "breast-cancer", 1, 3)


def a_backend(address: str | None = None) -> Backend:
    from medfed.simulations.backends.ray_engine import ray_backend

    return ray_backend(address, system_seams())


def free_ledgers(folder: Path) -> list[bool]:
    files = system_seams().files
    return [not Ledger.is_held(files, place) for place in sorted(folder.glob("hospital-*/ledger.db"))]


_CLUSTER = """
import ray, sys
ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=int(sys.argv[1]), _temp_dir=sys.argv[2])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def cluster(processors: int) -> Iterator[str]:
    """A Ray cluster of this machine that another process started; its address."""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's: Ray's sockets need a short path
        command = [sys.executable, "-c", _CLUSTER, str(processors), folder]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        try:
            yield process.stdout.readline().strip()
        finally:
            process.communicate(timeout=60)


@on_ray
@pytest.mark.soak
def test_model_is_the_one_of_a_rehearsal_in_one_process_bit_for_bit(tmp_path):
    seams = system_seams()
    one = rehearse(tmp_path / "one", a_cohort(), PLAN, seams)
    other = rehearse(tmp_path / "other", a_cohort(), PLAN, seams, backend=a_backend())
    assert other.checkpoint.last_attempt == PLAN.rounds
    np.testing.assert_array_equal(one.weights.view(np.uint32), other.weights.view(np.uint32))
    assert free_ledgers(tmp_path / "other") == [True] * 3


@on_ray
@pytest.mark.soak
def test_command_runs_on_an_existing_cluster_which_goes_on_afterwards(tmp_path, capfd):
    """Only hospitals and pool are ended; Ray's and Flower's own lines are not shown."""
    arguments = ["run", "--cohort", "breast-cancer", "--hospitals", "3", "--split-seeds", "1", "--rounds", "2"]
    arguments += ["--seed", "5", "--no-baseline"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    with cluster(2) as address:
        capfd.readouterr()
        there = ["--backend", "ray", "--ray-address", address, "--keep-parties"]
        assert main([*arguments, *there, "--out", str(tmp_path / "other")]) == 0
        said = capfd.readouterr()
        assert "3 hospitals trained one model" in said.out
        assert [line for line in said.err.splitlines() if "ray" in line.lower() or "flower" in line.lower()] == []
        with socket.create_connection((address.split(":")[0], int(address.split(":")[1])), 5):
            pass
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert models[0] == models[1]
    assert free_ledgers(tmp_path / "other" / "parties" / "split-1") == [True] * 3


def spoiling(spoil: Callable[[Sequence[Site]], None]) -> Backend:
    """Ray's backend, with ``spoil`` called once all hospitals are open and know each other."""
    backend = a_backend()

    def spoiled(sites: Sequence[Site], plan: Rehearsal, train: Train) -> None:
        def spoil_and_train(exchange: Exchange) -> None:
            spoil(sites)
            train(exchange)

        backend(sites, plan, spoil_and_train)

    return spoiled


@on_ray
@pytest.mark.soak
def test_hospital_whose_process_ends_is_named_and_ends_the_run(tmp_path, caplog):
    def spoil(sites: Sequence[Site]) -> None:
        import ray

        ray.kill(ray.get_actor("hospital-1", namespace=ray.get_runtime_context().namespace))

    with pytest.raises(EnvironmentFault, match="MF-192 hospital-2 failed 3 times in a row"):
        rehearse(tmp_path, a_cohort(), PLAN, system_seams(), backend=spoiling(spoil))
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith("hospital-2 failed: its process on Ray ended")]
    assert free_ledgers(tmp_path) == [True] * 3


@on_ray
@pytest.mark.soak
def test_what_a_hospital_warns_of_is_said_as_in_one_process(tmp_path, caplog):
    """Its disk refuses what it seals, in every attempt."""

    def spoil(sites: Sequence[Site]) -> None:
        (folder,) = (sites[1].folder / "studies").iterdir()
        (folder / "outbox.bin").mkdir()

    with pytest.raises(EnvironmentFault, match="MF-190"):
        rehearse(tmp_path, a_cohort(), PLAN, system_seams(), backend=spoiling(spoil))
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith("hospital-2: ") and "INTERNAL" in line]
    assert free_ledgers(tmp_path) == [True] * 3


@on_ray
@pytest.mark.soak
def test_hospital_that_cannot_start_says_why_with_its_own_code(tmp_path):
    backend = a_backend()

    def spoiled(sites, plan, train):
        (sites[2].folder / "patients.csv").unlink()
        backend(sites, plan, train)

    with pytest.raises(MedfedError, match="hospital-3: ") as raised:
        rehearse(tmp_path, a_cohort(), PLAN, system_seams(), backend=spoiled)
    assert raised.value.code == 606
    assert free_ledgers(tmp_path) == [True] * 3


@on_ray
@pytest.mark.soak
def test_cluster_without_a_processor_is_refused(tmp_path):
    with cluster(0) as address, pytest.raises(EnvironmentFault, match="MF-630 the Ray cluster has no processor"):
        rehearse(tmp_path, a_cohort(), PLAN, system_seams(), backend=a_backend(address))


@on_ray
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:ray", ":1", "127.0.0.1:99999"])
def test_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="MF-203"):
        a_backend(address)


@on_ray
def test_address_where_nobody_listens_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match=f"MF-203 no Ray cluster answers at 127.0.0.1:{port}"):
        a_backend(f"127.0.0.1:{port}")


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", "--backend", "ray"]) == 2
    assert capsys.readouterr().err == "MF-320 Ray is not installed: pip install 'medfed[ray]'\n"


def test_address_without_the_backend_is_refused(capsys):
    assert main(["run", "--ray-address", "auto"]) == 2
    assert capsys.readouterr().err.startswith("MF-100 --ray-address is for Ray")
