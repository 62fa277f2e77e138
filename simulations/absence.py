"""Hospitals of a rehearsal that are cut off in some rounds: what drop-outs cost, without pulling a plug."""

from __future__ import annotations

from collections.abc import Callable

from medfed.client.hospital import Hospital
from medfed.wire import Refused, RoundRequest

Absences = tuple[tuple[str, frozenset[int]], ...]
"""By hospital's name: the rounds, from 1 on, in which it takes no part."""

Handle = Callable[[bytes], bytes]


def absent_in(absences: Absences, name: str) -> frozenset[int]:
    """The rounds in which the hospital ``name`` takes no part."""
    return frozenset(number for who, rounds in absences if who == name for number in rounds)


def handle_of(hospital: Hospital, rounds: frozenset[int]) -> Handle:
    """What answers for ``hospital``; in ``rounds`` it says at once that it has failed, before anything is charged or read."""
    if not rounds:
        return hospital.handle

    def handle(frame: bytes) -> bytes:
        message = hospital.read(frame)
        if isinstance(message, RoundRequest) and message.round + 1 in rounds:
            return hospital.refuse(message, Refused.INTERNAL)
        return hospital.handle(frame)

    return handle
