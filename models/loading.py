"""A model that a run released, opened for use: ``medfed.models.load("runs/demo").predict(inputs)``.

What is opened is data: a study and a safetensors file of exactly the tensors that its model has. Nothing else is ever loaded as a
model, whoever made it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from medfed.errors import ConfigError, RemoteProtocolError
from medfed.models import catalogue, parameters, tasks
from medfed.models.calibration import Floats, LocalCalibration, calibrated
from medfed.models.marks import marks
from medfed.models.records import Inputs
from medfed.seams import Files, system_seams
from medfed.study import Study, load_study

MODEL_NAME, STUDY_NAME, STUDY_JSON_NAME, PRIVACY_NAME = "model.safetensors", "study.toml", "study.json", "privacy.json"
_LIMIT_BYTES = 1 << 30  # the largest model of the catalogue has a quarter of that


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """A study's model with its released weights. ``sha256``: of the model's file, 64 hex digits; ``stamps``: what it must not be
    mistaken for, as its file and its privacy statement say; ``local``: a hospital's own calibration, where it uses one."""

    study: Study
    model: nn.Module
    sha256: str
    stamps: tuple[str, ...] = ()
    local: LocalCalibration | None = None

    def predict(self, inputs: Inputs) -> Floats:
        """Encoded records [n, *study.data.shape] -> predictions float64[n, ...]: of a classification the probability of each
        class, calibrated by the study's public constants (``models/calibration``) and then by ``local``.

        Records are encoded by ``medfed.models.records.encode_records(study, ..., labelled=False)``. Raises ``ConfigError`` MF-203
        for records of another shape.
        """
        shape = tuple(self.study.data.shape)
        if tuple(inputs.shape[1:]) != shape:
            raise ConfigError(203, f"records of shape {tuple(inputs.shape[1:])}, not {shape}", "encode them first")
        found = calibrated(self.study.task, tasks.predictions(self.model, self.study.task, inputs))
        return found if self.local is None else self.local.apply(found)

    def with_local(self, calibration: LocalCalibration) -> TrainedModel:
        """The same model, calibrated for one hospital."""
        return dataclasses.replace(self, local=calibration)


class _Stated(BaseModel):
    """What ``privacy.json`` says of the files beside it; the rest is for ``medfed-client verify``."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    study_sha256: str
    model_sha256: str
    stamps: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=8)]


def load(
    run_folder: Path | str, files: Files | None = None, admit: Callable[[Study], None] | None = None
) -> TrainedModel:
    """Open what ``medfed-simulate run``, the coordinator or a hospital's study folder holds of a finished run.

    ``admit``: asked before the model is made, which for an own model runs the code of a package; it raises where that is not
    allowed. Without it whoever calls this answers for the packages that are installed.

    Raises: MF-100 for what is no folder, MF-606 where study or model is missing (a hospital's study folder has no model
    before the run has ended), MF-151 to MF-153 for a model file that is no safetensors file of exactly the study's tensors,
    MF-194 where ``privacy.json`` beside it names another study or model. Signatures are ``medfed-client verify``'s business.
    """
    files, folder = files or system_seams().files, Path(run_folder)
    if not folder.is_dir():
        raise ConfigError(100, f"{folder.name} is no folder", "name a run's folder: it holds model.safetensors")
    study = _study(files, folder)
    if admit is not None:
        admit(study)
    if not files.exists(folder / MODEL_NAME):
        raise ConfigError(606, f"{folder.name} holds no {MODEL_NAME}", "name the folder of a finished run")
    data = files.read(folder / MODEL_NAME, limit_bytes=_LIMIT_BYTES)
    model = catalogue.build(study)
    parameters.assign(model, parameters.from_safetensors(model, data))
    digest = parameters.file_hash(data)
    said = _stated(files, folder, study, digest)
    stamps = tuple(dict.fromkeys([*marks(data), *said]))
    return TrainedModel(study, model.eval(), digest, stamps)


def _study(files: Files, folder: Path) -> Study:
    """``study.toml``, or in a hospital's own folder ``study.json``."""
    if files.exists(folder / STUDY_NAME):
        return load_study(files, folder / STUDY_NAME)
    if not files.exists(folder / STUDY_JSON_NAME):
        raise ConfigError(606, f"{folder.name} holds neither {STUDY_NAME} nor {STUDY_JSON_NAME}", "name a run's folder")
    try:
        return Study.model_validate_json(files.read(folder / STUDY_JSON_NAME))
    except ValidationError:
        raise ConfigError(201, f"{STUDY_JSON_NAME} is not a study", "ask for the run's files anew") from None


def _stated(files: Files, folder: Path, study: Study, digest: str) -> list[str]:
    if not files.exists(folder / PRIVACY_NAME):
        return []
    try:
        said = _Stated.model_validate_json(files.read(folder / PRIVACY_NAME))
    except ValidationError:
        raise RemoteProtocolError(194, f"{PRIVACY_NAME} cannot be read", "do not rely on this run") from None
    for name, stated, found in (
        ("study", said.study_sha256, study.hash().hex()),
        ("model", said.model_sha256, digest),
    ):
        if stated != found:
            raise RemoteProtocolError(194, f"{PRIVACY_NAME} is of another {name}", "do not rely on this run")
    return said.stamps
