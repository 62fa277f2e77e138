"""The bag of words against numpy, and the pieces that its texts are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medfed.data_contract import Text
from medfed.models.text_bag import TextBag
from medfed.models.text_pieces import pieces
from medfed.models.text_records import encode_texts, hashed_word, pieces_of

CONTRACT = Text(column="note", tokens="hashed-pieces", buckets=256, length=8)


def bag(outputs: int = 3) -> TextBag:
    torch.manual_seed(2)
    model = TextBag(257, outputs)
    torch.nn.init.normal_(model.embedding.weight)
    return model


def test_logits_are_the_documented_sum_over_distinct_tokens() -> None:
    model, tokens = bag(), torch.tensor([[7, 9, 7, 7, 3, 0, 0], [5, 0, 0, 0, 0, 0, 0]])
    table = model.embedding.weight.detach().numpy()
    expected = [(np.sqrt(3) * table[7] + table[9] + table[3]) / np.sqrt(5), table[5]]
    np.testing.assert_allclose(model(tokens).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_exported_model_counts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = bag(), torch.tensor([[7, 9, 7, 7, 3, 0, 0], [5, 5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    expected = model(tokens)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(model(tokens), expected)


def test_order_of_the_words_and_padding_change_nothing() -> None:
    model, tokens = bag(), torch.tensor([[7, 9, 7, 3, 0]])
    expected = model(tokens)
    torch.testing.assert_close(model(tokens[:, [3, 2, 0, 1, 4]]), expected)
    torch.testing.assert_close(model(torch.cat([tokens, torch.zeros_like(tokens)], 1)), expected)


def test_text_without_a_token_has_logits_of_zero_and_no_gradient() -> None:
    model = bag()
    logits = model(torch.zeros(1, 4, dtype=torch.int64))
    assert not logits.any()
    (gradient,) = torch.autograd.grad(logits.sum(), model.embedding.weight)
    assert not gradient.any()


def test_gradient_of_a_text_has_the_length_of_that_by_its_logits() -> None:
    """Every text has length 1, whatever its size: what the clipping norm sees is how wrong the model is."""
    model = bag(1)
    for tokens in ([[7, 9, 7, 7, 3, 0, 0]], [[5]], [[11] * 40]):
        (gradient,) = torch.autograd.grad(model(torch.tensor(tokens)).sum(), model.embedding.weight)
        torch.testing.assert_close(torch.linalg.vector_norm(gradient), torch.tensor(1.0))


def test_model_begins_with_equal_chances() -> None:
    assert not TextBag(257, 3)(torch.tensor([[7, 9]])).any()


def test_pieces_of_long_words_stand_beside_them_and_short_words_are_left_out() -> None:
    text = "The HEPATITIS was mild"
    expected = ["hepatitis", "hepat-", "-titis", "mild"]
    assert list(pieces_of(text)) == pieces(CONTRACT, text) == expected
    tokens = encode_texts(CONTRACT, [text], [2])
    assert tokens.tolist() == [[*[hashed_word(piece, 256) for piece in expected], 0, 0, 0, 0]]


def test_text_of_short_words_alone_keeps_them() -> None:
    assert list(pieces_of("no MI")) == ["no", "mi"]
