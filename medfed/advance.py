"""The server step: released sum -> next model, computed alike by every hospital and the coordinator.

Nobody takes a model from anybody: each side computes the next state from the state it holds and the released integer sum
(secagg.md, rule 6). So that all agree bit for bit on any processor, the arithmetic is numpy float64 on the CPU with
``+ - * /`` and ``sqrt`` on whole arrays only: each is correctly rounded by IEEE 754, none is a reduction, none is fused.
Schedules are tables of the study. Golden hashes in the tests hold every step to this.

*Source*: heavy-ball momentum (Polyak 1964); Adam (Kingma and Ba 2015, algorithm 1); averaging of the last iterates
(Polyak and Juditsky 1992).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import RemoteProtocolError
from medfed.study import Adam, Momentum, Study
from medfed.wire import enc

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """The state after ``completed_rounds`` rounds. All arrays float64[d].

    ``first`` and ``second`` are the server step's moments; ``tail`` is the running sum of the weights after each of the
    last ``average_last_rounds`` rounds.
    """

    completed_rounds: int
    weights: Floats
    first: Floats
    second: Floats
    tail: Floats


def first_state(weights: NDArray[np.float32]) -> ModelState:
    """The state before round 1, from the first model's weights float32[d]."""
    zeros = np.zeros(weights.size, np.float64)
    return ModelState(0, weights.astype(np.float64), zeros, zeros, zeros)


def divisor(study: Study, nominal_patients: int) -> float:
    """Expected patients in a round: sampling rate x the declared patients of all hospitals. Public, so never exact."""
    return study.privacy.sampling_rate * float(nominal_patients)


def advance(
    state: ModelState, total: NDArray[np.int64], study: Study, *, grid_exponent: int, nominal_patients: int
) -> ModelState:
    """One server step. ``total``: int64[d], the exact sum of all hospitals' vectors in units of 2^-grid_exponent."""
    gradient = total.astype(np.float64) * 2.0**-grid_exponent / divisor(study, nominal_patients)
    number = state.completed_rounds + 1
    rate = study.training.learning_rate(number)
    rule = study.training.server_step
    if isinstance(rule, Momentum):
        first, second, step = _momentum(state, gradient, rule)
    else:
        first, second, step = _adam(state, gradient, rule, number)
    weights = state.weights - rate * step
    averaged = number > study.training.rounds - study.training.average_last_rounds
    tail = state.tail + weights if averaged else state.tail
    return ModelState(number, weights, first, second, tail)


def _momentum(state: ModelState, gradient: Floats, rule: Momentum) -> tuple[Floats, Floats, Floats]:
    velocity = rule.momentum * state.first + gradient
    return velocity, state.second, velocity


def _adam(state: ModelState, gradient: Floats, rule: Adam, number: int) -> tuple[Floats, Floats, Floats]:
    first = rule.beta1 * state.first + (1.0 - rule.beta1) * gradient
    second = rule.beta2 * state.second + (1.0 - rule.beta2) * (gradient * gradient)
    unbiased_first = first / (1.0 - _power(rule.beta1, number))
    unbiased_second = second / (1.0 - _power(rule.beta2, number))
    return first, second, unbiased_first / (np.sqrt(unbiased_second) + rule.stabilizer)


def _power(base: float, exponent: int) -> float:
    """``base ** exponent`` by multiplication in order: the C library's pow is not the same everywhere."""
    result = 1.0
    for _ in range(exponent):
        result *= base
    return result


def released_weights(state: ModelState, study: Study) -> NDArray[np.float32]:
    """The model that is released, float32[d]: the mean over the last rounds once all are done, else the weights."""
    if state.completed_rounds < study.training.rounds:
        return state.weights.astype(np.float32)
    return (state.tail / float(study.training.average_last_rounds)).astype(np.float32)


def state_bytes(state: ModelState) -> bytes:
    """Canonical bytes: BE32 round, BE64 d, then weights, first, second, tail as little-endian float64."""
    arrays = (state.weights, state.first, state.second, state.tail)
    header = state.completed_rounds.to_bytes(4, "big") + state.weights.size.to_bytes(8, "big")
    return header + b"".join(array.astype("<f8").tobytes() for array in arrays)


def state_size_bytes(words: int) -> int:
    """Length of ``state_bytes`` for d = ``words``."""
    return 12 + 4 * 8 * words


def parse_state(data: bytes, words: int) -> ModelState:
    """The state of canonical bytes; MF-150 unless it has ``words`` parameters and only finite numbers."""
    if len(data) != state_size_bytes(words) or int.from_bytes(data[4:12], "big") != words:
        raise RemoteProtocolError(150, "model state of the wrong length", "both sides need the same study")
    values = np.frombuffer(data, "<f8", offset=12).astype(np.float64).reshape(4, words)
    if not np.isfinite(values).all():
        raise RemoteProtocolError(153, "model state holds numbers that are not finite", "refused")
    return ModelState(int.from_bytes(data[:4], "big"), values[0], values[1], values[2], values[3])


def state_hash(study_hash: bytes, state: ModelState) -> bytes:
    """SHA-256 that names a state within a study, 32 bytes."""
    return hashlib.sha256(enc(b"medfed/model-state/v1", study_hash, state_bytes(state))).digest()


def task_hash(study_hash: bytes, state: ModelState) -> bytes:
    """What a masked vector is bound to (secagg.md, section 4): the plan and the state it was trained at."""
    settings = study_hash + state.completed_rounds.to_bytes(4, "big")
    return hashlib.sha256(enc(b"medfed/secagg/v1/task", state_hash(study_hash, state), settings)).digest()
