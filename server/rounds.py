"""The coordinator's rounds: gather keys, ask, sum, advance, checkpoint; attempts, spares and deadlines.

Nothing here touches a network or Flower: an ``Exchange`` carries frames. One attempt number is one privacy event at every
hospital, whether it completes a round or is lost; when ``rounds + spare_attempts`` of them are used the run stops and the
last good model stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from medfed.advance import ModelState, state_bytes, state_hash, task_hash
from medfed.errors import EnvironmentFault, MedfedError, ProtocolError, RemoteProtocolError
from medfed.identity import verify
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.statement import canonical
from medfed.seams import Seams
from medfed.server.assignment import Assignment
from medfed.server.ending import RunRecord, open_record
from medfed.server.exchange import Exchange, Kind
from medfed.server.heads import LedgerHeads
from medfed.server.mail import Envelope, Frames, Mail, Outgoing, same
from medfed.server.opening import Asked, AttemptLost, Opening
from medfed.server.replies import AWAITED, FATAL, STOPS, Names, reason_of, stop
from medfed.server.sessions import Sessions
from medfed.server.standing import Standing
from medfed.server.store import Checkpoint, RoundRecord, Store
from medfed.wire import (
    Finish,
    Finished,
    Refusal,
    Refused,
    RoundRequest,
    StateAccepted,
    StateTransfer,
    Upload,
    decode,
    encode,
    one_piece,
    pack_positions,
    state_statement,
)
from medfed.witness import with_heads

log = logging.getLogger("medfed.server")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What is remembered of the open attempt's request; the rest lies on disk."""

    attempt: int
    nonce: bytes


@dataclass(slots=True)
class _Uploads:
    """What became of one attempt's requests. ``gone``: whose answers are not expected any more; ``stateless``: who lack the
    model state; ``told``: why the last one went. ``vain_since``: since when all that are waited for are away."""

    request: _Attempt
    attestations: dict[int, bytes] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    stateless: set[int] = field(default_factory=set)
    helped: set[int] = field(default_factory=set)
    told: str = "deadline passed"
    size: int = 0
    vain_since: float | None = None


