"""``medfed-simulate``: rehearsals on one machine. Heavy imports wait inside the actions, so that help is instant.

What production refuses exists here only, and stamps its output: ``--epsilon none`` and ``--seed``.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medfed.command import Parser, new_parser, report, run_command, say, say_json, say_lines
from medfed.errors import ConfigError, ExitStatus
from medfed.wording import named

if TYPE_CHECKING:
    from medfed.models.warm_start import WarmStart
    from medfed.seams import Seams
    from medfed.simulations.absence import Absences
    from medfed.simulations.evaluation import Evaluation
    from medfed.simulations.extract import Cohort
    from medfed.simulations.rehearsal import Backend, Rehearsal
    from medfed.study import Study

DEFAULT_COHORT = "breast-cancer"
_MOST_SPLITS = 1000
_MODES = ("local", "distributed")
_BACKENDS = ("process", "ray")
_MODELS = (
    "logistic-regression",
    "mlp",
    "cnn",
    "resnet",
    "cnn3d",
    "multi-view",
    "lstm",
    "gru",
    "summaries",
    "transformer",
    "text-bag",
    "text-cnn",
    "tagger",
    "message-passing",
    "autoencoder",
    "variational-autoencoder",
    "two-arm",
    "fusion",
)
_AUDITS = ("mechanism", "one-run", "membership", "inversion")
_OWN = ("label", "partition", "patient_column", "leave_out", "test")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    return run_command(build_parser(), argv, interrupted="interrupted; nothing was kept")


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
    cohorts = commands.add_parser("cohorts", help="list the public and synthetic cohorts to rehearse with")
    _add_json(cohorts)
    cohorts.set_defaults(action=_cohorts)
    _add_plan(commands)
    _add_fetch(commands)
    _add_federation(commands)
    _add_audit(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[Parser]) -> None:
    run = commands.add_parser(
        "run",
        help="train a cohort's task, or a study of your own, in one process",
        description="Train on a public or synthetic cohort, or on a table of your own, with the production code of "
        "hospitals and coordinator, in one process; write model, results and a report with plots into the run's folder.",
    )
    run.add_argument("study", type=Path, nargs="?", metavar="STUDY", help="a study.toml to rehearse as it stands")
    run.add_argument("--cohort", metavar="NAME", help=f"see medfed-simulate cohorts (default {DEFAULT_COHORT})")
    run.add_argument("--hospitals", type=_count, metavar="N", help="deal the patients to N hospitals")
    run.add_argument(
        "--patients",
        type=_count,
        metavar="M",
        help="training patients of each hospital, of a synthetic cohort; --metrics holds a fifth of them out",
    )
    _add_own_table(run)
    _add_epsilon(run, "none: add no noise, not private")
    run.add_argument(
        "--mode", choices=_MODES, help="whose noise counts: each hospital's own (local, the default) or all"
    )
    run.add_argument(
        "--colluders", type=_count, metavar="C", help="hospitals that may conspire with the coordinator (default 1)"
    )
    run.add_argument(
        "--drop-outs",
        type=_count,
        metavar="N",
        help="hospitals that a round can do without (default: every one is needed)",
    )
    run.add_argument(
        "--lose",
        type=_absence,
        action="append",
        default=[],
        metavar="HOSPITAL:ROUNDS",
        help="a hospital that takes no part in these rounds, such as hospital-2:3-5; may be repeated; needs drop-outs",
    )
    run.add_argument("--rounds", type=_count, metavar="N", help="instead of the task's")
    run.add_argument(
        "--task",
        metavar="TASK",
        help="a task of studies/ by its name, or a file (default: the cohort's own; of --data made from the table)",
    )
    run.add_argument("--model", choices=_MODELS, help="instead of the task's")
    run.add_argument("--experimental", action="store_true", help="allow a model that is not to be relied on yet")
    run.add_argument(
        "--metrics",
        action="store_true",
        help="hold a fifth of the training patients out and measure the model on them by noised counts through the masked sum",
    )
    run.add_argument("--seed", type=_seed, metavar="S", help="split and all randomness repeat; not private")
    run.add_argument(
        "--first-model",
        type=Path,
        metavar="FILE",
        help="first weights from this safetensors file, such as an earlier run's, in the place of random ones",
    )
    run.add_argument(
        "--partly", action="store_true", help="of that file take what fits by name and shape, draw the rest"
    )
    run.add_argument(
        "--exact",
        action="store_true",
        help="each hospital computes its gradient sums by itself, as in production; else those of many hospitals are "
        "computed in one call, equal to within one step of the grid, and sooner",
    )
    run.add_argument(
        "--split-seeds",
        type=_seeds,
        metavar="SEEDS",
        help="random splits into training and test, such as 43-52 or 1,2,5",
    )
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder, in place of a run there (default: a new one in runs)"
    )
    run.add_argument(
        "--no-baseline",
        action="store_true",
        help="do not train a second model, without privacy on everybody's data in one place, to compare with",
    )
    run.add_argument(
        "--keep-parties", action="store_true", help="keep the folders of all hospitals and the coordinator"
    )
    run.add_argument(
        "--backend",
        choices=_BACKENDS,
        default="process",
        help="all hospitals in this process (the default), or each in an actor of Flower's simulation engine on Ray",
    )
    run.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="an existing Ray cluster, HOST:PORT or auto, whose machines share the run's folder (default: one for the run)",
    )
    _add_json(run)
    run.set_defaults(action=_run)


def _add_own_table(run: Parser) -> None:
    own = run.add_argument_group("a table of your own (CSV, one row a record)")
    own.add_argument("--data", type=Path, metavar="FILE", help="instead of a cohort; it does not leave this machine")
    own.add_argument("--label", metavar="COLUMN", help="what is to be predicted: two classes or more")
    own.add_argument(
        "--partition",
        metavar="HOW",
        help="into hospitals: iid (the default), dirichlet:ALPHA (labels skewed, more so the smaller), column:NAME",
    )
    own.add_argument("--patient-column", metavar="COLUMN", help="whose record it is (default: each row is a patient)")
    own.add_argument("--leave-out", metavar="COLUMNS", help="columns not to predict from, with commas between")
    own.add_argument(
        "--test", type=_share, metavar="SHARE", help="of each hospital's patients, set aside (default 0.2)"
    )


def _add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="show a study's epsilon by attempt, its noise, bytes, time and memory, before anybody joins",
        description="What a study costs a patient as attempts are spent (of many a dozen are shown), how much noise other "
        "epsilons would need, what is sent, and how long an attempt takes on this machine, from a trial on made-up records.",
    )
    plan.add_argument("study", type=Path, metavar="STUDY", help="a study.toml")
    plan.add_argument(
        "--patients",
        type=_count,
        metavar="N",
        help="who train at one hospital, held-out ones not counted (default: the largest in roster.json beside the study)",
    )
    plan.add_argument(
        "--epsilon",
        type=_positive_epsilon,
        action="append",
        metavar="E",
        help="tell the noise for it (may be repeated)",
    )
    plan.add_argument("--out", type=Path, metavar="PNG", help="a plot of epsilon by attempt")
    _add_json(plan)
    plan.set_defaults(action=_study_plan)


def _add_fetch(commands: argparse._SubParsersAction[Parser]) -> None:
    fetch = commands.add_parser(
        "fetch",
        help="download a public data set from its official address",
        description="Show licence, citation and source of a public data set, download it over HTTPS from its official "
        "address and check it against its known checksum. A file that does not match is not kept.",
    )
    fetch.add_argument("name", metavar="NAME", help="heart-disease, pneumonia, icu-mortality or medical-abstracts")
    fetch.add_argument(
        "--to", type=Path, metavar="DIR", help="the data folder (default: the one that MEDFED_DATA names, else data)"
    )
    fetch.add_argument(
        "--from", dest="mirror", metavar="URL", help="a mirror that has the files under the same names; same checksums"
    )
    fetch.add_argument("--proxy", metavar="URL", help="an HTTP proxy, such as http://proxy.example:3128")
    _add_json(fetch)
    fetch.set_defaults(action=_fetch)


def _add_federation(commands: argparse._SubParsersAction[Parser]) -> None:
    federation = commands.add_parser(
        "federation", help="the same with one process a hospital and a coordinator, over TLS on this machine"
    )
    federation.add_argument("--cohort", default=DEFAULT_COHORT, metavar="NAME", help="default %(default)s")
    federation.add_argument("--epsilon", type=_positive_epsilon, default=1.0, metavar="E", help="default 1")
    federation.add_argument("--mode", choices=_MODES, default="local", help="default %(default)s")
    federation.add_argument("--split-seed", type=_seed, metavar="S", help="default: the first of the cohort's protocol")
    federation.add_argument(
        "--out", type=Path, default=Path("runs/federation"), metavar="DIR", help="default %(default)s; replaced"
    )
    _add_json(federation)
    federation.set_defaults(action=_federation)


def _add_audit(commands: argparse._SubParsersAction[Parser]) -> None:
    audit = commands.add_parser(
        "audit",
        help="attack the code that hospitals run, and measure whether its promises of privacy hold",
        description="Measure lower bounds on epsilon of one attempt and of a whole training, infer membership and rebuild "
        "patients from what leaves a hospital; each attack also with its defence off, where it must succeed. Exit status 4: "
        "a promise is broken (MF-710), or an attack has become too weak to tell (MF-711).",
    )
    audit.add_argument("--only", choices=_AUDITS, help="one of the four audits")
    audit.add_argument("--quick", action="store_true", help="fewer cases and shadow models: under a minute")
    audit.add_argument("--seed", type=_seed, metavar="S", help="all randomness repeats; not private")
    audit.add_argument(
        "--out", type=Path, metavar="DIR", help="the audit's folder, in place of one there (default: a new one in runs)"
    )
    _add_json(audit)
    audit.set_defaults(action=_audit)


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
        raise argparse.ArgumentTypeError(f"{text!r} is not an epsilon above 0, 100 at most")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return value


def _count(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def _absence(text: str) -> tuple[str, frozenset[int]]:
    """``hospital-2:3-5,9``: a hospital's name, and rounds from 1 on."""
    name, _, rounds = text.rpartition(":")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOSPITAL:ROUNDS")
    return name, frozenset(_seeds(rounds))


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
    _refuse_experimental(study, arguments, seams)
    plan = replace(plan, start=_start(arguments, seams))
    data: str | list[Cohort]
    if arguments.data is not None:
        data, hospitals, split_seeds = _own_cohorts(study, arguments, seams), None, None
    else:
        _refuse_without_data(arguments)
        data, hospitals = _cohort_for(study, arguments, seams)
        split_seeds = arguments.split_seeds
        if arguments.task is not None and study is not None:
            raise ConfigError(100, "a study has its own task", "leave --task out")
    backend = _backend(arguments, seams)
    with quiet_parties():
        simulation = simulate(
            study,
            data,
            plan,
            hospitals=hospitals,
            patients=arguments.patients,
            split_seeds=split_seeds,
            out=arguments.out,
            keep_parties=arguments.keep_parties,
            has_baseline=not arguments.no_baseline,
            seams=seams,
            backend=backend,
            task=None if arguments.data is not None else arguments.task,
        )
    if arguments.json:
        say_json(simulation.result.to_json())
    else:
        from medfed.simulations.summary import show_run

        show_run(simulation, has_study=study is not None)
    return ExitStatus.HANDLED


