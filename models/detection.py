"""Finding small things in whole scans: a model of patches slides over a scan, and how well it finds is counted by free response.

The model is trained on patches with and without (a study of volumes of the patch's size, several records a patient); a score is
the chance it gives of class 1. *Source* of the metric: LUNA16 (Setio et al. 2017, doi 10.1016/j.media.2017.06.015).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError
from medfed.models.loading import TrainedModel
from medfed.models.volume_records import Scan, encode_volumes

Floats = NDArray[np.float64]
Scores = Callable[[NDArray[np.float32]], Floats]
"""Patches float32[n, 1, depth, height, width] -> a score of each, float64[n]."""
Size = tuple[int, int, int]

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives a scan at which sensitivities are averaged."""
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Finding:
    """``place``: the middle of a patch in voxels (depth, height, width); ``score``: higher is surer."""

    place: tuple[float, float, float]
    score: float


@dataclass(frozen=True, slots=True)
class FreeResponse:
    """``sensitivities``: share of what there is that is found, at most ``RATES`` false positives a scan; ``mean`` of them."""

    sensitivities: tuple[float, ...]
    mean: float


def find(trained: TrainedModel, scan: Scan, *, stride: int, apart: float, row: int = 1) -> list[Finding]:
    """What a model of patches finds in a whole scan, the surest first.

    ``stride``: voxels from patch to patch; ``apart``: of two findings nearer than so many voxels the surer is kept. ``row``: what
    the scan is called in an error. Raises: as ``encode_volumes``; ``ConfigError`` MF-203 for a model of anything else, or a scan
    smaller than a patch.
    """
    contract, classes = trained.study.data.volume, trained.study.task.outputs
    if contract is None or trained.study.task.kind != "binary" or classes != 1:
        raise ConfigError(203, "a model of patches tells two classes of volumes apart", "take a run of such a study")
    depth, height, width = scan.values.shape
    whole = contract.model_copy(update={"depth": depth, "height": height, "width": width})
    volume = encode_volumes(whole, [scan], [row])[0, 0]

    def scores(patches: NDArray[np.float32]) -> Floats:
        return np.asarray(trained.predict(patches), np.float64)[:, 1]

    places, found = slide(scores, volume, (contract.depth, contract.height, contract.width), stride)
    return suppress(places, found, apart)


def slide(scores: Scores, volume: NDArray[np.float32], patch: Size, stride: int) -> tuple[Floats, Floats]:
    """The middles float64[m, 3] of all patches of ``volume`` [depth, height, width], ``stride`` voxels apart and one at each end,
    and their scores float64[m]. Raises ``ConfigError`` MF-203 for a volume smaller than a patch."""
    if any(whole < side for whole, side in zip(volume.shape, patch, strict=True)):
        raise ConfigError(203, "the scan is smaller than a patch", "give a larger scan")
    starts = [
        sorted({*range(0, whole - side + 1, stride), whole - side})
        for whole, side in zip(volume.shape, patch, strict=True)
    ]
    corners = list(itertools.product(*starts))
    windows = np.lib.stride_tricks.sliding_window_view(volume, patch)
    found = [
        scores(np.stack([windows[corner] for corner in corners[first : first + _AT_ONCE]])[:, None])
        for first in range(0, len(corners), _AT_ONCE)
    ]
    return np.array(corners, np.float64) + (np.array(patch) - 1) / 2.0, np.concatenate(found)


def suppress(places: Floats, scores: Floats, apart: float) -> list[Finding]:
    """The surest first, without those that lie nearer than ``apart`` voxels to a surer one that is kept; of two with the same
    score the first is."""
    left = np.argsort(-scores, kind="stable")
    kept: list[Finding] = []
    while len(left):
        best = left[0]
        down, back, right = places[best].tolist()
        kept.append(Finding((down, back, right), float(scores[best])))
        left = left[np.linalg.norm(places[left] - places[best], axis=1) >= apart]
    return kept


def free_response(
    findings: Sequence[Sequence[Finding]], truths: Sequence[Floats], within: float
) -> FreeResponse | None:
    """``findings`` and what there is, float64[k, 3], scan by scan; None where there is nothing to find.

    A finding hits what lies nearest to it within ``within`` voxels. Of several hits of one thing the surest counts, the others
    neither way; what hits nothing is a false positive. At a rate counts the best threshold that stays within it.
    """
    total = sum(len(truth) for truth in truths)
    if not total:
        return None
    judged = [each for found, truth in zip(findings, truths, strict=True) for each in _judged(found, truth, within)]
    scores = np.array([score for score, _ in judged])
    hits = np.array([is_hit for _, is_hit in judged], np.bool_)
    thresholds = np.unique(scores)
    points = [(int((~hits[scores >= least]).sum()), int(hits[scores >= least].sum())) for least in thresholds]
    sensitivities = tuple(
        max((hit for wrong, hit in points if wrong <= rate * len(truths)), default=0) / total for rate in RATES
    )
    return FreeResponse(sensitivities, sum(sensitivities) / len(RATES))


def _judged(findings: Sequence[Finding], truth: Floats, within: float) -> list[tuple[float, bool]]:
    """Score of each finding of one scan that counts, and whether it is a hit."""
    judged: list[tuple[float, bool]] = []
    hit: set[int] = set()
    for finding in sorted(findings, key=lambda finding: -finding.score):
        away = np.linalg.norm(truth - np.array(finding.place), axis=1) if len(truth) else np.full(1, np.inf)
        nearest = int(away.argmin())
        if away[nearest] > within:
            judged.append((finding.score, False))
        elif nearest not in hit:
            hit.add(nearest)
            judged.append((finding.score, True))
    return judged
