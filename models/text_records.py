"""Texts -> tokens int64[n, length], by the study's contract. No vocabulary: nobody's words shape what a token means."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import Text
from medfed.models.cells import MISSING, fault

_WORD = re.compile(r"[^\W_]+")


def encode_texts(contract: Text, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.int64]:
    """Tokens as ``medfed.data_contract.Text`` documents, 0 behind a text's end.

    Raises: ``DataError`` MF-301 for a missing text and for one without a word.

    *Guarantees*: every text has at least one token that is not padding; the same text has the same tokens everywhere.
    """
    tokens = np.zeros((len(cells), contract.length), np.int64)
    known: dict[str, int] = {}
    for index, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        if cell.strip() in MISSING:
            raise fault(row, contract.column, "is missing", "drop rows without a text")
        found = _bytes(contract, cell) if contract.tokens == "bytes" else _hashed_words(contract, cell, known)
        if not found:
            raise fault(row, contract.column, "holds no word", "drop rows without a text")
        tokens[index, : len(found)] = found
    return tokens


def _bytes(contract: Text, text: str) -> list[int]:
    return [1 + byte for byte in text.encode("utf-8", "replace")[: contract.length]]


def _hashed_words(contract: Text, text: str, known: dict[str, int]) -> list[int]:
    """``known`` remembers the tokens of words met before in the same call."""
    words = _WORD.finditer(unicodedata.normalize("NFKC", text).lower())
    found = []
    for match in itertools.islice(words, contract.length):
        word = match.group()
        token = known.get(word)
        if token is None:
            token = known[word] = hashed_word(word, contract.buckets)
        found.append(token)
    return found


def hashed_word(word: str, buckets: int) -> int:
    """1 .. ``buckets``: 1 + the first 8 bytes of the SHA-256 of the word's UTF-8, big-endian, modulo ``buckets``."""
    return 1 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % buckets
