"""Health and control of the two daemons while the other side comes and goes; at the end with the real commands."""

import contextlib
import json
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from medfed_test_federation import free_port, running, until

from medfed.client.cli import main as client
from medfed.client.connection import Connection
from medfed.client.ledger import AttemptState, LedgerView
from medfed.client.setup import open_site
from medfed.errors import EnvironmentFault
from medfed.health import COORDINATOR, HOSPITAL, HealthSection, health_service
from medfed.seams import system_seams
from medfed.server.daemon import run_coordinator
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.federation import free_ports
from medfed.simulations.federation import running as processes_running
from medfed.simulations.rehearsal import Ports, Rehearsal, lay_out

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
WITHIN_S = 300.0  # a busy machine is slow, not broken


@contextlib.contextmanager
def watching(address: str, service: str):
    """Every status that a probe hears."""
    options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100))
    with grpc.insecure_channel(address, options=options) as channel:
        heard = HealthStub(channel).Watch(HealthCheckRequest(service=service), timeout=WITHIN_S, wait_for_ready=True)
        yield (answer.status for answer in heard)


# -------------------------------------------------------------------------------------------------------- the hospital


def test_hospital_serves_while_it_is_connected_and_says_why_when_it_is_not(place):
    section, stop = HealthSection(address=f"127.0.0.1:{free_port()}"), threading.Event()
    with health_service(section, HOSPITAL, stop) as tell, watching(section.address, HOSPITAL) as heard:
        connection = Connection(place.seams.clock, tell)
        node = place.node(0, connection=connection)
        with running(node):
            assert next(heard) == NOT_SERVING
            for _ in range(2):  # the second coordinator knows nothing of the first one's nodes
                coordinator = place.serve("wait_for_ever")
                with running(coordinator):
                    assert next(heard) == SERVING
                    assert connection.state.is_up and connection.state.why_not == ""
                    coordinator.end()
                assert next(heard) == NOT_SERVING
                assert not connection.state.is_up and connection.state.why_not.startswith("MF-610 ")
            with running(place.serve("wait_for_ever")):
                assert next(heard) == SERVING
                node.stop.set()
                stop.set()
                assert next(heard) == NOT_SERVING
                assert node.result() is None


class NeverWaits:
    """Time passes when somebody sleeps, at once."""

    now = 1000.0

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds, wake=None) -> None:
        self.now += max(seconds, 0.0)


def answer(message) -> httpx.Response:
    headers = {"content-type": "application/protobuf"}
    return httpx.Response(200, headers=headers, stream=httpx.ByteStream(message.SerializeToString()))


class Coordinator:
    """Takes the node in, lets its question for work hang as a long training would, answers heartbeats as told."""

    def __init__(self) -> None:
        self.heartbeat = lambda: answer(SendNodeHeartbeatResponse(success=True))
        self.is_asked, self.ends = threading.Event(), threading.Event()

    def transport(self, tls, proxy):
        return httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        if "heartbeat" in name:
            return self.heartbeat()
        if name == "pull-messages":
            self.is_asked.set()
            self.ends.wait()
            return answer(PullMessagesResponse())
        return answer(ActivateNodeResponse(node_id=7))


@pytest.mark.parametrize("fault", ["status", "network", "forgotten"])
def test_lost_heartbeat_is_noticed_while_the_node_is_busy(place, fault):
    def cut() -> httpx.Response:
        raise httpx.ConnectError("no")

    faults = {
        "status": lambda: httpx.Response(503, stream=httpx.ByteStream(b"")),
        "network": cut,
        "forgotten": lambda: answer(SendNodeHeartbeatResponse(success=False)),
    }
    coordinator, told = Coordinator(), []
    fine = coordinator.heartbeat
    connection = Connection(place.seams.clock, told.append)
    seams = replace(place.seams, clock=NeverWaits(), network=coordinator)
    node = place.node(0, seams=seams, connection=connection)
    with running(node):
        until(lambda: connection.state.is_up and coordinator.is_asked.is_set())
        coordinator.heartbeat = faults[fault]
        until(lambda: not connection.state.is_up)
        assert connection.state.why_not
        coordinator.heartbeat = fine
        until(lambda: connection.state.is_up)
        node.stop.set()
        coordinator.ends.set()
        node.result()
    assert told == [True, False, True]


