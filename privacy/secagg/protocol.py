"""Secure aggregation's vocabulary for both sides: parameters, encodings, messages.

The coordinator gets the sum of the surviving hospitals' integer vectors and nothing narrower. *Strict* mode: every hospital
of the cohort must upload (m = n), one round trip, nothing is ever unmasked, one loss voids the round. With *recovery* at
least m must: once uploads are in, shares of self masks are released (two trips), or after a drop-out a vote on who survived
comes first (three). States and legal moves stand in ``transitions``, the bytes of messages in ``messages``.

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

from medfed.errors import ConfigError, PrivacyError
from medfed.identity import PUBLIC_BYTES, SIGNATURE_BYTES
from medfed.roster import Roster
from medfed.study import Study, least_survivors
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
SHARE_BYTES: Final = 32
BOX_BYTES: Final = SHARE_BYTES + 16  # and the tag of AES-256-GCM
BOX_ENTRY_BYTES: Final = 2 + BOX_BYTES
RELEASE_ENTRY_BYTES: Final = 2 + 1 + SHARE_BYTES
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


def derive_thresholds(hospitals: int, colluders: int, fewest_survivors: int) -> Thresholds:
    """m and t as every hospital derives them itself: the study's ``fewest_survivors``, or the least m where that is more [7].

    t = m - 1 shares open a self mask. ``hospitals``: n, those in the session's setup. Where m would reach n, only strict mode is
    left. Raises ``PrivacyError``: MF-140 if n is less than ``fewest_survivors``, or as ``check_cohort``.
    """
    check_cohort(hospitals, colluders)
    survivors = max(least_survivors(hospitals, colluders), fewest_survivors)
    if survivors > hospitals:
        raise PrivacyError(140, f"{hospitals} hospitals, the study needs {fewest_survivors}", "wait for the others")
    return Thresholds(hospitals, 0) if survivors == hospitals else Thresholds(survivors, survivors - 1)


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
    roster. ``words``: D, length of the vector. ``ring_bits``: k, 16 or 32. ``fewest_survivors``: m is never less; 0 for every
    hospital of the roster. ``most_hospitals``: n is never more, as the ring was sized for so many; 0 for the roster's length.

    Raises ``PrivacyError`` (MF-140, 141, 143) or ``ConfigError`` (MF-203).
    """

    config_hash: bytes
    roster_hash: bytes
    identities: tuple[bytes, ...]
    colluders: int
    words: int
    ring_bits: int
    fewest_survivors: int = 0
    most_hospitals: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fewest_survivors", self.fewest_survivors or len(self.identities))
        object.__setattr__(self, "most_hospitals", self.most_hospitals or len(self.identities))
        check_cohort(len(self.identities), self.colluders)
        if not self.colluders + 2 <= self.fewest_survivors <= len(self.identities):
            raise PrivacyError(140, f"a sum of {self.fewest_survivors} hospitals", "change fewest_survivors")
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

    @classmethod
    def of(cls, study: Study, roster: Roster, words: int) -> AggregatorConfig:
        """Of a study whose vectors have ``words`` words."""
        return cls(
            config_hash=study.hash(),
            roster_hash=roster.hash(),
            identities=roster.identities,
            colluders=study.cohort.colluders,
            words=words,
            ring_bits=study.quantization.ring_bits,
            fewest_survivors=study.cohort.fewest_survivors,
            most_hospitals=study.cohort.most_hospitals,
        )

    @classmethod
    def of_anybody(cls, study: Study, words: int) -> AggregatorConfig:
        """The same whoever the hospitals are: for the lengths of messages, which do not depend on them."""
        return cls(
            config_hash=bytes(HASH_BYTES),
            roster_hash=bytes(HASH_BYTES),
            identities=tuple(bytes([number]) * PUBLIC_BYTES for number in range(study.cohort.hospitals)),
            colluders=study.cohort.colluders,
            words=words,
            ring_bits=study.quantization.ring_bits,
            fewest_survivors=study.cohort.fewest_survivors,
            most_hospitals=study.cohort.most_hospitals,
        )

    @property
    def vector_bytes(self) -> int:
        return self.words * self.ring_bits // 8

    @property
    def longest_upload_bytes(self) -> int:
        """No cohort's upload is longer."""
        recovery = HASH_BYTES + (self.most_hospitals - 1) * BOX_ENTRY_BYTES
        return HEADER_BYTES + self.vector_bytes + recovery + SIGNATURE_BYTES

    @property
    def everybody(self) -> Cohort:
        """The largest cohort: of the whole roster, or as much of it as may be summed. Its messages are the longest but for those
        of recovery where another is strict."""
        return Cohort(self, tuple(range(min(len(self.identities), self.most_hospitals))))


