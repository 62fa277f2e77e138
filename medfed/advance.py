"""The server step: released sum -> next model, computed alike by every hospital and the coordinator.

Nobody takes a model from anybody: each side computes the next state from the state it holds and the released integer sum
(secagg.md, rule 6). So that all agree bit for bit on any processor, the arithmetic is numpy float64 on the CPU with
``+ - * /``, ``sqrt`` and comparisons on whole arrays only: each is correctly rounded by IEEE 754, none is a reduction, none
is fused. What is kept is float32, rounded once a step; blocks of ``BLOCK`` parameters bound the scratch memory, and change
no bit, as no parameter looks at another. Arrays that a study has no use for are empty. Schedules are tables of the study.
Golden hashes in the tests hold every step to this.

*Source*: heavy-ball momentum (Polyak 1964); Adam (Kingma and Ba 2015, algorithm 1); DP-AdamBC (Tang, Panchal, Lecuyer 2024,
arXiv:2312.14334, algorithm 1); FedAdagrad, FedYogi, FedAdam (Reddi et al. 2021, arXiv:2003.00295, algorithm 2); averaging of
the last iterates (Polyak and Juditsky 1992), or of all with exponential weights (De et al. 2022, arXiv:2204.13650).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medfed import metrics, standardization
from medfed.errors import LocalProtocolError, RemoteProtocolError
from medfed.study import Adam, DpAdamBC, FedAdagrad, FedYogi, Momentum, ServerStep, Study, Training
from medfed.wire import enc

BLOCK = 1 << 16  # parameters worked on at once: half a megabyte an array of float64

Floats = NDArray[np.float64]
Kept = NDArray[np.float32]
Integers = NDArray[np.int64] | NDArray[np.int32] | NDArray[np.int16]

_HEADER_BYTES = 13
_NOTHING: Kept = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """The state after ``completed_rounds`` rounds. Arrays are float32[d], read-only; float32[0] where a study needs none.

    ``first`` and ``second`` are the server step's moments; ``tail`` is the running sum of the weights after each of the
    last ``average_last_rounds`` rounds, kept where those are more than one; or with ``ema_decay`` the moving average, begun at
    0 and not corrected for it. ``statistics``: float32[2f], shift and stretch of
    the standardised inputs, where the study asks for them; the round that finds them is the first and changes nothing else.
    ``metrics``: float32[m], the noised cells of held-out patients, where the study asks for them; likewise of the last round.
    """

    completed_rounds: int
    weights: Kept
    first: Kept
    second: Kept
    tail: Kept
    statistics: Kept = field(default_factory=lambda: _NOTHING)
    metrics: Kept = field(default_factory=lambda: _NOTHING)
    # hashes of this state by study: a state does not change, and hashing tens of megabytes takes a while
    _hashes: dict[bytes, bytes] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("weights", "first", "second", "tail", "statistics", "metrics"):
            fixed = getattr(self, name).view()
            fixed.flags.writeable = False
            object.__setattr__(self, name, fixed)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which arrays a study's states have beside the weights; of ``statistics`` and ``metrics`` how many numbers."""

    first: bool
    second: bool
    tail: bool
    statistics: int
    metrics: int

    @property
    def arrays(self) -> int:
        """How many are as long as the weights."""
        return 1 + self.first + self.second + self.tail

    @property
    def code(self) -> int:
        """One byte of a state's header."""
        whole = self.first + 2 * self.second + 4 * self.tail
        return whole + 8 * (self.statistics > 0) + 16 * (self.metrics > 0)


def _layout(study: Study) -> _Layout:
    rule = study.training.server_step
    tail = study.training.average_last_rounds > 1 or study.training.ema_decay is not None
    few = (2 * standardization.count(study), metrics.words(study))
    if isinstance(rule, Momentum):
        return _Layout(rule.momentum > 0.0, False, tail, *few)
    return _Layout(True, True, tail, *few)


def first_state(weights: NDArray[np.float32], study: Study) -> ModelState:
    """The state before round 1, from the first model's weights float32[d], which are copied."""
    layout, rule, size = _layout(study), study.training.server_step, weights.size
    start = 0.0 if isinstance(rule, Momentum | Adam | DpAdamBC) else rule.tau * rule.tau
    return ModelState(
        completed_rounds=0,
        weights=weights.astype(np.float32),
        first=np.zeros(size, np.float32) if layout.first else _NOTHING,
        second=np.full(size, start, np.float32) if layout.second else _NOTHING,
        tail=np.zeros(size, np.float32) if layout.tail else _NOTHING,
        statistics=standardization.neutral(study) if layout.statistics else _NOTHING,
        metrics=np.zeros(layout.metrics, np.float32),
    )


def divisor(study: Study, nominal_patients: int, roster_patients: int) -> float:
    """What makes a mean of the released sum. Public, so never exact.

    Of gradients: the expected patients in a round, sampling rate x the declared patients of the hospitals in the sum. Of
    updates: their part of the patients declared when the study began, as each hospital weighted its own by its share of those.
    """
    if study.training.aggregate == "update":
        return nominal_patients / roster_patients
    return study.privacy.sampling_rate * float(nominal_patients)


