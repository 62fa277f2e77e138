"""What a hospital makes of a released model for itself: ``local/MODEL/`` in its folder, never sent, never to be shared.

local/MODEL/calibration.json        two numbers from its own held-out patients (``medfed-client calibrate``)
local/MODEL/personalized/           the model trained on with its own patients (``medfed-client personalize``)
local/MODEL/benefit/                what the model is worth here (``medfed-client benefit``)

MODEL is the beginning of the SHA-256 of the model's file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medfed.errors import ConfigError, PrivacyError
from medfed.models.calibration import LocalCalibration
from medfed.models.loading import TrainedModel
from medfed.seams import Files
from medfed.toml_files import StrictModel, validate

LOCAL = "NOT PRIVATE: trained without noise on one hospital's patients, for use there only, never to be shared"
"""The stamp of what a hospital made for itself. It is in the model's file, too, and whoever exports one is refused."""

CALIBRATION_NAME = "calibration.json"


class KeptCalibration(StrictModel):
    """``calibration.json``. ``cross_entropy``: on the hospital's held-out records, before and after; after is by two halves, each
    judged by what the other gave."""

    format: Literal["medfed-calibration-1"]
    model_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    kind: Literal["platt", "temperature"]
    slope: Annotated[float, Field(gt=0.0, le=1e6)]
    offset: Annotated[float, Field(ge=-1e6, le=1e6)]
    records: Annotated[int, Field(ge=1)]
    patients: Annotated[int, Field(ge=1)]
    cross_entropy_before: Annotated[float, Field(ge=0.0)]
    cross_entropy_after: Annotated[float, Field(ge=0.0)]


def local_folder(home: Path, trained: TrainedModel) -> Path:
    """Of a hospital whose folder is ``home``."""
    return home / "local" / trained.sha256[:16]


def require_released(trained: TrainedModel, what: str) -> None:
    """Raise MF-195 for a model that a hospital made for itself."""
    if LOCAL in trained.stamps:
        raise PrivacyError(195, f"this model is local and not private: it cannot be {what}", "name the released run")


def keep_calibration(files: Files, home: Path, trained: TrainedModel, kept: KeptCalibration) -> Path:
    folder = local_folder(home, trained)
    files.make_folder(home / "local", private=True)
    files.make_folder(folder, private=True)
    path = folder / CALIBRATION_NAME
    files.write(path, (json.dumps(kept.model_dump(), indent=1) + "\n").encode(), private=True)
    return path


def drop_calibration(files: Files, home: Path, trained: TrainedModel) -> None:
    path = local_folder(home, trained) / CALIBRATION_NAME
    if files.exists(path):
        files.remove(path)


def kept_calibration(files: Files, home: Path, trained: TrainedModel) -> LocalCalibration | None:
    """This hospital's own calibration of this very model; None where it has none."""
    path = local_folder(home, trained) / CALIBRATION_NAME
    if not files.exists(path):
        return None
    try:
        values = json.loads(files.read(path, limit_bytes=1 << 20))
    except ValueError:
        raise ConfigError(201, f"{CALIBRATION_NAME} is not JSON", "run medfed-client calibrate again") from None
    if not isinstance(values, dict):
        raise ConfigError(201, f"{CALIBRATION_NAME} is not a table", "run medfed-client calibrate again")
    kept = validate(values, CALIBRATION_NAME, KeptCalibration)
    if kept.model_sha256 != trained.sha256:
        raise ConfigError(203, f"{CALIBRATION_NAME} is of another model", "run medfed-client calibrate again")
    return LocalCalibration(kept.kind, kept.slope, kept.offset)
