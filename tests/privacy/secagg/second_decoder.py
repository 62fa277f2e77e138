"""Secure aggregation once more, from docs/secure_aggregation.md alone: hospital and coordinator, nothing of medfed.

Written by somebody who had not seen the implementation. For tests only: nothing hides the keys that it holds.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Boxes = Votes = Sequence[tuple[int, bytes]]  # sender or voter, and its 48 or 64 bytes


class Refused(Exception):
    """``code``: what stands after ``MF-``."""

    def __init__(self, code: int) -> None:
        super().__init__(f"MF-{code}")
        self.code = code


def need(holds: bool, code: int) -> None:
    if not holds:
        raise Refused(code)


def be(width: int, number: int) -> bytes:
    return number.to_bytes(width, "big")


def number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def enc(name: str, *parts: bytes) -> bytes:
    """``enc(L"name", part, part, ...)``."""
    return b"".join(be(4, len(part)) + part for part in (b"medfed/secagg/v1/" + name.encode(), *parts))


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    return HKDF(SHA256(), size, salt or None, info).derive(secret)


def listed(members: Iterable[int]) -> bytes:
    return b"".join(be(2, each) for each in sorted(members))


def is_ascending(numbers: Sequence[int]) -> bool:
    return all(one < next_one for one, next_one in itertools.pairwise(numbers))


def check(public: bytes, signature: bytes, data: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise Refused(110) from None


def stream(seed: bytes, ctx: bytes) -> bytes:
    return hkdf(seed, b"", enc("stream", ctx), 44)


def pad(seed: bytes, ctx: bytes, bits: int, first: int, words: int) -> np.ndarray:
    """Words ``first``, ``first + 1``, ... as uint64."""
    key, begin, end = stream(seed, ctx), first * bits // 8, (first + words) * bits // 8
    block, skip = divmod(begin, 16)
    cipher = Cipher(algorithms.AES256(key[:32]), modes.CTR(key[32:] + be(4, block + 2)))
    keystream = cipher.encryptor().update(bytes(skip + end - begin))
    return np.frombuffer(keystream[skip:], f"<u{bits // 8}").astype(np.uint64)


def times(a: int, b: int) -> int:
    """In GF(256) with 0x11b."""
    product = 0
    while b:
        product ^= a * (b & 1)
        a, b = (a << 1) ^ (0x11B if a & 0x80 else 0), b >> 1
    return product


def share(secret: bytes, coefficients: bytes, position: int) -> bytes:
    """Horner's rule, from the last block of coefficients down to the secret."""
    value = bytes(32)
    for at in range(len(coefficients) - 32, -33, -32):
        block = coefficients[at : at + 32] if at >= 0 else secret
        value = bytes(times(old, position + 1) ^ new for old, new in zip(value, block, strict=True))
    return value


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the shares of the smallest positions."""
    chosen, secret = sorted(shares)[:threshold], bytes(32)
    for holder in chosen:
        factor = 1
        for other in chosen:
            difference = (other + 1) ^ (holder + 1)
            inverse = next((each for each in range(256) if times(each, difference) == 1), 0)
            factor = times(factor, times(other + 1, inverse)) if other != holder else factor
        secret = bytes(old ^ times(new, factor) for old, new in zip(secret, shares[holder], strict=True))
    return secret


def close_box(key: bytes, plain: bytes, ctx: bytes, sender: int, receiver: int) -> bytes:
    return AESGCM(key).encrypt(bytes(12), plain, ctx + be(2, sender) + be(2, receiver))


def open_box(key: bytes, box: bytes, ctx: bytes, sender: int, receiver: int) -> bytes | None:
    try:
        return AESGCM(key).decrypt(bytes(12), box, ctx + be(2, sender) + be(2, receiver))
    except InvalidTag:
        return None


def commitment(ctx: bytes, position: int, mask: bytes) -> bytes:
    return sha(enc("commit", ctx, be(2, position), mask))


def upload_signed(ctx: bytes, position: int, words: bytes, boxes: bytes, commit: bytes) -> bytes:
    return enc("upload", ctx, be(2, position), sha(words), sha(boxes), commit)


def vote_signed(ctx: bytes, position: int, survivors: Iterable[int]) -> bytes:
    return enc("vote", ctx, be(2, position), listed(survivors))


def release_signed(ctx: bytes, position: int, body: bytes) -> bytes:
    return enc("release", ctx, be(2, position), sha(body))


@dataclass(frozen=True)
class Study:
    """What files say. ``identities``: Ed25519 public keys by position; ``words``: D."""

    config_hash: bytes
    roster_hash: bytes
    identities: Sequence[bytes]
    colluders: int
    fewest_survivors: int
    bits: int
    words: int
    most_hospitals: int

    def read_offer(self, offer: bytes) -> tuple[int, bytes]:
        """Position and public key of an offer that the roster's identity of that position signed."""
        need(len(offer) == 240, 103)
        config, roster, position = offer[30:62], offer[66:98], number(offer[102:104])
        need(enc("setup", config, roster, offer[102:104], offer[108:140], offer[144:176]) == offer[:176], 103)
        need(position < len(self.identities), 111)
        need((config, roster) == (self.config_hash, self.roster_hash), 112)
        check(self.identities[position], offer[176:], offer[:176])
        return position, offer[144:176]