# ------------------------------------------------------------------------------------------------------ the coordinator


def test_coordinator_serves_while_its_port_is_open_and_its_child_at_work(place):
    told: list[bool] = []
    server = place.serve("die_once", tell=told.append, hospitals=2, rounds=1)
    with running(server, place.node(0), place.node(1)):
        assert server.result() == 0
    assert told == [True, False, True, False]


def test_coordinator_that_cannot_open_its_port_never_serves(place):
    told: list[bool] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", place.port))
        other.listen()
        outcome = place.serve("rounds", tell=told.append).result()
    assert isinstance(outcome, EnvironmentFault)
    assert told == []


# ---------------------------------------------------------------------------------------------------- the real commands

NAMES = ["hospital-1", "hospital-2", "hospital-3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", 1, len(NAMES))
    plan = Rehearsal(1.0, "local", rounds=200, spare_attempts=2)
    lay_out(tmp_path, cohort, plan, seams, ports=Ports(*free_ports(2)))
    return tmp_path


def add_health(config: Path) -> str:
    address = f"127.0.0.1:{free_port()}"
    with config.open("a") as file:
        file.write(f'\n[health]\naddress = "{address}"\n')
    return address


def status(folder: Path, capsys) -> dict:
    client(["status", "--json", "--config", str(folder / NAMES[0] / "hospital.toml")])
    return json.loads(capsys.readouterr().out)


def test_commands_show_and_stop_a_hospital_in_the_middle_of_a_run(folder: Path, capsys) -> None:
    config = folder / NAMES[0] / "hospital.toml"
    of_hospital, of_coordinator = add_health(config), add_health(folder / "coordinator" / "server.toml")
    with (
        processes_running(folder, NAMES) as processes,
        watching(of_hospital, HOSPITAL) as hospital,
        watching(of_coordinator, COORDINATOR) as coordinator,
    ):
        victim = processes.hospitals[NAMES[0]]
        for heard in (hospital, coordinator):
            assert SERVING in heard
        until(lambda: status(folder, capsys)["studies"][0]["last_round_s"] is not None, WITHIN_S)
        said = status(folder, capsys)
        assert said["running"] and said["connected"] and said["pid"] == victim.pid
        (study,) = said["studies"]
        assert 1 <= study["round"] <= study["rounds"] == 200
        assert 0 <= study["completed_rounds"] <= study["round"] <= study["attempts_used"]
        assert 0 < study["epsilon_spent"] < study["epsilon_reserved"] <= 1.0
        assert study["device"] == "cpu"

        assert client(["stop", "--config", str(config)]) == 0
        assert capsys.readouterr().out == "Stopped.\n"
        assert next(hospital) == NOT_SERVING
        assert victim.wait(WITHIN_S) == 0
        assert client(["stop", "--config", str(config)]) == 0
        assert client(["status", "--config", str(config)]) == 6
        assert f"{NAMES[0]}: not running" in capsys.readouterr().out
        assert last_attempt(config) in (AttemptState.RELEASED, AttemptState.ACKED), "nothing was cut short"
        assert not (folder / NAMES[0] / "control.sock").exists()

        processes.coordinator.send_signal(signal.SIGTERM)
        assert next(coordinator) == NOT_SERVING
        assert processes.coordinator.wait(WITHIN_S) == 130
    log = (folder / "logs" / f"{NAMES[0]}.log").read_text()
    assert "asked to stop" in log and "Warning" not in log and "Traceback" not in log


def last_attempt(config: Path) -> AttemptState | None:
    site = open_site(system_seams(), config)
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        (known,) = ledger.studies()
        return ledger.attempt_status(known.approval.study, known.highest_attempt)


def test_coordinator_whose_health_port_is_taken_ends_with_nothing_begun(folder: Path) -> None:
    address = add_health(folder / "coordinator" / "server.toml")
    before = sorted(folder.rglob("*"))
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))), pytest.raises(EnvironmentFault) as fault:
        run_coordinator(folder / "coordinator" / "server.toml", system_seams(), threading.Event())
    assert fault.value.code == 614
    assert set(folder.rglob("*")) - set(before) <= {folder / "coordinator" / "run.lock"}
