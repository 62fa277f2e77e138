"""What a tagging model found in new texts, entity by entity: for people who do not read chances of tags."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medfed.models.tasks.tagging import decoded, spans
from medfed.models.text_records import given_words
from medfed.task_choice import Tagging

ENTITIES_NAME = "entities.csv"
_HEAD = ["row", "patient", "record", "entity", "first_word", "last_word", "words", "least_probability"]


def entity_table(
    task: Tagging,
    predictions: NDArray[np.float64],
    texts: Sequence[str],
    named: Sequence[tuple[int, str, str]],
) -> bytes:
    """A line an entity: where it stands (words count from 1), and the chance of its least sure tag.

    ``predictions``: float64[n, words, tags]; ``texts``: what they were made from; ``named``: row, patient and record of each.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_HEAD)
    words = [given_words(text)[: predictions.shape[1]] for text in texts]
    ends = np.array([len(found) for found in words], np.int64)
    tags = decoded(predictions, np.arange(predictions.shape[1]) < ends[:, None])
    for ids, text, found, chances in zip(named, words, tags, predictions, strict=True):
        for first, end, entity in spans(found[: len(text)]):
            sure = chances[np.arange(first, end), found[first:end]].min()
            said = " ".join(text[first:end])
            writer.writerow([*ids, task.entities[entity], first + 1, end, said, f"{sure:.4f}"])
    return out.getvalue().encode()