def _refuse_experimental(study: Study | None, arguments: argparse.Namespace, seams: Seams) -> None:
    """No task of a cohort itself has an experimental model."""
    from medfed.model_choice import refuse_experimental
    from medfed.server.planning import load_task

    names = [arguments.model, None if study is None else study.model.name]
    if arguments.task is not None:
        names.append(load_task(seams.files, arguments.task).model.name)
    for name in names:
        if name is not None:
            refuse_experimental(name, asked=arguments.experimental)


def _start(arguments: argparse.Namespace, seams: Seams) -> WarmStart | None:
    """First weights that are not drawn by chance."""
    from medfed.models.warm_start import WarmStart

    if arguments.first_model is None:
        if arguments.partly:
            raise ConfigError(100, "--partly is about a file of first weights", "name it with --first-model")
        return None
    return WarmStart(seams.files.read(arguments.first_model), arguments.partly)


def _backend(arguments: argparse.Namespace, seams: Seams) -> Backend | None:
    """What carries the messages; None for this process."""
    if arguments.backend == "ray":
        from medfed.simulations.backends.ray_engine import ray_backend

        return ray_backend(arguments.ray_address, seams)
    if arguments.ray_address is not None:
        raise ConfigError(100, "--ray-address is for Ray", "say --backend ray, too")
    return None


