"""Shares: the field, any t of n recover, t - 1 tell nothing (every coefficient tried), known answers, misuse."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import LocalProtocolError
from medfed.privacy.secagg.shamir import combine, combine_all, split

ZERO = bytes(32)
PEERS = tuple(range(255))
EVERY_BYTE = [bytes(range(start, start + 32)) for start in range(0, 256, 32)]


def slow_product(left, right):
    """Bit by bit, as on paper: multiply as polynomials over GF(2), then divide by x^8 + x^4 + x^3 + x + 1."""
    total = 0
    for bit in range(8):
        if right >> bit & 1:
            total ^= left << bit
    for bit in range(14, 7, -1):
        if total >> bit & 1:
            total ^= 0x11B << (bit - 8)
    return total


def slow_power(base, exponent):
    value = 1
    for _ in range(exponent):
        value = slow_product(value, base)
    return value


def slow_split(secret, threshold, positions, coefficients):
    shares = []
    for position in positions:
        share = list(secret)
        for degree in range(1, threshold):
            power = slow_power(position + 1, degree)
            term = coefficients[32 * (degree - 1) : 32 * degree]
            share = [byte ^ slow_product(power, digit) for byte, digit in zip(share, term, strict=True)]
        shares.append(bytes(share))
    return tuple(shares)


def slow_combine(shares):
    """Gauss-Jordan on x^k: no Lagrange weight, so no mistake in common with the code."""
    rows = [[slow_power(position + 1, k) for k in range(len(shares))] + list(share) for position, share in shares]
    for column in range(len(rows)):
        pivot = next(row for row in range(column, len(rows)) if rows[row][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        inverse = slow_power(rows[column][column], 254)
        rows[column] = [slow_product(inverse, entry) for entry in rows[column]]
        for row in range(len(rows)):
            if row != column:
                factor = rows[row][column]
                pairs = zip(rows[row], rows[column], strict=True)
                rows[row] = [entry ^ slow_product(factor, other) for entry, other in pairs]
    return bytes(rows[0][len(shares) :])


def stream(name, size):
    return hashlib.shake_256(name.encode()).digest(size)


def shared(threshold, positions, name="secret"):
    """(secret, its (position, share) pairs)."""
    secret = stream(name, 32)
    shares = split(secret, threshold, positions, stream(f"{name}/coefficients", 32 * (threshold - 1)))
    return secret, list(zip(positions, shares, strict=True))


def lanes(values):
    """uint8[256 k] -> 32 bytes at a time: each byte is shared on its own, so one split tries 32 cases."""
    return [block.tobytes() for block in np.asarray(values, np.uint8).reshape(-1, 32)]


def shares_of(secrets, terms, positions):
    """Shares of one-byte secrets uint8[cases] under coefficients uint8[t - 1, cases]: uint8[positions, cases]."""
    columns = zip(lanes(secrets), *[lanes(term) for term in terms], strict=True)
    parts = [split(secret, len(terms) + 1, positions, b"".join(term)) for secret, *term in columns]
    return np.stack([np.frombuffer(b"".join(row), np.uint8) for row in zip(*parts, strict=True)])


@pytest.fixture(scope="module")
def products():
    """a times b for b not 0, as the code computes it: the share at x = b of secret 0 with coefficient a."""
    rows = [split(ZERO, 2, PEERS, block) for block in EVERY_BYTE]
    nonzero = np.stack([np.frombuffer(b"".join(row), np.uint8) for row in zip(*rows, strict=True)])
    return np.vstack([np.zeros((1, 256), np.uint8), nonzero])


# --- the field


def test_field_every_product_equals_slow_multiplication(products):
    assert products.tolist() == [[slow_product(x, a) for a in range(256)] for x in range(256)]


def test_field_axioms_hold_for_all_elements(products):
    everything = np.arange(256)
    assert (products == products.T).all()
    assert (products[1] == everything).all()
    assert ((products == 1).sum(axis=1)[1:] == 1).all()  # one inverse each
    sums = everything[:, None] ^ everything
    for factor in range(256):
        assert (products[products[factor]] == products[factor][products]).all()
        assert (products[factor][sums] == products[factor][:, None] ^ products[factor]).all()


# --- known answers


def test_split_known_products_of_the_aes_standard_are_shares():
    """FIPS 197, section 4.2: {57} times {83} is {c1}, {57} times {13} is {fe}."""
    shares = split(b"\x01" * 32, 2, [0x82, 0x12], b"\x57" * 32)
    assert shares == (b"\xc0" * 32, b"\xff" * 32)


@pytest.mark.parametrize(
    ("threshold", "positions"), [(2, [0, 1, 2]), (4, [0, 3, 5, 9, 127]), (7, [254, 8, 1, 3, 2, 77, 0])]
)
def test_split_and_combine_equal_an_independent_slow_implementation(threshold, positions):
    secret, shares = shared(threshold, positions)
    terms = stream("secret/coefficients", 32 * (threshold - 1))
    assert tuple(share for _, share in shares) == slow_split(secret, threshold, positions, terms)
    arbitrary = [(position, stream(f"share {position}", 32)) for position in sorted(positions)[:threshold]]
    assert combine(arbitrary, threshold) == slow_combine(arbitrary)


# --- any t of n


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_combine_any_threshold_shares_in_any_order_give_the_secret(data):
    positions = data.draw(st.lists(st.integers(0, 254), min_size=2, max_size=20, unique=True))
    threshold = data.draw(st.integers(2, len(positions)))
    secret = data.draw(st.binary(min_size=32, max_size=32))
    terms = data.draw(st.binary(min_size=32 * (threshold - 1), max_size=32 * (threshold - 1)))
    shares = list(zip(positions, split(secret, threshold, positions, terms), strict=True))
    held = data.draw(st.permutations(shares))[: data.draw(st.integers(threshold, len(shares)))]
    assert combine(held, threshold) == secret


def test_combine_every_subset_of_a_small_cohort_gives_the_secret():
    secret, shares = shared(4, range(7))
    for held in itertools.combinations(shares, 4):
        assert combine(held, 4) == secret
    for held in itertools.combinations(shares, 3):
        assert combine(held, 3) != secret


def test_combine_128_hospitals_the_last_threshold_of_them_give_the_secret():
    secret, shares = shared(81, range(128))
    assert combine(shares[-81:], 81) == combine(shares, 81) == secret


def test_combine_looks_at_the_first_threshold_shares_only():
    secret, shares = shared(3, [4, 9, 2, 7, 5])
    for wrong in range(5):
        altered = [(p, stream("wrong", 32) if place == wrong else share) for place, (p, share) in enumerate(shares)]
        assert (combine(altered, 3) == secret) == (shares[wrong][0] in (7, 9))


def test_combine_all_equals_combine_of_each():
    positions = [12, 0, 99, 45, 3, 127]
    secrets, shares = zip(*[shared(4, positions, f"secret {number}") for number in range(9)], strict=True)
    stacked = np.array([[list(share) for _, share in one] for one in shares], np.uint8)
    assert combine_all(positions, stacked, 4) == secrets == tuple(combine(one, 4) for one in shares)
    assert combine_all(positions, stacked[:0], 4) == ()


# --- fewer tell nothing: every value of every coefficient is tried


def counts_of_one(secrets, coefficients):
    """How often each share value occurs for each secret, at each position in turn: int[secret, value]."""
    for values in shares_of(secrets, [coefficients], PEERS):
        yield np.bincount(secrets * 256 + values, minlength=65536).reshape(256, 256)


def test_split_threshold_2_any_share_has_one_distribution_for_every_secret():
    secrets, coefficients = np.divmod(np.arange(65536), 256)
    assert all((counts == 1).all() for counts in counts_of_one(secrets, coefficients))
    # control: a leading coefficient that is never 0 rules out the secret that equals the share
    never_zero = np.maximum(coefficients, 1)
    assert all((np.diag(counts) == 0).all() for counts in counts_of_one(secrets, never_zero))


def test_split_threshold_3_any_two_shares_have_one_distribution_for_every_secret():
    positions = [0, 1, 2, 254]
    terms = np.divmod(np.arange(65536), 256)
    seen = {}
    for secret in (0x00, 0x01, 0x53, 0xFF):
        shares = shares_of(np.full(65536, secret), terms, positions).astype(np.int64)
        for first, second in itertools.combinations(range(4), 2):
            assert (np.bincount(shares[first] * 256 + shares[second], minlength=65536) == 1).all()
        seen[secret] = set((shares[0] << 16 | shares[1] << 8 | shares[2]).tolist())
    # control: three shares never occur for two secrets
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(seen.values(), 2))


def test_split_threshold_2_two_shares_never_occur_for_two_secrets():
    secrets, coefficients = np.divmod(np.arange(65536), 256)
    first, second = shares_of(secrets, [coefficients], [0, 1]).astype(np.int64)
    assert len(np.unique(first * 256 + second)) == 65536


def test_split_each_byte_is_shared_by_its_own_coefficients():
    terms = stream("terms", 64)
    before = split(ZERO, 3, [0, 1, 2], terms)
    for place in range(64):
        after = split(ZERO, 3, [0, 1, 2], terms[:place] + bytes([terms[place] ^ 1]) + terms[place + 1 :])
        for one, other in zip(before, after, strict=True):
            assert [k for k in range(32) if one[k] != other[k]] == [place % 32]


# --- misuse


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((bytes(31), 2, [0, 1], ZERO), id="short_secret"),
        pytest.param((bytes(33), 2, [0, 1], ZERO), id="long_secret"),
        pytest.param((ZERO, 2, [0, 1], bytes(31)), id="short_coefficients"),
        pytest.param((ZERO, 2, [0, 1], bytes(64)), id="long_coefficients"),
        pytest.param((bytes(31), 2, [0, 1], bytes(33)), id="lengths_that_only_add_up"),
        pytest.param((ZERO, 0, [0, 1], b""), id="threshold_0"),
        pytest.param((ZERO, 1, [0, 1], b""), id="threshold_1"),
        pytest.param((ZERO, 3, [0, 1], bytes(64)), id="threshold_above_positions"),
        pytest.param((ZERO, 2, [1, 1], ZERO), id="position_twice"),
        pytest.param((ZERO, 2, [-1, 1], ZERO), id="position_of_the_secret"),
        pytest.param((ZERO, 2, [0, 255], ZERO), id="position_above_the_field"),
    ],
)
def test_split_misuse_is_refused(arguments):
    with pytest.raises(LocalProtocolError, match="MF-187"):
        split(*arguments)


@pytest.mark.parametrize(
    ("shares", "threshold"),
    [
        pytest.param([(0, ZERO), (1, ZERO)], 3, id="too_few"),
        pytest.param([], 2, id="none"),
        pytest.param([(0, ZERO), (1, ZERO), (0, ZERO)], 2, id="position_twice"),
        pytest.param([(0, ZERO), (-1, ZERO)], 2, id="position_of_the_secret"),
        pytest.param([(0, ZERO), (255, ZERO)], 2, id="position_above_the_field"),
        pytest.param([(0, ZERO)], 1, id="threshold_1"),
        pytest.param([(0, bytes(31)), (1, bytes(33))], 2, id="lengths_that_only_add_up"),
    ],
)
def test_combine_misuse_is_refused(shares, threshold):
    with pytest.raises(LocalProtocolError, match="MF-187"):
        combine(shares, threshold)


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param(np.zeros((1, 3, 32), np.uint8), id="more_shares_than_positions"),
        pytest.param(np.zeros((1, 2, 31), np.uint8), id="short_share"),
        pytest.param(np.zeros((2, 32), np.uint8), id="one_secret_without_axis"),
        pytest.param(np.zeros((1, 2, 32), np.int64), id="other_type"),
    ],
)
def test_combine_all_other_layout_is_refused(shares):
    with pytest.raises(LocalProtocolError, match="MF-187"):
        combine_all([0, 1], shares, 2)
