"""What a hostile coordinator holds and does, for the tests of attacks and of planted bugs.

It relays every message, keeps every byte, and reads the memory of the hospitals that collude with it.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from medfed_test_boxes import split_boxes
from numpy.typing import NDArray

from medfed.errors import MedfedError
from medfed.identity import Identity
from medfed.privacy.secagg import keys, shamir
from medfed.privacy.secagg.boxes import open_box
from medfed.privacy.secagg.keys import leaf_seed, stream_key
from medfed.privacy.secagg.masks import pad_words
from medfed.privacy.secagg.messages import Offer, Secret, commitment_of
from medfed.privacy.secagg.party import Party
from medfed.privacy.secagg.protocol import BOX_ENTRY_BYTES, HASH_BYTES, HEADER_BYTES, RELEASE_ENTRY_BYTES

SIGNATURE_BYTES = 64
CONSTANT = bytes(32)
"""What a coordinator guesses first for a self mask."""


class StillMasked(Exception):
    """What the coordinator holds does not take all pads off."""


class Wiretap:
    """All that the coordinator has of one round.

    ``parties``: by position; of an honest one nothing is read but its public cohort, of colluders the memory. ``words``:
    masked, as signed integers. ``shares``: of whose self mask, by holder. ``seeds``: leaf seeds by pair.
    """

    def __init__(self, fed, parties: dict[int, Party]) -> None:
        self.fed, self.parties = fed, parties
        self.contexts: dict[int, bytes] = {}
        self.words: dict[int, NDArray[np.int64]] = {}
        self.commitments: dict[int, bytes] = {}
        self.boxes: dict[int, dict[int, bytes]] = {}
        self.shares: dict[int, dict[int, bytes]] = {}
        self.seeds: dict[frozenset[int], bytes] = {}

    def hear_uploads(self, vectors: Sequence[NDArray[np.int64]]) -> Wiretap:
        """Every party masks its vector; all uploads are heard."""
        for position, party in self.parties.items():
            self.hear_upload(position, party.mask(vectors[position]))
        return self

    def hear_upload(self, position: int, upload) -> None:
        tail = upload.payload[HEADER_BYTES + self.fed.words * self.fed.ring_bits // 8 : -SIGNATURE_BYTES]
        self.contexts[position] = upload.pad_id
        self.words[position] = self.fed.words_of(upload.payload)
        self.commitments[position] = tail[:HASH_BYTES]
        self.boxes[position] = split_boxes(tail[HASH_BYTES:])
        assert len(tail) in (0, HASH_BYTES + BOX_ENTRY_BYTES * len(self.boxes[position]))

    def hear_release(self, position: int, payload: bytes) -> None:
        for peer, kind, secret in entries(payload):
            if kind == Secret.SHARE:
                self.shares.setdefault(peer, {})[position] = secret
            elif kind == Secret.SEED:
                self.seeds[frozenset((position, peer))] = secret

    def read_memory(self, colluder: int) -> None:
        for peer, root in self.parties[colluder]._state.roots.items():
            self.hear_root(colluder, peer, root)

    def hear_root(self, known: int, peer: int, root: bytes) -> None:
        """The key that ``peer`` shares with a hospital the coordinator plays or has bought."""
        context = self.contexts[peer]
        self.seeds[frozenset((known, peer))] = leaf_seed(root, context)
        if known in self.boxes[peer]:
            share = open_box(root, context, peer, known, self.boxes[peer][known])
            self.shares.setdefault(peer, {})[known] = share

    def boxes_for(self, position: int, senders: Iterable[int]) -> tuple[tuple[int, bytes], ...]:
        return tuple((sender, self.boxes[sender][position]) for sender in senders if sender != position)

    def ask_fast(self, positions: Iterable[int]) -> None:
        for position in positions:
            everybody = self.parties[position].cohort.members
            boxes = self.boxes_for(position, everybody)
            self.hear_release(position, self.parties[position].release(everybody, (), boxes))

    def ask_votes(self, survivors: Sequence[int], voters: Iterable[int] | None = None) -> tuple[tuple[int, bytes], ...]:
        chosen = survivors if voters is None else voters
        return tuple((position, self.parties[position].vote(survivors)) for position in chosen)

    def ask_slow(self, survivors: Sequence[int], positions: Iterable[int] | None = None) -> None:
        """The honest course of a round whose survivors are ``survivors``."""
        votes = self.ask_votes(survivors)
        for position in survivors if positions is None else positions:
            boxes = self.boxes_for(position, survivors)
            self.hear_release(position, self.parties[position].release(survivors, votes, boxes))

    def isolate(self, members: Iterable[int]) -> NDArray[np.int64]:
        """The sum of just these hospitals' vectors. Raises ``StillMasked``."""
        inside, total = set(members), np.zeros(self.fed.words, np.int64)
        for member in inside:
            total += self.words[member]
            if self.commitments[member]:
                total -= self._pad(self._self_mask(member), member)
            for peer in self.parties[member].cohort.peers(member):
                if peer in inside:
                    continue
                if frozenset((member, peer)) not in self.seeds:
                    raise StillMasked(f"the pad between {member} and {peer}")
                pad = self._pad(self.seeds[frozenset((member, peer))], member)
                total += -pad if member < peer else pad
        return self.fed.wrap(total)

    def _pad(self, seed: bytes, owner: int) -> NDArray[np.int64]:
        stream = stream_key(seed, self.contexts[owner])
        return pad_words(stream, 0, self.fed.words, self.fed.ring_bits).astype(np.int64)

    def _self_mask(self, owner: int) -> bytes:
        held, threshold = self.shares.get(owner, {}), self.parties[owner].cohort.thresholds.shares
        guesses = [CONSTANT]
        if len(held) >= threshold:
            guesses.append(shamir.combine(tuple(held.items()), threshold))
        for guess in guesses:
            if commitment_of(self.contexts[owner], owner, guess) == self.commitments[owner]:
                return guess
        raise StillMasked(f"the self mask of {owner}, of which {len(held)} shares are known")


