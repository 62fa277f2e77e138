"""The coordinator's rounds: gather keys, ask, sum, advance, checkpoint; attempts, spares and deadlines.

Nothing here touches a network or Flower: an ``Exchange`` carries frames. One attempt number is one privacy event at every
hospital, whether it completes a round or is lost; when ``rounds + spare_attempts`` of them are used the run stops and the
last good model stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from medfed.advance import ModelState, advance, state_bytes, state_hash, state_size_bytes, task_hash
from medfed.errors import EnvironmentFault, MedfedError, PrivacyError, ProtocolError, RemoteProtocolError
from medfed.identity import Identity, verify
from medfed.privacy.plan import Plan
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.protocol import AggregatorConfig, parse_offer, split_offer
from medfed.privacy.statement import canonical
from medfed.roster import Roster
from medfed.seams import Seams
from medfed.server.ending import RunRecord, open_record
from medfed.server.exchange import Exchange, Kind
from medfed.server.heads import LedgerHeads
from medfed.server.mail import RETRY_S, Envelope, Mail, Outgoing
from medfed.server.store import Checkpoint, RoundRecord, Store
from medfed.study import Study
from medfed.wire import (
    Finish,
    Finished,
    OfferReply,
    Refusal,
    Refused,
    RoundRequest,
    SetupRequest,
    StateAccepted,
    StateTransfer,
    Upload,
    decode,
    encode,
    state_statement,
)
from medfed.witness import with_heads

log = logging.getLogger("medfed.server")

_FATAL = {
    Refused.BUDGET: "its budget does not cover the attempt",
    Refused.STATE_MISMATCH: "it computed another model state",
    Refused.SIGNATURES: "it refuses the signatures over the model state",
    Refused.OFFERS_REFUSED: "it refuses the peers' keys",
    Refused.LEDGER_BEHIND: "its ledger is older than others saw it, or a second copy (MF-405), and locked",
    Refused.HEADS_MISSING: "it misses what hospitals told of each other's ledgers",
}


class AttemptLost(Exception):
    """This attempt cannot complete; its event is spent."""


class SessionLost(Exception):
    """A hospital restarted during setup: the keys of its first offer are gone. Costs nothing."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What is remembered of the open attempt's request; the rest lies on disk."""

    attempt: int
    nonce: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """All that one run is about."""

    study: Study
    roster: Roster
    plan: Plan
    first: ModelState
    identity: Identity
    stamps: tuple[str, ...] = ()  # what the run must not be mistaken for: of rehearsals only

    def without_first(self) -> Assignment:
        """The same for the rounds after the first, without the first model's memory."""
        nothing = np.zeros(0, np.float32)
        return replace(self, first=ModelState(0, nothing, nothing, nothing, nothing))

    @property
    def vector_limit_bytes(self) -> int:
        """The longest vector that travels: a state or an upload."""
        return max(state_size_bytes(self.study, self.plan.words), self.secagg_config().upload_bytes)

    def secagg_config(self) -> AggregatorConfig:
        return AggregatorConfig(
            config_hash=self.study.hash(),
            roster_hash=self.roster.hash(),
            identities=self.roster.identities,
            colluders=self.study.cohort.colluders,
            words=self.plan.ring_words,
            ring_bits=self.study.quantization.ring_bits,
        )

    def advance(self, state: ModelState, total: bytes | memoryview) -> ModelState:
        integers = self.plan.read_total(total)
        nominal = self.roster.nominal_patients
        exponent = self.plan.grid_exponent(state.completed_rounds)
        return advance(state, integers, self.study, grid_exponent=exponent, nominal_patients=nominal)


Observer = Callable[[Checkpoint, str], None]  # (checkpoint, what is going on) for progress and status


