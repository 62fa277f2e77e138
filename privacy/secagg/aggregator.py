"""The coordinator's side of secure aggregation: the pure ``step`` and ``Aggregator``, which runs it.

Source: medfed's secure aggregation design, sections 3, 5, 6 and 12; Bonawitz et al. 2017, figure 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, assert_never

import numpy as np

from medfed.errors import LocalProtocolError, PrivacyError, RemoteProtocolError
from medfed.identity import verify
from medfed.privacy.secagg import recovery
from medfed.privacy.secagg.keys import canonical_key, check_key, read_offers, verify_offer
from medfed.privacy.secagg.masks import Masker
from medfed.privacy.secagg.messages import (
    ReleaseEntry,
    parse_offer,
    parse_release,
    parse_upload,
    release_signature_input,
    split_offer,
    upload_signature_input,
    vote_input,
)
from medfed.privacy.secagg.protocol import (
    BOX_ENTRY_BYTES,
    HASH_BYTES,
    AggregatorConfig,
    Cohort,
    RingWords,
    be16,
    context_hash,
    transcript_hash,
    view_words,
)
from medfed.privacy.secagg.transitions import (
    AGGREGATOR_TABLE,
    AggregatorEffect,
    AggregatorEvent,
    AggregatorPhase,
    Boxes,
    Close,
    CloseReason,
    Erase,
    Fail,
    Freeze,
    Offered,
    Opened,
    Released,
    Settle,
    SumInto,
    Unmask,
    Uploaded,
    Voted,
    unexpected,
)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is kept of an upload: the words are in the sum. ``commitment``, ``boxes``: empty in strict mode."""

    words_hash: bytes
    commitment: bytes
    boxes: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class AggregatorState:
    """All that ``step`` knows; nothing of it is secret before hospitals release it.

    By position: ``offers``, signed; ``receipts`` of the first valid uploads; ``votes``; ``releases``. ``cohort``: U1, once
    settled. ``expected``: whose uploads are taken. ``survivors``: U2, once frozen. ``quarantined``: hospitals that signed two
    different uploads for one attempt; no more uploads are taken from them in this session.
    """

    config: AggregatorConfig
    offers: dict[int, bytes] = field(default_factory=dict)
    phase: AggregatorPhase = AggregatorPhase.OFFERS
    cohort: Cohort | None = None
    transcript: bytes = b""
    highest_attempt: int = 0
    context: bytes = b""
    expected: tuple[int, ...] = ()
    receipts: dict[int, Receipt] = field(default_factory=dict)
    survivors: tuple[int, ...] = ()
    votes: dict[int, bytes] = field(default_factory=dict)
    releases: dict[int, tuple[ReleaseEntry, ...]] = field(default_factory=dict)
    quarantined: frozenset[int] = frozenset()
    suspects: frozenset[int] = frozenset()

    @property
    def settled(self) -> Cohort:
        """U1. MF-104 before the setup is complete."""
        if self.cohort is None:
            raise LocalProtocolError(104, "offers are not complete", "wait for all hospitals")
        return self.cohort


Outcome: TypeAlias = tuple[AggregatorState, tuple[AggregatorEffect, ...]]


