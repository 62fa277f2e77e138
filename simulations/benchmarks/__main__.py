"""``python -m medfed.simulations.benchmarks NAME --json``: rounds, federation, simulation, ledger, secagg or load."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from medfed.command import new_parser, run_command, say, say_json
from medfed.errors import ExitStatus
from medfed.seams import system_seams
from medfed.server.ending import versions


def _rounds(arguments: argparse.Namespace) -> dict[str, object]:
    from medfed.simulations.benchmarks import rounds

    return rounds.run(arguments.hospitals, arguments.rounds, arguments.repeats)


def _federation(arguments: argparse.Namespace) -> dict[str, object]:
    from medfed.simulations.benchmarks import federation

    return federation.run(arguments.hospitals, arguments.rounds, arguments.repeats, system_seams())


def _simulation(arguments: argparse.Namespace) -> dict[str, object]:
    from medfed.simulations.benchmarks import simulation

    return simulation.run(arguments.hospitals, arguments.rounds, system_seams())


def _ledger(arguments: argparse.Namespace) -> dict[str, object]:
    from medfed.simulations.benchmarks import ledger

    return ledger.run(arguments.rows, arguments.debits, arguments.folder, system_seams())


def _secagg(arguments: argparse.Namespace) -> dict[str, object]:
    from medfed.simulations.benchmarks import secagg

    return secagg.run(secagg.SIZES, secagg.DETAILED, arguments.repeats, system_seams().entropy)


def _load(arguments: argparse.Namespace) -> dict[str, object]:
    from medfed.simulations.benchmarks import load

    size = load.Size(arguments.hospitals, arguments.parameters, arguments.rounds, arguments.threads)
    return load.run(size, arguments.folder, system_seams())


_MEASURES = {
    "rounds": _rounds,
    "federation": _federation,
    "simulation": _simulation,
    "ledger": _ledger,
    "secagg": _secagg,
    "load": _load,
}


def _measure(arguments: argparse.Namespace) -> int:
    logging.getLogger("medfed").setLevel(logging.WARNING)
    result = {
        "benchmark": arguments.command,
        **_MEASURES[arguments.command](arguments),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_implementation()} "
        f"{platform.python_version()}",
        "versions": versions(),
    }
    if arguments.json:
        say_json(result)
    else:
        for key, value in result.items():
            say(f"{key}: {value}")
    return ExitStatus.HANDLED


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of one benchmark."""
    parser, commands = new_parser("python -m medfed.simulations.benchmarks", "What medfed costs, measured.")
    rounds = commands.add_parser("rounds", help="a round of a small model: processes over TLS, and in one process")
    rounds.add_argument("--hospitals", type=int, default=4)
    rounds.add_argument("--rounds", type=int, default=20)
    rounds.add_argument("--repeats", type=int, default=3)
    federation = commands.add_parser("federation", help="without training, small and 40 MB: seconds, MB/s, memory")
    federation.add_argument("--hospitals", type=int, nargs="+", default=[3, 5, 10])
    federation.add_argument("--rounds", type=int, default=8)
    federation.add_argument("--repeats", type=int, default=1)
    simulation = commands.add_parser("simulation", help="a simulated round over a bare PyTorch loop: processor seconds")
    simulation.add_argument("--hospitals", type=int, nargs="+", default=[20, 100])
    simulation.add_argument("--rounds", type=int, default=5)
    ledger = commands.add_parser("ledger", help="a debit, until it is on disk: milliseconds, by length of the ledger")
    ledger.add_argument("--rows", type=int, nargs="+", default=[100, 1000, 10_000])
    ledger.add_argument("--debits", type=int, default=300)
    ledger.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure; default: this one")
    secagg = commands.add_parser("secagg", help="masks, quantising, rounds up to 100 hospitals; Flower's SecAgg+, CKKS")
    secagg.add_argument("--repeats", type=int, default=3)
    load = commands.add_parser("load", help="a whole simulation at full size: seconds and peak memory")
    load.add_argument("--hospitals", type=int, default=100)
    load.add_argument("--parameters", type=int, default=1_000_000)
    load.add_argument("--rounds", type=int, default=100)
    load.add_argument("--threads", type=int, default=2)
    load.add_argument("--folder", type=Path, default=Path(), help="on the disk to use; default: this one")
    for each in (rounds, federation, simulation, ledger, secagg, load):
        each.add_argument("--json", action="store_true")
        each.set_defaults(action=_measure)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
