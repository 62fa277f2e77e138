"""One small federation under secure aggregation, seeded, as the tests of this folder use it."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.identity import Identity
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.party import MaskedUpload, Party
from medfed.privacy.secagg.protocol import AggregatorConfig, SecaggConfig

CONFIG_HASH, ROSTER_HASH, TASK = (hashlib.sha256(name).digest() for name in (b"config", b"roster", b"task"))


class SeededEntropy:
    """The same bytes for the same seed, purpose and order of draws."""

    def __init__(self, seed: str) -> None:
        self.seed, self.draws = seed, 0

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        self.draws += 1
        return hashlib.shake_256(f"{self.seed}/{purpose}/{self.draws}".encode()).digest(size_bytes)


class Federation:
    """n parties and one aggregator; ``identities`` and everything else follow from ``seed``.

    ``fewest``: of survivors; 0 for all, which is strict mode.
    """

    def __init__(
        self,
        hospitals: int = 4,
        words: int = 64,
        ring_bits: int = 32,
        seed: str = "federation",
        fewest: int = 0,
        colluders: int = 1,
    ) -> None:
        self.seed, self.words, self.ring_bits, self.fewest, self.colluders = seed, words, ring_bits, fewest, colluders
        self.identities = [
            Identity.from_seed(hashlib.sha256(f"{seed}/identity/{position}".encode()).digest())
            for position in range(hospitals)
        ]
        self.parties = [self.new_party(position) for position in range(hospitals)]
        self.aggregator = Aggregator(self.config(0).shared)

    def config(self, position: int, identities: Sequence[bytes] | None = None) -> SecaggConfig:
        public = tuple(identity.public for identity in self.identities) if identities is None else tuple(identities)
        shared = AggregatorConfig(
            CONFIG_HASH, ROSTER_HASH, public, self.colluders, self.words, self.ring_bits, self.fewest
        )
        return SecaggConfig(shared, position)

    def new_party(self, position: int, identities: Sequence[bytes] | None = None, salt: str = "") -> Party:
        entropy = SeededEntropy(f"{self.seed}/{position}/{salt}")
        return Party(self.config(position, identities), self.identities[position].sign, entropy)

    def set_up(self) -> "Federation":
        for party in self.parties:
            self.aggregator.add_offer(party.offer())
        for party in self.parties:
            party.accept(self.aggregator.offers())
        return self

    def open_round(self, attempt: int, task: bytes = TASK) -> None:
        self.aggregator.open_round(attempt, task)
        for party in self.parties:
            party.open_round(attempt, task)

    def mask_all(self, vectors: Sequence[NDArray[np.int64]]) -> list[MaskedUpload]:
        """Copies of the uploads: the parties' own are views that end with the round."""
        masked = [party.mask(vector) for party, vector in zip(self.parties, vectors, strict=True)]
        return [MaskedUpload(each.pad_id, (each.payload,)) for each in masked]

    def upload(self, vectors: Sequence[NDArray[np.int64]], lost: Sequence[int] = ()) -> None:
        """All mask; what ``lost`` hospitals send never arrives."""
        for position, masked in enumerate(self.mask_all(vectors)):
            if position not in lost:
                self.aggregator.add_upload(masked.payload)

    def open_sum(self) -> tuple[int, ...]:
        """Freeze, vote if somebody is missing, release: the survivors, whose sum is then open."""
        survivors = self.aggregator.freeze()
        if len(survivors) < len(self.parties):
            for position in survivors:
                self.aggregator.add_vote(position, self.parties[position].vote(survivors))
        for position in survivors:
            self.aggregator.add_release(position, self.release(position))
        return survivors

    def release(self, position: int) -> bytes:
        survivors, votes = self.aggregator.survivors, self.aggregator.certificate()
        return self.parties[position].release(survivors, votes, self.aggregator.boxes_for(position))

    def close_round(self) -> None:
        for party in self.parties:
            party.close_round()

    def vectors(self, seed: int = 0, bound: int = 1000) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng(seed)
        return [rng.integers(-bound, bound + 1, self.words) for _ in self.parties]

    def words_of(self, payload: bytes) -> NDArray[np.int64]:
        """The masked words of an upload as signed integers."""
        return np.frombuffer(payload, f"<i{self.ring_bits // 8}", self.words, 52).astype(np.int64)

    def signed(self, words: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
        return words.view(f"<i{self.ring_bits // 8}").astype(np.int64)

    def wrap(self, integers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Integers modulo 2^k as two's complement."""
        return integers.astype(f"<i{self.ring_bits // 8}").astype(np.int64)


MakeFederation = Callable[..., Federation]


@pytest.fixture(scope="session")
def federation() -> MakeFederation:
    """Builds a federation: ``federation(hospitals, words, ring_bits, seed, fewest, colluders)``."""
    return Federation


@pytest.fixture(scope="session")
def task() -> bytes:
    return TASK
