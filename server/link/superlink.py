"""Flower's SuperLink inside this process, on two ports: the guarded public one and an administrative one.

The public port speaks TLS and lets hospitals' calls through, nothing else. The administrative port listens on
loopback only and asks for a token drawn at each start. Flower's database is memory: what must last is ours
(``server/store.py``), and nodes activate again by themselves after a restart.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from medfed.flower import hush

# isort: split
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, StopRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from medfed.errors import ConfigError, EnvironmentFault
from medfed.flower_pieces import BODY_LIMIT_BYTES
from medfed.seams import Scratch, Seams
from medfed.server.link.guard import FleetOnly, WholeBody
from medfed.server.link.spool import SpoolingStore

hush()

LOOPBACK = "127.0.0.1"
ADMIN_BODY_BYTES = 64 << 20
"""Largest request of our own child: one piece of a frame, or the names of all pieces for all hospitals."""
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""TLS 1.2; version 1.3 has its own list."""

_THIN_BUNDLE = """\
[project]
name = "medfed"
version = "0.1.0"
dependencies = []
[tool.flwr.app]
publisher = "medfed"
[tool.flwr.app.components]
serverapp = "not.used:app"
clientapp = "not.used:app"
"""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Where the coordinator listens and with which certificate. A port of 0 takes any free one."""

    host: str
    port: int
    admin_port: int
    certificate: Path
    key: Path
    certificate_authority: Path
    limit_bytes: int = BODY_LIMIT_BYTES
    """Largest request body of a hospital: one piece of a frame."""
    stored_bytes: int = 1 << 36
    """What objects in transit may take on disk, in the certificate's folder."""


class _TokenPlugin(NoOpControlAuthnPlugin):  # type: ignore[misc]
    """Flower asks this for every call of the control interface: one bearer token, compared in constant time."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        given = [value if isinstance(value, bytes) else value.encode() for _, value in metadata]
        # Flower has cut off the word "Bearer" already
        if len(given) != 1 or not hmac.compare_digest(given[0], self._token):
            return False, None
        return True, AccountInfo(flwr_aid="<id:none>", account_name="none")


class _Bearer:
    """Puts the token into our own control calls."""

    def __init__(self, token: str) -> None:
        self._header = f"Bearer {token}"

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers["authorization"] = self._header
        response: httpx.Response = call_next(context)
        return response


class _Server(uvicorn.Server):
    """Ends although a hospital's idle TLS connection does not answer the goodbye (it reads at its next call only)."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for _ in range(3):  # the loop's turns in which aborted connections close
            await asyncio.sleep(0)


class SuperLink:
    """Flower's server: ``start``, ``register`` each node, ``open``, ..., ``close``. Called from one thread."""

    def __init__(self, settings: LinkSettings, seams: Seams) -> None:
        self._settings = settings
        self._seams = seams
        self._servers: list[tuple[_Server, threading.Thread]] = []
        self._clients: list[ControlHttpClient | RuntimeHttpClient] = []
        self._scratch: Scratch | None = None
        self.public_port = 0
        self.admin = ""
        """``host:port`` of the administrative port."""

    def start(self) -> None:
        """Open the administrative port. Raises ``EnvironmentFault`` (MF-614) if it is taken."""
        token = base64.urlsafe_b64encode(self._seams.entropy.draw("link/token", 32)).decode()
        secret = self._seams.entropy.draw("link/secret", 32)
        listener = _listen(LOOPBACK, self._settings.admin_port)
        admin_port = listener.getsockname()[1]
        self.admin = f"{LOOPBACK}:{admin_port}"
        self._app = create_app(_flower_config(token, secret, admin_port), SuperLinkLifespan)
        scratch = self._scratch = self._seams.files.scratch(self._settings.certificate.parent)
        state = self._app.state.linkstate_factory.state()
        state._object_store = SpoolingStore(scratch, self._settings.stored_bytes)
        # this server owns the application's lifespan, so it is the first to start and the last to stop
        self._run(
            uvicorn.Config(
                WholeBody(self._app, ADMIN_BODY_BYTES),
                lifespan="on",
                ws="none",
                access_log=False,
                log_config=None,
                timeout_graceful_shutdown=1,
            ),
            listener,
        )
        version = RuntimeVersionHttpInterceptor(component_name="medfed-server")
        self._control = ControlHttpClient.from_server_address(self.admin, True, None, [version, _Bearer(token)])
        claim = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        self._runtime = RuntimeHttpClient.from_server_address(self.admin, True, None, [version, claim])
        self._clients = [self._control, self._runtime]

    def open(self) -> None:
        """Open the public port, once all nodes are registered: a node that comes earlier would be refused. MF-614."""
        listener = _listen(self._settings.host, self._settings.port)
        self.public_port = listener.getsockname()[1]
        self._run(self._public_config(), listener)

    def _public_config(self) -> uvicorn.Config:
        settings = self._settings
        return uvicorn.Config(
            FleetOnly(self._app, settings.limit_bytes),
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
            ssl_ciphers=CIPHERS,
            ssl_version=ssl.PROTOCOL_TLS_SERVER,
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )

    def _run(self, config: uvicorn.Config, listener: socket.socket) -> None:
        server = _Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        self._servers.append((server, thread))
        while not server.started:
            if not thread.is_alive():
                raise EnvironmentFault(614, "the server did not start", "check certificate and key")
            self._seams.clock.sleep(0.02)

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for _, thread in self._servers)

    def register(self, node_key: bytes, name: str) -> int:
        """Make a hospital's node known; returns Flower's id of it.

        ``node_key`` is an EC P-384 public key in OpenSSH form. Raises ``ConfigError`` (MF-211) for any other key and
        (MF-143) for one that is registered already.
        """
        try:
            key = load_ssh_public_key(node_key)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(211, f"node key of {name} is not an OpenSSH public key", "enroll it anew") from error
        try:
            request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name)
            node_id: int = self._control.RegisterNode(request).node_id
        except httpx.HTTPStatusError as error:
            raise ConfigError(143, f"node key of {name} is refused", "one key a hospital, of curve P-384") from error
        return node_id

    def start_run(self) -> int:
        """Start a Flower run; its bundle is a project file and nobody executes it."""
        content, _ = build_fab_from_files({"pyproject.toml": _THIN_BUNDLE.encode()})
        bundle = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        run_id: int = self._control.StartRun(
            StartRunRequest(fab=bundle, override_config=user_config_to_proto({}))
        ).run_id
        return run_id

    def stop_run(self, run_id: int) -> None:
        """Stop a run; its messages become void. A run that is over already stays so."""
        try:
            self._control.StopRun(StopRunRequest(run_id=run_id))
        except httpx.HTTPStatusError as error:
            if error.response.status_code >= 500:
                raise

    def claim_task(self) -> str:
        """The token with which one process may run the pending ServerApp; empty while there is none."""
        token: str = self._runtime.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"])).token
        return token

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._clients = []
        for server, thread in reversed(self._servers):
            server.should_exit = True
            thread.join(5)
        self._servers.clear()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or type(error).__name__
        raise EnvironmentFault(614, f"port {port} of {host}: {reason}", "stop the other one or change it") from error
    return listener


def _flower_config(token: str, secret: bytes, admin_port: int) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=LOOPBACK,
        port=admin_port,
        insecure=True,  # of the loopback port; the public one is ours
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=_TokenPlugin(token),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=":flwr-in-memory:",
        isolation="process",
        runtime_dependency_install=False,
    )
