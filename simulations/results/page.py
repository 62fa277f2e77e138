"""``docs/results.md``: a function of the committed figures and the closed table, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medfed.seams import Files
from medfed.simulations.results import cells, pictures
from medfed.simulations.results.cells import Cell, Measured
from medfed.simulations.results.figures import (
    FEWEST_OF_A_CLASS,
    Judged,
    Mean,
    cells_of,
    groups,
    judge,
    left_out,
    mean_single,
    metric,
    standard_error,
    worst,
)
from medfed.simulations.results.protocol import CHOICE_EPSILON, Arm, Key, Mode, Row, keys
from medfed.wording import counted

PAGE = "results.md"
NOT_MEASURED = "not measured"

_ARMS: tuple[tuple[str, Arm, Mode | None], ...] = (
    ("**federation, distributed**", "federation", "distributed"),
    ("federation, local", "federation", "local"),
    ("plain Opacus, central", "opacus", None),
)
_OTHERS = {
    "auc": "AUC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "f1": "F1",
    "f1_macro": "macro-F1",
    "brier": "Brier",
    "calibration_error": "calibration error",
}
_HEAD = """# Results

What accuracy is left under privacy, on every real cohort there is data for. Written by `make results` from the figures in
`docs/results/`, which `python -m medfed.simulations.results measure` makes; no figure here is typed in but floors and anchors.

**How.** Each figure is a mean over a cohort's splits, with the sample standard deviation; patients of the test parts
never train. What runs is the production code of client, server and masking, all hospitals in one process. The unit is the
patient; epsilon covers all rounds and the spare attempts, so that a run which lost none has spent a little less.
*Distributed*: hospitals share the noise, and epsilon holds against the coordinator together with one other hospital (c = 1).
*Local*: each hospital's noise suffices alone. *Without privacy*: the same rounds without noise. *Calibration error* is the
expected one; a study whose loss weighs classes says chances that are too high for the rarer one, by design. *Worst hospital*:
the lowest of the hospitals' own means, of those with at least 10 test patients of every class.

- *Pooled*: the same model on everybody's data in one place, without privacy, for as long as a validation inside the training
  patients says (`simulations/pooled.py`).
- *Single hospital*: the same training at each hospital alone, its model scored on everybody's test patients. *Best* is picked
  by those very test patients, which flatters it; the mean is what a hospital may expect.
- *Plain Opacus*: its own engine, accountant, Poisson sampling, flat clipping at norm 1 and 20 passes (10 of a deep model), on
  the same model and first weights, with everybody's records in one trusted place. That is the strongest position it can have,
  and weaker privacy: somebody sees every patient. The better of four settings (two rates each of Adam and SGD) is chosen once
  a cohort on a held-out fifth of the training patients of the first split, at epsilon 3; it pays no privacy for that choice.

Runs are seeded by their split, so that a figure can be measured again; rehearsals with seeds are stamped not private.
Floors are those of issue 7, and are judged by the unrounded mean in distributed mode."""


def write_page(files: Files, folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the page beside ``folder``, and into it a picture of each cohort with figures. Returns what was written."""
    measured = {row.name: cells.load(files, folder, row.name) for row in rows}
    written = []
    for row in rows:
        if measured[row.name].cells:
            written.append(folder / picture_name(row))
            files.write(written[-1], pictures.metric_by_epsilon(row, measured[row.name]))
    files.write(folder.parent / PAGE, page(rows, measured).encode())
    return [*written, folder.parent / PAGE]


def picture_name(row: Row) -> str:
    return f"{row.name}.png"


def page(rows: Sequence[Row], measured: dict[str, Measured]) -> str:
    """The whole page. ``measured``: by the row's name."""
    parts = [_HEAD, _summary(rows, measured)]
    parts += [_section(row, measured[row.name]) for row in rows]
    parts.append(_origin([measured[row.name] for row in rows]))
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------------- summary


