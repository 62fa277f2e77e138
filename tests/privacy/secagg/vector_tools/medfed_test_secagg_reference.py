"""A second implementation of secure aggregation, written from the design's text alone (sections 3 to 7), to make vectors with.

It shares no line with production code: X25519 by the ladder of RFC 7748, HKDF from ``hmac``, products in GF(256) bit by bit, GCM
from its text (NIST SP 800-38D); only Ed25519 and the AES block come from ``cryptography``. A *case* is one attempt as it
stands in ``secagg_rounds.json``.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

# ------------------------------------------------------------------------------------------------------------ what it is made of


def enc(*parts):
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def label(text):
    return b"medfed/secagg/v1/" + text


def sha(data):
    return hashlib.sha256(data).digest()


def be16(*numbers):
    return struct.pack(f">{len(numbers)}H", *numbers)


def hkdf(secret, info, size, salt=b"\0" * 32):
    pseudorandom_key = hmac.new(salt, secret, hashlib.sha256).digest()
    out, block, counter = b"", b"", 1
    while len(out) < size:
        block = hmac.new(pseudorandom_key, block + info + bytes([counter]), hashlib.sha256).digest()
        out, counter = out + block, counter + 1
    return out[:size]


X25519_BASE = struct.pack("<B31x", 9)


def x25519(scalar, point=X25519_BASE):
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


def aes_blocks(key, *blocks):
    return b"".join(map(Cipher(algorithms.AES(key), modes.ECB()).encryptor().update, blocks))


def seal(key, plaintext, associated):
    """AES-256-GCM with a nonce of 12 zero bytes: ciphertext and tag."""
    counters = [bytes(12) + struct.pack(">I", 2 + block) for block in range(-(-len(plaintext) // 16))]
    stream = aes_blocks(key, *counters)[: len(plaintext)]
    ciphertext = bytes(a ^ b for a, b in zip(plaintext, stream, strict=True))
    hash_key, ghash = int.from_bytes(aes_blocks(key, bytes(16)), "big"), 0
    lengths = struct.pack(">QQ", 8 * len(associated), 8 * len(ciphertext))
    for data in (associated, ciphertext, lengths):
        for start in range(0, len(data), 16):
            ghash = _gcm_product(ghash ^ int.from_bytes(data[start : start + 16].ljust(16, b"\0"), "big"), hash_key)
    mask = aes_blocks(key, bytes(12) + struct.pack(">I", 1))
    return ciphertext + (ghash ^ int.from_bytes(mask, "big")).to_bytes(16, "big")


def _gcm_product(x, y):
    z = 0
    for bit in reversed(range(128)):
        z ^= y * (x >> bit & 1)
        y = (y >> 1) ^ (0xE1 << 120) * (y & 1)
    return z


def product(a, b):
    """In GF(256) modulo x^8 + x^4 + x^3 + x + 1."""
    result = 0
    while b:
        result ^= a * (b & 1)
        a, b = (a << 1) ^ (0x11B if a & 0x80 else 0), b >> 1
    return result


def share(secret, coefficients, position):
    """Value of the 32 polynomials at position + 1."""
    terms = [secret] + [coefficients[start : start + 32] for start in range(0, len(coefficients), 32)]
    value = bytes(32)
    for term in reversed(terms):
        value = bytes(product(old, position + 1) ^ new for old, new in zip(value, term, strict=True))
    return value


# --------------------------------------------------------------------------------------------------------------- keys of a case


def at(case, key, position):
    """The bytes that a list in the order of members has for a position."""
    return bytes.fromhex(case[key][case["members"].index(position)])


def sign(case, position, data):
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(case["identity_seeds"][position])).sign(data)


def offer_body(case, i):
    hashes = bytes.fromhex(case["config_hash"]), bytes.fromhex(case["roster_hash"])
    return enc(label(b"setup"), *hashes, be16(i), at(case, "nonces", i), x25519(at(case, "private", i)))


def thresholds(case):
    """m and t."""
    n, c = len(case["members"]), case["colluders"]
    m = max((n + c + 1) // 2 + 1, case["fewest_survivors"])
    return (n, 0) if m >= n else (m, m - 1)


def stream(seed, ctx):
    return hkdf(seed, enc(label(b"stream"), ctx), 44)


@dataclass
class Keys:
    """Everything of sections 3 and 4 for one case: hashes, roots and leaf seeds by pair of positions, ascending."""

    offers: list[bytes]
    transcript: bytes
    cohort: bytes
    task: bytes
    ctx: bytes
    roots: dict[tuple[int, int], bytes]
    leaves: dict[tuple[int, int], bytes]

    def leaf(self, i, j):
        return self.leaves[min(i, j), max(i, j)]

    def box_key(self, i, j):
        return hkdf(
            self.roots[min(i, j), max(i, j)],
            enc(
                label(b"share"),
                self.ctx,
                be16(
                    i,
                ),
                be16(j),
            ),
            32,
        )


def keys_of(case):
    members, bits = case["members"], case["ring_bits"]
    offers = [offer_body(case, i) for i in members]
    hashes = bytes.fromhex(case["config_hash"]), bytes.fromhex(case["roster_hash"])
    transcript = sha(enc(label(b"transcript"), *hashes, *offers))
    cohort = sha(enc(label(b"cohort"), be16(*members)))
    task = sha(enc(label(b"task"), bytes.fromhex(case["model"]), bytes.fromhex(case["settings"])))
    attempt, words = struct.pack(">Q", case["attempt"]), struct.pack(">Q", len(case["vectors"][0]))
    ctx = sha(enc(label(b"ctx"), transcript, attempt, cohort, task, words, bytes([bits])))
    roots = {}
    for i in members:
        for j in members[members.index(i) + 1 :]:
            agreed = x25519(at(case, "private", i), offers[members.index(j)][-32:])
            roots[i, j] = hkdf(agreed, enc(label(b"root"), be16(i), be16(j)), 32, salt=transcript)
    leaves = {pair: hkdf(root, enc(label(b"mask"), ctx), 32) for pair, root in roots.items()}
    return Keys(offers, transcript, cohort, task, ctx, roots, leaves)


# ------------------------------------------------------------------------------------------------------------------- messages


def pad(seed, ctx, first, count, bits):
    """Words ``first`` .. of the pad: block b is AES(key, nonce ‖ BE32(b + 2))."""
    key_nonce = stream(seed, ctx)
    size = bits // 8
    begin, end = first * size // 16, -(-(first + count) * size // 16)
    raw = aes_blocks(key_nonce[:32], *(key_nonce[32:] + struct.pack(">I", block + 2) for block in range(begin, end)))
    skip = first * size - begin * 16
    return [int.from_bytes(raw[skip + i * size : skip + (i + 1) * size], "little") for i in range(count)]


def pads_of(case, i, keys):
    """(pad, +1 or -1) of everything that hospital i adds to its vector."""
    count, bits = len(case["vectors"][0]), case["ring_bits"]
    for j in case["members"]:
        if j != i:
            yield pad(keys.leaf(i, j), keys.ctx, 0, count, bits), 1 if j > i else -1
    if case["self_masks"]:
        yield pad(at(case, "self_masks", i), keys.ctx, 0, count, bits), 1


def commitment(case, i, ctx):
    return sha(enc(label(b"commit"), ctx, be16(i), at(case, "self_masks", i)))


def box(case, i, j, keys):
    """j's share of i's self mask, and the box it travels in."""
    kept = share(at(case, "self_masks", i), at(case, "coefficients", i), j)
    return kept, seal(keys.box_key(i, j), kept, keys.ctx + be16(i, j))


def tail(case, i, keys):
    """Commitment and boxes, empty in strict mode."""
    if not case["self_masks"]:
        return b"", b""
    boxes = b"".join(be16(j) + box(case, i, j, keys)[1] for j in case["members"] if j != i)
    return commitment(case, i, keys.ctx), boxes


def upload(case, i, keys, vector=None):
    bits, words = case["ring_bits"], list(vector or case["vectors"][case["members"].index(i)])
    for values, sign_of in pads_of(case, i, keys):
        words = [word + sign_of * value for word, value in zip(words, values, strict=True)]
    body = struct.pack("<" + {16: "H", 32: "I"}[bits] * len(words), *(word % 2**bits for word in words))
    head = struct.pack(">B32sQHBQ", 1, keys.transcript, case["attempt"], i, bits, len(words))
    return signed_upload(case, i, keys.ctx, head, body, *tail(case, i, keys))


def signed_upload(case, i, ctx, head, body, committed, boxes):
    signed = enc(label(b"upload"), ctx, be16(i), sha(body), sha(boxes), committed)
    return head + body + committed + boxes + sign(case, i, signed)


def vote(case, i, ctx, survivors=None):
    members = case["survivors"] if survivors is None else survivors
    return sign(case, i, enc(label(b"vote"), ctx, be16(i), be16(*members)))


def release_body(case, i, keys):
    body = b""
    for j in case["members"]:
        if j == i:
            continue
        if j in case["survivors"]:
            body += be16(j) + b"\x01" + box(case, j, i, keys)[0]
        else:
            body += be16(j) + b"\x02" + keys.leaf(i, j)
    return body


def release(case, i, keys, body=None):
    content = release_body(case, i, keys) if body is None else body
    return content + sign(case, i, enc(label(b"release"), keys.ctx, be16(i), sha(content)))


def unmask_upload(case, i, payload, keys):
    """Take all pads off one upload by the other hospitals' seeds: the plain vector."""
    bits, size, count = case["ring_bits"], case["ring_bits"] // 8, len(case["vectors"][0])
    body = payload[52 : 52 + count * size]
    words = [int.from_bytes(body[w * size : (w + 1) * size], "little") for w in range(count)]
    for values, sign_of in pads_of(case, i, keys):
        words = [word - sign_of * value for word, value in zip(words, values, strict=True)]
    return [signed(word, bits) for word in words]


def signed(word, bits):
    """Two's complement."""
    word %= 2**bits
    return word - 2**bits if word >= 2 ** (bits - 1) else word
