"""What must hold over the rows of a ledger, checked from the first to the last at every open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from medfed.client.ledger.entries import (
    BODIES,
    FORMAT,
    MOVES,
    NO_HASH,
    ApprovedBody,
    AttemptState,
    BegunBody,
    Entry,
    Kind,
    ReservedBody,
    StageBody,
    altered,
    damage,
    row_hash,
)
from medfed.errors import PrivacyError


def check_chain(entries: Sequence[Entry], highest_ever: int) -> None:
    """Rows are numbered from 1 without a gap, each with its own hash, a readable body and the hash of the one before.

    ``highest_ever``: SQLite's counter, which a deleted tail leaves behind.
    """
    previous = NO_HASH
    for number, entry in enumerate(entries, start=1):
        check_link(entry, number, previous)
        previous = entry.hash
    if highest_ever != len(entries):
        raise damage(402, f"ledger is truncated: {highest_ever} rows were written, {len(entries)} are there")


def check_link(entry: Entry, number: int, previous: bytes) -> None:
    """One row of the chain: row ``number``, which follows one with the hash ``previous``."""
    if entry.seq != number or entry.previous != previous:
        raise damage(404, f"ledger chain is broken at row {number}")
    contents = (entry.seq, entry.kind.value, entry.study, entry.attempt, entry.body, entry.previous)
    if entry.hash != row_hash(*contents):
        raise altered(number)
    entry.read(BODIES[entry.kind])


def check_moves(entries: Iterable[Entry]) -> None:
    """Every attempt only ever made legal moves, each in an approved study, each attempt number above the last; what was
    charged by kind of round is what the rows say; and the rosters of an approved study are counted without a gap."""
    states: dict[tuple[bytes, int], AttemptState] = {}
    highest: dict[bytes, int] = {}
    stages: dict[bytes, list[StageBody]] = {}
    charged: dict[bytes, list[int]] = {}
    rosters: Counter[bytes] = Counter()
    for entry in entries:
        if entry.kind is Kind.APPROVED:
            highest[entry.study] = 0
            stages[entry.study] = entry.read(ApprovedBody).stages
            charged[entry.study] = [0] * len(stages[entry.study])
        if entry.kind is Kind.ROSTER:
            rosters[entry.study] += 1
            if entry.study not in highest or entry.attempt != -rosters[entry.study]:
                raise altered(entry.seq)
            continue
        if entry.attempt == 0:
            continue
        key, move = (entry.study, entry.attempt), AttemptState(entry.kind.value)
        if move not in MOVES[states.get(key)] or entry.study not in highest:
            raise altered(entry.seq)
        if move is AttemptState.RESERVED:
            if entry.attempt <= highest[entry.study]:
                raise altered(entry.seq)
            highest[entry.study] = entry.attempt
            body, counts = entry.read(ReservedBody), charged[entry.study]
            for place, stage in enumerate(stages[entry.study]):
                counts[place] += stage.first_round <= body.round <= stage.last_round
            if body.charged != counts:
                raise altered(entry.seq)
        states[key] = move


def check_owner(first: Entry, public: bytes) -> None:
    """The first row begins the ledger of the holder of ``public``."""
    if first.kind is not Kind.BEGUN:
        raise altered(first.seq)
    if first.read(BegunBody).identity != public.hex():
        raise damage(404, "ledger belongs to another identity")


class _AnyBegunBody(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    format: int


def check_format(first_body: str) -> None:
    """Another medfed may have other keys and tables: its number is read before anything else is judged.

    A ledger is never rewritten, so the rows of an earlier format have no way into this one.
    """
    try:
        begun = _AnyBegunBody.model_validate_json(first_body)
    except ValidationError as error:
        raise altered(1) from error
    if begun.format != FORMAT:
        remedy = "upgrade medfed" if begun.format > FORMAT else "finish its studies with the medfed that wrote it"
        raise PrivacyError(406, f"ledger has format {begun.format}, this medfed knows {FORMAT}", remedy)
