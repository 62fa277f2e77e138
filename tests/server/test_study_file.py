"""A study written for people reads back as the same study, whatever a record is."""

from __future__ import annotations

import tomllib
from collections.abc import Callable

import pytest

from medfed.server.study_file import render
from medfed.study import Study
from medfed.toml_files import parse

MakeStudy = Callable[..., Study]
PIN = {"first_model_sha256": "ab" * 32}
VARIABLE = {"unit": "°C\n", "minimum": -1.5, "maximum": 1e9, "center": 0.1, "scale": 3.0, "outside": "clip"}
SERIES = {
    "steps": 48,
    "step_hours": 0.5,
    "fill": "forward",
    "variables": [VARIABLE | {"name": name} for name in ("HR", "Weight", "pH")],
}
DEEP: dict[str, dict[str, object]] = {
    "table": {},
    "image": {
        "data.features": [],
        "data.image": {"column": "film", "height": 28, "width": 32, "center": 0.5, "scale": 0.25, "resize": "area"},
        "model": {"name": "cnn", "channels": [16, 32], "groups": 8, "first_stride": 1, "head": "mean", **PIN},
    },
    "series with features": {
        "data.series": SERIES,
        "model": {"name": "gru", "hidden_size": 32, "layers": 2, "summaries": False, **PIN},
    },
    "series alone": {
        "data.features": [],
        "data.series": SERIES,
        "model": {"name": "lstm", "hidden_size": 32, "layers": 2, "summaries": True, **PIN},
    },
    "text": {
        "data.features": [],
        "data.text": {"column": "note", "tokens": "hashed-words", "buckets": 1024, "length": 64},
        "model": {
            "name": "transformer",
            "embedding_size": 32,
            "heads": 4,
            "layers": 1,
            "feedforward_size": 64,
            **PIN,
        },
    },
}


@pytest.mark.parametrize("kind", DEEP)
def test_study_reads_back_equal(make_study: MakeStudy, kind: str) -> None:
    study = make_study(DEEP[kind])
    assert parse(render(study).encode(), "study.toml", Study).hash() == study.hash()


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("image", ["[data.image]"]),
        ("series with features", ["[[data.features]]"] * 3 + ["[data.series]"] + ["[[data.series.variables]]"] * 3),
        ("text", ["[data.text]"]),
    ],
)
def test_parts_of_the_contract_stand_under_heads_of_their_own(
    make_study: MakeStudy, kind: str, heads: list[str]
) -> None:
    lines = render(make_study(DEEP[kind])).splitlines()
    assert [line for line in lines if line.startswith(("[data.", "[[data."))] == heads
    assert all(len(line) < 120 for line in lines)


def test_explanations_are_comments(make_study: MakeStudy) -> None:
    text = render(make_study(DEEP["image"]))
    assert "# A grey image" in text
    assert set(tomllib.loads(text)["data"]["image"]) == {"column", "height", "width", "center", "scale", "resize"}
