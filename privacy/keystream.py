"""Uniform words from a secret key: the only randomness inside ``privacy``.

AES-256 in counter mode is the generator; its 32-byte key comes from the entropy seam. Each key serves one purpose once
(one noise vector, one batch's coins) and is dropped: the counter starts at zero, so a second use repeats the words.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from medfed.errors import LocalProtocolError

KEY_BYTES = 32


class Keystream:
    """An endless run of independent uniform 64-bit words, fixed by its key. Cannot be copied or pickled."""

    __slots__ = ("_stream", "_zeros")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise LocalProtocolError(170, f"a keystream key of {len(key)} bytes", f"draw {KEY_BYTES} bytes")
        # a fresh key each time is what makes the fixed starting counter safe
        self._stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
        self._zeros = memoryview(b"")

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` words: uint64[count], the same on every processor (little-endian reading)."""
        if len(self._zeros) < 8 * count:
            self._zeros = memoryview(bytes(8 * count))
        data = self._stream.update(self._zeros[: 8 * count])
        return np.frombuffer(data, dtype="<u8").astype(np.uint64, copy=False)

    def word(self) -> int:
        """The next single word."""
        return int(self.words(1)[0])

    def __copy__(self) -> NoReturn:
        self.__reduce__()

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        self.__reduce__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a keystream cannot be copied or pickled: its words must never be used twice")
