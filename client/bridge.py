"""A hospital behind Flower's stock SuperNode: a Unix socket with one call, a request's frame in, a reply's frame out.

The stock SuperNode starts a process for each message. A hospital is one long-lived process, which holds its ledger's lock
and a session's keys; so those processes only carry frames (``client/supernode.py``), and this one answers them. A frame is
believed for its signature, as over any other way: whoever can open the socket can make the hospital do nothing that the
coordinator has not signed.
"""

from __future__ import annotations

import contextlib
import logging
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medfed.client.control import socket_target
from medfed.errors import EnvironmentFault, MedfedError, TransportError
from medfed.rpc import grpc_server, hush, limits

if TYPE_CHECKING:
    import grpc

log = logging.getLogger("medfed.client.bridge")

SERVICE = "medfed.bridge.v1.Hospital"
_METHOD = "Answer"
_UNLIMITED = -1


class NotAnswered(Exception):
    """The hospital could not answer; the text is the class name of its exception, all that ever leaves it."""


@contextlib.contextmanager
def bridge_service(path: Path, handle: Callable[[bytes], bytes], limit_bytes: int) -> Iterator[None]:
    """Answer frames of at most ``limit_bytes`` with ``handle``, one at a time, for the length of the block.

    Who may open the socket follows from its folder: the owner alone (0600), or, in a folder that a group may enter, that
    group as well (0660), so that the SuperNode can run as another user, who reads nothing of the hospital.

    Raises ``EnvironmentFault`` MF-618 if the socket cannot be opened, MF-204 in a folder that everybody may enter.

    Guarantee: at the end of the block no frame is being answered any more.
    """
    fault = EnvironmentFault(618, f"{path.name} cannot be opened", "name a socket in a folder that is there")
    with grpc_server(socket_target(path), fault, limits(limit_bytes)) as server:
        try:
            path.chmod(_mode(path.absolute().parent))
        except OSError as error:
            raise fault from error
        import grpc

        busy = threading.Lock()

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            with busy:  # the coordinator repeats what takes long: the repeat waits, then gets the same bytes
                try:
                    return handle(request)
                except MedfedError as error:
                    log.warning("%s", error)
                    reason = type(error).__name__
                except Exception as error:  # the class name only: an exception's text may hold patients' data
                    log.error("internal error (%s) while answering a message", type(error).__name__)
                    log.debug("internal error", exc_info=True)
                    reason = type(error).__name__
            context.abort(grpc.StatusCode.INTERNAL, reason)
            raise NotAnswered(reason)  # not reached: abort raises

        calls = {_METHOD: grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, calls),))
        server.start()
        yield


def _mode(folder: Path) -> int:
    mode = folder.stat().st_mode
    if mode & stat.S_IXOTH:
        raise EnvironmentFault(
            204, f"everybody may enter {folder.name}", f"close it to others: chmod o= {folder.name}, or use another"
        )
    return 0o660 if mode & stat.S_IXGRP else 0o600


def ask(path: Path, frame: bytes, timeout_s: float) -> bytes:
    """The hospital's reply to ``frame``, over its socket.

    Raises ``TransportError`` MF-618 if no hospital answers there, and ``NotAnswered``.
    """
    target = socket_target(path)
    hush()
    import grpc

    # the reply comes from the hospital that this process serves: its length is its own business
    options = (("grpc.enable_http_proxy", 0), *limits(_UNLIMITED))
    with grpc.insecure_channel(target, options=options) as channel:
        try:
            reply: bytes = channel.unary_unary(f"/{SERVICE}/{_METHOD}")(frame, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INTERNAL:
                raise NotAnswered(error.details() or "unknown") from None
            what = f"no hospital answers at {path.name} ({error.code().name})"
            raise TransportError(618, what, f"start it: medfed-client run --bridge {path.name}") from error
    return reply
