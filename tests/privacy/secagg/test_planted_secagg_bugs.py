"""Every way of getting secure aggregation wrong that the design names, planted in production code: a check notices it.

A check runs production code and raises ``Noticed``; it passes on the code as it is and must not with the bug. Keys are fixed, so
nothing depends on chance. "Debit after send" is planted where the debit is, in tests/client/test_planted_ledger_bugs.py.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from medfed.errors import MedfedError
from medfed.privacy import quantize
from medfed.privacy.secagg import keys, masks, messages, party, protocol, recovery, release, shamir
from medfed.privacy.secagg.keys import leaf_seed, stream_key
from medfed.privacy.secagg.messages import Secret, commitment_of, release_signature_input
from medfed.privacy.secagg.party import Party
from medfed.privacy.secagg.transitions import Begin, Round, Vector

sys.path.insert(0, str(Path(__file__).parent))

import medfed_test_hostile as hostile
from medfed_test_hostile import Change, Impostor, Plant, both, instead, open_all

CHI2_OFF = 5.5  # standard deviations: about 1e-6 a comparison, as chi-square has a long tail
GUESSING = 0.02


class Noticed(AssertionError):
    """The check saw that a promise is broken."""


def need(holds: object, what: str) -> None:
    if not holds:
        raise Noticed(what)


@contextlib.contextmanager
def refused(code: int, what: str) -> Iterator[None]:
    try:
        yield
    except MedfedError as error:
        need(error.code == code, f"{what}, but for another reason: {error}")
    else:
        raise Noticed(what)


def five(make, words: int = 64, ring_bits: int = 32):
    return make(5, words, ring_bits, fewest=4).set_up()


class Spy:
    """The entropy of one hospital, and what was drawn of it."""

    def __init__(self, party: Party) -> None:
        self.inner, self.drawn = party._entropy, {}
        party._entropy = self

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        self.drawn[purpose] = self.inner.draw(purpose, size_bytes)
        return self.drawn[purpose]


# ----------------------------------------------------------------------------------------------------------------- checks


def upload_is_the_designs_formula(make, task) -> None:
    """y_i = q_i + pad(b_i) + sum of pads to later peers - sum of pads to earlier ones, with a pad of another hand."""
    stream = bytes.fromhex("ecec432a428d81a6b37b9cd42bb0826226b64a93e0b4fdd37b4c86206d09fdb1890b1dab21905e00c8593537")
    need(stream_key(bytes(range(32)), bytes(32)) == stream, "the stream of the design's seed is another")
    for ring_bits, known in ((32, "240e7341 c26482c0 6da7940a 6484900d"), (16, "7341 240e 82c0 c264")):
        words = [int(word, 16) for word in known.split()]
        need(pad_of(stream, 4, ring_bits).tolist() == words, "this file's own pad is wrong")
        fed = five(make, 100, ring_bits)
        spy = Spy(fed.parties[2])
        open_all(fed, 1, task)
        upload = fed.parties[2].mask(fed.vectors()[2])
        wanted = fed.vectors()[2] + pad_of(
            stream_key(spy.drawn["secagg/self mask"][:32], upload.pad_id), 100, ring_bits
        )
        for peer, root in fed.parties[2]._state.roots.items():
            pad = pad_of(stream_key(leaf_seed(root, upload.pad_id), upload.pad_id), 100, ring_bits)
            wanted += pad if peer > 2 else -pad
        need((fed.words_of(upload.payload) == fed.wrap(wanted)).all(), "the upload is not the formula's")


def pad_of(stream: bytes, words: int, ring_bits: int) -> NDArray[np.int64]:
    counter = (2).to_bytes(4, "big")
    encryptor = Cipher(algorithms.AES(stream[:32]), modes.CTR(stream[32:] + counter)).encryptor()
    return np.frombuffer(encryptor.update(bytes(words * ring_bits // 8)), f"<u{ring_bits // 8}").astype(np.int64)


def sum_is_exact_or_there_is_none(make, task) -> None:
    """Also where one hospital lies about its shares: it may lose the round, not change the sum."""
    for lost, liars in (((), ()), ((2,), ()), ((), (0,)), ((), (0, 1, 2)), ((4,), (0, 1, 2, 3))):
        fed = five(make)
        fed.open_round(1)
        fed.upload(fed.vectors(), lost)
        survivors = fed.aggregator.freeze()
        votes = () if len(survivors) == 5 else [fed.parties[position].vote(survivors) for position in survivors]
        for position, vote in zip(survivors, votes, strict=False):
            fed.aggregator.add_vote(position, vote)
        with contextlib.suppress(MedfedError):
            for position in survivors:
                payload = fed.release(position)
                fed.aggregator.add_release(position, with_wrong_shares(fed, position, payload, liars))
            total = fed.signed(fed.aggregator.total())
            need((total == sum(fed.vectors()[each] for each in survivors)).all(), "a wrong sum passes for right")
            continue
        need(liars, "an honest round is lost")


def with_wrong_shares(fed, position: int, payload: bytes, liars: tuple[int, ...]) -> bytes:
    if position not in liars:
        return payload
    body = b"".join(
        peer.to_bytes(2, "big") + bytes([kind]) + (bytes(32) if kind == Secret.SHARE else secret)
        for peer, kind, secret in hostile.entries(payload)
    )
    context = fed.parties[position]._state.context
    return body + fed.identities[position].sign(release_signature_input(context, position, body))


def seeds_have_256_bits(make, task) -> None:
    """Every byte drawn, and every byte of a key on the way, changes what comes of it."""
    first, context = bytes(range(32)), bytes(32)
    new, ready = make(5, fewest=4).parties[0]._state, five(make).parties[0]._state
    training, _ = party.step(ready, Round(1, task), entropy=b"", now=0.0)

    def offered(secret: bytes) -> bytes:
        return party.step(new, Begin(), entropy=secret + bytes(32), now=0.0)[0].offer

    def masked(secret: bytes) -> object:
        return party.step(training, Vector(64), entropy=secret + bytes(64), now=0.0)[1]

    links: tuple[tuple[str, Callable[[bytes], object], int], ...] = (
        ("private key", offered, 31),  # X25519 clears bits at its end
        ("self mask", lambda secret: masked(secret)[0].streams, 32),
        ("leaf seed", lambda secret: keys.leaf_seed(secret, context), 32),
        ("stream", lambda secret: keys.stream_key(secret, context), 32),
    )
    for name, derive, places in links:
        seen = {derive(first), *(derive(first[:place] + b"\xff" + first[place + 1 :]) for place in range(places))}
        need(len(seen) == places + 1, f"not all bytes of a secret count: {name}")
    columns = np.array([list(keys.leaf_seed(first, bytes([number]) * 32)) for number in range(256)]).T
    need(columns.shape == (32, 256) and all(len(set(column)) > 120 for column in columns), "a leaf seed is short")


def uploads_look_like_noise(make, task) -> None:
    """Every byte place passes a chi-square test, in an upload and in one pad alone, as many pads hide what each of them lacks.
    No classifier tells an upload of one vector from one of another.

    It is fitted to half of 40,000 pieces of one upload, each of eight words of a real update or of zeros; on the other half
    its AUC is 0.50 +- 0.02 (four standard errors), and nearly 1 where the words are not masked.
    """
    pieces = 40_000
    fed = five(make, 8 * pieces)
    is_real = np.random.default_rng(5).permutation(pieces) % 2 == 0
    update = np.random.default_rng(6).normal(0.0, 1000.0, (pieces, 8)).round().astype(np.int64)
    vector = np.where(is_real[:, None], update, 0).ravel()
    open_all(fed, 1, task)
    payload = fed.parties[0].mask(vector).payload
    words, alone = np.frombuffer(payload, "<u4", vector.size, 52), np.zeros(vector.size, "<u4")
    fed.parties[0]._masker.add_pads(alone, [stream_key(bytes(range(32)), bytes(32))], [1])
    for place, seen in itertools.product(range(4), (words, alone)):
        off = chi2_off(seen.view(np.uint8)[place::4])
        need(abs(off) < CHI2_OFF, f"bytes of the words are not uniform: {off:.1f} standard deviations")
    need(chi2_off(vector.astype("<u4").view(np.uint8)) > CHI2_OFF, "the test would not notice plain words")
    auc = auc_of_classifier(words.reshape(pieces, 8), is_real)
    need(abs(auc - 0.5) < GUESSING, f"a classifier tells uploads apart: AUC {auc:.3f}")
    plain = auc_of_classifier(vector.astype("<u4").reshape(pieces, 8), is_real)
    need(plain > 0.99, f"the classifier would not notice plain words: AUC {plain:.3f}")


def chi2_off(data: NDArray[np.uint8]) -> float:
    """Standard deviations above what uniform bytes give: 255 degrees of freedom."""
    counts = np.bincount(data, minlength=256)
    chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    return (chi2 - 255) / np.sqrt(2 * 255)


def auc_of_classifier(words: NDArray[np.uint32], labels: NDArray[np.bool_]) -> float:
    """Least squares on every bit and every word's size, fitted to the first half, scored on the second."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1).astype(np.float32)
    sizes = np.abs(words.view(np.int32).astype(np.float32)) / 2**31
    features = np.hstack([bits - 0.5, sizes, np.log1p(sizes * 2**31), np.ones((len(words), 1), np.float32)])
    half = len(words) // 2
    fitted, target = features[:half], labels[:half] - 0.5
    weights = np.linalg.solve(fitted.T @ fitted + 1e-2 * np.eye(features.shape[1]), fitted.T @ target)
    scores, truth = features[half:] @ weights, labels[half:]
    ranks = scores.argsort().argsort()[truth]
    return float((ranks.sum() - truth.sum() * (truth.sum() - 1) / 2) / (truth.sum() * (~truth).sum()))


