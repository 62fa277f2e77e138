"""The model state of one study at one hospital: how it may change, where it lies, what this hospital signs of it.

A state changes in two ways only. This hospital advances it by a released sum of a round that it paid an attempt for, so that
whoever invents sums has to spend an attempt for each; or it takes a later state that c + 1 hospitals signed, each of which
got there the first way or the second, so that one honest hospital spent an attempt on every round.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medfed.advance import (
    Integers,
    ModelState,
    advance,
    parse_state,
    released_weights,
    state_hash,
    state_pieces,
    state_size_bytes,
)
from medfed.client.approved import Approved
from medfed.client.refusal import Refuse
from medfed.errors import MedfedError, ProtocolError, RemoteProtocolError
from medfed.identity import SIGNATURE_BYTES, Identity, verify
from medfed.models import parameters, tasks
from medfed.seams import Files
from medfed.study import Study
from medfed.wire import Refused, StateTransfer, state_statement

log = logging.getLogger("medfed.client")


class Advance(Protocol):
    """``medfed.advance.advance``, or what gives the same bits."""

    def __call__(
        self,
        state: ModelState,
        total: Integers,
        study: Study,
        *,
        grid_exponent: int,
        nominal_patients: int,
        roster_patients: int | None = None,
        noise_variance: float | None = None,
    ) -> ModelState: ...


@dataclass(frozen=True, slots=True, eq=False)
class Released:
    """A sum as the coordinator relays it: ring words, and whose uploads it holds."""

    total: bytes | memoryview
    survivors: tuple[int, ...]


class ModelKeeper:
    """Holds the state of one approved study; every change is on disk before it is used."""

    def __init__(
        self,
        approved: Approved,
        identity: Identity,
        files: Files,
        uploaded_in_round: Callable[[int], bool],
        step: Advance = advance,
    ) -> None:
        """``uploaded_in_round(r)``: whether this hospital's last upload was one of round r = 1, 2, ..."""
        self._approved = approved
        self._study_hash = approved.study.hash()
        self._identity = identity
        self._files = files
        self._uploaded_in_round = uploaded_in_round
        self._step = step
        self.state = self._load()

    @property
    def is_final(self) -> bool:
        return self.state.completed_rounds >= self._approved.study.released_sums

    def attestation(self) -> bytes:
        """This hospital's signature over its state."""
        return self._sign(self.state)

    def _sign(self, state: ModelState) -> bytes:
        return self._identity.sign(self._statement(state))

    def _statement(self, state: ModelState) -> bytes:
        return state_statement(self._study_hash, state.completed_rounds, state_hash(self._study_hash, state))

    def catch_up(self, completed_rounds: int, released: Released, named_hash: bytes) -> bool:
        """Bring the state to ``completed_rounds`` by this hospital's own arithmetic; it must get the hash named.

        Returns whether it changed. Raises ``Refuse``; the state is then as before.
        """
        state = self.state
        if state.completed_rounds == completed_rounds - 1 and self._uploaded_in_round(completed_rounds):
            state = self._advanced(state, released)
        elif state.completed_rounds < completed_rounds:
            raise Refuse(Refused.NEED_STATE, f"here after round {state.completed_rounds}")
        if state.completed_rounds != completed_rounds:
            raise Refuse(Refused.OUT_OF_ORDER, f"this hospital is already after round {state.completed_rounds}")
        if state_hash(self._study_hash, state) != named_hash:
            raise Refuse(Refused.STATE_MISMATCH, "the state named is not the one computed here")
        changed = state is not self.state
        if changed:
            self._keep(state)
        return changed

    def _advanced(self, state: ModelState, released: Released) -> ModelState:
        study, plan = self._approved.study, self._approved.plan
        try:
            integers = plan.read_total(released.total)
            nominal = self._approved.roster.patients_of(released.survivors)
        except ProtocolError as error:
            raise Refuse(Refused.STATE_MISMATCH, str(error)) from error
        if len(released.survivors) < study.cohort.fewest_survivors:
            raise Refuse(Refused.STATE_MISMATCH, f"a sum of {len(released.survivors)} hospitals")
        exponent = plan.grid_exponent(state.completed_rounds)
        everybody = self._approved.roster.patients_at_start(study)
        return self._step(
            state,
            integers,
            study,
            grid_exponent=exponent,
            nominal_patients=nominal,
            roster_patients=everybody,
            noise_variance=plan.noise_variance(len(released.survivors)),
        )

    def take(self, request: StateTransfer) -> None:
        """Accept a later state only with the signatures of c + 1 hospitals: at least one of them is honest."""
        try:
            state = parse_state(request.state, self._approved.study, self._approved.plan.words)
            self._check_attestations(request, state)
        except RemoteProtocolError as error:
            raise Refuse(Refused.SIGNATURES, str(error)) from error
        if not self.state.completed_rounds < state.completed_rounds <= self._approved.study.released_sums:
            raise Refuse(Refused.OUT_OF_ORDER, f"a state of round {state.completed_rounds} is not wanted here")
        self._keep(state)

    def _check_attestations(self, request: StateTransfer, state: ModelState) -> None:
        needed = self._approved.study.cohort.colluders + 1
        statement = self._statement(state)
        signers: set[int] = set()
        for item in request.attestations:
            position, signature = int.from_bytes(item[:2], "big"), item[2:]
            if position >= len(self._approved.roster.identities):
                raise RemoteProtocolError(111, "a signer of the state is not in the roster", "refused")
            verify(self._approved.roster.identities[position], signature, statement)
            signers.add(position)
        if len(signers) < needed or state.completed_rounds != request.round:
            raise RemoteProtocolError(155, f"{len(signers)} of {needed} signatures over the state", "refused")

    # --- disk --------------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self._approved.folder / "state.bin"

    def _keep(self, state: ModelState) -> None:
        """Write the state with this hospital's signature, then use it."""
        self._files.write(self._path, (*state_pieces(state), self._sign(state)))
        self.state = state

    def _load(self) -> ModelState:
        """The state this hospital signed last; without a usable file, the approved first model.

        From there a hospital comes back by a transfer with signatures: a torn file costs nothing.
        """
        if not self._files.exists(self._path):
            return self._approved.first
        study, words = self._approved.study, self._approved.plan.words
        try:
            data = self._files.read(self._path, limit_bytes=state_size_bytes(study, words) + SIGNATURE_BYTES)
            state = parse_state(data[:-SIGNATURE_BYTES], study, words)
            verify(self._identity.public, data[-SIGNATURE_BYTES:], self._statement(state))
        except MedfedError as error:
            log.warning("the model state on disk is not usable and will be asked for again: %s", error)
            return self._approved.first
        return state

    def write_model(self) -> bytes:
        """The final model for use on site, and once its scores on this hospital's own held-out patients, never sent.

        Returns the SHA-256 of its file.
        """
        approved = self._approved
        flat = released_weights(self.state, approved.study)
        data = parameters.to_safetensors(approved.model, flat)
        self._files.write(approved.folder / "model.safetensors", data)
        digest = hashlib.sha256(data).digest()
        del data  # of a big model as much again
        parameters.assign(approved.model, flat)
        if len(approved.holdout.labels):
            self._score(digest.hex())
        return digest

    def _score(self, digest: str) -> None:
        """Once for each final model, as the coordinator may ask for the end as often as it likes."""
        approved, path = self._approved, self._approved.folder / "evaluation.json"
        if self._files.exists(path) and digest.encode() in self._files.read(path):
            return
        scores = tasks.evaluate(approved.model, approved.study.task, approved.holdout)
        report = {"evaluation": "own holdout, never sent", "model_sha256": digest, **scores}
        log.info("on %d own held-out records: %s", len(approved.holdout.labels), scores)
        self._files.write(path, json.dumps(report, indent=1).encode(), private=True)
