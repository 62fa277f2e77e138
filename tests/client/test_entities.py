"""The table of entities that predictions of tags come to."""

from __future__ import annotations

import csv
import io

import numpy as np

from medfed.client.entities import entity_table
from medfed.task_choice import Tagging

TASK = Tagging(kind="tagging", label="tags", entities=["Disease", "Drug"])


def test_entities_are_listed_with_their_words_places_and_least_chance() -> None:
    sure = np.full((2, 6, 5), 0.01)
    for record, tags in enumerate([[1, 2, 0, 3, 0, 0], [0, 0, 1, 1, 1, 1]]):
        for word, tag in enumerate(tags):
            sure[record, word, tag] = 0.96 - 0.1 * word
    sure /= sure.sum(2, keepdims=True)
    texts = ["breast  cancer under aspirin .", "no illness"]
    rows = list(
        csv.DictReader(io.StringIO(entity_table(TASK, sure, texts, [(2, "p,1", "a"), (3, "p2", "b")]).decode()))
    )
    assert [(row["row"], row["patient"], row["record"]) for row in rows] == [("2", "p,1", "a")] * 2
    assert [(row["entity"], row["words"]) for row in rows] == [("Disease", "breast cancer"), ("Drug", "aspirin")]
    assert [(row["first_word"], row["last_word"]) for row in rows] == [("1", "2"), ("4", "4")]
    assert float(rows[0]["least_probability"]) == round(sure[0, 1, 2], 4)


def test_text_longer_than_the_study_takes_is_cut_where_the_model_stopped() -> None:
    sure = np.full((1, 2, 3), 0.1)
    sure[0, :, 1] = 0.8
    task = Tagging(kind="tagging", label="tags", entities=["Disease"])
    rows = list(csv.DictReader(io.StringIO(entity_table(task, sure, ["a b c d"], [(2, "p", "r")]).decode())))
    assert [row["words"] for row in rows] == ["a", "b"]
