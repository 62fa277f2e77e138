"""Where hospitals' threads meet: everybody is answered, in whatever order they come, refuse or fail."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.client.node import make_client_app
from medfed.server.exchange import Kind, Reply
from medfed.server.link.grid import GridExchange
from medfed.simulations.gathering import Gathering
from medfed.simulations.grid import LocalGrid

WITHIN_S = 60.0  # a test that would hang fails instead


class Calls:
    """Squares numbers, odd ones apart from even ones, and keeps what it was asked together. ``bad``: a number it fails at."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.together: list[list[int]] = []

    def cut(self, questions: Sequence[int]) -> list[list[int]]:
        self.together.append(sorted(questions))
        parts = [[at for at, number in enumerate(questions) if number % 2 == kind] for kind in (0, 1)]
        return [part for part in parts if part]

    def work_out(self, questions: Sequence[int]) -> list[int]:
        if self.bad in questions:
            raise ArithmeticError(f"not {self.bad}")
        return [number * number for number in questions]

    def gathering(self, at_work: int = 1, most: int = 100) -> Gathering[int, int]:
        return Gathering(self.cut, self.work_out, at_work=at_work, most=most)


def one_after_the_other(gathering: Gathering[int, int], order: Sequence[int], does: Callable[[int], object]) -> list:
    """Each hospital of ``order`` begins when the one before waits or is done (one turn for all): what each came to."""
    ends: dict[int, object] = {}
    gathering.came(len(order))
    threads = []
    for number in order:
        began = threading.Event()

        def run(number: int = number, began: threading.Event = began) -> None:
            with gathering.turn():
                began.set()
                try:
                    ends[number] = does(number)
                except Exception as error:
                    ends[number] = error
            gathering.went()

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        assert began.wait(WITHIN_S)
    for thread in threads:
        thread.join(WITHIN_S)
        assert not thread.is_alive()
    return [ends[number] for number in sorted(order)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_hospitals_are_answered_together_in_whatever_order_they_come(order: tuple[int, ...]) -> None:
    calls = Calls()
    gathering = calls.gathering()
    assert one_after_the_other(gathering, order, gathering.ask) == [0, 1, 4, 9]
    assert calls.together == [[0, 1, 2, 3]]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("gone", [{0}, {3}, {0, 2}, {1, 2, 3}, {0, 1, 2, 3}])
def test_those_who_wait_do_not_wait_for_one_that_refuses_or_fails(order: tuple[int, ...], gone: set[int]) -> None:
    calls = Calls()
    gathering = calls.gathering()

    def does(number: int) -> int:
        if number in gone:
            raise LookupError("refused")
        return gathering.ask(number)

    ends = one_after_the_other(gathering, order, does)
    asked = [number for number in range(4) if number not in gone]
    assert [ends[number] for number in asked] == [number * number for number in asked]
    assert all(isinstance(ends[number], LookupError) for number in gone)
    assert calls.together == ([asked] if asked else [])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_what_a_portion_raises_reaches_those_in_it_and_no_other(order: tuple[int, ...]) -> None:
    gathering = Calls(bad=2).gathering()
    ends = one_after_the_other(gathering, order, gathering.ask)
    assert [str(end) for end in ends] == ["not 2", "1", "not 2", "9"]


def test_what_cutting_raises_and_what_it_leaves_out_reaches_everybody_concerned() -> None:
    def fails(questions: Sequence[int]) -> list[list[int]]:
        raise ArithmeticError("cannot be cut")

    gathering = Gathering(fails, list[int], at_work=1, most=9)
    assert [str(end) for end in one_after_the_other(gathering, (0, 1), gathering.ask)] == ["cannot be cut"] * 2
    gathering = Gathering(lambda questions: [[1]], list[int], at_work=1, most=9)
    forgotten, answered = one_after_the_other(gathering, (0, 1), gathering.ask)
    assert (type(forgotten), answered) == (LookupError, 1)


def test_portion_with_too_few_answers_is_an_error_of_everybody_in_it() -> None:
    gathering = Gathering(lambda questions: [[0, 1, 2]], lambda questions: [7], at_work=1, most=9)
    assert [type(end) for end in one_after_the_other(gathering, (0, 1, 2), gathering.ask)] == [ValueError] * 3


def test_those_who_come_again_are_answered_again() -> None:
    calls = Calls()
    gathering = calls.gathering()
    ends = one_after_the_other(gathering, (0, 1, 2), lambda number: (gathering.ask(number), gathering.ask(number + 10)))
    assert ends == [(0, 100), (1, 121), (4, 144)]
    assert calls.together == [[0, 1, 2], [10, 11, 12]]


def test_with_more_hospitals_than_threads_the_first_are_answered_without_the_others() -> None:
    calls = Calls()
    grid, exchange = on_a_grid(calls.gathering(most=2), 5)
    assert answers(exchange, [[number] for number in range(5)]) == [[number * number] for number in range(5)]
    grid.close()
    assert calls.together[0] == [0, 1]
    assert sorted(itertools.chain(*calls.together)) == [0, 1, 2, 3, 4]
    assert max(map(len, calls.together)) == 2


# --------------------------------------------------------------------------------------------------------- on the grid

REFUSES, FAILS = -1, -2


def on_a_grid(gathering: Gathering[int, int], hospitals: int) -> tuple[LocalGrid, GridExchange]:
    """Hospitals whose every message says what they are to ask."""

    def handle(data: bytes) -> bytes:
        number = int(data)
        if number == FAILS:
            raise LookupError("failed")
        return b"refused" if number == REFUSES else str(gathering.ask(number)).encode()

    grid = LocalGrid([make_client_app(handle) for _ in range(hospitals)], meeting=gathering)
    return grid, GridExchange(grid, grid.node_ids)


def answers(exchange: GridExchange, asked: Sequence[Sequence[int]]) -> list[list[int | str | None]]:
    """What each hospital answers to its messages, all sent at once."""
    for position, numbers in enumerate(asked):
        for number in numbers:
            exchange.send(position, Kind.TRAIN, str(number).encode(), 5.0)
    return gathered(exchange, [len(numbers) for numbers in asked])


def gathered(exchange: GridExchange, counts: Sequence[int]) -> list[list[int | str | None]]:
    found: list[list[Reply]] = [[] for _ in counts]
    pause = threading.Event()
    for _ in range(int(WITHIN_S / 0.001)):
        for reply in exchange.receive():
            found[reply.position].append(reply)
        if [len(replies) for replies in found] == list(counts):
            break
        pause.wait(0.001)
    assert [len(replies) for replies in found] == list(counts)
    return [[_read(reply) for reply in replies] for replies in found]


def _read(reply: Reply) -> int | str | None:
    if reply.payload is None:
        return reply.fault
    return "refused" if reply.payload == b"refused" else int(reply.payload)


def _expected(number: int, bad: int | None) -> set[int | str | None]:
    if number == FAILS:
        return {"LookupError"}
    if number == REFUSES:
        return {"refused"}
    return {number * number} if bad is None else {number * number, "ArithmeticError"}


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.lists(st.integers(FAILS, 9), max_size=3), min_size=1, max_size=6),
    at_work=st.integers(1, 3),
    most=st.integers(1, 7),
    bad=st.none() | st.integers(0, 9),
)
def test_grid_answers_every_message_whatever_hospitals_do(
    asked: list[list[int]], at_work: int, most: int, bad: int | None
) -> None:
    calls = Calls(bad)
    grid, exchange = on_a_grid(calls.gathering(at_work, most), len(asked))
    try:
        for hospital, numbers in zip(answers(exchange, asked), asked, strict=True):
            # of one hospital in any order: replies that are ready together are handed on in the order of sending
            for answer, number in zip(hospital, numbers, strict=True):
                assert answer in _expected(number, bad)
    finally:
        grid.close()
    assert sorted(itertools.chain(*calls.together)) == sorted(number for one in asked for number in one if number >= 0)


