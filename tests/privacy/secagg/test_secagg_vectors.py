"""Known answers, held against a second implementation written from the design's text alone (sections 3 to 5).

It shares no line with production code: X25519 by the ladder of RFC 7748, HKDF from ``hmac``, AES one block at a time; only
Ed25519 and the AES block come from ``cryptography``. Run this file to write the vectors anew.
"""

import hashlib
import hmac
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from medfed.errors import MedfedError
from medfed.identity import Identity
from medfed.privacy.secagg import keys, protocol
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.masks import Masker, pad_words
from medfed.privacy.secagg.party import Party

VECTORS = Path(__file__).parents[2] / "vectors"
PROVENANCE = (
    "Written by the reference implementation in tests/privacy/secagg/test_secagg_vectors.py, from the text of medfed's "
    "secure aggregation design, sections 3 to 5; bytes are hexadecimal."
)


# ------------------------------------------------------------------------------------------------ the second implementation


def ref_enc(*parts):
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def ref_label(text):
    return b"medfed/secagg/v1/" + text


def ref_hash(data):
    return hashlib.sha256(data).digest()


def ref_hkdf(secret, info, size, salt=b"\0" * 32):
    pseudorandom_key = hmac.new(salt, secret, hashlib.sha256).digest()
    out, block, counter = b"", b"", 1
    while len(out) < size:
        block = hmac.new(pseudorandom_key, block + info + bytes([counter]), hashlib.sha256).digest()
        out, counter = out + block, counter + 1
    return out[:size]


def ref_x25519(scalar, point):
    """RFC 7748, section 5."""
    p = 2**255 - 19
    k = (int.from_bytes(scalar, "little") & ~7 & (2**255 - 1)) | 2**254
    x1 = (int.from_bytes(point, "little") & (2**255 - 1)) % p
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a % p, c * b % p, a * a % p, b * b % p
        x3, z3 = (da + cb) ** 2 % p, x1 * (da - cb) ** 2 % p
        e = aa - bb
        x2, z2 = aa * bb % p, e * (aa + 121665 * e) % p
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def ref_pad(seed, ctx, first, count, bits):
    """Words ``first`` .. of the pad: block b is AES(key, nonce ‖ BE32(b + 2))."""
    stream = ref_hkdf(seed, ref_enc(ref_label(b"stream"), ctx), 44)
    aes = Cipher(algorithms.AES(stream[:32]), modes.ECB()).encryptor()
    size = bits // 8
    begin, end = first * size // 16, -(-(first + count) * size // 16)
    raw = b"".join(aes.update(stream[32:] + struct.pack(">I", block + 2)) for block in range(begin, end))
    skip = first * size - begin * 16
    return [int.from_bytes(raw[skip + i * size : skip + (i + 1) * size], "little") for i in range(count)]


def ref_offer(case, i):
    public = ref_x25519(bytes.fromhex(case["private"][i]), struct.pack("<B31x", 9))
    nonce = bytes.fromhex(case["nonces"][i])
    hashes = bytes.fromhex(case["config_hash"]), bytes.fromhex(case["roster_hash"])
    return ref_enc(ref_label(b"setup"), *hashes, struct.pack(">H", i), nonce, public)


def ref_schedule(case):
    """Everything of sections 3 and 4 for one case: T, ctx, roots and leaf seeds by pair."""
    n, bits = len(case["private"]), case["ring_bits"]
    offers = [ref_offer(case, i) for i in range(n)]
    hashes = bytes.fromhex(case["config_hash"]), bytes.fromhex(case["roster_hash"])
    transcript = ref_hash(ref_enc(ref_label(b"transcript"), *hashes, *offers))
    cohort = ref_hash(ref_enc(ref_label(b"cohort"), struct.pack(f">{n}H", *range(n))))
    task = ref_hash(ref_enc(ref_label(b"task"), bytes.fromhex(case["model"]), bytes.fromhex(case["settings"])))
    attempt, words = struct.pack(">Q", case["attempt"]), struct.pack(">Q", len(case["vectors"][0]))
    ctx = ref_hash(ref_enc(ref_label(b"ctx"), transcript, attempt, cohort, task, words, bytes([bits])))
    roots = {}
    for i in range(n):
        for j in range(i + 1, n):
            agreed = ref_x25519(bytes.fromhex(case["private"][i]), offers[j][-32:])
            info = ref_enc(ref_label(b"root"), struct.pack(">H", i), struct.pack(">H", j))
            roots[i, j] = ref_hkdf(agreed, info, 32, salt=transcript)
    leaves = {pair: ref_hkdf(root, ref_enc(ref_label(b"mask"), ctx), 32) for pair, root in roots.items()}
    return offers, transcript, cohort, task, ctx, roots, leaves


