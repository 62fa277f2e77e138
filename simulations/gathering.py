"""Hospitals of one process that come to the same point of a round: what each asks there is answered for many at once.

Every hospital answers its messages in a thread of its own, by production's code. Where that code asks for something that is
cheaper for many than for one, the thread waits here until no hospital can come any more that is not here already; then some
of those who wait work it out for all. There are no time limits: who can come is known from the messages under way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class _Ticket(Generic[Question, Answer]):
    """One question, and where its thread waits."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.called = threading.Event()  # there is an answer, an error, or work to do
        self.portion: Sequence[_Ticket[Question, Answer]] = ()  # for its thread to work out
        self.answer: Answer | None = None
        self.error: BaseException | None = None

    def result(self) -> Answer:
        if self.error is not None:
            raise self.error
        if self.answer is None:
            raise LookupError("a question that was put into no portion")
        return self.answer


class Gathering(Generic[Question, Answer]):
    """Where the threads of hospitals meet. Whoever runs them says how many are under way (``came``, ``went``).

    *Guarantees* A question is answered once each of the hospitals under way has asked, too, or has no message left to
    answer: as long as hospitals wait for each other here only, nobody waits for ever, in whatever order they come, refuse
    or fail. What working out a portion raises is raised in each thread whose question is in it, and in no other.
    """

    def __init__(
        self,
        cut: Callable[[Sequence[Question]], Sequence[Sequence[int]]],
        work_out: Callable[[Sequence[Question]], Sequence[Answer]],
        *,
        at_work: int,
        most: int,
    ) -> None:
        """``cut``: the portions in which to work questions out, by their numbers; ``work_out``: a portion's answers, in
        its order. ``at_work``: threads that do anything but wait. ``most``: threads; with more hospitals than these under
        way, the first so many to ask are answered without the others."""
        self.most = most
        self._cut = cut
        self._work_out = work_out
        self._turns = threading.Semaphore(at_work)
        self._lock = threading.Lock()
        self._under_way = 0
        self._waiting: list[_Ticket[Question, Answer]] = []

    def came(self, count: int) -> None:
        """So many more hospitals have messages to answer: to be said of all that come at once before one of them begins."""
        with self._lock:
            self._under_way += count

    def went(self) -> None:
        """A hospital has no message left to answer."""
        with self._lock:
            self._under_way -= 1
            ready = self._ready()
        self._call(ready)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block a hospital answers a message, as one of at most ``at_work``."""
        with self._turns:
            yield

    def ask(self, question: Question) -> Answer:
        """The answer. To be called within a ``turn``, which is others' while this thread waits."""
        ticket: _Ticket[Question, Answer] = _Ticket(question)
        with self._lock:
            self._waiting.append(ticket)
            ready = self._ready()
        self._call(ready)
        self._turns.release()
        try:
            ticket.called.wait()
        finally:
            self._turns.acquire()
        if ticket.portion:
            self._answer(ticket.portion)
        return ticket.result()

    def _ready(self) -> list[_Ticket[Question, Answer]]:
        """All who wait, if nobody is left to wait for. Under the lock."""
        if len(self._waiting) < min(self._under_way, self.most):
            return []
        ready, self._waiting = self._waiting, []
        return ready

    def _call(self, tickets: list[_Ticket[Question, Answer]]) -> None:
        """Give each portion to the first whose question is in it."""
        if not tickets:
            return
        try:
            portions = self._cut([ticket.question for ticket in tickets])
        except BaseException as error:
            _tell(tickets, error)
            return
        forgotten = set(range(len(tickets))).difference(*portions)
        _tell([tickets[number] for number in forgotten], None)
        for numbers in portions:
            portion = [tickets[number] for number in numbers]
            portion[0].portion = portion
            portion[0].called.set()

    def _answer(self, portion: Sequence[_Ticket[Question, Answer]]) -> None:
        """On the thread of the first of them."""
        try:
            answers = self._work_out([ticket.question for ticket in portion])
            for ticket, answer in zip(portion, answers, strict=True):
                ticket.answer = answer
        except BaseException as error:
            _tell(portion, error)
        else:
            _tell(portion, None)


def _tell(tickets: Sequence[_Ticket[Question, Answer]], error: BaseException | None) -> None:
    """Everyone, whatever it is: a thread that is not told waits for ever."""
    for ticket in tickets:
        ticket.error = error
        ticket.called.set()
