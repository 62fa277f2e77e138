"""Public word vectors become first rows of an embedding: the right rows, the same everywhere, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from medfed.data_contract import DataContract
from medfed.errors import ConfigError
from medfed.model_choice import Mlp, ModelChoice, Tagger, TextCnn
from medfed.models.tagger import Tagger as TaggerModel
from medfed.models.text_cnn import TextCnn as CnnModel
from medfed.models.text_records import encode_texts
from medfed.models.warm_start import take_over
from medfed.models.word_vectors import vector_start

CNN = TextCnn(name="text-cnn", embedding_size=3, widths=[2], channels=2)
TAGGER = Tagger(name="tagger", embedding_size=3, hidden_size=4, dilations=[1])
GLOVE = b"heart 1 0 0\nfailure 0 2 0\n, 9 9 9\ncaf\xc3\xa9 0 0 -1.5\n"


def contract(tokens: str = "hashed-words", buckets: int = 4096) -> DataContract:
    text = {"column": "note", "tokens": tokens, "buckets": buckets, "length": 8}
    return DataContract.model_validate({"max_records_per_patient": 1, "features": [], "text": text})


def rows(data: DataContract, file: bytes, model: ModelChoice = CNN) -> np.ndarray:
    return load(vector_start(data, model, file).start.file)["embedding.weight"]


@pytest.mark.parametrize("file", [GLOVE, b"4 3\n" + GLOVE], ids=["glove", "word2vec"])
def test_words_of_a_text_find_their_vectors(file: bytes) -> None:
    data = contract()
    assert data.text is not None
    made = vector_start(data, CNN, file)
    assert (made.words, made.shared, made.skipped) == (3, 0, 1)
    tokens = encode_texts(data.text, ["Heart failure. CAFE\u0301"], [2])[0]
    found = rows(data, file)[tokens[:3]]
    expected = np.array([[1, 0, 0], [0, 2, 0], [0, 0, -1.5]])
    np.testing.assert_allclose(found, expected * 0.1 / np.sqrt(np.square(expected).mean()), rtol=1e-6)


def test_given_words_find_the_vector_of_the_whole_word() -> None:
    data = contract("given-words")
    assert data.text is not None
    tokens = encode_texts(data.text, ["Heart , x"], [2])[0]
    found = rows(data, GLOVE, TAGGER)[tokens[:2, 0]]
    assert found[0].argmax() == 0 and found[0, 1:].tolist() == [0, 0]
    assert found[1, 0] == found[1, 1] == found[1, 2] > 0


def test_rows_are_the_same_everywhere_and_do_not_touch_torchs_generator() -> None:
    before = torch.get_rng_state()
    assert (rows(contract(), GLOVE) == rows(contract(), GLOVE)).all()
    assert (rows(contract(), GLOVE) != rows(contract(), GLOVE + b"lung 1 1 1\n")).any()
    assert torch.equal(before, torch.get_rng_state())
    assert 0.09 < rows(contract(), GLOVE).std() < 0.11


def test_more_frequent_word_keeps_the_row() -> None:
    file = b"".join(b"w%d %d 0 1\n" % (number, number) for number in range(2000))
    made = vector_start(contract(buckets=256), CNN, file)
    assert made.words + made.shared == 2000 and made.words <= 256
    alone = rows(contract(buckets=256), b"w0 0 0 1\n")
    at = int(np.flatnonzero((alone[:, 0] == 0) & (alone[:, 1] == 0))[0])
    assert rows(contract(buckets=256), file)[at, 0] == 0


@pytest.mark.parametrize(
    "model", [CnnModel(4097, 2, 3, [2], 2), TaggerModel(4097, 8, 3, 3, 4, [1])], ids=["text-cnn", "tagger"]
)
def test_first_model_takes_the_rows_and_nothing_else(model: torch.nn.Module) -> None:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    made = take_over(model, vector_start(contract(), CNN, GLOVE).start)
    assert made.taken == ("embedding.weight",)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (name != "embedding.weight")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"heart 1 0\n", "line 1 .* 3 numbers"),
        (b"heart 1 0 0\nfailure 1 0 x\n", "line 2"),
        (b"heart 1 0 nan\n", "line 1"),
        (b", 1 0 0\n", "holds no word"),
        (b"", "holds no word"),
    ],
)
def test_file_that_holds_no_vectors_is_refused(file: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=f"MF-203 .*{said}"):
        vector_start(contract(), CNN, file)


def test_model_without_hashed_words_is_refused() -> None:
    for data, model in ((contract("bytes", 256), CNN), (contract(), Mlp(name="mlp", hidden=[4]))):
        with pytest.raises(ConfigError, match="MF-203 word vectors are for a model of hashed words"):
            vector_start(data, model, GLOVE)
