"""``journal.jsonl``: what became of every attempt of a run, as the coordinator recorded it, in lines that are chained.

Each line holds the hash of the one before, and the hash of the last stands in the statement that all hospitals sign: no line
can be changed, dropped or added afterwards. What the coordinator wrote in the first place is its own word, but for what
hospitals signed: the state that the last round started from (signatures of those in its sum are in the last line), the final
one, and how many attempts each was charged: not fewer than the sums that the journal says it is in.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from medfed.errors import RemoteProtocolError
from medfed.identity import verify
from medfed.privacy.statement import Statement, canonical
from medfed.roster import Hex32
from medfed.wire import enc, state_statement

Position = Annotated[int, Field(ge=0, le=127)]
HexSignature = Annotated[str, Field(pattern=r"^([0-9a-f]{128})?$")]

LIMIT_BYTES = 1 << 26
_LABEL = b"medfed/journal/v1"
_NOTHING = "0" * 64


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    previous: Hex32


class BeginLine(_Line):
    """What the run is about."""

    kind: Literal["begin"]
    format: Literal["medfed-journal-1"]
    study_sha256: Hex32
    roster_sha256: Hex32
    attempts_approved: Annotated[int, Field(ge=1)]


class CompletedLine(_Line):
    """An attempt that opened a sum: ``round`` = 1, 2, ..., the state that follows from it, one hospital's upload.

    ``survivors``: positions of the hospitals in the sum, ascending.
    """

    kind: Literal["completed"]
    attempt: Annotated[int, Field(ge=1)]
    round: Annotated[int, Field(ge=1)]
    state_sha256: Hex32
    upload_bytes: Annotated[int, Field(ge=0)]
    survivors: Annotated[list[Position], Field(max_length=128)]


class LostLine(_Line):
    """An attempt that opened nothing; charged wherever it arrived."""

    kind: Literal["lost"]
    attempt: Annotated[int, Field(ge=1)]


class EndLine(_Line):
    """``signatures``: by position, over the state that the last round started from; "" of a hospital that was not in its sum."""

    kind: Literal["end"]
    signatures: Annotated[list[HexSignature], Field(max_length=128)]


Line = BeginLine | CompletedLine | LostLine | EndLine
_READER: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


@dataclass(frozen=True, slots=True)
class Completed:
    """One completed round for the journal; ``state``: SHA-256 of what followed from it. ``survivors``: as in the line."""

    round: int
    attempt: int
    state: bytes
    upload_bytes: int
    survivors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """What a journal tells: how many attempts were ``lost``, and by position how many sums hold each hospital's upload."""

    lost: int
    survived: tuple[int, ...]


def write_journal(
    study_hash: bytes,
    roster_hash: bytes,
    attempts: tuple[int, int],
    completed: Iterable[Completed],
    signatures: Sequence[bytes],
) -> bytes:
    """The journal of a run of ``attempts`` = (used, approved); an attempt that completed no round was lost.

    ``signatures``: by position, 64 bytes each, none of a hospital that was not in the last sum.
    """
    by_attempt = {each.attempt: each for each in completed}
    used, approved = attempts
    chain = _Chain()
    chain.add(
        BeginLine(
            kind="begin",
            format="medfed-journal-1",
            study_sha256=study_hash.hex(),
            roster_sha256=roster_hash.hex(),
            attempts_approved=approved,
            previous=chain.head,
        )
    )
    for attempt in range(1, used + 1):
        done = by_attempt.get(attempt)
        if done is None:
            chain.add(LostLine(kind="lost", attempt=attempt, previous=chain.head))
        else:
            chain.add(
                CompletedLine(
                    kind="completed",
                    attempt=attempt,
                    round=done.round,
                    state_sha256=done.state.hex(),
                    upload_bytes=done.upload_bytes,
                    survivors=list(done.survivors),
                    previous=chain.head,
                )
            )
    chain.add(EndLine(kind="end", signatures=[each.hex() for each in signatures], previous=chain.head))
    return b"".join(line + b"\n" for line in chain.lines)


