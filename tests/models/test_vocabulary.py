"""Word pieces of a public vocabulary: the longest first, the file that the study pins and no other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from medfed.client.policy import DataSection
from medfed.client.sources.hospital_records import read_records
from medfed.data_contract import Text
from medfed.errors import ConfigError
from medfed.models.text_records import encode_texts
from medfed.models.vocabulary import Vocabulary, read_vocabulary
from medfed.seams import SystemFiles

PIECES = [
    "[PAD]",
    "[UNK]",
    "heart",
    "heart##",
    "card",
    "##io",
    "##myo",
    "##pathy",
    "##pat",
    "##hy",
    ",",
    "1",
    "##2",
    "_",
    "é",
]
FILE = "\n".join([*PIECES, *(f"[unused{number}]" for number in range(256 - len(PIECES)))]).encode() + b"\n"
SHA256 = hashlib.sha256(FILE).hexdigest()


def contract(**changes: object) -> Text:
    plain = {
        "column": "note",
        "tokens": "public-vocabulary",
        "buckets": 256,
        "length": 12,
        "vocabulary_sha256": SHA256,
    }
    return Text.model_validate(plain | changes)


def pieces(text: str) -> list[str]:
    vocabulary = read_vocabulary(contract(), FILE)
    names = {token: piece for piece, token in vocabulary.tokens.items()}
    return [names[int(token)] for token in encode_texts(contract(), [text], [2], vocabulary)[0] if token]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("heart", ["heart"]),
        ("Cardiomyopathy, heart", ["card", "##io", "##myo", "##pathy", ",", "heart"]),
        ("12 1_", ["1", "##2", "1", "_"]),
        ("e\u0301", ["é"]),
        ("cardiology heart", ["[UNK]", "heart"]),  # a part that is known does not save the rest
        ("hearts", ["[UNK]"]),
        ("x" * 1000 + " heart", ["[UNK]", "heart"]),
    ],
)
def test_longest_piece_is_taken_first(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


def test_token_is_the_line_and_0_is_padding() -> None:
    found = encode_texts(contract(), ["heart , heart", "heart " * 20], [2, 3], read_vocabulary(contract(), FILE))
    assert found.dtype == np.int64
    assert found.tolist() == [[3, 11, 3] + [0] * 9, [3] * 12]


def test_another_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="MF-203 the vocabulary is not the one that the study names"):
        read_vocabulary(contract(), FILE + b"more\n")


@pytest.mark.parametrize("file", [FILE.replace(b"[UNK]", b"[WHAT]"), FILE + b"heart\n", FILE + b"new\n", b"", b"\xff"])
def test_file_that_is_no_vocabulary_of_this_size_is_refused(file: bytes) -> None:
    with pytest.raises(ConfigError, match="MF-203 the vocabulary does not have 256 different lines"):
        read_vocabulary(contract(vocabulary_sha256=hashlib.sha256(file).hexdigest()), file)


def test_lines_may_end_as_windows_has_it() -> None:
    file = FILE.replace(b"\n", b"\r\n")
    found = read_vocabulary(contract(vocabulary_sha256=hashlib.sha256(file).hexdigest()), file)
    assert isinstance(found, Vocabulary) and found.tokens == read_vocabulary(contract(), FILE).tokens


def test_hash_goes_with_a_public_vocabulary_only_and_other_contracts_are_written_as_before() -> None:
    for changes in ({"vocabulary_sha256": None}, {"tokens": "hashed-words"}):
        with pytest.raises(ValidationError, match="vocabulary_sha256 goes with public-vocabulary"):
            contract(**changes)
    plain = contract(tokens="hashed-words", vocabulary_sha256=None)
    assert plain.model_dump() == {"column": "note", "tokens": "hashed-words", "buckets": 256, "length": 12}


def test_hospital_reads_its_copy_and_says_what_is_missing(make_study, tmp_path: Path) -> None:
    text = contract().model_dump()
    model = {
        "name": "text-cnn",
        "embedding_size": 4,
        "widths": [2],
        "channels": 3,
        "first_model_sha256": "ab" * 32,
    }
    study = make_study({"data.features": [], "data.text": text, "model": model})
    (tmp_path / "patients.csv").write_text("who,note,ill\np1,Heart.,1\n", "utf-8")
    (tmp_path / "vocabulary.txt").write_bytes(FILE)
    section = {"path": "patients.csv", "patient_column": "who"}
    named = DataSection.model_validate(section | {"vocabulary": "vocabulary.txt"})
    found = read_records(SystemFiles(), tmp_path, named, study)
    assert found.inputs.tolist() == [[3, 2] + [0] * 10]
    with pytest.raises(ConfigError, match=r"MF-203 hospital\.toml names no vocabulary: write vocabulary"):
        read_records(SystemFiles(), tmp_path, DataSection.model_validate(section), study)
