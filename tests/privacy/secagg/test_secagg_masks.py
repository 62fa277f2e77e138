"""Pads: both backends agree at every edge, masks cancel, masked words look uniform."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import LocalProtocolError
from medfed.privacy.secagg.keys import stream_key
from medfed.privacy.secagg.masks import Masker, pad_words
from medfed.privacy.secagg.protocol import view_words

CHI2_LIMIT = 376.0  # 255 degrees of freedom, exceeded by chance about once in a million


def stream(number):
    return stream_key(bytes([number]) * 32, b"context")


def zeros(size, ring_bits):
    return view_words(bytearray(size * ring_bits // 8), ring_bits)


def chi2_of_bytes(data):
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("ring_bits", [16, 32])
@pytest.mark.parametrize("chunk_bytes", [64, 4096, 256 << 10])
def test_masker_any_chunk_size_equals_seeking_backend(ring_bits, chunk_bytes):
    for size in (1, 31, 32, 33, 5003):
        masked = zeros(size, ring_bits)
        Masker(ring_bits, chunk_bytes).mask_into(masked, np.zeros(size, np.int64), [stream(1)], [1])
        assert (masked == pad_words(stream(1), 0, size, ring_bits)).all()


@pytest.mark.parametrize("ring_bits", [16, 32])
def test_masker_signs_and_many_streams_equal_sum_of_pads(ring_bits):
    size, signs = 1000, [1, -1, -1, 1]
    vector = np.arange(size, dtype=np.int64) - 500
    masked = zeros(size, ring_bits)
    Masker(ring_bits, 256).mask_into(masked, vector, [stream(i) for i in range(4)], signs)
    want = vector.copy()
    for i, sign in enumerate(signs):
        want += sign * pad_words(stream(i), 0, size, ring_bits).astype(np.int64)
    assert masked.tolist() == (want % 2**ring_bits).tolist()


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 3000), st.integers(1, 40), st.sampled_from([16, 32]))
def test_pad_any_range_equals_slice_of_whole(first, count, ring_bits):
    whole = pad_words(stream(2), 0, 3040, ring_bits)
    assert (pad_words(stream(2), first, count, ring_bits) == whole[first : first + count]).all()


def test_masker_used_again_leaves_nothing_of_the_round_before():
    masker, first, second = Masker(32, 256), zeros(200, 32), zeros(200, 32)
    masker.mask_into(first, np.full(200, 7), [stream(1)], [1])
    masker.mask_into(second, np.full(200, 9), [stream(2)], [-1])
    assert (second == (9 - pad_words(stream(2), 0, 200, 32).astype(np.int64)) % 2**32).all()
    masker.erase()
    assert not any(masker._pad)


@pytest.mark.parametrize("ring_bits", [16, 32])
def test_masker_pads_taken_off_leave_the_vector(ring_bits):
    masker, streams, signs = Masker(ring_bits, 256), [stream(i) for i in range(3)], [1, -1, 1]
    masked = zeros(1001, ring_bits)
    vector = np.arange(1001, dtype=np.int64) - 500
    masker.mask_into(masked, vector, streams, signs)
    masker.add_pads(masked, streams[:2], [-1, 1])
    assert masked.tolist() == ((vector + pad_words(streams[2], 0, 1001, ring_bits)) % 2**ring_bits).tolist()
    masker.add_pads(masked, streams[2:], [-1])
    assert masked.tolist() == (vector % 2**ring_bits).tolist()


def test_masker_lengths_differ_refused():
    with pytest.raises(LocalProtocolError, match="MF-180"):
        Masker(32).mask_into(zeros(3, 32), np.zeros(4, np.int64), [], [])
    with pytest.raises(LocalProtocolError, match="MF-180"):
        Masker(32).add_pads(zeros(3, 32), [stream(1)], [1, -1])


def test_masker_scratch_memory_does_not_grow_with_the_vector():
    masked, vector = zeros(1_000_000, 32), np.zeros(1_000_000, np.int64)
    tracemalloc.start()
    try:
        Masker(32).mask_into(masked, vector, [stream(1), stream(2)], [1, -1])
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ring_bits", [16, 32])
def test_masker_vector_beyond_ring_wraps_modulo(ring_bits):
    vector = np.array([2**ring_bits, -1, -(2 ** (ring_bits - 1)) - 1, 2**63 - 1, -(2**63)])
    masked = zeros(5, ring_bits)
    Masker(ring_bits).mask_into(masked, vector, [], [])
    assert masked.tolist() == [int(value) % 2**ring_bits for value in vector]


@pytest.mark.parametrize("ring_bits", [16, 32])
def test_upload_words_are_uniform(federation, task, ring_bits):
    """Fixed seed; a plain vector and a slightly biased pad must fail the same test."""
    fed = federation(3, 100_000, ring_bits).set_up()
    fed.open_round(1)
    vectors = fed.vectors(bound=100)
    for upload, vector in zip(fed.mask_all(vectors), vectors, strict=True):
        words = upload.payload[52:-64]
        assert chi2_of_bytes(words) < CHI2_LIMIT
        assert abs(np.corrcoef(fed.words_of(upload.payload), vector)[0, 1]) < 0.016  # five standard deviations
        assert chi2_of_bytes(vector.astype(f"<i{ring_bits // 8}").tobytes()) > CHI2_LIMIT
        biased = np.frombuffer(words, np.uint8).copy()
        biased[::20] &= 0x7F
        assert chi2_of_bytes(biased.tobytes()) > CHI2_LIMIT


def test_upload_is_random(federation, task):
    """An attacker who knows two candidate vectors and guesses which of them an upload holds: AUC 0.50 ± 0.02.

    The score is the correlation with the difference of the candidates. Control: without pads the same score gives 1.
    """
    fed = federation(3, 32).set_up()
    candidates = np.stack([np.full(32, -1000), np.full(32, 1000)])
    direction = (candidates[1] - candidates[0]).astype(np.float64)
    masked, plain = ([], []), ([], [])
    for attempt in range(1, 8001):
        party, choice = fed.parties[0], attempt % 2
        party.open_round(attempt, task)
        upload = party.mask(candidates[choice])
        masked[choice].append(fed.words_of(upload.payload) @ direction)
        party.close_round()
        plain[choice].append(candidates[choice] @ direction)
    assert abs(area_under_curve(*masked) - 0.5) < 0.02
    assert area_under_curve(*plain) == 1.0


def area_under_curve(low, high):
    ranks = np.concatenate([low, high]).argsort().argsort()[len(low) :]
    return (ranks.sum() - len(high) * (len(high) - 1) / 2) / (len(low) * len(high))
