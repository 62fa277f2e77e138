"""Changed copies in a step: they are records of their patient, averaged before the clip, so that the bound of a patient stays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from medfed.client.policy import Policy
from medfed.client.trainer import chosen_rows, gradient_sum, number_patients, with_copies
from medfed.errors import MedfedError
from medfed.models.catalogue import build
from medfed.models.parameters import flatten
from medfed.models.records import Records
from medfed.privacy.gradients.engine import CLIPPING_MARGIN
from medfed.study import Study

MakeStudy = Callable[..., Study]
PIN = {"first_model_sha256": "ab" * 32}
IMAGE = {"column": "film", "height": 8, "width": 8, "center": 0.5, "scale": 0.25}
COPIES = {"copies": 3, "shift": 2.0, "flip": True, "contrast": 0.2}
CNN = {"name": "cnn", "channels": [4], "first_stride": 2, "groups": 2, "head": "places", **PIN}
KEY = hashlib.sha512(b"a step").digest()


def study_of(make_study: MakeStudy, augmentation: dict[str, object] | None, **changes: object) -> Study:
    values = {"data.features": [], "data.image": IMAGE, "model": CNN, "privacy.sampling_rate": 1.0, **changes}
    return make_study({**values, **({} if augmentation is None else {"training.augmentation": augmentation})})


def films(counts: list[int]) -> Records:
    generator = np.random.default_rng(2)
    ids = np.repeat(np.arange(len(counts)), counts)
    inputs = generator.normal(size=(len(ids), 1, 8, 8)).astype(np.float32)
    return Records(inputs, generator.integers(0, 2, len(ids)), tuple(f"p{number}" for number in ids))


def weights_of(study: Study) -> NDArray[np.float32]:
    """As after some training: the last layer begins at zero, and what is before it has no gradient then."""
    return flatten(build(study)) + np.random.default_rng(4).normal(0.0, 0.3, 1000)[: flatten(build(study)).size].astype(
        np.float32
    )


def test_copies_belong_to_the_patient_of_their_record(make_study: MakeStudy) -> None:
    study = study_of(make_study, COPIES, **{"data.max_records_per_patient": 2})
    patients = number_patients(study, films([1, 3, 2]))
    rows = chosen_rows(study, patients, KEY)
    copied, places = with_copies(study, (patients, rows), KEY)
    assert np.array_equal(places, np.arange(3 * len(rows)))
    assert np.array_equal(copied.unit, np.repeat(patients.unit[rows], 3))
    assert copied.count == patients.count
    assert np.array_equal(copied.records.inputs[::3], patients.records.inputs[rows])
    assert np.array_equal(copied.records.labels, np.repeat(patients.records.labels[rows], 3))
    assert np.bincount(copied.unit).tolist() == [3, 6, 6]


def test_copies_are_drawn_from_the_secret_key_and_from_nothing_else(make_study: MakeStudy) -> None:
    study = study_of(make_study, COPIES)
    patients = number_patients(study, films([1, 1]))
    part = (patients, np.arange(2))
    again, other = (with_copies(study, part, key)[0].records.inputs for key in (KEY, KEY[::-1]))
    assert np.array_equal(with_copies(study, part, KEY)[0].records.inputs, again)
    assert not np.array_equal(again, other)


def test_patient_with_copies_moves_the_sum_by_the_mean_clipped_once(make_study: MakeStudy) -> None:
    """Against each copy by itself: one patient's share is the clipped mean over the copies, at most C."""
    study = study_of(make_study, COPIES, **{"privacy.clipping_norm": 0.05})
    model, weights = build(study), weights_of(study)
    patients = number_patients(study, films([1]))
    share = gradient_sum(study, model, weights, patients, sampling_key=KEY)
    plain = study_of(make_study, None, **{"privacy.clipping_norm": 1000.0})
    copied, _ = with_copies(study, (patients, np.arange(1)), KEY)
    each = [
        gradient_sum(
            plain,
            model,
            weights,
            number_patients(plain, Records(copied.records.inputs[[place]], copied.records.labels[[place]], ("p",))),
            sampling_key=KEY,
        )
        for place in range(3)
    ]
    mean = np.mean(each, axis=0)
    assert np.linalg.norm(mean) > 0.05, "it must be clipped for this to say anything"
    assert np.linalg.norm(share) <= 0.05
    bound = 0.05 / (1 + CLIPPING_MARGIN)
    assert np.linalg.norm(share - bound * mean / np.linalg.norm(mean)) < 1e-6


def test_step_that_no_patient_is_in_gives_zeros(make_study: MakeStudy) -> None:
    study = study_of(make_study, COPIES, **{"privacy.sampling_rate": 1e-9})
    share = gradient_sum(
        study, build(study), weights_of(study), number_patients(study, films([1, 1])), sampling_key=KEY
    )
    assert not share.any()