def ref_upload(case, i, schedule):
    _, transcript, _, _, ctx, _, leaves = schedule
    n, bits, words = len(case["private"]), case["ring_bits"], list(case["vectors"][i])
    for j in range(n):
        if j != i:
            pad = ref_pad(leaves[min(i, j), max(i, j)], ctx, 0, len(words), bits)
            words = [(w + (p if j > i else -p)) % 2**bits for w, p in zip(words, pad, strict=True)]
    body = struct.pack("<" + {16: "H", 32: "I"}[bits] * len(words), *(w % 2**bits for w in words))
    head = struct.pack(">B32sQHBQ", 1, transcript, case["attempt"], i, bits, len(words))
    signed = ref_enc(ref_label(b"upload"), ctx, struct.pack(">H", i), ref_hash(body), ref_hash(b""), b"")
    return head + body + ref_sign(case, i, signed)


def ref_sign(case, i, data):
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(case["identity_seeds"][i])).sign(data)


def ref_decode_upload(case, i, payload, schedule):
    """Check header and signature, take the masks off by the other hospitals' seeds: the plain vector."""
    _, transcript, _, _, ctx, _, leaves = schedule
    bits, size = case["ring_bits"], case["ring_bits"] // 8
    version, t, r, position, k, d = struct.unpack(">B32sQHBQ", payload[:52])
    assert (version, t, r, position, k) == (1, transcript, case["attempt"], i, bits)
    body, signature = payload[52 : 52 + d * size], payload[52 + d * size :]
    identity = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(case["identity_seeds"][i])).public_key()
    assert isinstance(identity, Ed25519PublicKey)
    signed = ref_enc(ref_label(b"upload"), ctx, struct.pack(">H", i), ref_hash(body), ref_hash(b""), b"")
    identity.verify(signature, signed)
    words = [int.from_bytes(body[w * size : (w + 1) * size], "little") for w in range(d)]
    for j in range(len(case["private"])):
        if j != i:
            pad = ref_pad(leaves[min(i, j), max(i, j)], ctx, 0, d, bits)
            words = [(w - (p if j > i else -p)) % 2**bits for w, p in zip(words, pad, strict=True)]
    return [w - 2**bits if w >= 2 ** (bits - 1) else w for w in words]


# ---------------------------------------------------------------------------------------------------------- the vectors' use


def load(name):
    return json.loads((VECTORS / name).read_text())["cases"]


class GivenEntropy:
    """Hands out the private key and nonce of a case."""

    def __init__(self, data):
        self.data = data

    def draw(self, purpose, size_bytes):
        assert purpose == "secagg/offer"
        assert size_bytes == len(self.data)
        return self.data


def config_of(case, position):
    identities = tuple(Identity.from_seed(bytes.fromhex(seed)).public for seed in case["identity_seeds"])
    hashes = bytes.fromhex(case["config_hash"]), bytes.fromhex(case["roster_hash"])
    return protocol.SecaggConfig(*hashes, position, identities, 1, len(case["vectors"][0]), case["ring_bits"])


def parties_of(case):
    parties = []
    for i, seed in enumerate(case["identity_seeds"]):
        entropy = GivenEntropy(bytes.fromhex(case["private"][i] + case["nonces"][i]))
        parties.append(Party(config_of(case, i), Identity.from_seed(bytes.fromhex(seed)).sign, entropy))
    return parties


def task_of(case):
    return bytes.fromhex(case["task_hash"])


def ready_parties(case):
    parties = parties_of(case)
    for party in parties:
        party.offer()
        party.accept([bytes.fromhex(offer) for offer in case["offers"]])
    return parties