def context_binds_every_part(make, task) -> None:
    config = make(6, 64, fewest=4).config(0).shared
    everybody = config.everybody
    others = {
        "session": (everybody, bytes([1]) * 32, 1, task),
        "attempt": (everybody, bytes(32), 2, task),
        "model": (everybody, bytes(32), 1, bytes(32)),
        "cohort": (protocol.Cohort(config, (0, 1, 2, 3, 4)), bytes(32), 1, task),
        "length": (make(6, 65, fewest=4).config(0).shared.everybody, bytes(32), 1, task),
        "ring": (make(6, 64, 16, fewest=4).config(0).shared.everybody, bytes(32), 1, task),
    }
    honest = protocol.context_hash(everybody, bytes(32), 1, task)
    for part, arguments in others.items():
        need(protocol.context_hash(*arguments) != honest, f"the context does not bind the {part}")


def only_signed_keys_count(make, task) -> None:
    fed = make(5, fewest=4)
    impostor = Impostor(fed.config(0).shared, (1, 2, 3, 4))
    with refused(110, "keys that no pinned hospital signed are taken"):
        fed.parties[0].accept([fed.parties[0].offer(), *impostor.offers.values()])


def too_few_shares_open_nothing(make, task) -> None:
    """Whoever releases fast beside a certificate, with c colluders, holds fewer than t shares; t - 1 give another secret."""
    for hospitals, colluders in ((5, 1), (7, 2), (10, 2), (20, 4), (100, 33)):
        found = protocol.derive_thresholds(hospitals, colluders, colluders + 2)
        need(
            found.survivors + found.shares > hospitals + colluders, f"{found.shares} shares of {hospitals} are too few"
        )
    fed = five(make)
    tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
    tap.read_memory(4)
    for owner in range(4):
        share = tap.shares[owner][4]
        need(commitment_of(tap.contexts[owner], owner, share) != tap.commitments[owner], "a share is the secret itself")


