"""``medfed-client``: what a hospital's people type. Heavy imports wait inside the actions, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medfed.client.after_training import add_commands
from medfed.command import (
    Parser,
    confirm,
    new_parser,
    refuse_rehearsal_options,
    report,
    run_command,
    say,
    say_json,
    say_lines,
)
from medfed.errors import ConfigError, ExitStatus, PrivacyError
from medfed.process import keep_secrets
from medfed.wording import counted

if TYPE_CHECKING:
    from medfed.client.joining import RosterReview
    from medfed.client.ledger import Ledger, LedgerView
    from medfed.client.site import Site

CONFIG = Path("hospital.toml")
_PATIENTS = "declared patients who train, public: a round number near the true one, held-out ones not counted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    keep_secrets()
    return run_command(build_parser(), argv, refuse_rehearsal_options)


# ------------------------------------------------------------------------------------------------------------ the parser


def build_parser() -> Parser:
    """All subcommands with their arguments."""
    parser, commands = new_parser(
        "medfed-client", "A hospital's side: enrol, read and approve studies, take part, account for privacy."
    )
    _add_init(commands)
    enrolment = commands.add_parser("enrolment", help="write the enrolment document anew")
    enrolment.add_argument("--patients", type=int, required=True, metavar="N", help=_PATIENTS)
    _add_config(enrolment, _enrolment)
    approve = commands.add_parser(
        "approve",
        help="read what a study asks, and agree to it",
        description="Once more for a study that is approved: hospitals joined (roster.json has grown at its end), or --peers "
        "confirms more of them. That is shown and asked alone; the study's cost stays what it is.",
    )
    approve.add_argument("study", type=Path, help="study.toml, with roster and first model beside it")
    approve.add_argument(
        "--peers",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="enrolment documents that the other hospitals gave you themselves",
    )
    _add_yes(approve)
    _add_json(approve)
    _add_config(approve, _approve)
    run = commands.add_parser("run", help="take part in every approved study until stopped")
    run.add_argument("file", type=Path, nargs="?", help="hospital.toml, the same as --config")
    run.add_argument("--once", action="store_true", help="give up when the coordinator cannot be reached at first")
    run.add_argument(
        "--bridge",
        type=Path,
        metavar="SOCKET",
        help="answer Flower's stock SuperNode at this Unix socket and open no connection (docs/flower.md)",
    )
    _add_config(run, _run)
    status = commands.add_parser(
        "status",
        help="show how the hospital stands (exit status 6: not running)",
        description="Exit status 0 if its process runs, connected or not; 6 if not: the budget is shown all the same.",
    )
    _add_json(status)
    _add_config(status, _status)
    stop = commands.add_parser(
        "stop",
        help="end the running hospital once the attempt under way is sealed",
        description="Ask the process that runs in this folder to end and wait for it. Exit status 0 if none runs, too.",
    )
    _add_config(stop, _stop)
    ledger = commands.add_parser("ledger", help="show every row of the privacy ledger")
    ledger.add_argument("--verify", action="store_true", help="check every row and signature instead")
    _add_json(ledger)
    _add_config(ledger, _ledger)
    budget = commands.add_parser("budget", help="show what is spent and what is left")
    _add_json(budget)
    _add_config(budget, _budget)
    plan = commands.add_parser("plan", help="show what a study would cost here, before joining")
    plan.add_argument("study", type=Path, help="study.toml")
    plan.add_argument(
        "--epsilon",
        type=float,
        action="append",
        metavar="E",
        help="tell the noise that this would need (may be repeated)",
    )
    _add_json(plan)
    _add_config(plan, _plan)
    models = commands.add_parser(
        "models",
        help="list the models that studies may name, and the installed packages of own models",
        description="The catalogue, and each installed package with models of a group's own: its hash, as studies pin it, its "
        "entry points, and whether hospital.toml here allows it. No code of a package is run.",
    )
    _add_json(models)
    _add_config(models, _models)
    verify = commands.add_parser(
        "verify",
        help="check the signed privacy statement of a run (exit status 4: it does not hold)",
        description="Work out anew what a run's folder claims: signatures, hashes, journal, epsilon. Needs no network. Beside a "
        "hospital.toml, this hospital's own ledger is compared as well. Exit status 0 if every check holds, 4 (MF-194) if one "
        "does not.",
    )
    verify.add_argument("run", type=Path, help="the run's folder: model, privacy.json, journal")
    _add_json(verify)
    _add_config(verify, _verify)
    withdraw = commands.add_parser("withdraw", help="take back an approval; what was spent stays spent")
    withdraw.add_argument("study", help="its name, or the beginning of its hash")
    _add_yes(withdraw)
    _add_config(withdraw, _withdraw)
    add_commands(commands)
    return parser


def _add_init(commands: argparse._SubParsersAction[Parser]) -> None:
    init = commands.add_parser("init", help="make this hospital's folder: keys, policy, ledger, enrolment document")
    init.add_argument("name", help="this hospital's name, as others shall see it")
    init.add_argument("--folder", type=Path, default=Path(), help="default: the current one")
    needed: list[tuple[str, type, str, str]] = [
        ("--coordinator", str, "HOST:PORT", "where the coordinator listens"),
        ("--ca", Path, "FILE", "certificate of the coordinator's authority (ca.crt)"),
        ("--data", Path, "FILE", "records, one row each (CSV)"),
        ("--patient-column", str, "COL", "the column that tells whose record it is"),
        ("--patients", int, "N", _PATIENTS),
        ("--max-epsilon-study", float, "E", "most that one study may cost a patient"),
        ("--max-epsilon-lifetime", float, "E", "most that all studies together may cost a patient"),
        ("--lifetime-delta", float, "D", "delta of the lifetime cap"),
        ("--max-delta", float, "D", "largest delta of a study"),
        ("--min-colluders", int, "C", "conspiring hospitals that a study must withstand"),
    ]
    for option, kind, metavar, text in needed:
        init.add_argument(option, type=kind, required=True, metavar=metavar, help=text)
    init.add_argument(
        "--coordinator-fingerprint", metavar="HEX", help="as its people read it to you; approve then checks it (MF-149)"
    )
    init.add_argument("--proxy", metavar="URL", help="HTTP proxy for the one outbound connection")
    init.add_argument("--images", type=Path, metavar="FOLDER", help="grey PNG files that a column of the records names")
    init.add_argument("--series", type=Path, metavar="FILE", help="measurements over time, one row a time (CSV)")
    init.add_argument("--events", type=Path, metavar="FILE", help="coded events, one row an event (CSV)")
    init.add_argument("--record-column", metavar="COL", help="tells a patient's records apart, in records and series")
    init.add_argument(
        "--holdout", type=float, default=0.0, metavar="F", help="share of patients that never train (0 to 0.5)"
    )
    init.set_defaults(action=_init)


def _add_config(parser: Parser, action: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="default: hospital.toml here")
    parser.set_defaults(action=action)


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")


def _add_yes(parser: Parser) -> None:
    parser.add_argument("--yes", action="store_true", help="do not ask")


# ----------------------------------------------------------------------------------------------------------- the actions


def _init(arguments: argparse.Namespace) -> int:
    from medfed.client.setup import SiteOptions, init_site
    from medfed.seams import system_seams

    seams, folder = system_seams(), arguments.folder
    if not seams.files.exists(arguments.ca):
        raise ConfigError(606, f"{arguments.ca.name} not found", "get ca.crt from the coordinator")
    options = SiteOptions(
        name=arguments.name,
        nominal_patients=arguments.patients,
        coordinator=arguments.coordinator,
        ca_certificate=_within(folder, arguments.ca),
        fingerprint=arguments.coordinator_fingerprint,
        proxy=arguments.proxy,
        data=_within(folder, arguments.data),
        patient_column=arguments.patient_column,
        holdout=arguments.holdout,
        images=None if arguments.images is None else _within(folder, arguments.images),
        series=None if arguments.series is None else _within(folder, arguments.series),
        events=None if arguments.events is None else _within(folder, arguments.events),
        record_column=arguments.record_column,
        max_epsilon_study=arguments.max_epsilon_study,
        max_epsilon_lifetime=arguments.max_epsilon_lifetime,
        lifetime_delta=arguments.lifetime_delta,
        max_delta=arguments.max_delta,
        min_colluders=arguments.min_colluders,
    )
    document = init_site(seams, folder, options)
    say(f"{document.hospital} is set up.")
    say(f"Fingerprint: {document.fingerprint}")
    if not seams.files.exists(arguments.data):
        say(f"Put the records at {arguments.data} before you approve a study.")
    say("Next:")
    say("  1. read hospital.toml: it holds whatever a study asks")
    say(
        "  2. send enrolment.json to the coordinator and to the other hospitals, read them the fingerprint by telephone"
    )
    if arguments.coordinator_fingerprint is None:
        say(
            "  3. write the coordinator's fingerprint, read to you by telephone, into hospital.toml: [coordinator] identity"
        )
    else:
        say("  3. the coordinator's fingerprint is noted and will be checked")
    say(
        "  4. back the whole folder up, with the client stopped; restore only the newest backup: an older ledger forgets"
    )
    say("  5. medfed-client approve study.toml --peers OTHER-HOSPITALS.json ...")
    say("  6. medfed-client run")
    return ExitStatus.HANDLED


def _within(folder: Path, path: Path) -> str:
    """How hospital.toml names a file: relative to its own folder if it lies in it, else absolute."""
    home, target = folder.absolute(), path.absolute()
    return str(target.relative_to(home) if target.is_relative_to(home) else target)


def _enrolment(arguments: argparse.Namespace) -> int:
    from medfed.client.setup import renew_enrolment

    document = renew_enrolment(_site(arguments), arguments.patients)
    declared = counted(document.nominal_patients, "patient")
    say(f"enrolment.json declares {declared} who train. Fingerprint: {document.fingerprint}")
    say("Send it to the coordinator and the other hospitals; running studies keep the old one.")
    return ExitStatus.HANDLED


def _approve(arguments: argparse.Namespace) -> int:
    from medfed.client.approval import approve, caps_of, preview, review
    from medfed.client.explain import card, in_words
    from medfed.client.joining import review_roster
    from medfed.client.ledger import Ledger
    from medfed.study import load_study

    site = _site(arguments)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        changed = review_roster(site, arguments.study, arguments.peers, ledger)
        if changed is not None:
            return _approve_roster(arguments, site, changed, ledger)
        standing = ledger.standing(load_study(site.seams.files, arguments.study).hash())
        reviewed = review(site, arguments.study, arguments.peers, standing)
        outlook = preview(site, reviewed, ledger)
        is_confirmed = site.config.coordinator.identity is not None
        asked = card(reviewed, outlook, caps_of(site), coordinator_confirmed=is_confirmed)
        _ask(arguments, in_words(asked), "Approve this study?")
        approve(site, reviewed, ledger)
    if arguments.json:
        say_json({**asked, "approved": True})
    else:
        say("")
        say(f"Approved: {reviewed.study.hash().hex()}. Start, or start again: medfed-client run")
    return ExitStatus.HANDLED


def _approve_roster(arguments: argparse.Namespace, site: Site, changed: RosterReview, ledger: Ledger) -> int:
    from medfed.client.joining import approve_roster, card, in_words

    asked = card(changed)
    _ask(arguments, in_words(asked), "Go on with this roster?")
    approve_roster(site, changed, ledger)
    if arguments.json:
        say_json({**asked, "approved": True})
    else:
        say("")
        say(f"Approved: roster {changed.roster.hash().hex()}. Start, or start again: medfed-client run")
    return ExitStatus.HANDLED


def _ask(arguments: argparse.Namespace, lines: Iterable[str], question: str) -> None:
    """Show the card, and wait for a yes. MF-123 without one."""
    if not arguments.json:
        say_lines(lines)
    elif not arguments.yes:
        sys.stderr.write("\n".join(lines) + "\n")
    if not confirm(question, assume_yes=arguments.yes):
        raise PrivacyError(123, "not approved, nothing was written", "approve it when you are sure")


def _run(arguments: argparse.Namespace) -> int:
    from medfed.signals import stop_on_signals

    stop = stop_on_signals()  # first: a signal during the slow imports below ends the start as well
    from medfed.client.daemon import run_hospital
    from medfed.seams import system_seams

    config = arguments.file or arguments.config
    return run_hospital(config, system_seams(), stop, once=arguments.once, bridge=arguments.bridge)


def _status(arguments: argparse.Namespace) -> int:
    from medfed.client.status import in_words, status

    found = status(_site(arguments))
    report(arguments.json, found, in_words(found))
    return ExitStatus.HANDLED if found["running"] else ExitStatus.ENVIRONMENT


def _stop(arguments: argparse.Namespace) -> int:
    from medfed.client.status import stop

    say("Stopped." if stop(_site(arguments)) else "Not running.")
    return ExitStatus.HANDLED


def _ledger(arguments: argparse.Namespace) -> int:
    from medfed.client.budget import row_in_words, rows
    from medfed.client.ledger import require_unlocked

    site = _site(arguments)
    with _inspected(site) as ledger:
        if arguments.verify:
            seen = ledger.verify()
            require_unlocked(site.seams.files, site.ledger_path, ledger, site.identity().public)
            result = {
                "verified": True,
                "rows": seen.entries,
                "studies": seen.studies,
                "attempts": seen.attempts,
                "head_sha256": seen.head.hash.hex(),
                "head_signature": seen.head.signature.hex(),
            }
            said = (
                counted(seen.entries, "row"),
                counted(seen.studies, "study", "studies"),
                counted(seen.attempts, "attempt"),
            )
            line = f"The ledger verifies: {', '.join(said)}. "
            report(arguments.json, result, [line + f"Head {seen.head.hash.hex()}"])
        else:
            every = rows(ledger)
            report(arguments.json, every, map(row_in_words, every))
    return ExitStatus.HANDLED


def _budget(arguments: argparse.Namespace) -> int:
    from medfed.client.budget import budget, budget_in_words

    site = _site(arguments)
    with _inspected(site) as ledger:
        spent = budget(ledger, site.config.policy.caps)
    report(arguments.json, spent, budget_in_words(spent))
    return ExitStatus.HANDLED


def _plan(arguments: argparse.Namespace) -> int:
    from medfed.client.forecast import forecast, in_words
    from medfed.client.outlook import WANTED

    site = _site(arguments)
    with _inspected(site) as ledger:
        planned = forecast(site, arguments.study, ledger, arguments.epsilon or WANTED)
    report(arguments.json, planned, in_words(planned))
    return ExitStatus.POLICY if planned["refusals"] else ExitStatus.HANDLED


def _models(arguments: argparse.Namespace) -> int:
    from medfed.models.installed_models import in_words, models
    from medfed.seams import system_seams

    has_policy = arguments.config != CONFIG or system_seams().files.exists(CONFIG)
    found = models(_site(arguments).config.policy.allowed_packages if has_policy else None)
    report(arguments.json, found, in_words(found))
    return ExitStatus.HANDLED


def _verify(arguments: argparse.Namespace) -> int:
    from medfed.client.verify import in_words, require_verified, verify
    from medfed.seams import system_seams

    files = system_seams().files
    if not arguments.run.is_dir():
        what = "is a file" if arguments.run.exists() else "is not there"
        raise ConfigError(100, f"{arguments.run.name} {what}", "name a run's folder: it holds privacy.json")
    site = _site(arguments) if arguments.config != CONFIG or files.exists(CONFIG) else None
    found = verify(files, arguments.run, site)
    report(arguments.json, found, in_words(found))
    require_verified(found)
    return ExitStatus.HANDLED


def _withdraw(arguments: argparse.Namespace) -> int:
    from medfed.client.budget import find_study
    from medfed.client.ledger import Ledger

    site = _site(arguments)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        study = find_study(ledger, arguments.study)
        known = ledger.approved(study)
        say(f"{known.approval.name} ({study.hex()[:12]}): spent and stays spent: {counted(known.events, 'attempt')}.")
        if not confirm("Withdraw from it, for good?", assume_yes=arguments.yes):
            raise ConfigError(100, "not withdrawn, nothing was written", "answer yes, or pass --yes")
        ledger.withdraw(study, "withdrawn by this hospital")
    say("Withdrawn. Nothing more leaves for it; models that were released before stay released.")
    return ExitStatus.HANDLED


def _site(arguments: argparse.Namespace) -> Site:
    from medfed.client.setup import open_site
    from medfed.seams import system_seams

    return open_site(system_seams(), arguments.config)


def _inspected(site: Site) -> LedgerView:
    """The ledger for looking at, beside a running hospital."""
    from medfed.client.ledger import LedgerView

    return LedgerView.inspect(site.seams.files, site.ledger_path, site.identity())


if __name__ == "__main__":
    sys.exit(main())
