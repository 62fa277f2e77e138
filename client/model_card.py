"""``MODEL_CARD.md``: what a released model is for, what it was made of, how good it is and for whom, and what it promises.

Made from the files of a run's folder alone, so that whoever has the folder can make it anew (``medfed-client card``). The
form is that of Mitchell et al. 2019 (Model cards for model reporting, arXiv:1810.03993).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.client.explain import _columns as columns_in_words
from medfed.client.explain import _series as series_in_words
from medfed.client.local_folder import require_released
from medfed.display import shown
from medfed.errors import ConfigError
from medfed.model_choice import described
from medfed.models import parameters
from medfed.models.loading import PRIVACY_NAME, TrainedModel, load
from medfed.models.tasks import meaning
from medfed.roster import Roster, load_roster
from medfed.seams import Files
from medfed.study import Study
from medfed.task_choice import Classification, target_in_words
from medfed.wording import counted, rounded_up, times

CARD_NAME = "MODEL_CARD.md"
"""In every folder of ``medfed-simulate run``."""
RESULT_NAME, ROSTER_NAME = "result.json", "roster.json"
_LIMIT_BYTES = 1 << 24
_MOST_NAMED = 40
WEAK = 4.6  # epsilon: from about 100 times on
_Parsed = TypeVar("_Parsed", bound=BaseModel)


class _Lenient(BaseModel):
    """Of a file that says more than is needed here."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class _Privacy(_Lenient):
    """Figures of ``privacy.json``; None without noise."""

    epsilon: float | None
    epsilon_spent: float | None
    delta: float
    unit: str
    mode: str
    holds_against: str
    not_claimed: str
    attempts_used: int
    attempts_approved: int
    clipping_norm: float
    noise_multiplier: float | None
    hospitals: list[dict[str, object]]


class _Bounded(_Lenient):
    value: float | None
    low: float | None = None
    high: float | None = None


class _Measured(_Lenient):
    """What the federation itself measured, through the masked sum."""

    patients: _Bounded
    auc: _Bounded | None = None
    accuracy: _Bounded | None = None
    calibration_gap: _Bounded | None = None


class _Result(_Lenient):
    """Figures of ``result.json``, of a simulation or of a coordinator; what one of them has not is left out."""

    evaluation: str
    metric: str | None = None
    chance: float | None = None
    test_metric: float | None = None
    test_metric_sd: float | None = None
    test_metrics: dict[str, float | None] = Field(default_factory=dict)
    pooled_metric: float | None = None
    per_hospital: dict[str, float | None] = Field(default_factory=dict)
    seeds: list[int | None] = Field(default_factory=list)
    training_patients: int | None = None
    held_out_metrics: Annotated[list[_Measured], Field(max_length=1000)] = Field(default_factory=list)


def model_card(
    files: Files, folder: Path, source: str | None = None, admit: Callable[[Study], None] | None = None
) -> str:
    """The card in Markdown. ``source``: where the records came from, if that is known.

    Raises as ``load``; ``ConfigError`` MF-201 for a result or statement that is no such file; MF-195 for a local model.
    """
    trained = load(folder, files, admit)
    require_released(trained, "described for others")
    study = trained.study
    privacy = _read(files, folder / PRIVACY_NAME, _Privacy)
    result = _read(files, folder / RESULT_NAME, _Result)
    roster = load_roster(files, folder / ROSTER_NAME) if files.exists(folder / ROSTER_NAME) else None
    sections = [
        ("What it is", _what(trained)),
        ("Intended use", _use(study)),
        ("What it was made of", list(_data(study, roster, result, source))),
        ("How good it is", list(_metrics(study, result))),
        ("What it promises the patients", list(_privacy(privacy))),
        ("Limits", list(_limits(study, privacy))),
        ("How to use it", _how(trained)),
    ]
    lines = [
        f"# Model card: {shown(study.study.name)}",
        "",
        *(f"> **{shown(stamp)}**  " for stamp in trained.stamps),
        "",
    ]
    for head, body in sections:
        lines += [f"## {head}", "", *body, ""]
    return "\n".join(lines).rstrip() + "\n"