GRACE_S = 5.0  # who is away when all others have answered may come back for so long

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
        self._heads = LedgerHeads(store.witness(), assignment.roster)
        self._names = Names(assignment.roster)
        fewest = assignment.study.cohort.fewest_survivors
        self._standing = Standing(len(assignment.roster.hospitals), fewest, self._names.one)
        self._fewest = fewest
        self._sessions = Sessions(self._it, exchange, seams, self._heads, self._standing, self._mail, self._tell)
        self._transfers: set[bytes] = set()
        self._away: frozenset[int] = frozenset()  # when the last round went on without them
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
                self._aggregator = self._aggregator or self._begin_session()
                request = self._new_attempt()
            try:
                self._complete(request)
            except AttemptLost as lost:
                log.warning("attempt %d is lost: %s", self._checkpoint.last_attempt, lost)
                self._aggregator = None
            last = self._checkpoint.last_attempt
            if self._aggregator is not None and self._sessions.is_wider_possible(self._aggregator.cohort, last):
                self._aggregator = None  # keys are made anew, so that those who are back take part again
            self._store.clear_open_attempt()
            request = None
        self._finish()
        return self._checkpoint

    def _begin_session(self) -> Aggregator:
        aggregator, last_attempt = self._sessions.begin(self._checkpoint.last_attempt)
        self._checkpoint = replace(self._checkpoint, last_attempt=last_attempt)
        return aggregator

    def _tell(self, what: str) -> None:
        self._observe(self._checkpoint, what)

    def _suspect(self, positions: Iterable[int], why: str) -> None:
        self._standing.suspect(positions, why, self._checkpoint.last_attempt)

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
        try:
            self._aggregator = Aggregator.from_offers(self._it.secagg_config(), request.offers)
        except RemoteProtocolError as error:
            if error.code != 112:
                raise
            log.warning("attempt %d is lost: it was of the roster before hospitals joined", request.attempt)
            self._checkpoint = replace(self._checkpoint, last_attempt=request.attempt)
            self._store.clear_open_attempt()
            return None
        log.info("resuming attempt %d", request.attempt)
        self._sessions.session = request.session
        self._heads.resume(request.heads)
        task = with_heads(task_hash(self._study_hash, state), request.heads)
        self._aggregator.open_round(request.attempt, task, self._store.load_survivors(request.nonce))
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
            self._sessions.session,
            self._entropy.draw("nonce", 16),
            attempt,
            state.completed_rounds,
            state_hash(self._study_hash, state),
            aggregator.offers(),
            self._heads.for_round(),
            self._survivors(),
            self._total(),
        )
        self._unsent = encode(request, self._it.identity)
        self._store.save_open_attempt(self._unsent)
        # from here on the total is in the request; its own bytes may be those that the aggregator now sets to zero
        self._checkpoint = replace(self._checkpoint, last_attempt=attempt, previous=None, total=b"")
        aggregator.open_round(attempt, with_heads(task_hash(self._study_hash, state), request.heads))
        return _Attempt(attempt, request.nonce)

    def _survivors(self) -> bytes:
        """Whose uploads are in the sum that led to this state, as it travels."""
        records = self._checkpoint.records
        return pack_positions(records[-1].survivors) if records else b""

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
        """Ask everybody, add up, open the sum, advance, checkpoint. Raises ``AttemptLost``."""
        aggregator = self._aggregator
        if aggregator is None:
            raise ProtocolError(900, "no open attempt", "please report this")
        started = self._clock.monotonic()
        uploads = _Uploads(request)
        self._gather_uploads(aggregator, uploads)
        if not aggregator.cohort.is_strict:
            asked = Asked(self._study_hash, self._sessions.session, request.nonce, request.attempt)
            opening = Opening(aggregator, asked, self._it.identity, self._store, self._opening_mail, self._names.one)
            try:
                opening.open()
            except AttemptLost as lost:
                self._suspect((opening.suspects | aggregator.suspects) - opening.without_keys, str(lost))
                raise
            finally:
                self._sessions.without_keys |= opening.without_keys
        self._advance(aggregator, uploads, self._clock.monotonic() - started)

    def _opening_mail(self, frames: Frames) -> Mail:
        return self._mail(frames, Kind.QUERY, self._it.study.deadlines.round_s)

    def _gather_uploads(self, aggregator: Aggregator, uploads: _Uploads) -> None:
        """Until all are in, or enough are and no other can be expected. Raises ``AttemptLost``."""
        number = self._checkpoint.state.completed_rounds + 1
        needed = aggregator.cohort.thresholds.survivors
        mail = self._mail(same(self._request_frame), Kind.TRAIN, self._it.study.deadlines.round_s)
        while waiting := aggregator.missing - uploads.gone:
            self._observe(self._checkpoint, f"round {number}, attempt {uploads.request.attempt}")
            if len(aggregator.uploaded) + len(waiting) < needed:
                break
            if len(aggregator.uploaded) >= needed and self._is_vain(mail, waiting, uploads):
                break
            try:
                self._take_replies(mail, waiting, aggregator, uploads)
            except EnvironmentFault as error:
                if len(aggregator.uploaded) < needed:
                    raise AttemptLost(error.what) from error
                break
        self._away = frozenset(filter(mail.away, aggregator.missing))
        if len(aggregator.uploaded) < needed:
            raise AttemptLost(f"{len(aggregator.uploaded)} of {needed} uploads needed: {uploads.told}")

    def _is_vain(self, mail: Mail, waiting: frozenset[int], uploads: _Uploads) -> bool:
        """Whether all that is waited for have been away for a while, or since the round before."""
        now = self._clock.monotonic()
        if not all(map(mail.away, waiting)):
            uploads.vain_since = None
            return False
        uploads.vain_since = now if uploads.vain_since is None else uploads.vain_since
        return waiting <= self._away or now - uploads.vain_since >= GRACE_S

    def _take_replies(self, mail: Mail, waiting: frozenset[int], aggregator: Aggregator, uploads: _Uploads) -> None:
        """One turn of the mail. No reply outlives it in memory."""
        replies = mail.gather(waiting, "deadline passed")
        nonce = uploads.request.nonce
        try:
            for position, message, reply_bytes in replies:
                if isinstance(message, Upload) and message.nonce == nonce:
                    self._take_upload(aggregator, position, message, uploads)
                    uploads.size = reply_bytes
                elif isinstance(message, Refusal) and self._concerns(message, nonce):
                    self._refused(position, reason_of(message), aggregator, uploads)
                elif isinstance(message, StateAccepted):
                    mail.again(position, 0.0)
            self._bring_back(uploads)
        finally:
            self._heads.save()  # what was charged is known here even if the attempt, or this process, is lost now

    def _take_upload(self, aggregator: Aggregator, position: int, upload: Upload, uploads: _Uploads) -> None:
        """First valid reply wins; other bytes for the same slot are an alarm and change nothing."""
        state = self._checkpoint.state
        statement = state_statement(self._study_hash, state.completed_rounds, state_hash(self._study_hash, state))
        try:
            verify(self._it.roster.identities[position], upload.attestation, statement)
            self._heads.take_upload(position, upload.head)
            aggregator.add_upload(one_piece(upload.payload), sender=position)
        except RemoteProtocolError as error:
            log.error("ALARM: upload of %s refused: %s", self._names.one(position), error)
            if error.code != 183 or position in aggregator.missing:  # one in quarantine will never be in the sum
                self._suspect({position}, "its upload is refused")
                self._lose(position, f"{self._names.one(position)}: upload refused", aggregator, uploads, error)
            return
        uploads.attestations[position] = upload.attestation

    def _lose(
        self,
        position: int,
        why: str,
        aggregator: Aggregator,
        uploads: _Uploads,
        cause: Exception | None = None,
    ) -> None:
        """Go on without this hospital's upload, or without the attempt where every one is needed."""
        if aggregator.cohort.is_strict:
            raise AttemptLost(why) from cause
        log.warning("attempt %d: no upload of %s", uploads.request.attempt, why)
        uploads.gone.add(position)
        uploads.told = why

    def _refused(self, position: int, reason: Refused, aggregator: Aggregator, uploads: _Uploads) -> None:
        name = self._names.one(position)
        if reason in (Refused.NO_SESSION, Refused.ATTEMPT_SPENT):  # both are what a restarted hospital says
            self._sessions.without_keys.add(position)
        is_stateless = reason is Refused.NEED_STATE and self._checkpoint.state.completed_rounds > 0
        if is_stateless and position not in uploads.helped:
            uploads.stateless.add(position)
        elif reason not in STOPS or self._standing.is_robust:
            if reason in FATAL:
                self._suspect({position}, FATAL[reason])
            self._lose(position, f"{name}: {reason.name}", aggregator, uploads)
        else:
            raise stop(name, reason)

    def _concerns(self, refusal: Refusal, nonce: bytes) -> bool:
        """Whether it answers the open request, or says that the transferred state's signatures will never do."""
        is_final = refusal.nonce in self._transfers and refusal.reason == Refused.SIGNATURES
        return refusal.nonce == nonce or is_final

    def _bring_back(self, uploads: _Uploads) -> None:
        """Send the state to those who lack it, with signatures of c + 1 hospitals.

        Who is in the last sum gets the state before it, and advances by itself. Who is not gets this state, once enough of the
        others have signed it with their uploads.
        """
        for position in sorted(uploads.stateless):
            records = self._checkpoint.records
            if records and position in records[-1].survivors:
                stored = self._stored()
                if stored.previous is None:
                    raise AttemptLost("there is no signed state to transfer")
                self._transfer_state(position, stored.previous, self._checkpoint.attestations)
            elif len(uploads.attestations) > self._it.study.cohort.colluders:
                self._transfer_state(position, self._checkpoint.state, _signed(uploads.attestations))
            else:
                continue
            uploads.stateless.discard(position)
            uploads.helped.add(position)

    def _transfer_state(self, position: int, state: ModelState, signatures: tuple[bytes, ...]) -> None:
        nonce = self._entropy.draw("nonce", 16)
        self._transfers.add(nonce)
        log.info("transferring the state after round %d to %s", state.completed_rounds, self._names.one(position))
        transfer = StateTransfer(self._study_hash, nonce, state.completed_rounds, state_bytes(state), signatures)
        frame = encode(transfer, self._it.identity)
        self._exchange.send(position, Kind.QUERY, frame, self._it.study.deadlines.round_s)

    def _advance(self, aggregator: Aggregator, uploads: _Uploads, seconds: float) -> None:
        total, survivors = aggregator.total_bytes(), aggregator.survivors
        state = self._checkpoint.state
        after = self._it.advance(state, total, survivors)
        digest = state_hash(self._study_hash, after).hex()
        attempt = uploads.request.attempt
        record = RoundRecord(after.completed_rounds, attempt, seconds, uploads.size, digest, survivors)
        self._checkpoint = Checkpoint(
            after,
            state,
            total,
            _signed({position: uploads.attestations[position] for position in survivors}),
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
        """Every hospital works out the final model and its privacy statement itself, and signs both; all must agree.

        Who cannot be reached is waited for; where a round may do without it, so may the end once the deadline has passed.
        """
        it, state = self._it, self._checkpoint.state
        record = open_record(it.study, it.roster, it.plan, it.identity, self._checkpoint, it.stamps)
        finish = Finish(
            study_hash=self._study_hash,
            nonce=self._entropy.draw("nonce", 16),
            round=state.completed_rounds,
            state_hash=state_hash(self._study_hash, state),
            heads=self._heads.known(),
            statement=canonical(record.said),
            statement_signature=record.signature,
            survivors=self._survivors(),
            total=self._total(),
        )
        frame = encode(finish, self._it.identity)
        mail = self._mail(same(lambda: frame), Kind.QUERY, self._it.study.deadlines.round_s)
        ending = _Uploads(_Attempt(self._checkpoint.last_attempt, finish.nonce))
        everybody = frozenset(range(len(it.roster.hospitals)))
        while left := everybody - set(record.signed) - ending.gone:
            self._observe(self._checkpoint, f"final model: waiting for {self._names.several(left)}")
            enough = self._fewest < len(everybody) and len(record.signed) >= self._fewest
            if enough and self._is_vain(mail, left, ending):
                break
            try:
                replies = mail.gather(left, "no signature over the final model from all")
            except EnvironmentFault:
                if not enough:
                    raise
                break
            for position, message, _ in replies:
                if isinstance(message, Finished) and message.nonce == finish.nonce:
                    if self._is_confirmed(record, position, message, ending):
                        ending.attestations[position] = message.attestation
                elif isinstance(message, Refusal) and self._concerns(message, finish.nonce):
                    self._unfinished(position, reason_of(message), ending)
                elif isinstance(message, StateAccepted):
                    mail.again(position, 0.0)
            self._bring_back(ending)
        if len(record.signed) < self._fewest:
            raise RemoteProtocolError(193, "too few hospitals confirm the final model", "their own logs say why")
        absent = everybody - set(record.signed)
        if absent:
            log.warning("the final model is not signed by %s", self._names.several(absent))
        self._record = record

    def _is_confirmed(self, record: RunRecord, position: int, message: Finished, ending: _Uploads) -> bool:
        """Take a hospital's signature over the final model. A wrong one is done without where others are enough."""
        try:
            record.take(position, message)
        except RemoteProtocolError as error:
            if not self._standing.is_robust:
                raise
            log.error("ALARM: %s", error)
            ending.gone.add(position)
            return False
        return True

    def _unfinished(self, position: int, reason: Refused, ending: _Uploads) -> None:
        name = self._names.one(position)
        if reason is Refused.NEED_STATE and position not in ending.helped:
            ending.stateless.add(position)
        elif self._standing.is_robust:
            level = logging.WARNING if reason in AWAITED else logging.ERROR
            log.log(level, "%s does not confirm the final model: %s", name, reason.name)
            ending.gone.add(position)
        elif reason is Refused.LEDGER_BEHIND:
            raise stop(name, reason)
        else:
            raise RemoteProtocolError(193, f"{name} does not confirm the final model", "its own log says why")

    # --- small things ------------------------------------------------------------------------------------------------

    def _mail(self, frames: Frames, kind: Kind, timeout_s: float) -> Mail:
        envelope = Envelope(self._study_hash, self._it.roster.identities, self._limit)
        return Mail(self._exchange, self._clock, envelope, Outgoing(frames, kind, timeout_s), self._names.one)


def _signed(attestations: Mapping[int, bytes]) -> tuple[bytes, ...]:
    """BE16 position ‖ signature, as they travel."""
    return tuple(position.to_bytes(2, "big") + attestations[position] for position in sorted(attestations))
