"""``medfed-simulate``: rehearsals on one machine. Heavy imports wait inside the actions, so that help is instant.

What production refuses exists here only, and stamps its output: ``--epsilon none`` and ``--seed``.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medfed.command import Parser, new_parser, run_command, say, say_json, say_lines
from medfed.errors import ConfigError, ExitStatus

if TYPE_CHECKING:
    from medfed.seams import Seams
    from medfed.simulations.evaluation import Evaluation
    from medfed.simulations.rehearsal import Rehearsal
    from medfed.study import Study

DEFAULT_COHORT = "breast-cancer"
_MOST_SPLITS = 1000
_MODES = ("local", "distributed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    return run_command(build_parser(), argv)


# ------------------------------------------------------------------------------------------------------------ the parser


def build_parser() -> Parser:
    """All subcommands with their arguments."""
    parser, commands = new_parser(
        "medfed-simulate", "Rehearse private federated training on one machine, with the code that hospitals run."
    )
    _add_run(commands)
    evaluate = commands.add_parser("evaluate", help="score a run's model again on the public cohort's test patients")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/demo")
    _add_json(evaluate)
    evaluate.set_defaults(action=_evaluate)
    cohorts = commands.add_parser("cohorts", help="list the public cohorts to rehearse with")
    _add_json(cohorts)
    cohorts.set_defaults(action=_cohorts)
    _add_federation(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[Parser]) -> None:
    run = commands.add_parser(
        "run",
        help="train a cohort's task, or a study of your own, in one process",
        description="Train on a public cohort with the production code of hospitals and coordinator, in one process; "
        "write model, results and a report with plots into the run's folder.",
    )
    run.add_argument("study", type=Path, nargs="?", metavar="STUDY", help="a study.toml to rehearse as it stands")
    run.add_argument("--cohort", metavar="NAME", help=f"see medfed-simulate cohorts (default {DEFAULT_COHORT})")
    run.add_argument("--hospitals", type=_count, metavar="N", help="deal the patients to N hospitals")
    _add_epsilon(run, "none: add no noise, not private")
    run.add_argument(
        "--mode", choices=_MODES, help="whose noise counts: each hospital's own (local, the default) or all"
    )
    run.add_argument(
        "--colluders", type=_count, metavar="C", help="hospitals that may conspire with the coordinator (default 1)"
    )
    run.add_argument("--rounds", type=_count, metavar="N", help="instead of the task's")
    run.add_argument("--model", choices=("logistic-regression", "mlp"), help="instead of the task's")
    run.add_argument("--seed", type=_seed, metavar="S", help="split and all randomness repeat; not private")
    run.add_argument(
        "--split-seeds",
        type=_seeds,
        metavar="SEEDS",
        help="random splits into training and test, such as 43-52 or 1,2,5",
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: a new one in runs)")
    run.add_argument(
        "--keep-parties", action="store_true", help="keep the folders of all hospitals and the coordinator"
    )
    _add_json(run)
    run.set_defaults(action=_run)


def _add_federation(commands: argparse._SubParsersAction[Parser]) -> None:
    federation = commands.add_parser(
        "federation", help="the same with one process a hospital and a coordinator, over TLS on this machine"
    )
    federation.add_argument("--cohort", default=DEFAULT_COHORT, metavar="NAME", help="default %(default)s")
    federation.add_argument("--epsilon", type=_positive_epsilon, default=1.0, metavar="E", help="default 1")
    federation.add_argument("--mode", choices=_MODES, default="local", help="default %(default)s")
    federation.add_argument("--split-seed", type=_seed, metavar="S", help="default: the first of the cohort's protocol")
    federation.add_argument(
        "--out", type=Path, default=Path("runs/federation"), metavar="DIR", help="default %(default)s"
    )
    _add_json(federation)
    federation.set_defaults(action=_federation)


def _add_epsilon(parser: Parser, more: str) -> None:
    text = f"most that a patient's data may cost (default 1); {more}"
    parser.add_argument("--epsilon", type=_epsilon, metavar="E|none", help=text)


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")


def _epsilon(text: str) -> float:
    """A positive number, or infinity for ``none``."""
    return math.inf if text.lower() == "none" else _positive_epsilon(text)


def _positive_epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= 100.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an epsilon from 0 to 100")
    return value


def _count(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def _seeds(text: str) -> tuple[int, ...]:
    """``43-52`` or ``1,2,5`` or both mixed, in the order given, none twice."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        low = _seed(first.strip())
        high = _seed(last.strip()) if last else low
        if not low <= high < low + _MOST_SPLITS:
            raise argparse.ArgumentTypeError(f"{part!r} is not a range of at most {_MOST_SPLITS} seeds")
        seeds += range(low, high + 1)
    if len(set(seeds)) != len(seeds) or len(seeds) > _MOST_SPLITS:
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice, or more than {_MOST_SPLITS}")
    return tuple(seeds)


# ----------------------------------------------------------------------------------------------------------- the actions


