"""A hospital's side of secure aggregation: the pure ``step`` and ``Party``, which runs it.

Source: medfed's secure aggregation design, sections 3-5, 10 and 12; Bonawitz et al. 2017, figure 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, NoReturn, TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

from medfed.errors import LocalProtocolError, RemoteProtocolError
from medfed.identity import SIGNATURE_BYTES
from medfed.privacy.secagg import release, shamir
from medfed.privacy.secagg.boxes import close_box
from medfed.privacy.secagg.keys import derive_root, leaf_seed, public_key, read_offers, stream_key
from medfed.privacy.secagg.masks import Masker
from medfed.privacy.secagg.messages import (
    Offer,
    commitment_of,
    encode_header,
    join_boxes,
    release_signature_input,
    upload_signature_input,
    vote_input,
)
from medfed.privacy.secagg.protocol import (
    HASH_BYTES,
    HEADER_BYTES,
    KEY_BYTES,
    NONCE_BYTES,
    SHARE_BYTES,
    Cohort,
    SecaggConfig,
    context_hash,
    transcript_hash,
    view_words,
)
from medfed.privacy.secagg.transitions import (
    PARTY_TABLE,
    Begin,
    Boxes,
    Certificate,
    Close,
    CloseReason,
    Erase,
    Fast,
    Masked,
    MaskVector,
    Offers,
    PartyEffect,
    PartyEvent,
    PartyPhase,
    Persist,
    Round,
    Send,
    SendVector,
    Survivors,
    Vector,
    unexpected,
)
from medfed.seams import Entropy

_CACHE_LINE: Final = 64
OFFER_ENTROPY_BYTES: Final = KEY_BYTES + NONCE_BYTES


@dataclass(frozen=True, slots=True)
class PartyState:
    """All that ``step`` knows. Lives in memory only: a restart or a copy of it means a new setup [11].

    ``private``: X25519 key, gone once the roots are made. ``cohort``: U1, once the offers are accepted. ``roots``: by peer.
    ``highest_attempt``: 0 before the first round. ``context``: ctx of the open round. ``commitment``, ``boxes``: of the open
    round, as they are uploaded; the self mask itself is gone once they are made. ``survivors``: the one set this hospital
    voted on or released for. ``released``, ``asked``: the release's body, and the request it answers.
    """

    config: SecaggConfig
    phase: PartyPhase = PartyPhase.NEW
    private: bytes = field(default=b"", repr=False)
    offer: bytes = b""
    transcript: bytes = b""
    cohort: Cohort | None = None
    roots: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    highest_attempt: int = 0
    context: bytes = b""
    commitment: bytes = b""
    boxes: bytes = field(default=b"", repr=False)
    survivors: tuple[int, ...] = ()
    released: bytes = field(default=b"", repr=False)
    asked: Fast | Certificate | None = field(default=None, repr=False)

    def __reduce__(self) -> NoReturn:
        _refuse_copy()

    @property
    def settled(self) -> Cohort:
        """U1. MF-900 before the offers are accepted."""
        if self.cohort is None:
            raise LocalProtocolError(900, "no cohort yet", "report this as a defect")
        return self.cohort

    def forgotten(self) -> PartyState:
        """The same between rounds: nothing of the round is left (rule 16)."""
        return replace(
            self,
            phase=PartyPhase.READY,
            context=b"",
            commitment=b"",
            boxes=b"",
            survivors=(),
            released=b"",
            asked=None,
        )


Outcome: TypeAlias = tuple[PartyState, tuple[PartyEffect, ...]]


def step(state: PartyState, event: PartyEvent, *, entropy: bytes, now: float) -> Outcome:
    """One move of a hospital: the new state, and what the runner must do, in order.

    ``entropy``: fresh bytes, 64 for ``Begin``, ``mask_entropy_bytes`` for ``Vector``, none otherwise. ``now``: monotonic
    seconds; no rule depends on it: when a round has lasted too long is for the caller. Raises ``ProtocolError``; the old state
    then still holds.

    *Guarantees*: no private key, root or own self mask is in any effect but ``MaskVector``; for each (transcript, attempt) at
    most one ``MaskVector``, one survivor set voted on or released for, and of each peer a share or a seed, never both;
    attempts strictly increase.
    """
    following = PARTY_TABLE.get((state.phase, type(event)))
    if following is None:
        raise unexpected(state.phase, event)
    outcome = _move(state, event, entropy)
    if outcome[0].phase not in following:
        raise LocalProtocolError(900, f"move to {outcome[0].phase.value}", "report this as a defect")
    return outcome


def _move(state: PartyState, event: PartyEvent, entropy: bytes) -> Outcome:
    match event:
        case Begin():
            return _begin(state, entropy)
        case Offers():
            return _accept_offers(state, event)
        case Round():
            return _open_round(state, event)
        case Vector():
            return _mask(state, event, entropy)
        case Masked():
            return _upload(state, event)
        case Survivors():
            return _vote(state, event)
        case Fast() | Certificate():
            return _release(state, event)
        case Close():
            return state.forgotten(), (Erase(),)
        case _:
            assert_never(event)


def _begin(state: PartyState, entropy: bytes) -> Outcome:
    if len(entropy) != OFFER_ENTROPY_BYTES:
        raise LocalProtocolError(900, f"{len(entropy)} bytes of entropy", "report this as a defect")
    private, nonce = entropy[:KEY_BYTES], entropy[KEY_BYTES:]
    offer = Offer(state.config.position, nonce, public_key(private)).encode(state.config.shared)
    return replace(state, phase=PartyPhase.OFFERED, private=private, offer=offer), (Send(offer, offer),)


def _accept_offers(state: PartyState, event: Offers) -> Outcome:
    config = state.config
    cohort, bodies, offers = read_offers(event.offers, config.shared)
    if config.position not in offers or bodies[cohort.members.index(config.position)] != state.offer:
        raise RemoteProtocolError(174, "own offer missing or changed", "start a new setup")
    transcript = transcript_hash(config.shared, bodies)
    if state.phase is not PartyPhase.OFFERED:
        if transcript != state.transcript:
            raise RemoteProtocolError(183, "other offers than those accepted before", "start a new setup")
        return state, ()
    roots = {
        peer: derive_root(state.private, offers[peer].key, transcript, config.position, peer)
        for peer in cohort.peers(config.position)
    }
    ready = replace(
        state, phase=PartyPhase.READY, private=b"", transcript=transcript, cohort=cohort, roots=MappingProxyType(roots)
    )
    return ready, ()


def _open_round(state: PartyState, event: Round) -> Outcome:
    if not state.highest_attempt < event.attempt < 1 << 64:
        raise RemoteProtocolError(
            181, f"attempt {event.attempt} after attempt {state.highest_attempt}", "refused; attempts only increase"
        )
    if len(event.task) != HASH_BYTES:
        raise LocalProtocolError(182, "task hash is not 32 bytes long", "report this as a defect")
    context = context_hash(state.settled, state.transcript, event.attempt, event.task)
    return replace(state, phase=PartyPhase.TRAINING, highest_attempt=event.attempt, context=context), ()


def mask_entropy_bytes(cohort: Cohort) -> int:
    """Fresh bytes for one vector: the self mask and the t - 1 coefficients of its shares; none in strict mode."""
    return 0 if cohort.is_strict else cohort.thresholds.shares * SHARE_BYTES


def _mask(state: PartyState, event: Vector, entropy: bytes) -> Outcome:
    config, cohort, context = state.config, state.settled, state.context
    if event.words != config.shared.words:
        raise LocalProtocolError(
            180, f"vector of {event.words} words, not {config.shared.words}", "report this as a defect"
        )
    if len(entropy) != mask_entropy_bytes(cohort):
        raise LocalProtocolError(900, f"{len(entropy)} bytes of entropy", "report this as a defect")
    streams = [stream_key(leaf_seed(root, context), context) for root in state.roots.values()]
    signs = [1 if config.position < peer else -1 for peer in state.roots]
    masking = replace(state, phase=PartyPhase.MASKING)
    if not cohort.is_strict:
        self_mask = entropy[:SHARE_BYTES]
        streams.append(stream_key(self_mask, context))
        signs.append(1)
        commitment = commitment_of(context, config.position, self_mask)
        masking = replace(masking, commitment=commitment, boxes=_closed_boxes(state, cohort, entropy))
    return masking, (MaskVector(tuple(streams), tuple(signs)),)


def _closed_boxes(state: PartyState, cohort: Cohort, entropy: bytes) -> bytes:
    """One share of the self mask for every peer, t of which open it."""
    position = state.config.position
    self_mask, coefficients = entropy[:SHARE_BYTES], entropy[SHARE_BYTES:]
    shares = shamir.split(self_mask, cohort.thresholds.shares, tuple(state.roots), coefficients)
    return join_boxes(
        [
            (peer, close_box(root, state.context, position, peer, share))
            for (peer, root), share in zip(state.roots.items(), shares, strict=True)
        ]
    )


def _upload(state: PartyState, event: Masked) -> Outcome:
    position = state.config.position
    head = encode_header(state.settled, state.transcript, state.highest_attempt, position)
    signed = upload_signature_input(state.context, position, event.words_hash, state.boxes, state.commitment)
    effects = Persist(state.context), SendVector(head, state.commitment + state.boxes, signed)
    return replace(state, phase=PartyPhase.UPLOADED), effects


def _vote(state: PartyState, event: Survivors) -> Outcome:
    release.check_survivors(state.settled, state.config.position, event.members)
    if state.phase is not PartyPhase.UPLOADED and event.members != state.survivors:
        raise RemoteProtocolError(183, "another survivor set than the one voted on", "refused; nothing has changed")
    phase = PartyPhase.VOTED if state.phase is PartyPhase.UPLOADED else state.phase
    voted = replace(state, phase=phase, survivors=event.members)
    return voted, (Send(b"", vote_input(state.context, state.config.position, event.members)),)


def _release(state: PartyState, event: Fast | Certificate) -> Outcome:
    cohort, position = state.settled, state.config.position
    if state.phase is PartyPhase.RELEASED:
        if event != state.asked:
            raise RemoteProtocolError(183, "a second release, not like the first", "refused; nothing has changed")
        return state, (_send_release(state),)
    if isinstance(event, Fast):
        if cohort.is_strict:
            raise RemoteProtocolError(104, "a release in strict mode", "refused; nothing was revealed")
        survivors = cohort.members
    else:
        survivors = state.survivors
        release.check_certificate(cohort, state.context, survivors, event)
    body = release.body(cohort, position, state.context, state.roots, survivors, event.boxes)
    released = replace(
        state, phase=PartyPhase.RELEASED, survivors=survivors, released=body, asked=event, commitment=b"", boxes=b""
    )
    return released, (_send_release(released),)


def _send_release(state: PartyState) -> Send:
    return Send(state.released, release_signature_input(state.context, state.config.position, state.released))


def _refuse_copy() -> NoReturn:
    raise LocalProtocolError(900, "keys of a session are never pickled or copied", "report this as a defect")


@dataclass(frozen=True, slots=True)
class MaskedUpload:
    """What may leave the hospital for one attempt. Make it durable under ``pad_id`` before the first byte is sent.

    ``pad_id``: 32 bytes, the round's ctx, unique for each (transcript, attempt, task). ``pieces``: the exact upload; a
    resend must be these bytes. The first piece is a view of the party's own buffer: it holds until the round is closed.
    """

    pad_id: bytes
    pieces: tuple[bytes | memoryview, ...] = field(repr=False)

    @property
    def payload(self) -> bytes:
        """The upload in one piece: a copy."""
        return b"".join(self.pieces)


class Party:
    """Runs one hospital through one session: one setup, then rounds with strictly increasing attempts.

    ``sign``: the hospital's identity. Use: ``offer``, ``accept``, then for each attempt ``open_round``, ``mask``,
    ``close_round``. After a restart there is no old session: make a new ``Party``. Never pickled or copied. That one
    *vector* is not masked twice in different attempts (rule 7) is for the caller: each attempt draws its noise anew.
    """

    def __init__(self, config: SecaggConfig, sign: Callable[[bytes], bytes], entropy: Entropy) -> None:
        self._state = PartyState(config)
        self._sign = sign
        self._entropy = entropy
        self._signed_offer = b""
        self._masker = Masker(config.shared.ring_bits)
        self._buffer = _buffer(config.shared.vector_bytes)
        self._words = view_words(self._buffer[HEADER_BYTES:], config.shared.ring_bits)

    def __reduce__(self) -> NoReturn:
        _refuse_copy()

    @property
    def phase(self) -> PartyPhase:
        return self._state.phase

    @property
    def transcript(self) -> bytes:
        """T, 32 bytes; empty before ``accept``."""
        return self._state.transcript

    @property
    def cohort(self) -> Cohort:
        """U1, once ``accept`` has taken the offers."""
        return self._state.settled

    @property
    def highest_attempt(self) -> int:
        """The last attempt opened in this session; 0 before the first."""
        return self._state.highest_attempt

    def offer(self) -> bytes:
        """S_i and its signature; the same bytes on every call."""
        if not self._signed_offer:
            effects = self._step(Begin(), self._entropy.draw("secagg/offer", OFFER_ENTROPY_BYTES))
            self._signed_offer = self._sent(effects)
        return self._signed_offer

    def accept(self, offers: Sequence[bytes]) -> None:
        """Take the cohort's offers, own included, in any order; the same ones again change nothing.

        Raises ``RemoteProtocolError``: MF-103 malformed, 110 bad signature, 111 not in the roster, 112 other study or
        roster, 140 too few or too many, 143 one twice, 170 a key refused, 174 own offer missing or changed, 183 other offers
        than before.
        """
        self._step(Offers(tuple(offers)))

    def open_round(self, attempt: int, task_hash: bytes) -> None:
        """Begin an attempt on the task this hospital computed itself: ``medfed.advance.task_hash``, never a hash it was sent.

        Raises ``RemoteProtocolError`` (MF-181) unless ``attempt`` exceeds every earlier one of this session.
        """
        self._step(Round(attempt, task_hash))

    def mask(self, vector: NDArray[np.int64]) -> MaskedUpload:
        """Mask this attempt's vector, int64[D], already saturated and noised; only once an attempt.

        Raises ``LocalProtocolError``: MF-104 a second vector or no open round, MF-180 wrong length or type, MF-184 not
        finite. The caller debits its ledger first (rule 9) and persists the result before sending it.
        """
        _check_vector(vector)
        if self._state.phase is not PartyPhase.TRAINING:
            raise unexpected(self._state.phase, Vector(vector.size))
        wanted = mask_entropy_bytes(self.cohort)
        entropy = self._entropy.draw("secagg/self mask", wanted) if wanted else b""
        for effect in self._step(Vector(vector.size), entropy):
            if isinstance(effect, MaskVector):
                self._masker.mask_into(self._words, vector, effect.streams, effect.signs)
        pad_id, pieces = b"", tuple[bytes | memoryview, ...]()
        for effect in self._step(Masked(hashlib.sha256(self._words.data).digest())):
            if isinstance(effect, Persist):
                pad_id = effect.context
            elif isinstance(effect, SendVector):
                pieces = self._assemble(effect)
        return MaskedUpload(pad_id, pieces)

    def vote(self, survivors: Sequence[int]) -> bytes:
        """Agree to the one survivor set of this attempt, after a drop-out: a signature, 64 bytes; again the same bytes.

        ``survivors``: U2, ascending. Raises ``RemoteProtocolError``: MF-104 nothing was uploaded; MF-185 not a set this
        hospital may vote on (rule 11, and rule 13 for the whole cohort); MF-183 it has voted on another.
        """
        return self._sent(self._step(Survivors(tuple(survivors))))

    def release(self, survivors: Sequence[int], votes: Sequence[tuple[int, bytes]], boxes: Boxes) -> bytes:
        """What opens the sum over ``survivors`` and nothing narrower: body and signature, of constant length; again the same.

        ``votes``: voter and signature each, ascending; none where all of the cohort survived. ``boxes``: sender and box of all
        survivors but this hospital, ascending. Raises ``RemoteProtocolError``: MF-104 not uploaded, not voted, or strict mode;
        MF-180 boxes of others; MF-183 a second release; MF-186 fewer than m valid votes on the set voted on (rule 14).
        """
        members, cohort = tuple(survivors), self._state.cohort
        if not votes and cohort is not None and members == cohort.members:
            return self._sent(self._step(Fast(tuple(boxes))))
        return self._sent(self._step(Certificate(members, tuple(votes), tuple(boxes))))

    def close_round(self, reason: CloseReason = CloseReason.SUM) -> None:
        """End the round, whatever its outcome, and erase its pads and words. Harmless where no round is open."""
        if self._state.phase not in (PartyPhase.NEW, PartyPhase.OFFERED):
            self._step(Close(reason))

    def _assemble(self, send: SendVector) -> tuple[bytes | memoryview, ...]:
        self._buffer[:HEADER_BYTES] = send.head
        return self._buffer.toreadonly(), send.tail, self._signature(send.signed)

    def _sent(self, effects: Sequence[PartyEffect]) -> bytes:
        """The bytes of the one message among the effects."""
        return b"".join(effect.head + self._signature(effect.signed) for effect in effects if isinstance(effect, Send))

    def _signature(self, signed: bytes) -> bytes:
        signature = self._sign(signed)
        if len(signature) != SIGNATURE_BYTES:
            raise LocalProtocolError(110, "signature is not 64 bytes long", "report this as a defect")
        return signature

    def _step(self, event: PartyEvent, entropy: bytes = b"") -> tuple[PartyEffect, ...]:
        self._state, effects = step(self._state, event, entropy=entropy, now=0.0)
        if any(isinstance(effect, Erase) for effect in effects):
            self._masker.erase()
            self._words[:] = 0
        return effects


def _buffer(vector_bytes: int) -> memoryview:
    """Room for an upload's header and words. The words begin a line of the processor's cache: adding pads is a few percent
    faster."""
    memory = np.zeros(HEADER_BYTES + vector_bytes + _CACHE_LINE, np.uint8)
    start = -(memory.ctypes.data + HEADER_BYTES) % _CACHE_LINE
    return memoryview(memory.data)[start : start + HEADER_BYTES + vector_bytes]


def _check_vector(vector: NDArray[np.int64]) -> None:
    if vector.dtype.kind == "f" and not np.isfinite(vector).all():
        raise LocalProtocolError(184, "vector not finite", "report this as a defect")
    if vector.dtype != np.int64 or vector.ndim != 1:
        raise LocalProtocolError(180, "vector is not a row of int64", "report this as a defect")
