"""The server step: every hospital and the coordinator must get the same bits, today and on any processor.

The golden hashes in ``tests/vectors/advance.json`` come from the plain-Python implementation below, which shares no code
with ``medfed/advance.py``. Python's float is IEEE 754 binary64 and its ``+ - * /`` and ``math.sqrt`` round correctly.
``python tests/hall/test_advance.py`` prints the file anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.advance import (
    ModelState,
    advance,
    divisor,
    first_state,
    parse_state,
    released_weights,
    state_bytes,
    state_hash,
    state_size_bytes,
    task_hash,
)
from medfed.errors import LocalProtocolError, RemoteProtocolError
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import make_plan
from medfed.study import Study

VECTORS = Path(__file__).parent.parent / "vectors" / "advance.json"
STUDY_HASH = hashlib.sha256(b"study").digest()
MakeStudy = Callable[..., Study]


# ---------------------------------------------------------------------------------- the same, in plain Python floats


def single(value: float) -> float:
    """The nearest float32, ties to even."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


@dataclass
class Plain:
    """A state as lists of Python floats, each a float32; an array that the rule has no use for is empty."""

    completed: int
    weights: list[float]
    first: list[float]
    second: list[float]
    tail: list[float]

    def to_bytes(self) -> bytes:
        lists = (self.weights, self.first, self.second, self.tail)
        flags = sum(bit for bit, values in zip((1, 2, 4), lists[1:], strict=True) if values)
        head = struct.pack(">IQB", self.completed, len(self.weights), flags)
        return head + b"".join(struct.pack("<f", value) for values in lists for value in values)


def product(base: float, times: int) -> float:
    result = 1.0
    for _ in range(times):
        result = result * base
    return result


def sign(value: float) -> float:
    return 1.0 if value > 0 else -1.0 if value < 0 else 0.0


def plain_move(
    rule: dict[str, object], gradient: float, first: float, second: float, number: int, noise: float
) -> tuple[float, float, float]:
    """(first, second, step) of one parameter, as the papers write it."""
    if rule["kind"] == "momentum":
        velocity = rule["momentum"] * first + gradient
        return velocity, 0.0, velocity
    first = rule["beta1"] * first + (1.0 - rule["beta1"]) * gradient
    if rule["kind"] in ("adam", "dp-adambc"):
        second = rule["beta2"] * second + (1.0 - rule["beta2"]) * (gradient * gradient)
        mean = first / (1.0 - product(rule["beta1"], number))
        spread = second / (1.0 - product(rule["beta2"], number))
        if rule["kind"] == "dp-adambc":
            left = spread - noise
            return first, second, mean / math.sqrt(left if left > rule["floor"] else rule["floor"])
        return first, second, mean / (math.sqrt(spread) + rule["stabilizer"])
    square = gradient * gradient
    if rule["kind"] == "fedadagrad":
        second = second + square
    elif rule["kind"] == "fedyogi":
        second = second - (1.0 - rule["beta2"]) * (square * sign(second - square))
    else:
        second = rule["beta2"] * second + (1.0 - rule["beta2"]) * square
    return first, second, first / (math.sqrt(second) + rule["tau"])


def plain_step(state: Plain, total: list[int], case: dict[str, object]) -> Plain:
    """One step, one parameter at a time; all in float64, what is kept rounded to float32 once."""
    rule, number = case["server_step"], state.completed + 1
    is_update = case["aggregate"] == "update"
    expected = 1.0 if is_update else case["sampling_rate"] * float(case["nominal_patients"])
    rate = [value for start, value in case["learning_rates"] if start <= number][-1]
    noise = case.get("noise_variance", 0.0) * 2.0 ** (-2 * case["grid_exponent"]) / expected / expected
    decay = case.get("ema_decay")
    following = Plain(number, [], [], [], [])
    for index, integer in enumerate(total):
        mean = float(integer) * 2.0 ** -case["grid_exponent"] / expected
        gradient = -mean if is_update else mean
        before = state.first[index] if state.first else 0.0
        square = state.second[index] if state.second else 0.0
        first, second, move = plain_move(rule, gradient, before, square, number, noise)
        weight = single(state.weights[index] - rate * move)
        following.weights.append(weight)
        if state.first:
            following.first.append(single(first))
        if state.second:
            following.second.append(single(second))
        if decay is not None:
            following.tail.append(single(decay * state.tail[index] + (1.0 - decay) * weight))
        elif state.tail:
            averaged = number > case["rounds"] - case["average_last_rounds"]
            following.tail.append(single(state.tail[index] + weight) if averaged else state.tail[index])
    return following


