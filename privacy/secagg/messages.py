"""The bytes that hospitals send in secure aggregation: offers, uploads, votes, releases; made here and taken apart here.

Whatever arrives is taken apart against what the session expects: a wrong length is refused before anything is read, and no
error but the named ones leaves a parser.

Source: medfed's secure aggregation design, sections 3, 5 and 6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from medfed.errors import RemoteProtocolError
from medfed.identity import SIGNATURE_BYTES
from medfed.privacy.secagg.protocol import (
    BOX_ENTRY_BYTES,
    HASH_BYTES,
    HEADER_BYTES,
    KEY_BYTES,
    NONCE_BYTES,
    RELEASE_ENTRY_BYTES,
    SHARE_BYTES,
    VERSION,
    AggregatorConfig,
    Cohort,
    be16,
    be64,
    digest,
    encode_list,
    label,
)
from medfed.wire import enc

# ------------------------------------------------------------------------------------------------------------------- offers


@dataclass(frozen=True, slots=True)
class Offer:
    """A hospital's contribution to the setup: its position, nonce and ephemeral X25519 public key."""

    position: int
    nonce: bytes
    key: bytes

    def encode(self, config: AggregatorConfig) -> bytes:
        """S_i [3]; the signature covers these bytes."""
        return enc(label("setup"), config.config_hash, config.roster_hash, be16(self.position), self.nonce, self.key)


_OFFER_PARTS: Final = (len(label("setup")), HASH_BYTES, HASH_BYTES, 2, NONCE_BYTES, KEY_BYTES)
OFFER_BYTES: Final = sum(4 + size for size in _OFFER_PARTS) + SIGNATURE_BYTES


def split_offer(data: bytes) -> tuple[bytes, bytes]:
    """A signed offer -> (S_i, signature). Raises ``RemoteProtocolError`` (MF-103)."""
    if len(data) != OFFER_BYTES:
        raise RemoteProtocolError(103, f"offer of {len(data)} bytes, not {OFFER_BYTES}", "refused; ask the sender")
    return data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]


def parse_offer(body: bytes, config: AggregatorConfig) -> Offer:
    """S_i -> ``Offer``, signature not yet checked.

    Raises ``RemoteProtocolError``: MF-103 malformed, MF-111 position not in the roster, MF-112 other study or roster.
    """
    parts, start = [], 0
    for size in _OFFER_PARTS:
        parts.append(body[start + 4 : start + 4 + size])
        start += 4 + size
    if enc(*parts) != body or parts[0] != label("setup"):
        raise RemoteProtocolError(103, "offer malformed", "refused; ask the sender")
    position = int.from_bytes(parts[3], "big")
    if position >= len(config.identities):
        raise RemoteProtocolError(111, f"offer for position {position}, not in the roster", "refused")
    if parts[1] != config.config_hash or parts[2] != config.roster_hash:
        raise RemoteProtocolError(
            112, f"hospital {position} offers keys for another study or roster", "let all approve the same study"
        )
    return Offer(position, parts[4], parts[5])


# ------------------------------------------------------------------------------------------------------------------ uploads


def encode_header(cohort: Cohort, transcript: bytes, attempt: int, position: int) -> bytes:
    """The first bytes of an upload: version, T, r, i, k, D [5]."""
    head = bytes([VERSION]) + transcript + be64(attempt) + be16(position)
    return head + bytes([cohort.config.ring_bits]) + be64(cohort.config.words)


def upload_signature_input(
    context: bytes, position: int, words_hash: bytes, boxes: bytes | memoryview = b"", commitment: bytes = b""
) -> bytes:
    """What a hospital signs for its upload [5]. In strict mode there are neither boxes nor a commitment: both are empty."""
    return enc(label("upload"), context, be16(position), words_hash, hashlib.sha256(boxes).digest(), commitment)


def commitment_of(context: bytes, position: int, self_mask: bytes) -> bytes:
    """commit_i: what a self mask that was put together again is held against [4]."""
    return digest(label("commit"), context, be16(position), self_mask)


@dataclass(frozen=True, slots=True)
class UploadParts:
    """An upload taken apart, signature not yet checked. ``words`` is a view into the payload.

    ``commitment``, ``boxes``: empty in strict mode; else 32 bytes, and one entry a peer: BE16 receiver and box.
    """

    position: int
    words: memoryview
    commitment: bytes
    boxes: bytes
    signature: bytes