def _summary(rows: Sequence[Row], measured: dict[str, Measured]) -> str:
    judged = [(row, one) for row in rows for one in judge(row, measured[row.name])]
    known = [one for _, one in judged if one.reached is not None]
    met = sum(one.is_met for one in known)
    open_ones = len(judged) - len(known)
    lines = ["## Floors", ""]
    lines.append(f"{met} of {counted(len(known), 'measured floor')} met; {open_ones} of {len(judged)} not measured.")
    lines += ["", "| cohort, distributed, c = 1 | without privacy | epsilon 8 | epsilon 3 | epsilon 1 |", "|-|-|-|-|-|"]
    for row in rows:
        for floors in row.floors:
            mine = {one.epsilon: one for name, one in judged if name is row and one.floors is floors}
            shown = [_floor(mine.get(epsilon)) for epsilon in (None, 8.0, 3.0, 1.0)]
            lines.append(f"| [{row.name}](#{row.name}), {row.metric_name}, {floors.what} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _floor(one: Judged | None) -> str:
    if one is None:
        return ""
    least = _short(one.least)
    if one.reached is None:
        return f"{least}: {NOT_MEASURED}"
    if one.is_met:
        return f"{least}: met, {_short(one.reached)}"
    return f"{least}: **missed** by {max(0.0001, one.least - one.reached):.2g}, {_short(one.reached)}"


# --------------------------------------------------------------------------------------------------------------- cohorts


def _section(row: Row, measured: Measured) -> str:
    parts = [f"## {row.name}", _setting(row, measured)]
    if measured.cells:
        parts += [_table(row, measured), f"![{row.metric_name} by epsilon](results/{picture_name(row)})"]
        parts += [text for text in (_details(row, measured), _opacus(row, measured)) if text]
    else:
        parts.append(f"**{NOT_MEASURED}**")
    parts += [text for text in (_anchors(row), _notes(row, measured)) if text]
    parts.append(f"```\npython -m medfed.simulations.results measure --cohort {row.name}\n```")
    return "\n\n".join(parts)


def _setting(row: Row, measured: Measured) -> str:
    said = f"{row.metric_name}; {row.splits}; delta {row.delta:g}."
    if measured.cells:
        said += f" Model: {measured.model}; {measured.patients:,} training patients."
    if measured.settings:
        said += f"\n\n> {measured.settings}"
    return said


def _table(row: Row, measured: Measured) -> str:
    epsilons = (None, *row.epsilons)
    head = [f"{row.metric_name}, mean ± sd", *("without privacy" if e is None else f"epsilon {e:g}" for e in epsilons)]
    lines = [_line(head), "|-" * len(head) + "|"]
    single = cells_of(measured, row, "single", None, None)
    fillers = [""] * len(row.epsilons)
    lines.append(_line(["pooled", _of(row, metric(_pooled(row, measured), row.metric)), *fillers]))
    lines.append(_line(["best single hospital", _of(row, metric(single, row.metric)), *fillers]))
    lines.append(_line(["mean single hospital", _of(row, mean_single(single)), *fillers]))
    for name, arm, mode in _ARMS:
        shown = [
            "" if arm == "opacus" and epsilon is None else _arm(row, measured, arm, epsilon, mode)
            for epsilon in epsilons
        ]
        lines.append(_line([name, *shown]))
    for floors in row.floors:
        mine = {one.epsilon: one for one in judge(row, measured) if one.floors is floors}
        lines.append(_line([f"floor, {floors.what}", *(_verdict(mine.get(epsilon)) for epsilon in epsilons)]))
    return "\n".join(lines)


def _arm(row: Row, measured: Measured, arm: Arm, epsilon: float | None, mode: Mode | None) -> str:
    failed = [one.failed for one in measured.cells if (one.arm, one.epsilon) == (arm, epsilon) and one.failed]
    found = metric(cells_of(measured, row, arm, epsilon, mode), row.metric)
    return "none: see below" if failed and found is None else _of(row, found)


def _verdict(one: Judged | None) -> str:
    if one is None:
        return "-"
    if one.reached is None:
        return f"≥ {_short(one.least)}, {NOT_MEASURED}"
    return f"≥ {_short(one.least)}, {'met' if one.is_met else '**missed**'}"


def _pooled(row: Row, measured: Measured) -> list[Cell]:
    return cells_of(measured, row, "pooled", None, None)


def _details(row: Row, measured: Measured) -> str:
    """Other metrics, the worst hospital and subgroups, of whatever was measured."""
    rows: list[tuple[str, float | None, list[Cell]]] = [("pooled", None, _pooled(row, measured))]
    for name, arm, mode in _ARMS:
        for epsilon in (None, *row.epsilons):
            if not (epsilon is None and (arm, mode) != ("federation", "distributed")):
                rows.append((name.strip("*"), epsilon, cells_of(measured, row, arm, epsilon, mode)))
    rows = [each for each in rows if each[2]]
    others = _others(row, measured)
    levels = [] if row.subgroup is None else list(row.subgroup.levels)
    named = [] if row.subgroup is None else [row.subgroup.levels[level] for level in levels]
    lines = [
        _line(
            [
                "trained",
                "epsilon",
                *(_OTHERS.get(name, name.replace("_", " ")) for name in others),
                "worst hospital",
                *named,
            ]
        )
    ]
    lines.append("|-" * (3 + len(others) + len(levels)) + "|")
    for name, epsilon, found in rows:
        lowest, apart = worst(found), groups(found, "subgroups")
        shown = [name, "none" if epsilon is None else f"{epsilon:g}"]
        shown += [_plain(metric(found, other)) for other in others]
        shown.append("-" if lowest is None else f"{_short(lowest[1].value)} {lowest[0]}")
        shown += [_plain(apart.get(level)) for level in levels]
        lines.append(_line(shown))
    return "\n".join(lines)


def _others(row: Row, measured: Measured) -> list[str]:
    known = {name for cell in measured.cells for name, value in cell.metrics.items() if value is not None}
    more = sorted(known - set(_OTHERS))
    return [name for name in [*_OTHERS, *more] if name in known and name != row.metric]


def _opacus(row: Row, measured: Measured) -> str:
    chosen = measured.cell(Key("opacus-choice", CHOICE_EPSILON, None, row.seeds[0]))
    if chosen is None:
        return ""
    if chosen.failed is not None:
        return f"There is no figure of Opacus: {chosen.failed}."
    tried = "; ".join(f"{name}: {'-' if value is None else _short(value)}" for name, value in chosen.tried.items())
    return f"Opacus's setting: {chosen.setting} (on the held-out fifth: {tried})."


def _anchors(row: Row) -> str:
    if not row.anchors:
        return ""
    lines = ["| others, without privacy unless said | figure | source |", "|-|-|-|"]
    for anchor in row.anchors:
        source = f"{anchor.source}; {anchor.comparable}" if anchor.comparable else anchor.source
        lines.append(f"| {anchor.what} | {anchor.figure} | {source} |")
    return "\n".join(lines)


def _notes(row: Row, measured: Measured) -> str:
    lines = [row.note] if row.note else []
    reference = cells_of(measured, row, "federation", None, None)
    error = None if not reference else standard_error(row, reference[0])
    if error is not None:
        size = sum(reference[0].classes)
        lines.append(
            f"One split's test set ({size:,} patients) alone gives a figure a standard error of about {error:.3f}: "
            "differences well below it mean little, whatever the deviation over splits."
        )
    lone = left_out(reference)
    if lone:
        lines.append(f"Fewer than {FEWEST_OF_A_CLASS} test patients of some class, so not compared: {', '.join(lone)}.")
    total, there = len(keys(row)), sum(1 for key in keys(row) if measured.cell(key) is not None)
    if 0 < there < total:
        lines.append(
            f"{total - there} of {total} trainings are {NOT_MEASURED} yet; a mean over fewer splits says how many."
        )
    if len({cell.recipe for cell in measured.cells}) > 1:
        lines.append("**Some of these figures are of an earlier version of the study: measure the cohort anew.**")
    return "\n".join(f"- {line}" for line in lines)


# ---------------------------------------------------------------------------------------------------------------- origin


def _origin(measured: Sequence[Measured]) -> str:
    """What everything was measured with."""
    lines = ["## Measured with", ""]
    known = {name: one for each in measured for name, one in each.environments.items()}
    counts = {name: sum(cell.environment == name for each in measured for cell in each.cells) for name in known}
    if not known:
        return "\n".join([*lines, f"Nothing: {NOT_MEASURED}."])
    for name, one in sorted(known.items(), key=lambda item: (-counts[item[0]], item[0])):
        versions = ", ".join(f"{package} {version}" for package, version in one.versions.items())
        lines.append(f"- {counts[name]} trainings on tree `{one.tree}`, {one.machine}; {versions}")
    seconds = sum(cell.processor_s for each in measured for cell in each.cells)
    lines += ["", f"All trainings together took {seconds / 60:.0f} minutes of one core."]
    return "\n".join(lines)


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _of(row: Row, mean: Mean | None) -> str:
    if mean is None:
        return NOT_MEASURED
    spread = "" if mean.deviation is None else f" ± {_short(mean.deviation)}"
    part = "" if mean.count == len(row.seeds) else f" ({mean.count} of {len(row.seeds)} splits)"
    return f"{_short(mean.value)}{spread}{part}"


def _plain(mean: Mean | None) -> str:
    return "-" if mean is None else _short(mean.value)


def _short(value: float) -> str:
    """Three decimals, without the zero before them."""
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0.") else text
