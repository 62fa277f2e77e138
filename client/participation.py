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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medfed.advance import (
    ModelState,
    advance,
    parse_state,
    released_weights,
    state_bytes,
    state_hash,
    state_size_bytes,
    task_hash,
)
from medfed.client.ledger import AttemptState, Caps, Ledger, StudyState
from medfed.client.trainer import Patients, gradient_sum
from medfed.errors import BudgetExhausted, MedfedError, ProtocolError, RemoteProtocolError
from medfed.identity import SIGNATURE_BYTES, Identity, verify
from medfed.models import parameters, tasks
from medfed.models.records import Records
from medfed.privacy.plan import Plan
from medfed.privacy.quantize import quantize
from medfed.privacy.secagg.party import Party
from medfed.privacy.secagg.protocol import SecaggConfig
from medfed.roster import Roster
from medfed.seams import Seams
from medfed.study import Study
from medfed.wire import (
    Finish,
    Finished,
    Message,
    OfferReply,
    Refused,
    RoundRequest,
    SetupRequest,
    StateAccepted,
    StateTransfer,
    Upload,
    encode,
    expect,
    state_statement,
)

log = logging.getLogger("medfed.client")

# (key of 32 fresh bytes, standard deviation in grid units, size) -> int64[size]
Noise = Callable[[bytes, float, int], NDArray[np.int64]]


class Refuse(Exception):
    """Answer this request with a reason from the fixed list; ``cause`` is for this hospital's own log."""

    def __init__(self, reason: Refused, cause: str) -> None:
        super().__init__(cause)
        self.reason = reason
        self.cause = cause


@dataclass(frozen=True, slots=True, eq=False)
class Approved:
    """What this hospital's people approved, checked again at start-up, and what it works on."""

    study: Study
    roster: Roster
    position: int
    plan: Plan
    model: nn.Module
    first: ModelState
    patients: Patients
    holdout: Records
    folder: Path


