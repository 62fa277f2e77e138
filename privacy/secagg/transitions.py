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
    """The noised integers are ready. ``words``: how many. Entropy: ``Party.mask_entropy_bytes``."""

    words: int


@dataclass(frozen=True, slots=True)
class Masked:
    """The vector is masked. ``words_hash``: SHA-256 of the masked words' bytes."""

    words_hash: bytes


Boxes: TypeAlias = tuple[tuple[int, bytes], ...]
"""Sender and box, ascending."""


@dataclass(frozen=True, slots=True)
class Fast:
    """All uploaded: shares of all others' self masks are asked for."""

    boxes: Boxes


@dataclass(frozen=True, slots=True)
class Survivors:
    """The frozen survivor set to vote on: ascending positions."""

    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """Votes of at least m survivors on the one set: shares of its members' self masks and seeds of the drop-outs are asked for.

    ``votes``: voter and signature.
    """

    members: tuple[int, ...]
    votes: tuple[tuple[int, bytes], ...]
    boxes: Boxes


@dataclass(frozen=True, slots=True)
class Close:
    """The round is over, whatever its outcome."""

    reason: CloseReason


@dataclass(frozen=True, slots=True)
class Offered:
    """Aggregator: one hospital's signed offer."""

    offer: bytes


@dataclass(frozen=True, slots=True)
class Settle:
    """Aggregator: those whose offers are in are the cohort."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Aggregator: an attempt begins. ``task`` as in ``Round``. ``expected``: whose uploads are taken; after a crash the
    survivors that hospitals may already have been asked to vote on, else the whole cohort."""

    attempt: int
    task: bytes
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Aggregator: one hospital's upload."""

    payload: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Freeze:
    """Aggregator: no more uploads; those in the sum are the survivors."""


@dataclass(frozen=True, slots=True)
class Voted:
    """Aggregator: one hospital's vote on the survivors."""

    position: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Released:
    """Aggregator: one hospital's release."""

    position: int
    payload: bytes


PartyEvent: TypeAlias = Begin | Offers | Round | Vector | Masked | Fast | Survivors | Certificate | Close
AggregatorEvent: TypeAlias = Offered | Settle | Opened | Uploaded | Freeze | Voted | Released | Close
_REMOTE: Final = (Offers, Fast, Survivors, Certificate, Offered, Uploaded, Voted, Released)


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``head``, then a signature over ``signed``."""

    head: bytes = field(repr=False)
    signed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SendVector:
    """Send ``head``, the masked words, ``tail``, then a signature over ``signed``."""

    head: bytes
    tail: bytes
    signed: bytes


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the upload's exact bytes durable under ``context`` before they are sent: resends must be identical."""

    context: bytes


@dataclass(frozen=True, slots=True)
class MaskVector:
    """Add (``signs`` +1) or subtract (-1) one pad a peer, and add the self mask's where there is one. ``streams``: AES-256 key
    and nonce, 44 bytes each."""

    streams: tuple[bytes, ...] = field(repr=False)
    signs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SumInto:
    """Add the words of the payload just verified to the running sum."""

    words: memoryview


@dataclass(frozen=True, slots=True)
class Unmask:
    """Take the pads that are left off the running sum: add (``signs`` +1) or subtract (-1) each. ``streams`` as above."""

    streams: tuple[bytes, ...] = field(repr=False)
    signs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Erase:
    """Forget everything of the round: buffers, seeds, the running sum."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Report an error of the fixed list although the state has moved."""

    code: int
    what: str


PartyEffect: TypeAlias = Send | SendVector | Persist | MaskVector | Erase
AggregatorEffect: TypeAlias = SumInto | Unmask | Erase | Fail


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
    ((_P.VOTED,), Survivors, (_P.VOTED,)),  # [13: the same set again: identical bytes]
    ((_P.RELEASED,), Fast, (_P.RELEASED,)),  # [15: the same request again: identical bytes]
    ((_P.RELEASED,), Survivors, (_P.RELEASED,)),  # [13]
    ((_P.RELEASED,), Certificate, (_P.RELEASED,)),  # [15]
    ((_P.READY, *_IN_ROUND), Close, (_P.READY,)),  # [16]
)

_A = AggregatorPhase
_RUNNING: Final = (_A.OPEN, _A.VOTING, _A.RELEASING, _A.DONE, _A.FAILED)
_AGGREGATOR_ROWS: Final[
    tuple[tuple[tuple[AggregatorPhase, ...], type[AggregatorEvent], tuple[AggregatorPhase, ...]], ...]
] = (
    ((_A.OFFERS,), Offered, (_A.OFFERS, _A.READY)),  # [all in: READY]
    ((_A.READY, *_RUNNING), Offered, (_A.READY, *_RUNNING)),  # [a repeat: no move]
    ((_A.OFFERS,), Settle, (_A.READY,)),  # [enough in]
    ((_A.READY, _A.DONE, _A.FAILED), Opened, (_A.OPEN,)),  # [5]
    ((_A.OPEN,), Uploaded, (_A.OPEN, _A.DONE)),  # [strict and all in: DONE]
    ((_A.VOTING, _A.RELEASING, _A.DONE), Uploaded, (_A.VOTING, _A.RELEASING, _A.DONE)),  # [a repeat, or two-faced]
    ((_A.OPEN,), Freeze, (_A.VOTING, _A.RELEASING)),  # [all in: RELEASING; m or more: VOTING; not strict]
    ((_A.VOTING,), Voted, (_A.VOTING, _A.RELEASING)),  # [all survivors': RELEASING]
    ((_A.RELEASING, _A.DONE), Voted, (_A.RELEASING, _A.DONE)),  # [a repeat]
    ((_A.RELEASING,), Released, (_A.RELEASING, _A.DONE, _A.FAILED)),  # [enough: DONE, or FAILED if they do not fit]
    ((_A.DONE,), Released, (_A.DONE,)),  # [not needed any more]
    ((_A.OPEN, _A.VOTING, _A.RELEASING, _A.DONE, _A.FAILED), Close, (_A.FAILED,)),
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