@dataclass(frozen=True, slots=True)
class SecaggConfig:
    """A hospital's view of the session: what all agree on, and its own position. Raises MF-144 for one outside the roster."""

    shared: AggregatorConfig
    position: int

    def __post_init__(self) -> None:
        if not 0 <= self.position < len(self.shared.identities):
            raise PrivacyError(144, f"position {self.position} is not in the roster", "enroll this hospital first")


@dataclass(frozen=True, slots=True)
class Cohort:
    """U1: the hospitals in a session's setup, ascending positions, and what follows from them: m, t, lengths of messages.

    Raises ``PrivacyError``: MF-140 fewer than the study allows, or more than the ring was sized for; MF-141.
    """

    config: AggregatorConfig
    members: tuple[int, ...]
    thresholds: Thresholds = field(init=False)

    def __post_init__(self) -> None:
        if len(self.members) > self.config.most_hospitals:
            raise PrivacyError(
                140, f"{len(self.members)} hospitals, the ring is for {self.config.most_hospitals}", "leave some out"
            )
        found = derive_thresholds(len(self.members), self.config.colluders, self.config.fewest_survivors)
        object.__setattr__(self, "thresholds", found)

    @property
    def hospitals(self) -> int:
        """n"""
        return len(self.members)

    @property
    def is_strict(self) -> bool:
        """Nothing is ever unmasked: all must upload."""
        return self.thresholds.is_strict

    def peers(self, position: int) -> tuple[int, ...]:
        """All others, ascending."""
        return tuple(member for member in self.members if member != position)

    @property
    def boxes_bytes(self) -> int:
        """Length of all boxes of an upload: one a peer; none in strict mode."""
        return 0 if self.is_strict else (self.hospitals - 1) * BOX_ENTRY_BYTES

    @property
    def upload_bytes(self) -> int:
        """Exact length of an upload: it depends on n, D and k only."""
        commitment = 0 if self.is_strict else HASH_BYTES
        return HEADER_BYTES + self.config.vector_bytes + commitment + self.boxes_bytes + SIGNATURE_BYTES

    @property
    def release_bytes(self) -> int:
        """Exact length of a release."""
        return (self.hospitals - 1) * RELEASE_ENTRY_BYTES + SIGNATURE_BYTES


def transcript_hash(config: AggregatorConfig, bodies: Sequence[bytes]) -> bytes:
    """T: binds every later key to the one setup all see. ``bodies``: S_i ascending, without signatures [3]."""
    return digest(label("transcript"), config.config_hash, config.roster_hash, *bodies)


def context_hash(cohort: Cohort, transcript: bytes, attempt: int, task: bytes) -> bytes:
    """ctx of a round: masks cancel only among hospitals that agree on every part of it [4].

    ``task``: 32 bytes that name what is trained, ``medfed.advance.task_hash``.
    """
    members = digest(label("cohort"), encode_list(cohort.members))
    size = be64(cohort.config.words), bytes([cohort.config.ring_bits])
    return digest(label("ctx"), transcript, be64(attempt), members, task, *size)
