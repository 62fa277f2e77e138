"""A small gRPC server inside a daemon: one address, few calls, small messages, threads that end with it.

gRPC is imported when a server or a channel is opened: it is not needed to show a command's help.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from medfed.errors import MedfedError

if TYPE_CHECKING:
    import grpc

MESSAGE_LIMIT_BYTES = 1 << 18
CALLS_AT_MOST = 64
"""At a time; further ones are refused at once (RESOURCE_EXHAUSTED). Watching counts."""
LAST_WORDS_S = 0.5
"""How long calls that are under way may go on once the server ends."""


def limits(message_bytes: int) -> tuple[tuple[str, int], ...]:
    """gRPC's options for messages of at most this length in either direction; -1: of any."""
    return (("grpc.max_receive_message_length", message_bytes), ("grpc.max_send_message_length", message_bytes))


LIMITS = limits(MESSAGE_LIMIT_BYTES)


def hush() -> None:
    """Keep gRPC's own lines off standard error: a fault is ours to name. Works before gRPC's first use only."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@contextlib.contextmanager
def grpc_server(
    target: str, taken: MedfedError, options: tuple[tuple[str, int], ...] = LIMITS
) -> Iterator[grpc.Server]:
    """A server bound to ``target`` (``host:port`` or ``unix:path``), to be given handlers and started in the block.

    Raises ``taken`` if the address cannot be had; it is not shared with another process (``SO_REUSEPORT`` is off).

    Guarantee: at the end of the block the address is free and no thread is left.
    """
    hush()
    import grpc

    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="medfed-grpc") as pool:
        server = grpc.server(pool, options=(("grpc.so_reuseport", 0), *options), maximum_concurrent_rpcs=CALLS_AT_MOST)
        try:
            server.add_insecure_port(target)
        except RuntimeError as error:
            raise taken from error
        try:
            yield server
        finally:
            server.stop(LAST_WORDS_S).wait()
