"""A hospital's side of secure aggregation: the pure ``step`` and ``Party``, which runs it.

Source: medfed's secure aggregation design, sections 3-5, 10 and 12; Bonawitz et al. 2017, figure 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn, TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

from medfed.errors import LocalProtocolError, RemoteProtocolError
from medfed.identity import SIGNATURE_BYTES
from medfed.privacy.secagg.keys import derive_root, leaf_seed, public_key, read_offers, stream_key
from medfed.privacy.secagg.masks import Masker
from medfed.privacy.secagg.protocol import (
    HASH_BYTES,
    HEADER_BYTES,
    KEY_BYTES,
    NONCE_BYTES,
    Offer,
    SecaggConfig,
    context_hash,
    encode_header,
    transcript_hash,
    upload_signature_input,
    view_words,
)
from medfed.privacy.secagg.transitions import (
    PARTY_TABLE,
    Begin,
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
    Survivors,
    Vector,
    unexpected,
)
from medfed.seams import Entropy

OFFER_ENTROPY_BYTES: Final = KEY_BYTES + NONCE_BYTES


@dataclass(frozen=True, slots=True)
class PartyState:
    """All that ``step`` knows. Lives in memory only: a restart or a copy of it means a new setup [11].

    ``private``: X25519 key, gone once the roots are made. ``roots``: one a peer, ascending. ``highest_attempt``: 0 before
    the first round. ``context``: ctx of the open round.
    """

    config: SecaggConfig
    phase: PartyPhase = PartyPhase.NEW
    private: bytes = field(default=b"", repr=False)
    offer: bytes = b""
    transcript: bytes = b""
    roots: tuple[bytes, ...] = field(default=(), repr=False)
    highest_attempt: int = 0
    context: bytes = b""

    def __reduce__(self) -> NoReturn:
        _refuse_copy()


Outcome: TypeAlias = tuple[PartyState, tuple[PartyEffect, ...]]


def step(state: PartyState, event: PartyEvent, *, entropy: bytes, now: float) -> Outcome:
    """One move of a hospital: the new state, and what the runner must do, in order.

    ``entropy``: 64 fresh bytes for ``Begin``, empty otherwise. ``now``: monotonic seconds; no rule of strict mode depends
    on it. Raises ``ProtocolError``; the old state then still holds.

    *Guarantees*: no private key, root or leaf seed is in any ``Send`` or ``Persist``; at most one ``MaskVector`` and one
    ``Send`` for each (transcript, attempt); attempts strictly increase.
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
            return _mask(state, event)
        case Masked():
            return _upload(state, event)
        case Fast() | Survivors() | Certificate():
            raise RemoteProtocolError(
                104, "something is to be unmasked in strict mode", "refused; nothing was revealed"
            )
        case Close():
            return replace(state, phase=PartyPhase.READY, context=b""), (Erase(),)
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
    bodies, offers = read_offers(event.offers, config.shared)
    if bodies[config.position] != state.offer:
        raise RemoteProtocolError(174, "own offer missing or changed", "start a new setup")
    transcript = transcript_hash(config.shared, bodies)
    if state.phase is not PartyPhase.OFFERED:
        if transcript != state.transcript:
            raise RemoteProtocolError(183, "other offers than those accepted before", "start a new setup")
        return state, ()
    roots = tuple(
        derive_root(state.private, offers[peer].key, transcript, config.position, peer) for peer in config.peers
    )
    return replace(state, phase=PartyPhase.READY, private=b"", transcript=transcript, roots=roots), ()


def _open_round(state: PartyState, event: Round) -> Outcome:
    if not state.highest_attempt < event.attempt < 1 << 64:
        raise RemoteProtocolError(
            181, f"attempt {event.attempt} after attempt {state.highest_attempt}", "refused; attempts only increase"
        )
    if len(event.task) != HASH_BYTES:
        raise LocalProtocolError(182, "task hash is not 32 bytes long", "report this as a defect")
    context = context_hash(state.config.shared, state.transcript, event.attempt, event.task)
    return replace(state, phase=PartyPhase.TRAINING, highest_attempt=event.attempt, context=context), ()


