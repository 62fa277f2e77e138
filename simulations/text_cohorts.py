"""The public cohorts of tagged texts, split into hospitals and into training and test patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.errors import DataError
from medfed.seams import Files
from medfed.simulations.datasets import DATASETS, find
from medfed.simulations.extract import PATIENT_COLUMN, Cohort, Extract, Hospital

_DEALT = 5  # hospitals, where the patients' own are not known
_MOST_WORDS = 64  # of a record

Sentence = tuple[str, str]
"""Its words, and a tag for each, both parted by blanks."""


def ncbi_disease(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """The NCBI disease corpus: sentences of abstracts, the names of diseases in them tagged.

    Trained on the corpus's own training and development parts, tested on its test part. Training sentences of the same words
    as a test sentence are left out. A sentence of more than ``_MOST_WORDS`` words is several records of the same patient; no
    entity of the corpus lies across.
    """
    train, development, test = (_sentences(files, path) for path in find(files, "ncbi-disease"))
    seen = {words for words, _ in test}
    kept = [sentence for sentence in [*train, *development] if sentence[0] not in seen]
    pieces = [(place, *piece) for place, sentence in enumerate([*kept, *test]) for piece in _pieces(sentence)]
    columns = {
        PATIENT_COLUMN: tuple(f"sentence-{place:04d}" for place, _, _ in pieces),
        "words": tuple(words for _, words, _ in pieces),
        "tags": tuple(tags for _, _, tags in pieces),
    }
    count = _DEALT if hospitals is None else hospitals
    owner = np.array([place for place, _, _ in pieces], np.int64)
    left_out = len(train) + len(development) - len(kept)
    return Cohort(
        "ncbi-disease",
        "ncbi-disease",
        1e-5,
        _dealt(Extract(columns), owner, len(kept), count, seed),
        f"the corpus's own test part; {left_out} training sentences of the same words are left out; sentences dealt to "
        f"{count} hospitals by seed {seed}. Each sentence counts as a patient: the files do not say which abstract it is of",
        DATASETS["ncbi-disease"].source,
        seed,
    )


def _pieces(sentence: Sentence) -> list[Sentence]:
    words, tags = (cell.split(" ") for cell in sentence)
    starts = range(0, len(words), _MOST_WORDS)
    return [(" ".join(words[at : at + _MOST_WORDS]), " ".join(tags[at : at + _MOST_WORDS])) for at in starts]


def _dealt(extract: Extract, owner: NDArray[np.int64], train: int, count: int, seed: int) -> tuple[Hospital, ...]:
    """Sentences dealt in turn in the order that the seed gives, each with all of its records. ``owner``: int64[n] of each
    record, the first ``train`` of them to train on."""
    generator = np.random.default_rng(seed)
    sentences = int(owner.max()) + 1
    training, test = generator.permutation(train), generator.permutation(np.arange(train, sentences))

    def rows(chosen: NDArray[np.int64]) -> Extract:
        place = np.full(sentences, -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        mine = np.flatnonzero(place[owner] >= 0)
        return extract.rows(mine[np.argsort(place[owner[mine]], kind="stable")])

    return tuple(Hospital(f"hospital-{i + 1}", rows(training[i::count]), rows(test[i::count])) for i in range(count))


def _sentences(files: Files, path: Path) -> list[Sentence]:
    """Of a file in the form of CoNLL: a word, a tab and its tag a line, an empty line behind each sentence."""
    blocks = files.read(path).decode("utf-8").replace("\r\n", "\n").strip("\n").split("\n\n")
    found = []
    for block in blocks:
        cells = [line.split("\t") for line in block.split("\n")]
        if any(len(pair) != 2 or not all(pair) or any(map(str.isspace, "".join(pair))) for pair in cells):
            raise DataError(301, f"{path.name} is not the file it should be", "medfed-simulate fetch ncbi-disease")
        words, tags = zip(*cells, strict=True)
        found.append((" ".join(words), " ".join(tags)))
    return found
