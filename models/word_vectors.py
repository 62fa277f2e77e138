"""Public word vectors, such as GloVe's, as the first rows of the embedding of a model of hashed words.

The file is the text form of GloVe and word2vec: a word and its numbers a line, parted by blanks, the most frequent word first; a
first line with two whole numbers is word2vec's heading. A study pins what comes of it by the hash of its first model.

*Source* Pennington et al. 2014 (GloVe); Mikolov et al. 2013 (word2vec).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from medfed.data_contract import DataContract
from medfed.errors import ConfigError
from medfed.model_choice import ModelChoice, Tagger, TextCnn, Transformer
from medfed.models.text_records import tokens_of_word
from medfed.models.warm_start import WarmStart

EMBEDDING = "embedding.weight"
_SPREAD = 0.1  # root mean square of the first rows: as small as random ones begin, so that training can still move them


@dataclass(frozen=True, slots=True, eq=False)
class VectorStart:
    """``start``: what ``take_over`` takes; ``words``: how many of the file's have a row, and ``shared``: how many had none left,
    as a more frequent word has the same hash; ``skipped``: lines whose word is none of the contract's, such as punctuation."""

    start: WarmStart
    words: int
    shared: int
    skipped: int


def vector_start(data: DataContract, model: ModelChoice, file: bytes) -> VectorStart:
    """First weights whose embedding begins with the vectors of ``file``; all else, and rows without a word, is drawn.

    Rows are scaled to one root mean square together; those without a word are drawn from the file's hash: the same file gives the
    same rows everywhere. Raises ``ConfigError`` MF-203 for a model or contract without hashed words, for a file that is not of
    such lines, for vectors of another length than the model's ``embedding_size``.
    """
    text = data.text
    if text is None or text.tokens == "bytes" or not isinstance(model, Transformer | TextCnn | Tagger):
        raise ConfigError(203, "word vectors are for a model of hashed words", "leave the word vectors out")
    drawn = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(file).digest()[:7], "big"))
    rows = torch.empty(text.buckets + 1, model.embedding_size).normal_(generator=drawn).numpy()
    has_word, shared, skipped = np.zeros(len(rows), np.bool_), 0, 0
    for word, vector in _lines(file, model.embedding_size):
        tokens = tokens_of_word(text, word)
        if len(tokens) != 1:
            skipped += 1
        elif has_word[tokens[0]]:
            shared += 1
        else:
            has_word[tokens[0]], rows[tokens[0]] = True, vector
    words = int(has_word.sum())
    if not words:
        raise ConfigError(
            203, "the file of word vectors holds no word", "name a file in the text form of GloVe or word2vec"
        )
    size = float(np.sqrt(np.square(rows[has_word], dtype=np.float64).mean()))
    rows[has_word] *= np.float32(_SPREAD / max(size, 1e-30))
    rows[~has_word] *= np.float32(_SPREAD)
    return VectorStart(WarmStart(save({EMBEDDING: rows}), partly=True), words, shared, skipped)


def _lines(file: bytes, size: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for number, line in enumerate(file.decode("utf-8", "replace").splitlines(), 1):
        cells = line.rstrip().split(" ")
        if number == 1 and len(cells) == 2:
            continue
        try:
            vector = np.array(cells[1:], np.float32)
        except ValueError:
            raise _fault(number, size) from None
        if vector.shape != (size,) or not np.isfinite(vector).all():
            raise _fault(number, size)
        yield cells[0], vector


def _fault(number: int, size: int) -> ConfigError:
    what = f"line {number} of the word vectors is not a word and {size} numbers, the model's embedding_size"
    return ConfigError(203, what, "name another file, or set embedding_size to the length of its vectors")
