"""Texts -> tokens int64[n, length], by the study's contract. No vocabulary: nobody's words shape what a token means."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from medfed.data_contract import Text
from medfed.models.cells import MISSING, fault
from medfed.models.vocabulary import Vocabulary

_WORD = re.compile(r"[^\W_]+")
_SHORT = 3  # characters of a word that ``hashed-pieces`` leave out
_PIECE = 5


def encode_texts(
    contract: Text, cells: Sequence[str], rows: Sequence[int], vocabulary: Vocabulary | None = None
) -> NDArray[np.int64]:
    """Tokens as ``medfed.data_contract.Text`` documents, 0 behind a text's end. ``vocabulary``: of a study that names one.

    Raises: ``DataError`` MF-301 for a missing text and for one without a word.

    *Guarantees*: every text has at least one token that is not padding; the same text has the same tokens everywhere.
    """
    tokens = np.zeros((len(cells), *contract.shape), np.int64)
    find = _of_vocabulary(contract, vocabulary) if vocabulary is not None else _FINDERS[contract.tokens](contract)
    for index, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        if cell.strip() in MISSING:
            raise fault(row, contract.column, "is missing", "drop rows without a text")
        found = find(cell)
        if not found:
            raise fault(row, contract.column, "holds no word", "drop rows without a text")
        tokens[index, : len(found)] = found
    return tokens


Found = Sequence[int] | Sequence[Sequence[int]]


def _bytes(contract: Text) -> Callable[[str], Found]:
    return lambda text: [1 + byte for byte in text.encode("utf-8", "replace")[: contract.length]]


def _hashed_words(contract: Text) -> Callable[[str], Found]:
    known = functools.cache(lambda word: hashed_word(word, contract.buckets))

    def found(text: str) -> Found:
        return [known(word) for word in itertools.islice(_words(text), contract.length)]

    return found


def _hashed_pieces(contract: Text) -> Callable[[str], Found]:
    known = functools.cache(lambda piece: hashed_word(piece, contract.buckets))

    def found(text: str) -> Found:
        return [known(piece) for piece in itertools.islice(pieces_of(text), contract.length)]

    return found


def pieces_of(text: str) -> Iterator[str]:
    """What stands for a text among ``hashed-pieces``, in its order; of a text of short words alone these."""
    words = list(_words(text))
    long = [word for word in words if len(word) > _SHORT]
    for word in long or words:
        yield word
        if len(word) > _PIECE:
            yield from (f"{word[:_PIECE]}-", f"-{word[-_PIECE:]}")


def _words(text: str) -> Iterator[str]:
    return (match.group() for match in _WORD.finditer(unicodedata.normalize("NFKC", text).lower()))


def tokens_of_word(contract: Text, word: str) -> list[int]:
    """The token, or tokens, of a public word where a text holds it; of given words that of the whole word."""
    found = [word_parts(word)[0]] if contract.tokens == "given-words" else list(_words(word))
    return [hashed_word(each, contract.buckets) for each in found]


def _given_words(contract: Text) -> Callable[[str], Found]:
    known = functools.cache(lambda word: [hashed_word(part, contract.buckets) for part in word_parts(word)])
    return lambda text: [known(word) for word in given_words(text)[: contract.length]]


def _of_vocabulary(contract: Text, vocabulary: Vocabulary) -> Callable[[str], Found]:
    return lambda text: list(itertools.islice(vocabulary.tokens_of(text), contract.length))


_FINDERS: dict[str, Callable[[Text], Callable[[str], Found]]] = {
    "bytes": _bytes,
    "hashed-words": _hashed_words,
    "hashed-pieces": _hashed_pieces,
    "given-words": _given_words,
}


def given_words(text: str) -> list[str]:
    """The words of a text that was divided before: what stands between blanks."""
    return text.split()


def word_parts(word: str) -> list[str]:
    """``WORD_PARTS`` strings: the word in form NFKC and lower case with all digits as 0; its first 3 and 4 characters and its
    last 2, 3 and 4, marked as such; its shape and, of that, what is left with repetitions taken out.

    Shape: A for a capital letter, a for another, 0 for a digit, and whatever else there is as it stands.
    """
    plain = unicodedata.normalize("NFKC", word)
    low = "".join("0" if character.isdigit() else character for character in plain.lower())
    shape = "".join(_shape(character) for character in plain[:32])
    short = "".join(character for character, _ in itertools.groupby(shape))
    ends = [f"{low[:3]}-", f"{low[:4]}-", f"-{low[-2:]}", f"-{low[-3:]}", f"-{low[-4:]}"]
    return [low, *ends, f"={shape[:12]}", f"={short}"]


def _shape(character: str) -> str:
    if character.isdigit():
        return "0"
    if not character.isalpha():
        return character
    return "A" if character.isupper() else "a"


def hashed_word(word: str, buckets: int) -> int:
    """1 .. ``buckets``: 1 + the first 8 bytes of the SHA-256 of the word's UTF-8, big-endian, modulo ``buckets``."""
    return 1 + int.from_bytes(hashlib.sha256(word.encode("utf-8", "replace")).digest()[:8], "big") % buckets
