"""The guard of the public port, and the proof at each start that it is closed.

Flower serves three interfaces on one port: control (start runs), runtime (take tasks) and fleet (hospitals' nodes).
Its node authentication covers the fleet only, so the other two must not be reachable from outside.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import TypeAlias

import httpx

from medfed.errors import RemoteProtocolError
from medfed.seams import Network

# an ASGI scope or event is a dict whose values depend on its type (asgi.readthedocs.io, version 3)
Mapping: TypeAlias = MutableMapping[str, object]
Receive: TypeAlias = Callable[[], Awaitable[Mapping]]
Send: TypeAlias = Callable[[Mapping], Awaitable[None]]
App: TypeAlias = Callable[[Mapping, Receive, Send], Awaitable[None]]

FLEET_PREFIX = "/v1/fleet/"
HEALTH_PATH = "/health"


@dataclass(frozen=True, slots=True)
class WholeBody:
    """ASGI application: reads a request's body, at most ``limit_bytes``, and hands it on in one piece.

    Flower's application has ten layers, each of which would take a body apart event by event, a few kilobytes each: for
    megabytes that costs more than TLS and hashing together.
    """

    app: App
    limit_bytes: int

    async def __call__(self, scope: Mapping, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts: list[bytes] = []
        taken, is_more = 0, True
        while is_more:
            event = await receive()
            if event["type"] != "http.request":
                return  # the peer is gone
            body = event.get("body", b"")
            if isinstance(body, bytes) and body:
                parts.append(body)
                taken += len(body)
            if taken > self.limit_bytes:
                await _answer(send, 413)
                return
            is_more = bool(event.get("more_body", False))
        whole = [b"".join(parts)]
        parts.clear()

        async def once() -> Mapping:
            if whole:
                return {"type": "http.request", "body": whole.pop(), "more_body": False}
            return await receive()

        await self.app(scope, once, send)


@dataclass(frozen=True, slots=True)
class FleetOnly:
    """ASGI application: hospitals' calls and the health check pass, nothing else exists. Fails closed.

    Flower reads a whole body before it asks who sent it; ``limit_bytes`` bounds what a stranger can make it hold.
    """

    app: App
    limit_bytes: int

    async def __call__(self, scope: Mapping, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self.app(scope, receive, send)
        elif kind == "http" and _is_public(scope.get("path")):
            if _announced_bytes(scope.get("headers")) > self.limit_bytes:
                await _answer(send, 413)
            else:
                await WholeBody(self.app, self.limit_bytes)(scope, receive, send)
        elif kind == "http":
            await _answer(send, 404)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})


def _is_public(path: object) -> bool:
    if not isinstance(path, str) or ".." in path:
        return False
    return path.startswith(FLEET_PREFIX) or path == HEALTH_PATH


def _announced_bytes(headers: object) -> int:
    """The body's announced length; 0 if there is none, which the counting then bounds."""
    for name, value in headers if isinstance(headers, (list, tuple)) else ():
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b""})


PUBLIC_TABLE = (
    ("/v1/control/list-runs", 404),
    ("/v1/runtime/acquire-task", 404),
    ("/docs", 404),
    ("/openapi.json", 404),
    ("/", 404),
    ("/v1/fleet/../control/list-runs", 404),
    ("/v1/fleet/%2e%2e/control/list-runs", 404),
    ("/v1/fleet/pull-messages", 401),
)
ADMIN_TABLE = (("/v1/control/list-runs", 401), ("/v1/runtime/acquire-task", 401))
"""Path and status that a caller without any credential must get."""


def check_guard(network: Network, public_url: str, admin_url: str, certificate_authority: str) -> None:
    """Ask both ports as a stranger would; raise ``RemoteProtocolError`` (MF-615) at the first wrong answer.

    Run at each start, right after the port opens. ``certificate_authority`` is PEM text; the name in the certificate
    is not compared here, because the public name need not lead back to this machine.
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.load_verify_locations(cadata=certificate_authority)
    headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    with httpx.Client(transport=network.transport(tls, None), trust_env=False, timeout=10) as client:
        for base, table in ((public_url, PUBLIC_TABLE), (admin_url, ADMIN_TABLE)):
            for path, wanted in table:
                status = client.post(base + path, content=b"", headers=headers).status_code
                if status != wanted:
                    raise RemoteProtocolError(
                        615,
                        f"{path} answered {status} instead of {wanted}",
                        "not started; install from constraints.txt",
                    )