def _plan(arguments: argparse.Namespace) -> Rehearsal:
    """What the options decide, for a cohort's own task."""
    from medfed.simulations.rehearsal import Rehearsal

    epsilon = 1.0 if arguments.epsilon is None else arguments.epsilon
    return Rehearsal(
        epsilon=None if math.isinf(epsilon) else epsilon,
        mode=arguments.mode or "local",
        colluders=1 if arguments.colluders is None else arguments.colluders,
        drop_outs=arguments.drop_outs or 0,
        absences=_absences(arguments, arguments.drop_outs or 0),
        rounds=arguments.rounds,
        seed=arguments.seed,
        model=arguments.model,
        metrics=arguments.metrics,
        exact=arguments.exact,
    )


def _plan_of(study: Study, arguments: argparse.Namespace) -> Rehearsal:
    """A study is rehearsed as it stands: options that would change it are refused (MF-100)."""
    from medfed.simulations.rehearsal import Rehearsal

    given = {name: getattr(arguments, name) for name in ("mode", "colluders", "drop_outs", "rounds", "model")}
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    without_noise = arguments.epsilon is not None and math.isinf(arguments.epsilon)
    if arguments.epsilon is not None and not without_noise:
        named.append("--epsilon")
    if arguments.metrics:
        named.append("--metrics")
    if named:
        raise ConfigError(100, f"{', '.join(named)} would change the study", "leave it out, or change the study's file")
    epsilon = None if without_noise else study.privacy.epsilon
    absences = _absences(arguments, study.cohort.drop_outs)
    return Rehearsal(
        epsilon=epsilon, mode=study.privacy.mode, seed=arguments.seed, absences=absences, exact=arguments.exact
    )


