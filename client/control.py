"""How this machine's own people reach a running hospital: a Unix socket in its folder, with two calls.

Only the user that owns the folder can open it: the folder has mode 0700, the socket 0600. gRPC with messages of our own,
bounded JSON of strict models on both sides: nothing generated, nothing of patients. Whoever holds the ledger's lock is
the only one to open the socket, so what lies there from a process that is gone can be replaced.
"""

from __future__ import annotations

import contextlib
import logging
import os
import string
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from medfed.errors import EnvironmentFault, MedfedError
from medfed.rpc import LIMITS, grpc_server, hush
from medfed.seams import Files
from medfed.toml_files import StrictModel

if TYPE_CHECKING:
    import grpc

log = logging.getLogger("medfed.client.control")

SOCKET_NAME = "control.sock"
PATH_LIMIT_BYTES = 107
"""A Unix socket's address holds no more."""
ANSWER_WITHIN_S = 10.0
SERVICE = "medfed.control.v1.Hospital"
_PLAIN = frozenset((string.ascii_letters + string.digits + "/._-").encode())

Reply = TypeVar("Reply", bound=StrictModel)


class Ask(StrictModel):
    """Either call's request."""

    format: Literal[1]


class StudyNow(StrictModel):
    """A study the process answers for: rounds whose sums it has, where its model computes, and what takes its gradients."""

    study_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    completed_rounds: Annotated[int, Field(ge=0)]
    device: Annotated[str, Field(max_length=64)]
    engine: Annotated[str, Field(max_length=64)]


class DaemonNow(StrictModel):
    """What only the running process knows. Times: seconds since 1970; ``why_not``: empty while it is connected."""

    format: Literal[1]
    version: Annotated[str, Field(max_length=64)]
    pid: Annotated[int, Field(ge=1)]
    since_s: float
    stopping: bool
    connected: bool
    connection_since_s: float
    why_not: Annotated[str, Field(max_length=2000)]
    studies: Annotated[list[StudyNow], Field(max_length=10_000)]


class Stopping(StrictModel):
    """The answer to Stop: it is under way, in this process."""

    format: Literal[1]
    pid: Annotated[int, Field(ge=1)]


# ------------------------------------------------------------------------------------------------------------ the daemon


@contextlib.contextmanager
def control_service(files: Files, path: Path, look: Callable[[], DaemonNow], stop: threading.Event) -> Iterator[None]:
    """Answer Status with ``look()`` and Stop by setting ``stop``, for the length of the block.

    The caller holds the ledger's lock. A hospital works without its control socket as well: a fault with it is
    logged, with its code, and the block runs all the same.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_opened(files, path, look, stop))
        except MedfedError as error:
            log.warning("%s; until then medfed-client status and stop do not reach this process", error)
        yield


@contextlib.contextmanager
def _opened(files: Files, path: Path, look: Callable[[], DaemonNow], stop: threading.Event) -> Iterator[None]:
    target = socket_target(path)
    files.make_folder(path.parent, private=True)  # first: the socket's own mode can be set only once it is there
    fault = EnvironmentFault(618, f"{path.name} cannot be opened", "remove what is there in its place, start again")
    with grpc_server(target, fault) as server:
        try:
            path.chmod(0o600)
        except OSError as error:
            raise fault from error
        import grpc

        def status(request: bytes, context: grpc.ServicerContext) -> bytes:
            _check(request, context)
            return look().model_dump_json().encode()

        def end(request: bytes, context: grpc.ServicerContext) -> bytes:
            _check(request, context)
            log.info("asked to stop: ending once the attempt under way is sealed")
            stop.set()
            return Stopping(format=1, pid=os.getpid()).model_dump_json().encode()

        calls = {
            "Status": grpc.unary_unary_rpc_method_handler(status),
            "Stop": grpc.unary_unary_rpc_method_handler(end),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, calls),))
        server.start()
        yield


def _check(request: bytes, context: grpc.ServicerContext) -> None:
    """End the call unless it is one that this version understands."""
    import grpc

    try:
        Ask.model_validate_json(request, strict=True)
    except ValidationError:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a request of this version")


# ---------------------------------------------------------------------------------------------------------- its callers


def ask_status(path: Path) -> DaemonNow | None:
    """What the process behind ``path`` says of itself; None if there is none."""
    return _call(path, "Status", DaemonNow)


def ask_to_stop(path: Path) -> Stopping | None:
    """Ask the process behind ``path`` to end; None if there is none. It ends after the attempt under way is sealed."""
    return _call(path, "Stop", Stopping)


def _call(path: Path, method: str, reply: type[Reply]) -> Reply | None:
    """Raises ``EnvironmentFault`` (MF-618) if something else than a hospital of this version answers, or nothing in time."""
    target = socket_target(path)
    hush()
    import grpc

    options = (("grpc.enable_http_proxy", 0), *LIMITS)
    with grpc.insecure_channel(target, options=options) as channel:
        try:
            answer: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(
                Ask(format=1).model_dump_json().encode(), timeout=ANSWER_WITHIN_S
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return None
            what = f"the hospital's process does not answer ({error.code().name})"
            raise EnvironmentFault(618, what, "is it of the same version? else stop it with SIGTERM") from error
    try:
        return reply.model_validate_json(answer, strict=True)
    except ValidationError:
        raise EnvironmentFault(
            618, "the hospital's process answers in another form", "it is of another version: restart it"
        ) from None


def socket_target(path: Path) -> str:
    """gRPC's name of a Unix socket, in which everything but plain letters is escaped. MF-618 if the path is too long."""
    raw = os.fsencode(path.absolute())
    if len(raw) > PATH_LIMIT_BYTES:
        raise EnvironmentFault(
            618,
            f"the path of {path.name} has {len(raw)} bytes, a Unix socket's at most {PATH_LIMIT_BYTES}",
            "move the hospital's folder to a shorter path",
        )
    return "unix:" + "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in raw)
