"""Records of several parts: what is there, what may be lacking, and that a part that is not there has no say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from medfed.errors import DataError
from medfed.models.catalogue import build
from medfed.models.records import encode_records
from medfed.models.series_records import Measurements
from medfed.study import Study

MakeStudy = Callable[..., Study]
PIN = {"first_model_sha256": "ab" * 32}
VARIABLE = {
    "unit": "",
    "minimum": 0.0,
    "maximum": 300.0,
    "center": 80.0,
    "scale": 10.0,
    "outside": "clip",
    "name": "pulse",
}
BLOCK = {
    "prefix": "g",
    "count": 2,
    "unit": "",
    "minimum": -5.0,
    "maximum": 5.0,
    "center": 0.0,
    "scale": 1.0,
    "outside": "refuse",
}
PARTS = {
    "data.image": {"column": "film", "height": 8, "width": 8, "center": 0.5, "scale": 0.5},
    "data.series": {"steps": 2, "step_hours": 1.0, "variables": [VARIABLE], "fill": "forward"},
    "data.text": {"column": "note", "tokens": "bytes", "buckets": 256, "length": 8},
    "data.block": BLOCK,
    "data.mixed": {"may_lack": ["image", "series", "block"]},
}
MODEL = {"name": "fusion", "width": 4, "image_channels": [4], "groups": 2, "embedding_size": 3, **PIN}
COLUMNS: dict[str, list[str]] = {
    "age": ["60", "80"],
    "lactate": ["2", "2"],
    "ventilated": ["no", "yes"],
    "ill": ["0", "1"],
    "film": ["a.png", ""],
    "note": ["ab", "c"],
    "g1": ["1", ""],
    "g2": ["-2", ""],
}


@pytest.fixture
def study(make_study: MakeStudy) -> Study:
    return make_study({**PARTS, "model": {**MODEL, "how": "hybrid"}})


def encoded(study: Study, columns: Mapping[str, list[str]]) -> np.ndarray:
    series = Measurements(np.array([0]), np.array([0.5]), np.array([[90.0]]), np.array([2]))
    films = [np.full((8, 8), 255, np.uint8)]
    return encode_records(study, ["p", "q"], columns, images=films, series=series).inputs


def test_record_holds_flags_features_and_each_part_in_order(study: Study) -> None:
    first, second = encoded(study, COLUMNS)
    assert study.data.shape == first.shape == (4 + 3 + 64 + 6 + 8 + 2,)
    assert first[:4].tolist() == [1, 1, 1, 1]
    assert first[7:71].tolist() == [1.0] * 64
    assert first[71:77].tolist() == [1, 1, 1, 1, 0, 0]  # carried forward, not observed, behind the stay
    assert first[77:85].tolist() == [1 + ord("a"), 1 + ord("b"), 0, 0, 0, 0, 0, 0]
    assert first[85:].tolist() == [1, -2]
    assert second[:4].tolist() == [0, 0, 1, 0]
    assert second[4] == 1.0
    assert not second[7:77].any()
    assert not second[85:].any()


def test_part_that_may_not_lack_is_an_error_by_row_and_column(study: Study) -> None:
    with pytest.raises(DataError, match=r"MF-301 .*row 2, column note: value is missing"):
        encoded(study, {**COLUMNS, "note": ["ab", ""]})


@pytest.mark.parametrize(("cell", "fault"), [("x", "is not a number"), ("9", "is outside"), ("", "is missing")])
def test_faulty_number_of_a_block_is_refused_by_row_and_column(study: Study, cell: str, fault: str) -> None:
    with pytest.raises(DataError, match=rf"MF-301 .*row 1, column g2: value {fault}"):
        encoded(study, {**COLUMNS, "g2": [cell, ""]})


@pytest.mark.parametrize("how", ["early", "late", "hybrid"])
def test_part_that_is_not_there_has_no_say(make_study: MakeStudy, how: str) -> None:
    study = make_study({**PARTS, "model": {**MODEL, "how": how}})
    torch.manual_seed(2)
    model = build(study)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape)
    records = torch.from_numpy(encoded(study, COLUMNS))
    changed = records.clone()
    changed[1, 7:71] = 3.0  # the image that the second record has not
    assert torch.equal(model(records), model(changed))
    changed[0, 7:71] = 3.0
    assert (model(records)[0] != model(changed)[0]).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.mixed": {"may_lack": ["text", "text"]}}, "listed twice"),
        ({"data.block": None, "data.mixed": {"may_lack": ["block"]}}, "no record has"),
        ({"data.mixed": None}, "goes with"),
    ],
)
def test_contract_of_parts_that_do_not_fit_is_refused(
    make_study: MakeStudy, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make_study({**PARTS, "model": {**MODEL, "how": "early"}, **changes})