def advance(
    state: ModelState,
    total: Integers,
    study: Study,
    *,
    grid_exponent: int,
    nominal_patients: int,
    roster_patients: int | None = None,
    noise_variance: float | None = None,
) -> ModelState:
    """One server step. ``total``: signed integers [d or more], the exact sum of the surviving hospitals' vectors in units of
    2^-grid_exponent; what is longer than the model is not read. ``nominal_patients``: declared by the survivors;
    ``roster_patients``: by all in the roster that the study began with (None: all survived). ``noise_variance``: of the noise in
    each coordinate of ``total``, in squared units of its grid, which all sides know (``Plan.noise_variance``); only DP-AdamBC
    asks for it. Raises MF-900 where it asks in vain.

    Every rule descends: it takes the mean gradient, or minus the mean update, which is Reddi's pseudo-gradient. So plain
    averaging of updates (FedAvg) is momentum 0 with rate 1. Values beyond float32 become infinite: the run then fails.
    """
    if is_before_statistics(study, state):
        sums = total[: standardization.words(study)].astype(np.float64) * 2.0**-grid_exponent
        found = standardization.from_sum(study, sums)
        return ModelState(state.completed_rounds + 1, *_arrays(state), found, state.metrics)
    if is_before_metrics(study, state):
        cells = total[: metrics.words(study)].astype(np.float64) * 2.0**-grid_exponent
        return ModelState(state.completed_rounds + 1, *_arrays(state), state.statistics, cells.astype(np.float32))
    number = state.completed_rounds + 1 - (study.statistics is not None)
    rule = study.training.server_step
    rate = study.training.learning_rate(number)
    scale = divisor(study, nominal_patients, roster_patients or nominal_patients)
    variance = 0.0
    if isinstance(rule, DpAdamBC):
        if noise_variance is None:
            raise LocalProtocolError(900, "a server step without the variance of its noise", "please report this")
        variance = noise_variance * 2.0 ** (-2 * grid_exponent) / scale / scale
    sign = -1.0 if study.training.aggregate == "update" else 1.0
    weights, first, second, tail = (np.empty_like(each) for each in _arrays(state))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for start in range(0, weights.size, BLOCK):
            part = slice(start, min(start + BLOCK, weights.size))
            gradient = sign * (total[part].astype(np.float64) * 2.0**-grid_exponent / scale)
            moments = (state.first[part].astype(np.float64), state.second[part].astype(np.float64))
            one, two, step = _moved(rule, gradient, *moments, number, variance)
            if first.size:
                first[part] = one
            if second.size:
                second[part] = two
            weights[part] = state.weights[part].astype(np.float64) - rate * step
            if tail.size:
                before, now = state.tail[part].astype(np.float64), weights[part].astype(np.float64)
                tail[part] = _averaged(study.training, before, now, number)
    return ModelState(state.completed_rounds + 1, weights, first, second, tail, state.statistics, state.metrics)


def is_before_statistics(study: Study, state: ModelState) -> bool:
    """Whether the next sum is that of the statistics."""
    return study.statistics is not None and state.completed_rounds == 0


def is_before_metrics(study: Study, state: ModelState) -> bool:
    """Whether the next sum is that of the metrics: the weights are final."""
    return study.metrics is not None and state.completed_rounds == study.sums_to_train


def _moved(
    rule: ServerStep, gradient: Floats, first: Floats, second: Floats, number: int, noise_variance: float
) -> tuple[Floats, Floats, Floats]:
    """One rule on one block, all float64: (first, second, step). A moment that the rule does not keep is empty.
    ``noise_variance``: of ``gradient``."""
    if isinstance(rule, Momentum):
        velocity = rule.momentum * first + gradient if first.size else gradient
        return velocity, second, velocity
    first = rule.beta1 * first + (1.0 - rule.beta1) * gradient
    square = gradient * gradient
    if isinstance(rule, Adam | DpAdamBC):
        second = rule.beta2 * second + (1.0 - rule.beta2) * square
        unbiased_first = first / (1.0 - _power(rule.beta1, number))
        unbiased_second = second / (1.0 - _power(rule.beta2, number))
        if isinstance(rule, DpAdamBC):
            return first, second, unbiased_first / np.sqrt(np.maximum(unbiased_second - noise_variance, rule.floor))
        return first, second, unbiased_first / (np.sqrt(unbiased_second) + rule.stabilizer)
    # algorithm 2 of Reddi et al.: the second moment began at tau^2, and neither is corrected for its start
    if isinstance(rule, FedAdagrad):
        second = second + square
    elif isinstance(rule, FedYogi):
        second = second - (1.0 - rule.beta2) * (square * np.sign(second - square))
    else:
        second = rule.beta2 * second + (1.0 - rule.beta2) * square
    return first, second, first / (np.sqrt(second) + rule.tau)


def _averaged(training: Training, before: Floats, weights: Floats, number: int) -> Floats:
    """What ``tail`` becomes in the training's round ``number``, float64."""
    if training.ema_decay is not None:
        return training.ema_decay * before + (1.0 - training.ema_decay) * weights
    return before + weights if number > training.rounds - training.average_last_rounds else before


