"""medfed and the decoder written from docs/secure_aggregation.md, asked the same things in the same order: the same answers.

The vectors show one fault each, in a course that is otherwise right. Here requests come in any order, right and wrong, repeated
and out of turn; every answer is the same to the byte, every refusal has the same code, every sum is the same and right.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfed.errors import MedfedError

_spec = importlib.util.spec_from_file_location("second_decoder", Path(__file__).parent / "second_decoder.py")
assert _spec is not None and _spec.loader is not None
second = sys.modules["second_decoder"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(second)

CONFIG_HASH, ROSTER_HASH = (hashlib.sha256(name).digest() for name in (b"config", b"roster"))
WORDS = 8
REQUESTS = 200

Answer = tuple[object, int]


def answer(act: Callable[[], object]) -> Answer:
    """What comes back, and the code of a refusal (0: none)."""
    try:
        return act(), 0
    except (MedfedError, second.Refused) as error:
        return None, error.code


class Pair:
    """A session of either implementation with the same entropy, and what was said in it so far."""

    def __init__(self, federation: Any, seed: str, task: bytes) -> None:
        self.ours, self.rng, self.seed, self.task = federation, random.Random(seed), seed, task
        self.seen: Counter[tuple[str, int]] = Counter()
        shared = federation.config(0).shared
        study = second.Study(
            CONFIG_HASH, ROSTER_HASH, shared.identities, shared.colluders, shared.fewest_survivors,
            shared.ring_bits, WORDS, shared.most_hospitals,
        )  # fmt: skip
        self.theirs = [self._hospital(study, each) for each in range(len(federation.parties))]
        federation.set_up()
        for each in self.theirs:
            each.take_offers(federation.aggregator.offers())
        self.members = list(range(len(self.theirs)))

    def _drawn(self, position: int, draw: int, size: int) -> bytes:
        """What ``SeededEntropy`` of the hospital gives at its ``draw``-th draw."""
        purpose = "secagg/offer" if draw == 1 else "secagg/self mask"
        return hashlib.shake_256(f"{self.seed}/{position}//{purpose}/{draw}".encode()).digest(size)

    def _hospital(self, study: Any, position: int) -> Any:
        drawn = self._drawn(position, 1, 64)
        seed = hashlib.sha256(f"{self.seed}/identity/{position}".encode()).digest()
        return second.Hospital(study, position, drawn[:32], drawn[32:], seed)

    def same(self, what: str, ours: Callable[[], object], theirs: Callable[[], object]) -> bytes | None:
        mine, yours = answer(ours), answer(theirs)
        assert mine[1] == yours[1], (what, mine, yours)
        self.seen[what, mine[1]] += 1
        if isinstance(mine[0], bytes):
            assert mine[0] == yours[0], what
            return mine[0]
        return None

    # ------------------------------------------------------------------------------------------------------------- a round

    def begin(self, attempt: int) -> None:
        self.aggregator = self.ours.aggregator
        quarantine = self.coordinator.quarantine if attempt > 1 else set()
        self.ours.open_round(attempt, self.task)
        self.coordinator = second.Coordinator(self.theirs[0].cohort, attempt, self.task)
        self.coordinator.quarantine |= quarantine  # of the session
        self.uploads: dict[int, bytes] = {}
        self.votes: list[tuple[int, tuple[int, ...], bytes]] = []
        self.releases: dict[int, bytes] = {}
        self.vectors = self.ours.vectors(attempt)
        for place, hospital in enumerate(self.theirs):
            hospital.open(attempt, self.task)
            drawn = self._drawn(place, attempt + 1, 32 * max(1, hospital.cohort.threshold))
            made = self.same(
                "mask",
                lambda place=place: self.ours.parties[place].mask(self.vectors[place]).payload,
                lambda hospital=hospital, place=place, drawn=drawn: hospital.upload(
                    self.vectors[place].tolist(), drawn[:32], drawn[32:]
                ),
            )
            assert made is not None
            self.uploads[place] = made

    def upload(self, place: int) -> None:
        data = self.uploads[place]
        if self.rng.random() < 0.02:  # a word is another, and signed
            changed = bytearray(data)
            changed[-100 if len(data) < 180 else 52] ^= 1
            data = bytes(changed)
        self.same(
            "upload", lambda: self._took(self.aggregator.add_upload(data)), lambda: self.coordinator.take_upload(data)
        )

    @staticmethod
    def _took(_: object) -> None:
        return None

    def two_faced(self, place: int) -> None:
        data, ctx = self.uploads[place], self.coordinator.ctx
        end = 52 + WORDS * self.ours.ring_bits // 8
        words = bytes([data[52] ^ 1]) + data[53:end]
        rest = data[end:-64]
        commit, boxes = rest[:32], rest[32:]
        signature = self.ours.identities[place].sign(second.upload_signed(ctx, place, words, boxes, commit))
        other = data[:52] + words + rest + signature
        if place in self.aggregator.uploaded:
            self.same(
                "two uploads",
                lambda: self._took(self.aggregator.add_upload(other)),
                lambda: self.coordinator.take_upload(other),
            )

    def freeze(self) -> None:
        self.same("freeze", lambda: self._took(self.aggregator.freeze()), self.coordinator.freeze)

    def vote(self, place: int) -> None:
        some = tuple(sorted(self.rng.sample(self.members, self.rng.randint(2, len(self.members)))))
        named = self.aggregator.survivors if self.rng.random() < 0.85 else some
        vote = self.same("vote", lambda: self.ours.parties[place].vote(named), lambda: self.theirs[place].vote(named))
        if vote is not None:
            self.votes.append((place, tuple(named), vote))

    def take_vote(self, place: int) -> None:
        for voter, _, vote in self.rng.sample(self.votes, min(2, len(self.votes))):
            who = place if self.rng.random() < 0.1 else voter
            self.same(
                "take vote",
                lambda who=who, vote=vote: self.aggregator.add_vote(who, vote),
                lambda who=who, vote=vote: self.coordinator.take_vote(who, vote),
            )

    def release(self, place: int) -> None:
        survivors = self.aggregator.survivors
        if not survivors or self.theirs[0].cohort.is_strict or place not in survivors:
            return
        boxes, votes = list(self.aggregator.boxes_for(place)), list(self.aggregator.certificate())
        if self.rng.random() < 0.05:
            del self.rng.choice((boxes, votes or boxes))[0]
        if self.rng.random() < 0.02 and boxes:
            boxes[0] = boxes[0][0], bytes(48)
        is_fast = not votes and survivors == tuple(self.members)
        slow = () if is_fast else (list(survivors), votes)
        made = self.same(
            "release",
            lambda: self.ours.parties[place].release(survivors, votes, boxes),
            lambda: self.theirs[place].release(boxes, *slow),
        )
        if made is not None:
            self.releases[place] = made

    def take_release(self, place: int) -> None:
        if place not in self.releases:
            return
        data = self.releases[place]
        if self.rng.random() < 0.08:  # lies, under a signature that is right
            body = bytearray(data[:-64])
            body[35 * self.rng.randrange(len(self.members) - 1) + self.rng.choice((2, 3, 20))] ^= self.rng.choice(
                (1, 2)
            )
            data = bytes(body) + self.ours.identities[place].sign(
                second.release_signed(self.coordinator.ctx, place, bytes(body))
            )
        self.same(
            "take release",
            lambda: self.aggregator.add_release(place, data),
            lambda: self.coordinator.take_release(place, data),
        )

    def step(self) -> None:
        """A request: mostly the next one of the course, often any other."""
        phase, place = self.aggregator.phase.value, self.rng.choice(self.members)
        due = {"voting": (self.vote, self.take_vote), "releasing": (self.release, self.take_release)}.get(
            phase, (self.upload,)
        )
        act = self.rng.choice(due)
        if self.rng.random() < 0.2:
            act = self.rng.choice((self.upload, self.vote, self.take_vote, self.release, self.take_release))
        act(place)
        if len(self.aggregator.uploaded) >= len(self.members) - 1 and self.rng.random() < 0.2:
            self.freeze()
        if self.rng.random() < 0.003:
            self.two_faced(place)
        assert self.aggregator.phase.value == self.coordinator.state
        assert list(self.aggregator.survivors) == self.coordinator.survivors

    def end(self) -> str:
        """How the round came out."""
        phase, survivors = self.aggregator.phase.value, self.aggregator.survivors
        if phase == "done":
            expected = self.ours.wrap(np.sum([self.vectors[each] for each in survivors], axis=0))
            assert self.ours.signed(self.aggregator.total()).tolist() == expected.tolist() == self.coordinator.sum
        elif phase != "failed":
            self.aggregator.close_round()
        self.ours.close_round()
        for hospital in self.theirs:
            hospital.close()
        return phase + (" of all" if survivors == tuple(self.members) else " of some" if survivors else "")


@pytest.mark.parametrize(("hospitals", "fewest", "colluders", "bits"), [(5, 4, 1, 32), (7, 5, 1, 16), (4, 0, 1, 32)])
def test_same_answers(federation, task, hospitals: int, fewest: int, colluders: int, bits: int) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    ends: Counter[str] = Counter()
    for number in range(10):
        seed = f"pair {number}"
        pair = Pair(federation(hospitals, WORDS, bits, seed, fewest, colluders), seed, task)
        for attempt in (1, 2):
            pair.begin(attempt)
            for _ in range(REQUESTS):
                pair.step()
            ends[pair.end()] += 1
        seen += pair.seen
    codes = {code for _, code in seen}
    if fewest:
        assert {0, 104, 110, 111, 180, 182, 183, 185, 186, 187} <= codes
        assert {"done of all", "done of some"} <= ends.keys()
    else:
        assert {0, 104, 183} <= codes
        assert "done of all" in ends


def test_vote_that_nobody_asked_for_does_not_stop_the_fast_path(federation, task) -> None:
    """A survivor signs all of the cohort, as no hospital of ours does: in the requests to the others it would get no answer."""
    made = federation(5, WORDS, fewest=4).set_up()
    made.open_round(1)
    vectors = made.vectors(1)
    made.upload(vectors)
    survivors = made.aggregator.freeze()
    cohort, sizes = second.sha(second.enc("cohort", second.listed(survivors))), (second.be(8, WORDS), second.be(1, 32))
    ctx = second.sha(second.enc("ctx", made.aggregator.transcript, second.be(8, 1), cohort, task, *sizes))
    made.aggregator.add_vote(3, made.identities[3].sign(second.vote_signed(ctx, 3, survivors)))
    assert made.aggregator.certificate() == ()
    for place in survivors:
        made.aggregator.add_release(place, made.release(place))
    assert made.signed(made.aggregator.total()).tolist() == np.sum(vectors, axis=0).tolist()
