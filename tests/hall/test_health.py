"""The health service as a probe sees it: serving or not, over loopback, with the standard's own stub."""

import os
import socket
import subprocess
import sys
import threading
from contextlib import closing

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from medfed.errors import ConfigError, EnvironmentFault
from medfed.health import HealthSection, health_service
from medfed.toml_files import parse

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
WITHIN_S = 30.0


@pytest.fixture
def section() -> HealthSection:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return HealthSection(address=f"127.0.0.1:{probe.getsockname()[1]}")


def check(section: HealthSection, service: str) -> int:
    with grpc.insecure_channel(section.address) as channel:
        return HealthStub(channel).Check(HealthCheckRequest(service=service), timeout=WITHIN_S).status


def test_check_says_what_was_told_last_for_the_process_and_the_service(section):
    with health_service(section, "medfed.hospital", threading.Event()) as tell:
        seen = [check(section, name) for name in ("", "medfed.hospital")]
        tell(True)
        seen += [check(section, name) for name in ("", "medfed.hospital")]
        tell(False)
        seen += [check(section, name) for name in ("", "medfed.hospital")]
        with pytest.raises(grpc.RpcError) as unknown:
            check(section, "medfed.coordinator")
    assert seen == [NOT_SERVING] * 2 + [SERVING] * 2 + [NOT_SERVING] * 2
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_watch_hears_every_change_once_and_the_stop_which_is_for_good(section):
    stop = threading.Event()
    with (
        health_service(section, "medfed.hospital", stop) as tell,
        grpc.insecure_channel(section.address) as channel,
    ):
        watch = HealthStub(channel).Watch(HealthCheckRequest(service="medfed.hospital"), timeout=WITHIN_S)
        heard = [next(watch).status]
        for is_serving in (True, True, False, False, True):
            tell(is_serving)
        heard += [next(watch).status for _ in range(3)]
        stop.set()
        heard.append(next(watch).status)
        tell(False)
        tell(True)
        assert check(section, "") == NOT_SERVING
    assert heard == [NOT_SERVING, SERVING, NOT_SERVING, SERVING, NOT_SERVING]


def test_end_of_the_block_tells_watchers_frees_the_port_and_leaves_no_thread(section):
    stop = threading.Event()
    with grpc.insecure_channel(section.address) as channel:
        with health_service(section, "medfed.hospital", stop) as tell:
            tell(True)
            watch = HealthStub(channel).Watch(HealthCheckRequest(service=""), timeout=WITHIN_S)
            assert next(watch).status == SERVING == check(section, "")
            ours = {thread for thread in threading.enumerate() if thread.name.startswith("medfed-grpc")}
        assert next(watch).status == NOT_SERVING
        with pytest.raises(grpc.RpcError):
            next(watch)
    assert stop.is_set()
    assert ours and not any(thread.is_alive() for thread in ours)
    with health_service(section, "medfed.hospital", threading.Event()):
        pass


def test_taken_port_is_refused_and_not_shared_between_two_daemons(section):
    host, _, port = section.address.rpartition(":")
    with closing(socket.create_server((host, int(port)))), pytest.raises(EnvironmentFault) as by_other:
        health_service(section, "medfed.hospital", threading.Event()).__enter__()
    with health_service(section, "medfed.hospital", threading.Event()) as tell:
        tell(True)
        with pytest.raises(EnvironmentFault) as by_ours:
            health_service(section, "medfed.coordinator", threading.Event()).__enter__()
        assert check(section, "") == SERVING
    assert (by_other.value.code, by_ours.value.code) == (614, 614)


def test_taken_port_costs_one_line_on_standard_error_and_nothing_else():
    script = """
import socket, sys, threading
from medfed.health import HealthSection, health_service
with socket.create_server(("127.0.0.1", 0)) as other:
    section = HealthSection(address=f"127.0.0.1:{other.getsockname()[1]}")
    try:
        health_service(section, "medfed.hospital", threading.Event()).__enter__()
    except Exception as error:
        sys.stderr.write(str(error))
"""
    fresh = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}  # Flower sets it on import
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=fresh)
    assert done.stderr.startswith("MF-614 ") and "\n" not in done.stderr


def test_without_a_section_nothing_is_opened_and_stop_is_left_alone():
    before, stop = threading.active_count(), threading.Event()
    with health_service(None, "medfed.hospital", stop) as tell:
        tell(True)
        assert threading.active_count() == before
    assert not stop.is_set()


@pytest.mark.parametrize("address", ["127.0.0.1:8081", "[::1]:8081"])
def test_loopback_addresses_are_taken(address):
    assert HealthSection(address=address).is_loopback


@pytest.mark.parametrize("address", ["0.0.0.0:8081", "192.0.2.7:1", "[::]:65535"])
def test_other_addresses_are_taken_as_they_are_written_out(address):
    assert not HealthSection(address=address).is_loopback


@pytest.mark.parametrize(
    "address",
    [
        *(
            "localhost:8081",
            "example.org:80",
            ":8081",
            "*:8081",
            "8081",
            "unix:x",
            "::1:8081",
            "[127.0.0.1]:80",
            "127.1:80",
        ),
        *("127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x", "127.0.0.1:+1", "127.0.0.1: 80", "127.0.0.1:٣"),
    ],
)
def test_names_wildcards_and_odd_ports_are_refused(address):
    with pytest.raises(ConfigError) as refused:
        parse(f'address = "{address}"'.encode(), "hospital.toml", HealthSection)
    assert refused.value.code == 203


def test_service_beyond_loopback_is_pointed_out_once(section, caplog):
    everywhere = HealthSection(address=section.address.replace("127.0.0.1", "0.0.0.0"))
    with health_service(everywhere, "medfed.hospital", threading.Event()):
        assert check(section, "") == NOT_SERVING
    assert [record.levelname for record in caplog.records] == ["WARNING"]
