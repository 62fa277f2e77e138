"""One coordinator, real nodes, TLS on loopback: the contract with Flower 1.41."""

import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

import flwr
import httpx
import pytest
from medfed_test_federation import TASKS, ConnectProxy, running, until

from medfed.errors import ConfigError, EnvironmentFault, RemoteProtocolError
from medfed.server.link import superlink
from medfed.server.link.spool import SpoolingStore

PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}


def ended(pid: int) -> bool:
    """Gone, or a zombie that only waits for its parent."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_flower_is_the_version_the_adapters_were_read_against():
    assert flwr.__version__.startswith("1.41.")


def test_rounds_over_tls_carry_the_bytes(place, monkeypatch):
    kept, stores = [], []
    stop_run = superlink.SuperLink.stop_run

    def look_and_stop(self, run_id):
        store = self._app.state.linkstate_factory.state().object_store
        stores.append(type(store))
        kept.extend(store.store)
        stop_run(self, run_id)

    monkeypatch.setattr(superlink.SuperLink, "stop_run", look_and_stop)
    with ConnectProxy() as proxy:
        server = place.serve("rounds", hospitals=2, rounds=6)
        nodes = [
            place.node(0, lambda data: b"h0:" + data),
            place.node(1, lambda data: b"h1:" + data, proxy=proxy.url),
        ]
        with running(server, *nodes):
            assert server.result() == 0
            assert [node.end() for node in nodes] == [None, None]
    result = place.result()
    assert result["answers"] == [[[0, f"h0:round {i}"], [1, f"h1:round {i}"]] for i in range(6)]
    assert not result["token_in_argv"]
    assert stores == [SpoolingStore], "Flower uses the store that it was given"
    assert len(kept) <= 4, "objects of finished messages stay in memory"  # the last replies' may be under way
    assert set(proxy.seen) == {f"CONNECT localhost:{place.port}"}
    assert not (place.folder / "flower-home").exists(), "Flower wrote something"


def test_node_after_the_server_restarted_empty_connects_again_and_a_killed_child_is_replaced(place):
    nodes = [place.node(i) for i in range(2)]
    first = place.serve("rounds", hospitals=2, rounds=1)
    with running(first, *nodes):
        assert first.result() == 0
        (place.folder / "result.json").unlink()
        second = place.serve("die_once", hospitals=2, rounds=2)
        with running(second):
            assert second.result() == 0
    assert (place.folder / "died").exists()
    assert [len(answers) for answers in place.result()["answers"]] == [2, 2]


def test_a_failing_hospital_costs_its_reply_only_and_shows_the_class_name_only(place):
    def fail(data: bytes) -> bytes:
        raise ValueError("patient 17 has no label")

    server = place.serve("rounds", hospitals=2, rounds=2)
    with running(server, place.node(0, fail), place.node(1)):
        assert server.result() == 0
    assert place.result()["answers"][1] == [[0, "ValueError"], [1, "round 1"]]


def test_stop_ends_the_child_and_the_service_and_keeps_strangers_out_meanwhile(place):
    server = place.serve("wait_for_ever")
    with running(server):
        pid = int(until(lambda: _text(place.folder / "pid")))
        tls = ssl.create_default_context(cafile=str(place.certificates.authority))
        with httpx.Client(verify=tls, base_url=f"https://localhost:{place.port}", trust_env=False) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/v1/control/list-runs").status_code == 404
            for size, answer in ((place.limit_bytes + 1, 413), (place.limit_bytes, 415)):
                assert client.post("/v1/fleet/pull-messages", content=bytes(size)).status_code == answer
        assert server.end() == 130
    assert ended(pid)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_child_of_a_killed_coordinator_ends(place):
    (place.folder / "config.json").write_text(json.dumps({}))
    command = [sys.executable, str(TASKS / "medfed_test_coordinator.py"), str(place.folder), str(place.port)]
    for i, key in enumerate(place.public_keys):
        (place.folder / f"node{i}.pub").write_bytes(key)
    parent = subprocess.Popen([*command, "wait_for_ever"])
    try:
        pid = int(until(lambda: _text(place.folder / "pid")))
        assert not ended(pid)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: ended(pid))


def test_serve_with_an_open_guard_is_refused(place, monkeypatch):
    monkeypatch.setattr(superlink, "FleetOnly", lambda app, limit_bytes: app)
    outcome = place.serve("rounds").result()
    assert isinstance(outcome, RemoteProtocolError)
    assert outcome.code == 615


def test_serve_on_a_taken_port_is_refused(place):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", place.port))
        other.listen()
        outcome = place.serve("rounds").result()
    assert isinstance(outcome, EnvironmentFault)
    assert outcome.code == 614


@pytest.mark.parametrize(("keys", "code"), [(lambda k: [k[0], k[0]], 143), (lambda k: [b"ssh-rsa no"], 211)])
def test_serve_with_unusable_node_keys_is_refused(place, keys, code):
    place.public_keys = keys(place.public_keys)
    outcome = place.serve("rounds").result()
    assert isinstance(outcome, ConfigError)
    assert outcome.code == code


def test_environment_switches_that_open_flower_are_removed():
    script = "import os, medfed.flower; print(os.environ.get('FLWR_INTERNAL_GRPC_FLEET_API'), end='')"
    environment = {**os.environ, "FLWR_INTERNAL_GRPC_FLEET_API": "1"}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert told.stdout == b"None"