def _read(files: Files, path: Path, kind: type[_Parsed]) -> _Parsed | None:
    if not files.exists(path):
        return None
    try:
        return kind.model_validate_json(files.read(path, limit_bytes=_LIMIT_BYTES))
    except ValidationError:
        raise ConfigError(201, f"{path.name} is not what a run leaves", "name a run's folder") from None


def _what(trained: TrainedModel) -> list[str]:
    study = trained.study
    size = parameters.count(trained.model)
    return [
        f"`{described(study.model)}` with {size:,} parameters, over records of kind {study.data.kind}. Predicted: "
        f"{shown(target_in_words(study.task))}.",
        "",
        f"Model file SHA-256 `{trained.sha256}`, study SHA-256 `{study.hash().hex()}`.",
    ]


def _use(study: Study) -> list[str]:
    return [
        f"The study's purpose, in its own words: {shown(study.study.purpose)}",
        "",
        "For people who treat patients of the same kind as those it was made of, beside their own judgment. It is no medical "
        "device, "
        "nobody has approved it as one, and it is not for decisions that no person looks at. Before it is used anywhere, "
        "judge it "
        "there: `medfed-client benefit` on held-out patients, `medfed-client calibrate` for chances that are right locally.",
    ]


def _data(study: Study, roster: Roster | None, result: _Result | None, source: str | None) -> Iterator[str]:
    if source is not None:
        yield f"Source: {shown(source)}"
        yield ""
    if roster is not None:
        declared = sum(entry.nominal_patients for entry in roster.hospitals)
        yield (
            f"{counted(len(roster.hospitals), 'hospital')} that declared {counted(declared, 'training patient')} together "
            f"(round public "
            f"numbers), at most {counted(study.data.max_records_per_patient, 'record')} of each."
        )
    else:
        yield (
            f"{counted(study.cohort.hospitals, 'hospital')}, at most {counted(study.data.max_records_per_patient, 'record')} "
            f"a patient."
        )
    yield ""
    yield "A record, by the study's contract; all constants are public, none was computed from patients unless the study says so:"
    yield ""
    lines = list(columns_in_words(study.data))
    for line in lines[:_MOST_NAMED]:
        yield f"- {shown(line)}"
    if len(lines) > _MOST_NAMED:
        yield f"- and {len(lines) - _MOST_NAMED} more, in `study.toml`"
    if study.data.series is not None:
        for line in series_in_words(study.data.series):
            yield f"- {shown(line)}"


def _metrics(study: Study, result: _Result | None) -> Iterator[str]:
    if result is None:
        yield "Nothing is known here: this folder holds no `result.json`. Exact figures stay at the hospitals."
        return
    name = result.metric or meaning(study.task).primary
    if result.test_metric is not None:
        yield "| on test patients that no hospital trained on | |"
        yield "|-|-|"
        sd = "" if result.test_metric_sd is None else f" (sd over splits {result.test_metric_sd:.3f})"
        yield f"| **{name}** | **{result.test_metric:.3f}**{sd} |"
        for other, value in result.test_metrics.items():
            if other != name and value is not None:
                yield f"| {other} | {value:.3f} |"
        if result.chance is not None:
            yield f"| {name} of guessing | {result.chance:.3f} |"
        if result.pooled_metric is not None:
            yield f"| {name} of the same model on everybody's data in one place, without privacy | {result.pooled_metric:.3f} |"
        yield ""
    yield from _by_hospital(name, result)
    for measured in result.held_out_metrics[:1]:
        yield from _measured(measured)
    if len(result.seeds) > 1:
        yield f"Means over {len(result.seeds)} splits of the same patients; this model is the first one's."
    yield f"How it was judged: {shown(result.evaluation)}."


def _by_hospital(name: str, result: _Result) -> Iterator[str]:
    if not result.per_hospital:
        return
    known = {hospital: value for hospital, value in result.per_hospital.items() if value is not None}
    yield f"| hospital | {name} |"
    yield "|-|-|"
    for hospital, value in list(result.per_hospital.items())[:_MOST_NAMED]:
        yield f"| {shown(hospital)} | {'undefined' if value is None else f'{value:.3f}'} |"
    yield ""
    if known:
        worst = min(known, key=lambda hospital: known[hospital])
        yield f"Worst hospital: {shown(worst)}, {known[worst]:.3f}. In a real federation these figures never leave a hospital."
        yield ""


