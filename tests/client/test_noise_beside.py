"""Noise drawn while the gradient is computed: the same sums, used once, and nothing of it left when the attempt is over."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.client import local_steps, noise_beside
from medfed.client.local_steps import noised_sum, private_update
from medfed.client.noise_beside import OneNoise, drawn_beside
from medfed.errors import LocalProtocolError
from medfed.privacy.noise import discrete_gaussian
from medfed.simulations.entropy import SeededEntropy
from medfed.wire import Refused, Upload

sys.path.insert(0, str(Path(__file__).parent))

from test_local_steps import UPDATE, approved_at
from test_participation import Desk, failing, refused

PATIENCE_S = 30.0  # for what takes milliseconds: only a fault waits so long


@pytest.fixture
def always_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of any length are drawn in the second thread."""
    monkeypatch.setattr(noise_beside, "BESIDE_FROM", 1)


@contextlib.contextmanager
def no_thread_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


def test_sums_and_updates_are_the_same_bits_with_the_thread(make_world, monkeypatch: pytest.MonkeyPatch) -> None:
    approved = approved_at(make_world(UPDATE), 2)
    weights = np.zeros(approved.plan.words, np.float32)
    results = []
    for least in (1 << 62, 1):
        monkeypatch.setattr(noise_beside, "BESIDE_FROM", least)
        entropy = SeededEntropy(1, "x")
        sums = [noised_sum(approved, weights, entropy, discrete_gaussian) for _ in range(3)]
        results.append([*sums, private_update(approved, weights, entropy, discrete_gaussian)])
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.usefixtures("always_beside")
def test_noise_is_drawn_while_the_gradient_is_computed(make_world, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other to be under way: one after the other they would never end."""
    approved = approved_at(make_world(), 2)
    drawing, computing = threading.Event(), threading.Event()
    owners: list[str] = []

    def noise(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        drawing.set()
        assert computing.wait(PATIENCE_S)
        owners.append(threading.current_thread().name)
        return np.arange(size)

    def gradient(*arguments: object, **named: object) -> NDArray[np.float64]:
        computing.set()
        assert drawing.wait(PATIENCE_S)
        owners.append(threading.current_thread().name)
        return np.zeros(approved.plan.words)

    monkeypatch.setattr(local_steps, "gradient_sum", gradient)
    with no_thread_left():
        total = noised_sum(approved, np.zeros(approved.plan.words, np.float32), SeededEntropy(1, "x"), noise)
    assert total.tolist() == list(range(approved.plan.words))
    assert len(set(owners)) == 2


def test_short_vectors_get_no_thread() -> None:
    """Drawn when they are taken, in the thread that takes them."""
    owners: list[threading.Thread] = []

    def draw() -> NDArray[np.int64]:
        owners.append(threading.current_thread())
        return np.zeros(3, np.int64)

    with no_thread_left(), drawn_beside(draw, noise_beside.BESIDE_FROM - 1) as drawn:
        assert owners == []
        drawn.take()
    assert owners == [threading.current_thread()]


class Kept:
    """Weak references to everything that was drawn: alive only as long as somebody else holds it."""

    def __init__(self) -> None:
        self.drawn: list[weakref.ref[NDArray[np.int64]]] = []

    def __call__(self, key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        noise = discrete_gaussian(key, sd, size)
        self.drawn.append(weakref.ref(noise))
        return noise

    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.drawn)


@pytest.mark.usefixtures("always_beside")
def test_nothing_of_the_noise_outlives_the_attempt(world) -> None:
    """Whole attempts of a hospital: neither the thread nor the vector is left."""
    kept = Kept()
    world.start_all(kept)
    desk = Desk(world)
    desk.set_up()
    with no_thread_left():
        desk.round()
    assert len(kept.drawn) == 4
    assert kept.alive() == 0
    held = kept(bytes(32), 1.0, 5)
    assert kept.alive() == 1, "the control: a vector that somebody holds is seen"
    del held


@pytest.mark.usefixtures("always_beside")
def test_training_that_fails_discards_the_noise(make_world, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the error is still in somebody's hands."""
    approved, kept = approved_at(make_world(), 2), Kept()

    def fails(*arguments: object, **named: object) -> NDArray[np.float64]:
        raise MemoryError

    monkeypatch.setattr(local_steps, "gradient_sum", fails)
    with no_thread_left(), pytest.raises(MemoryError) as caught:
        noised_sum(approved, np.zeros(approved.plan.words, np.float32), SeededEntropy(1, "x"), kept)
    assert len(kept.drawn) == 1
    assert kept.alive() == 0
    assert caught.value is not None


@pytest.mark.usefixtures("always_beside")
@pytest.mark.parametrize("error", [RuntimeError("patient 17"), MemoryError()], ids=repr)
def test_drawing_that_fails_in_the_thread_abandons_the_attempt(world, error: Exception) -> None:
    world.start_all(failing(error))
    desk = Desk(world)
    desk.set_up()
    with no_thread_left():
        refused(desk.ask(0, desk.request()), Refused.INTERNAL)
    assert world.rows(0)[2:] == [("RESERVED", 1), ("ABANDONED", 1)]
    assert isinstance(desk.ask(0, desk.request(attempt=2)), Upload)


@pytest.mark.usefixtures("always_beside")
def test_keys_of_local_steps_are_drawn_in_order_in_the_hospitals_own_thread(make_world) -> None:
    approved = approved_at(make_world(UPDATE), 2)
    seeded, seen = SeededEntropy(1, "x"), []

    class Noted:
        def draw(self, purpose: str, size_bytes: int) -> bytes:
            seen.append((purpose, threading.current_thread() is threading.main_thread()))
            return seeded.draw(purpose, size_bytes)

    private_update(approved, np.zeros(approved.plan.words, np.float32), Noted(), discrete_gaussian)
    assert seen == [("sampling", True), ("noise", True)] * 5


TWICE: dict[str, Callable[[OneNoise], object]] = {
    "taken twice": lambda drawn: (drawn.take(), drawn.take()),
    "taken after it was discarded": lambda drawn: (drawn.discard(), drawn.take()),
}


@pytest.mark.parametrize("size", [1, noise_beside.BESIDE_FROM])
@pytest.mark.parametrize("how", TWICE)
def test_noise_is_used_once(how: str, size: int) -> None:
    with (
        no_thread_left(),
        pytest.raises(LocalProtocolError, match="MF-900"),
        drawn_beside(lambda: np.zeros(3, np.int64), size) as drawn,
    ):
        TWICE[how](drawn)


def test_noise_is_not_to_be_had_when_the_block_is_over() -> None:
    with drawn_beside(lambda: np.zeros(3, np.int64), noise_beside.BESIDE_FROM) as drawn:
        pass
    with pytest.raises(LocalProtocolError, match="MF-900"):
        drawn.take()


@pytest.mark.parametrize("size", [1, noise_beside.BESIDE_FROM])
def test_fork_in_the_middle_of_an_attempt_does_not_get_the_noise(size: int) -> None:
    """Two processes with one noise vector would be two uploads under it; the parent goes on."""
    with no_thread_left(), drawn_beside(lambda: np.arange(3), size) as drawn:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
            child = os.fork()
        if child == 0:
            try:
                drawn.take()
            except LocalProtocolError:
                os._exit(17)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        assert drawn.take().tolist() == [0, 1, 2]
