"""Draws of one event for the mechanism audit: patients with worst-case gradients, in or out of attempts by the real path."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.client.trainer import Patients
from medfed.privacy.plan import Plan
from medfed.simulations.audits.real_path import Opened, RealPath, Shape

PATIENTS = 100
"""Of an attempt, in and out together: as many draws from one attempt."""
DIRECTION = np.array([2.0, -1.0, 3.0, -2.0])
"""Of a patient's gradient, over the words that are its alone."""
WORDS = len(DIRECTION)
NEAR = 2.0**-8
"""How close noise words and pads are to each other, in units of their spread, to be called a coincidence."""

_SIZE = 1e4  # of the features: gradients far beyond the clipping norm, and a bias that hardly counts


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What was seen of one case, in units of the grid.

    ``without``, ``present``: a patient's words in attempts without and with it, float64[draws, 4]; the first are noise alone.
    ``repeated``: of ``compared`` pairs of noise words how many nearly agree. ``bare``: of ``sent`` words of uploads how many
    nearly are the word they hide, or use the pad of the attempt before.
    """

    without: NDArray[np.float64]
    present: NDArray[np.float64]
    repeated: int
    compared: int
    bare: int
    sent: int
    sums_are_exact: bool


def observe(path: RealPath, shape: Shape, draws: int, tell: Callable[[float], None]) -> Sample:
    """Attempts until each side has ``draws`` draws: half of the patients are in, in turns of two attempts."""
    halves = [_half(path, odd) for odd in (0, 1)]
    seen: list[list[NDArray[np.int64]]] = [[], []]
    counts = np.zeros(4, np.int64)
    before: Opened | None = None
    exact = True
    attempts = math.ceil(draws / (PATIENTS // 2))
    for attempt in range(attempts):
        half = attempt // 2 % 2
        opened = path.attempt(path.first, halves[half])
        exact &= bool((opened.total == opened.vectors[list(opened.survivors)].sum(0)).all())
        blocks = _blocks(_view(opened, shape))
        seen[0].append(blocks[1 - half :: 2])
        seen[1].append(blocks[half::2])
        counts += _coincidences(opened, before if attempt % 2 else None, half, path.plan)
        before = opened
        tell((attempt + 1) / attempts)
    without, present = (np.concatenate(side)[:draws].astype(np.float64) for side in seen)
    repeated, compared, bare, sent = counts.tolist()
    return Sample(without, present, repeated, compared, bare, sent, exact)


def _half(path: RealPath, odd: int) -> Patients:
    """Every second patient, of two records each of different size: their mean is clipped, once."""
    inputs = np.zeros((PATIENTS, PATIENTS * WORDS), np.float32)
    names = []
    for row, block in enumerate(range(odd, PATIENTS, 2)):
        place = slice(block * WORDS, (block + 1) * WORDS)
        inputs[2 * row, place], inputs[2 * row + 1, place] = _SIZE * DIRECTION, 3 * _SIZE * DIRECTION
        names += [f"p{block}", f"p{block}"]
    # at weights of zero the residual is 0.5 - label: the gradient of label 0 points along the features
    return path.patients(inputs, [0] * PATIENTS, names)


def _blocks(words: NDArray[np.int64]) -> NDArray[np.int64]:
    """Words without the bias, patient by patient: int64[PATIENTS, 4]."""
    return words[: PATIENTS * WORDS].reshape(PATIENTS, WORDS)


def _view(opened: Opened, shape: Shape) -> NDArray[np.int64]:
    """What the strongest attacker is left with: the opened sum less the vectors of all who may conspire."""
    first = shape.hospitals - shape.colluders if shape.mode == "distributed" else 1
    known = [survivor for survivor in opened.survivors if survivor >= first]
    left: NDArray[np.int64] = opened.total - opened.vectors[known].sum(0)
    return left


def _coincidences(opened: Opened, before: Opened | None, half: int, plan: Plan) -> NDArray[np.int64]:
    """Counts of nearly equal noise words and of how many were compared; the same of pads with zero and with themselves."""
    near_noise, near_pad = plan.noise_sd * NEAR, 2.0**plan.ring_bits * NEAR / 2
    own, others = _blocks(opened.vectors[0])[1 - half :: 2], opened.vectors[1:]
    pairs = [own[:, 1:] - own[:, :-1], own - _blocks(others[0])[1 - half :: 2], others[1:] - others[:-1]]
    pads = _pads(opened, plan)
    bare = [pads]
    if before is not None:
        pairs += [own - _blocks(before.vectors[0])[1 - half :: 2], others - before.vectors[1:]]
        bare.append(_wrapped(pads - _pads(before, plan), plan))
    return np.array(
        [
            sum(int((np.abs(pair) <= near_noise).sum()) for pair in pairs),
            sum(pair.size for pair in pairs),
            sum(int((np.abs(each) <= near_pad).sum()) for each in bare),
            sum(each.size for each in bare),
        ]
    )


def _pads(opened: Opened, plan: Plan) -> NDArray[np.int64]:
    """What was added to each hospital's vector: uniform in the ring, if the masks are any good."""
    return _wrapped(opened.uploads - opened.vectors, plan)


def _wrapped(words: NDArray[np.int64], plan: Plan) -> NDArray[np.int64]:
    half = 1 << (plan.ring_bits - 1)
    return (words + half) % (2 * half) - half
