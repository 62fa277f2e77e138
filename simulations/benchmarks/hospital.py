"""A hospital that does not train: the node, the masks, the ledger and the outbox of production around an update of zeros.

For the federation benchmark only, which starts it as a process of its own: ``medfed-client`` cannot reach this.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.client.approved import Approved
from medfed.client.daemon import open_hospital
from medfed.client.local_steps import Noise
from medfed.client.setup import open_site
from medfed.seams import Entropy, system_seams
from medfed.signals import stop_on_signals
from medfed.simulations.rehearsal import no_noise


def no_training(
    approved: Approved, weights: NDArray[np.float32], entropy: Entropy, noise: Noise
) -> NDArray[np.float64]:
    """The update of a hospital that has learnt nothing, without the time and memory of learning it: float64[d]."""
    return np.broadcast_to(np.float64(0.0), approved.plan.words)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the hospital of the configuration file that is the one argument until a signal comes."""
    from medfed.client.node import Node, NodeSettings

    (config_path,) = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    seams, stop = system_seams(), stop_on_signals()
    site = open_site(seams, Path(config_path))
    coordinator = site.config.coordinator
    with open_hospital(site, no_noise, stop, local_update=no_training) as hospital:
        settings = NodeSettings(
            server=coordinator.address,
            certificate_authority=site.folder / coordinator.ca_certificate,
            node_key=site.node_key_path,
            limit_bytes=hospital.frame_limit_bytes,
        )
        Node(settings, hospital.handle, seams).run_forever(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
