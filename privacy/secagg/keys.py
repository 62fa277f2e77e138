"""Keys of secure aggregation: whose count, one X25519 agreement a pair and session, one fresh seed a pair and round.

Source: medfed's secure aggregation design, section 4; RFC 7748 (X25519), RFC 5869 (HKDF-SHA256).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medfed.errors import PrivacyError, RemoteProtocolError
from medfed.identity import verify
from medfed.privacy.secagg.messages import Offer, parse_offer, split_offer
from medfed.privacy.secagg.protocol import AggregatorConfig, Cohort, be16, label
from medfed.wire import enc

STREAM_BYTES: Final = 44
_FIELD: Final = 2**255 - 19
_ANY_PRIVATE: Final = bytes(range(32))  # a small-order key gives zero with every private key


def public_key(private: bytes) -> bytes:
    """The X25519 public key (32 bytes) of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def canonical_key(public: bytes) -> int:
    """The point a public key stands for: X25519 ignores the top bit and reduces modulo 2^255 - 19.

    Comparing points, not bytes, refuses one key offered twice in two spellings.
    """
    return (int.from_bytes(public, "little") & (2**255 - 1)) % _FIELD


def check_key(offer: Offer) -> None:
    """Raise ``RemoteProtocolError`` (MF-170) for a key of small order, with which nobody can agree on anything (rule 3)."""
    derive_root(_ANY_PRIVATE, offer.key, bytes(32), 0, offer.position)


def verify_offer(data: bytes, config: AggregatorConfig) -> tuple[bytes, Offer]:
    """One signed offer -> (S_i, parsed). Raises ``RemoteProtocolError``: MF-103, 110, 111, 112."""
    body, signature = split_offer(data)
    offer = parse_offer(body, config)
    verify(config.identities[offer.position], signature, body)
    return body, offer


def read_offers(
    signed: Sequence[bytes], config: AggregatorConfig
) -> tuple[Cohort, tuple[bytes, ...], dict[int, Offer]]:
    """Check a setup's offers against the pinned roster: (U1, S_i ascending, parsed offers by position).

    Raises ``RemoteProtocolError``: MF-103, 110, 111, 112 as one offer; MF-143 a hospital twice; MF-170 two hospitals with one
    key; MF-140 fewer or more hospitals than the study allows, MF-141 (rules 2-4).
    """
    found: dict[int, tuple[bytes, Offer]] = {}
    for data in signed[: len(config.identities) + 1]:
        body, offer = verify_offer(data, config)
        if offer.position in found:
            raise RemoteProtocolError(143, f"two offers of hospital {offer.position}", "start a new setup")
        found[offer.position] = body, offer
    members = tuple(sorted(found))
    try:
        cohort = Cohort(config, members)
    except PrivacyError as error:
        raise RemoteProtocolError(error.code, error.what, error.remedy) from error
    offers = {member: found[member][1] for member in members}
    if len({canonical_key(offer.key) for offer in offers.values()}) != len(offers):
        raise RemoteProtocolError(170, "two hospitals offer one key", "start a new setup")
    return cohort, tuple(found[member][0] for member in members), offers


def derive_root(private: bytes, peer_public: bytes, transcript: bytes, position: int, peer: int) -> bytes:
    """root_ij, 32 bytes, the same for both ends. Lives in memory only, as long as the session.

    Raises ``RemoteProtocolError`` (MF-170) for a peer's key of small order, whose agreement would be all zero (rule 3).
    """
    try:
        agreed = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(peer_public))
    except ValueError as error:
        raise RemoteProtocolError(170, f"the key of hospital {peer} is refused", "ask that hospital") from error
    info = enc(label("root"), be16(min(position, peer)), be16(max(position, peer)))
    return _hkdf(agreed, info, 32, salt=transcript)


def leaf_seed(root: bytes, context: bytes) -> bytes:
    """k_ij, 32 bytes: the pair's seed for the one round that ``context`` names."""
    return _hkdf(root, enc(label("mask"), context), 32)


def share_key(root: bytes, context: bytes, sender: int, receiver: int) -> bytes:
    """e_i→j, 32 bytes: closes one box of one round in one direction (drop-out recovery)."""
    return _hkdf(root, enc(label("share"), context, be16(sender), be16(receiver)), 32)


def stream_key(seed: bytes, context: bytes) -> bytes:
    """AES-256 key (32 bytes) and nonce (12 bytes) of a seed's pad."""
    return _hkdf(seed, enc(label("stream"), context), STREAM_BYTES)


def _hkdf(secret: bytes, info: bytes, size: int, salt: bytes | None = None) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=size, salt=salt, info=info).derive(secret)
