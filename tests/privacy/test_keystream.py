"""The keystream and the patients' coins: known answers, secrecy by construction, distribution."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medfed.errors import ConfigError, LocalProtocolError
from medfed.privacy.keystream import Keystream
from medfed.privacy.sampling import poisson_mask


def test_keystream_zero_key_gives_aes_known_answer():
    # AES-256, key and block all zero: the encryption of counter 0 (FIPS 197; in every AES test suite)
    block = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    words = Keystream(bytes(32)).words(2)
    assert words.dtype == np.uint64
    assert words.tolist() == [int.from_bytes(block[:8], "little"), int.from_bytes(block[8:], "little")]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_keystream_read_in_pieces_is_the_same_stream(counts):
    whole = Keystream(b"k" * 32).words(sum(counts))
    stream = Keystream(b"k" * 32)
    assert np.array_equal(np.concatenate([stream.words(count) for count in counts]), whole)


def bit_p_value(words):
    """p-value for as many ones as zeros over all bits of uint64[n]."""
    return stats.binomtest(int(np.unpackbits(words.view(np.uint8)).sum()), 64 * len(words), 0.5).pvalue


def test_keystream_words_are_uniform_and_none_comes_twice():
    """Every byte of a word by itself and beside its neighbour's: false alarm 1e-4 a test, with a fixed key."""
    words = Keystream(b"\x05" * 32).words(1 << 16)
    assert len(np.unique(words)) == len(words)
    columns = words.view(np.uint8).reshape(-1, 8)
    for place in range(8):
        assert stats.chisquare(np.bincount(columns[:, place], minlength=256)).pvalue > 1e-4
        pairs = np.histogram2d(columns[:-1, place] >> 4, columns[1:, place] >> 4, bins=16)[0]
        assert stats.chi2_contingency(pairs).pvalue > 1e-4


@pytest.mark.parametrize("flipped", [0, 100, 255])
def test_keystream_of_a_key_one_bit_apart_is_independent(flipped):
    """Where the two streams differ is as random as they are: false alarm 1e-4; a stream xored with itself is none."""
    key = bytearray(b"\x06" * 32)
    one = Keystream(bytes(key)).words(1 << 14)
    key[flipped // 8] ^= 1 << flipped % 8
    other = Keystream(bytes(key)).words(1 << 14)
    assert not set(one.tolist()) & set(other.tolist())
    assert bit_p_value(one ^ other) > 1e-4
    assert bit_p_value(one ^ np.roll(one, 1)) > 1e-4
    assert bit_p_value(one ^ (one | np.uint64(1))) < 1e-12


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_keystream_copied_or_pickled_is_refused(duplicate):
    with pytest.raises(TypeError, match="never be used twice"):
        duplicate(Keystream(bytes(32)))


def test_keystream_short_key_is_refused():
    with pytest.raises(LocalProtocolError, match="MF-170"):
        Keystream(bytes(16))


def test_mask_rate_one_takes_everybody():
    assert poisson_mask(bytes(32), 1000, 1.0).all()


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_mask_counts_are_binomial_and_a_five_percent_wrong_rate_fails(rate):
    population = 400_000
    taken = int(poisson_mask(b"\x07" * 32, population, rate).sum())
    # two-sided false alarm 1e-4 a rate, with a fixed key; at 0.001 only 400 are taken, so the control is 50 % there
    assert stats.binomtest(taken, population, rate).pvalue > 1e-4
    wrong = rate * (1.5 if rate < 0.01 else 1.05)
    assert stats.binomtest(taken, population, wrong).pvalue < 1e-4


def test_mask_coins_of_neighbors_are_independent():
    mask = poisson_mask(b"\x08" * 32, 200_000, 0.3)
    pairs = np.histogram2d(mask[:-1], mask[1:], bins=2)[0]
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


def test_mask_differs_between_keys_and_may_be_empty():
    assert not np.array_equal(poisson_mask(b"a" * 32, 100, 0.5), poisson_mask(b"b" * 32, 100, 0.5))
    assert poisson_mask(b"a" * 32, 0, 0.5).shape == (0,)
    assert not poisson_mask(b"a" * 32, 3, 1e-9).any()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_mask_rate_out_of_range_is_refused(rate):
    with pytest.raises(ConfigError, match="MF-203"):
        poisson_mask(bytes(32), 10, rate)
