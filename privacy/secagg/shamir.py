"""Shares of a self mask's seed: any ``threshold`` of them give it back, fewer say nothing about it.

Each of the 32 bytes is shared on its own: it is the constant term of a polynomial of degree below t over GF(256)
(x^8 + x^4 + x^3 + x + 1), whose other coefficients are uniform bytes; the hospital at position p holds the value at
x = p + 1. A share cannot be told from a wrong one: the caller checks what it recovers against its commitment.

Source: Shamir 1979, "How to share a secret"; Bonawitz et al. 2017, section 4; medfed's secure aggregation design,
sections 6 and 12. Table look-ups take time that may depend on the secret: side channels are outside the threat model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from medfed.errors import LocalProtocolError

SHARE_BYTES: Final = 32
MOST_POSITIONS: Final = 255  # the non-zero points of GF(256); the value at x = 0 is the secret itself
_POLYNOMIAL: Final = 0x11B


def split(secret: bytes, threshold: int, positions: Sequence[int], coefficients: bytes) -> tuple[bytes, ...]:
    """One 32-byte share of ``secret`` (32 bytes) for each of ``positions`` (0..254), in their order. Pure.

    ``coefficients``: (threshold - 1) * 32 bytes, the coefficients of x, x^2, ...; fresh from the entropy seam for each
    secret and never used again. Zeros among them are kept: without them the leading one would not be uniform, and
    t - 1 shares would rule a secret out.

    *Guarantees*: over uniform coefficients any threshold - 1 shares are uniform, whatever the secret.

    Raises ``LocalProtocolError`` (MF-187): a length that does not fit, a threshold below 2 (each share would be the
    secret) or above the number of positions, a position twice or out of range.
    """
    points = _points(positions)
    _check_threshold(threshold)
    if threshold > len(points):
        raise LocalProtocolError(187, f"{len(points)} shares can never reach {threshold}", "lower the threshold")
    if len(secret) != SHARE_BYTES or len(coefficients) != (threshold - 1) * SHARE_BYTES:
        raise LocalProtocolError(
            187,
            f"secret of {len(secret)} bytes, coefficients of {len(coefficients)} bytes, threshold {threshold}",
            f"give {SHARE_BYTES} and {(threshold - 1) * SHARE_BYTES} bytes",
        )
    terms = np.frombuffer(secret + coefficients, np.uint8).reshape(threshold, SHARE_BYTES)
    values = np.zeros((len(points), SHARE_BYTES), np.uint8)
    for term in terms[::-1]:  # Horner's rule, all positions and bytes at once
        values = _multiply(points[:, None], values) ^ term
    return tuple(value.tobytes() for value in values)


def combine(shares: Sequence[tuple[int, bytes]], threshold: int) -> bytes:
    """The secret (32 bytes) of (position, share) pairs in any order: its first ``threshold`` by ascending position.

    Shares beyond those are not looked at, so everybody who holds the same shares recovers the same bytes. A wrong
    share gives a wrong secret, no error: check it against the commitment.

    Raises ``LocalProtocolError`` (MF-187): too few shares, a position twice or out of range, a share not of 32 bytes,
    a threshold below 2.
    """
    if any(len(share) != SHARE_BYTES for _, share in shares):
        raise LocalProtocolError(187, "a share of another length", f"give {SHARE_BYTES} bytes a share")
    values = np.frombuffer(b"".join(share for _, share in shares), np.uint8).reshape(1, len(shares), SHARE_BYTES)
    return combine_all([position for position, _ in shares], values, threshold)[0]


def combine_all(positions: Sequence[int], shares: NDArray[np.uint8], threshold: int) -> tuple[bytes, ...]:
    """``combine`` for many secrets that the same positions hold shares of: the secrets, 32 bytes each, in order.

    ``shares``: uint8[secrets, len(positions), 32]; shares[s, p] is the share of secret s that positions[p] holds.

    Raises ``LocalProtocolError`` (MF-187) as ``combine``, and for shares of another shape or type.
    """
    points = _points(positions)
    _check_threshold(threshold)
    if len(points) < threshold:
        raise LocalProtocolError(
            187, f"{len(points)} shares of a secret that needs {threshold}", "wait for the releases of more hospitals"
        )
    if shares.dtype != np.uint8 or shares.shape[1:] != (len(points), SHARE_BYTES):
        raise LocalProtocolError(
            187, f"shares are {shares.dtype}{list(shares.shape)}", f"give uint8[secrets, {len(points)}, {SHARE_BYTES}]"
        )
    first = np.argsort(points)[:threshold]
    weights = _weights_at_zero(points[first])
    secrets = np.bitwise_xor.reduce(_multiply(weights[:, None], shares[:, first]), axis=1)
    return tuple(secret.tobytes() for secret in secrets)


def _check_threshold(threshold: int) -> None:
    if threshold < 2:
        raise LocalProtocolError(187, f"threshold {threshold} protects nothing", "give at least 2")


def _points(positions: Sequence[int]) -> NDArray[np.uint8]:
    """x of each position, uint8[positions]: never 0, where the polynomial is the secret."""
    if any(not 0 <= position < MOST_POSITIONS for position in positions):
        raise LocalProtocolError(187, "a position out of range", f"give positions of 0 to {MOST_POSITIONS - 1}")
    if len(set(positions)) != len(positions):
        raise LocalProtocolError(187, "a position twice among the shares", "give one share a position")
    return np.array([position + 1 for position in positions], np.uint8)


def _weights_at_zero(points: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lagrange's weights, uint8[t]: the value at 0 is the sum of weight times value over distinct ``points``.

    weight_i = product over j != i of x_j / (x_i - x_j), as sums of logarithms; minus is exclusive or, and the
    logarithm of 0 is stored as 0, so that j = i drops out of the second sum.
    """
    power, logarithm, _ = _tables()
    logs = logarithm[points]
    exponents: NDArray[np.int64] = logs.sum() - logs - logarithm[points[:, None] ^ points].sum(axis=1)
    return power[exponents % 255]


def _multiply(left: NDArray[np.uint8] | np.uint8, right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Products in GF(256), elementwise, broadcast."""
    products = _tables()[2]
    return products.take(np.left_shift(left, 8, dtype=np.intp) | right)


@cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8]]:
    """Powers of the generator 3 (uint8[255]), logarithms to it (int64[256]), products of a and b at 256 a + b."""
    power, logarithm = np.zeros(255, np.uint8), np.zeros(256, np.int64)
    value = 1
    for exponent in range(255):
        power[exponent], logarithm[value] = value, exponent
        value ^= value << 1
        if value > 255:
            value ^= _POLYNOMIAL
    products = power[(logarithm[:, None] + logarithm) % 255]
    products[0], products[:, 0] = 0, 0
    tables = power, logarithm, products.ravel()
    for table in tables:
        table.flags.writeable = False
    return tables