def nothing_sent_opens_ones_own_mask(make, task) -> None:
    """Neither the self mask, nor the share at one's own point, nor a root or private key is in any byte that leaves."""
    for ask in (lambda tap: tap.ask_fast(range(5)), lambda tap: tap.ask_slow((0, 1, 2, 3))):
        fed = make(5, fewest=4)
        spy, sent = Spy(fed.parties[0]), [fed.parties[0].offer()]
        fed.set_up()
        tap = open_all(fed, 1, task)
        sent.append(fed.parties[0].mask(fed.vectors()[0]).payload)
        for position in (1, 2, 3, 4):
            tap.hear_upload(position, fed.parties[position].mask(fed.vectors()[position]))
        tap.boxes[0] = dict.fromkeys(range(1, 5), bytes(48))
        tap.hear_release = lambda position, payload, sent=sent: sent.append(payload) if position == 0 else None
        ask(tap)
        entropy = spy.drawn["secagg/self mask"]
        own = {"self mask": entropy[:32], "private key": spy.drawn["secagg/offer"][:32]}
        own["own share"] = shamir.split(entropy[:32], 3, range(5), entropy[32:])[0]
        for peer, root in fed.parties[0]._state.roots.items():
            own[f"root with {peer}"] = root
        for name, secret in own.items():
            need(not any(secret in message for message in sent), f"{name} leaves the hospital")