def _run(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.simulations.quiet import quiet_parties
    from medfed.simulations.runs import simulate
    from medfed.study import load_study

    seams = system_seams()
    study = None if arguments.study is None else load_study(seams.files, arguments.study)
    plan = _plan(arguments) if study is None else _plan_of(study, arguments)
    cohort, hospitals = _cohort_for(study, arguments, seams)
    with quiet_parties():
        simulation = simulate(
            study,
            cohort,
            plan,
            hospitals=hospitals,
            split_seeds=arguments.split_seeds,
            out=arguments.out,
            keep_parties=arguments.keep_parties,
            seams=seams,
        )
    if arguments.json:
        say_json(simulation.result.to_json())
    else:
        from medfed.simulations.summary import show_run

        show_run(simulation, has_study=study is not None)
    return ExitStatus.HANDLED


def _plan(arguments: argparse.Namespace) -> Rehearsal:
    """What the options decide, for a cohort's own task."""
    from medfed.simulations.rehearsal import Rehearsal

    epsilon = 1.0 if arguments.epsilon is None else arguments.epsilon
    return Rehearsal(
        epsilon=None if math.isinf(epsilon) else epsilon,
        mode=arguments.mode or "local",
        colluders=1 if arguments.colluders is None else arguments.colluders,
        rounds=arguments.rounds,
        seed=arguments.seed,
        model=arguments.model,
    )


def _plan_of(study: Study, arguments: argparse.Namespace) -> Rehearsal:
    """A study is rehearsed as it stands: options that would change it are refused (MF-100)."""
    from medfed.simulations.rehearsal import Rehearsal

    given = {name: getattr(arguments, name) for name in ("mode", "colluders", "rounds", "model")}
    named = [f"--{name}" for name, value in given.items() if value is not None]
    without_noise = arguments.epsilon is not None and math.isinf(arguments.epsilon)
    if arguments.epsilon is not None and not without_noise:
        named.append("--epsilon")
    if named:
        raise ConfigError(100, f"{', '.join(named)} would change the study", "leave it out, or change the study's file")
    epsilon = None if without_noise else study.privacy.epsilon
    return Rehearsal(epsilon=epsilon, mode=study.privacy.mode, seed=arguments.seed)


def _cohort_for(study: Study | None, arguments: argparse.Namespace, seams: Seams) -> tuple[str, int | None]:
    """The cohort asked for, or the one whose label a study predicts; and into how many hospitals to deal it."""
    from medfed.server.planning import load_task
    from medfed.simulations.cohorts import COHORTS

    if study is None:
        return arguments.cohort or DEFAULT_COHORT, arguments.hospitals
    fitting = [name for name in COHORTS if load_task(seams.files, name).task.label == study.task.label]
    cohort = arguments.cohort or next(iter(fitting), None)
    if cohort is None:
        what = f"no public cohort has the study's label {study.task.label}"
        raise ConfigError(
            203, what, "see medfed-simulate cohorts; medfed.simulations.simulate takes tables of your own"
        )
    return cohort, arguments.hospitals or study.cohort.hospitals


def _evaluate(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.simulations.evaluation import evaluate_run

    evaluation = evaluate_run(arguments.run, system_seams())
    if arguments.json:
        say_json(evaluation.to_json())
    else:
        say_lines(_evaluated(arguments.run, evaluation))
    return ExitStatus.HANDLED


def _evaluated(run: Path, evaluation: Evaluation) -> Iterable[str]:
    def number(value: float | None) -> str:
        return "undefined (one class only)" if value is None else f"{value:.4f}"

    yield f"{run}: {evaluation.cohort}, split {evaluation.split_seed}, {evaluation.test_records} test records"
    yield f"  AUC {number(evaluation.test_auc)}, accuracy {number(evaluation.test_accuracy)}"
    same = "the same" if evaluation.as_recorded else f"NOT the same: {number(evaluation.recorded_test_auc)}"
    yield f"  result.json says {same} of this split, the first: the saved model is its"
    for name, area in evaluation.per_hospital.items():
        yield f"  {name}: AUC {number(area)}"
    yield f"  evaluation: {evaluation.evaluation}; {'; '.join(evaluation.stamps)}"


def _cohorts(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.server.planning import load_task
    from medfed.simulations.cohorts import COHORTS

    seams = system_seams()
    rows = [
        {
            "name": name,
            "purpose": load_task(seams.files, name).purpose,
            "hospitals": info.hospitals,
            "split_seeds": list(info.protocol_seeds),
            "source": info.source,
            "missing": _missing(name, seams),
        }
        for name, info in COHORTS.items()
    ]
    if arguments.json:
        say_json(rows)
        return ExitStatus.HANDLED
    for row, info in zip(rows, COHORTS.values(), strict=True):
        say(f"{row['name']}\n  {row['purpose']}\n  {row['hospitals']}")
        say(f"  split seeds of its protocol: {info.protocol_seeds[0]} to {info.protocol_seeds[-1]}")
        say(f"  source and licence: {row['source']}")
        say(f"  {row['missing'] or 'ready: medfed-simulate run --cohort ' + str(row['name'])}")
    return ExitStatus.HANDLED


def _missing(cohort: str, seams: Seams) -> str | None:
    """Why a cohort cannot be loaded here; None if it can."""
    from medfed.errors import MedfedError
    from medfed.simulations.cohorts import COHORTS, load_cohort

    try:
        load_cohort(seams.files, cohort, COHORTS[cohort].protocol_seeds[0], None)
    except MedfedError as error:
        return str(error)
    return None


def _federation(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.simulations.cohorts import COHORTS
    from medfed.simulations.federation import run_federation
    from medfed.simulations.run_folder import require_replaceable

    if arguments.cohort not in COHORTS:
        raise ConfigError(203, f"cohort {arguments.cohort} is not known", f"choose one of {', '.join(COHORTS)}")
    if arguments.split_seed is None:
        arguments.split_seed = COHORTS[arguments.cohort].protocol_seeds[0]
    require_replaceable(arguments.out, system_seams())
    return run_federation(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
