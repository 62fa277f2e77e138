"""When a request is sent again: after silence ever more rarely, after an absence at once."""

import itertools

from medfed.server.exchange import Kind
from medfed.server.mail import RESEND_AT_MOST_S, RESEND_S, Envelope, Mail, Outgoing


class Exchange:
    """Nobody answers; who is there can be set."""

    def __init__(self) -> None:
        self.there, self.sent, self.looks = {0, 1}, [], 0

    def online(self):
        self.looks += 1
        return frozenset(self.there)

    def send(self, position, kind, payload, timeout_s):
        self.sent.append((position, payload))

    def receive(self):
        return []


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds, wake=None):
        self.now += max(seconds, 0.5)


def mail_of(exchange, clock, loads):
    def frames(positions):
        loads.append(clock.now)
        return dict.fromkeys(positions, b"frame")

    outgoing = Outgoing(frames, Kind.TRAIN, 3600.0)
    return Mail(exchange, clock, Envelope(b"", (), 1), outgoing, str)


def run(mail, clock, seconds, waiting=frozenset({0, 1})):
    end = clock.now + seconds
    while clock.now < end:
        mail.gather(waiting, "too late")


def test_silent_hospital_is_asked_again_ever_more_rarely():
    exchange, clock, loads = Exchange(), Clock(), []
    run(mail_of(exchange, clock, loads), clock, 1800.0, frozenset({0}))
    gaps = [after - before for before, after in itertools.pairwise(loads)]
    assert abs(gaps[0] - RESEND_S) < 1
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(gaps))
    assert abs(gaps[-1] - RESEND_AT_MOST_S) < 1
    assert exchange.sent == [(0, b"frame")] * len(loads)


def test_hospital_that_was_away_is_asked_as_soon_as_it_is_back():
    exchange, clock = Exchange(), Clock()
    mail = mail_of(exchange, clock, [])
    run(mail, clock, 200.0)  # the pauses are long by now
    exchange.there = {0}
    run(mail, clock, 20.0)
    before = len(exchange.sent)
    exchange.there = {0, 1}
    run(mail, clock, 5.0)
    assert exchange.sent[before:] == [(1, b"frame")]


def test_who_is_there_is_asked_for_now_and_then_only():
    exchange, clock = Exchange(), Clock()
    run(mail_of(exchange, clock, []), clock, 100.0)
    assert exchange.looks <= 60
