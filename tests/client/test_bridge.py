"""The bridge socket between Flower's stock SuperNode and a hospital, over the real socket; and the ClientApp on its far side."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from medfed.client.bridge import NotAnswered, ask, bridge_service
from medfed.client.control import ask_status
from medfed.client.supernode import app
from medfed.errors import EnvironmentFault, RemoteProtocolError, TransportError
from medfed.identity import Identity
from medfed.wire import Refusal, Refused, SetupRequest, check_signature, decode, encode

WITHIN_S = 60.0
LIMIT = 1 << 20


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "h"
    path.mkdir(mode=0o700)
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def fail(frame: bytes) -> bytes:
    raise ValueError("patient 4711 has a lactate of 9.3")


def test_frame_goes_in_and_the_reply_comes_out(folder):
    path, frame = folder / "bridge.sock", bytes(range(256)) * 2000  # longer than gRPC's messages elsewhere in medfed
    with bridge_service(path, lambda asked: asked[::-1], LIMIT):
        assert ask(path, frame, WITHIN_S) == frame[::-1]
        assert mode(path) == 0o600
    assert not path.exists()


def test_socket_in_a_folder_of_a_group_is_for_the_group_as_well(folder):
    folder.chmod(0o750)
    with bridge_service(folder / "bridge.sock", bytes, LIMIT):
        assert mode(folder / "bridge.sock") == 0o660


def test_folder_that_everybody_may_enter_is_refused(folder):
    folder.chmod(0o755)
    with pytest.raises(EnvironmentFault, match="MF-204"), bridge_service(folder / "bridge.sock", bytes, LIMIT):
        pass


def test_folder_that_is_not_there_is_refused(folder):
    with pytest.raises(EnvironmentFault, match="MF-618"), bridge_service(folder / "no" / "b.sock", bytes, LIMIT):
        pass


def test_frame_beyond_the_limit_is_refused_and_the_next_is_answered(folder):
    path = folder / "bridge.sock"
    with bridge_service(path, bytes, LIMIT):
        with pytest.raises(TransportError, match=r"MF-618.*RESOURCE_EXHAUSTED"):
            ask(path, bytes(LIMIT + 1), WITHIN_S)
        assert ask(path, bytes(LIMIT), WITHIN_S) == bytes(LIMIT)


def test_nobody_at_the_socket_is_said_so(folder):
    with pytest.raises(TransportError, match=r"MF-618 no hospital answers at bridge\.sock"):
        ask(folder / "bridge.sock", b"x", WITHIN_S)


def test_of_an_exception_only_its_class_crosses_the_socket(folder):
    path = folder / "bridge.sock"
    with bridge_service(path, fail, LIMIT), pytest.raises(NotAnswered) as raised:
        ask(path, b"x", WITHIN_S)
    assert str(raised.value) == "ValueError"


def test_one_frame_is_answered_at_a_time(folder):
    path, inside, most = folder / "bridge.sock", [], []
    both = threading.Barrier(2, timeout=WITHIN_S)

    def handle(frame: bytes) -> bytes:
        inside.append(frame)
        most.append(len(inside))
        for _ in range(1000):  # give the other thread every chance
            time.sleep(0)
        inside.remove(frame)
        return frame

    def one(frame: bytes) -> bytes:
        both.wait()
        return ask(path, frame, WITHIN_S)

    with bridge_service(path, handle, LIMIT), ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, [b"a", b"b"])) == [b"a", b"b"]
    assert most == [1, 1]


# --------------------------------------------------------------------------------------------------------- the ClientApp


def answered(frame: bytes, node_config: dict[str, str]) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict({"medfed": ConfigRecord({"m": frame})}), 2, "train", ttl=WITHIN_S)
    message.metadata.__dict__["_message_id"] = "m1"
    return app(message, Context(1, 2, node_config, RecordDict(), {}))


def test_client_app_answers_with_the_hospital_s_frame(folder):
    path = folder / "bridge.sock"
    with bridge_service(path, lambda asked: asked + b"!", LIMIT):
        reply = answered(b"frame", {"bridge": str(path)})
    assert reply.content["medfed"]["m"] == b"frame!"


@pytest.mark.parametrize(
    ("node_config", "reason"),
    [({}, "ConfigError"), ({"bridge": ""}, "ConfigError"), ({"bridge": "no"}, "TransportError")],
)
def test_client_app_s_faults_are_class_names(node_config, reason):
    """Flower would send an exception's text to the coordinator."""
    reply = answered(b"frame", node_config)
    assert reply.error.reason == reason


def test_hospital_s_fault_goes_out_as_its_class_name(folder):
    path = folder / "bridge.sock"
    with bridge_service(path, fail, LIMIT):
        reply = answered(b"frame", {"bridge": str(path)})
    assert reply.error.reason == "ValueError"


# ----------------------------------------------------------------------------------------------------------- the command


def test_run_with_a_bridge_answers_there_and_ends_with_sigterm(world):
    """The real command, without a coordinator: it opens no connection."""
    home = world.folder / "Ahaus"
    path = home / "bridge.sock"
    command = [sys.executable, "-P", "-m", "medfed.client.cli", "run", "--config", str(home / "hospital.toml")]
    process = subprocess.Popen([*command, "--bridge", str(path)], stderr=subprocess.PIPE, text=True)
    try:
        line = ""
        while "answering Flower's SuperNode" not in line:
            line = process.stderr.readline()
            assert line, "it ended"
        request = encode(SetupRequest(bytes(32), bytes(16), ()), Identity.from_seed(bytes(32)))
        reply = ask(path, request, WITHIN_S)
        refusal = decode(reply, vector_limit_bytes=1 << 20)
        assert isinstance(refusal, Refusal) and refusal.reason == Refused.NOT_APPROVED
        check_signature(reply, world.assignment.roster.identities[0])
        now = ask_status(home / "control.sock")
        assert now is not None and now.connected
        with pytest.raises(NotAnswered, match=RemoteProtocolError.__name__):
            ask(path, b"nonsense", WITHIN_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.communicate()
