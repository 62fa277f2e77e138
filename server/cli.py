"""``medfed-server``: what the coordinator's people type. Heavy imports wait inside the actions, so that help is instant."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfed.command import Parser, new_parser, refuse_rehearsal_options, report, run_command, say, say_lines
from medfed.display import shown
from medfed.errors import ConfigError, ExitStatus
from medfed.process import keep_secrets
from medfed.wording import counted, rounds_by_kind

if TYPE_CHECKING:
    from medfed.models.warm_start import WarmStart
    from medfed.roster import Roster
    from medfed.seams import Seams
    from medfed.server.planning import TaskFile
    from medfed.server.study_folder import Extension

CONFIG = Path("server.toml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    keep_secrets()
    return run_command(build_parser(), argv, refuse_rehearsal_options)


# ------------------------------------------------------------------------------------------------------------ the parser


def build_parser() -> Parser:
    """All subcommands with their arguments."""
    parser, commands = new_parser(
        "medfed-server", "The coordinator's side: enrol hospitals, plan studies, run the training."
    )
    init = commands.add_parser("init", help="make the coordinator's folder: authority, certificate, identity")
    init.add_argument(
        "--host",
        action="append",
        required=True,
        metavar="NAME",
        help="a host name or address that hospitals connect to (repeat for more)",
    )
    init.add_argument("--listen", default="0.0.0.0", metavar="ADDRESS", help="where to listen (default 0.0.0.0)")  # noqa: S104
    init.add_argument("--port", type=int, default=8443, help="for hospitals (default 8443)")
    init.add_argument("--admin-port", type=int, default=8444, help="for this machine only (default 8444)")
    _add_folder(init, _init)
    enroll = commands.add_parser("enroll", help="put hospitals' enrolment documents into the roster")
    enroll.add_argument("files", type=Path, nargs="+", metavar="FILE", help="enrolment.json of a hospital")
    _add_folder(enroll, _enroll)
    _add_study(commands)
    run = commands.add_parser("run", help="serve the hospitals and train until the study is done")
    run.add_argument("config", type=Path, nargs="?", default=CONFIG, help="default: server.toml here")
    run.set_defaults(action=_run)
    status = commands.add_parser("status", help="show how the run stands")
    status.add_argument("config", type=Path, nargs="?", default=CONFIG, help="default: server.toml here")
    _add_json(status)
    status.set_defaults(action=_status)
    return parser


def _add_study(commands: argparse._SubParsersAction[Parser]) -> None:
    study = commands.add_parser("study", help="plan and explain studies")
    actions = study.add_subparsers(dest="study_command", metavar="ACTION", required=True, parser_class=Parser)
    tasks = actions.add_parser("tasks", help="list the tasks that come with medfed")
    _add_json(tasks)
    tasks.set_defaults(action=_tasks)
    show = actions.add_parser("show-task", help="print a task's file, to copy and change")
    show.add_argument("name", help="one of those that tasks lists")
    show.set_defaults(action=_show_task)
    new = actions.add_parser("new", help="write a study, its roster and its first model into FOLDER/study")
    needed: list[tuple[str, type, str, str]] = [
        ("--task", str, "NAME_OR_FILE", "a task that comes with medfed, or your own file"),
        ("--name", str, "NAME", "what the study is called"),
        ("--expires", str, "DATE", "its last day, UTC (2027-12-31)"),
        ("--epsilon", float, "E", "cost to a patient of all attempts, spares included"),
        ("--delta", float, "D", "well below 1 in the patients of the largest hospital"),
        ("--colluders", int, "C", "hospitals that may conspire with the coordinator"),
    ]
    for option, kind, metavar, text in needed:
        new.add_argument(option, type=kind, required=True, metavar=metavar, help=text)
    new.add_argument(
        "--mode",
        choices=["local", "distributed"],
        required=True,
        help="local: each hospital's own noise suffices; distributed: the noise adds up in the secure sum",
    )
    new.add_argument("--unit", choices=["patient", "record"], required=True, help="who is protected")
    new.add_argument(
        "--drop-outs",
        type=int,
        default=0,
        metavar="N",
        help="hospitals that a round can do without (default 0: every one is needed)",
    )
    new.add_argument(
        "--most-hospitals",
        type=int,
        metavar="N",
        help="the most in a sum, hospitals that join later included (default: as many as are enrolled)",
    )
    new.add_argument(
        "--first-model",
        type=Path,
        metavar="FILE",
        help="first weights from this safetensors file, such as a released model's, in the place of random ones",
    )
    new.add_argument(
        "--partly", action="store_true", help="of that file take what fits by name and shape, draw the rest"
    )
    new.add_argument(
        "--word-vectors",
        type=Path,
        metavar="FILE",
        help="public vectors of words (text form of GloVe or word2vec) as first rows of a text model's embedding",
    )
    new.add_argument("--replace", action="store_true", help="replace the study that is there")
    new.add_argument("--experimental", action="store_true", help="allow a model that is not to be relied on yet")
    _add_folder(new, _new)
    extend = actions.add_parser(
        "extend",
        help="put hospitals at the end of the roster of a study that goes on",
        description="Hospitals join a study between two runs of medfed-server run, without a new study: the roster beside "
        "it grows at its end. Every hospital's people approve that roster before theirs takes part again.",
    )
    extend.add_argument("files", type=Path, nargs="+", metavar="FILE", help="enrolment.json of a hospital that joins")
    _add_folder(extend, _extend)
    check = actions.add_parser("check", help="explain a study in plain words, and check its files")
    check.add_argument("file", type=Path, nargs="?", default=Path("study/study.toml"), help="default: study/study.toml")
    _add_json(check)
    check.set_defaults(action=_check)


def _add_folder(parser: Parser, action: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--folder", type=Path, default=Path(), help="the coordinator's (default: the current one)")
    parser.set_defaults(action=action)


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")


# ----------------------------------------------------------------------------------------------------------- the actions


def _init(arguments: argparse.Namespace) -> int:
    from medfed.identity import fingerprint
    from medfed.seams import system_seams
    from medfed.server.setup import Listen, init_office
    from medfed.toml_files import validate

    wanted = {"host": arguments.listen, "port": arguments.port, "admin_port": arguments.admin_port}
    listen = validate(wanted, "arguments", Listen)
    identity = init_office(system_seams(), arguments.folder, arguments.host, listen)
    say("The coordinator is set up.")
    say(f"Fingerprint: {fingerprint(identity.public)}")
    say("Next:")
    say("  1. give tls/ca.crt to every hospital, read them the fingerprint by telephone")
    say("  2. medfed-server enroll HOSPITAL.json ...   with the documents they send")
    say("  3. medfed-server study new --task ...       then give the three files in study/ to the hospitals")
    say("  4. medfed-server run")
    say("Move tls/ca.key offline: it is needed only to renew the certificate.")
    return ExitStatus.HANDLED


def _enroll(arguments: argparse.Namespace) -> int:
    from medfed.roster import load_roster
    from medfed.seams import system_seams
    from medfed.server.setup import ROSTER_NAME, enroll

    seams, path = system_seams(), arguments.folder / ROSTER_NAME
    before = load_roster(seams.files, path) if seams.files.exists(path) else None
    roster = enroll(seams, arguments.folder, arguments.files)
    say_lines(_roster_in_words(roster, before))
    return ExitStatus.HANDLED


def _roster_in_words(roster: Roster, before: Roster | None) -> Iterable[str]:
    known = {entry.hospital: entry for entry in before.hospitals} if before else {}
    yield f"{counted(len(roster.hospitals), 'hospital')}. Compare the fingerprints with them by telephone:"
    for position, entry in enumerate(roster.hospitals):
        old = known.get(entry.hospital)
        note = "new" if old is None else "" if old == entry else "renewed" if old.public == entry.public else "NEW KEYS"
        yield f"  {position:3} {shown(entry.hospital)}, {counted(entry.nominal_patients, 'patient')} declared {note}".rstrip()
        yield f"      {entry.fingerprint}"
    yield "A study pins the roster: plan it (medfed-server study new) once all are in."


def _tasks(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.server.planning import load_task, template_names

    files = system_seams().files
    tasks = {name: load_task(files, name).purpose for name in template_names()}
    report(arguments.json, tasks, (f"{name:16} {purpose}" for name, purpose in tasks.items()))
    return ExitStatus.HANDLED


def _show_task(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.server.planning import template_text

    say(template_text(system_seams().files, arguments.name).rstrip("\n"))
    return ExitStatus.HANDLED


def _new(arguments: argparse.Namespace) -> int:
    from medfed.model_choice import refuse_experimental
    from medfed.models import catalogue
    from medfed.models.warm_start import take_over
    from medfed.roster import load_roster
    from medfed.seams import system_seams
    from medfed.server.explain import check, in_words
    from medfed.server.planning import Decisions, load_task, plan_study
    from medfed.server.setup import ROSTER_NAME
    from medfed.server.study_folder import StudySet, write_study

    seams, folder = system_seams(), arguments.folder
    if not seams.files.exists(folder / ROSTER_NAME):
        raise ConfigError(606, f"{ROSTER_NAME} not found", "enrol the hospitals first: medfed-server enroll FILE ...")
    roster = load_roster(seams.files, folder / ROSTER_NAME)
    decisions = Decisions(
        name=arguments.name,
        expires=_day_to_come(arguments.expires, seams.clock.wall()),
        epsilon=arguments.epsilon,
        delta=arguments.delta,
        mode=arguments.mode,
        unit=arguments.unit,
        colluders=arguments.colluders,
        drop_outs=arguments.drop_outs,
        most_hospitals=arguments.most_hospitals,
    )
    task = load_task(seams.files, arguments.task)
    refuse_experimental(task.model.name, asked=arguments.experimental)
    start = _start(arguments, task, seams)
    study, model_file = plan_study(task, decisions, roster, start)
    lines = list(in_words(check(study, roster, seams.clock.wall())))
    lines += [] if start is None else take_over(catalogue.build(study), start).in_words()
    with _not_running(seams, folder, matters=arguments.replace):
        write_study(seams.files, folder / "study", StudySet(study, roster, model_file), replace=arguments.replace)
    say_lines(lines)
    say("Give study.toml, roster.json and first_model.safetensors to every hospital.")
    return ExitStatus.HANDLED


def _start(arguments: argparse.Namespace, task: TaskFile, seams: Seams) -> WarmStart | None:
    from medfed.models.warm_start import WarmStart
    from medfed.models.word_vectors import vector_start

    if arguments.word_vectors is not None:
        if arguments.first_model is not None:
            raise ConfigError(100, "first weights come from a model or from word vectors", "leave one of them out")
        return vector_start(task.data, task.model, seams.files.read(arguments.word_vectors)).start
    if arguments.first_model is None:
        if arguments.partly:
            raise ConfigError(100, "--partly is about a file of first weights", "name it with --first-model")
        return None
    return WarmStart(seams.files.read(arguments.first_model), arguments.partly)


def _extend(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.server.setup import CONFIG_NAME, load_office
    from medfed.server.study_folder import extend_roster

    office = load_office(system_seams(), arguments.folder / CONFIG_NAME)
    files = office.seams.files
    with files.lock(office.folder / "run.lock"):
        made = extend_roster(files, office.study_path, arguments.files)
    say_lines(_extension_in_words(made))
    return ExitStatus.HANDLED


def _extension_in_words(made: Extension) -> Iterable[str]:
    hospitals, cohort = made.roster.hospitals, made.study.cohort
    yield f"{counted(len(hospitals), 'hospital')} in the roster of {shown(made.study.study.name)}. New:"
    for position, entry in list(enumerate(hospitals))[-made.joined :]:
        yield f"  {position:3} {shown(entry.hospital)}, {counted(entry.nominal_patients, 'patient')} declared"
        yield f"      {entry.fingerprint}"
    yield f"A sum needs {cohort.fewest_survivors} hospitals and holds {cohort.most_hospitals} at most."
    if len(hospitals) > cohort.most_hospitals:
        yield "  There are more now: the others wait until one is away."
    yield "Next:"
    yield "  1. give study.toml, roster.json and first_model.safetensors to the new hospitals, roster.json to all others"
    yield "  2. they exchange the new enrolment documents, and read each other the fingerprints"
    yield "  3. at every hospital: medfed-client approve study.toml --peers NEW.json ...   then medfed-client run"
    yield "  4. medfed-server run: it goes on from the last round, with those that have approved"


def _day_to_come(text: str, wall_s: float) -> str:
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(203, "--expires is no date", "write it like 2027-12-31") from error
    if day < datetime.datetime.fromtimestamp(wall_s, datetime.UTC).date():
        raise ConfigError(203, "--expires is in the past", "name a day to come")
    return day.isoformat()


def _not_running(seams: Seams, folder: Path, *, matters: bool) -> contextlib.AbstractContextManager[None]:
    """Hold off a run whose study is about to be replaced (MF-620 while one runs)."""
    return seams.files.lock(folder / "run.lock") if matters else contextlib.nullcontext()


def _check(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.server.explain import check, in_words
    from medfed.server.study_folder import check_attachments
    from medfed.study import load_study

    seams = system_seams()
    study = load_study(seams.files, arguments.file)
    roster = check_attachments(seams.files, study, arguments.file.parent)
    checked = check(study, roster, seams.clock.wall())
    report(arguments.json, checked, in_words(checked))
    return ExitStatus.HANDLED


def _run(arguments: argparse.Namespace) -> int:
    from medfed.signals import stop_on_signals

    stop = stop_on_signals()  # first: a signal during the slow imports below ends the start as well
    from medfed.seams import system_seams
    from medfed.server.daemon import run_coordinator

    return run_coordinator(arguments.config, system_seams(), stop)


def _status(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.server.daemon import read_status

    status = read_status(arguments.config, system_seams())
    report(arguments.json, status, _status_in_words(status))
    return ExitStatus.HANDLED


def _status_in_words(status: dict[str, Any]) -> Iterable[str]:
    from medfed.wording import rounded_up

    kinds: dict[str, int] = status["rounds_by_kind"]
    yield f"{status['study']}: {'running' if status['running'] else 'not running'}, {status['what']}"
    rounds = f"round {status['round']} of {status['rounds']}{rounds_by_kind(kinds)}"
    yield f"  {rounds}, attempt {status['attempts_used']} of {status['attempts']}"
    known, at_most = status["epsilon_spent"], status["epsilon_spent_at_most"]
    spent = f"at most {rounded_up(at_most)}" if known is None else rounded_up(known)
    yield f"  epsilon spent {spent} of {rounded_up(status['epsilon'])}"
    if "metrics" in kinds and status["attempts_used"]:
        yield "  (of a patient held out for the metrics it was spent in full with the first attempt)"
    if status["failed"]:
        yield f"  stopped: {status['failed']}"
    elif not status["running"] and status["what"] != "done":
        yield "  it ended without a word, as if killed; it goes on from there: medfed-server run"


if __name__ == "__main__":
    sys.exit(main())
