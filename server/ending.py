"""The end of a run at the coordinator: the statement it asks hospitals to sign, and what they signed."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass, field

from medfed.advance import ModelState, released_weights, state_hash
from medfed.errors import MedfedError, RemoteProtocolError
from medfed.identity import Identity
from medfed.models import catalogue, parameters
from medfed.privacy.journal import Completed, journal_hash, write_journal
from medfed.privacy.plan import Plan
from medfed.privacy.statement import (
    Ending,
    PrivacyFile,
    SignedByHospital,
    Statement,
    hospital_statement,
    require_plausible,
    statement,
)
from medfed.roster import Roster
from medfed.server.store import Checkpoint
from medfed.study import Study
from medfed.wire import Finished
from medfed.witness import Head

_VERSIONED = ("medfed", "flwr", "torch", "opacus", "dp-accounting", "cryptography", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the guarantee was computed with."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def model_file(study: Study, state: ModelState) -> bytes:
    """``model.safetensors``: the released weights."""
    return parameters.to_safetensors(catalogue.build(study), released_weights(state, study))


@dataclass(slots=True)
class RunRecord:
    """What proves a finished run: the statement under the coordinator's signature, the journal, the hospitals' statements.

    ``survived``: by position, how many sums hold that hospital's upload. ``signed`` is filled as hospitals answer.
    """

    said: Statement
    signature: bytes
    journal: bytes
    roster: Roster
    plan: Plan
    survived: tuple[int, ...]
    signed: dict[int, SignedByHospital] = field(default_factory=dict)

    def take(self, position: int, message: Finished) -> None:
        """Keep what the hospital at ``position`` signed. Raises MF-193 unless it is over this very statement and model."""
        try:
            self.signed[position] = self._checked(position, message)
        except MedfedError as error:
            name = self.roster.hospitals[position].hospital
            raise RemoteProtocolError(
                193, f"{name} signed another model or statement", f"stop and look: {error}"
            ) from error

    def _checked(self, position: int, message: Finished) -> SignedByHospital:
        charged = (message.attempts_charged, message.epsilon_spent_micro)
        mine = hospital_statement(self.said, self.roster, position, charged, Head.from_bytes(message.head))
        signed = SignedByHospital(**mine.model_dump(), signature=message.signature.hex())
        signed.check()
        require_plausible(signed, self.said, self.plan, self.survived[position])
        return signed

    @property
    def privacy_file(self) -> PrivacyFile:
        """``privacy.json``."""
        return PrivacyFile(
            **self.said.model_dump(),
            coordinator_signature=self.signature.hex(),
            hospitals=[self.signed[position] for position in sorted(self.signed)],
        )


def open_record(
    study: Study, roster: Roster, plan: Plan, identity: Identity, checkpoint: Checkpoint, stamps: tuple[str, ...]
) -> RunRecord:
    """The record of a run whose last round is done, before any hospital has signed it."""
    rounds = (
        Completed(r.round, r.attempt, bytes.fromhex(r.state_sha256), r.upload_bytes, r.survivors)
        for r in checkpoint.records
    )
    attested = {int.from_bytes(each[:2], "big"): each[2:] for each in checkpoint.attestations}
    signatures = [attested.get(position, b"") for position in range(len(roster.hospitals))]
    attempts = (checkpoint.last_attempt, plan.attempts)
    journal = write_journal(study.hash(), roster.hash(), attempts, rounds, signatures)
    ending = Ending(
        attempts_used=checkpoint.last_attempt,
        state=state_hash(study.hash(), checkpoint.state),
        model=hashlib.sha256(model_file(study, checkpoint.state)).digest(),
        journal=journal_hash(journal),
        stamps=stamps,
        versions=versions(),
    )
    said = statement(study, roster, plan, ending)
    survived = tuple(
        sum(position in record.survivors for record in checkpoint.records) for position in range(len(roster.hospitals))
    )
    return RunRecord(said, said.sign(identity), journal, roster, plan, survived)
