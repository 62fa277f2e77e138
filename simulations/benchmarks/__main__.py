"""``python -m medfed.simulations.benchmarks NAME --json``: rounds, federation, simulation, ledger, secagg, load or
gradients."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from medfed.command import new_parser, run_command, say, say_json, say_lines
from medfed.errors import ExitStatus
from medfed.seams import system_seams
from medfed.server.ending import versions
from medfed.simulations.benchmarks.gradients_families import FAMILIES


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


def _gradients(arguments: argparse.Namespace) -> dict[str, object]:
    from medfed.simulations.benchmarks import gradients

    return gradients.run(
        arguments.family, arguments.batch, arguments.device, arguments.precision, quick=arguments.quick
    )


def _table(rows: object) -> list[str]:
    from medfed.simulations.benchmarks import gradients

    return gradients.table(rows) if isinstance(rows, list) else []


_MEASURES = {
    "rounds": _rounds,
    "federation": _federation,
    "simulation": _simulation,
    "ledger": _ledger,
    "secagg": _secagg,
    "load": _load,
    "gradients": _gradients,
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
            if key == "rows":
                say_lines(_table(value))
            else:
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
    gradients = commands.add_parser("gradients", help="a private step: times plain PyTorch and Opacus, and memory")
    gradients.add_argument(
        "--family", nargs="+", default=[], choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES)
    )
    gradients.add_argument("--batch", type=int, nargs="+", default=[], help="default: 64 256")
    gradients.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    gradients.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    gradients.add_argument("--quick", action="store_true", help="a few families at batch 64, within 50 seconds")
    for each in (rounds, federation, simulation, ledger, secagg, load, gradients):
        each.add_argument("--json", action="store_true")
        each.set_defaults(action=_measure)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
