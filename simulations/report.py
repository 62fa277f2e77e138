"""``report.md`` of a run, and the same in few words for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from medfed import metrics
from medfed.simulations.effect_cohort import SEMI_SYNTHETIC
from medfed.simulations.outcome import NO_NOISE, SEEDED, SIMULATED, Outcome, Result, measured, spent
from medfed.simulations.own_table import CONSTANTS_FROM_DATA
from medfed.simulations.pooled import BATCH, RATE
from medfed.simulations.synthetic import SYNTHETIC
from medfed.task_choice import cautions
from medfed.wording import counted, named, rounded_up, times

METRIC_PLOT = "metric_by_round.png"
EPSILON_PLOT = "epsilon_by_attempt.png"
HOSPITAL_PLOT = "metric_by_hospital.png"

WEAK = 4.6  # epsilon: from about 100 times on

_STAMP_WORDS = {
    SIMULATED: f"{SIMULATED}: all hospitals ran on this machine, on public patients or your own",
    SYNTHETIC: f"{SYNTHETIC}: how well they are told apart says nothing about medicine",
    CONSTANTS_FROM_DATA: f"{CONSTANTS_FROM_DATA}; for a study give public ones in a task file (--task), or have the "
    "hospitals measure them with secure statistics",
    SEMI_SYNTHETIC: f"{SEMI_SYNTHETIC}: what it says of the treatment says nothing about medicine",
    NO_NOISE: f"{NO_NOISE} was added, so no epsilon holds; it shows what privacy costs, never for real patients",
    SEEDED: f"{SEEDED}: whoever knows the seed can take the noise away",
}


def stamp_lines(result: Result) -> list[str]:
    """What this run must not be mistaken for, one line each."""
    return [_STAMP_WORDS[stamp] for stamp in result.stamps]


def epsilon_in_words(result: Result) -> str:
    """What epsilon means to a patient, in one sentence."""
    if result.epsilon is None:
        return "No noise was added: nothing limits what this model may tell about a patient."
    limit = f"{times(result.epsilon)} times" + " (a limit too weak to mean much)" * (result.epsilon > WEAK)
    return (
        f"Whether or not one {result.unit}'s data are used, no conclusion drawn from this model becomes more than "
        f"{limit} as likely, apart from a chance of {result.delta:g} (delta)."
    )


def number(value: float | None) -> str:
    return "undefined (one class only)" if value is None else f"{value:.3f}"


def spread(result: Result) -> str:
    """``0.881 ± 0.012 over 10 splits``."""
    deviation = result.test_metric_sd
    many = "" if deviation is None else f" ± {deviation:.3f} (sd over {len(result.seeds)} splits)"
    return number(result.test_metric) + many


def report(outcomes: Sequence[Outcome], result: Result) -> str:
    """The report in Markdown; its plots lie beside it."""
    first = outcomes[0]
    study = first.assignment.study
    hospitals, rounds = counted(result.hospitals, "hospital"), counted(result.rounds, "round")
    numbers = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    sections = [
        ("", [f"# {result.cohort}: {hospitals}, {rounds}", "", study.study.purpose]),
        ("", [f"> **{line}**  " for line in stamp_lines(result)]),
        (
            "What was learned",
            [
                *_learned(result),
                *_cautions(first),
                "",
                f"![{named(result.metric)} by round]({METRIC_PLOT})",
                "",
                _measured(first, result),
            ],
        ),
        *((("What the hospitals measured", _measured_together(first, result)),) if result.held_out_metrics else ()),
        ("What it cost a patient", _cost(first, result)),
        (
            "Hospital by hospital",
            [f"![{named(result.metric)} by hospital]({HOSPITAL_PLOT})", "", *_hospitals(first, result)],
        ),
        ("What moved", [_moved(result)]),
        ("Split by split", _splits(outcomes)),
        (
            "Where it comes from",
            [
                f"Data: {first.cohort.source}.  ",
                f"Study: `study.toml`, SHA-256 `{study.hash().hex()}`.  ",
                f"Versions: {numbers}.",
            ],
        ),
    ]
    lines = []
    for head, body in sections:
        lines += [f"## {head}", ""] * bool(head) + body + [""]
    return "\n".join(lines)


def _learned(result: Result) -> list[str]:
    return [
        f"| on test patients that no hospital trained on | {named(result.metric)} |",
        "|-|-|",
        f"| this model, trained by the federation | {spread(result)} |",
        f"| the same model on everybody's data in one place, without privacy | {baseline(result)} |",
        f"| guessing | {result.chance:.3f} |",
        *_more_metrics(result),
    ]


def _cautions(first: Outcome) -> list[str]:
    return [line for caution in cautions(first.assignment.study.task) for line in ("", f"**{caution}**")]


def baseline(result: Result) -> str:
    """The metric of the model without privacy, or that there is none to compare with."""
    return "not trained" if not any(result.pooled_rounds) else number(result.pooled_metric)


def _more_metrics(result: Result) -> list[str]:
    lines = []
    if result.cross_validated_metric is not None:
        lines.append(
            f"All {len(result.seeds)} folds together, each patient scored by the model that did not train on them: "
            f"{named(result.metric)} {number(result.cross_validated_metric)}."
        )
    lines.append(f"Also: {others(result)}.")
    if "f1_macro" in result.test_metrics:
        lines[-1] += " AUC is the mean over classes, each against the rest."
    return ["", *lines]


def others(result: Result) -> str:
    """All metrics but the primary one, in a line."""
    known = {name: value for name, value in result.test_metrics.items() if name != result.metric and value is not None}
    return ", ".join(f"{named(name)} {value:.3f}" for name, value in known.items()) or "nothing else"


def _measured(first: Outcome, result: Result) -> str:
    averaged = first.assignment.study.training.average_last_rounds
    released = f" The released model is the mean over the last {averaged} rounds." if averaged > 1 else ""
    if first.assignment.study.training.ema_decay is not None:
        released = " The released model is an exponential moving average over the rounds."
    guessing = f"{result.chance:g} is guessing, 1 is perfect."
    return f"{guessing}{released} Test patients: {first.cohort.split}. {_baseline_in_words(first, result)}"


def _baseline_in_words(first: Outcome, result: Result) -> str:
    lengths = sorted({rounds for rounds in result.pooled_rounds if rounds is not None})
    if not lengths:
        return "No model was trained without privacy to compare with: run again without --no-baseline."
    chosen = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    if first.pooled is not None and first.pooled.is_ordinary:
        return (
            f"The model without privacy is the same one, trained in the ordinary way on the pooled training patients: Adam, "
            f"rate {RATE:g}, batches of {BATCH}, {chosen} passes, as many as scored best on a held-out fifth of the training "
            "patients. Nothing else was tuned: it may do better."
        )
    return (
        f"The model without privacy is the study's own recipe on the pooled training patients, for {chosen} rounds: the "
        "length that scored best in a cross-validation on the training patients, of the recipe's own and 10 and 40 times as "
        "many."
    )


def _measured_together(first: Outcome, result: Result) -> list[str]:
    """Of the first split."""
    found = measured(first, noised=result.epsilon is not None)
    lines = [] if found is None else [f"- {line}" for line in metrics.in_words(found)]
    return [
        "On patients whom each hospital held out, from noised counts through the masked sum (first split; between which two "
        "figures it lies in 95 of 100 cases). These are all that a real federation learns of its model:",
        "",
        *lines,
    ]


def _cost(first: Outcome, result: Result) -> list[str]:
    if result.epsilon is None:
        return [f"**{NO_NOISE}.** {epsilon_in_words(result)}"]
    plan = first.assignment.plan
    lines = [
        f"**epsilon {rounded_up(result.epsilon)}, delta {result.delta:g}**, for each {result.unit}, mode {result.mode}. "
        f"{epsilon_in_words(result)}",
        "",
        f"![epsilon by attempt]({EPSILON_PLOT})",
        "",
        f"The noise is calibrated for {first.attempts_asked}, and that is what hospitals approve; this run used "
        f"{counted(first.checkpoint.last_attempt, 'attempt')}, {spent_in_words(first)}. Should the secure "
        f"sum fail and every upload be seen unmasked, each hospital's own noise still gives epsilon "
        f"{rounded_up(plan.own_epsilon)}. `privacy.json` has the particulars.",
    ]
    if len(result.seeds) > 1:
        lines += [
            "",
            "Each split is a federation of its own with its own epsilon; `model.safetensors` is the first one's.",
        ]
    return lines


def spent_in_words(outcome: Outcome) -> str:
    """``epsilon 0.9``, and of whom where those who train and those held out for the metrics pay apart."""
    plan = outcome.assignment.plan
    if plan.metrics_epsilon is None:
        return f"epsilon {rounded_up(spent(outcome))}"
    trained = rounded_up(plan.trained_epsilon_after(outcome.trained_attempts))
    return (
        f"epsilon {trained} of a patient who trains, {rounded_up(plan.metrics_epsilon)} of one held out for the metrics "
        "(charged in full with the first attempt)"
    )


def _hospitals(first: Outcome, result: Result) -> list[str]:
    lines = [f"| hospital | training patients | test records | {named(result.metric)} |", "|-|-|-|-|"]
    for place, (name, area) in enumerate(result.per_hospital.items()):
        training = first.assignment.roster.hospitals[place].nominal_patients
        lines.append(f"| {name} | {training} | {first.scores.hospitals[place].records} | {number(area)} |")
    note = (
        "Patients and records are the first split's, the metric is the mean over splits. In a real federation these figures "
        "never leave a hospital."
    )
    return [*lines, "", note]


def _moved(result: Result) -> str:
    hospitals = "1 hospital conspires" if result.colluders == 1 else f"{result.colluders} hospitals conspire"
    return (
        f"Each hospital sent {result.upload_bytes_per_round:,} bytes a round: its "
        f"{'own' if result.epsilon is None else 'noised'} sum under masks that cancel in the total. A round took "
        f"{result.seconds_per_round:.3f} s, of which {result.overhead_s_per_round:.3f} s were not training; one whole "
        f"federation, keys and approvals included, {result.seconds:.1f} s. The masks hold while at most {hospitals} "
        f"with the coordinator."
    )


def _splits(outcomes: Sequence[Outcome]) -> list[str]:
    metric = named(outcomes[0].scores.primary)
    lines = [f"| split seed | {metric} | without privacy | accuracy | attempts | seconds |", "|-|-|-|-|-|-|"]
    for one in outcomes:
        share = one.scores.metrics.get("accuracy")
        accuracy = "" if share is None else f"{share:.3f}"
        seed = "given" if one.cohort.seed is None else str(one.cohort.seed)
        cells = [
            seed,
            number(one.scores.metric),
            number(one.pooled_metric) if one.pooled is not None else "not trained",
            accuracy,
            str(one.checkpoint.last_attempt),
            f"{one.seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