class _Chain:
    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.head = _NOTHING

    def add(self, line: Line) -> None:
        data = canonical(line)
        self.lines.append(data)
        self.head = line_hash(data)


def line_hash(line: bytes) -> str:
    """What the next line holds, 64 hex digits; ``line`` without its end."""
    return hashlib.sha256(enc(_LABEL, line)).hexdigest()


def journal_hash(data: bytes) -> bytes:
    """The hash of the last line, 32 bytes: what the statement names."""
    return bytes.fromhex(line_hash(data.rstrip(b"\n").rpartition(b"\n")[2]))


def check_journal(data: bytes, said: Statement, identities: Sequence[bytes]) -> Told:
    """What it tells. Raises MF-194 unless the journal is whole and tells the run of this statement.

    ``identities``: Ed25519 keys by position.
    """
    begin, *attempts, end = _chained(data, said.journal_sha256)
    if not isinstance(begin, BeginLine) or not isinstance(end, EndLine):
        raise _refused("its first or last line is another")
    named = (begin.study_sha256, begin.roster_sha256, begin.attempts_approved)
    _require(named == (said.study_sha256, said.roster_sha256, said.attempts_approved), "it is of another study")
    numbers = [line.attempt for line in attempts if isinstance(line, CompletedLine | LostLine)]
    _require(numbers == list(range(1, len(attempts) + 1)), "its attempts are not counted from 1 on")
    _require(len(attempts) == said.attempts_used <= said.attempts_approved, "it has another number of attempts")
    rounds = [line for line in attempts if isinstance(line, CompletedLine)]
    _require(0 < len(rounds) == said.released_sums, "rounds are missing")
    _require([line.round for line in rounds] == list(range(1, len(rounds) + 1)), "rounds are missing")
    _require(rounds[-1].state_sha256 == said.state_sha256, "it ends with another state")
    for line in rounds:
        _check_survivors(line, said, len(identities))
    _check_signatures(end, rounds, said, identities)
    sums = Counter(position for line in rounds for position in line.survivors)
    return Told(len(attempts) - len(rounds), tuple(sums[position] for position in range(len(identities))))


def _chained(data: bytes, head: str) -> list[Line]:
    """The lines of a chain that is whole, from the first to the one that ``head`` names: at least three."""
    *lines, rest = data.split(b"\n")
    _require(rest == b"" and len(lines) >= 3, "it is cut short")
    try:
        read = [_READER.validate_json(line) for line in lines]
    except ValidationError as error:
        raise _refused("a line is malformed") from error
    expected = [_NOTHING, *map(line_hash, lines)]
    for number, (line, before) in enumerate(zip(read, expected[:-1], strict=True), start=1):
        _require(line.previous == before, f"its chain is broken at line {number}")
    _require(expected[-1] == head, "it is not the one that hospitals signed")
    return read


def _check_survivors(line: CompletedLine, said: Statement, hospitals: int) -> None:
    """A part of the roster, each once and in its order, of as many as a sum must have."""
    ascending = all(one < other for one, other in pairwise((-1, *line.survivors, hospitals)))
    _require(ascending, f"round {line.round} sums hospitals that are not in the roster, or one twice")
    _require(len(line.survivors) >= said.fewest_survivors, f"round {line.round} is a sum of too few hospitals")


def _check_signatures(
    end: EndLine, rounds: Sequence[CompletedLine], said: Statement, identities: Sequence[bytes]
) -> None:
    """Before the only round of a run nothing had been released, and the state is the first model's."""
    signers = [position for position, signature in enumerate(end.signatures) if signature]
    whole = len(end.signatures) == len(identities) and signers == rounds[-1].survivors
    _require(whole, "a signature of a hospital in the last sum is missing, or there is one more")
    if len(rounds) < 2:
        return
    before = rounds[-2]
    signed = state_statement(bytes.fromhex(said.study_sha256), before.round, bytes.fromhex(before.state_sha256))
    for position in signers:
        verify(identities[position], bytes.fromhex(end.signatures[position]), signed)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _refused(what)


def _refused(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(194, f"the journal does not fit: {what}", "do not rely on this run; ask the coordinator")
