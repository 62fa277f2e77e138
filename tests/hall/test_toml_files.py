"""Files that people write: every way to get them wrong gives one clear line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator

from medfed.errors import ConfigError, EnvironmentFault, ExitStatus
from medfed.seams import SystemFiles
from medfed.toml_files import LIMIT_BYTES, StrictModel, load, parse


class Unit(Enum):
    PATIENT = "patient"
    RECORD = "record"


class Privacy(StrictModel):
    epsilon: float = Field(gt=0, le=10, description="the odds may change by e to this")
    unit: Unit


class Feature(StrictModel):
    name: str
    bounds: tuple[float, float]


class Linear(StrictModel):
    kind: Literal["linear"]


class Layers(StrictModel):
    kind: Literal["mlp"]
    hidden: tuple[int, ...]


class Plan(StrictModel):
    rounds: int = Field(ge=1)
    title: str
    folder: Path
    features: tuple[Feature, ...] = Field(min_length=1)
    privacy: Privacy
    model: Annotated[Linear | Layers, Field(discriminator="kind")]

    @field_validator("title")
    @classmethod
    def _plain_title(cls, title: str) -> str:
        if "\n" in title:
            raise ValueError("must be one line")
        return title


GOOD = """
rounds = 10
title = "heart"
folder = "data"
features = [{ name = "age", bounds = [0, 120] }]
[privacy]
epsilon = 1
unit = "patient"
[model]
kind = "mlp"
hidden = [8]
"""


def refused(text: str | bytes) -> ConfigError:
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(ConfigError) as caught:
        parse(data, "plan.toml", Plan)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and line.isascii()
    assert "plan.toml" in line
    assert caught.value.exit_status is ExitStatus.USAGE
    return caught.value


def test_good_file_is_read_into_tuples_enums_and_paths() -> None:
    plan = parse(GOOD.encode(), "plan.toml", Plan)
    assert plan.features[0].bounds == (0.0, 120.0)
    assert plan.privacy.unit is Unit.PATIENT
    assert plan.folder == Path("data")


def test_byte_order_mark_of_windows_editors_is_accepted() -> None:
    assert parse(b"\xef\xbb\xbf" + GOOD.encode(), "plan.toml", Plan).rounds == 10


def test_load_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(GOOD)
    assert load(SystemFiles(), path, Plan).rounds == 10


def test_missing_and_oversized_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        load(SystemFiles(), tmp_path / "plan.toml", Plan)
    assert caught.value.code == 606
    (tmp_path / "big.toml").write_bytes(b"#" * (LIMIT_BYTES + 1))
    with pytest.raises(EnvironmentFault) as caught:
        load(SystemFiles(), tmp_path / "big.toml", Plan)
    assert caught.value.code == 609


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("rounds = 1,5", "1:11"),
        ("rounds = 1\nrounds = 2", "2:11"),
        ("rounds = 1\n[privacy]\n[privacy]\n", "3:9"),
        ("title = ", "1:9"),
        ("rounds = 1\ntitle = 'x", "2:11"),
        ("title = 'x\x1b[31m'", "1:11"),
    ],
)
def test_syntax_error_is_placed_at_line_and_column(text: str, place: str) -> None:
    error = refused(text)
    assert error.code == 201
    assert f"at {place}," in error.what


def test_doubled_key_says_so() -> None:
    assert "given twice" in refused("rounds = 1\nrounds = 2").what


def test_file_that_is_not_utf8_is_placed() -> None:
    error = refused("title = 'é'\nx = '".encode() + b"\xff'")
    assert error.code == 201
    assert "2:6" in error.what


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 60_000, "a = " + "9" * 10_000, ".".join("a" * 20_000) + " = 1", "x = " + "{a=" * 30_000]
)
def test_hostile_nesting_and_numbers_are_syntax_errors(text: str) -> None:
    assert refused(text).code == 201


@pytest.mark.parametrize(
    ("old", "new", "unknown", "hint"),
    [
        ("epsilon = 1", "epsilom = 1", "privacy.epsilom", 'did you mean "privacy.epsilon"?'),
        ("rounds = 10", "round = 10", "round", 'did you mean "rounds"?'),
        ("rounds = 10", "rounds = 10\nepsilon = 1", "epsilon", 'did you mean "privacy.epsilon"?'),
        ('name = "age"', 'nam = "age"', "features[1].nam", 'did you mean "features.name"?'),
        ("hidden = [8]", "hiden = [8]", "model.hiden", 'did you mean "model.hidden"?'),
        ("rounds = 10", "rounds = 10\nzzz = 1", "zzz", "remove it"),
        ("[model]", "[modle]", "modle", 'did you mean "model"?'),
    ],
)
def test_unknown_key_is_named_with_its_path_and_the_likely_one(old: str, new: str, unknown: str, hint: str) -> None:
    error = refused(GOOD.replace(old, new))
    assert error.code == 202
    assert f'unknown key "{unknown}"' in error.what
    assert error.remedy == hint


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rounds = 10", "", "rounds is missing"),
        ("rounds = 10", 'rounds = "three"', 'rounds must be a whole number, not "three"'),
        ("rounds = 10", "rounds = 1.5", "rounds must be a whole number, not 1.5"),
        ("rounds = 10", "rounds = true", "rounds must be a whole number, not true"),
        ("rounds = 10", "rounds = 0", "rounds must be at least 1, not 0"),
        ("rounds = 10", "rounds = 2026-01-01", 'rounds must be a whole number, not "2026-01-01"'),
        ("epsilon = 1", "epsilon = -1", "privacy.epsilon must be above 0, not -1"),
        ("epsilon = 1", "epsilon = inf", "privacy.epsilon must be a finite number, not inf"),
        ("epsilon = 1", "epsilon = nan", "privacy.epsilon must be a finite number, not nan"),
        ("epsilon = 1", "epsilon = 1e999", "privacy.epsilon must be a finite number"),
        ("epsilon = 1", "epsilon = []", "privacy.epsilon must be a number, not a list"),
        ('"patient"', '"person"', "privacy.unit must be 'patient' or 'record', not \"person\""),
        ('title = "heart"', "title = 4", "title must be text in quotes, not 4"),
        ('title = "heart"', 'title = "a\\nb"', "title must be one line"),
        ("[0, 120]", "[0]", "features[1].bounds[2] is missing"),
        ("[{ name", "[] #", "features must have at least 1 entries, not 0"),
        ("hidden = [8]", 'hidden = ["x"]', 'model.hidden[1] must be a whole number, not "x"'),
        ('kind = "mlp"', 'kind = "cnn"', "model"),
        ('[privacy]\nepsilon = 1\nunit = "patient"', "privacy = 3", "privacy must be a table, not 3"),
    ],
)
def test_wrong_value_is_said_in_plain_words(old: str, new: str, words: str) -> None:
    assert old in GOOD
    error = refused(GOOD.replace(old, new))
    assert error.code == 203
    assert words in error.what


def test_remedy_repeats_what_the_key_means() -> None:
    assert refused(GOOD.replace("epsilon = 1", "")).remedy == "add it, the odds may change by e to this"


def test_several_faults_are_counted_in_one_line() -> None:
    assert "(and 1 more)" in refused(GOOD.replace("rounds = 10", "").replace("epsilon = 1", "")).what


def test_terminal_codes_in_a_key_are_escaped() -> None:
    error = refused(GOOD.replace("rounds = 10", 'rounds = 10\n"a\\u001B[31m\\u202E" = 1'))
    assert "\\x1b[31m\\u202e" in error.what


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(GOOD)))
def test_any_bytes_give_a_plan_or_one_line(noise: bytes, position: int) -> None:
    data = GOOD.encode()[:position] + noise + GOOD.encode()[position:]
    try:
        parse(data, "plan.toml", Plan)
    except ConfigError as error:
        assert str(error).isprintable() and error.code in {201, 202, 203}


class Lenient(BaseModel):
    rounds: int


class Outer(StrictModel):
    inner: tuple[Lenient, ...]


@pytest.mark.parametrize("model", [Lenient, Outer])
def test_model_that_would_ignore_unknown_keys_is_refused(model: type[BaseModel]) -> None:
    with pytest.raises(TypeError, match="Lenient"):
        parse(b"", "plan.toml", model)