@pytest.mark.parametrize("case", load("secagg_rounds.json"), ids=lambda case: case["name"])
def test_party_known_inputs_gives_offers_and_uploads_byte_for_byte(case):
    parties = parties_of(case)
    assert [party.offer().hex() for party in parties] == case["offers"]
    for party, vector, upload in zip(ready_parties(case), case["vectors"], case["uploads"], strict=True):
        assert party.transcript.hex() == case["transcript"]
        party.open_round(case["attempt"], task_of(case))
        masked = party.mask(np.array(vector, dtype=np.int64))
        assert masked.pad_id.hex() == case["ctx"]
        assert masked.payload.hex() == upload


@pytest.mark.parametrize("case", load("secagg_rounds.json"), ids=lambda case: case["name"])
def test_aggregator_known_uploads_gives_known_sum(case):
    aggregator = Aggregator.from_offers(config_of(case, 0).shared, [bytes.fromhex(offer) for offer in case["offers"]])
    aggregator.open_round(case["attempt"], task_of(case))
    for upload in case["uploads"]:
        aggregator.add_upload(bytes.fromhex(upload))
    assert aggregator.total().view(f"<i{case['ring_bits'] // 8}").tolist() == case["sum"]


@pytest.mark.parametrize("case", load("secagg_rounds.json"), ids=lambda case: case["name"])
def test_reference_decoder_reads_production_uploads_with_all_seeds(case):
    schedule = ref_schedule(case)
    for i, party in enumerate(ready_parties(case)):
        party.open_round(case["attempt"], task_of(case))
        payload = party.mask(np.array(case["vectors"][i], dtype=np.int64)).payload
        wrapped = np.array(case["vectors"][i]).astype(f"<i{case['ring_bits'] // 8}")
        assert ref_decode_upload(case, i, payload, schedule) == wrapped.tolist()


@pytest.mark.parametrize("case", load("secagg_rounds.json"), ids=lambda case: case["name"])
def test_key_schedule_every_row_equals_vector(case):
    shared = config_of(case, 0).shared
    bodies = [bytes.fromhex(offer)[:-64] for offer in case["offers"]]
    transcript = protocol.transcript_hash(shared, bodies)
    context = protocol.context_hash(shared, transcript, case["attempt"], task_of(case))
    assert (transcript.hex(), context.hex()) == (case["transcript"], case["ctx"])
    for row in case["pairs"]:
        i, j = row["pair"]
        for own, peer in ((i, j), (j, i)):
            root = keys.derive_root(bytes.fromhex(case["private"][own]), bodies[peer][-32:], transcript, own, peer)
            assert root.hex() == row["root"]
        leaf = keys.leaf_seed(bytes.fromhex(row["root"]), context)
        assert leaf.hex() == row["leaf"]
        assert keys.stream_key(leaf, context).hex() == row["stream"]
        assert keys.share_key(bytes.fromhex(row["root"]), context, i, j).hex() == row["share_forth"]
        assert keys.share_key(bytes.fromhex(row["root"]), context, j, i).hex() == row["share_back"]


def test_vector_files_equal_what_the_reference_writes():
    rounds = [make_round(*arguments) for arguments in ROUNDS]
    assert rounds == load("secagg_rounds.json")
    assert make_pads() == load("secagg_pads.json")
    assert make_bad(rounds[0]) == load("bad_secagg_strict.json")


