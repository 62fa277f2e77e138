"""The hospital's only way out: HTTPS to one coordinator, through a proxy if one is configured.

What comes back is bounded, never decompressed and never a redirect; what goes wrong has a name and a code.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx

from medfed.errors import EnvironmentFault, MedfedError, RemoteProtocolError, TransportError
from medfed.seams import Files

_GATEWAY = frozenset({"502", "503", "504"})
"""With these a proxy says that it works and the coordinator does not answer."""


def trust(files: Files, authority: Path) -> ssl.SSLContext:
    """TLS that trusts the certificates in ``authority`` (PEM, one or several) and nobody else.

    The system's authorities are left out: a pinned one cannot be spoken for by any other. A hospital whose proxy
    opens TLS puts the proxy's authority into this file, and sees there that it does. Raises MF-211.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=files.read(authority, limit_bytes=1 << 20).decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise EnvironmentFault(
            211, f"{authority.name} holds no certificate in PEM form", "ask the coordinator for its ca.crt"
        ) from error
    return context


class GuardedTransport(httpx.BaseTransport):
    """Around a real transport: refuses redirects, compression and answers beyond ``limit_bytes``.

    Raises ``RemoteProtocolError``: MF-617 for a redirect (it could lead the signed headers elsewhere), MF-103 for
    compressed content (a bomb needs few bytes), MF-101 for too much of it.
    """

    def __init__(self, inner: httpx.BaseTransport, limit_bytes: int) -> None:
        self._inner = inner
        self._limit_bytes = limit_bytes

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["accept-encoding"] = "identity"
        response = self._inner.handle_request(request)
        try:
            self._check(response)
        except RemoteProtocolError:
            response.close()
            raise
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_Bounded(response, self._limit_bytes),
            extensions=response.extensions,
        )

    def _check(self, response: httpx.Response) -> None:
        if 300 <= response.status_code < 400:
            raise RemoteProtocolError(
                617, f"the coordinator answered with a redirect (HTTP {response.status_code})", "name its own address"
            )
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RemoteProtocolError(103, "the coordinator's answer is compressed", "refused; ask its operator")

    def close(self) -> None:
        self._inner.close()


class _Bounded(httpx.SyncByteStream):
    """A response body that may not exceed its limit."""

    def __init__(self, response: httpx.Response, limit_bytes: int) -> None:
        self._response = response
        self._limit_bytes = limit_bytes

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        for chunk in self._response.iter_raw():
            taken += len(chunk)
            if taken > self._limit_bytes:
                raise RemoteProtocolError(
                    101, f"an answer of the coordinator exceeds {self._limit_bytes} bytes", "refused; ask its operator"
                )
            yield chunk

    def close(self) -> None:
        self._response.close()


def name_fault(error: httpx.TransportError, server: str, proxy: str | None) -> MedfedError:
    """The error with code and remedy that a failed connection to ``server`` (``host:port``) deserves.

    MF-612 certificate, MF-613 proxy, MF-611 name, MF-610 everything else. Text of the peer is not repeated.
    """
    causes = tuple(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = cause.verify_message or "certificate refused"
            return TransportError(
                612, f"certificate of {server}: {reason}", "check the address, the CA file and this machine's clock"
            )
    if isinstance(error, httpx.ProxyError) and str(error)[:3] in _GATEWAY:
        return TransportError(
            610, f"the proxy cannot reach {server} (HTTP {str(error)[:3]})", "is the coordinator running?"
        )
    if proxy is not None and isinstance(error, (httpx.ProxyError, httpx.ConnectError, httpx.ConnectTimeout)):
        return TransportError(613, f"no way through the proxy ({_status(error)})", "check proxy in hospital.toml")
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return TransportError(611, f"host name of {server} not found", "check the address in hospital.toml")
    return TransportError(610, f"{server} cannot be reached ({type(error).__name__})", "is the coordinator running?")


def _status(error: httpx.TransportError) -> str:
    """The proxy's three digits, where it gave some."""
    digits = str(error)[:3]
    return f"HTTP {digits}" if isinstance(error, httpx.ProxyError) and digits.isdigit() else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it. The chain is short; the bound is against a loop in it."""
    current: BaseException | None = error
    for _ in range(20):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__
