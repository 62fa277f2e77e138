"""A run's result on the terminal, for people: what happened, what it cost a patient, where it lies, what to try next."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medfed import metrics
from medfed.simulations.outcome import Outcome, Result, measured
from medfed.simulations.own_table import EVALUATION as OWN_TABLE
from medfed.simulations.report import baseline, epsilon_in_words, number, others, spent_in_words, spread, stamp_lines
from medfed.simulations.runs import Simulation
from medfed.wording import counted, named, rounded_up

_WIDEST = 110
_FILES_WITHOUT_NOISE = {
    "privacy.md": "that nothing is promised to a patient",
    "privacy.json": "the same for programs; nobody signed it",
}
_FILES = {
    "report.md": "all of this with plots",
    "model.safetensors": "the trained model",
    "privacy.md": "what is promised to a patient, and what is not",
    "privacy.json": "the same, signed; medfed-client verify checks it",
    "result.json": "the figures, for programs",
    "study.toml": "the plan that every hospital approved",
}


def show_run(simulation: Simulation, *, has_study: bool) -> None:
    """Print on standard output; wrapped to the terminal, plain where there is none."""
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
    console.width = min(console.width, _WIDEST)
    result = simulation.result
    first = simulation.outcomes[0]
    console.print()
    for line in stamp_lines(result):
        console.print(f"[{line}]")
    console.print()
    noise = "added noise to them" if result.epsilon is not None else "added NO noise to them"
    console.print(
        f"{result.hospitals} hospitals trained one model together without showing a patient to anybody: each clipped its "
        f"patients' gradients, {noise}, debited its own ledger, and sent the sum under masks, so that the coordinator saw "
        f"only the total of all."
    )
    console.print(_table(result, first))
    console.print(f"\nFiles in {_short(simulation.folder)}")
    for name, what in (_FILES | (_FILES_WITHOUT_NOISE if result.epsilon is None else {})).items():
        console.print(f"  {name:<18} {what}")
    console.print("\nTry next")
    for command, what in _next(simulation, has_study):
        console.print(f"  {command}", soft_wrap=True)
        console.print(f"      {what}")


def _table(result: Result, first: Outcome) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", "")
    table.add_row("task", first.assignment.study.study.purpose)
    guessing = f"{result.chance:g} is guessing, 1 is perfect"
    table.add_row(f"test {named(result.metric)}", f"{spread(result)}; {guessing}")
    if result.cross_validated_metric is not None:
        table.add_row(
            "all folds together", f"{number(result.cross_validated_metric)}, each by the model that did not train on it"
        )
    if any(result.pooled_rounds):
        table.add_row("without privacy", f"{baseline(result)}, the same model on everybody's data in one place")
    else:
        table.add_row("without privacy", "no model was trained to compare with (--no-baseline)")
    table.add_row("also", others(result))
    found = measured(first, noised=result.epsilon is not None)
    for place, line in enumerate(() if found is None else metrics.in_words(found)):
        table.add_row("" if place else "measured together", f"{line}{'' if place else ', by noised counts'}")
    if result.epsilon is None:
        table.add_row("epsilon", f"none. {epsilon_in_words(result)}")
    else:
        said = f"{rounded_up(result.epsilon)} for each {result.unit}, mode {result.mode}. {epsilon_in_words(result)}"
        table.add_row("epsilon", said)
        used = counted(first.checkpoint.last_attempt, "attempt")
        table.add_row("", f"spent by {used}: {spent_in_words(first)}; approved were {first.attempts_asked}")
    traffic = f"each hospital sent {result.upload_bytes_per_round:,} bytes in each"
    table.add_row("rounds", f"{result.rounds} of {result.seconds_per_round:.2f} s; {traffic}")
    return table


def _next(simulation: Simulation, has_study: bool) -> list[tuple[str, str]]:
    """Commands to type, as this reader can type them, and what each is for."""
    result, program = simulation.result, _program()
    is_own = result.evaluation == OWN_TABLE
    data = "--data FILE ..." if is_own else f"--cohort {result.cohort}"
    again = f"{program} run {'STUDY ' if has_study else ''}{data}"
    steps = []
    if simulation.outcomes[0].cohort.seed is not None and not is_own:
        evaluate = f"{program} evaluate {_short(simulation.folder)}"
        steps.append((evaluate, "score the saved model again, outside the federation"))
    if result.epsilon is not None:
        steps.append((f"{again} --epsilon none", "what privacy costs: the same without noise"))
    elif not has_study:
        steps.append((f"{again} --epsilon 1", "the same with noise that protects every patient"))
    if not has_study and result.mode == "local":
        why = "half the epsilon, with noise shared through the secure sum"
        steps.append((f"{again} --epsilon 0.5 --mode distributed", why))
    steps.append((f"{program} federation", "the same as processes of their own, over TLS on this machine"))
    return steps


def _program() -> str:
    """The command's name if the shell finds it, else the path it was started by."""
    name = "medfed-simulate"
    started = Path(sys.argv[0])
    return _short(started) if started.name == name and shutil.which(name) is None else name


def _short(folder: Path) -> str:
    """As the reader would type it."""
    near = os.path.relpath(folder.absolute())
    return str(folder.absolute()) if near.startswith("..") else near
