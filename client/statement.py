"""The hospital's part in the statement that travels with a model: check every figure of it, sign, keep a copy."""

from __future__ import annotations

from medfed.client.approved import Approved
from medfed.client.ledger import Ledger
from medfed.client.refusal import Refuse
from medfed.errors import MedfedError, RemoteProtocolError
from medfed.identity import Identity
from medfed.privacy.accounting import micro
from medfed.privacy.page import page
from medfed.privacy.statement import (
    Ending,
    PrivacyFile,
    SignedByHospital,
    Statement,
    hospital_statement,
    parse_statement,
    require_same,
    sign_for_hospital,
    statement,
)
from medfed.seams import Files
from medfed.wire import Finish, Finished, Refused

JSON_NAME, PAGE_NAME = "privacy.json", "privacy.md"


def agreed(approved: Approved, request: Finish, model: bytes, highest_attempt: int) -> Statement:
    """The coordinator's statement, if it is what this hospital works out from study, plan and its own model.

    ``model``: SHA-256 of the file this hospital wrote; ``highest_attempt``: that its ledger charged. Journal, stamps and versions
    are the coordinator's word. Raises ``Refuse``.
    """
    try:
        said = parse_statement(request.statement)
        said.check(bytes.fromhex(approved.roster.coordinator), request.statement_signature)
        ending = Ending(
            attempts_used=said.attempts_used,
            state=request.state_hash,  # which this hospital has computed by now
            model=model,
            journal=bytes.fromhex(said.journal_sha256),
            stamps=tuple(said.stamps),
            versions=said.versions,
        )
        if not highest_attempt <= said.attempts_used <= approved.plan.attempts:
            raise RemoteProtocolError(194, f"the statement says {said.attempts_used} attempts were used", "refused")
        require_same(said, statement(approved.study, approved.roster, approved.plan, ending))
    except MedfedError as error:
        raise Refuse(Refused.STATEMENT, str(error)) from error
    return said


def signed(approved: Approved, said: Statement, ledger: Ledger, identity: Identity) -> SignedByHospital:
    """This hospital's signature over the statement and its own ledger's figures; the study must be ended in the ledger.

    *Guarantees* Asked again, the same bytes, whatever the ledger did since: the head is that of the row that ended the study.
    """
    study_hash = approved.study.hash()
    attempts = ledger.approved(study_hash).events
    charged = (attempts, micro(approved.plan.epsilon_after(attempts)))
    unsigned = hospital_statement(said, approved.roster, approved.position, charged, ledger.end_of(study_hash))
    return sign_for_hospital(unsigned, identity)


def keep(approved: Approved, said: Statement, signature: bytes, mine: SignedByHospital, files: Files) -> None:
    """``privacy.json`` and its page beside this hospital's model; of the hospitals' signatures it holds its own."""
    file = PrivacyFile(**said.model_dump(), coordinator_signature=signature.hex(), hospitals=[mine])
    files.write(approved.folder / JSON_NAME, file.to_bytes())
    files.write(approved.folder / PAGE_NAME, page(file, approved.roster).encode())


def finished(request: Finish, mine: SignedByHospital, attestation: bytes) -> Finished:
    """What travels of a hospital's statement; the coordinator knows the rest. ``attestation``: over the final state."""
    return Finished(
        request.study_hash,
        request.nonce,
        mine.position,
        request.round,
        mine.attempts_charged,
        mine.epsilon_spent_micro,
        mine.head.to_bytes(),
        bytes.fromhex(mine.signature),
        attestation,
    )
