"""``medfed-client predict``: a released model on new records, read as training reads them, at this hospital and for it alone.

What is written holds patients' ids and what a model says of them: files of mode 0600 in a folder that was empty.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from medfed.client.entities import ENTITIES_NAME, entity_table
from medfed.client.local_folder import kept_calibration
from medfed.client.policy import DataSection
from medfed.client.sources.csv_table import Table, read_table
from medfed.client.sources.event_table import read_events
from medfed.client.sources.hospital_records import read_records
from medfed.display import shown
from medfed.errors import ConfigError
from medfed.models.loading import TrainedModel, load
from medfed.models.records import Inputs
from medfed.seams import Files
from medfed.study import Study
from medfed.task_choice import Classification, Effect, MultiLabel, Reconstruction, Survival, Tagging, Task, cautions
from medfed.wording import counted

TABLE_NAME, JSON_NAME = "predictions.csv", "predictions.json"
WIDEST = 4096  # columns of the table of predictions


class Prediction(TypedDict):
    """Of one record: the line of the table where it begins, its ids, the numbers under ``names`` of the whole."""

    row: int
    patient: str
    record: str
    values: list[float]


class Predictions(TypedDict):
    """``predictions.json``, and what ``predict --json`` prints without ``predictions``.

    ``calibration``: how the numbers became chances. ``explanations``: names of files beside it. ``stamps``: what the model must
    not be mistaken for; ``cautions``: what must be said with every prediction of such a task.
    """

    format: str
    study: str
    study_sha256: str
    model_sha256: str
    task: str
    stamps: list[str]
    cautions: list[str]
    calibration: str
    records: int
    patients: int
    names: list[str]
    means: list[float]
    explanations: list[str]
    predictions: list[Prediction]


@dataclass(frozen=True, slots=True, eq=False)
class NewRecords:
    """Encoded records without labels, the lines of the table where they begin, their ids, and what
    explanations show of them: a text, a SMILES, the codes of events."""

    inputs: Inputs
    rows: tuple[int, ...]
    patients: tuple[str, ...]
    records: tuple[str, ...]
    texts: tuple[str, ...]


def read_new_records(files: Files, folder: Path, data: DataSection, study: Study) -> NewRecords:
    """Every record that ``data`` names, by the study's contract but its labels. Raises as ``read_records``: what the
    contract refuses in training is refused here, too."""
    encoded = read_records(files, folder, data, study, labelled=False)
    shown = study.data.text or study.data.molecule or study.data.fingerprint
    wanted = {} if shown is None else {shown.column: data.columns.get(shown.column, shown.column)}
    table = read_table(files, folder / data.path, data.patient_column, wanted, data.record_column)
    if table.patients != encoded.patients:
        raise ConfigError(301, "the table changed while it was read", "run it again")
    texts = ("",) * len(table) if shown is None else table.columns[shown.column]
    if study.data.events is not None:
        texts = _codes(files, folder, data, table, study.data.events.length)
    return NewRecords(encoded.inputs, table.rows, table.patients, table.records, texts)


def _codes(files: Files, folder: Path, data: DataSection, table: Table, length: int) -> tuple[str, ...]:
    """Of each record its last ``length`` codes in the order of time, a line each, as they are encoded."""
    places = {record: place for place, record in enumerate(table.records)}
    column = data.record_column or data.patient_column
    events = read_events(files, folder / (data.events or ""), column, data.event_time_column, data.code_column, places)
    own: list[list[str]] = [[] for _ in places]
    for event in np.lexsort((np.arange(len(events.days)), events.days)).tolist():
        own[int(events.records[event])].append(events.codes[event])
    return tuple("\n".join(codes[-length:]) for codes in own)


def require_empty(files: Files, out: Path) -> None:
    """Raise MF-212 unless ``out`` is not there, or is a folder with nothing in it."""
    if files.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(212, f"{out.name} is there and not empty", "choose another --out")


def predict(
    files: Files,
    run: Path,
    home: Path,
    data: DataSection,
    out: Path,
    explain: int = 0,
    admit: Callable[[Study], None] | None = None,
) -> Predictions:
    """Read, predict, explain the first ``explain`` records, and write it all to ``out``, at the end and at once.

    ``home``: the folder that paths of ``data`` are relative to, and where this hospital's own calibration lies, if it has one.
    ``admit``: as for ``load``.
    """
    require_empty(files, out)
    trained = load(run, files, admit)
    kept = kept_calibration(files, home, trained)
    if kept is not None:
        trained = trained.with_local(kept)
    new = read_new_records(files, home, data, trained.study)
    found = trained.predict(new.inputs)
    values = _flat(found)
    pages = _explanations(trained, new, values, min(explain, len(new.rows)))
    result = _result(trained, new, values, found.shape[1:], sorted(pages))
    if isinstance(trained.study.task, Tagging):
        ids = list(zip(new.rows, new.patients, new.records, strict=True))
        pages[ENTITIES_NAME] = entity_table(trained.study.task, found, new.texts, ids)
    files.make_folder(out, private=True)
    for name, page in pages.items():
        files.write(out / name, page, private=True)
    files.write(out / TABLE_NAME, _table(result), private=True)
    files.write(out / JSON_NAME, (json.dumps(result, indent=1) + "\n").encode(), private=True)
    return result


def _explanations(trained: TrainedModel, new: NewRecords, values: NDArray[np.float64], count: int) -> dict[str, bytes]:
    if not count:
        return {}
    from medfed.client.explanation_pictures import explained_files

    return explained_files(trained, new, values, count)


def _flat(found: NDArray[np.float64]) -> NDArray[np.float64]:
    values = found.reshape(len(found), -1)
    if values.shape[1] > WIDEST:
        raise ConfigError(
            203, f"{values.shape[1]} numbers a record are too many for a table", "use medfed.models.load(...).predict"
        )
    return values


def _result(
    trained: TrainedModel, new: NewRecords, values: NDArray[np.float64], shape: Sequence[int], explained: list[str]
) -> Predictions:
    study = trained.study
    return Predictions(
        format="medfed-predictions-1",
        study=study.study.name,
        study_sha256=study.hash().hex(),
        model_sha256=trained.sha256,
        task=study.task.kind,
        stamps=list(trained.stamps),
        cautions=cautions(study.task),
        calibration=calibration_in_words(trained),
        records=len(new.rows),
        patients=len(set(new.patients)),
        names=names_of(study.task, shape),
        means=[float(mean) for mean in values.mean(0)],
        explanations=explained,
        predictions=[
            Prediction(row=row, patient=patient, record=record, values=[float(value) for value in line])
            for row, patient, record, line in zip(new.rows, new.patients, new.records, values, strict=True)
        ],
    )


def names_of(task: Task, shape: Sequence[int]) -> list[str]:
    """What each number of a prediction is called, the prediction being of this shape."""
    match task:
        case Classification():
            return [f"probability_{index}" for index in range(task.classes)]
        case MultiLabel():
            return [f"probability_{name}" for name in task.labels]
        case Survival():
            return [f"without_event_at_{edge:g}_{task.unit}" for edge in task.edges]
        case Reconstruction():
            return ["anomaly_score", *(f"latent_{place}" for place in range(1, shape[0]))]
        case Effect():
            arms = [f"probability_{arm}_{task.treatment}" for arm in ("without", "with")]
            return [*arms, f"effect_of_{task.treatment}"]
        case Tagging():
            return [f"probability_{word + 1}_{tag}" for word in range(shape[0]) for tag in task.tags]


def calibration_in_words(trained: TrainedModel) -> str:
    """How the numbers became chances."""
    task = trained.study.task
    if not isinstance(task, Classification | MultiLabel):
        return "none: the predictions are no chances of classes"
    constants = {
        "class weights": getattr(task, "class_weights", None) or getattr(task, "positive_weights", None),
        "priors": getattr(task, "priors", None),
        "focal loss": getattr(task, "focusing", None),
    }
    used = [name for name, value in constants.items() if value is not None]
    public = f"{' and '.join(used)} of the study taken back" if used else "the model's own chances"
    return public if trained.local is None else f"{public}, then this hospital's own calibration ({trained.local.kind})"


def _table(result: Predictions) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "patient", "record", *result["names"]])
    for line in result["predictions"]:
        writer.writerow([line["row"], line["patient"], line["record"], *(f"{value:.6g}" for value in line["values"])])
    return out.getvalue().encode()


def in_words(result: Predictions, out: Path) -> Iterator[str]:
    """For people: what was done, never what was predicted for whom."""
    for stamp in result["stamps"]:
        yield f"[{shown(stamp)}]"
    yield (
        f"{counted(result['records'], 'record')} of {counted(result['patients'], 'patient')} by {shown(result['study'])}, model "
        f"{result['model_sha256'][:12]}."
    )
    yield f"Calibration: {result['calibration']}."
    yield from (shown(caution) for caution in result["cautions"])
    first = list(zip(result["names"], result["means"], strict=True))[:12]
    yield "Means: " + ", ".join(f"{shown(name)} {mean:.3f}" for name, mean in first)
    more = f" and {counted(len(result['explanations']), 'file')} of explanations" if result["explanations"] else ""
    yield f"Written to {out}: {TABLE_NAME}, {JSON_NAME}{more}. They hold patients' ids: keep them here."


def without_patients(result: Predictions) -> dict[str, object]:
    """For programs, on standard output: all but what was predicted for whom."""
    return {key: value for key, value in result.items() if key != "predictions"}
