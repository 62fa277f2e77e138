"""The coordinator's side of secure aggregation: the pure ``step`` and ``Aggregator``, which runs it.

Source: medfed's secure aggregation design, sections 3, 5, 6 and 12; Bonawitz et al. 2017, figure 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

import numpy as np

from medfed.errors import LocalProtocolError, RemoteProtocolError
from medfed.identity import verify
from medfed.privacy.secagg.keys import read_offers, verify_offer
from medfed.privacy.secagg.protocol import (
    HASH_BYTES,
    AggregatorConfig,
    RingWords,
    context_hash,
    parse_offer,
    parse_upload,
    split_offer,
    transcript_hash,
    upload_signature_input,
    view_words,
)
from medfed.privacy.secagg.transitions import (
    AGGREGATOR_TABLE,
    AggregatorEffect,
    AggregatorEvent,
    AggregatorPhase,
    Close,
    CloseReason,
    Erase,
    Fail,
    Offered,
    Round,
    SumInto,
    Uploaded,
    unexpected,
)


@dataclass(frozen=True, slots=True)
class AggregatorState:
    """All that ``step`` knows; nothing of it is secret.

    ``offers``: signed offer by position, ``b""`` where not yet in. ``receipts``: hash and signature of the first valid
    upload by position, ``b""`` where not yet in. ``quarantined``: hospitals that signed two different uploads for one
    attempt; nothing more is taken from them in this session.
    """

    config: AggregatorConfig
    offers: tuple[bytes, ...]
    receipts: tuple[bytes, ...]
    phase: AggregatorPhase = AggregatorPhase.OFFERS
    transcript: bytes = b""
    highest_attempt: int = 0
    context: bytes = b""
    quarantined: frozenset[int] = frozenset()


Outcome: TypeAlias = tuple[AggregatorState, tuple[AggregatorEffect, ...]]


def new_state(config: AggregatorConfig) -> AggregatorState:
    """Before any offer."""
    nothing = (b"",) * config.hospitals
    return AggregatorState(config, nothing, nothing)


def step(state: AggregatorState, event: AggregatorEvent, *, entropy: bytes, now: float) -> Outcome:
    """One move of the coordinator: the new state, and what the runner must do, in order.

    The coordinator needs no randomness, and in strict mode no rule depends on ``now``: the caller decides when a round's
    deadline has passed. Raises ``ProtocolError``; the old state then still holds.

    *Guarantees*: ``SumInto`` at most once for each hospital and attempt, and only for words signed by the pinned identity
    for exactly this session, attempt and task; DONE only when every hospital is in the sum.
    """
    following = AGGREGATOR_TABLE.get((state.phase, type(event)))
    if following is None:
        raise unexpected(state.phase, event)
    outcome = _move(state, event)
    if outcome[0].phase not in following:
        raise LocalProtocolError(900, f"move to {outcome[0].phase.value}", "report this as a defect")
    return outcome


def _move(state: AggregatorState, event: AggregatorEvent) -> Outcome:
    match event:
        case Offered():
            return _take_offer(state, event)
        case Round():
            return _open_round(state, event)
        case Uploaded():
            return _take_upload(state, event)
        case Close():
            return replace(state, phase=AggregatorPhase.FAILED, context=b""), (Erase(),)
        case _:
            assert_never(event)


def _take_offer(state: AggregatorState, event: Offered) -> Outcome:
    _, offer = verify_offer(event.offer, state.config)
    known = state.offers[offer.position]
    if known == event.offer:
        return state, ()
    if known:
        raise RemoteProtocolError(
            183, f"hospital {offer.position} offers another key", "it has restarted: begin a new setup"
        )
    offers = _put(state.offers, offer.position, event.offer)
    if not all(offers):
        return replace(state, offers=offers), ()
    bodies, _ = read_offers(offers, state.config)
    transcript = transcript_hash(state.config, bodies)
    return replace(state, offers=offers, phase=AggregatorPhase.READY, transcript=transcript), ()


def _open_round(state: AggregatorState, event: Round) -> Outcome:
    if not state.highest_attempt < event.attempt < 1 << 64:
        raise LocalProtocolError(
            181, f"attempt {event.attempt} after attempt {state.highest_attempt}", "attempts only increase"
        )
    if len(event.task) != HASH_BYTES:
        raise LocalProtocolError(182, "task hash is not 32 bytes long", "report this as a defect")
    opened = replace(
        state,
        phase=AggregatorPhase.OPEN,
        highest_attempt=event.attempt,
        context=context_hash(state.config, state.transcript, event.attempt, event.task),
        receipts=(b"",) * state.config.hospitals,
    )
    return opened, (Erase(),)


def _take_upload(state: AggregatorState, event: Uploaded) -> Outcome:
    parts = parse_upload(event.payload, state.config, state.transcript, state.highest_attempt)
    if parts.position in state.quarantined:
        raise RemoteProtocolError(183, f"hospital {parts.position} is quarantined", "begin a new setup")
    words_hash = hashlib.sha256(parts.words).digest()
    receipt = words_hash + parts.signature
    known = state.receipts[parts.position]
    if known == receipt:
        return state, ()
    signed = upload_signature_input(state.context, parts.position, words_hash)
    verify(state.config.identities[parts.position], parts.signature, signed)
    if known:
        # only now: unsigned bytes must not put an honest hospital into quarantine
        quarantined = state.quarantined | {parts.position}
        what = f"hospital {parts.position} signed two uploads for attempt {state.highest_attempt}"
        return replace(state, quarantined=quarantined), (Fail(183, what),)
    receipts = _put(state.receipts, parts.position, receipt)
    phase = AggregatorPhase.DONE if all(receipts) else AggregatorPhase.OPEN
    return replace(state, receipts=receipts, phase=phase), (SumInto(parts.words),)


def _put(items: tuple[bytes, ...], position: int, item: bytes) -> tuple[bytes, ...]:
    return (*items[:position], item, *items[position + 1 :])


class Aggregator:
    """Runs the coordinator through one session: gathers offers, then sums one round after another.

    After a restart ``from_offers`` continues the session from the stored offers; hospitals then send their uploads again.
    """

    def __init__(self, config: AggregatorConfig) -> None:
        self._state = new_state(config)
        self._buffer = bytearray(config.vector_bytes)
        self._sum = view_words(self._buffer, config.ring_bits)

    @classmethod
    def from_offers(cls, config: AggregatorConfig, offers: Sequence[bytes]) -> Aggregator:
        """The session whose signed offers were stored; each is checked again. Raises as ``add_offer``."""
        aggregator = cls(config)
        for offer in offers:
            aggregator.add_offer(offer)
        return aggregator

    @property
    def phase(self) -> AggregatorPhase:
        return self._state.phase

    @property
    def transcript(self) -> bytes:
        """T, 32 bytes; empty before all offers are in."""
        return self._state.transcript

    @property
    def offers_complete(self) -> bool:
        return all(self._state.offers)

    @property
    def missing_offers(self) -> frozenset[int]:
        """Positions whose offer is not yet in."""
        return _absent(self._state.offers)

    @property
    def missing(self) -> frozenset[int]:
        """Positions whose upload for the last opened attempt is not in the sum."""
        return _absent(self._state.receipts)

    @property
    def quarantined(self) -> frozenset[int]:
        """Positions that signed two different uploads for one attempt."""
        return self._state.quarantined

    def add_offer(self, offer: bytes) -> int:
        """Verify and keep a hospital's signed offer; returns its position. The same bytes again change nothing.

        Raises ``RemoteProtocolError``: MF-103, 110, 111, 112; MF-170 two hospitals with one key; MF-183 another offer than
        before: that hospital has restarted, so make a new ``Aggregator`` and begin a new setup.
        """
        self._step(Offered(offer))
        return parse_offer(split_offer(offer)[0], self._state.config).position

    def offers(self) -> tuple[bytes, ...]:
        """All signed offers by position, to store and to relay; MF-104 before all are in."""
        if not self.offers_complete:
            raise LocalProtocolError(104, "offers are not complete", "wait for all hospitals")
        return self._state.offers

    def open_round(self, attempt: int, task_hash: bytes) -> None:
        """Begin an attempt; an attempt still open is closed first with ``close_round``.

        Raises ``LocalProtocolError``: MF-104 not ready, MF-181 unless ``attempt`` exceeds every earlier one.
        """
        self._step(Round(attempt, task_hash))

    def add_upload(self, payload: bytes | memoryview) -> int:
        """Verify an upload and add it to the sum; returns its position. The same bytes again change nothing.

        Raises ``RemoteProtocolError`` and leaves the sum as it was: MF-180 length, ring; MF-102 version; MF-182 session or
        attempt; MF-111 position; MF-110 signature, which is also what a hospital gives that trains another model; MF-104
        no round is open; MF-183 other signed bytes than before: the sender is quarantined, the first upload stays.
        """
        self._step(Uploaded(payload))
        return parse_upload(payload, self._state.config, self.transcript, self._state.highest_attempt).position

    def total(self) -> RingWords:
        """Sum of all hospitals' vectors, ring words[D]: two's complement of the integer sum. A copy.

        Raises ``LocalProtocolError`` (MF-104) while any hospital is missing: a partial sum is only noise.
        """
        self._check_done()
        return self._sum.copy()

    def total_bytes(self) -> memoryview:
        """``total`` as it travels, little-endian words: no copy, so it is zeros again once a round is opened or closed.

        Raises as ``total``.
        """
        self._check_done()
        return memoryview(self._buffer).toreadonly()

    def _check_done(self) -> None:
        if self._state.phase is not AggregatorPhase.DONE:
            raise LocalProtocolError(104, "the sum is not complete", "wait for all hospitals or close the round")

    def close_round(self, reason: CloseReason = CloseReason.DEADLINE) -> None:
        """Give up an attempt, or forget its sum. It is final: the next attempt has a higher number."""
        self._step(Close(reason))

    def _step(self, event: AggregatorEvent) -> None:
        self._state, effects = step(self._state, event, entropy=b"", now=0.0)
        for effect in effects:
            match effect:
                case SumInto():
                    np.add(self._sum, view_words(effect.words, self._state.config.ring_bits), out=self._sum)
                case Erase():
                    self._sum[:] = 0
                case Fail():
                    raise RemoteProtocolError(effect.code, effect.what, "begin a new setup without it")
                case _:
                    assert_never(effect)


def _absent(items: tuple[bytes, ...]) -> frozenset[int]:
    return frozenset(position for position, item in enumerate(items) if not item)