def entries(payload: bytes) -> list[tuple[int, int, bytes]]:
    """Peer, kind and secret of each entry of a release, however many there are."""
    body = payload[:-SIGNATURE_BYTES]
    return [
        (int.from_bytes(body[start : start + 2], "big"), body[start + 2], body[start + 3 : start + RELEASE_ENTRY_BYTES])
        for start in range(0, len(body), RELEASE_ENTRY_BYTES)
    ]


def open_all(fed, attempt: int, task: bytes, tasks: dict[int, bytes] | None = None) -> Wiretap:
    """Every hospital opens the attempt, on ``task`` unless ``tasks`` says otherwise."""
    for position, party in enumerate(fed.parties):
        party.open_round(attempt, (tasks or {}).get(position, task))
    return Wiretap(fed, dict(enumerate(fed.parties)))


# ------------------------------------------------------------------------------------------------- invented hospitals


def invented(position: int) -> Identity:
    """An identity that the coordinator made up."""
    return Identity.from_seed(hashlib.sha256(b"invented" + bytes([position])).digest())


class Impostor:
    """Plays ``positions`` towards one victim, with keys of its own making."""

    def __init__(self, shared, positions: Iterable[int]) -> None:
        self.private = {position: hashlib.sha256(b"mine" + bytes([position])).digest() for position in positions}
        self.offers = {}
        for position, private in self.private.items():
            body = Offer(position, bytes(32), keys.public_key(private)).encode(shared)
            self.offers[position] = body + invented(position).sign(body)

    def tell(self, tap: Wiretap, victim: int, victims_offer: bytes) -> None:
        """What these keys open of the victim's upload."""
        public = victims_offer[-SIGNATURE_BYTES - 32 : -SIGNATURE_BYTES]
        transcript = tap.parties[victim].transcript
        for position, private in self.private.items():
            tap.hear_root(position, victim, keys.derive_root(private, public, transcript, position, victim))


# ---------------------------------------------------------------------------------------------------- rules switched off

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Change:
    """In the source of ``owner.name``: ``old``, which stands there once, becomes ``new``; ``used_in``: who imports it."""

    owner: object
    name: str
    old: str
    new: str
    used_in: tuple[object, ...] = ()

    def __call__(self, patch: pytest.MonkeyPatch) -> None:
        function = getattr(self.owner, self.name)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.name} no longer says {self.old!r}: plant the bug anew"
        scope: dict[str, object] = {}
        changed = "from __future__ import annotations\n" + source.replace(self.old, self.new)
        exec(compile(changed, f"<planted in {self.name}>", "exec"), function.__globals__, scope)
        for place in (self.owner, *self.used_in):
            patch.setattr(place, self.name, scope[self.name])


def instead(owner: object, name: str, replacement: object) -> Plant:
    """``owner.name`` is something else."""
    return lambda patch: patch.setattr(owner, name, replacement)


def both(*plants: Plant) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for each in plants:
            each(patch)

    return plant


def nothing(*_: object) -> None:
    """A check that was left out."""


def obliging_body(cohort, position, context, roots, survivors, boxes) -> bytes:
    """A release of whatever is asked for: a share for every box, a seed for everybody who is said to have dropped out."""
    body = b""
    for sender, box in boxes:
        share = open_box(roots[sender], context, sender, position, box)
        body += sender.to_bytes(2, "big") + bytes([Secret.SHARE]) + (share or bytes(32))
    for peer in cohort.peers(position):
        if peer not in survivors:
            body += peer.to_bytes(2, "big") + bytes([Secret.SEED]) + leaf_seed(roots[peer], context)
    return body


def code_of(error: BaseException) -> int | None:
    return error.code if isinstance(error, MedfedError) else None
