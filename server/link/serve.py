"""The coordinator's network service: open, check, register, run the training in a child until it ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medfed.errors import EnvironmentFault, ExitStatus
from medfed.flower_pieces import FRAMES_LIMIT_BYTES
from medfed.health import Tell
from medfed.seams import Clock, Seams
from medfed.server.certificates import check_server_certificate
from medfed.server.link.child import Orders
from medfed.server.link.guard import check_guard
from medfed.server.link.superlink import LOOPBACK, LinkSettings, SuperLink

log = logging.getLogger("medfed.server.link")

RESTARTS_AT_MOST = 5
LOOK_EVERY_S = 0.1
END_WITHIN_S = 15.0


@dataclass(frozen=True, slots=True)
class ChildTask:
    """Installed code for the child: ``module:function`` and the file it is called with."""

    task: str
    config_path: Path
    frame_bytes: int = FRAMES_LIMIT_BYTES
    """Longest frame of a hospital: it follows from the study."""


def serve(
    settings: LinkSettings,
    node_keys: Sequence[bytes],
    work: ChildTask,
    seams: Seams,
    stop: threading.Event,
    tell: Tell = lambda is_serving: None,
) -> int:
    """Run ``work`` against the hospitals' nodes; returns the exit status of the command.

    ``node_keys``: the hospitals' public node keys in OpenSSH form, by position in the roster, from 0. A child that
    dies of a signal is started again with a new run, five times at most: ``work`` resumes from its own checkpoint.
    Any other end of the child ends the service with its exit status; ``stop`` ends both (130, resumable). ``tell``
    hears whether the port is open and the child at work, whenever that changes.

    Raises ``EnvironmentFault`` for ports, keys and certificates, ``ConfigError`` for node keys, ``RemoteProtocolError``
    (MF-615) if anything but the hospitals' interface answers on the public port.
    """
    authority = check_server_certificate(
        seams.files, settings.certificate, settings.key, settings.certificate_authority, seams.clock
    )
    link = SuperLink(settings, seams)
    try:
        link.start()
        node_ids = {position: link.register(key, f"hospital-{position}") for position, key in enumerate(node_keys)}
        link.open()
        check_guard(seams.network, _own_url(settings.host, link.public_port), f"http://{link.admin}", authority)
        log.info("listening on %s port %d for %d hospitals", settings.host, link.public_port, len(node_ids))
        return _run_until_done(link, node_ids, work, seams.clock, stop, tell)
    finally:
        link.close()


def _own_url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104 - not bound here
    return f"https://[{reachable}]:{port}" if ":" in reachable else f"https://{reachable}:{port}"


def _run_until_done(
    link: SuperLink, node_ids: dict[int, int], work: ChildTask, clock: Clock, stop: threading.Event, tell: Tell
) -> int:
    for _ in range(RESTARTS_AT_MOST + 1):
        run_id = link.start_run()
        try:
            token = _claim(link, clock, stop)
            status = _execute(link, _orders(link, token, node_ids, work), clock, stop, tell) if token else None
        finally:
            link.stop_run(run_id)
        if stop.is_set():
            return ExitStatus.INTERRUPTED if status != ExitStatus.HANDLED else ExitStatus.HANDLED
        if status is not None and status >= 0 and status != ExitStatus.INTERRUPTED:
            return status
        log.warning("the training process was killed (%s); starting it again", status)
    raise EnvironmentFault(
        630, f"the training process was killed {RESTARTS_AT_MOST + 1} times", "look for memory limits; then start again"
    )


def _claim(link: SuperLink, clock: Clock, stop: threading.Event) -> str:
    while not stop.is_set():
        if token := link.claim_task():
            return token
        clock.sleep(LOOK_EVERY_S, stop)
    return ""


def _orders(link: SuperLink, token: str, node_ids: dict[int, int], work: ChildTask) -> Orders:
    return Orders(
        admin=link.admin,
        token=token,
        node_ids={str(position): node_id for position, node_id in node_ids.items()},
        task=work.task,
        config_path=str(work.config_path),
        frame_bytes=work.frame_bytes,
    )


def _execute(link: SuperLink, orders: Orders, clock: Clock, stop: threading.Event, tell: Tell) -> int:
    """Run one child to its end; a negative status is the signal that killed it."""
    # -P: the current folder is no place to import from
    command = [sys.executable, "-P", "-m", "medfed.server.link.child"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=dict(os.environ))
    try:
        if child.stdin is not None:
            child.stdin.write(orders.model_dump_json().encode() + b"\n")
            child.stdin.flush()
        tell(True)
        while child.poll() is None and not stop.is_set():
            if not link.is_alive:
                raise EnvironmentFault(614, "the server's port was closed", "start again")
            clock.sleep(LOOK_EVERY_S, stop)
    except BrokenPipeError:
        log.debug("the training process ended before it was told what to do")
    finally:
        tell(False)
        status = _end(child)
    return status


def _end(child: subprocess.Popen[bytes]) -> int:
    """Ask, then force; the pipe stays open until then, for its end would kill at once."""
    child.terminate()
    try:
        return child.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
    finally:
        if child.stdin is not None:
            child.stdin.close()
