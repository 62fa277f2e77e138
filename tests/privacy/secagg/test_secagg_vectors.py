"""Known answers, made by a second implementation written from the design's text alone, against production code.

The format stands in docs/secure_aggregation.md; ``vector_tools`` makes the files.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medfed.privacy.secagg import boxes, keys, messages, protocol, shamir
from medfed.privacy.secagg.masks import Masker, pad_words

sys.path.insert(0, str(Path(__file__).parent / "vector_tools"))
import medfed_test_secagg_reference as ref
from medfed_test_secagg_fed import (
    ROUNDS,
    VECTORS,
    hexes,
    load,
    new_party,
    open_aggregator,
    open_party,
    releasing_aggregator,
    shared_config,
    sum_of,
    vector_of,
)
from medfed_test_secagg_vectors import make_files, to_text

rounds = pytest.mark.parametrize("case", ROUNDS.values(), ids=lambda case: case["name"])
recovery_rounds = pytest.mark.parametrize(
    "case", [case for case in ROUNDS.values() if case["mode"] != "strict"], ids=lambda case: case["name"]
)


@rounds
def test_party_known_secrets_gives_every_message_byte_for_byte(case):
    boxes_to = releasing_aggregator(case).boxes_for if case["mode"] != "strict" else None
    certificate = list(zip(case["survivors"], hexes(case["votes"]), strict=True)) if case["votes"] else []
    for rank, position in enumerate(case["members"]):
        party = new_party(case, position)
        assert party.offer().hex() == case["offers"][rank]
        party.accept(hexes(case["offers"]))
        assert party.transcript.hex() == case["transcript"]
        party.open_round(case["attempt"], bytes.fromhex(case["task_hash"]))
        masked = party.mask(vector_of(case, position))
        assert (masked.pad_id.hex(), masked.payload.hex()) == (case["ctx"], case["uploads"][rank])
        if boxes_to is None or position not in case["survivors"]:
            continue
        answering = case["survivors"].index(position)
        if certificate:
            assert party.vote(case["survivors"]).hex() == case["votes"][answering]
        release = party.release(case["survivors"], certificate, boxes_to(position))
        assert release.hex() == case["releases"][answering]


@rounds
def test_aggregator_known_messages_gives_known_sum(case):
    aggregator = open_aggregator(case)
    assert aggregator.transcript.hex() == case["transcript"]
    for position in case["survivors"]:
        aggregator.add_upload(bytes.fromhex(case["uploads"][case["members"].index(position)]))
    if case["mode"] != "strict":
        assert list(aggregator.freeze()) == case["survivors"]
        for position, vote in zip(case["survivors"], hexes(case["votes"]), strict=case["mode"] == "slow"):
            aggregator.add_vote(position, vote)
        for position, release in zip(case["survivors"], hexes(case["releases"]), strict=True):
            aggregator.add_release(position, release)
    assert sum_of(aggregator, case) == case["sum"]


@rounds
def test_reference_reads_production_uploads_with_all_seeds(case):
    schedule = ref.keys_of(case)
    for position in case["members"]:
        payload = open_party(case, position).mask(vector_of(case, position)).payload
        wrapped = vector_of(case, position).astype(f"<i{case['ring_bits'] // 8}")
        assert ref.unmask_upload(case, position, payload, schedule) == wrapped.tolist()


@rounds
def test_key_schedule_every_row_equals_vector(case):
    shared = shared_config(case)
    cohort = protocol.Cohort(shared, tuple(case["members"]))
    assert cohort.thresholds == protocol.Thresholds(case["needed"], case["threshold"])
    bodies = [offer[:-64] for offer in hexes(case["offers"])]
    transcript = protocol.transcript_hash(shared, bodies)
    context = protocol.context_hash(cohort, transcript, case["attempt"], bytes.fromhex(case["task_hash"]))
    assert (transcript.hex(), context.hex()) == (case["transcript"], case["ctx"])
    assert case["pairs"]
    for row in case["pairs"]:
        i, j = row["pair"]
        for own, peer in ((i, j), (j, i)):
            public = bodies[case["members"].index(peer)][-32:]
            assert keys.derive_root(ref.at(case, "private", own), public, transcript, own, peer).hex() == row["root"]
        root = bytes.fromhex(row["root"])
        leaf = keys.leaf_seed(root, context)
        assert (leaf.hex(), keys.stream_key(leaf, context).hex()) == (row["leaf"], row["stream"])
        assert keys.share_key(root, context, i, j).hex() == row["share_forth"]
        assert keys.share_key(root, context, j, i).hex() == row["share_back"]


@recovery_rounds
def test_self_masks_commitments_streams_and_boxes_equal_vectors(case):
    context = bytes.fromhex(case["ctx"])
    for rank, position in enumerate(case["members"]):
        self_mask = bytes.fromhex(case["self_masks"][rank])
        assert messages.commitment_of(context, position, self_mask).hex() == case["commitments"][rank]
        assert keys.stream_key(self_mask, context).hex() == case["self_streams"][rank]
    roots = ref.keys_of(case).roots
    sender = case["members"][1]
    for row in case["boxes"]:
        receiver, share, box = row["to"], bytes.fromhex(row["share"]), bytes.fromhex(row["box"])
        root = roots[min(sender, receiver), max(sender, receiver)]
        assert boxes.close_box(root, context, sender, receiver, share) == box
        assert boxes.open_box(root, context, sender, receiver, box) == share
        assert boxes.open_box(root, context, receiver, sender, box) is None
    assert [row["to"] for row in case["boxes"]] == [member for member in case["members"] if member != sender]


@pytest.mark.parametrize("case", load("secagg_shamir.json"), ids=lambda case: case["name"])
def test_shares_known_coefficients_equal_vector_and_any_t_open_the_secret(case):
    secret, threshold, positions = bytes.fromhex(case["secret"]), case["threshold"], case["positions"]
    shares = shamir.split(secret, threshold, positions, bytes.fromhex(case["coefficients"]))
    assert [share.hex() for share in shares] == case["shares"]
    held = list(zip(positions, shares, strict=True))
    for start in range(len(held)):
        some = (held + held)[start : start + threshold]
        assert shamir.combine(some, threshold) == secret
        assert shamir.combine([*some[:-1], (some[-1][0], bytes(32))], threshold) != secret


@pytest.mark.parametrize("case", load("secagg_pads.json"), ids=lambda case: case["name"])
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


def test_document_parameter_table_is_what_hospitals_derive():
    text = (VECTORS.parents[1] / "docs" / "secure_aggregation.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+)( \(strict\))? \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    for hospitals, colluders, survivors, strict, shares, lost, honest in rows:
        found = protocol.derive_thresholds(int(hospitals), int(colluders), 0)
        assert found == protocol.Thresholds(int(survivors), int(shares))
        assert (found.is_strict, int(lost)) == (bool(strict), int(hospitals) - found.survivors)
        assert int(honest) == found.survivors - int(colluders)
    assert len(rows) == 7


# ---------------------------------------------------------------------------------------------------------- the reference itself


def test_vector_files_equal_what_the_reference_writes():
    files = make_files()
    assert {name: to_text(cases) for name, cases in files.items()} == {
        name: (VECTORS / name).read_text() for name in files
    }
    assert set(files) == {path.name for path in VECTORS.glob("*secagg*.json")}


def test_x25519_rfc7748_known_answer_holds():
    """Section 5.2, first vector: the reference ladder itself is right."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert ref.x25519(scalar, point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"


def test_reference_box_equals_a_library_and_products_those_of_aes():
    """FIPS 197, section 4.2 for the product."""
    key, share, associated = bytes(range(32)), bytes(range(100, 132)), bytes(range(36))
    assert ref.seal(key, share, associated) == AESGCM(key).encrypt(bytes(12), share, associated)
    assert ref.product(0x57, 0x83) == 0xC1
