"""The pages under docs/ that are made from the code are up to date. Make them anew: ``make docs``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from medfed.errors import EXIT_STATUS, ExitStatus
from medfed.simulations import capabilities

DOCS = Path(__file__).parent.parent.parent / "docs"
COMMANDS = [
    (name, f"medfed.{room}.cli")
    for name, room in (("client", "client"), ("server", "server"), ("simulate", "simulations"))
    if importlib.util.find_spec(f"medfed.{room}.cli") is not None
]
_MEANING = {
    ExitStatus.HANDLED: "done",
    ExitStatus.USAGE: "usage, or input that cannot be read",
    ExitStatus.POLICY: "refused by policy",
    ExitStatus.INTEGRITY: "integrity: something does not fit, nothing is trusted",
    ExitStatus.BUDGET: "the privacy budget does not cover it",
    ExitStatus.ENVIRONMENT: "the machine, the network, keys or certificates",
    ExitStatus.INTERRUPTED: "interrupted; hospitals and coordinator resume, a simulation has kept nothing",
}


def errors_page() -> str:
    """docs/errors.md: every exit status and every code."""
    lines = [
        "# Errors",
        "",
        "Every refusal is one line on standard error: `MF-code what is wrong: what to do`. Made by `make docs`.",
        "",
        "| exit status | meaning |",
        "|-|-|",
        *(f"| {status.value} | {_MEANING[status]} |" for status in ExitStatus),
        "",
        "| code | exit status | meaning |",
        "|-|-|-|",
        *(f"| MF-{code} | {status.value} | {meaning} |" for code, (status, meaning) in sorted(EXIT_STATUS.items())),
    ]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """docs/commands.md: the help of every command."""
    lines = ["# Commands", "", "What `--help` says. Made by `make docs`."]
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):  # argparse wraps by it
        for _, module in COMMANDS:
            parser = importlib.import_module(module).build_parser()
            for each in _with_subcommands(parser):
                lines += ["", f"## {each.prog}", "", "```text", each.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _with_subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _with_subcommands(child)


PAGES = {"errors.md": errors_page, "commands.md": commands_page, "capabilities.md": capabilities.page}


@pytest.mark.parametrize("name", PAGES)
def test_page_made_from_the_code_is_up_to_date(name):
    assert (DOCS / name).read_text() == PAGES[name](), "run: make docs"


def test_every_subcommand_has_an_action_and_every_argument_a_help_text():
    for _, module in COMMANDS:
        for parser in _with_subcommands(importlib.import_module(module).build_parser()):
            is_group = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
            assert is_group or parser.get_default("action") is not None, parser.prog
            for action in parser._actions:
                assert action.help or isinstance(action, argparse._SubParsersAction), (parser.prog, action.dest)


if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    for page, make in PAGES.items():
        (DOCS / page).write_text(make())
