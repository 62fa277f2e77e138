"""What a hospital's own files must agree on before it starts."""

from __future__ import annotations

import hashlib
from pathlib import Path

from medfed.client.ledger import LedgerView
from medfed.errors import MedfedError, PrivacyError
from medfed.seams import Files
from medfed.wire import Upload, check_signature, decode

OUTBOX_NAME = "outbox.bin"
BINDING_BYTES = 32
_LIMIT_BYTES = 1 << 30


def check_outbox(files: Files, folder: Path, study_hash: bytes, public: bytes, ledger: LedgerView) -> None:
    """Raise ``PrivacyError`` (MF-405) if a reply of this hospital lies in the study's ``folder`` and was never charged.

    The debit is on disk before the reply is made, so the ledger here must be an older one, restored, or a second copy;
    to go on would spend the same budget twice. An outbox without a row SEALED is in order (it is written first); so is
    one that is lost, torn or not signed by this hospital: it is no evidence, and is never sent.
    """
    reply = _stored_reply(files, folder / OUTBOX_NAME)
    upload = _own_upload(reply, study_hash, public)
    if upload is None:
        return
    sealed = ledger.sealed(study_hash, upload.attempt)
    is_charged = ledger.attempt_status(study_hash, upload.attempt) is not None
    if not is_charged or (sealed is not None and sealed.reply != hashlib.sha256(reply).digest()):
        raise PrivacyError(
            405,
            f"the outbox of {ledger.approved(study_hash).approval.name} holds attempt {upload.attempt}, which this ledger "
            f"has not charged so (its last is {ledger.highest_attempt(study_hash)})",
            "this is an old or a second copy: stop, restore the latest ledger.db",
        )


def _stored_reply(files: Files, path: Path) -> bytes:
    try:
        return files.read(path, limit_bytes=_LIMIT_BYTES)[BINDING_BYTES:] if files.exists(path) else b""
    except MedfedError:
        return b""


def _own_upload(reply: bytes, study_hash: bytes, public: bytes) -> Upload | None:
    try:
        message = decode(reply, vector_limit_bytes=_LIMIT_BYTES)
        check_signature(reply, public)
    except MedfedError:
        return None
    return message if isinstance(message, Upload) and message.study_hash == study_hash else None
