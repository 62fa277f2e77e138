"""``medfed-client run``: one long-lived process that answers the coordinator for every approved study."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from medfed import __version__
from medfed.advance import advance
from medfed.client.approval import caps_of, load_approved
from medfed.client.bridge import bridge_service
from medfed.client.compute import Compute, choose_compute
from medfed.client.connection import Connection, ConnectionState
from medfed.client.control import SOCKET_NAME, DaemonNow, StudyNow, control_service
from medfed.client.hospital import Hospital
from medfed.client.ledger import Ledger, StudyState
from medfed.client.local_steps import LocalUpdate, Noise, OwnSum, own_sum, private_update
from medfed.client.model_keeper import Advance
from medfed.client.participation import Participation
from medfed.client.policy import ComputeSection, hours_in_words
from medfed.client.setup import open_site
from medfed.client.site import Site
from medfed.client.startup_checks import check_outbox
from medfed.client.trainer import warm_up
from medfed.client.witnesses import Witnesses
from medfed.errors import ExitStatus, MedfedError, PrivacyError
from medfed.health import HOSPITAL, health_service
from medfed.models.catalogue import is_rowwise
from medfed.privacy.noise import discrete_gaussian
from medfed.seams import Clock, Seams, require_system_entropy

log = logging.getLogger("medfed.client")


@contextlib.contextmanager
def open_hospital(
    site: Site,
    noise: Noise,
    stop: threading.Event | None = None,
    *,
    local_update: LocalUpdate = private_update,
    clipped: OwnSum = own_sum,
    step: Advance = advance,
    choose: Callable[[ComputeSection], Compute] = choose_compute,
) -> Iterator[Hospital]:
    """The hospital over its ledger, whose one-writer lock is held for the length of the block (MF-620 if taken).

    Loads every approved study: its pinned files, model and data are checked now, so that a fault stops the start and
    not a round. Withdrawn studies are left out; closed ones only repeat their last word. A ledger older than what this
    hospital has sent, or than others saw it, is refused (MF-405). ``choose``: of the device for deep models, called once if
    there is such a study.
    """
    compute = None
    identity = site.identity()
    with Ledger.open(site.seams.files, site.ledger_path, identity) as ledger:
        witnesses = Witnesses(site.seams.files, site.ledger_path, identity.public, ledger)
        parts = []
        for known in ledger.studies():
            if known.state is StudyState.WITHDRAWN:
                continue
            study = known.approval.study
            check_outbox(site.seams.files, site.study_folder(study), study, identity.public, ledger)
            try:
                approved = load_approved(site, study, ledger)
            except MedfedError as error:
                if known.state is StudyState.OPEN:
                    raise
                log.info("finished study %s is left out: %s", known.approval.name, error)
                continue
            if not is_rowwise(approved.study):
                compute = compute or choose(site.config.compute)
                approved = dataclasses.replace(approved, compute=compute)
            is_private = approved.study.training.aggregate == "gradient" or local_update is private_update
            if known.state is StudyState.OPEN and is_private:
                warm_up(approved.study, approved.model, approved.compute)
            parts.append(
                Participation(
                    approved,
                    identity,
                    ledger,
                    witnesses,
                    caps_of(site),
                    site.seams,
                    noise,
                    stop,
                    local_update=local_update,
                    clipped=clipped,
                    step=step,
                    is_time=site.config.policy.is_within_hours,
                )
            )
        yield Hospital(identity, parts)


def run_hospital(
    config_path: Path, seams: Seams, stop: threading.Event, *, once: bool, bridge: Path | None = None
) -> int:
    """Serve until ``stop``. Seeded randomness is refused here (MF-701): it exists in simulations only.

    ``bridge``: a socket to answer on, for Flower's stock SuperNode; then no connection is opened from here.
    """
    require_system_entropy(seams.entropy)
    from medfed.client.node import Node, NodeSettings

    site = open_site(seams, config_path)
    with (
        health_service(site.config.health, HOSPITAL, stop) as tell,
        open_hospital(site, discrete_gaussian, stop) as hospital,
    ):
        _say_studies(site, hospital)
        coordinator = site.config.coordinator
        settings = NodeSettings(
            server=coordinator.address,
            certificate_authority=site.folder / coordinator.ca_certificate,
            node_key=site.node_key_path,
            proxy=coordinator.proxy,
            once=once,
            limit_bytes=hospital.frame_limit_bytes,
        )
        connection = Connection(seams.clock, lambda is_up: tell(is_up and not hospital.is_locked))
        hospital.on_lock = lambda: tell(False)
        node = Node(settings, hospital.handle, seams, connection) if bridge is None else None
        since_s = seams.clock.wall()
        with control_service(
            seams.files,
            site.folder / SOCKET_NAME,
            lambda: look(hospital, connection.state, since_s, is_stopping=stop.is_set()),
            stop,
        ):
            if node is not None:
                node.run_forever(stop)
            elif bridge is not None:
                serve_bridge(bridge, hospital, seams.clock, stop, connection)
        log.info("stopped")
    return ExitStatus.HANDLED


def _say_studies(site: Site, hospital: Hospital) -> None:
    """And the hours if it is not time. Raises MF-123 if there are none."""
    if not hospital.studies:
        raise PrivacyError(123, "this hospital has approved no study", "medfed-client approve study.toml --peers ...")
    if hospital.open_studies:
        log.info("%s takes part in: %s", site.config.hospital.name, ", ".join(hospital.open_studies))
    else:
        log.info("%s has no open study: it only repeats its last word of finished ones", site.config.hospital.name)
    policy = site.config.policy
    if policy.hours is not None:
        told = hours_in_words(policy.hours, policy.next_opening(site.seams.clock.wall()))
        log.info("takes part within the hours of hospital.toml: %s", told)


def serve_bridge(path: Path, hospital: Hospital, clock: Clock, stop: threading.Event, connection: Connection) -> None:
    """Answer on the socket ``path`` until ``stop``. ``connection`` is up from the first answered request on."""

    def handle(frame: bytes) -> bytes:
        reply = hospital.handle(frame)
        connection.up()
        return reply

    with bridge_service(path, handle, hospital.frame_limit_bytes):
        log.info("answering Flower's SuperNode at %s", path)
        while not stop.is_set():
            clock.sleep(1.0, stop)


def look(hospital: Hospital, connection: ConnectionState, since_s: float, *, is_stopping: bool) -> DaemonNow:
    """What this process says of itself when asked, from another thread than the one that works: plain reads only."""
    studies = [
        StudyNow(
            study_sha256=part.study_hash.hex(),
            completed_rounds=part.completed_rounds,
            device=str(part.approved.compute.device),
            engine=part.approved.compute.engine,
        )
        for part in hospital.participations
    ]
    return DaemonNow(
        format=1,
        version=__version__,
        pid=os.getpid(),
        since_s=since_s,
        stopping=is_stopping,
        connected=connection.is_up,
        connection_since_s=connection.since_s,
        why_not=connection.why_not,
        studies=studies,
    )
