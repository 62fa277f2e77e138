"""A tag for each word of a text: which words name an entity, and where one begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medfed.data_contract import DataContract
from medfed.models.cells import fault
from medfed.models.rowwise import softmax
from medfed.models.tasks.classification import cross_entropies
from medfed.models.tasks.meaning import Floats, Labels, Losses, Scores
from medfed.models.text_records import given_words
from medfed.task_choice import Tagging

OUTSIDE = 0  # the tag O; entity k = 0, 1, ... begins with 1 + 2 k and goes on with 2 + 2 k
NO_WORD = -1

Span = tuple[int, int, int]
"""(first word, word behind the last, entity)."""


@dataclass(frozen=True, slots=True)
class TaggingMeaning:
    """Outputs are logits float[n, words, tags]; labels int64[n, words], ``NO_WORD`` behind a text's end.

    Words that the contract's ``length`` cuts off are neither trained on nor counted.
    """

    task: Tagging
    primary = "f1_entity"
    chance = 0.0

    def labels(self, data: DataContract, columns: Mapping[str, Sequence[str]], rows: Sequence[int]) -> Labels:
        if data.text is None:
            raise ValueError("a tagging task is of a text")
        known = {tag: number for number, tag in enumerate(self.task.tags)}
        cells, texts = columns[self.task.label], columns[data.text.column]
        labels = np.full((len(cells), data.text.length), NO_WORD, np.int64)
        for record, (row, cell, text) in enumerate(zip(rows, cells, texts, strict=True)):
            tags, words = cell.split(), given_words(text)
            if len(tags) != len(words):
                raise fault(row, self.task.label, "has not one tag a word", "part words, and tags, by blanks")
            if not known.keys() >= set(tags):
                raise fault(row, self.task.label, "holds a tag that the study does not know", "use the study's tags")
            labels[record, : len(tags)] = [known[tag] for tag in tags[: data.text.length]]
        return labels

    def unlabelled(self, data: DataContract, count: int) -> Labels:
        return np.full((count, data.shape[0]), NO_WORD, np.int64)

    def made_up_labels(self, data: DataContract, generator: torch.Generator, count: int) -> Tensor:
        shape = (count, data.shape[0])
        tags = torch.empty(shape, dtype=torch.int64).random_(self.task.outputs, generator=generator)
        ends = torch.empty(count, 1, dtype=torch.int64).random_(1, shape[1] + 1, generator=generator)
        return torch.where(torch.arange(shape[1]) < ends, tags, NO_WORD)

    def strata(self, labels: Labels) -> Labels:
        """Whether a text names anything."""
        return np.asarray((labels > OUTSIDE).any(1), np.int64)

    def losses(self) -> Losses:
        """The mean over a text's words of each one's cross-entropy, times the tag's weight; 0 of a text without a word."""
        return self._mean_over_words(cross_entropies)

    def plain_losses(self) -> Losses:
        return self._mean_over_words(lambda logits, tags: functional.cross_entropy(logits, tags, reduction="none"))

    def _mean_over_words(self, each_word: Losses) -> Losses:
        weights = torch.tensor(self.task.tag_weights or [1.0] * self.task.outputs, dtype=torch.float64)

        def losses(logits: Tensor, labels: Tensor) -> Tensor:
            is_word = labels != NO_WORD
            tags = labels.clamp(min=0)
            shares = weights.to(logits)[tags] * is_word / is_word.sum(1, keepdim=True).clamp(min=1)
            return (each_word(logits.flatten(0, 1), tags.flatten()).view(labels.shape) * shares).sum(1)

        return losses

    def predictions(self, outputs: Floats) -> Floats:
        """The probability of each tag of each word, float64[n, words, tags]."""
        flat = softmax(outputs.reshape(-1, outputs.shape[-1]))
        return np.asarray(flat, np.float64).reshape(outputs.shape)

    def metrics(self, predictions: Floats, labels: Labels) -> Scores:
        """Of whole entities, found exactly from first to last word (as conlleval counts): ``f1_entity``, ``precision_entity``,
        ``recall_entity``; and ``accuracy``, the share of words with the right tag."""
        found = decoded(predictions, labels != NO_WORD)
        is_word = labels != NO_WORD
        named = [set(spans(tags[words])) for tags, words in zip(found, is_word, strict=True)]
        actual = [set(spans(tags[words])) for tags, words in zip(labels, is_word, strict=True)]
        right = sum(len(one & other) for one, other in zip(named, actual, strict=True))
        names, entities = sum(map(len, named)), sum(map(len, actual))
        return {
            "f1_entity": 2 * right / (names + entities) if names + entities else None,
            "precision_entity": right / names if names else None,
            "recall_entity": right / entities if entities else None,
            "accuracy": float((found == labels)[is_word].mean()) if is_word.any() else None,
        }


def decoded(predictions: Floats, is_word: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Labels:
    """The most probable tags of each text, int64[n, words], of those in which an entity goes on only where it began.

    ``predictions``: float64[n, words, tags]; ``is_word``: bool[n, words], true from the first on. ``NO_WORD`` behind the end.
    *Source* Viterbi 1967, each word's tags independent but for what may follow what.
    """
    with np.errstate(divide="ignore"):
        scores = np.log(predictions)
    tags = np.arange(predictions.shape[2])
    goes_on = (tags > OUTSIDE) & (tags % 2 == 0)
    allowed = ~goes_on[None] | (tags[None] == tags[:, None]) | (tags[None] == tags[:, None] + 1) & ~goes_on[:, None]
    best, before = np.where(goes_on, -np.inf, scores[:, 0]), np.zeros(predictions.shape, np.int64)
    for word in range(1, predictions.shape[1]):
        ways = np.where(allowed, best[:, :, None], -np.inf)  # [n, tag before, tag]
        before[:, word] = ways.argmax(1)
        best = np.where(is_word[:, word, None], ways.max(1) + scores[:, word], best)
    found = np.full(is_word.shape, NO_WORD, np.int64)
    tag = best.argmax(1)
    for word in reversed(range(predictions.shape[1])):
        here = is_word[:, word]
        found[:, word] = np.where(here, tag, NO_WORD)
        tag = np.where(here, np.take_along_axis(before[:, word], tag[:, None], 1)[:, 0], tag)
    return found


def spans(tags: Labels) -> list[Span]:
    """Entities in the tags int64[words] of one text; one that goes on without having begun, begins there, as for conlleval."""
    found: list[Span] = []
    first, entity = 0, None
    for word, tag in enumerate([*tags.tolist(), OUTSIDE]):
        here = None if tag <= OUTSIDE else (tag - 1) // 2
        goes_on = here is not None and here == entity and tag % 2 == 0
        if entity is not None and not goes_on:
            found.append((first, word, entity))
        if not goes_on:
            first, entity = word, here
    return found
