"""A small real federation on loopback for the tests: certificates, keys, a coordinator and nodes in threads."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from medfed.identity import create_node_key
from medfed.seams import Seams, system_seams
from medfed.server.certificates import CertificateFiles, create_authority, create_server_certificate

TASKS = Path(__file__).parent
WAIT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Running:
    """Something in a thread that ends with its event."""

    stop: threading.Event = field(default_factory=threading.Event)
    outcome: list = field(default_factory=list)
    thread: threading.Thread | None = None

    def start(self, work) -> "Running":
        def body():
            try:
                self.outcome.append(work())
            except BaseException as error:
                self.outcome.append(error)

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()
        return self

    def result(self):
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), "still running"
        return self.outcome[0]

    def end(self):
        self.stop.set()
        return self.result()


@dataclass
class Place:
    """A folder with everything one test federation needs."""

    folder: Path
    seams: Seams
    port: int
    public_keys: list[bytes]

    limit_bytes: int = 1 << 20

    @property
    def certificates(self) -> CertificateFiles:
        names = ("ca.crt", "ca.key", "server.crt", "server.key")
        return CertificateFiles(*(self.folder / name for name in names))

    def settings(self, **changes):
        from medfed.server.link.superlink import LinkSettings

        paths = self.certificates
        values = {
            "host": "127.0.0.1",
            "port": self.port,
            "admin_port": 0,
            "certificate": paths.certificate,
            "key": paths.key,
            "certificate_authority": paths.authority,
            "limit_bytes": self.limit_bytes,
        }
        return LinkSettings(**values | changes)

    def serve(self, task: str, seams: Seams | None = None, tell=lambda is_serving: None, **config) -> Running:
        """Start a coordinator whose child runs ``task`` of medfed_test_tasks."""
        from medfed.server.link.serve import ChildTask, serve

        path = self.folder / "config.json"
        path.write_text(json.dumps(config))
        running = Running()
        work = ChildTask(f"medfed_test_tasks:{task}", path)
        return running.start(
            lambda: serve(self.settings(), self.public_keys, work, seams or self.seams, running.stop, tell)
        )

    def node(
        self, position: int, handle=lambda data: data, seams: Seams | None = None, connection=None, **changes
    ) -> Running:
        """Start a hospital's node."""
        from medfed.client.node import Node, NodeSettings

        values = {
            "server": f"localhost:{self.port}",
            "certificate_authority": self.certificates.authority,
            "node_key": self.folder / f"node{position}",
        }
        node = Node(NodeSettings(**values | changes), handle, seams or self.seams, connection)
        running = Running()
        return running.start(lambda: node.run_forever(running.stop))

    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())


def make_place(folder: Path, hospitals: int = 2) -> Place:
    seams = system_seams()
    keys = [create_node_key(seams.files, folder / f"node{i}").encode() for i in range(hospitals)]
    place = Place(folder, seams, free_port(), keys)
    create_authority(seams.files, place.certificates, seams.clock)
    create_server_certificate(seams.files, place.certificates, ["localhost", "127.0.0.1"], seams.clock)
    return place


@contextmanager
def running(*parts: Running):
    """End everything, whatever the test does."""
    try:
        yield parts
    finally:
        for part in parts:
            part.stop.set()
        for part in parts:
            part.thread.join(WAIT_S)


def until(condition, seconds: float = 30.0):
    """Poll ``condition`` until it gives something; returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        threading.Event().wait(0.01)
    raise TimeoutError


class ConnectProxy:
    """An HTTP proxy on loopback that knows CONNECT only; ``refuse`` answers with a status instead."""

    def __init__(self, refuse: str | None = None) -> None:
        self._refuse = refuse
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = [self._listener]
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen: list[str] = []

    def __enter__(self) -> "ConnectProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for each in self._open:
            # close alone does not wake a thread that waits in recv or accept
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(4096)
            self.seen.append(" ".join(head.decode().split(" ")[:2]))
            host, _, port = self.seen[-1].split(" ")[1].rpartition(":")
            refusal, server = self._refuse, None
            with suppress(OSError):
                server = socket.create_connection((host, int(port)))
            if refusal or server is None:
                client.sendall(f"HTTP/1.1 {refusal or '502 Bad Gateway'}\r\ncontent-length: 0\r\n\r\n".encode())
                client.shutdown(socket.SHUT_RDWR)
                return
            self._open.append(server)
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()
            _pump(client, server)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
