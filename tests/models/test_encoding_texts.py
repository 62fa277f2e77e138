"""Texts to tokens: the same everywhere, without a vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.data_contract import Text
from medfed.errors import DataError
from medfed.models.text_records import encode_texts


def contract(**changes: object) -> Text:
    plain = {"column": "note", "tokens": "hashed-words", "buckets": 4096, "length": 8}
    return Text.model_validate(plain | changes)


BYTES = {"tokens": "bytes", "buckets": 256}


def tokens(text: str, **changes: object) -> list[int]:
    encoded = encode_texts(contract(**changes), [text], [2])
    assert encoded.dtype == np.int64
    return [int(token) for token in encoded[0]]


def test_words_are_hashed_into_the_buckets() -> None:
    # by another tool: `printf heart | sha256sum` begins 3cb968a982080be1, 1 + that modulo 4096 is 3042
    assert tokens("heart failure") == [3042, 1055, 0, 0, 0, 0, 0, 0]
    assert tokens("heart failure", buckets=300) == [158, 151, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("text", ["Heart-Failure.", "HEART\n_failure_", "  heart\tfailure?!", "(heart/failure)"])
def test_case_and_punctuation_do_not_count(text: str) -> None:
    assert tokens(text)[:2] == [3042, 1055]


@pytest.mark.parametrize(
    ("one", "other"),
    [("\ufb01brosis", "fibrosis"), ("Caf\u00e9", "cafe\u0301"), ("\uff28eart", "heart"), ("1\u00b2", "12")],
)
def test_compatible_spellings_are_one_word(one: str, other: str) -> None:
    assert tokens(one) == tokens(other)


@pytest.mark.parametrize(
    ("text", "count"), [("10 mg/dl", 3), ("3.5", 2), ("T2DM", 1), ("心臓", 1), ("a_b", 2), ("é1", 1)]
)
def test_word_is_a_run_of_letters_and_digits(text: str, count: int) -> None:
    assert sum(token > 0 for token in tokens(text)) == count


def test_bytes_are_those_of_utf8_and_0_is_padding() -> None:
    assert tokens("Aé\n", **BYTES) == [1 + 0x41, 1 + 0xC3, 1 + 0xA9, 1 + 0x0A, 0, 0, 0, 0]


def test_long_text_is_cut() -> None:
    assert tokens("x" * 100, **BYTES) == [1 + 0x78] * 8
    assert tokens("x " * 100) == [69] * 8  # sha256 of x begins 2d711642b726b044


@pytest.mark.parametrize("text", ["", "  ", "NA", "?", "null"])
@pytest.mark.parametrize("kind", ["bytes", "hashed-words"])
def test_missing_text_is_refused(text: str, kind: str) -> None:
    with pytest.raises(DataError, match="row 2, column note: value is missing") as caught:
        tokens(text, tokens=kind, buckets=256)
    assert caught.value.code == 301


@pytest.mark.parametrize("text", ["...", "_ - _", "—", "\u0301"])
def test_text_without_a_word_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="row 2, column note: value holds no word") as caught:
        tokens(text)
    assert caught.value.code == 301


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(max_size=40).map(lambda text: "w" + text), min_size=1, max_size=5),
    kind=st.sampled_from([{}, BYTES]),
)
def test_text_has_the_same_tokens_in_any_company(texts: list[str], kind: dict[str, object]) -> None:
    together = encode_texts(contract(**kind), texts, range(len(texts)))
    assert [[int(token) for token in row] for row in together] == [tokens(text, **kind) for text in texts]
    assert together.min() >= 0 and together.max() <= (256 if kind else 4096)
    assert (together[:, 0] > 0).all()
    padding = together == 0
    assert (padding[:, 1:] >= padding[:, :-1]).all()  # nothing behind the text's end


def test_lone_surrogate_does_not_stop_the_reader() -> None:
    assert tokens("a\ud800", **BYTES)[0] == 1 + 0x61
    assert tokens("a\ud800")[0] > 0
