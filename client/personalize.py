"""``medfed-client personalize``: a released model trained on with this hospital's own patients, after the study, for use here.

Nothing leaves, nobody is asked, and no noise protects anybody: the result tells more of this hospital's patients than a released
model may. It lies in a folder of its own, and its file says in its header what it is. Held-out patients take no part, so that
``medfed-client benefit`` can judge it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from medfed.client.local_folder import LOCAL, local_folder, require_released
from medfed.client.site import Site
from medfed.display import shown
from medfed.errors import DataError
from medfed.models import catalogue, parameters
from medfed.models.fine_tuning import Tuned, looks, tune
from medfed.models.loading import MODEL_NAME, STUDY_JSON_NAME, TrainedModel, load
from medfed.models.marks import marked
from medfed.models.records import Records
from medfed.progress import Progress
from medfed.seams import Files
from medfed.wording import counted

FEWEST_PATIENTS = 10
FOLDER_NAME, RECORD_NAME, PAGE_NAME = "personalized", "personalization.json", "LOCAL.md"


class Personalized(TypedDict):
    """``personalization.json``. Losses are of a record whose patient the model did not see, by cross-validation within the
    training patients; ``passes`` 0: no training on helped, the released model stands."""

    format: str
    stamps: list[str]
    study: str
    study_sha256: str
    released_model_sha256: str
    model_sha256: str
    training_patients: int
    training_records: int
    held_out_patients: int
    passes: int
    rate: float
    loss_before: float
    loss_after: float


def personalize(site: Site, run: Path) -> tuple[Personalized, Path]:
    """Train on, write the folder, say what it brought. Raises MF-195 for a model that is local already, MF-310 for fewer than
    ``FEWEST_PATIENTS`` training patients."""
    trained = load(run, site.seams.files, site.config.policy.admit_code)
    require_released(trained, "personalized again")
    records = site.read_records(trained.study)
    aside = site.holdout(records.patients)
    training = records.subset(~aside)
    tuned = tuned_from(trained, training, "personalizing")
    folder = local_folder(site.folder, trained) / FOLDER_NAME
    data = marked(
        parameters.to_safetensors(catalogue.build(trained.study), tuned.weights),
        tuple(dict.fromkeys([LOCAL, *trained.stamps])),
    )
    held_out = len(set(records.subset(aside).patients))
    record = _record(trained, tuned, training, held_out, parameters.file_hash(data))
    _write(site.seams.files, site.folder, folder, trained, data, record)
    return record, folder


def tuned_from(trained: TrainedModel, training: Records, title: str) -> Tuned:
    """The released weights trained on; raises MF-310 for too few patients."""
    patients = len(set(training.patients))
    if patients < FEWEST_PATIENTS:
        what = f"{patients} training patients are fewer than {FEWEST_PATIENTS}"
        raise DataError(310, what, "use the released model as it is")
    start = parameters.flatten(trained.model)
    with Progress(title, looks(), sys.stderr) as bar:
        return tune(trained.study, start, training, Ticks(bar))


class Ticks:
    """Moves a bar on by one at every call."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._made = bar, 0

    def __call__(self) -> None:
        self._made += 1
        self._bar.update(self._made, "cross-validation")


def _record(trained: TrainedModel, tuned: Tuned, training: Records, held_out: int, digest: str) -> Personalized:
    return Personalized(
        format="medfed-personalized-1",
        stamps=list(dict.fromkeys([LOCAL, *trained.stamps])),
        study=trained.study.study.name,
        study_sha256=trained.study.hash().hex(),
        released_model_sha256=trained.sha256,
        model_sha256=digest,
        training_patients=len(set(training.patients)),
        training_records=len(training.patients),
        held_out_patients=held_out,
        passes=tuned.passes,
        rate=tuned.rate,
        loss_before=tuned.loss_before,
        loss_after=tuned.loss_after,
    )


def _write(files: Files, home: Path, folder: Path, trained: TrainedModel, data: bytes, record: Personalized) -> None:
    for place in (home / "local", folder.parent, folder):
        files.make_folder(place, private=True)
    files.write(folder / STUDY_JSON_NAME, trained.study.canonical_bytes(), private=True)
    files.write(folder / PAGE_NAME, _page(record).encode(), private=True)
    files.write(folder / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode(), private=True)
    files.write(folder / MODEL_NAME, data, private=True)


def _page(record: Personalized) -> str:
    return f"""\
# A local model: {record["study"]}

> **{LOCAL}**

This model was made after the study by training the released one on {counted(record["training_patients"], "patient")} of this
hospital alone, **without clipping and without noise**. No epsilon holds for it: whoever has its file may be able to tell
whether somebody was among these patients, and more. It is therefore as confidential as the records themselves:

- it is for use at this hospital, and is deleted when the records would have to be;
- it is not sent to the coordinator, to another hospital or to a manufacturer, and is not published;
- it is not the first model of another study: `medfed-client export`, `personalize` and `--first-model` refuse it (MF-195).

The privacy statement of the released model (`privacy.md` in the run's folder) says nothing of this one.

Released model: SHA-256 `{record["released_model_sha256"]}`. This model: `{record["model_sha256"]}`, {record["passes"]}
passes at rate {record["rate"]:g}, chosen by cross-validation: loss {record["loss_before"]:.4f} before,
{record["loss_after"]:.4f} after. Held-out patients ({record["held_out_patients"]}) took no part; `medfed-client benefit`
judges it on them.
"""


def in_words(record: Personalized, folder: Path) -> Iterator[str]:
    for stamp in record["stamps"]:
        yield f"[{shown(stamp)}]"
    patients = counted(record["training_patients"], "patient")
    if record["passes"] == 0:
        yield f"Training on with {patients} did not help (cross-validation): the released model stands, copied."
    else:
        yield (
            f"Trained on with {patients}, {record['passes']} passes at rate {record['rate']:g}: cross-validated loss "
            f"{record['loss_before']:.4f} before, {record['loss_after']:.4f} after."
        )
    yield f"In {folder}, to be used as a run's folder here. It is as confidential as the records: never share it (LOCAL.md)."