class Cohort:
    """U1 and all that is public of a setup: ``needed`` m, ``threshold`` t, ``transcript`` T."""

    def __init__(self, study: Study, offers: Sequence[bytes]) -> None:
        self.study = study
        self.keys: dict[int, bytes] = {}
        self.setups: dict[int, bytes] = {}
        for offer in offers:
            position, public = study.read_offer(offer)
            need(position not in self.keys, 143)
            self.keys[position], self.setups[position] = public, offer[:176]
        self.members = sorted(self.keys)
        n, c = len(self.members), study.colluders
        need(n <= study.most_hospitals and 3 <= n <= 128, 140)
        need(c >= 1 and n - c >= 2, 141)
        need(n >= study.fewest_survivors, 140)
        points = {int.from_bytes(key, "little") % (1 << 255) % (2**255 - 19) for key in self.keys.values()}
        need(len(points) == n, 170)
        m = max((n + c + 1) // 2 + 1, study.fewest_survivors)
        self.is_strict = m >= n
        self.needed, self.threshold = (n, 0) if self.is_strict else (m, m - 1)
        ordered = [self.setups[each] for each in self.members]
        self.transcript = sha(enc("transcript", study.config_hash, study.roster_hash, *ordered))
        self.hash = sha(enc("cohort", listed(self.members)))

    def peers(self, position: int) -> list[int]:
        return [each for each in self.members if each != position]

    def ctx(self, attempt: int, task: bytes) -> bytes:
        sizes = be(8, self.study.words), be(1, self.study.bits)
        return sha(enc("ctx", self.transcript, be(8, attempt), self.hash, task, *sizes))

    def read_upload(self, data: bytes, attempt: int) -> tuple[int, bytes, bytes, bytes]:
        """Position, words, commitment and boxes; the signature is not checked."""
        end = 52 + self.study.words * self.study.bits // 8
        n = len(self.members)
        need(len(data) == end + 64 + (0 if self.is_strict else 32 + 50 * (n - 1)), 180)
        need(data[0] == 1, 102)
        need((data[43], number(data[44:52])) == (self.study.bits, self.study.words), 180)
        need((data[1:33], number(data[33:41])) == (self.transcript, attempt), 182)
        position = number(data[41:43])
        need(position in self.keys, 111)
        commit, boxes = (b"", b"") if self.is_strict else (data[end : end + 32], data[end + 32 : -64])
        need(self.is_strict or list(read_boxes(boxes)) == self.peers(position), 180)
        return position, data[52:end], commit, boxes

    def certifies(self, ctx: bytes, survivors: Sequence[int], votes: Votes) -> bool:
        voters = [voter for voter, _ in votes]
        try:
            need(is_ascending(voters) and set(voters) <= set(survivors) and len(voters) >= self.needed, 186)
            for voter, vote in votes:
                check(self.study.identities[voter], vote, vote_signed(ctx, voter, survivors))
        except Refused:
            return False
        return True


def read_boxes(data: bytes) -> dict[int, bytes]:
    """By receiver."""
    return {number(data[at : at + 2]): data[at + 2 : at + 50] for at in range(0, len(data), 50)}


@dataclass
class Hospital:
    """One of them. ``private``, ``nonce``: of its offer; ``seed``: of its Ed25519 identity. Everything below is its state."""

    study: Study
    position: int
    private: bytes
    nonce: bytes
    seed: bytes
    cohort: Cohort = field(init=False)
    roots: dict[int, bytes] = field(init=False)
    attempt: int = 0
    state: str = "new"
    ctx: bytes = b""
    voted: tuple[int, ...] = ()
    asked: object = None
    released: bytes = b""

    def sign(self, data: bytes) -> bytes:
        return data + Ed25519PrivateKey.from_private_bytes(self.seed).sign(data)

    def offer(self) -> bytes:
        public = X25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw()
        hashes = self.study.config_hash, self.study.roster_hash
        return self.sign(enc("setup", *hashes, be(2, self.position), self.nonce, public))

    def take_offers(self, offers: Sequence[bytes]) -> None:
        cohort, roots = Cohort(self.study, offers), {}
        need(cohort.setups.get(self.position) == self.offer()[:176], 174)
        for peer in cohort.peers(self.position):
            try:
                theirs = X25519PublicKey.from_public_bytes(cohort.keys[peer])
                secret = X25519PrivateKey.from_private_bytes(self.private).exchange(theirs)
            except ValueError:  # all zero
                raise Refused(170) from None
            pair = (be(2, each) for each in sorted((peer, self.position)))
            roots[peer] = hkdf(secret, cohort.transcript, enc("root", *pair))
        self.cohort, self.roots, self.state = cohort, roots, "ready"

    def open(self, attempt: int, task: bytes) -> None:
        need(self.state == "ready", 104)
        need(attempt > self.attempt, 181)
        self.attempt, self.ctx, self.state = attempt, self.cohort.ctx(attempt, task), "training"

    def close(self) -> None:
        self.state, self.ctx, self.voted, self.asked, self.released = "ready", b"", (), None, b""

    def leaf(self, peer: int) -> bytes:
        return hkdf(self.roots[peer], b"", enc("mask", self.ctx))

    def box_key(self, sender: int, receiver: int) -> bytes:
        root = self.roots[receiver if sender == self.position else sender]
        return hkdf(root, b"", enc("share", self.ctx, be(2, sender), be(2, receiver)))

    def upload(self, vector: Sequence[float], mask: bytes = b"", coefficients: bytes = b"") -> bytes:
        """``vector``: whole numbers, noise and all. ``mask``, ``coefficients``: b and a_1 ‖ a_2 ‖ ..., drawn anew."""
        cohort, bits, size, at = self.cohort, self.study.bits, self.study.words, self.position
        need(self.state == "training", 104)
        need(len(vector) == size, 180)
        need(all(math.isfinite(each) for each in vector), 184)
        total, boxes, commit = np.array([int(each) % (1 << bits) for each in vector], np.uint64), b"", b""
        for peer in cohort.peers(at):
            words = pad(self.leaf(peer), self.ctx, bits, 0, size)
            total = total + words if peer > at else total - words
            if not cohort.is_strict:
                plain = share(mask, coefficients, peer)
                boxes += be(2, peer) + close_box(self.box_key(at, peer), plain, self.ctx, at, peer)
        if not cohort.is_strict:
            total, commit = total + pad(mask, self.ctx, bits, 0, size), commitment(self.ctx, at, mask)
        data = total.astype(f"<u{bits // 8}").tobytes()
        header = b"\1" + cohort.transcript + be(8, self.attempt) + be(2, at) + be(1, bits) + be(8, size)
        signature = self.sign(upload_signed(self.ctx, at, data, boxes, commit))[-64:]
        self.state = "uploaded"
        return header + data + commit + boxes + signature

    def vote(self, survivors: Sequence[int]) -> bytes:
        need(not self.cohort.is_strict and self.state in ("uploaded", "voted", "released"), 104)
        is_part = is_ascending(survivors) and set(survivors) < set(self.cohort.members)
        need(is_part and self.position in survivors and len(survivors) >= self.cohort.needed, 185)
        need(self.state == "uploaded" or self.voted == tuple(survivors), 183)
        self.state, self.voted = "voted" if self.state == "uploaded" else self.state, tuple(survivors)
        return self.sign(vote_signed(self.ctx, self.position, survivors))[-64:]

    def release(self, boxes: Boxes, survivors: Sequence[int] | None = None, votes: Votes = ()) -> bytes:
        """On the fast path without survivors and votes."""
        asked = list(boxes), survivors, list(votes)
        if self.state == "released":
            need(self.asked == asked, 183)
            return self.released
        need(not self.cohort.is_strict and self.state == ("uploaded" if survivors is None else "voted"), 104)
        members = self.cohort.members
        if survivors is not None:
            need(self.voted == tuple(survivors) and self.cohort.certifies(self.ctx, survivors, votes), 186)
            members = list(survivors)
        need([sender for sender, _ in boxes] == [each for each in members if each != self.position], 180)
        given, body = dict(boxes), b""
        for peer in self.cohort.peers(self.position):
            if peer not in members:
                body += be(2, peer) + b"\2" + self.leaf(peer)
                continue
            plain = open_box(self.box_key(peer, self.position), given[peer], self.ctx, peer, self.position)
            body += be(2, peer) + (b"\0" + bytes(32) if plain is None else b"\1" + plain)
        signature = self.sign(release_signed(self.ctx, self.position, body))[-64:]
        self.state, self.asked, self.released = "released", asked, body + signature
        return self.released


class Coordinator:
    """One attempt of a cohort. ``state``: open, voting, releasing, done or failed."""

    def __init__(self, cohort: Cohort, attempt: int, task: bytes) -> None:
        self.cohort, self.attempt, self.ctx = cohort, attempt, cohort.ctx(attempt, task)
        self.identities, self.state = cohort.study.identities, "open"
        self.uploads: dict[int, bytes] = {}
        self.quarantine: set[int] = set()
        self.survivors: list[int] = []
        self.votes: dict[int, bytes] = {}
        self.releases: dict[int, dict[int, tuple[int, bytes]]] = {}
        self.sum: list[int] | None = None

    def take_upload(self, data: bytes) -> None:
        need(self.state != "failed", 104)
        position, words, commit, boxes = self.cohort.read_upload(data, self.attempt)
        need(position not in self.quarantine, 183)
        if self.uploads.get(position) == data:
            return
        check(self.identities[position], data[-64:], upload_signed(self.ctx, position, words, boxes, commit))
        if position in self.uploads:
            self.quarantine.add(position)
            raise Refused(183)
        need(self.state == "open", 182)
        self.uploads[position] = data
        if self.cohort.is_strict and len(self.uploads) == len(self.cohort.members):
            self.survivors = self.cohort.members
            self._finish({})

    def freeze(self) -> None:
        need(self.state == "open", 104)
        need(len(self.uploads) >= self.cohort.needed, 140)
        self.survivors = sorted(self.uploads)
        self.state = "releasing" if self.survivors == self.cohort.members else "voting"

    def take_vote(self, position: int, vote: bytes) -> None:
        need(self.state in ("voting", "releasing", "done"), 104)
        need(position in self.survivors, 111)
        check(self.identities[position], vote, vote_signed(self.ctx, position, self.survivors))
        if self.state == "voting":
            self.votes[position] = vote
            self.state = "releasing" if len(self.votes) == len(self.survivors) else "voting"

    def boxes_for(self, receiver: int) -> list[tuple[int, bytes]]:
        senders = [each for each in self.survivors if each != receiver]
        return [(each, read_boxes(self._upload(each)[3])[receiver]) for each in senders]

    def take_release(self, position: int, data: bytes) -> None:
        need(self.state in ("releasing", "done"), 104)
        need(position in self.survivors, 111)
        peers = self.cohort.peers(position)
        need(len(data) == 35 * len(peers) + 64, 180)
        items = list(struct.iter_unpack(">HB32s", data[:-64]))
        need([peer for peer, _, _ in items] == peers, 180)
        need(all(kind in ((0, 1) if peer in self.survivors else (2,)) for peer, kind, _ in items), 187)
        check(self.identities[position], data[-64:], release_signed(self.ctx, position, data[:-64]))
        if self.state == "done":
            return
        self.releases[position] = {peer: (kind, value) for peer, kind, value in items}
        is_last = len(self.releases) == len(self.survivors)
        if is_last or self.survivors == self.cohort.members:
            masks = {each: mask for each in self.survivors if (mask := self._mask(each)) is not None}
            if len(masks) == len(self.survivors):
                self._finish(masks)
            elif is_last:
                self.state = "failed"
                raise Refused(187)

    def _upload(self, position: int) -> tuple[int, bytes, bytes, bytes]:
        return self.cohort.read_upload(self.uploads[position], self.attempt)

    def _mask(self, owner: int) -> bytes | None:
        """b of ``owner``, if there are shares that make the one it committed to."""
        given = {holder: each[owner] for holder, each in self.releases.items() if holder != owner}
        shares = {holder: value for holder, (kind, value) in given.items() if kind == 1}
        for left_out in (None, *shares):
            chosen = {holder: value for holder, value in shares.items() if holder != left_out}
            if len(chosen) >= self.cohort.threshold:
                mask = combine(chosen, self.cohort.threshold)
                if commitment(self.ctx, owner, mask) == self._upload(owner)[2]:
                    return mask
        return None

    def _finish(self, masks: Mapping[int, bytes]) -> None:
        bits, size = self.cohort.study.bits, self.cohort.study.words
        total = np.zeros(size, np.uint64)
        for at in self.survivors:
            total += np.frombuffer(self._upload(at)[1], f"<u{bits // 8}")
            total -= pad(masks[at], self.ctx, bits, 0, size) if masks else np.uint64(0)
            for peer in set(self.cohort.members) - set(self.survivors):
                words = pad(self.releases[at][peer][1], self.ctx, bits, 0, size)
                total = total - words if peer > at else total + words
        unsigned = [int(each) % (1 << bits) for each in total]
        self.sum = [each - (each >> (bits - 1) << bits) for each in unsigned]
        self.state = "done"
