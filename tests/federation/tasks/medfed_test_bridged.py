"""A hospital with a seeded entropy seam on its bridge socket: for the test that compares it with the simulation.

``medfed-client run --bridge`` refuses such a seam; all else is what it runs.
"""

import sys
from dataclasses import replace
from pathlib import Path

from medfed_test_seeded import SEED

from medfed.client.connection import Connection
from medfed.client.daemon import open_hospital, serve_bridge
from medfed.client.setup import open_site
from medfed.privacy.noise import discrete_gaussian
from medfed.process import keep_secrets
from medfed.seams import system_seams
from medfed.signals import stop_on_signals
from medfed.simulations.entropy import SeededEntropy


def main() -> None:
    keep_secrets()
    folder, stop, seams = Path(sys.argv[1]), stop_on_signals(), system_seams()
    seeded = replace(seams, entropy=SeededEntropy(SEED, folder.name))
    site = open_site(seeded, folder / "hospital.toml")
    with open_hospital(site, discrete_gaussian, stop) as hospital:
        serve_bridge(folder / "bridge.sock", hospital, seams.clock, stop, Connection(seams.clock))


if __name__ == "__main__":
    main()
