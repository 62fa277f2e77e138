"""The data contract: one kind of record a study, of a stated shape; contradictions are refused when the file is read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from medfed.data_contract import MOST_VALUES, DataContract

AGE = {
    "name": "age",
    "kind": "number",
    "unit": "years",
    "minimum": 0.0,
    "maximum": 120.0,
    "center": 60.0,
    "scale": 20.0,
    "outside": "refuse",
}
WARD = {"name": "ward", "kind": "category", "levels": ["a", "b", "c"], "center": 0.0, "scale": 1.0}
FILM = {"column": "film", "height": 28, "width": 32, "center": 0.5, "scale": 0.25}
PULSE = {
    "name": "pulse",
    "unit": "1/min",
    "minimum": 0.0,
    "maximum": 300.0,
    "center": 80.0,
    "scale": 20.0,
    "outside": "clip",
}
COURSE = {"steps": 48, "step_hours": 1.0, "variables": [PULSE, PULSE | {"name": "pH"}], "fill": "center"}
NOTE = {"column": "note", "tokens": "hashed-words", "buckets": 1024, "length": 64}

BITS = {"column": "smiles", "bits": 128, "radius": 2, "center": 0.0, "scale": 1.0}
GENES = {
    "prefix": "gene_",
    "count": 70,
    "unit": "",
    "minimum": -9.0,
    "maximum": 9.0,
    "center": 0.0,
    "scale": 1.0,
    "outside": "clip",
}


def contract(features: list[object], **parts: object) -> DataContract:
    return DataContract.model_validate({"max_records_per_patient": 1, "features": features} | parts)


@pytest.mark.parametrize(
    ("features", "parts", "kind", "shape"),
    [
        ([AGE, WARD], {}, "table", (3,)),
        ([], {"image": FILM}, "image", (1, 28, 32)),
        ([], {"series": COURSE}, "series", (48, 5)),
        ([AGE, WARD], {"series": COURSE}, "series", (48, 8)),
        ([], {"text": NOTE}, "text", (64,)),
        ([], {"molecule": {"column": "smiles", "atoms": 9, "larger": "cut"}}, "molecule", (9, 49)),
        ([], {"fingerprint": BITS}, "fingerprint", (128,)),
        ([], {"events": {"buckets": 64, "length": 5}}, "events", (5, 2)),
        ([AGE], {"mixed": {"may_lack": ["text"]}, "image": FILM, "text": NOTE}, "mixed", (2 + 1 + 28 * 32 + 64,)),
        ([AGE, WARD], {"mixed": {"may_lack": []}, "series": COURSE, "block": GENES}, "mixed", (2 + 3 + 48 * 5 + 70,)),
    ],
)
def test_record_has_one_kind_and_shape(
    features: list[object], parts: dict[str, object], kind: str, shape: tuple[int, ...]
) -> None:
    found = contract(features, **parts)
    assert (found.kind, found.shape) == (kind, shape)


LARGE = [PULSE | {"name": f"v{place}"} for place in range(1024)]


@pytest.mark.parametrize(
    ("features", "parts", "what"),
    [
        ([], {}, "must not be empty"),
        ([AGE, AGE], {}, "listed twice"),
        ([AGE], {"image": FILM}, "features go with a table or a series"),
        ([AGE], {"text": NOTE}, "features go with a table or a series"),
        ([], {"image": FILM, "text": NOTE}, "a record is one of"),
        ([], {"series": COURSE, "text": NOTE}, "a record is one of"),
        ([], {"series": COURSE | {"variables": [PULSE, PULSE]}}, "listed twice"),
        ([], {"series": COURSE | {"variables": []}}, "variables"),
        ([], {"series": COURSE | {"variables": [PULSE | {"minimum": 300.0}]}}, "below maximum"),
        ([], {"series": COURSE | {"steps": 4096, "variables": LARGE}}, f"more than {MOST_VALUES}"),
        ([], {"series": COURSE | {"step_hours": 0.0}}, "step_hours"),
        ([], {"text": NOTE | {"tokens": "bytes"}}, "buckets = 256"),
        ([], {"image": FILM | {"height": 1025}}, "height"),
        ([], {"image": FILM | {"scale": 0.0}}, "scale"),
        ([], {"fingerprint": BITS, "text": NOTE}, "a record is one of"),
        ([AGE], {"fingerprint": BITS}, "features go with a table or a series"),
        ([AGE], {"block": GENES}, "goes with"),
        ([], {"mixed": {"may_lack": []}, "text": NOTE}, "two at least"),
        ([AGE], {"mixed": {"may_lack": []}}, "two at least"),
        ([AGE], {"mixed": {"may_lack": []}, "text": NOTE, "fingerprint": BITS}, "two at least"),
        ([AGE], {"mixed": {"may_lack": ["image"]}, "text": NOTE}, "no record has"),
    ],
)
def test_contradiction_is_refused(features: list[object], parts: dict[str, object], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        contract(features, **parts)


def test_parts_that_came_later_are_left_out_where_unset() -> None:
    """Studies that were approved before these existed keep their hash."""
    written = contract([AGE]).model_dump(mode="json")
    assert set(written) == {"max_records_per_patient", "features", "image", "series", "text"}
    assert "fingerprint" in contract([], fingerprint=BITS).model_dump(mode="json")