def plain_run(case: dict[str, object]) -> list[Plain]:
    """The states before round 1 and after every round."""
    weights = [float(value) for value in case["first_weights"]]
    zeros, rule = [0.0] * len(weights), case["server_step"]
    first = zeros if rule.get("momentum") != 0.0 else []
    start = single(rule["tau"] * rule["tau"]) if "tau" in rule else 0.0
    second = [] if rule["kind"] == "momentum" else [start] * len(weights)
    tail = zeros if case["average_last_rounds"] > 1 or "ema_decay" in case else []
    states = [Plain(0, weights, first, second, tail)]
    for total in case["totals"]:
        states.append(plain_step(states[-1], total, case))
    return states


def plain_released(states: list[Plain], case: dict[str, object]) -> bytes:
    last, share = states[-1], float(case["average_last_rounds"])
    if "ema_decay" in case:
        share = 1.0 - product(case["ema_decay"], case["rounds"])
    values = [value / share for value in last.tail]
    if last.completed < case["rounds"] or not values:
        values = last.weights
    return b"".join(struct.pack("<f", value) for value in values)


LOCAL = {"steps": 4, "learning_rate": 0.1, "proximal": 0.0, "sum_range": 64.0}


def study_of(case: dict[str, object], make_study: MakeStudy) -> Study:
    local = {"training.local": LOCAL} if case["aggregate"] == "update" else {}
    decay = {"training.ema_decay": case["ema_decay"]} if "ema_decay" in case else {}
    return make_study(
        {
            **decay,
            "training.aggregate": case["aggregate"],
            **local,
            "training.rounds": case["rounds"],
            "training.average_last_rounds": case["average_last_rounds"],
            "training.learning_rates": case["learning_rates"],
            "training.server_step": case["server_step"],
            "privacy.sampling_rate": case["sampling_rate"],
        }
    )


def run(case: dict[str, object], study: Study) -> list[ModelState]:
    states = [first_state(np.array(case["first_weights"], np.float32), study)]
    for total in case["totals"]:
        states.append(
            advance(
                states[-1],
                np.array(total, np.int64),
                study,
                grid_exponent=case["grid_exponent"],
                nominal_patients=case["nominal_patients"],
                noise_variance=case.get("noise_variance"),
            )
        )
    return states


# ------------------------------------------------------------------------------------------------------ golden hashes


def _cases() -> list[dict[str, object]]:
    return json.loads(VECTORS.read_text())["cases"]


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case["name"])
def test_states_are_the_golden_ones(case: dict[str, object], make_study: MakeStudy) -> None:
    states = run(case, study_of(case, make_study))
    assert [hashlib.sha256(state_bytes(state)).hexdigest() for state in states] == case["state_sha256"]
    released = released_weights(states[-1], study_of(case, make_study))
    assert hashlib.sha256(released.astype("<f4").tobytes()).hexdigest() == case["released_sha256"]


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case["name"])
def test_golden_hashes_are_those_of_the_plain_implementation(case: dict[str, object]) -> None:
    states = plain_run(case)
    assert [hashlib.sha256(state.to_bytes()).hexdigest() for state in states] == case["state_sha256"]
    assert hashlib.sha256(plain_released(states, case)).hexdigest() == case["released_sha256"]


def test_golden_cases_cover_all_rules_and_vector_tails() -> None:
    """Sizes that leave a rest in every SIMD width: there a fused or reordered operation would show."""
    kinds = {case["server_step"]["kind"] for case in _cases()}
    sizes = {len(case["first_weights"]) for case in _cases()}
    assert kinds == {"momentum", "adam", "dp-adambc", "fedadagrad", "fedyogi", "fedadam"}
    assert sum("ema_decay" in case for case in _cases()) == 2
    assert {case["aggregate"] for case in _cases()} == {"gradient", "update"}
    assert any(size % 8 not in (0, 4) for size in sizes)


# --------------------------------------------------------------------------------------------- equality bit for bit