def _mask(state: PartyState, event: Vector) -> Outcome:
    config = state.config
    if event.words != config.words:
        raise LocalProtocolError(180, f"vector of {event.words} words, not {config.words}", "report this as a defect")
    seeds = (leaf_seed(root, state.context) for root in state.roots)
    streams = tuple(stream_key(seed, state.context) for seed in seeds)
    signs = tuple(1 if config.position < peer else -1 for peer in config.peers)
    return replace(state, phase=PartyPhase.MASKING), (MaskVector(streams, signs),)


def _upload(state: PartyState, event: Masked) -> Outcome:
    config = state.config
    head = encode_header(config.shared, state.transcript, state.highest_attempt, config.position)
    signed = upload_signature_input(state.context, config.position, event.words_hash)
    return replace(state, phase=PartyPhase.UPLOADED), (Persist(state.context), Send(head, signed))


def _refuse_copy() -> NoReturn:
    raise LocalProtocolError(900, "keys of a session are never pickled or copied", "report this as a defect")


@dataclass(frozen=True, slots=True)
class MaskedUpload:
    """What may leave the hospital for one attempt. Make it durable under ``pad_id`` before the first byte is sent.

    ``pad_id``: 32 bytes, the round's ctx, unique for each (transcript, attempt, task). ``payload``: the exact upload; a
    resend must be these bytes.
    """

    pad_id: bytes
    payload: bytes = field(repr=False)


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
        self._masker = Masker(config.ring_bits)
        self._buffer = bytearray(HEADER_BYTES + config.shared.vector_bytes)
        self._words = view_words(memoryview(self._buffer)[HEADER_BYTES:], config.ring_bits)

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
    def highest_attempt(self) -> int:
        """The last attempt opened in this session; 0 before the first."""
        return self._state.highest_attempt

    def offer(self) -> bytes:
        """S_i and its signature; the same bytes on every call."""
        if not self._signed_offer:
            effects = self._step(Begin(), self._entropy.draw("secagg/offer", OFFER_ENTROPY_BYTES))
            self._signed_offer = b"".join(
                effect.head + self._sign(effect.signed) for effect in effects if isinstance(effect, Send)
            )
        return self._signed_offer

    def accept(self, offers: Sequence[bytes]) -> None:
        """Take all hospitals' offers, own included, in any order; the same ones again change nothing.

        Raises ``RemoteProtocolError``: MF-103 malformed, 110 bad signature, 111 not in the roster, 112 other study or
        roster, 140 one missing, 143 one twice, 170 a key refused, 174 own offer missing or changed, 183 other offers than
        before.
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
        for effect in self._step(Vector(vector.size)):
            if isinstance(effect, MaskVector):
                self._masker.mask_into(self._words, vector, effect.streams, effect.signs)
        pad_id = payload = b""
        for effect in self._step(Masked(hashlib.sha256(self._words.data).digest())):
            if isinstance(effect, Persist):
                pad_id = effect.context
            elif isinstance(effect, Send):
                payload = self._assemble(effect)
        return MaskedUpload(pad_id, payload)

    def close_round(self, reason: CloseReason = CloseReason.SUM) -> None:
        """End the round, whatever its outcome, and erase its pads and words. Harmless where no round is open."""
        if self._state.phase not in (PartyPhase.NEW, PartyPhase.OFFERED):
            self._step(Close(reason))

    def _assemble(self, send: Send) -> bytes:
        signature = self._sign(send.signed)
        if len(signature) != SIGNATURE_BYTES:
            raise LocalProtocolError(110, "signature is not 64 bytes long", "report this as a defect")
        self._buffer[:HEADER_BYTES] = send.head
        return b"".join((self._buffer, signature))

    def _step(self, event: PartyEvent, entropy: bytes = b"") -> tuple[PartyEffect, ...]:
        self._state, effects = step(self._state, event, entropy=entropy, now=0.0)
        if any(isinstance(effect, Erase) for effect in effects):
            self._masker.erase()
            self._words[:] = 0
        return effects


def _check_vector(vector: NDArray[np.int64]) -> None:
    if vector.dtype.kind == "f" and not np.isfinite(vector).all():
        raise LocalProtocolError(184, "vector not finite", "report this as a defect")
    if vector.dtype != np.int64 or vector.ndim != 1:
        raise LocalProtocolError(180, "vector is not a row of int64", "report this as a defect")
