"""The coordinator's training task with a seeded entropy seam: for the test that compares it with the simulation."""

from dataclasses import replace
from pathlib import Path

from medfed.seams import system_seams
from medfed.server.daemon import train_with
from medfed.server.exchange import Exchange
from medfed.simulations.entropy import SeededEntropy

SEED = 11


def train(exchange: Exchange, config_path: Path) -> None:
    train_with(exchange, config_path, replace(system_seams(), entropy=SeededEntropy(SEED, "coordinator")))
