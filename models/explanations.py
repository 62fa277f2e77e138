"""Why a model said what it said of one record: how much each of its values moved the output, and where an image was looked at.

Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) from a public baseline: numbers at the study's centers,
categories at their first level, nothing measured in the same stay, the image blurred until no detail is left, words without
a meaning (embedding 0). The contributions add up to the output's distance from the baseline's. Grad-CAM (Selvaraju et al. 2017,
arXiv:1610.02391) at the last layer that still has places. Both say what the *model* used, not what is true of the patient.

Captum does the sums; without it ``ConfigError`` MF-320.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from medfed.data_contract import Series
from medfed.errors import ConfigError, LocalProtocolError
from medfed.models.attribution import (
    asked_of,
    blurred,
    from_embedded,
    grad_cam,
    integrated_gradients,
    of_features,
    require_captum,
    usual,
)
from medfed.models.explanations_of_parts import (
    of_events,
    of_fingerprint,
    of_mixed,
    of_molecule,
    of_views,
    of_volume,
)
from medfed.models.loading import TrainedModel
from medfed.models.reasons import ImageReasons, Reasons, SeriesReasons, TableReasons, TextReasons
from medfed.models.records import Inputs
from medfed.models.text_pieces import pieces

if TYPE_CHECKING:
    from medfed.data_contract import RecordKind

Floats = NDArray[np.float64]


def explain(trained: TrainedModel, record: Inputs, text: str = "") -> Reasons:
    """``record``: one encoded record [*shape]; ``text``: of a study of texts the text that it was made from.

    Raises ``ConfigError`` MF-320 without captum, MF-203 for a kind of record that nothing here explains.
    """
    require_captum()
    kind = trained.study.data.kind
    if kind not in EXPLAINERS:
        raise ConfigError(203, f"records of kind {kind} cannot be explained yet", "leave --explain out")
    return EXPLAINERS[kind](trained, record, text)


# ------------------------------------------------------------------------------------------------------------ by kind


def _table(trained: TrainedModel, record: Inputs, text: str) -> TableReasons:
    asked, features = asked_of(trained, record), trained.study.data.features
    baseline = torch.from_numpy(usual(features))[None].to(asked.inputs)
    return of_features(
        asked.output, features, np.asarray(record, np.float64), integrated_gradients(asked, asked.inputs, baseline)
    )


def _series(trained: TrainedModel, record: Inputs, text: str) -> SeriesReasons:
    """The baseline keeps the stay's length, which is no measurement, and leaves all measurements out."""
    asked, data = asked_of(trained, record), trained.study.data
    contract = data.series
    if contract is None:
        raise LocalProtocolError(900, "a record without a series", "please report this")
    count = len(contract.variables)
    baseline = np.zeros_like(record)
    baseline[:, 2 * count] = record[:, 2 * count]
    baseline[:, 2 * count + 1 :] = usual(data.features)
    found = integrated_gradients(asked, asked.inputs, torch.from_numpy(baseline)[None])
    features = of_features(
        asked.output,
        data.features,
        np.asarray(record, np.float64)[0, 2 * count + 1 :],
        found[:, 2 * count + 1 :].sum(0),
    )
    return SeriesReasons(
        asked.output,
        tuple(variable.name for variable in contract.variables),
        contract.step_hours,
        found[:, :count] + found[:, count : 2 * count],
        _measured(contract, np.asarray(record)),
        int((record[:, 2 * count] > 0).sum()),
        features,
    )


def _image(trained: TrainedModel, record: Inputs, text: str) -> ImageReasons:
    asked, contract = asked_of(trained, record), trained.study.data.image
    if contract is None:
        raise LocalProtocolError(900, "a record without an image", "please report this")
    found = integrated_gradients(asked, asked.inputs, blurred(asked.inputs)).sum(0)
    picture = np.asarray(record, np.float64).mean(0) * contract.scale + contract.center
    return ImageReasons(asked.output, np.clip(picture, 0.0, 1.0), found, grad_cam(asked))


def _text(trained: TrainedModel, record: Inputs, text: str) -> TextReasons:
    """By the embedded words: their numbers have no meaning in between."""
    asked, contract = asked_of(trained, record), trained.study.data.text
    if contract is None:
        raise LocalProtocolError(900, "a record without a text", "please report this")
    found = from_embedded(asked).reshape(len(record), -1).sum(1)  # of given words all parts together
    length = int(np.count_nonzero(record.reshape(len(record), -1)[:, 0]))
    words = pieces(contract, text)[:length]
    if contract.vocabulary_sha256 is not None:
        words = [f"line {token}" for token in record[:length]]
    return TextReasons(asked.output, tuple(words), found[: len(words)], "" if contract.tokens == "bytes" else " ")


EXPLAINERS: dict[RecordKind, Callable[[TrainedModel, Inputs, str], Reasons]] = {
    "table": _table,
    "series": _series,
    "image": _image,
    "text": _text,
    "events": of_events,
    "molecule": of_molecule,
    "fingerprint": of_fingerprint,
    "views": of_views,
    "volume": of_volume,
    "mixed": of_mixed,
}
"""By kind of record: (model, one encoded record, its text) -> reasons. A new kind is a row here and one in
``client/explanation_pictures.py``."""


# -------------------------------------------------------------------------------------------------------------- pieces


def _measured(contract: Series, record: NDArray[np.floating]) -> Floats:
    count = len(contract.variables)
    scale = np.array([variable.scale for variable in contract.variables])
    center = np.array([variable.center for variable in contract.variables])
    values = record[:, :count].astype(np.float64) * scale + center
    return np.where(record[:, count : 2 * count] > 0, values, np.nan)
