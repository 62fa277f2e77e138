"""``medfed-client run``: one long-lived process that answers the coordinator for every approved study."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from medfed.client.approval import caps_of, load_approved
from medfed.client.hospital import Hospital
from medfed.client.ledger import Ledger, StudyState
from medfed.client.participation import Noise, Participation
from medfed.client.setup import open_site
from medfed.client.site import Site
from medfed.client.startup_checks import check_outbox
from medfed.client.trainer import warm_up
from medfed.errors import ExitStatus, MedfedError, PrivacyError
from medfed.privacy.noise import discrete_gaussian
from medfed.seams import Seams, require_system_entropy

log = logging.getLogger("medfed.client")


@contextlib.contextmanager
def open_hospital(site: Site, noise: Noise, stop: threading.Event | None = None) -> Iterator[Hospital]:
    """The hospital over its ledger, whose one-writer lock is held for the length of the block (MF-620 if taken).

    Loads every approved study: its pinned files, model and data are checked now, so that a fault stops the start and
    not a round. Withdrawn studies are left out; closed ones only repeat their last word. A ledger older than what this
    hospital has sent is refused (MF-405).
    """
    identity = site.identity()
    with Ledger.open(site.seams.files, site.ledger_path, identity) as ledger:
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
            warm_up(approved.study, approved.model)
            parts.append(Participation(approved, identity, ledger, caps_of(site), site.seams, noise, stop))
        yield Hospital(identity, parts)


def run_hospital(config_path: Path, seams: Seams, stop: threading.Event, *, once: bool) -> int:
    """Serve until ``stop``. Seeded randomness is refused here (MF-701): it exists in simulations only."""
    require_system_entropy(seams.entropy)
    from medfed.client.node import Node, NodeSettings

    site = open_site(seams, config_path)
    with open_hospital(site, discrete_gaussian, stop) as hospital:
        if not hospital.studies:
            raise PrivacyError(
                123, "this hospital has approved no study", "medfed-client approve study.toml --peers ..."
            )
        coordinator = site.config.coordinator
        settings = NodeSettings(
            server=coordinator.address,
            certificate_authority=site.folder / coordinator.ca_certificate,
            node_key=site.node_key_path,
            proxy=coordinator.proxy,
            once=once,
        )
        if hospital.open_studies:
            log.info("%s takes part in: %s", site.config.hospital.name, ", ".join(hospital.open_studies))
        else:
            log.info("%s has no open study: it only repeats its last word of finished ones", site.config.hospital.name)
        Node(settings, hospital.handle, seams).run_forever(stop)
        log.info("stopped")
    return ExitStatus.HANDLED