def parse_upload(payload: bytes | memoryview, cohort: Cohort, transcript: bytes, attempt: int) -> UploadParts:
    """Take an upload apart against what this session expects.

    Raises ``RemoteProtocolError``: MF-180 wrong length, ring, number of words or receivers of boxes; MF-102 version; MF-182
    other session or round; MF-111 position not in the cohort.
    """
    if len(payload) != cohort.upload_bytes:
        raise RemoteProtocolError(
            180, f"upload of {len(payload)} bytes, not {cohort.upload_bytes}", "refused; ask the sender"
        )
    if payload[0] != VERSION:
        raise RemoteProtocolError(102, f"upload of version {payload[0]}", f"use version {VERSION}")
    position = int.from_bytes(payload[41:43], "big")
    expected = encode_header(cohort, transcript, attempt, position)
    if payload[43:HEADER_BYTES] != expected[43:]:
        raise RemoteProtocolError(180, "upload of another ring or vector length", "refused; ask the sender")
    if payload[:41] != expected[:41]:
        raise RemoteProtocolError(182, "upload of another session or round", "refused")
    if position not in cohort.members:
        raise RemoteProtocolError(111, f"upload for position {position}, not in the cohort", "refused")
    end = HEADER_BYTES + cohort.config.vector_bytes
    tail = bytes(payload[end:-SIGNATURE_BYTES])
    commitment, boxes = (b"", b"") if cohort.is_strict else (tail[:HASH_BYTES], tail[HASH_BYTES:])
    _check_order(boxes, BOX_ENTRY_BYTES, () if cohort.is_strict else cohort.peers(position))
    words = memoryview(payload)[HEADER_BYTES:end]
    return UploadParts(position, words, commitment, boxes, bytes(payload[-SIGNATURE_BYTES:]))


def join_boxes(boxes: Sequence[tuple[int, bytes]]) -> bytes:
    """Entries of BE16 receiver and 48-byte box, as they stand in an upload: ascending receivers."""
    return b"".join(be16(receiver) + box for receiver, box in boxes)


def _check_order(data: bytes, entry_bytes: int, expected: Sequence[int]) -> None:
    """Every entry begins with its position: exactly those expected, in order. The length was checked before."""
    found = [int.from_bytes(data[start : start + 2], "big") for start in range(0, len(data), entry_bytes)]
    if found != list(expected):
        raise RemoteProtocolError(180, "entries for other hospitals than the session's", "refused; ask the sender")


# -------------------------------------------------------------------------------------------------------- votes and releases


def vote_input(context: bytes, position: int, survivors: Sequence[int]) -> bytes:
    """What a vote signs: this hospital's one survivor set of this round [6]."""
    return enc(label("vote"), context, be16(position), encode_list(survivors))


class Secret(IntEnum):
    """What a release holds of a peer [6]; never both of one peer (rule 12)."""

    NOTHING = 0
    """Its box did not open: 32 zero bytes."""
    SHARE = 1
    """A share of a survivor's self mask."""
    SEED = 2
    """The leaf seed shared with a drop-out."""


ReleaseEntry = tuple[int, Secret, bytes]


def encode_release(entries: Sequence[ReleaseEntry]) -> bytes:
    """The body: for each peer ascending BE16 position, kind, 32 bytes."""
    return b"".join(be16(peer) + bytes([kind]) + secret for peer, kind, secret in entries)


def release_signature_input(context: bytes, position: int, body: bytes) -> bytes:
    """What a hospital signs for its release [6]."""
    return enc(label("release"), context, be16(position), hashlib.sha256(body).digest())


def parse_release(
    payload: bytes, cohort: Cohort, position: int, survivors: Sequence[int]
) -> tuple[bytes, tuple[ReleaseEntry, ...], bytes]:
    """A release of the hospital at ``position`` -> (body, entries, signature), signature not yet checked.

    Raises ``RemoteProtocolError``: MF-180 wrong length or peers; MF-187 a seed of a survivor or anything else of a drop-out.
    """
    if len(payload) != cohort.release_bytes:
        raise RemoteProtocolError(
            180, f"release of {len(payload)} bytes, not {cohort.release_bytes}", "refused; ask the sender"
        )
    body, signature = payload[:-SIGNATURE_BYTES], payload[-SIGNATURE_BYTES:]
    _check_order(body, RELEASE_ENTRY_BYTES, cohort.peers(position))
    entries = []
    for start in range(0, len(body), RELEASE_ENTRY_BYTES):
        peer, kind = int.from_bytes(body[start : start + 2], "big"), body[start + 2]
        allowed = (Secret.NOTHING, Secret.SHARE) if peer in survivors else (Secret.SEED,)
        if kind not in allowed:
            raise RemoteProtocolError(187, f"release of kind {kind} for hospital {peer}", "refused; ask the sender")
        entries.append((peer, Secret(kind), body[start + 3 : start + 3 + SHARE_BYTES]))
    return body, tuple(entries), signature