def _absences(arguments: argparse.Namespace, drop_outs: int) -> Absences:
    """Who takes no part when; MF-100 where every hospital is needed."""
    if arguments.lose and not drop_outs:
        raise ConfigError(100, "--lose in a study that needs every hospital", "allow for it with --drop-outs N")
    return tuple(arguments.lose)


def _cohort_for(study: Study | None, arguments: argparse.Namespace, seams: Seams) -> tuple[str, int | None]:
    """The cohort asked for, or the one whose label a study predicts; and into how many hospitals to deal it."""
    from medfed.server.planning import load_task
    from medfed.simulations.cohorts import COHORTS

    if study is None:
        return arguments.cohort or DEFAULT_COHORT, arguments.hospitals
    fitting = [name for name in COHORTS if load_task(seams.files, name).task.columns == study.task.columns]
    cohort = arguments.cohort or next(iter(fitting), None)
    if cohort is None:
        what = f"no public cohort has the study's label {study.task.columns[0]}"
        raise ConfigError(203, what, "see medfed-simulate cohorts, or name a table of your own with --data")
    is_fixed = cohort in COHORTS and COHORTS[cohort].fixed
    return cohort, arguments.hospitals or (None if is_fixed else study.cohort.hospitals)


def _refuse_without_data(arguments: argparse.Namespace) -> None:
    named = [f"--{name.replace('_', '-')}" for name in _OWN if getattr(arguments, name) is not None]
    if named:
        raise ConfigError(100, f"{', '.join(named)} is for a table of your own", "name it with --data")


def _own_cohorts(study: Study | None, arguments: argparse.Namespace, seams: Seams) -> list[Cohort]:
    """The table that ``--data`` names, split once for each seed."""
    from medfed.server.planning import load_task
    from medfed.simulations.own_table import OwnTable, own_cohorts
    from medfed.simulations.partition import parse_partition

    if arguments.cohort is not None or arguments.patients is not None:
        raise ConfigError(100, "--cohort and --patients do not go with --data", "leave them out")
    if arguments.task is not None and study is not None:
        raise ConfigError(100, "a study has its own task", "leave --task out")
    task = study if arguments.task is None else load_task(seams.files, arguments.task)
    left_out = () if arguments.leave_out is None else tuple(arguments.leave_out.split(","))
    table = OwnTable(
        path=arguments.data,
        label=arguments.label,
        partition=parse_partition(arguments.partition or "iid"),
        hospitals=arguments.hospitals,
        patient_column=arguments.patient_column,
        leave_out=tuple(name.strip() for name in left_out),
        test_share=0.2 if arguments.test is None else arguments.test,
        task=task,
    )
    seeds = arguments.split_seeds or ((1,) if arguments.seed is None else (arguments.seed,))
    return own_cohorts(seams.files, table, seeds)