class Participation:
    """The state machine of one approved study. Not thread-safe: the node hands it one request at a time."""

    def __init__(
        self, approved: Approved, identity: Identity, ledger: Ledger, caps: Caps, seams: Seams, noise: Noise
    ) -> None:
        self.approved = approved
        self.study_hash = approved.study.hash()
        self._identity = identity
        self._ledger = ledger
        self._caps = caps
        self._seams = seams
        self._noise = noise
        self._session = b""
        self._offer_reply = b""
        self._party: Party | None = None
        self._offers: tuple[bytes, ...] | None = None
        self._state = self._load_state()

    @property
    def completed_rounds(self) -> int:
        return self._state.completed_rounds

    @property
    def is_expired(self) -> bool:
        """Judged by the clock or the ledger's latest time, whichever is later: turning the clock back gains nothing."""
        now = max(self._seams.clock.wall(), self._ledger.highest_wall())
        return self.approved.study.expired(now)

    @property
    def _is_open(self) -> bool:
        return self._ledger.approved(self.study_hash).state is StudyState.OPEN

    def answer(self, message: Message) -> bytes:
        """The reply frame to a request whose signature was checked. Raises ``Refuse``."""
        if isinstance(message, SetupRequest):
            return self._set_up(message)
        if isinstance(message, RoundRequest):
            return self._take_part(message)
        if isinstance(message, StateTransfer):
            return self._take_state(message)
        return self._finish(expect(message, Finish))

    # --- session ---------------------------------------------------------------------------------------------------

    def _set_up(self, request: SetupRequest) -> bytes:
        """Fresh keys for a session; the same session asked again gets the same bytes."""
        self._check_open()
        if request.session != self._session:
            self._end_session()
            approved = self.approved
            config = SecaggConfig(
                config_hash=self.study_hash,
                roster_hash=approved.roster.hash(),
                position=approved.position,
                identities=approved.roster.identities,
                colluders=approved.study.cohort.colluders,
                words=approved.plan.words,
                ring_bits=approved.study.quantization.ring_bits,
            )
            party = Party(config, self._identity.sign, self._seams.entropy)
            reply = OfferReply(
                self.study_hash,
                request.session,
                approved.position,
                self._ledger.highest_attempt(self.study_hash),
                party.offer(),
            )
            self._party, self._session = party, request.session
            self._offer_reply = encode(reply, self._identity)
        return self._offer_reply

    def _end_session(self) -> None:
        self._party, self._session, self._offer_reply, self._offers = None, b"", b"", None

    def _check_open(self) -> None:
        if not self._is_open:
            raise Refuse(Refused.NOT_APPROVED, "the study is closed or withdrawn here")

    # --- a round ---------------------------------------------------------------------------------------------------

    def _take_part(self, request: RoundRequest) -> bytes:
        self._check_open()
        sealed = self._sealed_reply(request)
        if sealed is not None:
            return sealed
        if request.attempt <= self._ledger.highest_attempt(self.study_hash):
            raise Refuse(Refused.OUT_OF_ORDER, f"attempt {request.attempt} lies behind")
        party = self._party
        if party is None or request.session != self._session:
            raise Refuse(Refused.NO_SESSION, "the keys of this session are not here")
        self._catch_up(request.round, request.total, request.state_hash)
        if self._state.completed_rounds >= self.approved.study.training.rounds:
            raise Refuse(Refused.OUT_OF_ORDER, "all rounds are done")
        self._accept_offers(party, request.offers)
        self._reserve(request)
        try:
            return self._train_and_seal(party, request)
        except MedfedError as error:
            with contextlib.suppress(MedfedError):  # a ledger that cannot be written: the row stays, still charged
                self._abandon(request.attempt, f"MF-{error.code}")
            raise Refuse(Refused.INTERNAL, str(error)) from error

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
            "%s: round %d of %d, attempt %d, epsilon spent %.3f",
            self.approved.study.study.name,
            request.round + 1,
            self.approved.study.training.rounds,
            request.attempt,
            debit.epsilon_after,
        )

    def _train_and_seal(self, party: Party, request: RoundRequest) -> bytes:
        """From here on the attempt is charged."""
        clock, started = self._seams.clock, self._seams.clock.monotonic()
        vector = self._noised_vector()
        trained = clock.monotonic()
        party.open_round(request.attempt, task_hash(self.study_hash, self._state))
        vector_hash = hashlib.sha256(vector.astype("<i8").tobytes()).digest()
        masked = party.mask(vector)
        party.close_round()
        reply = encode(
            Upload(
                self.study_hash,
                request.nonce,
                self.approved.position,
                request.attempt,
                request.round,
                self._attestation(),
                masked.payload,
            ),
            self._identity,
        )
        self._seams.files.write(self._outbox_path, _binding(request) + reply, private=True)
        self._ledger.seal_and_release(
            self.study_hash, request.attempt, vector_hash, masked.pad_id, hashlib.sha256(reply).digest()
        )
        self._note(request, trained - started, clock.monotonic() - started)
        self._wait_for_slot(started)
        return reply

    def _noised_vector(self) -> NDArray[np.int64]:
        """Clipped sum -> saturated integers + fresh integer noise, never clipped again: int64[d]."""
        approved, plan, entropy = self.approved, self.approved.plan, self._seams.entropy
        total = gradient_sum(
            approved.study,
            approved.model,
            self._state.weights.astype(np.float32),
            approved.patients,
            sampling_key=entropy.draw("sampling", 64),
        )
        integers = quantize(total, plan.exponent, plan.limit)
        return integers + self._noise(entropy.draw("noise", 32), plan.noise_sd, plan.words)

    def _wait_for_slot(self, started: float) -> None:
        """Leave a whole number of slots after the request came, so that the time says nothing of the patients."""
        slot = self.approved.study.deadlines.slot_s
        if slot is not None:
            elapsed = self._seams.clock.monotonic() - started
            self._seams.clock.sleep(slot - elapsed % slot)

    def _abandon(self, attempt: int, reason: str) -> None:
        if self._party is not None:
            self._party.close_round()
        self._ledger.abandon(self.study_hash, attempt, reason)

    # --- the model state ---------------------------------------------------------------------------------------------

    def _catch_up(self, completed_rounds: int, total: bytes, named_hash: bytes) -> None:
        """Bring the state to ``completed_rounds`` by this hospital's own arithmetic; it must get the hash named."""
        state = self._state
        if state.completed_rounds == completed_rounds - 1:
            state = self._advanced(state, total)
        elif state.completed_rounds < completed_rounds:
            raise Refuse(Refused.NEED_STATE, f"here after round {state.completed_rounds}")
        if state.completed_rounds != completed_rounds:
            raise Refuse(Refused.OUT_OF_ORDER, f"this hospital is already after round {state.completed_rounds}")
        if state_hash(self.study_hash, state) != named_hash:
            raise Refuse(Refused.STATE_MISMATCH, "the state named is not the one computed here")
        if state is not self._state:
            self._keep(state)
            self._acknowledge()

    def _acknowledge(self) -> None:
        """The released sum holds this hospital's last upload: the coordinator has it."""
        attempt = self._ledger.highest_attempt(self.study_hash)
        if self._ledger.attempt_status(self.study_hash, attempt) is AttemptState.RELEASED:
            self._ledger.acknowledge(self.study_hash, attempt)

    def _advanced(self, state: ModelState, total: bytes) -> ModelState:
        study, plan = self.approved.study, self.approved.plan
        try:
            integers = plan.read_total(total)
        except ProtocolError as error:
            raise Refuse(Refused.STATE_MISMATCH, str(error)) from error
        nominal = self.approved.roster.nominal_patients
        return advance(state, integers, study, grid_exponent=plan.exponent, nominal_patients=nominal)

    def _take_state(self, request: StateTransfer) -> bytes:
        """Accept a state only with the signatures of c + 1 hospitals: at least one of them is honest."""
        try:
            state = parse_state(request.state, self.approved.plan.words)
            self._check_attestations(request, state)
        except RemoteProtocolError as error:
            raise Refuse(Refused.SIGNATURES, str(error)) from error
        if state.completed_rounds < self._state.completed_rounds:
            raise Refuse(Refused.OUT_OF_ORDER, "the state transferred lies behind this hospital's")
        self._keep(state)
        accepted = StateAccepted(self.study_hash, request.nonce, self.approved.position, state.completed_rounds)
        return encode(accepted, self._identity)

    def _check_attestations(self, request: StateTransfer, state: ModelState) -> None:
        needed = self.approved.study.cohort.colluders + 1
        statement = state_statement(self.study_hash, state.completed_rounds, state_hash(self.study_hash, state))
        signers: set[int] = set()
        for item in request.attestations:
            position, signature = int.from_bytes(item[:2], "big"), item[2:]
            if position >= len(self.approved.roster.identities):
                raise RemoteProtocolError(111, "a signer of the state is not in the roster", "refused")
            verify(self.approved.roster.identities[position], signature, statement)
            signers.add(position)
        if len(signers) < needed or state.completed_rounds != request.round:
            raise RemoteProtocolError(155, f"{len(signers)} of {needed} signatures over the state", "refused")

    def _attestation(self) -> bytes:
        digest = state_hash(self.study_hash, self._state)
        return self._identity.sign(state_statement(self.study_hash, self._state.completed_rounds, digest))

    def _finish(self, request: Finish) -> bytes:
        """The last sum: compute, keep, score and sign the final model; the study is closed and its spares are freed."""
        self._catch_up(request.round, request.total, request.state_hash)
        if self._state.completed_rounds != self.approved.study.training.rounds:
            raise Refuse(Refused.OUT_OF_ORDER, "rounds are left")
        self._write_model()
        if self._is_open:
            self._ledger.close_study(self.study_hash, "all rounds done")
            log.info("%s is done; the model is in %s", self.approved.study.study.name, self.approved.folder)
        self._end_session()
        reply = Finished(self.study_hash, request.nonce, self.approved.position, request.round, self._attestation())
        return encode(reply, self._identity)

    # --- disk --------------------------------------------------------------------------------------------------------

    @property
    def _outbox_path(self) -> Path:
        return self.approved.folder / "outbox.bin"

    @property
    def _state_path(self) -> Path:
        return self.approved.folder / "state.bin"

    def _keep(self, state: ModelState) -> None:
        """Write the state with this hospital's signature, then use it."""
        previous, self._state = self._state, state
        try:
            self._seams.files.write(self._state_path, state_bytes(state) + self._attestation())
        except MedfedError:
            self._state = previous
            raise

    def _load_state(self) -> ModelState:
        """The state this hospital signed last; without a file, the approved first model."""
        if not self._seams.files.exists(self._state_path):
            return self.approved.first
        words = self.approved.plan.words
        data = self._seams.files.read(self._state_path, limit_bytes=state_size_bytes(words) + SIGNATURE_BYTES)
        state = parse_state(data[:-SIGNATURE_BYTES], words)
        statement = state_statement(self.study_hash, state.completed_rounds, state_hash(self.study_hash, state))
        verify(self._identity.public, data[-SIGNATURE_BYTES:], statement)
        return state

    def _write_model(self) -> None:
        approved, files = self.approved, self._seams.files
        flat = released_weights(self._state, approved.study)
        files.write(approved.folder / "model.safetensors", parameters.to_safetensors(approved.model, flat))
        parameters.assign(approved.model, flat)
        if len(approved.holdout.labels):
            scores = tasks.evaluate(approved.model, approved.study.task, approved.holdout)
            report = {"evaluation": "own holdout, never sent", **scores}
            files.write(approved.folder / "evaluation.json", json.dumps(report, indent=1).encode(), private=True)

    def _note(self, request: RoundRequest, train_s: float, total_s: float) -> None:
        """One line for this hospital's own eyes."""
        line = {"attempt": request.attempt, "round": request.round + 1, "train_s": train_s, "total_s": total_s}
        self._seams.files.append(self.approved.folder / "rounds.jsonl", json.dumps(line).encode() + b"\n")


def _binding(request: RoundRequest) -> bytes:
    """What a stored reply answers: every field of the request but its signature."""
    parts = (request.session, request.nonce, request.state_hash, *request.offers)
    numbers = request.attempt.to_bytes(4, "big") + request.round.to_bytes(4, "big")
    return hashlib.sha256(numbers + b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