def one_kind_a_peer(make, task) -> None:
    """Whatever boxes come with a request: never a share and a seed of one hospital."""
    for senders in ((1, 2, 3), (1, 2, 3, 4), (1, 2, 4)):
        fed = five(make)
        tap, survivors = open_all(fed, 1, task).hear_uploads(fed.vectors()), (0, 1, 2, 3)
        votes, told = tap.ask_votes(survivors), []
        with contextlib.suppress(MedfedError):
            told = hostile.entries(fed.parties[0].release(survivors, votes, tap.boxes_for(0, senders)))
        peers = [peer for peer, _, _ in told]
        need(len(set(peers)) == len(peers), "a share and a seed of one hospital")
        need((4, Secret.SHARE) not in {(peer, kind) for peer, kind, _ in told}, "a share of one who dropped out")


def certificate_needs_m_votes_on_one_set(make, task) -> None:
    fed = five(make)
    tap, survivors = open_all(fed, 1, task).hear_uploads(fed.vectors()), (0, 1, 2, 3)
    votes, boxes = tap.ask_votes(survivors), tap.boxes_for(0, survivors)
    with refused(186, "fewer than m votes are a certificate"):
        fed.parties[0].release(survivors, votes[:3], boxes)
    fed = five(make)
    tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
    votes = [*tap.ask_votes(survivors, (0, 1, 2)), (3, fed.parties[3].vote((1, 2, 3, 4)))]
    with refused(186, "a vote on another set counts"):
        fed.parties[0].release(survivors, votes, tap.boxes_for(0, survivors))


def restart_makes_new_keys(make, task) -> None:
    fed = five(make)
    restarted = fed.new_party(0, salt="restarted")
    need(restarted.offer() != fed.parties[0].offer(), "a restarted hospital offers its old key")
    with refused(174, "a restarted hospital goes on with the old session"):
        restarted.accept(fed.aggregator.offers())


def no_pad_masks_two_vectors(make, task) -> None:
    """Two attempts, two sessions, two peers: no words are masked by pads that cancel. The self mask is left out of the count."""
    fed = five(make, 4000)
    taps = []
    for attempt in (1, 2):
        taps.append(open_all(fed, attempt, task).hear_uploads(fed.vectors(attempt)))
        taps[-1].read_memory(0)
        for each in fed.parties:
            each.close_round()
    for tap in taps:
        need(len(set(tap.seeds.values())) == len(tap.seeds), "two peers have one pad")
    streams = [{stream_key(seed, tap.contexts[0]) for seed in tap.seeds.values()} for tap in taps]
    need(not streams[0] & streams[1], "two attempts have one pad")
    for one, two in zip(*(tap.words.values() for tap in taps), strict=True):
        need((one - two == fed.vectors(1)[0] - fed.vectors(2)[0]).mean() < 0.01, "two attempts differ by their vectors")