def step(state: AggregatorState, event: AggregatorEvent, *, entropy: bytes, now: float) -> Outcome:
    """One move of the coordinator: the new state, and what the runner must do, in order.

    The coordinator needs no randomness, and no rule depends on ``now``: the caller decides when to wait no longer. Raises
    ``ProtocolError`` or ``PrivacyError``; the old state then still holds.

    *Guarantees*: ``SumInto`` at most once for each hospital and attempt, and only for words signed by the pinned identity
    for exactly this session, attempt and task; DONE only when the sum holds m hospitals or more and no pad.
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
        case Settle():
            return _settle(state), ()
        case Opened():
            return _open_round(state, event)
        case Uploaded():
            return _take_upload(state, event)
        case Freeze():
            return _freeze(state), ()
        case Voted():
            return _take_vote(state, event), ()
        case Released():
            return _take_release(state, event)
        case Close():
            return replace(state, phase=AggregatorPhase.FAILED, context=b"", receipts={}, releases={}), (Erase(),)
        case _:
            assert_never(event)


def _take_offer(state: AggregatorState, event: Offered) -> Outcome:
    _, offer = verify_offer(event.offer, state.config)
    known = state.offers.get(offer.position)
    check_key(offer)
    if known == event.offer:
        return state, ()
    if known:
        raise RemoteProtocolError(
            183, f"hospital {offer.position} offers another key", "it has restarted: begin a new setup"
        )
    if state.phase is not AggregatorPhase.OFFERS:
        raise RemoteProtocolError(104, "an offer after the setup", "it takes part in the next one")
    others = (parse_offer(split_offer(other)[0], state.config) for other in state.offers.values())
    keys = {canonical_key(other.key) for other in others}
    if canonical_key(offer.key) in keys:
        raise RemoteProtocolError(170, f"hospital {offer.position} offers another one's key", "refused; ask the sender")
    taken = replace(state, offers={**state.offers, offer.position: event.offer})
    everybody = len(taken.offers) == min(len(state.config.identities), state.config.most_hospitals)
    return (_settle(taken) if everybody else taken), ()


def _settle(state: AggregatorState) -> AggregatorState:
    cohort, bodies, _ = read_offers([state.offers[member] for member in sorted(state.offers)], state.config)
    transcript = transcript_hash(state.config, bodies)
    return replace(state, phase=AggregatorPhase.READY, cohort=cohort, transcript=transcript)


def _open_round(state: AggregatorState, event: Opened) -> Outcome:
    if not state.highest_attempt < event.attempt < 1 << 64:
        raise LocalProtocolError(
            181, f"attempt {event.attempt} after attempt {state.highest_attempt}", "attempts only increase"
        )
    if len(event.task) != HASH_BYTES:
        raise LocalProtocolError(182, "task hash is not 32 bytes long", "report this as a defect")
    cohort = state.settled
    if not cohort.thresholds.survivors <= len(event.expected) or not set(event.expected) <= set(cohort.members):
        raise LocalProtocolError(182, "uploads expected of others than the cohort", "report this as a defect")
    opened = replace(
        state,
        phase=AggregatorPhase.OPEN,
        highest_attempt=event.attempt,
        context=context_hash(cohort, state.transcript, event.attempt, event.task),
        expected=event.expected,
        receipts={},
        survivors=(),
        votes={},
        releases={},
        suspects=frozenset(),
    )
    return opened, (Erase(),)


def _take_upload(state: AggregatorState, event: Uploaded) -> Outcome:
    parts = parse_upload(event.payload, state.settled, state.transcript, state.highest_attempt)
    position = parts.position
    if position in state.quarantined:
        raise RemoteProtocolError(183, f"hospital {position} is quarantined", "begin a new setup")
    receipt = Receipt(hashlib.sha256(parts.words).digest(), parts.commitment, parts.boxes, parts.signature)
    known = state.receipts.get(position)
    if known == receipt:
        return state, ()
    signed = upload_signature_input(state.context, position, receipt.words_hash, parts.boxes, parts.commitment)
    verify(state.config.identities[position], parts.signature, signed)
    if known:
        # only now: unsigned bytes must not put an honest hospital into quarantine
        quarantined = state.quarantined | {position}
        what = f"hospital {position} signed two uploads for attempt {state.highest_attempt}"
        return replace(state, quarantined=quarantined), (Fail(183, what),)
    if state.phase is not AggregatorPhase.OPEN or position not in state.expected:
        raise RemoteProtocolError(182, f"hospital {position} uploads too late", "it takes part in the next round")
    taken = replace(state, receipts={**state.receipts, position: receipt})
    if taken.settled.is_strict and len(taken.receipts) == taken.settled.hospitals:
        taken = replace(taken, phase=AggregatorPhase.DONE, survivors=taken.settled.members)
    return taken, (SumInto(parts.words),)


def _freeze(state: AggregatorState) -> AggregatorState:
    cohort, survivors = state.settled, tuple(sorted(state.receipts))
    needed = cohort.thresholds.survivors
    if cohort.is_strict or len(survivors) < needed:
        raise PrivacyError(140, f"{len(survivors)} of {needed} uploads are in", "the round is lost; the next one works")
    phase = AggregatorPhase.RELEASING if survivors == cohort.members else AggregatorPhase.VOTING
    return replace(state, phase=phase, survivors=survivors)


def _take_vote(state: AggregatorState, event: Voted) -> AggregatorState:
    _check_survivor(state, event.position)
    verify(
        state.config.identities[event.position],
        event.signature,
        vote_input(state.context, event.position, state.survivors),
    )
    if state.phase is not AggregatorPhase.VOTING or event.position in state.votes:
        # the first stands: hospitals may have been shown it. Where all of the cohort uploaded none is asked for: one that
        # came all the same would stand in the requests for releases, which hospitals then refuse
        return state
    votes = {**state.votes, event.position: event.signature}
    # of a drop-out's seeds every survivor holds one, so that there is no sum without the answer of each
    everybody = len(votes) == len(state.survivors)
    return replace(state, votes=votes, phase=AggregatorPhase.RELEASING if everybody else state.phase)


def _take_release(state: AggregatorState, event: Released) -> Outcome:
    _check_survivor(state, event.position)
    cohort = state.settled
    body, entries, signature = parse_release(event.payload, cohort, event.position, state.survivors)
    identity = state.config.identities[event.position]
    verify(identity, signature, release_signature_input(state.context, event.position, body))
    if state.phase is AggregatorPhase.DONE:
        return state, ()
    releases = {**state.releases, event.position: entries}
    taken = replace(state, releases=releases)
    if not recovery.is_enough(cohort, state.survivors, releases):
        return taken, ()
    commitments = {position: receipt.commitment for position, receipt in state.receipts.items()}
    try:
        pads = recovery.pads_left(cohort, state.context, state.survivors, commitments, releases)
    except RemoteProtocolError as error:
        if len(releases) < len(state.survivors):
            return taken, ()  # those still to come may make it up
        found = recovery.misfits(cohort, state.context, state.survivors, commitments, releases)
        failed = replace(taken, phase=AggregatorPhase.FAILED, context=b"", suspects=found)
        return failed, (Erase(), Fail(error.code, error.what))
    return replace(taken, phase=AggregatorPhase.DONE, releases={}), (Unmask(pads.streams, pads.signs),)


def _check_survivor(state: AggregatorState, position: int) -> None:
    if position not in state.survivors:
        raise RemoteProtocolError(111, f"hospital {position} is not among the survivors", "refused")


class Aggregator:
    """Runs the coordinator through one session: gathers offers, then sums one round after another.

    After a restart ``from_offers`` continues the session from the stored offers; hospitals then send their uploads again.
    """

    def __init__(self, config: AggregatorConfig) -> None:
        self._state = AggregatorState(config)
        self._buffer = bytearray(config.vector_bytes)
        self._sum = view_words(self._buffer, config.ring_bits)
        self._masker: Masker | None = None  # not needed in strict mode

    @classmethod
    def from_offers(cls, config: AggregatorConfig, offers: Sequence[bytes]) -> Aggregator:
        """The session whose signed offers were stored; each is checked again. Raises as ``add_offer``."""
        aggregator = cls(config)
        for offer in offers:
            aggregator.add_offer(offer)
        aggregator.settle()
        return aggregator

    @property
    def phase(self) -> AggregatorPhase:
        return self._state.phase

    @property
    def transcript(self) -> bytes:
        """T, 32 bytes; empty before the setup is settled."""
        return self._state.transcript

    @property
    def cohort(self) -> Cohort:
        """U1. MF-104 before the setup is settled."""
        return self._state.settled

    @property
    def is_settled(self) -> bool:
        return self._state.cohort is not None

    @property
    def offered(self) -> frozenset[int]:
        """Positions whose offer is in."""
        return frozenset(self._state.offers)

    @property
    def uploaded(self) -> frozenset[int]:
        """Positions whose upload for the last opened attempt is in the sum."""
        return frozenset(self._state.receipts)

    @property
    def missing(self) -> frozenset[int]:
        """Positions whose upload for the last opened attempt is expected and not in the sum."""
        return frozenset(self._state.expected) - self.uploaded

    @property
    def survivors(self) -> tuple[int, ...]:
        """U2, ascending; empty before the round is frozen."""
        return self._state.survivors

    @property
    def silent(self) -> frozenset[int]:
        """Survivors whose vote, or once all have voted whose release, is not in."""
        answered = self._state.votes if self.phase is AggregatorPhase.VOTING else self._state.releases
        return frozenset(self.survivors) - frozenset(answered)

    @property
    def quarantined(self) -> frozenset[int]:
        """Positions that signed two different uploads for one attempt."""
        return self._state.quarantined

    @property
    def suspects(self) -> frozenset[int]:
        """Who may be at fault that this attempt's sum is not open: boxes that did not open, shares that did not fit."""
        if self._state.cohort is None:
            return frozenset()
        return self._state.suspects | recovery.suspects(self.cohort, self.survivors, self._state.releases)

    def add_offer(self, offer: bytes) -> int:
        """Verify and keep a hospital's signed offer; returns its position. The same bytes again change nothing.

        Raises ``RemoteProtocolError``: MF-103, 110, 111, 112; MF-104 the setup is over; MF-170 two hospitals with one key;
        MF-183 another offer than before: that hospital has restarted, so make a new ``Aggregator`` and begin a new setup.
        """
        self._step(Offered(offer))
        return parse_offer(split_offer(offer)[0], self._state.config).position

    def settle(self) -> None:
        """Wait for no more offers: those that are in are the cohort. Harmless once it is settled, as it is when all are in.

        Raises ``RemoteProtocolError``: MF-140 fewer than the study allows; MF-141.
        """
        if not self.is_settled:
            self._step(Settle())

    def offers(self) -> tuple[bytes, ...]:
        """The cohort's signed offers by position, to store and to relay; MF-104 before the setup is settled."""
        return tuple(self._state.offers[member] for member in self.cohort.members)

    def open_round(self, attempt: int, task_hash: bytes, expected: Sequence[int] = ()) -> None:
        """Begin an attempt; an attempt still open is closed first with ``close_round``.

        ``expected``: the survivors, where the attempt was frozen before a crash; empty for the whole cohort. Raises
        ``LocalProtocolError``: MF-104 not ready, MF-181 unless ``attempt`` exceeds every earlier one.
        """
        self._step(Opened(attempt, task_hash, tuple(expected) or self.cohort.members))

    def add_upload(self, payload: bytes | memoryview, sender: int | None = None) -> int:
        """Verify an upload and add it to the sum; returns its position. The same bytes again change nothing.

        ``sender``: whose it must be, where that is known.

        Raises ``RemoteProtocolError`` and leaves the sum as it was: MF-180 length, ring; MF-102 version; MF-182 session or
        attempt, or too late; MF-111 position; MF-110 signature, which is also what a hospital gives that trains another
        model; MF-104 no round is open; MF-183 other signed bytes than before: the sender is quarantined, the first upload
        stays.
        """
        if sender is not None and bytes(payload[41:43]) != be16(sender):
            raise RemoteProtocolError(111, "an upload in another hospital's name", "refused")
        self._step(Uploaded(payload))
        return parse_upload(payload, self.cohort, self.transcript, self._state.highest_attempt).position

    def freeze(self) -> tuple[int, ...]:
        """Take no more uploads: those in the sum are the survivors, U2, which is returned.

        If it is the whole cohort releases are awaited, else votes first. Raises ``PrivacyError`` (MF-140) where fewer than m
        are in, and in strict mode.
        """
        self._step(Freeze())
        return self.survivors

    def boxes_for(self, position: int) -> Boxes:
        """The shares that all other survivors closed for this hospital: (sender, box), ascending."""
        _check_survivor(self._state, position)
        senders = (survivor for survivor in self.survivors if survivor != position)
        return tuple((sender, self._box(sender, position)) for sender in senders)

    def _box(self, sender: int, receiver: int) -> bytes:
        """Entries stand in the order of the sender's peers: that was checked when the upload was taken apart."""
        start = self.cohort.peers(sender).index(receiver) * BOX_ENTRY_BYTES
        return self._state.receipts[sender].boxes[start + 2 : start + BOX_ENTRY_BYTES]

    def add_vote(self, position: int, signature: bytes) -> None:
        """Take a survivor's vote on ``survivors``. Raises ``RemoteProtocolError``: MF-104, MF-110, MF-111."""
        self._step(Voted(position, signature))

    def certificate(self) -> tuple[tuple[int, bytes], ...]:
        """All votes, (voter, signature), ascending; none where the whole cohort survived."""
        return tuple(sorted(self._state.votes.items()))

    def add_release(self, position: int, payload: bytes) -> None:
        """Take a survivor's release; with the last one needed the sum is opened. More are checked and change nothing.

        Raises ``RemoteProtocolError``: MF-104, MF-110, MF-111, MF-180; MF-187 a release of the wrong kind, or shares that do
        not fit: if every survivor has answered, the round is then lost.
        """
        self._step(Released(position, payload))

    def total(self) -> RingWords:
        """Sum of the survivors' vectors, ring words[D]: two's complement of the integer sum. A copy.

        Raises ``LocalProtocolError`` (MF-104) while a hospital is missing or a pad is left: it is then only noise.
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
                case Unmask():
                    self._masker = self._masker or Masker(self._state.config.ring_bits)
                    self._masker.add_pads(self._sum, effect.streams, effect.signs)
                    self._masker.erase()
                case Erase():
                    self._sum[:] = 0
                case Fail():
                    raise RemoteProtocolError(effect.code, effect.what, "begin a new setup without it")
                case _:
                    assert_never(effect)
