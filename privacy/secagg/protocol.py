"""Secure aggregation's vocabulary for both sides: parameters, encodings, messages.

The coordinator gets the sum of all hospitals' integer vectors and nothing narrower. This version runs the *strict* mode:
every hospital of the cohort must upload (m = n), one round trip, nothing is ever unmasked, one loss voids the round.
States and legal moves stand in ``transitions``, those of drop-out recovery included; recovery's events are refused until
it is built.

Not claimed: protection of a patient inside the sum (differential privacy does that), a correct sum when anyone lies,
availability, more than c colluders.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (pairwise masks,
malicious setting, figure 4); sections in brackets are those of medfed's secure aggregation design.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, PrivacyError, RemoteProtocolError
from medfed.identity import PUBLIC_BYTES, SIGNATURE_BYTES
from medfed.wire import enc

RingWords: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]

VERSION: Final = 1
HASH_BYTES: Final = 32
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 32
FEWEST_HOSPITALS: Final = 3
MOST_HOSPITALS: Final = 128
LARGEST_PAD_BYTES: Final = 1 << 35  # the 32-bit block counter never wraps
HEADER_BYTES: Final = 1 + HASH_BYTES + 8 + 2 + 1 + 8
_RINGS: Final = (16, 32)


# ---------------------------------------------------------------------------------------------------------------- encodings


def label(name: str) -> bytes:
    """L"name" of the design: keeps the hashes and keys of different purposes apart."""
    return b"medfed/secagg/v1/" + name.encode("ascii")


def be16(number: int) -> bytes:
    return number.to_bytes(2, "big")


def be64(number: int) -> bytes:
    return number.to_bytes(8, "big")


def digest(*parts: bytes) -> bytes:
    """H(enc(parts)): 32 bytes of SHA-256."""
    return hashlib.sha256(enc(*parts)).digest()


def encode_list(members: Sequence[int]) -> bytes:
    """``list X``: BE16 of each member, ascending."""
    return b"".join(be16(member) for member in sorted(members))


def view_words(buffer: bytes | bytearray | memoryview, ring_bits: int) -> RingWords:
    """A buffer seen as ring words: unsigned, little-endian on every machine. Writes to the view reach the buffer."""
    if ring_bits == 16:
        return np.frombuffer(buffer, dtype=np.dtype(np.uint16).newbyteorder("<"))
    return np.frombuffer(buffer, dtype=np.dtype(np.uint32).newbyteorder("<"))


# --------------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Fewest survivors m a hospital accepts, and shares t that open a self mask [7]. ``shares`` is 0 in strict mode."""

    survivors: int
    shares: int

    @property
    def is_strict(self) -> bool:
        return self.shares == 0


def derive_thresholds(hospitals: int, colluders: int) -> Thresholds:
    """m and t for n hospitals of which c may collude, as every hospital derives them for drop-out recovery [7].

    m + t > n + c: beside a certificate at most n - m honest hospitals released fast, so c colluders hold fewer than t
    shares of a drop-out's self mask. Where that would need m >= n, only strict mode is left.
    """
    check_cohort(hospitals, colluders)
    survivors = (hospitals + colluders + 1) // 2 + 1
    if survivors >= hospitals:
        return Thresholds(hospitals, 0)
    return Thresholds(survivors, survivors - 1)


def check_cohort(hospitals: int, colluders: int) -> None:
    """Raise ``PrivacyError`` (MF-140, MF-141) unless at least two honest hospitals hide in every sum.

    c >= 1 because any hospital can subtract its own share from the released sum.
    """
    if not FEWEST_HOSPITALS <= hospitals <= MOST_HOSPITALS:
        raise PrivacyError(
            140, f"{hospitals} hospitals, need {FEWEST_HOSPITALS} to {MOST_HOSPITALS}", "change the cohort"
        )
    if colluders < 1 or hospitals - colluders < 2:
        raise PrivacyError(
            141, f"{colluders} colluders among {hospitals} hospitals", f"allow for 1 to {hospitals - 2} colluders"
        )


@dataclass(frozen=True, slots=True)
class AggregatorConfig:
    """What both sides of a session agree on, each from its own approved files; the coordinator sets none of it (rule 1).

    ``config_hash``, ``roster_hash``: 32 bytes each. ``identities``: the hospitals' Ed25519 public keys by position in the
    roster. ``words``: D, length of the vector. ``ring_bits``: k, 16 or 32.

    Raises ``PrivacyError`` (MF-140, 141, 143) or ``ConfigError`` (MF-203).
    """

    config_hash: bytes
    roster_hash: bytes
    identities: tuple[bytes, ...]
    colluders: int
    words: int
    ring_bits: int

    def __post_init__(self) -> None:
        check_cohort(len(self.identities), self.colluders)
        if len(set(self.identities)) != len(self.identities):
            raise PrivacyError(143, "one identity stands twice in the roster", "list every hospital once")
        if any(len(identity) != PUBLIC_BYTES for identity in self.identities):
            raise ConfigError(203, "an identity is not a 32-byte key", "make the roster anew")
        if len(self.config_hash) != HASH_BYTES or len(self.roster_hash) != HASH_BYTES:
            raise ConfigError(203, "a hash is not 32 bytes long", "pass SHA-256 values")
        if self.ring_bits not in _RINGS:
            raise ConfigError(203, f"ring of {self.ring_bits} bits", "use 16 or 32")
        if not 1 <= self.words <= LARGEST_PAD_BYTES * 8 // self.ring_bits:
            raise ConfigError(203, f"vector of {self.words} words", "use a smaller model")

    @property
    def hospitals(self) -> int:
        """n"""
        return len(self.identities)

    @property
    def members(self) -> tuple[int, ...]:
        """U1: the positions of the cohort, ascending."""
        return tuple(range(len(self.identities)))

    @property
    def vector_bytes(self) -> int:
        return self.words * self.ring_bits // 8

    @property
    def upload_bytes(self) -> int:
        """Exact length of an upload in strict mode: it depends on D and k only."""
        return HEADER_BYTES + self.vector_bytes + SIGNATURE_BYTES


