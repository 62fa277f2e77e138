"""Boxes: shares of a self mask, closed for one peer and one round, which the coordinator relays and cannot open.

Source: medfed's secure aggregation design, section 5; NIST SP 800-38D (AES-GCM). A key closes one box only, so the nonce is
constant; the round and both ends are bound as associated data.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medfed.privacy.secagg.keys import share_key
from medfed.privacy.secagg.protocol import BOX_BYTES, be16

_NONCE: Final = bytes(12)


def close_box(root: bytes, context: bytes, sender: int, receiver: int, share: bytes) -> bytes:
    """48 bytes: the 32-byte ``share`` that ``receiver`` keeps of ``sender``'s self mask. ``root``: of this pair."""
    associated = context + be16(sender) + be16(receiver)
    return AESGCM(share_key(root, context, sender, receiver)).encrypt(_NONCE, share, associated)


def open_box(root: bytes, context: bytes, sender: int, receiver: int, box: bytes) -> bytes | None:
    """The share in a box; None for one that was not closed by ``sender`` for this round and receiver."""
    if len(box) != BOX_BYTES:
        return None
    associated = context + be16(sender) + be16(receiver)
    try:
        return AESGCM(share_key(root, context, sender, receiver)).decrypt(_NONCE, box, associated)
    except InvalidTag:
        return None
