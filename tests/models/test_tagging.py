"""Tags of words: labels that fit their words, a loss of each record's own words, whole entities counted as conlleval counts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.data_contract import WORD_PARTS, DataContract
from medfed.errors import DataError
from medfed.models.catalogue import build
from medfed.models.made_up import made_up_records
from medfed.models.tasks import losses, meaning
from medfed.models.tasks.tagging import NO_WORD, decoded, spans
from medfed.models.text_records import encode_texts, word_parts
from medfed.privacy.gradients.layers import without_rule
from medfed.privacy.gradients.slot_test import settle_taped_batch
from medfed.study import Study
from medfed.task_choice import Tagging

TASK = Tagging(kind="tagging", label="tags", entities=["Disease", "Drug"])
WEIGHTED = TASK.model_copy(update={"tag_weights": [1.0, 3.0, 2.0, 0.5, 4.0]})
TEXT = {"column": "words", "tokens": "given-words", "buckets": 4096, "length": 8}
DATA = DataContract.model_validate({"max_records_per_patient": 1, "features": [], "text": TEXT})
LONGEST = 8


def labels_of(text: str, tags: str) -> list[int]:
    return [int(tag) for tag in meaning(TASK).labels(DATA, {"words": [text], "tags": [tags]}, [5])[0]]


def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    labels = meaning(TASK).made_up_labels(DATA, generator, count)
    return torch.randn(count, LONGEST, TASK.outputs, generator=generator), labels


def test_tags_are_numbered_in_the_order_of_the_task_and_end_with_the_text() -> None:
    assert labels_of("breast cancer under aspirin .", "B-Disease I-Disease O B-Drug O") == [1, 2, 0, 3, 0, -1, -1, -1]
    assert labels_of("w " * 10, "O " * 9 + "B-Drug") == [0] * 8
    assert meaning(TASK).unlabelled(DATA, 2).tolist() == [[NO_WORD] * 8] * 2


@pytest.mark.parametrize(
    ("text", "tags", "said"),
    [
        ("one two", "O", "has not one tag a word"),
        ("one", "O O", "has not one tag a word"),
        ("one two", "O B-Gene", "holds a tag that the study does not know"),
        ("one", "o", "holds a tag that the study does not know"),
    ],
)
def test_tags_that_do_not_fit_are_refused_by_row_and_column(text: str, tags: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"MF-301 row 5, column tags: value {said}") as caught:
        labels_of(text, tags)
    assert "Gene" not in str(caught.value)


def test_loss_is_the_mean_over_a_texts_own_words() -> None:
    logits, labels = drawn(5)
    chances = torch.log_softmax(logits.double(), 2).numpy()
    for task, weights in ((TASK, [1.0] * 5), (WEIGHTED, [1.0, 3.0, 2.0, 0.5, 4.0])):
        for record, found in enumerate(losses(task)(logits, labels).tolist()):
            words = [int(tag) for tag in labels[record] if tag != NO_WORD]
            each = [-weights[tag] * chances[record, word, tag] for word, tag in enumerate(words)]
            assert found == pytest.approx(sum(each) / len(words), rel=1e-5)
    assert losses(TASK)(logits[:1], torch.full((1, LONGEST), NO_WORD)).tolist() == [0.0]


@pytest.mark.parametrize("task", [TASK, WEIGHTED], ids=["plain", "weighted"])
def test_gradient_is_torchs_and_each_records_own_to_the_last_bit(task: Tagging) -> None:
    logits, labels = drawn(9)
    logits.requires_grad_()
    (found,) = torch.autograd.grad(losses(task)(logits, labels).sum(), logits)
    (plain,) = torch.autograd.grad(meaning(task).plain_losses()(logits, labels).sum(), logits)
    torch.testing.assert_close(found, plain)
    assert not found[labels == NO_WORD].any()
    for record in range(9):
        alone = logits[record : record + 1].detach().requires_grad_()
        (mine,) = torch.autograd.grad(losses(task)(alone, labels[record : record + 1]).sum(), alone)
        assert torch.equal(mine[0], found[record])


# ------------------------------------------------------------------------------------------------------ whole entities

TAGS = st.lists(st.sampled_from(["O", "B-Disease", "I-Disease", "B-Drug", "I-Drug"]), min_size=1, max_size=LONGEST)


def chunks(tags: list[str]) -> set[tuple[int, int, str]]:
    """By the rules of the script conlleval (Tjong Kim Sang, CoNLL-2000), chunk starts and ends told by pairs of tags."""
    found, begun = set(), None
    for word, (before, here) in enumerate(itertools.pairwise(["O", *tags, "O"])):
        kind_before, kind = before[2:], here[2:]
        ends = before[0] in "BI" and (here[0] in "BO" or kind_before != kind)
        starts = here[0] == "B" or (here[0] == "I" and (before[0] == "O" or kind_before != kind))
        if ends and begun is not None:
            found.add((begun, word, kind_before))
        if starts:
            begun = word
    return found


def numbers(tags: list[str]) -> np.ndarray:
    return np.array([TASK.tags.index(tag) for tag in tags] + [NO_WORD] * (LONGEST - len(tags)), np.int64)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TAGS)
def test_spans_are_those_of_conlleval(tags: list[str]) -> None:
    found = spans(numbers(tags)[: len(tags)])
    assert {(first, end, TASK.entities[entity]) for first, end, entity in found} == chunks(tags)
    assert len(found) == len(set(found))


def is_whole(tags: tuple[int, ...]) -> bool:
    """Whether entities go on only where they began."""
    return all(here % 2 or here == 0 or before in (here, here - 1) for before, here in itertools.pairwise((0, *tags)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(0, 1000))
def test_decoded_tags_are_the_most_probable_of_all_whole_ones(words: int, seed: int) -> None:
    predictions = np.random.default_rng(seed).dirichlet(np.full(TASK.outputs, 0.5), (1, LONGEST))
    is_word = np.arange(LONGEST)[None] < words
    found = decoded(predictions, is_word)[0]
    ways = [way for way in itertools.product(range(TASK.outputs), repeat=words) if is_whole(way)]
    scores = [sum(np.log(predictions[0, word, tag]) for word, tag in enumerate(way)) for way in ways]
    assert tuple(found[:words].tolist()) == ways[int(np.argmax(scores))]
    assert (found[words:] == NO_WORD).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=5))
def test_metrics_equal_a_plain_count_of_entities(pairs: list[tuple[list[str], list[str]]]) -> None:
    actual = [tags for tags, _ in pairs]
    named = [(other * 8)[: len(tags)] for tags, other in pairs]
    named = [tags if is_whole(tuple(numbers(tags)[: len(tags)])) else ["O"] * len(tags) for tags in named]
    sure = np.stack([np.eye(TASK.outputs)[np.maximum(numbers(tags), 0)] for tags in named])
    found = meaning(TASK).metrics(sure, np.stack([numbers(tags) for tags in actual]))
    hits = sum(len(chunks(a) & chunks(n)) for a, n in zip(actual, named, strict=True))
    names, entities = sum(len(chunks(n)) for n in named), sum(len(chunks(a)) for a in actual)
    assert found["precision_entity"] == (hits / names if names else None)
    assert found["recall_entity"] == (hits / entities if entities else None)
    assert found["f1_entity"] == (2 * hits / (names + entities) if names + entities else None)
    words = [a == n for one, other in zip(actual, named, strict=True) for a, n in zip(one, other, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(words) / len(words))


# --------------------------------------------------------------------------------------------------------- given words


def test_word_is_its_own_hash_and_those_of_its_parts() -> None:
    assert word_parts("Brca12") == ["brca00", "brc-", "brca-", "-00", "-a00", "-ca00", "=Aaaa00", "=Aa0"]
    contract = DATA.text
    assert contract is not None
    tokens = encode_texts(contract, ["heart failure"], [2])
    assert tokens.shape == (1, *DATA.shape) == (1, LONGEST, WORD_PARTS)
    assert tokens[0, 0, 0] == 3042 and tokens[0, 1, 0] == 1055  # as hashed words, which have no marks
    assert (tokens[0, :2] > 0).all() and not tokens[0, 2:].any()


def test_words_stand_as_they_are_given_and_any_blank_parts_them() -> None:
    contract = DATA.text
    assert contract is not None
    tokens = encode_texts(contract, ["( APC )", " (\tAPC  ) ", "\ud800 x"], [2, 3, 4])
    assert (tokens[0] == tokens[1]).all()
    assert (tokens[0, :3] > 0).all() and not tokens[0, 3:].any()
    assert (tokens[2, :2] > 0).all()


# -------------------------------------------------------------------------------------------------- the gradient engine

PIN = {"first_model_sha256": "ab" * 32}
STUDIES: dict[str, dict[str, object]] = {
    "tagger": {
        "task": {"kind": "tagging", "label": "tags", "entities": ["Disease"]},
        "data.features": [],
        "data.text": {**TEXT, "length": 24},
        "model": {"name": "tagger", "embedding_size": 4, "hidden_size": 24, "dilations": [1, 2], **PIN},
    },
    "text-cnn": {
        "data.features": [],
        "data.text": {**TEXT, "tokens": "hashed-words", "length": 24},
        "model": {"name": "text-cnn", "embedding_size": 8, "widths": [1, 3], "channels": 8, **PIN},
    },
}


@pytest.mark.parametrize("name", STUDIES)
def test_texts_models_need_no_opacus_and_take_batches_in_which_slots_are_alike_to_the_last_bit(
    make_study: Callable[..., Study], name: str
) -> None:
    study = make_study(STUDIES[name])
    torch.manual_seed(1)
    model = build(study)
    assert without_rule(model) is None
    examples = functools.partial(made_up_records, study)
    assert settle_taped_batch(model, losses(study.task), examples, device=torch.device("cpu")) == 64
