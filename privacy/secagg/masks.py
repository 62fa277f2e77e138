"""Pads: adding AES-256 keystream to a vector of ring words at memory speed.

A pad is the AES-256-CTR keystream of one seed read as little-endian words; its first counter block is nonce ‖ 2. Those are
exactly the bytes that AES-256-GCM encrypts zeros to (counter 1 serves its tag, which is never computed), and OpenSSL's GCM
is the faster of the two, so ``Masker`` uses it; ``pad_words`` uses CTR and can seek. A test holds both to a third, slow one.

Source: medfed's secure aggregation design, sections 4 and 12; NIST SP 800-38A (CTR), SP 800-38D (GCM).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher, algorithms, modes
from numpy.typing import NDArray

from medfed.errors import LocalProtocolError
from medfed.privacy.secagg.protocol import RingWords, view_words

CHUNK_BYTES: Final = 256 << 10  # pad and slice of the vector stay in the processor's second-level cache
_BLOCK_BYTES: Final = 16
_FIRST_BLOCK: Final = 2


class Masker:
    """Masks vectors of one ring, with 0.5 MB of buffers allocated once and used again for every round.

    ``ring_bits``: 16 or 32. Not for two threads at once.
    """

    def __init__(self, ring_bits: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._zeros = memoryview(bytes(chunk_bytes))
        self._pad = bytearray(chunk_bytes + _BLOCK_BYTES)  # update_into asks for one spare block
        self._words = view_words(memoryview(self._pad)[:chunk_bytes], ring_bits)

    def mask_into(
        self, masked: RingWords, vector: NDArray[np.int64], streams: Sequence[bytes], signs: Sequence[int]
    ) -> None:
        """``masked`` = ``vector`` + sum of sign · pad over all streams, modulo 2^k.

        ``masked``: ring words[D], overwritten. ``vector``: int64[D], of any size: its low k bits are the two's complement.
        ``streams``: key and nonce of each pad, 44 bytes. ``signs``: +1 or -1 each. Chunk by chunk with all streams in
        turn, so the unmasked words of one chunk at most exist outside the caller's vector.
        """
        if masked.shape != vector.shape:
            raise LocalProtocolError(180, "vector and buffer differ in length", "report this as a defect")
        size, pads = self._words.size, _open_pads(streams, signs)
        for start in range(0, masked.size, size):
            chunk = masked[start : start + size]
            np.copyto(chunk, vector[start : start + size], casting="unsafe")
            self._add_next(chunk, pads)

    def add_pads(self, words: RingWords, streams: Sequence[bytes], signs: Sequence[int]) -> None:
        """``words`` += sum of sign · pad over all streams, modulo 2^k, in place: takes recovered pads off a sum.

        ``words``: ring words[D]. ``streams``, ``signs``: as ``mask_into``.
        """
        size, pads = self._words.size, _open_pads(streams, signs)
        for start in range(0, words.size, size):
            self._add_next(words[start : start + size], pads)

    def _add_next(self, chunk: RingWords, pads: Sequence[tuple[AEADEncryptionContext, int]]) -> None:
        """The next words of every pad, added to ``chunk``: at most as many as the buffers hold."""
        zeros, pad = self._zeros[: chunk.nbytes], self._words[: chunk.size]
        for encryptor, sign in pads:
            encryptor.update_into(zeros, self._pad)
            if sign > 0:
                np.add(chunk, pad, out=chunk)
            else:
                np.subtract(chunk, pad, out=chunk)

    def erase(self) -> None:
        """Overwrite the last chunk of pad."""
        self._words[:] = 0
        self._pad[-_BLOCK_BYTES:] = bytes(_BLOCK_BYTES)


def _open_pads(streams: Sequence[bytes], signs: Sequence[int]) -> list[tuple[AEADEncryptionContext, int]]:
    """Each stream from its first word on, and its sign. Never finalized: no tag."""
    if len(streams) != len(signs):
        raise LocalProtocolError(180, "streams and signs differ in number", "report this as a defect")
    return [
        (Cipher(algorithms.AES(stream[:32]), modes.GCM(stream[32:])).encryptor(), sign)
        for stream, sign in zip(streams, signs, strict=True)
    ]


def pad_words(stream: bytes, first: int, count: int, ring_bits: int) -> RingWords:
    """Words ``first`` to ``first + count`` of a pad by AES-256-CTR, started at the block that holds the first of them."""
    size = ring_bits // 8
    block, skip = divmod(first * size, _BLOCK_BYTES)
    counter = (_FIRST_BLOCK + block).to_bytes(4, "big")
    encryptor = Cipher(algorithms.AES(stream[:32]), modes.CTR(stream[32:] + counter)).encryptor()
    return view_words(encryptor.update(bytes(skip + count * size))[skip:], ring_bits)
