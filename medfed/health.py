"""The standard gRPC health service (``grpc.health.v1``) of a daemon, for probes.

It says serving or not, and nothing else: no study, no round, no number. Off unless the configuration names an address.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from medfed.errors import EnvironmentFault
from medfed.rpc import grpc_server
from medfed.toml_files import StrictModel

if TYPE_CHECKING:
    from grpc_health.v1.health import HealthServicer

log = logging.getLogger("medfed.health")

HOSPITAL, COORDINATOR = "medfed.hospital", "medfed.coordinator"
"""What a probe asks for; the empty name, the whole process, says the same."""

Tell = Callable[[bool], None]


class HealthSection(StrictModel):
    """``[health]`` of ``hospital.toml`` and ``server.toml``: an address of this machine, in digits.

    Loopback unless another address is written out: a name could come to mean any address, so none is taken.
    """

    address: Annotated[str, Field(max_length=64, description='"127.0.0.1:PORT"')]

    @field_validator("address")
    @classmethod
    def _literal(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
            raise ValueError("must end in a port from 1 to 65535")
        _ip(host)
        return address

    @property
    def is_loopback(self) -> bool:
        return _ip(self.address.rpartition(":")[0]).is_loopback


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Raises ``ValueError`` unless it is an address in digits; version 6 in square brackets."""
    try:
        if host.startswith("[") and host.endswith("]"):
            return ipaddress.IPv6Address(host[1:-1])
        return ipaddress.IPv4Address(host)
    except ValueError:
        raise ValueError("must be an address in digits and a port, such as 127.0.0.1:8081") from None


@contextlib.contextmanager
def health_service(section: HealthSection | None, service: str, stop: threading.Event) -> Iterator[Tell]:
    """Answer probes for the length of the block; yields what to call with "serving?" whenever that is known anew.

    Not serving at first, and for good once ``stop`` is set or the block ends (which sets ``stop``). Without
    ``section`` nothing is opened. Raises ``EnvironmentFault`` (MF-614) if the port is taken.
    """
    if section is None:
        yield lambda is_serving: None
        return
    taken = EnvironmentFault(614, f"health address {section.address} cannot be had", "change it or stop the other one")
    with grpc_server(section.address, taken) as server:
        from grpc_health.v1 import health, health_pb2_grpc

        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        tell = _Teller(servicer, service)
        server.start()
        if not section.is_loopback:
            log.warning("other machines can ask %s whether this one is serving", section.address)
        waiter = threading.Thread(target=_end_with, args=(stop, servicer), daemon=True)
        waiter.start()
        try:
            yield tell
        finally:
            stop.set()
            waiter.join()


class _Teller:
    """Passes changes on, from any thread; a watching probe is to hear nothing twice."""

    def __init__(self, servicer: HealthServicer, service: str) -> None:
        self._servicer = servicer
        self._service = service
        self._lock = threading.Lock()
        self._last: bool | None = None
        self(False)

    def __call__(self, is_serving: bool) -> None:
        from grpc_health.v1.health_pb2 import HealthCheckResponse

        status = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
        with self._lock:
            if is_serving != self._last:
                self._last = is_serving
                for name in ("", self._service):
                    self._servicer.set(name, status)


def _end_with(stop: threading.Event, servicer: HealthServicer) -> None:
    """From then on the library passes over whatever it is told."""
    stop.wait()
    servicer.enter_graceful_shutdown()
