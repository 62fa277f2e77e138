"""The hospital's control socket and its two commands, over the real socket, beside a real daemon that finds nobody."""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from medfed_test_commands import call

from medfed.client.cli import main
from medfed.client.control import (
    PATH_LIMIT_BYTES,
    SERVICE,
    DaemonNow,
    StudyNow,
    ask_status,
    ask_to_stop,
    control_service,
)
from medfed.client.daemon import run_hospital
from medfed.client.ledger import Ledger
from medfed.errors import EnvironmentFault, MedfedError
from medfed.seams import Seams, SystemEntropy, SystemFiles, SystemNetwork, system_seams

FILES = system_seams().files
WITHIN_S = 60.0
STUDY = StudyNow(study_sha256="ab" * 32, completed_rounds=3, device="cpu", engine="opacus")
NOW = DaemonNow(
    format=1,
    version="0.1",
    pid=4711,
    since_s=1.5,
    stopping=False,
    connected=False,
    connection_since_s=2.5,
    why_not="MF-610 nobody there: look",
    studies=[STUDY],
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Short enough whatever the test is called, closed, and with a name that a URI would have to escape."""
    path = tmp_path / "a b%41#?é"
    path.mkdir()
    return path


def served(path: Path, stop: threading.Event):
    return control_service(FILES, path, lambda: NOW, stop)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# ------------------------------------------------------------------------------------------------------------ the socket


def test_status_comes_over_the_socket_as_it_was_looked_up_and_stop_sets_the_event(folder):
    path, stop = folder / "control.sock", threading.Event()
    with served(path, stop):
        assert ask_status(path) == NOW
        assert not stop.is_set()
        answer = ask_to_stop(path)
        assert answer is not None and answer.pid == os.getpid()
        assert stop.is_set()
        assert ask_to_stop(path) == answer, "a second time is fine"
    assert not path.exists()
    assert ask_status(path) is None
    assert ask_to_stop(path) is None


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_socket_is_for_its_owner_alone_and_so_is_its_folder(folder, umask):
    folder.chmod(0o777)
    before = os.umask(umask)
    try:
        with served(folder / "control.sock", threading.Event()):
            assert (mode(folder), mode(folder / "control.sock")) == (0o700, 0o600)
    finally:
        os.umask(before)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try it as somebody else")
def test_another_user_cannot_open_the_socket(folder):
    path = folder / "control.sock"
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    )
    command = [sys.executable, "-S", "-c", script, str(path)]
    with served(path, threading.Event()):
        for each in [*folder.parents][:-2]:
            each.chmod(each.stat().st_mode | 0o011)  # up to the hospital's folder everybody may pass
        refused = subprocess.run(command, capture_output=True, text=True)
        assert "PermissionError" in refused.stderr
        folder.chmod(0o777)
        assert "PermissionError" in subprocess.run(command, capture_output=True, text=True).stderr, (
            "its own mode as well"
        )
        path.chmod(0o666)  # the positive control
        assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def test_socket_of_a_process_that_is_gone_is_replaced(folder):
    path = folder / "control.sock"
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    assert ask_status(path) is None
    with served(path, threading.Event()):
        assert ask_status(path) == NOW


def test_other_file_in_its_place_is_kept_and_the_hospital_runs_without(folder, caplog):
    path, ran = folder / "control.sock", False
    path.write_text("mine")
    with served(path, threading.Event()):
        ran = True
    assert ran and path.read_text() == "mine"
    assert [record.message[:7] for record in caplog.records] == ["MF-618 "]


def test_path_longer_than_a_socket_address_is_named_and_the_hospital_runs_without(folder, caplog):
    path = folder
    while len(os.fsencode(path / "control.sock")) <= PATH_LIMIT_BYTES:
        path = path / "deeper"
    path.mkdir(parents=True)
    path, ran = path / "control.sock", False
    with served(path, threading.Event()):
        ran = True
    assert ran and not path.exists()
    assert "MF-618 the path of control.sock has" in caplog.text
    for ask in (ask_status, ask_to_stop):
        with pytest.raises(EnvironmentFault) as fault:
            ask(path)
        assert fault.value.code == 618


def test_path_of_exactly_the_longest_length_works(folder):
    rest = PATH_LIMIT_BYTES - len(os.fsencode(folder / "control.sock")) - 1
    path = folder / ("x" * rest) / "control.sock"
    assert len(os.fsencode(path)) == PATH_LIMIT_BYTES
    path.parent.mkdir()
    with served(path, threading.Event()):
        assert ask_status(path) == NOW


@pytest.mark.parametrize("request_", [b"", b"{}", b"\xff", b'{"format":2}', b'{"format":1,"more":1}', bytes(1 << 18)])
@pytest.mark.parametrize("method", ["Status", "Stop"])
def test_request_of_another_form_is_refused_and_changes_nothing(folder, method, request_):
    path, stop = folder.parent / "control.sock", threading.Event()
    with served(path, stop), grpc.insecure_channel(f"unix:{path}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{SERVICE}/{method}")(request_, timeout=WITHIN_S)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not stop.is_set()
        assert ask_status(path) == NOW


def test_request_beyond_the_limit_is_refused(folder):
    path = folder.parent / "control.sock"
    with served(path, threading.Event()), grpc.insecure_channel(f"unix:{path}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{SERVICE}/Status")(bytes((1 << 18) + 1), timeout=WITHIN_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"format":1,"pid":0}', b'{"format":2,"pid":1}'])
def test_answer_of_another_form_is_refused(folder, answer):
    from medfed.rpc import grpc_server

    path = folder.parent / "control.sock"
    calls = {"Stop": grpc.unary_unary_rpc_method_handler(lambda request, context: answer)}
    with grpc_server(f"unix:{path}", AssertionError()) as server:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, calls),))
        server.start()
        with pytest.raises(EnvironmentFault) as fault:
            ask_to_stop(path)
        assert fault.value.code == 618
        with pytest.raises(EnvironmentFault) as unknown:
            ask_status(path)
        assert "UNIMPLEMENTED" in str(unknown.value)


# ---------------------------------------------------------------------------------------------------------- the commands


class Daemon:
    """``medfed-client run`` of north in a thread; its coordinator is not there."""

    def __init__(self, federation) -> None:
        self.stop = threading.Event()
        self.outcome: list[int | BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(federation.config,), daemon=True)

    def _run(self, config: Path) -> None:
        try:
            self.outcome.append(run_hospital(config, system_seams(), self.stop, once=False))
        except BaseException as error:
            self.outcome.append(error)

    def __enter__(self) -> "Daemon":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self._thread.join(WITHIN_S)
        assert not self._thread.is_alive()


def until(condition):
    """Poll ``condition`` until it gives something; returns it."""
    clock = system_seams().clock
    end = clock.monotonic() + WITHIN_S
    while not (value := condition()):
        assert clock.monotonic() < end, "nothing happened"
        clock.sleep(0.01)
    return value


@pytest.fixture
def approved(federation):
    arguments = ["approve", federation.study, "--peers", *federation.peers, "--config", federation.config, "--yes"]
    assert call(main, arguments).status == 0
    return federation


def status(federation):
    outcome = call(main, ["status", "--json", "--config", federation.config])
    return outcome.status, json.loads(outcome.out)


def test_status_without_a_process_says_so_and_shows_the_budget(approved):
    before = approved.listing()
    code, said = status(approved)
    words = call(main, ["status", "--config", approved.config])
    assert code == words.status == 6
    assert said["hospital"] == "north" and said["running"] is False
    assert {said[key] for key in ("pid", "since", "stopping", "connected", "why_not_connected")} == {None}
    (study,) = said["studies"]
    assert (study["study"], study["state"], study["round"], study["rounds"]) == ("Trial 1", "open", 0, 4)
    assert (study["attempts_used"], study["attempts_left"], study["epsilon_spent"]) == (0, 5, 0.0)
    assert study["epsilon_left"] == study["epsilon_reserved"] > 0
    assert (study["under_way"], study["last_round_s"], study["device"], study["engine"]) == (False, None, None, None)
    assert "north: not running" in words.out and "round 0 of 4" in words.out
    assert approved.listing() == before


def test_status_of_a_process_says_why_it_is_not_connected_and_stop_ends_it_once_and_for_all(approved):
    with Daemon(approved) as daemon:
        socket_path = approved.north / "control.sock"
        until(lambda: daemon.outcome or socket_path.exists())
        code, said = until(lambda: (found := status(approved))[1]["why_not_connected"][:6] == "MF-610" and found)
        assert code == 0 and said["running"] and not said["connected"] and not said["stopping"]
        assert said["pid"] == os.getpid()
        assert said["connection_since"] <= said["since"] + WITHIN_S
        assert (said["studies"][0]["completed_rounds"], said["studies"][0]["device"]) == (0, "cpu")
        words = call(main, ["status", "--config", approved.config]).out
        assert f"running, process {os.getpid()}" in words and "not connected since" in words and "MF-610" in words
        assert said["studies"][0]["engine"] == "bookkeeping" and ", on cpu by bookkeeping" in words
        assert "north-" not in words + json.dumps(said), "a patient's id"
        first = call(main, ["stop", "--config", approved.config])
        second = call(main, ["stop", "--config", approved.config])
        until(lambda: daemon.outcome)
    assert daemon.outcome == [0]
    assert (first.status, first.out) == (0, "Stopped.\n")
    assert (second.status, second.out) == (0, "Not running.\n")
    assert not socket_path.exists()
    assert status(approved)[0] == 6
    call(main, ["withdraw", "Trial 1", "--config", approved.config, "--yes"])  # stopped means: the ledger is free


def test_stop_beside_another_command_that_holds_the_ledger_says_so(approved, clock, monkeypatch):
    monkeypatch.setattr(
        "medfed.seams.system_seams", lambda: Seams(clock, SystemNetwork(), SystemFiles(), SystemEntropy())
    )
    site = approved.site()
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()):
        outcome = call(main, ["stop", "--config", approved.config])
    assert outcome.status == 4 and outcome.err.startswith("MF-620 another medfed command holds the ledger")


def test_stop_tells_on_the_log_that_it_waits_for_an_attempt_under_way(approved, clock, caplog):
    """The process answers, and holds the ledger until the clock has passed two minutes."""
    from dataclasses import replace

    from medfed.client.status import stop

    class Patient(SystemFiles):
        def lock(self, path):
            if clock.now_s < 120:
                raise MedfedError(620, "held", "wait")
            return super().lock(path)

    site = replace(approved.site(), seams=Seams(clock, SystemNetwork(), Patient(), SystemEntropy()))
    caplog.set_level("INFO", "medfed.client")
    with served(approved.north / "control.sock", threading.Event()):
        assert stop(site) is True
    waiting = [record.message for record in caplog.records if "waiting for process" in record.message]
    assert len(waiting) == 4 and f"process {os.getpid()}" in waiting[0]


def test_daemon_whose_health_port_is_taken_ends_with_nothing_begun(approved):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = approved.config.read_text()
        approved.config.write_text(f'{text}\n[health]\naddress = "127.0.0.1:{port}"\n')
        before = approved.listing()
        fresh = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}  # Flower sets it
        command = [sys.executable, "-P", "-m", "medfed.client.cli", "run", "--config", approved.config]
        done = subprocess.run(command, capture_output=True, text=True, env=fresh)
    assert done.returncode == 6
    assert done.stderr.startswith("MF-614 ") and done.stderr.count("\n") == 1
    assert approved.listing() == before