@functools.lru_cache(maxsize=16)
def _power(base: float, exponent: int) -> float:
    """``base ** exponent`` by multiplication in order: the C library's pow is not the same everywhere."""
    result = 1.0
    for _ in range(exponent):
        result *= base
    return result


def released_weights(state: ModelState, study: Study) -> NDArray[np.float32]:
    """The model that is released, float32[d]: the mean over the last rounds, or the moving average, once all are done; else the
    weights.

    It takes plain encoded inputs, whatever statistics it was trained with.
    """
    weights = _trained_weights(state, study)
    return standardization.on_plain_inputs(study, state.statistics, weights) if state.statistics.size else weights


def _trained_weights(state: ModelState, study: Study) -> NDArray[np.float32]:
    if state.completed_rounds < study.sums_to_train or not state.tail.size:
        return state.weights
    training, released = study.training, np.empty_like(state.weights)
    decay, share = training.ema_decay, float(training.average_last_rounds)
    if decay is not None:
        share = 1.0 - _power(decay, training.rounds)  # the average began at 0
    for start in range(0, released.size, BLOCK):
        part = slice(start, start + BLOCK)
        released[part] = state.tail[part].astype(np.float64) / share
    return released


# ------------------------------------------------------------------------------------------------------------- as bytes


def _arrays(state: ModelState) -> tuple[Kept, Kept, Kept, Kept]:
    return state.weights, state.first, state.second, state.tail


def state_pieces(state: ModelState) -> Iterator[bytes | memoryview]:
    """``state_bytes`` in pieces, without a copy where the machine is little-endian."""
    layout = _Layout(
        first=state.first.size > 0,
        second=state.second.size > 0,
        tail=state.tail.size > 0,
        statistics=state.statistics.size,
        metrics=state.metrics.size,
    )
    sizes = state.completed_rounds.to_bytes(4, "big") + state.weights.size.to_bytes(8, "big")
    yield sizes + layout.code.to_bytes(1, "big")
    for array in (*_arrays(state), state.statistics, state.metrics):
        if array.size:
            yield np.ascontiguousarray(array, "<f4").data.cast("B")


def state_bytes(state: ModelState) -> bytes:
    """Canonical bytes: BE32 round, BE64 d, one byte that says which arrays follow (1 first, 2 second, 4 tail, 8
    statistics, 16 metrics), then the weights and those arrays as little-endian float32."""
    return b"".join(state_pieces(state))


def state_size_bytes(study: Study, words: int) -> int:
    """Length of ``state_bytes`` for a study whose model has d = ``words`` parameters."""
    layout = _layout(study)
    return _HEADER_BYTES + 4 * (layout.arrays * words + layout.statistics + layout.metrics)


def parse_state(data: bytes | memoryview, study: Study, words: int) -> ModelState:
    """The state of canonical bytes, as a view of them; MF-150 unless it has the study's arrays of ``words`` parameters,
    MF-153 unless all numbers are finite."""
    layout = _layout(study)
    header = bytes(data[:_HEADER_BYTES])
    expected = words.to_bytes(8, "big") + layout.code.to_bytes(1, "big")
    if len(data) != state_size_bytes(study, words) or header[4:] != expected:
        raise RemoteProtocolError(150, "model state of the wrong length", "both sides need the same study")
    values = np.frombuffer(data, "<f4", offset=_HEADER_BYTES).astype(np.float32, copy=False)
    if not _all_finite(values):
        raise RemoteProtocolError(153, "model state holds numbers that are not finite", "refused")
    rows = iter(values[: layout.arrays * words].reshape(layout.arrays, words))
    rest = values[layout.arrays * words :]
    return ModelState(
        completed_rounds=int.from_bytes(header[:4], "big"),
        weights=next(rows),
        first=next(rows) if layout.first else _NOTHING,
        second=next(rows) if layout.second else _NOTHING,
        tail=next(rows) if layout.tail else _NOTHING,
        statistics=rest[: layout.statistics],
        metrics=rest[layout.statistics :],
    )


def _all_finite(values: Kept) -> bool:
    """Block by block: numpy would make a byte for every number."""
    return all(bool(np.isfinite(values[start : start + BLOCK]).all()) for start in range(0, values.size, BLOCK))


def state_hash(study_hash: bytes, state: ModelState) -> bytes:
    """SHA-256 that names a state within a study, 32 bytes: worked out once a state."""
    known = state._hashes.get(study_hash)
    if known is None:
        digest = hashlib.sha256(enc(b"medfed/model-state/v2", study_hash))
        for piece in state_pieces(state):
            digest.update(piece)
        known = state._hashes[study_hash] = digest.digest()
    return known


def task_hash(study_hash: bytes, state: ModelState) -> bytes:
    """What a masked vector is bound to (secagg.md, section 4): the plan and the state it was trained at."""
    settings = study_hash + state.completed_rounds.to_bytes(4, "big")
    return hashlib.sha256(enc(b"medfed/secagg/v1/task", state_hash(study_hash, state), settings)).digest()