def test_volumes_are_changed_slice_by_slice_alike(make_study: MakeStudy) -> None:
    volume = {
        "column": "scan",
        "depth": 4,
        "height": 8,
        "width": 8,
        "lower": 0.0,
        "upper": 1.0,
        "center": 0.5,
        "scale": 1.0,
    }
    model = {"name": "cnn3d", "channels": [4], "first_stride": 2, "groups": 2, "head": "mean", **PIN}
    changes = {"data.volume": {**volume, "resize": "refuse"}, "model": model, "training.augmentation": COPIES}
    study = make_study({"data.features": [], **changes})
    plane = np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32)
    inputs = np.broadcast_to(plane, (1, 1, 4, 8, 8)).copy()
    patients = number_patients(study, Records(inputs, np.zeros(1, np.int64), ("a",)))
    copied = with_copies(study, (patients, np.arange(1)), KEY)[0].records.inputs
    assert copied.shape == (3, 1, 4, 8, 8)
    assert not np.array_equal(copied[1], copied[0])
    assert all(np.array_equal(copied[:, :, place], copied[:, :, 0]) for place in range(4))


def test_study_without_augmentation_says_nothing_of_it(make_study: MakeStudy) -> None:
    """Studies approved before the key existed keep their hash."""
    assert "augmentation" not in study_of(make_study, None).model_dump()["training"]
    assert "augmentation" in study_of(make_study, COPIES).model_dump()["training"]


def test_tables_are_not_augmented(make_study: MakeStudy) -> None:
    with pytest.raises(ValidationError, match="augmentation is for images"):
        make_study({"training.augmentation": COPIES})


def test_which_views_are_there_is_the_same_in_every_copy(make_study: MakeStudy) -> None:
    model = {"name": "multi-view", "channels": [4], "first_stride": 2, "groups": 2, "head": "mean", **PIN}
    study = study_of(
        make_study,
        COPIES,
        **{"data.image": {**IMAGE, "views": 2}, "model": {**model, "pooling": "mean", "attention_size": 2}},
    )
    inputs = np.random.default_rng(3).normal(size=(2, 3, 8, 8)).astype(np.float32)
    inputs[:, 2] = 0.0
    inputs[0, 2, 0, :2] = 1.0
    patients = number_patients(study, Records(inputs, np.zeros(2, np.int64), ("a", "b")))
    copied, _ = with_copies(study, (patients, np.arange(2)), KEY)
    assert np.array_equal(copied.records.inputs[:, 2], np.repeat(inputs[:, 2], 3, axis=0))
    assert not np.array_equal(copied.records.inputs[1, :2], inputs[0, :2])


@pytest.mark.parametrize("kind", ["image", "views", "volume"])
def test_quarter_turns_of_what_is_not_square_are_refused(kind: str, make_study: MakeStudy) -> None:
    """A copy would not fit, and only where somebody was sampled: that it failed would tell of that."""
    turns = {"copies": 2, "quarter_turns": True}
    image = {**IMAGE, "width": 10, **({"views": 2} if kind == "views" else {})}
    volume = {
        "column": "scan",
        "depth": 8,
        "height": 8,
        "width": 10,
        "lower": 0.0,
        "upper": 1.0,
        "center": 0.5,
        "scale": 0.25,
    }
    pooled = {"name": "multi-view", "channels": [4], "first_stride": 2, "groups": 2, "head": "mean", "pooling": "mean"}
    deep = {"name": "cnn3d", "channels": [4], "first_stride": 2, "groups": 2, "head": "mean", **PIN}
    changes: dict[str, dict[str, object]] = {
        "image": {"data.image": image},
        "views": {"data.image": image, "model": {**pooled, "attention_size": 4, **PIN}},
        "volume": {"data.image": None, "data.volume": {**volume, "resize": "refuse"}, "model": deep},
    }
    with pytest.raises(ValidationError, match="quarter_turns need images as high as wide"):
        study_of(make_study, turns, **changes[kind])


def test_copies_count_against_the_hospitals_cap_of_records(make_study: MakeStudy) -> None:
    study = study_of(make_study, {"copies": 8, "flip": True})
    policy = Policy(
        max_epsilon_study=100.0,
        max_epsilon_lifetime=100.0,
        lifetime_delta=0.001,
        max_delta=0.01,
        min_noise_multiplier=0.3,
        min_hospitals=3,
        min_honest=2,
        min_colluders=1,
        modes=["local", "distributed"],
        units=["patient"],
        tasks=["binary"],
        models=["cnn"],
        max_sampling_rate=1.0,
        max_attempts=1000,
        max_records_per_patient=8 * study.data.max_records_per_patient,
    )
    policy.admit(study)
    with pytest.raises(MedfedError, match=r"MF-134 .* changed copies counted"):
        policy.model_copy(update={"max_records_per_patient": policy.max_records_per_patient - 1}).admit(study)
