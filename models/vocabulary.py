"""A public vocabulary of word pieces from a file that every hospital has a copy of; the study pins its hash.

One token a line, as of BERT's models; line k is token k, 0 stays padding. A piece that goes on inside a word begins with ``##``.

*Source* WordPiece, greedy longest match first: Wu et al. 2016 (arXiv:1609.08144); Devlin et al. 2019 (arXiv:1810.04805).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from medfed.data_contract import Text
from medfed.errors import ConfigError

UNKNOWN = "[UNK]"
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
_LONGEST_WORD = 100


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """``tokens``: of each piece its token, 1 for that of the first line."""

    tokens: dict[str, int]

    def tokens_of(self, text: str) -> Iterator[int]:
        """The tokens of a text in form NFKC and lower case; a word that cannot be put together from pieces is ``UNKNOWN``."""
        for match in _WORD.finditer(unicodedata.normalize("NFKC", text).lower()):
            yield from self._pieces(match.group())

    def _pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word) <= _LONGEST_WORD:
            mark = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self.tokens), None)
            if end is None:
                break
            found.append(self.tokens[mark + word[start:end]])
            start = end
        return found if start == len(word) else [self.tokens[UNKNOWN]]


def read_vocabulary(contract: Text, file: bytes) -> Vocabulary:
    """The vocabulary that a study pins. Raises ``ConfigError`` MF-203 if ``file`` is another, or none: it must have ``buckets``
    different lines, ``[UNK]`` among them."""
    if hashlib.sha256(file).hexdigest() != contract.vocabulary_sha256:
        raise ConfigError(203, "the vocabulary is not the one that the study names", "ask the coordinator for its file")
    lines = file.decode("utf-8", "replace").split("\n")
    lines = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    tokens = {line: number for number, line in enumerate(lines, 1)}
    if len(tokens) != len(lines) or UNKNOWN not in tokens or len(lines) != contract.buckets:
        what = f"the vocabulary does not have {contract.buckets} different lines with {UNKNOWN} among them"
        raise ConfigError(203, what, "plan the study with buckets as the file has lines")
    return Vocabulary(tokens)