@pytest.mark.parametrize("case", load("secagg_pads.json"), ids=lambda case: f"{case['ring_bits']}-{case['first']}")
def test_pad_known_seed_equals_vector_by_both_backends(case):
    stream = keys.stream_key(bytes.fromhex(case["seed"]), bytes.fromhex(case["ctx"]))
    first, want, bits = case["first"], [int(word, 16) for word in case["words"]], case["ring_bits"]
    assert pad_words(stream, first, len(want), bits).tolist() == want
    masked = protocol.view_words(bytearray((first + len(want)) * bits // 8), bits)
    Masker(bits).mask_into(masked, np.zeros(masked.size, dtype=np.int64), [stream], [1])
    assert masked[first:].tolist() == want


def test_pad_design_known_answer_holds():
    stream = keys.stream_key(bytes(range(32)), bytes(32))
    assert stream.hex() == ("ecec432a428d81a6b37b9cd42bb0826226b64a93e0b4fdd37b4c86206d09fdb1890b1dab21905e00c8593537")
    assert pad_words(stream, 0, 4, 32).tolist() == [0x240E7341, 0xC26482C0, 0x6DA7940A, 0x6484900D]
    assert pad_words(stream, 0, 4, 16).tolist() == [0x7341, 0x240E, 0x82C0, 0xC264]


def test_x25519_rfc7748_known_answer_holds():
    """Section 5.2, first vector: the reference ladder itself is right."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert ref_x25519(scalar, point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"


@pytest.mark.parametrize("case", load("bad_secagg_strict.json"), ids=lambda case: case["name"])
def test_bad_vector_is_refused_with_its_code_and_state_stays(case):
    good = next(round_ for round_ in load("secagg_rounds.json") if round_["name"] == case["base"])
    data = [bytes.fromhex(item) for item in case["data"]]
    if case["to"] == "party":
        subject = parties_of(good)[0]
        subject.offer()
        call = subject.accept
    elif case["to"] == "round":
        subject = ready_parties(good)[0]
        subject.open_round(good["attempt"], task_of(good))
        subject.close_round()
        call = lambda _: subject.open_round(good["attempt"], task_of(good))  # noqa: E731
    else:
        subject = Aggregator.from_offers(config_of(good, 0).shared, [bytes.fromhex(offer) for offer in good["offers"]])
        subject.open_round(good["attempt"], task_of(good))
        call = lambda items: [subject.add_upload(item) for item in items]  # noqa: E731
    phase = subject.phase
    with pytest.raises(MedfedError) as refusal:
        call(data)
    assert refusal.value.code == case["error"]
    assert subject.phase is phase
    _go_on(subject, good)


def _go_on(subject, good):
    """After the refusal the honest course still works."""
    if isinstance(subject, Aggregator):
        for upload in good["uploads"]:
            subject.add_upload(bytes.fromhex(upload))
        assert subject.total().view(f"<i{good['ring_bits'] // 8}").tolist() == good["sum"]
    elif subject.phase is subject.phase.OFFERED:
        subject.accept([bytes.fromhex(offer) for offer in good["offers"]])
        assert subject.transcript.hex() == good["transcript"]
    else:
        subject.open_round(good["attempt"] + 1, task_of(good))


# --------------------------------------------------------------------------------------------------------- writing them anew


def write(name, cases):
    text = json.dumps({"provenance": PROVENANCE, "cases": cases}, indent=1)
    (VECTORS / name).write_text(text + "\n")


def seeded(name, size=32):
    return hashlib.shake_256(b"medfed test vector " + name.encode()).digest(size)


def make_round(name, n, words, bits, attempt):
    rng = np.random.default_rng(n * 1000 + words)
    bound = 2 ** (bits - 1) // n
    case = {
        "name": name,
        "ring_bits": bits,
        "attempt": attempt,
        "config_hash": seeded("config").hex(),
        "roster_hash": seeded("roster").hex(),
        "model": b"model".hex(),
        "settings": b"settings".hex(),
        "identity_seeds": [seeded(f"{name} identity {i}").hex() for i in range(n)],
        "private": [seeded(f"{name} private {i}").hex() for i in range(n)],
        "nonces": [seeded(f"{name} nonce {i}").hex() for i in range(n)],
        "vectors": [rng.integers(-bound, bound, words).tolist() for _ in range(n)],
    }
    schedule = offers, transcript, cohort, task, ctx, roots, leaves = ref_schedule(case)
    case["offers"] = [(offer + ref_sign(case, i, offer)).hex() for i, offer in enumerate(offers)]
    case |= {"transcript": transcript.hex(), "cohort_hash": cohort.hex(), "task_hash": task.hex(), "ctx": ctx.hex()}
    case["pairs"] = []
    for (i, j), root in roots.items():
        forth, back = struct.pack(">H", i), struct.pack(">H", j)
        case["pairs"].append(
            {
                "pair": [i, j],
                "root": root.hex(),
                "leaf": leaves[i, j].hex(),
                "stream": ref_hkdf(leaves[i, j], ref_enc(ref_label(b"stream"), ctx), 44).hex(),
                "share_forth": ref_hkdf(root, ref_enc(ref_label(b"share"), ctx, forth, back), 32).hex(),
                "share_back": ref_hkdf(root, ref_enc(ref_label(b"share"), ctx, back, forth), 32).hex(),
            }
        )
    case["uploads"] = [ref_upload(case, i, schedule).hex() for i in range(n)]
    case["sum"] = np.sum(case["vectors"], axis=0).tolist()
    return case


def make_pads():
    edge = 256 << 10
    cases = []
    for bits in (16, 32):
        for at in (0, 3, edge // (bits // 8) - 4, 2 * edge // (bits // 8) - 5):
            seed, ctx = seeded("pad seed"), seeded("pad ctx")
            words = [f"{word:x}" for word in ref_pad(seed, ctx, at, 9, bits)]
            cases.append({"seed": seed.hex(), "ctx": ctx.hex(), "ring_bits": bits, "first": at, "words": words})
    return cases


def make_bad(good):
    offers = [bytes.fromhex(offer) for offer in good["offers"]]
    uploads = [bytes.fromhex(upload) for upload in good["uploads"]]
    cases = []

    def bad(name, to, error, *data):
        data = [item.hex() for item in data]
        cases.append({"name": f"bad_{name}", "base": good["name"], "to": to, "error": error, "data": data})

    def resigned(i, body, signer=None):
        return body + ref_sign(good, i if signer is None else signer, body)

    def flip(data, at):
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    body = offers[1][:-64]
    zero, one = body[:-32] + bytes(32), body[:-32] + (1).to_bytes(32, "little")
    copy = body[:-32] + offers[2][-96:-64]
    spelled = copy[:-1] + bytes([copy[-1] ^ 0x80])  # the same point, top bit set
    bad("signature", "party", 110, offers[0], flip(offers[1], len(body)), offers[2])
    bad("signer", "party", 110, offers[0], resigned(1, body, signer=2), offers[2])
    position = len(ref_enc(ref_label(b"setup"), bytes(32), bytes(32))) + 5
    bad("roster", "party", 111, offers[0], resigned(1, body[:position] + b"\x09" + body[position + 1 :]), offers[2])
    bad("zero_key", "party", 170, offers[0], resigned(1, zero), offers[2])
    bad("small_order_key", "party", 170, offers[0], resigned(1, one), offers[2])
    bad("duplicate_key", "party", 170, offers[0], resigned(1, copy), offers[2])
    bad("duplicate_key_other_spelling", "party", 170, offers[0], resigned(1, spelled), offers[2])
    other = flip(offers[0][:-64], len(body) - 50)
    bad("own_offer", "party", 174, resigned(0, other), *offers[1:])
    bad("study", "party", 112, offers[0], resigned(1, flip(body, 40)), offers[2])
    bad("offer_twice", "party", 143, offers[0], offers[1], offers[1])
    bad("offer_missing", "party", 140, offers[0], offers[1])
    bad("offer_length", "party", 103, offers[0], offers[1][:-1], offers[2])
    bad("offer_layout", "party", 103, offers[0], resigned(1, flip(body, 3)), offers[2])
    bad("round_reused", "round", 181)

    # an upload for another model, or with its pad tied to anything else, is signed over another ctx
    schedule = list(ref_schedule(good))
    schedule[4] = ref_hash(b"ctx of another model")
    bad("model", "aggregator", 110, ref_upload(good, 0, schedule))
    bad("upload_signature", "aggregator", 110, flip(uploads[0], len(uploads[0]) - 1))
    bad("upload_words", "aggregator", 110, flip(uploads[0], 60))
    bad("upload_of_other", "aggregator", 110, flip(uploads[0], 42))
    bad("upload_position", "aggregator", 111, uploads[0][:41] + b"\x01" + uploads[0][42:])
    bad("length", "aggregator", 180, uploads[0][:-1])
    bad("length_longer", "aggregator", 180, uploads[0] + b"\0")
    bad("empty", "aggregator", 180, b"")
    bad("bits", "aggregator", 180, uploads[0][:43] + b"\x10" + uploads[0][44:])
    bad("words", "aggregator", 180, flip(uploads[0], 51))
    bad("version", "aggregator", 102, b"\x02" + uploads[0][1:])
    bad("session", "aggregator", 182, flip(uploads[0], 1))
    bad("attempt", "aggregator", 182, flip(uploads[0], 40))
    return cases


ROUNDS = (
    ("ok_strict_3_hospitals_32_bits", 3, 7, 32, 1),
    ("ok_strict_5_hospitals_16_bits", 5, 9, 16, 2**40 + 3),
)

if __name__ == "__main__":
    rounds = [make_round(*arguments) for arguments in ROUNDS]
    write("secagg_rounds.json", rounds)
    write("secagg_pads.json", make_pads())
    write("bad_secagg_strict.json", make_bad(rounds[0]))