def _study_plan(arguments: argparse.Namespace) -> int:
    from medfed import metrics
    from medfed.client.outlook import WANTED, in_words, outlook
    from medfed.models import catalogue, parameters
    from medfed.privacy.plan import make_plan
    from medfed.roster import load_roster
    from medfed.seams import system_seams
    from medfed.simulations import plots
    from medfed.study import load_study

    seams = system_seams()
    study = load_study(seams.files, arguments.study)
    beside = arguments.study.parent / "roster.json"
    patients = arguments.patients
    if patients is None:
        if not seams.files.exists(beside):
            raise ConfigError(100, "there is no roster.json beside the study", "say how many patients: --patients N")
        roster = load_roster(seams.files, beside)
        patients, everybody = max(entry.nominal_patients for entry in roster.hospitals), roster.nominal_patients
    else:
        everybody = patients * study.cohort.hospitals
    model = catalogue.build(study)
    plan = make_plan(study, parameters.count(model))
    wanted = arguments.epsilon or WANTED
    held_out = metrics.held_out(everybody)
    found = outlook(study, plan, model, patients=patients, held_out=held_out, wanted=wanted, clock=seams.clock)
    if arguments.out is not None:
        plots.require_matplotlib()
        seams.files.write(arguments.out, plots.epsilon_planned(found, study.training.rounds, plan.delta))
    report(arguments.json, found, in_words(found))
    return ExitStatus.HANDLED


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
    values = [f"{named(name)} {number(value)}" for name, value in evaluation.test_metrics.items()]
    yield f"  {', '.join(values)}"
    same = "the same" if evaluation.as_recorded else f"NOT the same: {number(evaluation.recorded_test_metric)}"
    yield f"  result.json says {same} of this split, the first: the saved model is its"
    for name, area in evaluation.per_hospital.items():
        yield f"  {name}: {named(evaluation.metric)} {number(area)}"
    yield f"  evaluation: {evaluation.evaluation}; {'; '.join(evaluation.stamps)}"


def _cohorts(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.server.planning import load_task
    from medfed.simulations.cohorts import COHORTS, missing

    seams = system_seams()
    rows = [
        {
            "name": name,
            "purpose": load_task(seams.files, name).purpose,
            "kind": info.kind,
            "patients": info.patients,
            "hospitals": info.hospitals,
            "split_seeds": list(info.protocol_seeds),
            "source": info.source,
            "is_synthetic": info.is_synthetic,
            "missing": missing(seams.files, name),
        }
        for name, info in COHORTS.items()
    ]
    if arguments.json:
        say_json(rows)
        return ExitStatus.HANDLED
    for row, info in zip(rows, COHORTS.values(), strict=True):
        say(f"{row['name']}\n  {row['purpose']}\n  {info.kind}, {info.patients}; {info.hospitals}")
        seeds = " to ".join(str(seed) for seed in sorted({info.protocol_seeds[0], info.protocol_seeds[-1]}))
        say(f"  split seeds of its protocol: {seeds}{' (folds of one cross-validation)' if info.folds else ''}")
        say(f"  source and licence: {row['source']}")
        say(f"  {row['missing'] or 'ready: medfed-simulate run --cohort ' + str(row['name'])}")
    return ExitStatus.HANDLED


def _fetch(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.simulations.fetch import fetch_command

    return fetch_command(arguments, system_seams())


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


def _audit(arguments: argparse.Namespace) -> int:
    from medfed.seams import system_seams
    from medfed.simulations.audits.command import run_audits
    from medfed.simulations.quiet import quiet_parties

    names = _AUDITS if arguments.only is None else (arguments.only,)
    with quiet_parties():
        run_audits(
            names,
            system_seams(),
            seed=arguments.seed,
            quick=arguments.quick,
            out=arguments.out,
            as_json=arguments.json,
        )
    return ExitStatus.HANDLED


if __name__ == "__main__":
    raise SystemExit(main())
