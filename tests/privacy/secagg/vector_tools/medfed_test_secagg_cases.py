"""The good cases of the vectors: pads, shares, whole rounds."""

import hashlib

import medfed_test_secagg_reference as ref
import numpy as np

ROUNDS = (
    # name, mode, ring, attempt, words, roster, members, lost
    ("ok_strict_3_hospitals_32_bits", "strict", 32, 1, 7, 3, (0, 1, 2), ()),
    ("ok_strict_5_hospitals_16_bits", "strict", 16, 2**40 + 3, 9, 5, (0, 1, 2, 3, 4), ()),
    ("ok_fast_5_hospitals_32_bits", "fast", 32, 2, 5, 5, (0, 1, 2, 3, 4), ()),
    ("ok_fast_5_of_7_hospitals_16_bits", "fast", 16, 3, 9, 7, (0, 2, 3, 5, 6), ()),
    ("ok_slow_5_of_6_hospitals_32_bits", "slow", 32, 2**33 + 1, 5, 6, (0, 1, 3, 4, 5), (3,)),
    ("ok_slow_5_hospitals_16_bits", "slow", 16, 9, 9, 5, (0, 1, 2, 3, 4), (0,)),
)


def seeded(name, size=32):
    return hashlib.shake_256(b"medfed test vector " + name.encode()).digest(size)


def make_round(name, mode, bits, attempt, words, roster, members, lost):
    n = len(members)
    rng = np.random.default_rng(n * 1000 + words)
    bound = 2 ** (bits - 1) // n
    seeds = [seeded(f"{name} identity {i}") for i in range(roster)]
    case = {
        "name": name,
        "mode": mode,
        "ring_bits": bits,
        "attempt": attempt,
        "colluders": 1,
        "fewest_survivors": n if mode == "strict" else 4,
        "config_hash": seeded("config").hex(),
        "roster_hash": seeded("roster").hex(),
        "model": b"model".hex(),
        "settings": b"settings".hex(),
        "identity_seeds": [seed.hex() for seed in seeds],
        "identities": [
            ref.Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw().hex() for seed in seeds
        ],
        "members": list(members),
        "private": [seeded(f"{name} private {i}").hex() for i in members],
        "nonces": [seeded(f"{name} nonce {i}").hex() for i in members],
        "vectors": [rng.integers(-bound, bound, words).tolist() for _ in members],
        "survivors": [i for i in members if i not in lost],
    }
    case["needed"], case["threshold"] = ref.thresholds(case)
    blocks = case["threshold"] - 1
    strict = mode == "strict"
    case["self_masks"] = [] if strict else [seeded(f"{name} self mask {i}").hex() for i in members]
    case["coefficients"] = [] if strict else [seeded(f"{name} coefficients {i}", blocks * 32).hex() for i in members]
    keys = ref.keys_of(case)
    case["offers"] = [(body + ref.sign(case, i, body)).hex() for i, body in zip(members, keys.offers, strict=True)]
    case |= {"transcript": keys.transcript.hex(), "cohort_hash": keys.cohort.hex()}
    case |= {"task_hash": keys.task.hex(), "ctx": keys.ctx.hex()}
    case["pairs"] = [pair_row(keys, *pair) for pair in keys.roots if pair[0] == members[0]]
    self_masks = [bytes.fromhex(mask) for mask in case["self_masks"]]
    case["self_streams"] = [ref.stream(mask, keys.ctx).hex() for mask in self_masks]
    case["commitments"] = [] if strict else [ref.commitment(case, i, keys.ctx).hex() for i in members]
    case["boxes"] = [] if strict else [box_row(case, members[1], j, keys) for j in members if j != members[1]]
    case["uploads"] = [ref.upload(case, i, keys).hex() for i in members]
    case["votes"] = [ref.vote(case, i, keys.ctx).hex() for i in case["survivors"] if mode == "slow"]
    case["releases"] = [] if strict else [ref.release(case, i, keys).hex() for i in case["survivors"]]
    surviving = [vector for i, vector in zip(members, case["vectors"], strict=True) if i in case["survivors"]]
    case["sum"] = np.sum(surviving, axis=0).tolist()
    return case


def pair_row(keys, i, j):
    return {
        "pair": [i, j],
        "root": keys.roots[i, j].hex(),
        "leaf": keys.leaves[i, j].hex(),
        "stream": ref.stream(keys.leaves[i, j], keys.ctx).hex(),
        "share_forth": keys.box_key(i, j).hex(),
        "share_back": keys.box_key(j, i).hex(),
    }


def box_row(case, i, j, keys):
    kept, closed = ref.box(case, i, j, keys)
    return {"from": i, "to": j, "share": kept.hex(), "box": closed.hex()}


def make_pads():
    edge = 256 << 10
    cases = []
    for bits in (16, 32):
        for at in (0, 3, edge // (bits // 8) - 4, 2 * edge // (bits // 8) - 5):
            seed, ctx = seeded("pad seed"), seeded("pad ctx")
            words = [f"{word:x}" for word in ref.pad(seed, ctx, at, 9, bits)]
            name = f"ok_pad_{bits}_bits_from_{at}"
            case = {"name": name, "seed": seed.hex(), "ctx": ctx.hex(), "ring_bits": bits, "first": at, "words": words}
            cases.append(case)
    return cases


def make_shares():
    cases = []
    for name, threshold, positions in (
        ("ok_shares_2_of_2", 2, (1, 0)),
        ("ok_shares_3_of_4", 3, (0, 2, 3, 6)),
        ("ok_shares_5_of_9_far_apart", 5, (127, 3, 64, 0, 31, 16, 1, 126, 100)),
    ):
        secret, coefficients = seeded(f"{name} secret"), seeded(f"{name} coefficients", (threshold - 1) * 32)
        cases.append(share_case(name, threshold, positions, secret, coefficients))
    # a leading coefficient of zeros is as good as any other
    cases.append(share_case("ok_shares_3_of_5_zeros", 3, range(5), seeded("zeros"), seeded("zeros too") + bytes(32)))
    return cases


def share_case(name, threshold, positions, secret, coefficients):
    return {
        "name": name,
        "threshold": threshold,
        "positions": list(positions),
        "secret": secret.hex(),
        "coefficients": coefficients.hex(),
        "shares": [ref.share(secret, coefficients, position).hex() for position in positions],
    }
