"""``medfed-client export``: a released model for whoever has no medfed. A local model is refused: it is not private."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

from medfed.client.local_folder import require_released
from medfed.client.model_card import CARD_NAME, model_card
from medfed.client.prediction import require_empty
from medfed.display import shown
from medfed.errors import ConfigError
from medfed.models.export import to_json, to_onnx
from medfed.models.loading import MODEL_NAME, load
from medfed.seams import Files
from medfed.study import Study

ONNX_NAME, JSON_NAME = "model.onnx", "model.json"


class Exported(TypedDict):
    """What ``export --json`` prints. ``onnx_distance``: of its outputs from the model's, beside the largest of them."""

    study: str
    study_sha256: str
    model_sha256: str
    stamps: list[str]
    files: list[str]
    onnx_distance: float | None


def export(
    files: Files, run: Path, out: Path, *, onnx: bool, safetensors: bool, admit: Callable[[Study], None] | None = None
) -> Exported:
    """Write the chosen forms, ``model.json`` and the card into a new folder. Raises MF-195 for a local model, MF-212 for a
    folder in use, MF-203 for a model that ONNX cannot express; nothing is written then."""
    if not onnx and not safetensors:
        raise ConfigError(100, "no form to export", "pass --onnx, --safetensors or both")
    require_empty(files, out)
    trained = load(run, files, admit)
    require_released(trained, "exported")
    contents = {JSON_NAME: to_json(trained), CARD_NAME: model_card(files, run, admit=admit).encode()}
    distance = None
    if onnx:
        made = to_onnx(trained)
        contents[ONNX_NAME], distance = made.data, made.distance
    if safetensors:
        contents[MODEL_NAME] = files.read(run / MODEL_NAME, limit_bytes=1 << 30)
    files.make_folder(out)
    for name, data in contents.items():
        files.write(out / name, data)
    return Exported(
        study=trained.study.study.name,
        study_sha256=trained.study.hash().hex(),
        model_sha256=trained.sha256,
        stamps=list(trained.stamps),
        files=sorted(contents),
        onnx_distance=distance,
    )


def in_words(found: Exported, out: Path) -> Iterator[str]:
    for stamp in found["stamps"]:
        yield f"[{shown(stamp)}]"
    yield f"{shown(found['study'])}, model {found['model_sha256'][:12]}: {', '.join(found['files'])} in {out}."
    if found["onnx_distance"] is not None:
        yield f"The ONNX file agrees with the model within {found['onnx_distance']:.1g} on made-up records."