class Rounds:
    """Runs one study to its end over an exchange, from the last checkpoint on."""

    def __init__(
        self, assignment: Assignment, exchange: Exchange, store: Store, seams: Seams, observe: Observer
    ) -> None:
        self._it = assignment.without_first()
        self._study_hash = assignment.study.hash()
        self._limit = assignment.vector_limit_bytes
        self._exchange = exchange
        self._store = store
        self._clock = seams.clock
        self._entropy = seams.entropy
        self._observe = observe
        self._aggregator: Aggregator | None = None
        self._session = b""
        self._heads = LedgerHeads(store.witness(), assignment.roster)
        self._transfers: set[bytes] = set()
        self._record: RunRecord | None = None
        # the request of the open attempt, until it is sent for the first time; then it lies on disk only
        self._unsent: bytes | None = None
        loaded = store.load_checkpoint()
        self._checkpoint = loaded or Checkpoint(assignment.first, None, b"", (), 0, ())

    @property
    def checkpoint(self) -> Checkpoint:
        """The last completed round, and the attempts used so far."""
        return self._checkpoint

    @property
    def record(self) -> RunRecord:
        """What proves the run, signed by all hospitals: there once ``run`` has returned."""
        if self._record is None:
            raise ProtocolError(900, "the run is not finished", "please report this")
        return self._record

    def run(self) -> Checkpoint:
        """All rounds that are left, then the final model. Returns the final checkpoint.

        Raises with the last good model kept: MF-190 attempts used up, MF-191 deadline, MF-192 a hospital refuses,
        MF-193 hospitals disagree.
        """
        request = self._open_attempt()
        while self._checkpoint.state.completed_rounds < self._it.study.released_sums:
            if request is None:
                self._ensure_session()
                request = self._new_attempt()
            try:
                self._complete(request)
            except AttemptLost as lost:
                log.warning("attempt %d is lost: %s", self._checkpoint.last_attempt, lost)
                self._aggregator = None
            self._store.clear_open_attempt()
            request = None
        self._finish()
        return self._checkpoint

    # --- setup -------------------------------------------------------------------------------------------------------

    def _ensure_session(self) -> None:
        """All hospitals' fresh key offers; waits for those that are away or have not approved yet."""
        end = self._clock.monotonic() + self._it.study.deadlines.setup_s
        while self._aggregator is None:
            try:
                self._aggregator = self._gather_offers(max(0.0, end - self._clock.monotonic()))
            except SessionLost as lost:
                log.warning("setup begins anew: %s", lost)
                self._clock.sleep(RETRY_S)

    def _gather_offers(self, timeout_s: float) -> Aggregator:
        """One session's setup. Raises ``SessionLost`` if a hospital restarted in it, MF-191 at the deadline."""
        self._session = self._entropy.draw("session", 16)
        aggregator = Aggregator(self._it.secagg_config())
        request = encode(SetupRequest(self._study_hash, self._session, self._heads.begin()), self._it.identity)
        mail = self._mail(lambda: request, Kind.QUERY, timeout_s)
        while not aggregator.offers_complete:
            waiting = aggregator.missing_offers
            self._observe(self._checkpoint, f"waiting for {self._names(waiting)}")
            for position, message, _ in mail.gather(waiting, f"{self._names(waiting)} did not join"):
                if isinstance(message, OfferReply) and message.session == self._session:
                    self._take_offer(aggregator, mail, position, message)
                elif isinstance(message, Refusal):
                    if message.nonce == self._session and message.reason == Refused.LEDGER_BEHIND:
                        self._refused(position, Refused.LEDGER_BEHIND)
                    log.info("%s: %s", self._name(position), _reason(message).name)
                    mail.again(position, RETRY_S)
        self._heads.save()
        return aggregator

    def _take_offer(self, aggregator: Aggregator, mail: Mail, position: int, reply: OfferReply) -> None:
        """An offer that does not verify or is not the sender's own is an alarm, and asked for again."""
        try:
            body, _ = split_offer(reply.offer)
            if parse_offer(body, self._it.secagg_config()).position != position:
                raise RemoteProtocolError(111, "an offer in another hospital's name", "refused")
            self._heads.take_told(position, reply.heads)
            aggregator.add_offer(reply.offer)
        except RemoteProtocolError as error:
            if error.code == 183:
                raise SessionLost(f"{self._name(position)} restarted") from error
            log.error("ALARM: offer of %s refused: %s", self._name(position), error)
            mail.again(position, RETRY_S)
            return
        if reply.highest_attempt > self._it.study.attempts:
            raise PrivacyError(
                192,
                f"{self._name(position)} claims to have used attempt {reply.highest_attempt}",
                "ask it what runs there",
            )
        highest = max(self._checkpoint.last_attempt, reply.highest_attempt)
        self._checkpoint = replace(self._checkpoint, last_attempt=highest)

    # --- an attempt --------------------------------------------------------------------------------------------------

    def _open_attempt(self) -> _Attempt | None:
        """The attempt that was open when the coordinator died: asked again with the same bytes, it costs nothing."""
        frame = self._store.load_open_attempt()
        if frame is None:
            return None
        request = decode(frame, vector_limit_bytes=self._limit)
        state = self._checkpoint.state
        if not isinstance(request, RoundRequest) or request.round != state.completed_rounds:
            self._store.clear_open_attempt()
            return None
        log.info("resuming attempt %d", request.attempt)
        self._aggregator = Aggregator.from_offers(self._it.secagg_config(), request.offers)
        self._session = request.session
        self._heads.resume(request.heads)
        self._aggregator.open_round(request.attempt, with_heads(task_hash(self._study_hash, state), request.heads))
        self._checkpoint = replace(self._checkpoint, last_attempt=request.attempt, previous=None, total=b"")
        return _Attempt(request.attempt, request.nonce)

    def _most_attempts(self, completed_rounds: int) -> int:
        """The last attempt that may be made here: of statistics, training and metrics, each as many as the study names.

        What one of them left over the next may not use: hospitals refuse it.
        """
        study = self._it.study
        before = 0 if study.statistics is None else 1
        if completed_rounds < before and study.statistics is not None:
            return study.statistics.attempts
        if completed_rounds < study.sums_to_train or study.metrics is None:
            return self._attempts_until(before) + study.training.attempts
        return self._attempts_until(study.sums_to_train) + study.metrics.attempts

    def _attempts_until(self, completed_rounds: int) -> int:
        """How many attempts it took to complete so many rounds."""
        return self._checkpoint.records[completed_rounds - 1].attempt if completed_rounds else 0

    def _new_attempt(self) -> _Attempt:
        """Take the next event of the fixed list and write its request down before anybody is asked."""
        attempt = self._checkpoint.last_attempt + 1
        done = self._checkpoint.state.completed_rounds
        if attempt > self._most_attempts(done):
            raise EnvironmentFault(
                190, f"all attempts are used after round {done}", "use the last good model, or plan a new study"
            )
        aggregator, state = self._aggregator, self._checkpoint.state
        if aggregator is None:
            raise ProtocolError(900, "no session", "please report this")
        request = RoundRequest(
            self._study_hash,
            self._session,
            self._entropy.draw("nonce", 16),
            attempt,
            state.completed_rounds,
            state_hash(self._study_hash, state),
            aggregator.offers(),
            self._heads.for_round(),
            self._total(),
        )
        self._unsent = encode(request, self._it.identity)
        self._store.save_open_attempt(self._unsent)
        # from here on the total is in the request; its own bytes may be those that the aggregator now sets to zero
        self._checkpoint = replace(self._checkpoint, last_attempt=attempt, previous=None, total=b"")
        aggregator.open_round(attempt, with_heads(task_hash(self._study_hash, state), request.heads))
        return _Attempt(attempt, request.nonce)

    def _total(self) -> bytes | memoryview:
        """The sum that led to this state: in memory right after its round, else from the checkpoint on disk."""
        if self._checkpoint.state.completed_rounds == 0 or len(self._checkpoint.total):
            return self._checkpoint.total
        return self._stored().total

    def _stored(self) -> Checkpoint:
        stored = self._store.load_checkpoint()
        if stored is None or stored.state.completed_rounds != self._checkpoint.state.completed_rounds:
            raise MedfedError(403, "the checkpoint on disk is not this run's", "restore it from backup")
        return stored

    def _request_frame(self) -> bytes:
        """The open attempt's request: not kept in memory between sending and sending again."""
        frame, self._unsent = self._unsent or self._store.load_open_attempt(), None
        if frame is None:
            raise MedfedError(403, "the open attempt is not on disk any more", "start again")
        return frame

    def _complete(self, request: _Attempt) -> None:
        """Ask everybody, add up, advance, checkpoint. Raises ``AttemptLost``."""
        aggregator = self._aggregator
        if aggregator is None:
            raise ProtocolError(900, "no open attempt", "please report this")
        number = self._checkpoint.state.completed_rounds + 1
        started = self._clock.monotonic()
        mail = self._mail(self._request_frame, Kind.TRAIN, self._it.study.deadlines.round_s)
        attestations: dict[int, bytes] = {}
        size = 0
        while aggregator.missing:
            self._observe(self._checkpoint, f"round {number}, attempt {request.attempt}")
            size = self._take_replies(mail, aggregator, request, attestations) or size
        self._advance(aggregator, attestations, request.attempt, self._clock.monotonic() - started, size)

    def _take_replies(
        self, mail: Mail, aggregator: Aggregator, request: _Attempt, attestations: dict[int, bytes]
    ) -> int:
        """One turn of the mail; returns an upload's length. No reply outlives it in memory."""
        size = 0
        try:
            replies = mail.gather(aggregator.missing, "deadline passed")
        except EnvironmentFault as error:
            raise AttemptLost(error.what) from error
        try:
            for position, message, reply_bytes in replies:
                if isinstance(message, Upload) and message.nonce == request.nonce:
                    self._take_upload(aggregator, position, message, attestations)
                    size = reply_bytes
                elif isinstance(message, Refusal) and self._concerns(message, request.nonce):
                    self._refused(position, _reason(message))
                elif isinstance(message, StateAccepted):
                    mail.again(position, 0.0)
        finally:
            self._heads.save()  # what was charged is known here even if the attempt, or this process, is lost now
        return size

    def _take_upload(
        self, aggregator: Aggregator, position: int, upload: Upload, attestations: dict[int, bytes]
    ) -> None:
        """First valid reply wins; other bytes for the same slot are an alarm and change nothing."""
        state = self._checkpoint.state
        statement = state_statement(self._study_hash, state.completed_rounds, state_hash(self._study_hash, state))
        try:
            verify(self._it.roster.identities[position], upload.attestation, statement)
            self._heads.take_upload(position, upload.head)
            aggregator.add_upload(upload.payload)
        except RemoteProtocolError as error:
            log.error("ALARM: upload of %s refused: %s", self._name(position), error)
            if error.code != 183 or position in aggregator.missing:  # one in quarantine will never be in the sum
                raise AttemptLost(f"{self._name(position)}: upload refused") from error
            return
        attestations[position] = upload.attestation

    def _refused(self, position: int, reason: Refused) -> None:
        name = self._name(position)
        if reason is Refused.NEED_STATE and self._checkpoint.state.completed_rounds > 0:
            self._transfer_state(position)
        elif reason is Refused.NOT_APPROVED:
            raise PrivacyError(192, f"{name} does not take part any more", "ask it; plan a new study without it")
        elif reason in _FATAL:
            raise PrivacyError(192, f"{name} stops the study: {_FATAL[reason]}", "ask it; its own log says more")
        else:
            raise AttemptLost(f"{name}: {reason.name}")

    def _concerns(self, refusal: Refusal, nonce: bytes) -> bool:
        """Whether it answers the open request, or says that the transferred state's signatures will never do."""
        is_final = refusal.nonce in self._transfers and refusal.reason == Refused.SIGNATURES
        return refusal.nonce == nonce or is_final

    def _transfer_state(self, position: int) -> None:
        """Bring a hospital back that lost its state: the last state that hospitals signed, then it advances itself."""
        stored = self._stored()
        previous = stored.previous
        if previous is None:
            raise AttemptLost("there is no signed state to transfer")
        nonce = self._entropy.draw("nonce", 16)
        self._transfers.add(nonce)
        log.info("transferring the state after round %d to %s", previous.completed_rounds, self._name(position))
        transfer = StateTransfer(
            self._study_hash,
            nonce,
            previous.completed_rounds,
            state_bytes(previous),
            self._checkpoint.attestations,
        )
        frame = encode(transfer, self._it.identity)
        self._exchange.send(position, Kind.QUERY, frame, self._it.study.deadlines.round_s)

    def _advance(
        self, aggregator: Aggregator, attestations: dict[int, bytes], attempt: int, seconds: float, upload_bytes: int
    ) -> None:
        total = aggregator.total_bytes()
        state = self._checkpoint.state
        after = self._it.advance(state, total)
        digest = state_hash(self._study_hash, after).hex()
        record = RoundRecord(after.completed_rounds, attempt, seconds, upload_bytes, digest)
        signed = tuple(position.to_bytes(2, "big") + attestations[position] for position in sorted(attestations))
        self._checkpoint = Checkpoint(
            after,
            state,
            total,
            signed,
            record.attempt,
            (*self._checkpoint.records, record),
        )
        self._store.save_checkpoint(self._checkpoint)
        self._checkpoint = replace(self._checkpoint, previous=None)  # the sum lives on until the next attempt opens
        rounds = self._it.study.released_sums
        log.info("round %d of %d done, attempt %d, %.2f s", record.round, rounds, record.attempt, record.seconds)
        self._observe(self._checkpoint, f"round {record.round} done")

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Every hospital works out the final model and its privacy statement itself, and signs both; all must agree."""
        it, state = self._it, self._checkpoint.state
        digest = state_hash(self._study_hash, state)
        record = open_record(it.study, it.roster, it.plan, it.identity, self._checkpoint, it.stamps)
        finish = Finish(
            study_hash=self._study_hash,
            nonce=self._entropy.draw("nonce", 16),
            round=state.completed_rounds,
            state_hash=digest,
            heads=self._heads.known(),
            statement=canonical(record.said),
            statement_signature=record.signature,
            total=self._total(),
        )
        frame = encode(finish, self._it.identity)
        mail = self._mail(lambda: frame, Kind.QUERY, self._it.study.deadlines.round_s)
        left = set(range(len(self._it.roster.hospitals)))
        while left:
            self._observe(self._checkpoint, f"final model: waiting for {self._names(frozenset(left))}")
            for position, message, _ in mail.gather(frozenset(left), "no signature over the final model from all"):
                if isinstance(message, Finished) and message.nonce == finish.nonce:
                    record.take(position, message)
                    left.discard(position)
                elif isinstance(message, Refusal) and self._concerns(message, finish.nonce):
                    if message.reason == Refused.LEDGER_BEHIND:
                        self._refused(position, Refused.LEDGER_BEHIND)
                    if message.reason != Refused.NEED_STATE:
                        raise RemoteProtocolError(
                            193, f"{self._name(position)} does not confirm the final model", "its own log says why"
                        )
                    self._transfer_state(position)
                elif isinstance(message, StateAccepted):
                    mail.again(position, 0.0)
        self._record = record

    # --- small things ------------------------------------------------------------------------------------------------

    def _mail(self, frame: Callable[[], bytes], kind: Kind, timeout_s: float) -> Mail:
        envelope = Envelope(self._study_hash, self._it.roster.identities, self._limit)
        return Mail(self._exchange, self._clock, envelope, Outgoing(frame, kind, timeout_s), self._name)

    def _name(self, position: int) -> str:
        return self._it.roster.hospitals[position].hospital

    def _names(self, positions: frozenset[int]) -> str:
        return ", ".join(self._name(position) for position in sorted(positions))


def _reason(refusal: Refusal) -> Refused:
    """A reason that this version does not know is a fault at the hospital like any other."""
    try:
        return Refused(refusal.reason)
    except ValueError:
        return Refused.INTERNAL