def _measured(measured: _Measured) -> Iterator[str]:
    """By noised counts: what a real federation learns of its model."""
    yield "Measured by the federation itself, from noised counts over patients whom the hospitals held out (95 % intervals):"
    yield ""
    yield "| | |"
    yield "|-|-|"
    rows = (
        ("held-out patients", measured.patients),
        ("auc", measured.auc),
        ("accuracy", measured.accuracy),
        ("mean probability minus observed rate", measured.calibration_gap),
    )
    for name, figure in rows:
        if figure is not None and figure.value is not None:
            form = ".0f" if name == "held-out patients" else ".3f"
            bounds = (
                "" if figure.low is None or figure.high is None else f" ({figure.low:{form}} to {figure.high:{form}})"
            )
            yield f"| {name} | {figure.value:{form}}{bounds} |"
    yield ""


def _privacy(privacy: _Privacy | None) -> Iterator[str]:
    if privacy is None:
        yield "This folder holds no privacy statement: nothing can be said here of what the model tells about a patient."
        return
    if privacy.epsilon is None or privacy.epsilon_spent is None:
        yield "**Nothing.** No noise was added, so no epsilon holds: whoever has the model may tell who was in the data."
        return
    yield (
        f"Whether or not the data of one {privacy.unit} were used, no conclusion drawn from this model becomes more than "
        f"**{times(privacy.epsilon)} times** as likely (epsilon **{rounded_up(privacy.epsilon)}**), apart from a chance of "
        f"{privacy.delta:g} (delta). Mode `{privacy.mode}`; it holds against {privacy.holds_against}."
    )
    yield ""
    if privacy.epsilon > WEAK:
        yield "**That is a limit too weak to mean much.**"
        yield ""
    yield (
        f"{privacy.attempts_used} of {privacy.attempts_approved} approved attempts were used: epsilon spent "
        f"{rounded_up(privacy.epsilon_spent)}. Clipping norm {privacy.clipping_norm:g}, noise multiplier "
        f"{privacy.noise_multiplier:g}. "
        f"{counted(len(privacy.hospitals), 'hospital')} signed. `privacy.md` has the particulars, `medfed-client verify` "
        f"checks them."
    )
    yield ""
    yield f"Not claimed: {privacy.not_claimed}."


def _limits(study: Study, privacy: _Privacy | None) -> Iterator[str]:
    yield "- It knows the patients of these hospitals. Elsewhere, and later, it may be worse, and nothing in it will say so."
    yield "- It found what goes together with what, not what causes what; an explanation says what the model used, no more."
    if privacy is not None and privacy.epsilon is not None:
        yield (
            "- Clipping and noise cost accuracy, and rare groups more than frequent ones: look at the worst hospital and at "
            "subgroups of your own patients."
        )
    if isinstance(study.task, Classification):
        changed = any(value is not None for value in (study.task.class_weights, study.task.priors, study.task.focusing))
        taken = ", with the effect of the study's public constants on them taken back," if changed else ""
        yield (
            f"- Its chances{taken} fit the federation's mixture of patients on the whole; where a disease is more or less "
            f"common they are off."
        )
    yield (
        "- Records must look as the contract says; whatever does not is refused, and values set to a bound or a public "
        "constant in place of "
        "missing ones are taken as if measured."
    )
    yield "- It was made from personal data. Whether it may be passed on is a question of law that this card does not answer."


def _how(trained: TrainedModel) -> list[str]:
    usual = trained.study.data.kind
    return [
        "```",
        "medfed-client predict RUN_FOLDER --out FOLDER --explain 5      # new records, as hospital.toml names them",
        "medfed-client export RUN_FOLDER --onnx --safetensors --out FOLDER   # for use without medfed",
        "```",
        "",
        f"From Python: `medfed.models.load(RUN_FOLDER).predict(records)`, with records of kind {usual} encoded by "
        "`medfed.models.records.encode_records(study, ..., labelled=False)`.",
    ]
