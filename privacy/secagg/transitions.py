"""Secure aggregation as data: events, effects, states and the two tables of legal moves.

``party.step`` and ``aggregator.step`` look a pair (phase, event) up here first. A pair that is absent raises MF-104 and
leaves the state intact. Rule numbers are those of the design's section 10.

Source: medfed's secure aggregation design, section 12; Bonawitz et al. 2017, figure 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeAlias

from medfed.errors import LocalProtocolError, RemoteProtocolError


class CloseReason(Enum):
    """Why a round ends."""

    SUM = "sum"
    DEADLINE = "deadline"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Begin:
    """Make the ephemeral key. ``entropy``: 64 bytes."""


@dataclass(frozen=True, slots=True)
class Offers:
    """All signed offers, as the coordinator relays them."""

    offers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """An attempt begins. ``task``: 32 bytes naming the model and settings this side computed itself (rule 6)."""

    attempt: int
    task: bytes


@dataclass(frozen=True, slots=True)
class Vector:
    """The noised integers are ready. ``words``: how many."""

    words: int


@dataclass(frozen=True, slots=True)
class Masked:
    """The vector is masked. ``words_hash``: SHA-256 of the masked words' bytes."""

    words_hash: bytes


@dataclass(frozen=True, slots=True)
class Fast:
    """Recovery: all uploaded; shares of all others' self masks are asked for."""


@dataclass(frozen=True, slots=True)
class Survivors:
    """Recovery: the frozen survivor set to vote on."""

    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """Recovery: votes of at least m survivors on one set."""

    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """The round is over, whatever its outcome."""

    reason: CloseReason


@dataclass(frozen=True, slots=True)
class Offered:
    """Aggregator: one hospital's signed offer."""

    offer: bytes


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Aggregator: one hospital's upload."""

    payload: bytes | memoryview


PartyEvent: TypeAlias = Begin | Offers | Round | Vector | Masked | Fast | Survivors | Certificate | Close
AggregatorEvent: TypeAlias = Offered | Round | Uploaded | Close
_REMOTE: Final = (Offers, Fast, Survivors, Certificate, Offered, Uploaded)


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``head``, then the masked words where there are any, then a signature over ``signed``."""

    head: bytes
    signed: bytes


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the upload's exact bytes durable under ``context`` before they are sent: resends must be identical."""

    context: bytes


@dataclass(frozen=True, slots=True)
class MaskVector:
    """Add (``signs`` +1) or subtract (-1) one pad a peer. ``streams``: AES-256 key and nonce, 44 bytes each."""

    streams: tuple[bytes, ...] = field(repr=False)
    signs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SumInto:
    """Add the words of the payload just verified to the running sum."""

    words: memoryview


@dataclass(frozen=True, slots=True)
class Erase:
    """Forget everything of the round: buffers, seeds, the running sum."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Report an error of the fixed list although the state has moved."""

    code: int
    what: str


PartyEffect: TypeAlias = Send | Persist | MaskVector | Erase
AggregatorEffect: TypeAlias = SumInto | Erase | Fail


class PartyPhase(Enum):
    """Where a hospital stands."""

    NEW = "new"
    OFFERED = "offered"
    READY = "ready"
    TRAINING = "training"
    MASKING = "masking"
    UPLOADED = "uploaded"
    VOTED = "voted"
    RELEASED = "released"


class AggregatorPhase(Enum):
    """Where the coordinator stands."""

    OFFERS = "offers"
    READY = "ready"
    OPEN = "open"
    VOTING = "voting"
    RELEASING = "releasing"
    DONE = "done"
    FAILED = "failed"


_P = PartyPhase
_IN_ROUND: Final = (_P.TRAINING, _P.MASKING, _P.UPLOADED, _P.VOTED, _P.RELEASED)

# phases, event, next phases [guards, by rule]
_PARTY_ROWS: Final[tuple[tuple[tuple[PartyPhase, ...], type[PartyEvent], tuple[PartyPhase, ...]], ...]] = (
    ((_P.NEW,), Begin, (_P.OFFERED,)),
    ((_P.OFFERED,), Offers, (_P.READY,)),  # [1-4]
    ((_P.READY, *_IN_ROUND), Offers, (_P.READY, *_IN_ROUND)),  # [the same offers again: no move]
    ((_P.READY,), Round, (_P.TRAINING,)),  # [4-6]
    ((_P.TRAINING,), Vector, (_P.MASKING,)),  # [7-9]
    ((_P.MASKING,), Masked, (_P.UPLOADED,)),
    ((_P.UPLOADED,), Fast, (_P.RELEASED,)),  # [11-13, not strict]
    ((_P.UPLOADED,), Survivors, (_P.VOTED,)),  # [11, 13, not strict]
    ((_P.VOTED,), Certificate, (_P.RELEASED,)),  # [12, 14, not strict]
    ((_P.READY, *_IN_ROUND), Close, (_P.READY,)),  # [16]
)

_A = AggregatorPhase
_AGGREGATOR_ROWS: Final[
    tuple[tuple[tuple[AggregatorPhase, ...], type[AggregatorEvent], tuple[AggregatorPhase, ...]], ...]
] = (
    ((_A.OFFERS,), Offered, (_A.OFFERS, _A.READY)),  # [all in: READY]
    ((_A.READY, _A.OPEN, _A.DONE, _A.FAILED), Offered, (_A.READY, _A.OPEN, _A.DONE, _A.FAILED)),  # [a repeat: no move]
    ((_A.READY, _A.DONE, _A.FAILED), Round, (_A.OPEN,)),  # [5]
    ((_A.OPEN,), Uploaded, (_A.OPEN, _A.RELEASING, _A.DONE)),  # [all in: DONE where strict, else RELEASING]
    ((_A.DONE,), Uploaded, (_A.DONE,)),  # [a repeat, or two-faced]
    ((_A.OPEN,), Close, (_A.VOTING, _A.FAILED)),  # [deadline and not strict: VOTING]
    ((_A.VOTING, _A.RELEASING), Close, (_A.FAILED,)),
    ((_A.DONE, _A.FAILED), Close, (_A.FAILED,)),
)

PARTY_TABLE: Final[Mapping[tuple[PartyPhase, type[PartyEvent]], frozenset[PartyPhase]]] = {
    (phase, event): frozenset(following) for phases, event, following in _PARTY_ROWS for phase in phases
}
AGGREGATOR_TABLE: Final[Mapping[tuple[AggregatorPhase, type[AggregatorEvent]], frozenset[AggregatorPhase]]] = {
    (phase, event): frozenset(following) for phases, event, following in _AGGREGATOR_ROWS for phase in phases
}


def unexpected(phase: PartyPhase | AggregatorPhase, event: PartyEvent | AggregatorEvent) -> Exception:
    """The error for a pair that its table lacks: the peer's fault for what arrived, ours for what we called."""
    what = f"{type(event).__name__} while {phase.value}"
    if isinstance(event, _REMOTE):
        return RemoteProtocolError(104, what, "refused; nothing has changed")
    return LocalProtocolError(104, what, "report this as a defect")