rules = st.one_of(
    st.builds(lambda momentum: {"kind": "momentum", "momentum": momentum}, st.floats(0, 0.999)),
    st.builds(
        lambda beta1, beta2, stabilizer: {"kind": "adam", "beta1": beta1, "beta2": beta2, "stabilizer": stabilizer},
        st.floats(0, 0.999),
        st.floats(0, 0.9999),
        st.floats(1e-10, 1.0),
    ),
    st.builds(
        lambda beta1, beta2, floor: {"kind": "dp-adambc", "beta1": beta1, "beta2": beta2, "floor": floor},
        st.floats(0, 0.999),
        st.floats(0, 0.9999),
        st.floats(1e-18, 1.0),
    ),
    st.builds(
        lambda beta1, tau: {"kind": "fedadagrad", "beta1": beta1, "tau": tau}, st.floats(0, 0.999), st.floats(1e-9, 1.0)
    ),
    st.builds(
        lambda kind, beta1, beta2, tau: {"kind": kind, "beta1": beta1, "beta2": beta2, "tau": tau},
        st.sampled_from(["fedyogi", "fedadam"]),
        st.floats(0, 0.999),
        st.floats(0, 0.9999),
        st.floats(1e-9, 1.0),
    ),
)
first_weights = st.floats(-10, 10, width=32)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    size, rounds = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    totals = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=size, max_size=size)
    rule, decay = draw(rules), draw(st.none() | st.floats(1e-6, 0.9999))
    of_gradients = rule["kind"] == "dp-adambc"
    return {
        "aggregate": "gradient" if of_gradients else draw(st.sampled_from(["gradient", "update"])),
        "rounds": rounds,
        "average_last_rounds": draw(st.integers(1, rounds if decay is None else 1)),
        **({} if decay is None else {"ema_decay": decay}),
        "noise_variance": draw(st.sampled_from([0.0, 1.0, 1e30]) | st.floats(0, 2e19)),
        "learning_rates": [[1, draw(st.floats(1e-3, 10))], [3, draw(st.floats(1e-3, 10))]],
        "server_step": rule,
        "sampling_rate": draw(st.floats(0.01, 1)),
        "nominal_patients": draw(st.integers(1, 10**6)),
        "grid_exponent": draw(st.integers(0, 30)),
        "first_weights": draw(st.lists(first_weights, min_size=size, max_size=size)),
        "totals": draw(st.lists(totals, min_size=rounds, max_size=rounds)),
    }


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_step_equals_plain_floats_bit_for_bit(case: dict[str, object], make_study: MakeStudy) -> None:
    study = study_of(case, make_study)
    states, plain = run(case, study), plain_run(case)
    for state, other in zip(states, plain, strict=True):
        assert state_bytes(state) == other.to_bytes()
    assert released_weights(states[-1], study).astype("<f4").tobytes() == plain_released(plain, case)


def test_step_of_a_large_vector_equals_plain_floats(make_study: MakeStudy) -> None:
    """Long enough for every vectorised path of numpy, misaligned tail included."""
    rng = random.Random(4)
    size = 4099
    case = {
        "aggregate": "gradient",
        "rounds": 2,
        "average_last_rounds": 2,
        "learning_rates": [[1, 0.3]],
        "server_step": {"kind": "adam", "beta1": 0.9, "beta2": 0.999, "stabilizer": 1e-8},
        "sampling_rate": 0.7,
        "nominal_patients": 739,
        "grid_exponent": 19,
        "first_weights": [struct.unpack("<f", struct.pack("<f", rng.gauss(0, 1)))[0] for _ in range(size)],
        "totals": [[rng.randrange(-(2**31), 2**31) for _ in range(size)] for _ in range(2)],
    }
    states, plain = run(case, study_of(case, make_study)), plain_run(case)
    assert state_bytes(states[-1]) == plain[-1].to_bytes()


