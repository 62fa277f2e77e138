"""What stands behind each token of a text, to be shown beside what the model made of it."""

from __future__ import annotations

import itertools
import re
import unicodedata

from medfed.data_contract import Text
from medfed.models.text_records import given_words, pieces_of

_WORD = re.compile(r"[^\W_]+")


def pieces(contract: Text, text: str) -> list[str]:
    """One a token, in order, at most ``contract.length``: words, or of bytes characters, each at its first byte.

    Of a public vocabulary, which is not here, nothing. The words are those that ``models/text_records`` takes a token of (a
    test holds both together).
    """
    if contract.tokens == "bytes":
        found = []
        for character in text:
            found += [character, *[""] * (len(character.encode("utf-8", "replace")) - 1)]
        return found[: contract.length]
    if contract.tokens == "public-vocabulary":
        return []
    if contract.tokens == "given-words":
        return given_words(text)[: contract.length]
    if contract.tokens == "hashed-pieces":
        return list(itertools.islice(pieces_of(text), contract.length))
    words = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
    return [str(word) for word in words[: contract.length]]