def test_messages_of_the_next_round_that_come_early_are_answered_in_their_turn() -> None:
    calls = Calls()
    grid, exchange = on_a_grid(calls.gathering(), 3)
    assert answers(exchange, [[1, 11], [2, 12], [3]]) == [[1, 121], [4, 144], [9]]
    grid.close()
    assert calls.together[0] == [1, 2, 3]


def test_grid_that_closes_ends_those_who_wait_and_drops_what_is_left() -> None:
    """The coordinator stops while one hospital is at work and others wait for it."""
    calls, at_work, go_on = Calls(), threading.Event(), threading.Event()
    gathering = calls.gathering(at_work=2)

    def handle(data: bytes) -> bytes:
        if data == b"slow":
            at_work.set()
            assert go_on.wait(WITHIN_S)
            return b"done"
        return str(gathering.ask(int(data))).encode()

    grid = LocalGrid([make_client_app(handle) for _ in range(3)], meeting=gathering)
    exchange = GridExchange(grid, grid.node_ids)
    for position, data in ((0, b"slow"), (0, b"7"), (1, b"4"), (2, b"5")):
        exchange.send(position, Kind.TRAIN, data, 5.0)
    exchange.receive()
    assert at_work.wait(WITHIN_S)
    closing = threading.Thread(target=grid.close, daemon=True)
    closing.start()
    while not grid._is_closed:
        threading.Event().wait(0.001)
    go_on.set()
    closing.join(WITHIN_S)
    assert not closing.is_alive()
    assert set(itertools.chain(*calls.together)) <= {4, 5}, "the message behind the slow one is dropped"
