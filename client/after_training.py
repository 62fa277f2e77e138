"""Commands for a model that was released: predict, calibrate, personalize, benefit, export, card."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from medfed.command import Parser, report, say
from medfed.errors import ConfigError, ExitStatus

if TYPE_CHECKING:
    from medfed.client.policy import DataSection
    from medfed.client.site import Site
    from medfed.study import Study

CONFIG = Path("hospital.toml")
_COLUMN_OPTIONS = ("patient_column", "record_column", "time_column", "event_time_column", "code_column")
_RUN = "a run's folder, or a hospital's own studies/HASH: it holds model.safetensors and the study"


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Register all of them."""
    _add_predict(commands)
    _add_calibrate(commands)
    _add_personalize(commands)
    _add_benefit(commands)
    _add_export(commands)
    _add_card(commands)


def _add(commands: argparse._SubParsersAction[Parser], name: str, text: str, more: str = "") -> Parser:
    parser = commands.add_parser(name, help=text, description=more or None)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help=_RUN)
    return parser


def _finish(parser: Parser, action: Callable[[argparse.Namespace], int], *, config: bool = True) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    if config:
        parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="default: hospital.toml here")
    parser.set_defaults(action=action)


def _add_predict(commands: argparse._SubParsersAction[Parser]) -> None:
    predict = _add(
        commands,
        "predict",
        "a released model on new records, with explanations",
        "Records are read as for training, but need no label. What the study's data contract refuses is refused here, too. "
        "Files are named by hospital.toml, or by the options in its place; nothing leaves this machine.",
    )
    predict.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    predict.add_argument(
        "--explain", type=int, default=0, metavar="N", help="also say why, of the first N records of the table"
    )
    predict.add_argument("--data", type=Path, metavar="FILE", help="the records, one row each (CSV)")
    predict.add_argument("--patient-column", metavar="COL", help="the column that tells whose record it is")
    predict.add_argument(
        "--record-column", metavar="COL", help="tells a patient's records apart, in records and series"
    )
    predict.add_argument(
        "--images", type=Path, metavar="FOLDER", help="grey PNG files that a column of the records names"
    )
    predict.add_argument("--series", type=Path, metavar="FILE", help="measurements over time, one row a time (CSV)")
    predict.add_argument("--events", type=Path, metavar="FILE", help="coded events, one row an event (CSV)")
    predict.add_argument("--time-column", metavar="COL", help="of the series: hours since the record's beginning")
    predict.add_argument("--event-time-column", metavar="COL", help="of the events: date or day")
    predict.add_argument("--code-column", metavar="COL", help="of the events: the code")
    predict.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="STUDY=OWN",
        help="the study's name of a column, and yours, where they differ (may be repeated)",
    )
    _finish(predict, _predict)


def _add_calibrate(commands: argparse._SubParsersAction[Parser]) -> None:
    calibrate = _add(
        commands,
        "calibrate",
        "fit two numbers on this hospital's held-out patients, so that chances are right here",
        "Of the patients that holdout in hospital.toml sets aside. The result stays in local/ of this hospital's folder; predict "
        "uses it from then on. It is not private and never leaves.",
    )
    _finish(calibrate, _calibrate)


def _add_personalize(commands: argparse._SubParsersAction[Parser]) -> None:
    personalize = _add(
        commands,
        "personalize",
        "train a released model on with this hospital's own patients, for use here only",
        "After the study, on the patients that are not held out, without noise: the result is as confidential as the records and "
        "stays in local/ of this hospital's folder, marked so.",
    )
    _finish(personalize, _personalize)


def _add_benefit(commands: argparse._SubParsersAction[Parser]) -> None:
    benefit = _add(
        commands,
        "benefit",
        "the released, a local and the personalized model on this hospital's held-out patients",
        "Table, plot and JSON with 95 % intervals and by the categories of the data contract, in local/ of this hospital's "
        "folder. "
        "Nothing leaves.",
    )
    _finish(benefit, _benefit)


def _add_export(commands: argparse._SubParsersAction[Parser]) -> None:
    export = _add(
        commands,
        "export",
        "a released model as ONNX, or as safetensors, with a JSON page that says how to use it",
        "ONNX is checked against the model before it is written. A local model (personalize) is refused: it is not private.",
    )
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    export.add_argument("--onnx", action="store_true", help="model.onnx: outputs and calibrated probabilities")
    export.add_argument("--safetensors", action="store_true", help="model.safetensors, as the run left it")
    _finish(export, _export, config=False)


