"""Histories of coded events -> tokens int64[n, length, 2], by the study's contract. No list of codes: nobody's codes shape it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medfed.models.text_records import hashed_word
from medfed.record_parts import GAPS, Events


@dataclass(frozen=True, slots=True, eq=False)
class CodedEvents:
    """One row an event, in any order: ``records`` int64[m], the index of the record that it belongs to; ``days`` float64[m],
    finite; ``codes``: m codes, none empty. ``repr`` shows no content."""

    records: NDArray[np.int64] = field(repr=False)
    days: NDArray[np.float64] = field(repr=False)
    codes: tuple[str, ...] = field(repr=False)


def encode_events(contract: Events, count: int, events: CodedEvents) -> NDArray[np.int64]:
    """int64[count, length, 2] as ``medfed.record_parts.Events`` documents; a record without events is padding alone.

    *Guarantees*: a record's encoding depends on its own events and their order alone; the same code is the same token everywhere.
    """
    token = functools.cache(lambda code: hashed_word(code.upper(), contract.buckets))
    encoded = np.zeros((count, *contract.shape), np.int64)
    order = np.lexsort((np.arange(len(events.days)), events.days, events.records))
    ends = np.searchsorted(events.records[order], np.arange(count), side="right")
    begin = 0
    for record, end in enumerate(ends.tolist()):
        own = order[max(begin, end - contract.length) : end]
        encoded[record, : len(own), 0] = [token(events.codes[event]) for event in own.tolist()]
        encoded[record, : len(own), 1] = 1 + contract.buckets + gaps(events.days[own])
        begin = end
    return encoded


def gaps(days: NDArray[np.float64]) -> NDArray[np.int64]:
    """Days of a record's events, ascending -> how long before the last each was: 0 within a day, k from 2^(k - 1) days on."""
    before = days[-1] - days if len(days) else days
    powers = np.floor(np.log2(np.maximum(before, 1.0))).astype(np.int64) + 1
    return np.where(before < 1.0, 0, np.minimum(powers, GAPS - 1))


def shown_gap(place: int) -> str:
    """A gap in words."""
    if place == 0:
        return "within a day of the last"
    more = "" if place < GAPS - 1 else " or more"
    return f"{1 << (place - 1)} days{more} before the last"