@dataclass(frozen=True, slots=True)
class SecaggConfig:
    """A hospital's view of the session: what all agree on, and its own position. Raises as ``AggregatorConfig``."""

    config_hash: bytes
    roster_hash: bytes
    position: int
    identities: tuple[bytes, ...]
    colluders: int
    words: int
    ring_bits: int
    shared: AggregatorConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shared = AggregatorConfig(
            self.config_hash, self.roster_hash, self.identities, self.colluders, self.words, self.ring_bits
        )
        object.__setattr__(self, "shared", shared)
        if not 0 <= self.position < len(self.identities):
            raise PrivacyError(144, f"position {self.position} is not in the roster", "enroll this hospital first")

    @property
    def peers(self) -> tuple[int, ...]:
        """All other positions, ascending."""
        return tuple(member for member in self.shared.members if member != self.position)


# ----------------------------------------------------------------------------------------------------------------- messages


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
    if position >= config.hospitals:
        raise RemoteProtocolError(111, f"offer for position {position}, not in the roster", "refused")
    if parts[1] != config.config_hash or parts[2] != config.roster_hash:
        raise RemoteProtocolError(
            112, f"hospital {position} offers keys for another study or roster", "let all approve the same study"
        )
    return Offer(position, parts[4], parts[5])


def transcript_hash(config: AggregatorConfig, bodies: Sequence[bytes]) -> bytes:
    """T: binds every later key to the one setup all see. ``bodies``: S_i ascending, without signatures [3]."""
    return digest(label("transcript"), config.config_hash, config.roster_hash, *bodies)


def context_hash(config: AggregatorConfig, transcript: bytes, attempt: int, task: bytes) -> bytes:
    """ctx of a round: masks cancel only among hospitals that agree on every part of it [4].

    ``task``: 32 bytes that name what is trained, ``medfed.advance.task_hash``.
    """
    cohort = digest(label("cohort"), encode_list(config.members))
    size = be64(config.words), bytes([config.ring_bits])
    return digest(label("ctx"), transcript, be64(attempt), cohort, task, *size)


def encode_header(config: AggregatorConfig, transcript: bytes, attempt: int, position: int) -> bytes:
    """The first bytes of an upload: version, T, r, i, k, D [5]."""
    head = bytes([VERSION]) + transcript + be64(attempt) + be16(position)
    return head + bytes([config.ring_bits]) + be64(config.words)


def upload_signature_input(context: bytes, position: int, words_hash: bytes) -> bytes:
    """What a hospital signs for its upload [5]. Strict mode has neither boxes nor a commitment: both are empty."""
    return enc(label("upload"), context, be16(position), words_hash, hashlib.sha256(b"").digest(), b"")


@dataclass(frozen=True, slots=True)
class UploadParts:
    """An upload taken apart, signature not yet checked. ``words`` and ``signature`` are views into the payload."""

    position: int
    words: memoryview
    signature: bytes


def parse_upload(payload: bytes | memoryview, config: AggregatorConfig, transcript: bytes, attempt: int) -> UploadParts:
    """Take an upload apart against what this session expects.

    Raises ``RemoteProtocolError``: MF-180 wrong length, ring or number of words; MF-102 version; MF-182 other session or
    round; MF-111 position not in the roster.
    """
    if len(payload) != config.upload_bytes:
        raise RemoteProtocolError(
            180, f"upload of {len(payload)} bytes, not {config.upload_bytes}", "refused; ask the sender"
        )
    if payload[0] != VERSION:
        raise RemoteProtocolError(102, f"upload of version {payload[0]}", f"use version {VERSION}")
    position = int.from_bytes(payload[41:43], "big")
    expected = encode_header(config, transcript, attempt, position)
    if payload[43:HEADER_BYTES] != expected[43:]:
        raise RemoteProtocolError(180, "upload of another ring or vector length", "refused; ask the sender")
    if payload[:41] != expected[:41]:
        raise RemoteProtocolError(182, "upload of another session or round", "refused")
    if position >= config.hospitals:
        raise RemoteProtocolError(111, f"upload for position {position}, not in the roster", "refused")
    end = HEADER_BYTES + config.vector_bytes
    return UploadParts(position, memoryview(payload)[HEADER_BYTES:end], bytes(payload[end:]))