@pytest.mark.parametrize("block", [1, 3, 13, 64])
def test_size_of_the_blocks_changes_no_bit(block: int, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medfed.advance.BLOCK", block)
    for case in _cases():
        states = run(case, study_of(case, make_study))
        assert [hashlib.sha256(state_bytes(state)).hexdigest() for state in states] == case["state_sha256"]
        assert state_bytes(parse_state(state_bytes(states[-1]), study_of(case, make_study), states[-1].weights.size))


def test_plain_averaging_is_the_mean_of_the_updates(make_study: MakeStudy) -> None:
    """FedAvg: the released sum of weighted updates is added, and nothing but the weights is kept."""
    study = make_study(
        {
            "training.aggregate": "update",
            "training.local": LOCAL,
            "training.server_step": {"kind": "momentum", "momentum": 0.0},
            "training.learning_rates": [[1, 1.0]],
            "training.average_last_rounds": 1,
        }
    )
    before = first_state(np.array([1.0, 2.0, -4.0], np.float32), study)
    after = advance(before, np.array([3, -8, 0], np.int32), study, grid_exponent=2, nominal_patients=99)
    assert after.weights.tolist() == [1.75, 0.0, -4.0]
    assert (after.first.size, after.second.size, after.tail.size) == (0, 0, 0)
    assert len(state_bytes(after)) == state_size_bytes(study, 3) == 13 + 4 * 3


@pytest.mark.parametrize(
    ("rule", "second"),
    [
        ({"kind": "fedadagrad", "beta1": 0.5, "tau": 0.1}, 0.01 + 0.0625),
        ({"kind": "fedyogi", "beta1": 0.5, "beta2": 0.75, "tau": 0.1}, 0.01 + 0.25 * 0.0625),
        ({"kind": "fedadam", "beta1": 0.5, "beta2": 0.75, "tau": 0.1}, 0.75 * 0.01 + 0.25 * 0.0625),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_adaptive_steps_by_hand(rule: dict[str, object], second: float, make_study: MakeStudy) -> None:
    """Algorithm 2 from x = 2 with an update of 0.25, its square 0.0625: the model moves along the update."""
    study = make_study(
        {
            "training.aggregate": "update",
            "training.local": LOCAL,
            "training.server_step": rule,
            "training.learning_rates": [[1, 0.5]],
        }
    )
    before = first_state(np.array([2.0], np.float32), study)
    after = advance(before, np.array([1]), study, grid_exponent=2, nominal_patients=1)
    assert after.second[0] == pytest.approx(second, rel=1e-6)
    assert after.weights[0] == pytest.approx(2.0 + 0.5 * (0.5 * 0.25) / (math.sqrt(second) + 0.1), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_integers_of_any_width_give_the_same_step(dtype: type, make_study: MakeStudy) -> None:
    state = first_state(np.zeros(3, np.float32), make_study())
    total = np.array([30000, -32768, 1])
    one = advance(state, total.astype(dtype), make_study(), grid_exponent=3, nominal_patients=10)
    other = advance(state, total, make_study(), grid_exponent=3, nominal_patients=10)
    assert state_bytes(one) == state_bytes(other)


def test_state_cannot_be_written_to(make_study: MakeStudy) -> None:
    """Its hash is worked out once."""
    state = first_state(np.zeros(3, np.float32), make_study())
    with pytest.raises(ValueError, match="read-only"):
        state.weights[0] = 1.0


def test_step_leaves_the_state_it_is_given_alone(make_study: MakeStudy) -> None:
    state = first_state(np.array([1.0, 2.0], np.float32), make_study())
    before = state_bytes(state)
    advance(state, np.array([5, -7]), make_study(), grid_exponent=3, nominal_patients=10)
    assert state_bytes(state) == before


# ------------------------------------------------------------------------------------------------- schedule, average


@pytest.mark.parametrize(("number", "rate"), [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (9, 0.25), (10, 0.125)])
def test_learning_rate_is_the_tables_row(number: int, rate: float, make_study: MakeStudy) -> None:
    study = make_study({"training.rounds": 12, "training.learning_rates": [[1, 0.5], [3, 0.25], [10, 0.125]]})
    assert study.training.learning_rate(number) == rate


def test_each_round_uses_its_own_rate(make_study: MakeStudy) -> None:
    study = make_study(
        {
            "training.server_step": {"kind": "momentum", "momentum": 0.0},
            "training.learning_rates": [[1, 0.5], [3, 0.25]],
            "privacy.sampling_rate": 1.0,
        }
    )
    state, moves = first_state(np.zeros(1, np.float32), study), []
    for _ in range(3):
        following = advance(state, np.array([8]), study, grid_exponent=3, nominal_patients=1)
        moves.append(float(state.weights[0] - following.weights[0]))
        state = following
    assert moves == [0.5, 0.5, 0.25]


def test_released_model_is_the_mean_of_the_last_rounds(make_study: MakeStudy) -> None:
    study = make_study({"training.rounds": 4, "training.average_last_rounds": 2})
    state, seen = first_state(np.zeros(2, np.float32), study), []
    for total in ([4, -8], [100, 3], [7, 7], [-50, 1]):
        state = advance(state, np.array(total), study, grid_exponent=2, nominal_patients=8)
        seen.append(state.weights)
    expected = ((seen[2].astype(np.float64) + seen[3].astype(np.float64)) / 2.0).astype(np.float32)
    assert released_weights(state, study).tobytes() == expected.tobytes()


def test_released_model_before_the_end_is_the_weights(make_study: MakeStudy) -> None:
    state = advance(
        first_state(np.zeros(1, np.float32), make_study()),
        np.array([4]),
        make_study(),
        grid_exponent=2,
        nominal_patients=1,
    )
    assert released_weights(state, make_study()).tobytes() == state.weights.astype(np.float32).tobytes()


def test_moving_average_is_the_loop_written_down(make_study: MakeStudy) -> None:
    """Each round counts 0.75 times what the next one does, and all together 1."""
    study = make_study({"training.rounds": 5, "training.average_last_rounds": 1, "training.ema_decay": 0.75})
    state, seen = first_state(np.array([40.0, -3.0], np.float32), study), []
    for total in ([4, -8], [100, 3], [7, 7], [-50, 1], [9, -9]):
        state = advance(state, np.array(total), study, grid_exponent=2, nominal_patients=8)
        seen.append(state.weights.astype(np.float64))
        if len(seen) < 5:
            assert released_weights(state, study).tobytes() == state.weights.tobytes()
    shares = 0.75 ** np.arange(4.0, -1.0, -1.0)
    expected = (shares[:, None] * np.array(seen)).sum(axis=0) / shares.sum()
    np.testing.assert_allclose(released_weights(state, study), expected, rtol=1e-6)


def test_moving_average_of_a_model_that_stands_still_is_that_model(make_study: MakeStudy) -> None:
    """However slow: the start at 0 is corrected for."""
    study = make_study({"training.rounds": 3, "training.average_last_rounds": 1, "training.ema_decay": 0.9999})
    state = first_state(np.array([40.0, -3.0, 0.0], np.float32), study)
    for _ in range(3):
        state = advance(state, np.zeros(3, np.int64), study, grid_exponent=2, nominal_patients=8)
    np.testing.assert_allclose(released_weights(state, study), state.weights, rtol=1e-6)


def test_moving_average_counts_the_rounds_that_train(make_study: MakeStudy) -> None:
    """Of statistics before and metrics after them it sees nothing."""
    plain = {"training.rounds": 3, "training.average_last_rounds": 1, "training.ema_decay": 0.5}
    extras = {
        "statistics": {"noise_multiplier": 2.0, "attempts": 1, "least_scale": 0.01, "range": 64.0},
        "metrics": {"bins": 2, "attempts": 1, "noise_multiplier": 2.0, "range": 64.0},
    }
    trained = [np.arange(400) - 8 * number for number in range(3)]
    tails = []
    for changes, other in ((plain, []), ({**plain, **extras}, [np.full(400, 1000)])):
        study = make_study(changes)
        state = first_state(np.ones(4, np.float32), study)
        for total in [*other, *trained, *other]:
            state = advance(state, total, study, grid_exponent=2, nominal_patients=8)
        assert state.completed_rounds == study.released_sums
        tails.append(state.tail.tobytes())
    assert tails[0] == tails[1]


# --------------------------------------------------------------------------------------------- correction for the noise


def dp_study(make_study: MakeStudy, **rule: float) -> Study:
    return make_study(
        {
            "training.server_step": {"kind": "dp-adambc", "beta1": 0.0, "beta2": 0.0, "floor": 1e-6, **rule},
            "training.learning_rates": [[1, 0.5]],
            "training.rounds": 400,
            "training.average_last_rounds": 1,
            "privacy.sampling_rate": 0.5,
        }
    )


@pytest.mark.parametrize(
    ("variance", "spread"), [(0.0, 0.25), (16.0, 0.1875), (48.0, 0.0625), (64.0, 1e-6), (1e9, 1e-6), (math.inf, 1e-6)]
)
def test_corrected_step_by_hand(variance: float, spread: float, make_study: MakeStudy) -> None:
    """A sum of 8 quarters over 4 expected patients: a mean of 0.5, its square 0.25; noise of 16 squared quarters is 1 of the sum,
    a 16th of the mean."""
    study = dp_study(make_study)
    before = first_state(np.array([2.0, -2.0], np.float32), study)
    after = advance(before, np.array([8, -8]), study, grid_exponent=2, nominal_patients=8, noise_variance=variance)
    assert after.second.tolist() == [0.25, 0.25], "kept as it was seen: what is taken off depends on who survives"
    np.testing.assert_allclose(
        after.weights, [2 - 0.5 * 0.5 / math.sqrt(spread), -2 + 0.5 * 0.5 / math.sqrt(spread)], rtol=1e-6
    )


def test_step_that_needs_the_noise_refuses_to_go_without(make_study: MakeStudy) -> None:
    study = dp_study(make_study)
    with pytest.raises(LocalProtocolError, match="MF-900"):
        advance(first_state(np.zeros(1, np.float32), study), np.array([1]), study, grid_exponent=2, nominal_patients=8)


def test_corrected_second_moment_is_that_of_the_gradient(make_study: MakeStudy) -> None:
    """Under noise of 16 times its variance the plain moment is the noise's; taking that off leaves the gradient's mean square,
    within what 2,000 parameters can tell."""
    rng, size, rounds, exponent, patients = np.random.default_rng(8), 2000, 400, 16, 64
    study = dp_study(make_study, beta1=0.9, beta2=0.995)
    signal, spread, noise_sd = 0.3, 0.4, 2.0
    scale = study.privacy.sampling_rate * patients
    state = first_state(np.zeros(size, np.float32), study)
    for _ in range(rounds):
        mean = rng.normal(signal, spread, size) + rng.normal(0.0, noise_sd, size)
        total = np.rint(mean * scale * 2.0**exponent).astype(np.int64)
        variance = (noise_sd * scale * 2.0**exponent) ** 2
        state = advance(state, total, study, grid_exponent=exponent, nominal_patients=patients, noise_variance=variance)
    unbiased = float(state.second.mean(dtype=np.float64)) / (1.0 - 0.995**rounds)
    true = signal**2 + spread**2
    error_of_the_mean = math.sqrt(2.0 * 0.005 / 1.995 / size) * noise_sd**2  # of squares of normal numbers, averaged
    assert abs(unbiased - noise_sd**2 - true) < 4.0 * error_of_the_mean
    assert unbiased > 16.0 * true
    assert 4.0 * error_of_the_mean < true / 5.0, "the figures tell"


def test_corrected_step_keeps_the_gradients_own_scale(make_study: MakeStudy) -> None:
    """What DP-AdamBC is for: parameters whose gradients differ tenfold under the same noise move alike, as they would without;
    Adam holds the smaller back. Once the moments have settled: before, the floor decides."""
    rng, rounds = np.random.default_rng(9), 400
    gradients, noise_sd, moves = np.repeat([1.0, 10.0], 500), 2.0, []
    plain = {"kind": "adam", "beta1": 0.9, "beta2": 0.999, "stabilizer": 1e-8}
    corrected = {"kind": "dp-adambc", "beta1": 0.9, "beta2": 0.999, "floor": 1e-4}
    for rule in (plain, corrected):
        study = make_study({"training.server_step": rule, "training.rounds": rounds, "training.average_last_rounds": 1})
        scale = study.privacy.sampling_rate * 100
        state = settled = first_state(np.zeros(1000, np.float32), study)
        for _ in range(rounds):
            settled = state if state.completed_rounds == 300 else settled
            total = np.rint((gradients + rng.normal(0.0, noise_sd, 1000)) * scale * 2.0**16).astype(np.int64)
            state = advance(
                state,
                total,
                study,
                grid_exponent=16,
                nominal_patients=100,
                noise_variance=(noise_sd * scale * 2.0**16) ** 2,
            )
        way = state.weights - settled.weights
        moves.append(float(way[500:].mean() / way[:500].mean()))
    assert moves[0] > 2.0
    assert 0.8 < moves[1] < 1.2


@pytest.mark.parametrize("mode", ["local", "distributed"])
@pytest.mark.parametrize("survivors", [4, 5])
def test_what_is_taken_off_is_the_variance_of_what_hospitals_add(
    mode: str, survivors: int, make_study: MakeStudy
) -> None:
    """Sums of nothing but noise: their mean square is what the plan says of as many hospitals as survive."""
    study = make_study(
        {
            "privacy.mode": mode,
            "cohort.hospitals": 5,
            "cohort.most_hospitals": 5,
            "training.server_step": {"kind": "dp-adambc", "beta1": 0.0, "beta2": 0.0, "floor": 1e-18},
            "training.learning_rates": [[1, 1.0]],
        }
    )
    plan, size = make_plan(study, 4), 20_000
    total = sum(discrete_gaussian(bytes([number]) * 32, plan.noise_sd, size) for number in range(survivors))
    settings = {"grid_exponent": plan.exponent, "nominal_patients": 50}
    before = first_state(np.zeros(size, np.float32), study)
    after = advance(before, total, study, noise_variance=plan.noise_variance(survivors), **settings)
    scale = study.privacy.sampling_rate * 50 * 2.0**plan.exponent
    taken_off = plan.noise_variance(survivors) / scale**2
    assert float(after.second.mean(dtype=np.float64)) == pytest.approx(taken_off, rel=4 * math.sqrt(2 / size))
    if mode == "local":
        own = study.privacy.noise_multiplier * study.privacy.clipping_norm / (study.privacy.sampling_rate * 50)
        assert taken_off == pytest.approx(survivors * own**2, rel=1e-3)


def test_divisor_is_public(make_study: MakeStudy) -> None:
    """Sampling rate times declared patients: nothing of the real data enters."""
    assert divisor(make_study({"privacy.sampling_rate": 0.25}), 1000, 1500) == 250.0


def test_updates_are_weighted_by_the_hospitals_so_nothing_divides_them(make_study: MakeStudy) -> None:
    assert divisor(make_study({"training.aggregate": "update", "training.local": LOCAL}), 600, 1000) == 0.6


# ------------------------------------------------------------------------------------------------------------- bytes

floats = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3)
ADAM = {"kind": "adam", "beta1": 0.9, "beta2": 0.999, "stabilizer": 1e-8}
ADAM_BC = {"kind": "dp-adambc", "beta1": 0.9, "beta2": 0.99, "floor": 1e-6}
ALL = {"training.server_step": ADAM, "training.average_last_rounds": 2}  # a study whose states have every array


@settings(deadline=None)
@given(completed=st.integers(0, 2**32 - 1), arrays=st.tuples(floats, floats, floats, floats))
def test_state_reads_back_the_same(completed: int, arrays: tuple[list[float], ...], make_study: MakeStudy) -> None:
    state = ModelState(completed, *(np.array(values, np.float32) for values in arrays))
    data = state_bytes(state)
    assert len(data) == state_size_bytes(make_study(ALL), 3)
    again = parse_state(data, make_study(ALL), 3)
    assert state_bytes(again) == data
    assert again.completed_rounds == completed


def _state(*, value: float = 1.5) -> ModelState:
    numbers = np.array([value, -2.0, 3.25], np.float32)
    return ModelState(2, numbers, numbers + 1, numbers + 2, numbers + 3)


@pytest.mark.parametrize("words", [0, 2, 4, 1 << 40])
def test_state_of_another_model_is_refused(words: int, make_study: MakeStudy) -> None:
    with pytest.raises(RemoteProtocolError, match="MF-150"):
        parse_state(state_bytes(_state()), make_study(ALL), words)


@pytest.mark.parametrize("change", [-61, -60, -48, -13, -12, -4, -1, 1, 4])
def test_state_cut_or_continued_is_refused(change: int, make_study: MakeStudy) -> None:
    data = state_bytes(_state())
    with pytest.raises(RemoteProtocolError, match="MF-150"):
        parse_state(data[:change] if change < 0 else data + bytes(change), make_study(ALL), 3)


def test_state_whose_own_count_differs_is_refused(make_study: MakeStudy) -> None:
    data = state_bytes(_state())
    with pytest.raises(RemoteProtocolError, match="MF-150"):
        parse_state(data[:4] + (4).to_bytes(8, "big") + data[12:], make_study(ALL), 3)


@pytest.mark.parametrize("code", [0, 1, 3, 6, 8, 15, 255])
def test_state_that_names_other_arrays_is_refused(code: int, make_study: MakeStudy) -> None:
    data = state_bytes(_state())
    assert data[12] == 7
    with pytest.raises(RemoteProtocolError, match="MF-150"):
        parse_state(data[:12] + bytes([code]) + data[13:], make_study(ALL), 3)


@pytest.mark.parametrize(
    ("changes", "arrays"),
    [
        ({"training.server_step": {"kind": "momentum", "momentum": 0.0}, "training.average_last_rounds": 1}, 1),
        ({"training.server_step": {"kind": "momentum", "momentum": 0.9}, "training.average_last_rounds": 1}, 2),
        ({"training.server_step": {"kind": "momentum", "momentum": 0.0}, "training.average_last_rounds": 2}, 2),
        ({"training.server_step": ADAM, "training.average_last_rounds": 1}, 3),
        (ALL, 4),
        ({"training.server_step": ADAM_BC, "training.average_last_rounds": 1}, 3),
        ({"training.server_step": ADAM_BC, "training.average_last_rounds": 1, "training.ema_decay": 0.5}, 4),
    ],
)
def test_arrays_that_a_study_has_no_use_for_are_not_kept(
    changes: dict[str, object], arrays: int, make_study: MakeStudy
) -> None:
    study = make_study(changes)
    state = first_state(np.zeros(5, np.float32), study)
    for _ in range(2):
        data = state_bytes(state)
        assert len(data) == state_size_bytes(study, 5) == 13 + arrays * 4 * 5
        assert state_bytes(parse_state(data, study, 5)) == data
        state = advance(state, np.ones(5, np.int64), study, grid_exponent=3, nominal_patients=1, noise_variance=1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(12))
def test_state_that_is_not_finite_is_refused(bad: float, place: int, make_study: MakeStudy) -> None:
    data = bytearray(state_bytes(_state()))
    data[13 + 4 * place : 17 + 4 * place] = struct.pack("<f", bad)
    with pytest.raises(RemoteProtocolError, match="MF-153"):
        parse_state(bytes(data), make_study(ALL), 3)


def test_state_hash_tells_any_two_states_and_studies_apart() -> None:
    state = _state()
    others = [
        replace(state, completed_rounds=3),
        replace(state, weights=state.weights * 2),
        replace(state, first=state.weights),
        replace(state, second=state.weights),
        replace(state, tail=state.weights),
        _state(value=float(np.nextafter(np.float32(1.5), np.float32(2)))),
        ModelState(2, state.first, state.weights, state.second, state.tail),
    ]
    hashes = {state_hash(STUDY_HASH, each) for each in [state, *others]} | {state_hash(bytes(32), state)}
    assert len(hashes) == len(others) + 2
    tasks = {task_hash(STUDY_HASH, each) for each in [state, *others]} | {task_hash(bytes(32), state)}
    assert len(tasks | hashes) == 2 * len(hashes)


def test_minus_zero_and_zero_are_different_states() -> None:
    """They train alike but not every reader agrees: bytes decide."""
    state = _state()
    minus = replace(state, first=np.array([-0.0, 0.0, 1.0], np.float32))
    plus = replace(state, first=np.array([0.0, 0.0, 1.0], np.float32))
    assert state_hash(STUDY_HASH, minus) != state_hash(STUDY_HASH, plus)


# --------------------------------------------------------------------------------------------- making the vectors


def generate() -> dict[str, object]:
    rng = random.Random(20240601)
    made = []
    adam = {"kind": "adam", "beta1": 0.9, "beta2": 0.999, "stabilizer": 1e-8}
    yogi = {"kind": "fedyogi", "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    fedadam = {"kind": "fedadam", "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    adagrad = {"kind": "fedadagrad", "beta1": 0.0, "tau": 0.1}
    adambc = {"kind": "dp-adambc", "beta1": 0.9, "beta2": 0.99, "floor": 1e-3}
    for name, aggregate, rule, size, rounds, average in (
        ("momentum", "gradient", {"kind": "momentum", "momentum": 0.9}, 13, 6, 3),
        ("plain-descent", "gradient", {"kind": "momentum", "momentum": 0.0}, 1, 3, 1),
        ("adam", "gradient", adam, 13, 6, 2),
        ("adam-mid-run", "gradient", adam, 7, 9, 4),
        ("fedavg", "update", {"kind": "momentum", "momentum": 0.0}, 13, 4, 1),
        ("fedavg-momentum", "update", {"kind": "momentum", "momentum": 0.9}, 5, 4, 2),
        ("fedadagrad", "update", adagrad, 13, 5, 2),
        ("fedyogi", "update", yogi, 13, 5, 1),
        ("fedadam", "update", fedadam, 13, 5, 1),
        ("fedadam-of-gradients", "gradient", fedadam, 5, 4, 1),
        ("dp-adambc", "gradient", adambc, 13, 6, 2),
        ("dp-adambc-ema", "gradient", adambc, 7, 5, 1),
        ("fedavg-ema", "update", {"kind": "momentum", "momentum": 0.0}, 13, 4, 1),
    ):
        case: dict[str, object] = {
            "name": name,
            "aggregate": aggregate,
            "rounds": rounds,
            "average_last_rounds": average,
            "learning_rates": [[1, 0.3], [4, 0.1]],
            "server_step": rule,
            "sampling_rate": 0.7,
            "nominal_patients": 739,
            "grid_exponent": 19,
            "first_weights": [single(rng.gauss(0, 1)) for _ in range(size)],
            "totals": [
                [rng.choice([0, 1, -1, 2**31 - 1, -(2**31), rng.randrange(-(2**28), 2**28)]) for _ in range(size)]
                for _ in range(rounds - (name == "adam-mid-run") * 4)
            ],
        }
        if name.startswith("dp-"):
            case["noise_variance"] = 5 * 2.0**56  # between the squares of the totals' sizes
        if name.endswith("-ema"):
            case["ema_decay"] = 0.9
        states = plain_run(case)
        case["state_sha256"] = [hashlib.sha256(state.to_bytes()).hexdigest() for state in states]
        case["released_sha256"] = hashlib.sha256(plain_released(states, case)).hexdigest()
        made.append(case)
    return {
        "provenance": "inputs: random.Random(20240601) in tests/hall/test_advance.py generate(); hashes: its plain-Python"
        " float implementation, which shares no code with medfed/advance.py. state_sha256[r]: SHA-256 of BE32 round,"
        " BE64 d, a byte of the arrays kept (1 first, 2 second, 4 tail), then weights, first, second and tail as"
        " little-endian float32; released_sha256: little-endian float32",
        "cases": made,
    }


if __name__ == "__main__":
    print(json.dumps(generate(), indent=1))
