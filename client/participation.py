"""One hospital's part in one study: the requests of a round, in the order that keeps the promises.

The order is the product. For an attempt: state checked -> peers' keys checked -> debit on disk -> records used -> sum
clipped, saturated, noised -> masked -> reply on disk -> sealed and released in the ledger -> bytes leave. Whatever fails
after the debit stays charged. A reply that was sealed is sent again byte for byte; nothing else ever leaves for the
same attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.advance import ModelState, advance, is_before_metrics, is_before_statistics, task_hash
from medfed.client.approved import Approved
from medfed.client.ledger import AttemptState, Caps, Ledger, StudyState
from medfed.client.local_steps import (
    LocalUpdate,
    Noise,
    OwnSum,
    noised_sum,
    own_sum,
    private_update,
    weighted_words,
)
from medfed.client.metrics import metrics_sum
from medfed.client.model_keeper import Advance, ModelKeeper, Released
from medfed.client.refusal import Refuse
from medfed.client.statement import agreed, finished, keep, signed
from medfed.client.statistics import statistics_sum, with_standardized_patients
from medfed.client.witnesses import HeadsOfSession, Witnesses
from medfed.errors import BudgetExhausted, MedfedError, ProtocolError
from medfed.identity import SIGNATURE_BYTES, Identity
from medfed.privacy.secagg.party import Party
from medfed.privacy.secagg.protocol import BOX_BYTES, AggregatorConfig, SecaggConfig
from medfed.privacy.secagg.transitions import CloseReason
from medfed.seams import Seams
from medfed.wire import (
    Finish,
    Message,
    OfferReply,
    Refused,
    Release,
    ReleaseRequest,
    RoundRequest,
    SetupRequest,
    StateAccepted,
    StateTransfer,
    Upload,
    Vote,
    VoteRequest,
    encode,
    expect,
    read_numbered,
    read_positions,
)
from medfed.witness import Head, newest, position_of, read_heads, with_heads

log = logging.getLogger("medfed.client")


class Participation:
    """The state machine of one approved study. Not thread-safe: the node hands it one request at a time."""

    def __init__(
        self,
        approved: Approved,
        identity: Identity,
        ledger: Ledger,
        witnesses: Witnesses,
        caps: Caps,
        seams: Seams,
        noise: Noise,
        stop: threading.Event | None = None,
        *,
        local_update: LocalUpdate = private_update,
        clipped: OwnSum = own_sum,
        step: Advance = advance,
        is_time: Callable[[float], bool] = lambda _: True,
    ) -> None:
        """``stop``: ends a wait for a slot early; the reply is then not sent, but lies in the outbox.

        ``is_time``: whether the hospital takes part at a wall time; else it asks to be asked later, with nothing spent.
        ``noise``, ``local_update``, ``clipped`` and ``step`` (the server step) are arguments for simulations' sake.
        """
        self.approved = approved
        self.study_hash = approved.study.hash()
        self._identity = identity
        self._ledger = ledger
        self._witnesses = witnesses
        self._caps = caps
        self._seams = seams
        self._noise = noise
        self._local_update = local_update
        self._clipped = clipped
        self._stop = stop
        self._is_time = is_time
        self._session = b""
        self._offer_reply = b""
        self._heads = HeadsOfSession(())
        self._party: Party | None = None
        self._offers: tuple[bytes, ...] | None = None
        self._summed: tuple[int, ...] = ()  # whose sum the last upload can be in only, where this process knows it
        self._standardized: tuple[bytes, Approved] | None = None
        self._keeper = ModelKeeper(approved, identity, seams.files, self._uploaded_in_round, step)

    @property
    def completed_rounds(self) -> int:
        return self._keeper.state.completed_rounds

    @property
    def is_locked(self) -> bool:
        """Whether others saw rows of the ledger that it does not have: every request is refused."""
        return self._witnesses.is_locked

    @property
    def is_expired(self) -> bool:
        """Judged by the clock or the ledger's latest time, whichever is later: turning the clock back gains nothing."""
        now = max(self._seams.clock.wall(), self._ledger.highest_wall())
        return self.approved.study.expired(now)

    @property
    def is_open(self) -> bool:
        """Approved, and neither finished nor withdrawn."""
        return self._ledger.approved(self.study_hash).state is StudyState.OPEN

    def answer(self, message: Message) -> bytes:
        """The reply frame to a request whose signature was checked. Raises ``Refuse``."""
        heads = self._checked_heads(message)
        if isinstance(message, SetupRequest):
            return self._set_up(message)
        if isinstance(message, RoundRequest):
            return self._take_part(message, heads)
        if isinstance(message, VoteRequest):
            return self._vote(message)
        if isinstance(message, ReleaseRequest):
            return self._release(message)
        if isinstance(message, StateTransfer):
            return self._take_state(message)
        reply = self._finish(expect(message, Finish))
        self._witnesses.keep(heads, self.approved.roster.identities)
        return reply

    def _checked_heads(self, message: Message) -> tuple[tuple[int, Head], ...]:
        """The heads of ledgers in ``message``, first of all held against this hospital's own; refused once that is locked, or
        where they count hospitals that nobody here approved.

        Before anything else is done: whatever is written into an old ledger only makes it a second one.
        """
        items = message.heads if isinstance(message, SetupRequest | RoundRequest | Finish) else ()
        identities = self.approved.roster.identities
        known = [each for each in items if position_of(each) < len(identities)]
        heads = read_heads(known, identities)
        self._witnesses.face(head for position, head in heads if position == self.approved.position)
        if len(known) < len(items):
            raise Refuse(Refused.OTHER_ROSTER, "hospitals joined: medfed-client approve with the new roster, to go on")
        return heads

    # --- session ---------------------------------------------------------------------------------------------------

    def _set_up(self, request: SetupRequest) -> bytes:
        """Fresh keys for a session; the same session asked again gets the same bytes."""
        self._check_open()
        if request.session != self._session:
            self._end_session()
            approved = self.approved
            shared = AggregatorConfig.of(approved.study, approved.roster, approved.plan.ring_words)
            config = SecaggConfig(shared, approved.position)
            party = Party(config, self._identity.sign, self._seams.entropy)
            told = self._witnesses.told(approved.roster.identities)
            reply = OfferReply(
                self.study_hash,
                request.session,
                approved.position,
                self._ledger.highest_attempt(self.study_hash),
                told,
                party.offer(),
            )
            self._party, self._session, self._heads = party, request.session, HeadsOfSession(told)
            self._offer_reply = encode(reply, self._identity)
        return self._offer_reply

    def _end_session(self) -> None:
        self._party, self._session, self._offer_reply, self._offers = None, b"", b"", None

    def _check_open(self) -> None:
        if not self.is_open:
            raise Refuse(Refused.NOT_APPROVED, "the study is closed or withdrawn here")
        if not self._is_time(self._seams.clock.wall()):
            raise Refuse(
                Refused.OUT_OF_HOURS, "outside the hours of hospital.toml; medfed-client status says till when"
            )

    # --- a round ---------------------------------------------------------------------------------------------------

    def _take_part(self, request: RoundRequest, heads: tuple[tuple[int, Head], ...]) -> bytes:
        self._check_open()
        sealed = self._sealed_reply(request)
        if sealed is not None:
            return sealed
        if request.attempt <= self._ledger.highest_attempt(self.study_hash):
            raise Refuse(Refused.OUT_OF_ORDER, f"attempt {request.attempt} lies behind")
        party = self._party
        if party is None or request.session != self._session:
            raise Refuse(Refused.NO_SESSION, "the keys of this session are not here")
        if request.round >= self.approved.study.released_sums:
            raise Refuse(Refused.OUT_OF_ORDER, "all rounds are done")
        self._accept_offers(party, request.offers)
        identities, latest = self.approved.roster.identities, newest(heads)
        survivors = read_positions(request.survivors)
        self._heads.require(request.round, request.heads, latest, party.cohort.members, survivors)
        self._catch_up(request.round, Released(request.total, survivors), request.state_hash)
        self._reserve(request)
        self._heads.accept(request.round, latest)
        self._witnesses.keep(heads, identities)
        began = self._seams.clock.monotonic()
        try:
            reply = self._train_and_seal(party, request)
        except Exception as error:  # whatever it was, the attempt is over and stays charged
            # the class name only: the text of a library's exception may hold patients' data
            cause = str(error) if isinstance(error, MedfedError) else type(error).__name__
            log.debug("attempt %d failed", request.attempt, exc_info=True)  # with --debug only
            with contextlib.suppress(MedfedError):  # a ledger that cannot be written: the row stays, still charged
                self._abandon(request.attempt, cause[:80])
            self._wait_for_slot(began)
            raise Refuse(Refused.INTERNAL, cause) from error
        return reply

    def _sealed_reply(self, request: RoundRequest) -> bytes | None:
        """The stored reply of this very request; refuses an attempt that was begun and lost."""
        status = self._ledger.attempt_status(self.study_hash, request.attempt)
        if status is None:
            return None
        if status is AttemptState.RESERVED:
            self._abandon(request.attempt, "interrupted before it was sealed")
            status = AttemptState.ABANDONED
        if status is AttemptState.ABANDONED:
            raise Refuse(Refused.ATTEMPT_SPENT, f"attempt {request.attempt} was begun and cannot be finished")
        files = self._seams.files
        stored = files.read(self._outbox_path) if files.exists(self._outbox_path) else b""
        binding, reply = stored[:32], stored[32:]
        sealed = self._ledger.sealed(self.study_hash, request.attempt)
        if sealed is None or sealed.reply != hashlib.sha256(reply).digest():
            raise Refuse(Refused.ATTEMPT_SPENT, f"the outbox does not hold attempt {request.attempt} as it was sealed")
        if binding != _binding(request):
            raise Refuse(Refused.OUT_OF_ORDER, f"attempt {request.attempt} was another request")
        return reply

    def _accept_offers(self, party: Party, offers: tuple[bytes, ...]) -> None:
        if self._offers is None:
            try:
                party.accept(offers)
            except ProtocolError as error:
                # our own offer is another: made by a process that is gone, so a new setup cures it
                reason = Refused.NO_SESSION if error.code == 174 else Refused.OFFERS_REFUSED
                raise Refuse(reason, str(error)) from error
            self._offers = offers
        elif offers != self._offers:
            raise Refuse(Refused.OFFERS_REFUSED, "the session's offers changed")

    def _reserve(self, request: RoundRequest) -> None:
        now = self._seams.clock.wall()
        try:
            debit = self._ledger.reserve(self.study_hash, request.round + 1, request.attempt, self._caps, now)
        except BudgetExhausted as error:
            raise Refuse(Refused.BUDGET, str(error)) from error
        log.info(
            "%s: round %d of %d, attempt %d, epsilon spent at most %.3f",
            self.approved.study.study.name,
            request.round + 1,
            self.approved.study.released_sums,
            request.attempt,
            debit.epsilon_after,
        )

    def _train_and_seal(self, party: Party, request: RoundRequest) -> bytes:
        """From here on the attempt is charged."""
        clock, started = self._seams.clock, self._seams.clock.monotonic()
        head = self._ledger.head()
        vector = self._noised_vector()
        trained = clock.monotonic()
        task = task_hash(self.study_hash, self._keeper.state)
        party.close_round(CloseReason.DEADLINE)  # of the attempt before, if it was not released for
        party.open_round(request.attempt, with_heads(task, request.heads))
        vector_hash = hashlib.sha256(np.ascontiguousarray(vector, "<i8").data).digest()
        masked = party.mask(vector)
        del vector  # of a big model twice its size; what it became is all that is needed
        self._summed = party.cohort.members if party.cohort.is_strict else ()
        reply = encode(
            Upload(
                self.study_hash,
                request.nonce,
                self.approved.position,
                request.attempt,
                request.round,
                self._keeper.attestation(),
                head.to_bytes(),
                masked.pieces,
            ),
            self._identity,
        )
        pad_id = masked.pad_id
        del masked
        if party.cohort.is_strict:
            party.close_round()
        self._seams.files.write(self._outbox_path, (_binding(request), reply), private=True)
        self._ledger.seal_and_release(
            self.study_hash, request.attempt, vector_hash, pad_id, hashlib.sha256(reply).digest()
        )
        self._note(request, trained - started, clock.monotonic() - started)
        self._wait_for_slot(started)
        return reply

    def _noised_vector(self) -> NDArray[np.int64]:
        """What is masked, int64[ring_words]: statistics, a noised sum, the update that local steps made of several, metrics."""
        state, entropy = self._keeper.state, self._seams.entropy
        if is_before_statistics(self.approved.study, state):
            vector = statistics_sum(self.approved, entropy, self._noise)
        elif is_before_metrics(self.approved.study, state):
            vector = metrics_sum(self.approved, state, entropy, self._noise)
        elif self.approved.study.training.aggregate == "update":
            approved = self._training_at(state)
            vector = weighted_words(
                approved, self._local_update(approved, state.weights, entropy, self._noise), entropy
            )
        else:
            vector = noised_sum(self._training_at(state), state.weights, entropy, self._noise, self._clipped)
        missing = self.approved.plan.ring_words - len(vector)  # all vectors of a study are of one length
        return np.pad(vector, (0, missing)) if missing else vector

    def _training_at(self, state: ModelState) -> Approved:
        """The study with its patients as the model takes them now, worked out once."""
        if not state.statistics.size:
            return self.approved
        wanted = state.statistics.tobytes()
        if self._standardized is None or self._standardized[0] != wanted:
            self._standardized = wanted, with_standardized_patients(self.approved, state.statistics)
        return self._standardized[1]

    def _wait_for_slot(self, started: float) -> None:
        """Leave a whole number of slots after the request came, so that the time says nothing of the patients: an upload,
        the word that there is none once training has begun, and every answer about the final model."""
        slot = self.approved.study.deadlines.slot_s
        if slot is not None:
            elapsed = self._seams.clock.monotonic() - started
            self._seams.clock.sleep(slot - elapsed % slot, self._stop)

    def _abandon(self, attempt: int, reason: str) -> None:
        if self._party is not None:
            self._party.close_round()
        self._ledger.abandon(self.study_hash, attempt, reason)

    # --- opening a sum -------------------------------------------------------------------------------------------------

    def _vote(self, request: VoteRequest) -> bytes:
        """Agree to one survivor set. No record is touched and nothing is spent: the attempt was charged with its upload."""
        party, survivors = self._party_of(request), read_positions(request.survivors)
        try:
            vote = party.vote(survivors)
        except ProtocolError as error:
            raise Refuse(Refused.SURVIVORS, str(error)) from error
        self._summed = survivors
        return encode(
            Vote(self.study_hash, request.nonce, self.approved.position, request.attempt, vote), self._identity
        )

    def _release(self, request: ReleaseRequest) -> bytes:
        """What opens the sum over the survivors; asked again, the same bytes."""
        party, survivors = self._party_of(request), read_positions(request.survivors)
        votes = read_numbered(request.votes, SIGNATURE_BYTES)
        boxes = read_numbered(request.boxes, BOX_BYTES)
        try:
            payload = party.release(survivors, votes, boxes)
        except ProtocolError as error:
            raise Refuse(Refused.SURVIVORS, str(error)) from error
        self._summed = survivors
        return encode(
            Release(self.study_hash, request.nonce, self.approved.position, request.attempt, payload), self._identity
        )

    def _party_of(self, request: VoteRequest | ReleaseRequest) -> Party:
        """The party of the attempt that is asked about; only the process that masked it can help to open it."""
        if not self.is_open:
            raise Refuse(Refused.NOT_APPROVED, "the study is closed or withdrawn here")
        if self._party is None or request.session != self._session:
            raise Refuse(Refused.NO_SESSION, "the keys of this session are not here")
        if request.attempt != self._party.highest_attempt:
            raise Refuse(Refused.OUT_OF_ORDER, f"attempt {request.attempt} is not open here")
        return self._party

    # --- the model state ---------------------------------------------------------------------------------------------

    def _uploaded_in_round(self, number: int) -> bool:
        """Whether the last attempt here was one of round ``number`` and left this hospital."""
        attempt = self._ledger.highest_attempt(self.study_hash)
        if self._ledger.attempt_status(self.study_hash, attempt) not in (AttemptState.RELEASED, AttemptState.ACKED):
            return False
        return self._ledger.charged_round(self.study_hash, attempt) == number

    def _catch_up(self, completed_rounds: int, released: Released, named_hash: bytes) -> None:
        is_next = completed_rounds == self.completed_rounds + 1 and self._uploaded_in_round(completed_rounds)
        if is_next and self._summed and self._summed != released.survivors:
            # without this one it may be of a later attempt than its last: the state must then come with others' signatures
            reason = Refused.STATE_MISMATCH if self.approved.position in released.survivors else Refused.NEED_STATE
            raise Refuse(reason, "a sum over other hospitals than those this one released for")
        changed = self._keeper.catch_up(completed_rounds, released, named_hash)
        if changed and self.approved.position in released.survivors:
            self._acknowledge()

    def _acknowledge(self) -> None:
        """The released sum holds this hospital's last upload: the coordinator has it."""
        attempt = self._ledger.highest_attempt(self.study_hash)
        if self.is_open and self._ledger.attempt_status(self.study_hash, attempt) is AttemptState.RELEASED:
            self._ledger.acknowledge(self.study_hash, attempt)

    def _take_state(self, request: StateTransfer) -> bytes:
        self._keeper.take(request)
        accepted = StateAccepted(self.study_hash, request.nonce, self.approved.position, self.completed_rounds)
        return encode(accepted, self._identity)

    def _finish(self, request: Finish) -> bytes:
        """The last sum: compute, keep, score the final model, sign it and what is said of its privacy.

        The study is closed and its spares are freed. Asked again, this hospital signs the same.
        """
        if request.round != self.approved.study.released_sums:
            raise Refuse(Refused.OUT_OF_ORDER, "a study ends after its last round")
        began = self._seams.clock.monotonic()
        try:
            return self._end(request)
        finally:
            self._wait_for_slot(began)  # scoring takes the longer, the more patients are held out

    def _end(self, request: Finish) -> bytes:
        released = Released(request.total, read_positions(request.survivors))
        self._catch_up(request.round, released, request.state_hash)
        model = self._keeper.write_model()
        said = agreed(self.approved, request, model, self._ledger.highest_attempt(self.study_hash))
        if self.is_open:
            self._ledger.close_study(self.study_hash, "all rounds done")
            log.info("%s is done; the model is in %s", self.approved.study.study.name, self.approved.folder)
        self._end_session()
        mine = signed(self.approved, said, self._ledger, self._identity)
        keep(self.approved, said, request.statement_signature, mine, self._seams.files)
        return encode(finished(request, mine, self._keeper.attestation()), self._identity)

    # --- disk --------------------------------------------------------------------------------------------------------

    @property
    def _outbox_path(self) -> Path:
        return self.approved.folder / "outbox.bin"

    def _note(self, request: RoundRequest, train_s: float, total_s: float) -> None:
        """One line for this hospital's own eyes; the vector is sealed, so nothing may fail here any more."""
        line = {"attempt": request.attempt, "round": request.round + 1, "train_s": train_s, "total_s": total_s}
        try:
            self._seams.files.append(self.approved.folder / "rounds.jsonl", json.dumps(line).encode() + b"\n")
        except MedfedError as error:
            log.warning("the round's note was not written: %s", error)


def _binding(request: RoundRequest) -> bytes:
    """What a stored reply answers: every field of the request but the sum, which the state's hash stands for."""
    parts = (request.session, request.nonce, request.state_hash, *request.offers, *request.heads)
    numbers = request.attempt.to_bytes(4, "big") + request.round.to_bytes(4, "big")
    return hashlib.sha256(numbers + b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