def _add_card(commands: argparse._SubParsersAction[Parser]) -> None:
    card = _add(
        commands,
        "card",
        "the model card of a run: data, intended use, metrics, privacy, limits",
        "Made anew from the run's folder, in Markdown on standard output.",
    )
    card.set_defaults(action=_card)


def _predict(arguments: argparse.Namespace) -> int:
    from medfed.client.prediction import in_words, predict, without_patients
    from medfed.seams import system_seams

    if arguments.explain < 0:
        raise ConfigError(100, "--explain must be 0 or more", "say how many records to explain")
    home, data = _data(arguments)
    admit = _admission(arguments.config)
    found = predict(system_seams().files, arguments.run, home, data, arguments.out, arguments.explain, admit)
    report(arguments.json, without_patients(found), in_words(found, arguments.out))
    return ExitStatus.HANDLED


def _data(arguments: argparse.Namespace) -> tuple[Path, DataSection]:
    """``[data]`` of hospital.toml, if there is one, with the options in its place; and the folder that its paths start from."""
    from medfed.client.policy import DataSection, load_hospital
    from medfed.seams import system_seams
    from medfed.toml_files import validate

    files, values = system_seams().files, {}
    home = arguments.config.resolve().parent
    if files.exists(arguments.config) or arguments.config != CONFIG:
        values = load_hospital(files, arguments.config).data.model_dump(exclude_none=True)
    elif arguments.data is None or arguments.patient_column is None:
        what = "no hospital.toml here names the records"
        raise ConfigError(100, what, "name it with --config, or pass --data and --patient-column")
    paths = {"path": arguments.data, "images": arguments.images, "series": arguments.series, "events": arguments.events}
    names = {key: getattr(arguments, key) for key in _COLUMN_OPTIONS}
    values |= {key: str(path.absolute()) for key, path in paths.items() if path is not None}
    values |= {key: name for key, name in names.items() if name is not None}
    values["columns"] = values.get("columns", {}) | _columns(arguments.column)
    return home, validate(values, "the data options", DataSection)


def _columns(pairs: list[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    if not all(study and mark and own for study, mark, own in split):
        raise ConfigError(100, "--column wants STUDY=OWN", 'such as --column "age=Age (years)"')
    return {study: own for study, _, own in split}


def _calibrate(arguments: argparse.Namespace) -> int:
    from medfed.client.local_calibration import calibrate, in_words

    found, path = calibrate(_site(arguments), arguments.run)
    report(arguments.json, {**found.model_dump(), "kept": path is not None}, in_words(found, path))
    return ExitStatus.HANDLED


def _personalize(arguments: argparse.Namespace) -> int:
    from medfed.client.personalize import in_words, personalize

    record, folder = personalize(_site(arguments), arguments.run)
    report(arguments.json, record, in_words(record, folder))
    return ExitStatus.HANDLED


def _benefit(arguments: argparse.Namespace) -> int:
    from medfed.client.benefit import benefit, in_words

    found, folder = benefit(_site(arguments), arguments.run)
    report(arguments.json, found, in_words(found, folder))
    return ExitStatus.HANDLED


def _export(arguments: argparse.Namespace) -> int:
    from medfed.client.export import export, in_words
    from medfed.seams import system_seams

    files = system_seams().files
    found = export(
        files,
        arguments.run,
        arguments.out,
        onnx=arguments.onnx,
        safetensors=arguments.safetensors,
        admit=_admission(CONFIG),
    )
    report(arguments.json, found, in_words(found, arguments.out))
    return ExitStatus.HANDLED


def _card(arguments: argparse.Namespace) -> int:
    from medfed.client.model_card import model_card
    from medfed.seams import system_seams

    say(model_card(system_seams().files, arguments.run, admit=_admission(CONFIG)).rstrip())
    return ExitStatus.HANDLED


def _admission(config: Path) -> Callable[[Study], None]:
    """Whose code may make a model here: what the policy of ``hospital.toml`` says; without one medfed's alone (MF-134)."""
    from medfed.client.policy import load_hospital
    from medfed.client.run_checks import refuse_code
    from medfed.seams import system_seams

    files = system_seams().files
    return load_hospital(files, config).policy.admit_code if files.exists(config) else refuse_code


def _site(arguments: argparse.Namespace) -> Site:
    from medfed.client.setup import open_site
    from medfed.seams import system_seams

    return open_site(system_seams(), arguments.config)