def repeats_are_identical_bytes(make, task) -> None:
    """Offer, vote, release; and a request that is not the same is no way to other bytes."""
    fed = five(make)
    need(fed.parties[0].offer() == fed.parties[0].offer(), "an offer sent again has other bytes")
    tap, survivors = open_all(fed, 1, task).hear_uploads(fed.vectors()), (0, 1, 2, 3)
    with refused(104, "an attempt's vector is masked again"):
        fed.parties[0].mask(fed.vectors(1)[0])
    votes, boxes = tap.ask_votes(survivors), tap.boxes_for(0, survivors)
    need(votes == tap.ask_votes(survivors), "a vote sent again has other bytes")
    first = fed.parties[0].release(survivors, votes, boxes)
    again = {fed.parties[0].release(survivors, votes, boxes)}
    with contextlib.suppress(MedfedError):
        again.add(fed.parties[0].release(survivors, votes, [(sender, bytes(48)) for sender, _ in boxes]))
    need(again == {first}, "a release sent again has other bytes")


def numbers_saturate_and_the_sum_never_wraps(make, task) -> None:
    """Five hospitals with numbers far out of range, all of one sign: the sum is five times the largest number."""
    for ring_bits, sign in itertools.product((16, 32), (-1.0, 1.0)):
        fed, limit = five(make, 4, ring_bits), quantize.limit(ring_bits, 5)
        exponent = quantize.grid_exponent(ring_bits, 5, 8.0)
        huge = sign * np.array([8.0, 9.0, 1e6, 1e300])
        fed.open_round(1)
        fed.upload([quantize.quantize(huge.copy(), exponent, limit) for _ in range(5)])
        fed.open_sum()
        total = fed.signed(fed.aggregator.total())
        need((np.sign(total) == sign).all(), "a sum has wrapped around")
        need(total[2:].tolist() == [sign * 5 * limit] * 2, "numbers out of range do not saturate")


def only_finite_numbers_pass(make, task) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        vector = np.array([1.0, bad, 0.0])
        with refused(184, f"{bad} is rounded to an integer"):
            quantize.quantize(vector, 10, 1000)
        fed = make(4, 3).set_up()
        fed.open_round(1)
        with refused(184, f"{bad} is masked"):
            fed.parties[0].mask(vector)


