"""To be imported before Flower, by whoever imports Flower: no telemetry, no update check, the version we know.

Flower's parts that medfed builds on are internal to it and were read and tried in 1.41 only; ``tests/federation``
holds the contract. This module imports nothing of Flower: both sides and the simulation share the names below.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os

from medfed.errors import EnvironmentFault
from medfed.rpc import hush as hush_grpc

VERSION = "1.41."
RECORD, FIELD = "medfed", "m"
"""Every Flower message carries one config record with one entry: our own bytes.

Flower sends it as a tree of objects (message, record dict, config record), each fetched by itself. Both sides fetch config
records only (``medfed/flower_pieces.py``): they are all that we need, and Flower's parsers see nothing that the other side
chose. Where frames stay in one process, or travel by Flower's own nodes, the one record holds the whole frame.
"""


_FORCED = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
# either would open Flower's older interface beside ours, without our guard
_FORBIDDEN = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")


def _prepare() -> None:
    os.environ.update(_FORCED)
    hush_grpc()  # where nobody has, Flower sets a level for all of gRPC, whose lines would stand beside our own
    for name in _FORBIDDEN:
        os.environ.pop(name, None)
    found = importlib.metadata.version("flwr")
    if not found.startswith(VERSION):
        raise EnvironmentFault(621, f"Flower {found} is installed, not {VERSION}*", "install from constraints.txt")


def hush() -> None:
    """Keep Flower's and httpx's notes of every message out of the log; call after Flower's import.

    Flower logs what a stranger sends, keys included, as errors. What matters to an operator we say ourselves.
    """
    for name in ("flwr", "uvicorn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


_prepare()
