"""What the three commands share: arguments, one-line errors, exit statuses, logging to standard error."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from medfed import __version__
from medfed.errors import ConfigError, ExitStatus, MedfedError

EXIT_HELP = (
    "exit status: 0 done, 2 usage or unreadable input, 3 refused by policy, 4 integrity, 5 budget, 6 environment, "
    "130 interrupted"
)
RESUMABLE = "interrupted; start again to resume"

REHEARSAL_ONLY = frozenset({"--seed", "--no-dp", "--insecure"})

Action = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line with a code (MF-100), not in a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(100, message.replace("\n", " "), f"see {self.prog} --help")


def new_parser(program: str, description: str) -> tuple[Parser, argparse._SubParsersAction[Parser]]:
    """A command with subcommands; each subcommand sets ``action``."""
    parser = Parser(prog=program, description=description, epilog=EXIT_HELP)
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug logs")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    return parser, commands


def refuse_rehearsal_options(argv: Sequence[str]) -> None:
    """Raise MF-701 for what weakens a guarantee and so exists in ``medfed-simulate`` only (threats.md, row 41)."""
    for option, value in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, _, joined = option.partition("=")
        if name in REHEARSAL_ONLY or (name == "--epsilon" and (joined or value).lower() == "none"):
            raise MedfedError(701, f"{name} is not for real patients", "it exists in medfed-simulate only")


def run_command(
    parser: Parser,
    argv: Sequence[str] | None,
    check: Callable[[Sequence[str]], None] | None = None,
    *,
    interrupted: str = RESUMABLE,
) -> int:
    """Parse, act, and turn every outcome into an exit status and at most one line on standard error.

    ``check`` sees the arguments before they are parsed and may refuse them. ``interrupted``: what Ctrl-C leaves behind.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows escapes
    try:
        if check is not None:
            check(given)
        _require_text(given)
        arguments = parser.parse_args(given)
        _log_to_stderr(arguments.debug)
        action: Action = arguments.action
        return action(arguments)
    except MedfedError as error:
        return _fail(str(error), error.exit_status, debug)
    except KeyboardInterrupt:
        return _fail(interrupted, ExitStatus.INTERRUPTED, debug)
    except BrokenPipeError:
        # the reader of our output went away: nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.USAGE
    except Exception as error:  # the class name only: an exception's text may hold patients' data
        what = f"MF-900 internal error ({type(error).__name__}): please report it; --debug shows where"
        return _fail(what, ExitStatus.INTEGRITY, debug)


def _require_text(argv: Sequence[str]) -> None:
    """File names that are no UTF-8 reach Python as lone surrogates, which no file can hold."""
    if any("\ud800" <= character <= "\udfff" for argument in argv for character in argument):
        raise ConfigError(100, "an argument is not UTF-8", "rename the file")


def _fail(line: str, status: ExitStatus, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(line + "\n")
    return status


def _log_to_stderr(debug: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
        force=True,
    )
    # libraries tell at INFO what no operator asked for
    logging.getLogger("medfed").setLevel(logging.DEBUG if debug else logging.INFO)
    for name in ("httpx", "httpcore", "flwr", "matplotlib", "absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


def say(text: str) -> None:
    """A line of the result, on standard output."""
    sys.stdout.write(text + "\n")


def say_json(value: object) -> None:
    say(json.dumps(value, indent=1))


def say_lines(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def report(as_json: bool, result: object, lines: Iterable[str]) -> None:
    """The result of a command that reports: as JSON for programs, or as ``lines`` for people."""
    if as_json:
        say_json(result)
    else:
        say_lines(lines)


def confirm(question: str, *, assume_yes: bool) -> bool:
    """Ask a person at the terminal; without a terminal only ``assume_yes`` says yes."""
    if assume_yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError(100, "a person has to confirm this", "answer at a terminal, or pass --yes")
    sys.stderr.write(f"{question} [yes/no] ")  # standard output may be a file or a program
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() == "yes"