CHECKS = [
    upload_is_the_designs_formula,
    sum_is_exact_or_there_is_none,
    seeds_have_256_bits,
    uploads_look_like_noise,
    context_binds_every_part,
    only_signed_keys_count,
    too_few_shares_open_nothing,
    nothing_sent_opens_ones_own_mask,
    one_kind_a_peer,
    certificate_needs_m_votes_on_one_set,
    restart_makes_new_keys,
    no_pad_masks_two_vectors,
    repeats_are_identical_bytes,
    numbers_saturate_and_the_sum_never_wraps,
    only_finite_numbers_pass,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_production_keeps_the_promise(check, federation, task) -> None:
    check(federation, task)


# ------------------------------------------------------------------------------------------------------------------- bugs


def masks_with(pad: Callable[[bytes, int, int], NDArray[np.int64]], sign: Callable[[int], int] = int) -> Plant:
    """Hospitals and coordinator mask with another pad, or with other signs."""

    def add_pads(self, words, streams, signs) -> None:
        total = words.astype(np.int64)
        for stream, each in zip(streams, signs, strict=True):
            total += sign(each) * pad(stream, words.size, words.itemsize * 8)
        np.copyto(words, total, casting="unsafe")

    def mask_into(self, masked, vector, streams, signs) -> None:
        np.copyto(masked, vector, casting="unsafe")
        add_pads(self, masked, streams, signs)

    return both(instead(masks.Masker, "mask_into", mask_into), instead(masks.Masker, "add_pads", add_pads))


def pad_from_counter_1(stream: bytes, words: int, ring_bits: int) -> NDArray[np.int64]:
    encryptor = Cipher(algorithms.AES(stream[:32]), modes.CTR(stream[32:] + (1).to_bytes(4, "big"))).encryptor()
    return np.frombuffer(encryptor.update(bytes(words * ring_bits // 8)), f"<u{ring_bits // 8}").astype(np.int64)


def big_endian_pad(stream: bytes, words: int, ring_bits: int) -> NDArray[np.int64]:
    return pad_of(stream, words, ring_bits).astype(f"<u{ring_bits // 8}").byteswap().astype(np.int64)


def biased_pad(stream: bytes, words: int, ring_bits: int) -> NDArray[np.int64]:
    """One word in 16 lacks its top bit."""
    pad = pad_of(stream, words, ring_bits)
    pad[::16] &= (1 << (ring_bits - 1)) - 1
    return pad


def no_pad(stream: bytes, words: int, ring_bits: int) -> NDArray[np.int64]:
    return np.zeros(words, np.int64)


def context_with(old: str, new: str) -> Plant:
    return Change(protocol, "context_hash", old, new, (party,))


def keeps_its_keys(patch: pytest.MonkeyPatch) -> None:
    """A hospital that stores what it draws for its keys, and finds it again when it is started."""
    stored: dict[int, bytes] = {}
    begin = party._begin

    def begin_again(state, entropy):
        return begin(state, stored.setdefault(state.config.position, entropy))

    patch.setattr(party, "_begin", begin_again)


def releases_its_own_share(patch: pytest.MonkeyPatch) -> None:
    """In the place of the first peer's."""
    kept: dict[bytes, bytes] = {}
    split, body = shamir.split, release.body

    def split_for_all(secret, threshold, positions, coefficients):
        everybody = range(len(positions) + 1)
        own = next(iter(set(everybody) - set(positions)))
        kept[own] = split(secret, threshold, everybody, coefficients)[own]
        return split(secret, threshold, positions, coefficients)

    def body_with_own(cohort, position, *rest):
        honest = body(cohort, position, *rest)
        return honest[:3] + kept[position] + honest[35:]

    patch.setattr(shamir, "split", split_for_all)
    patch.setattr(release, "body", body_with_own)


Check = Callable[..., None]
M_VOTES = "len(voters) < cohort.thresholds.survivors"
WORDS, BITS = "be64(cohort.config.words)", "bytes([cohort.config.ring_bits])"
REPEATED = "if state.phase is PartyPhase.RELEASED:"

BUGS: dict[str, tuple[Check, Plant]] = {
    "32-bit seed: private key": (
        seeds_have_256_bits,
        Change(party, "_begin", "= entropy[:KEY_BYTES],", "= entropy[:4].ljust(KEY_BYTES, b'0'),"),
    ),
    "32-bit seed: self mask": (
        seeds_have_256_bits,
        Change(party, "_mask", "= entropy[:SHARE_BYTES]", "= entropy[:4].ljust(SHARE_BYTES, b'0')"),
    ),
    "32-bit seed: stream": (
        seeds_have_256_bits,
        Change(keys, "stream_key", "_hkdf(seed,", "_hkdf(seed[:4],", (party,)),
    ),
    "32-bit seed: leaf": (
        seeds_have_256_bits,
        Change(keys, "leaf_seed", ", 32)", ", 4).ljust(32, b'0')", (party, release, sys.modules[__name__])),
    ),
    "biased words": (uploads_look_like_noise, masks_with(biased_pad)),
    "no pads": (uploads_look_like_noise, masks_with(no_pad)),
    "ctx without T": (context_binds_every_part, context_with("transcript, ", "")),
    "ctx without r": (context_binds_every_part, context_with("be64(attempt), ", "")),
    "ctx without model": (context_binds_every_part, context_with("members, task, *", "members, *")),
    "ctx without cohort": (context_binds_every_part, context_with("members, ", "")),
    "ctx without D": (context_binds_every_part, context_with(f"{WORDS}, {BITS}", f"({BITS},)")),
    "ctx without k": (context_binds_every_part, context_with(f"{WORDS}, {BITS}", f"({WORDS},)")),
    "sign flipped": (
        upload_is_the_designs_formula,
        Change(party, "_mask", "1 if config.position < peer else -1", "-1 if config.position < peer else 1"),
    ),
    "sign forgotten": (sum_is_exact_or_there_is_none, masks_with(pad_of, abs)),
    "sign flipped in the recovery": (
        sum_is_exact_or_there_is_none,
        Change(recovery, "pads_left", "-1 if survivor < peer else 1", "1 if survivor < peer else -1"),
    ),
    "counter from 1": (upload_is_the_designs_formula, masks_with(pad_from_counter_1)),
    "big-endian words": (upload_is_the_designs_formula, masks_with(big_endian_pad)),
    "unsigned keys": (only_signed_keys_count, instead(keys, "verify", hostile.nothing)),
    "t=1": (
        too_few_shares_open_nothing,
        Change(protocol, "derive_thresholds", "Thresholds(survivors, survivors - 1)", "Thresholds(survivors, 1)"),
    ),
    "t=1 in the sharing": (
        too_few_shares_open_nothing,
        instead(shamir, "split", lambda secret, threshold, positions, coefficients: (secret,) * len(positions)),
    ),
    "own share released": (nothing_sent_opens_ones_own_mask, releases_its_own_share),
    "own mask for its commitment": (
        nothing_sent_opens_ones_own_mask,
        instead(party, "commitment_of", lambda context, position, self_mask: self_mask),
    ),
    "both kinds released": (one_kind_a_peer, instead(release, "body", hostile.obliging_body)),
    "m-1 votes": (
        certificate_needs_m_votes_on_one_set,
        Change(release, "check_certificate", M_VOTES, f"{M_VOTES} - 1"),
    ),
    "mixed-U2 votes": (
        certificate_needs_m_votes_on_one_set,
        Change(messages, "vote_input", "encode_list(survivors)", "b''", (party, release)),
    ),
    "keys kept after restart": (restart_makes_new_keys, keeps_its_keys),
    "pad reused in the next attempt": (
        no_pad_masks_two_vectors,
        both(
            Change(keys, "leaf_seed", 'enc(label("mask"), context)', 'label("mask")', (party, release, hostile)),
            Change(keys, "stream_key", 'enc(label("stream"), context)', 'label("stream")', (party, recovery)),
            instead(sys.modules[__name__], "stream_key", lambda seed, context: keys.stream_key(seed, b"")),
        ),
    ),
    "pad reused for another peer": (
        no_pad_masks_two_vectors,
        Change(keys, "derive_root", "_hkdf(agreed, info,", "_hkdf(bytes(32), b'',", (party,)),
    ),
    "new bytes on resend": (repeats_are_identical_bytes, Change(party, "_release", REPEATED, "if False:")),
    "overflow wraps": (
        numbers_saturate_and_the_sum_never_wraps,
        Change(quantize, "_round_block", "np.clip(scaled, -bound, bound, out=scaled)", "pass"),
    ),
    "limit for one hospital": (
        numbers_saturate_and_the_sum_never_wraps,
        instead(quantize, "limit", lambda ring_bits, parties: 2 ** (ring_bits - 1) - 1),
    ),
    "NaN passed by the rounding": (
        only_finite_numbers_pass,
        Change(quantize, "_round_block", "if not np.isfinite(values).all():", "if False:"),
    ),
    "NaN passed by the mask": (only_finite_numbers_pass, instead(party, "_check_vector", hostile.nothing)),
    "commit unchecked": (
        sum_is_exact_or_there_is_none,
        Change(recovery, "_self_mask", "== commitment:", "== commitment or True:"),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_planted_bug_is_noticed(bug: str, federation, task, monkeypatch: pytest.MonkeyPatch) -> None:
    check, plant = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises(Noticed):
        check(federation, task)


def test_debit_after_send_is_planted_beside_the_ledger() -> None:
    planted = Path(__file__).parents[2] / "client" / "test_planted_ledger_bugs.py"
    assert '("debit after send", debit_comes_before_use_and_sending' in planted.read_text()
