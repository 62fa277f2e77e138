"""Changed copies of images: what each change does, and that a copy depends on its own image and draws alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.models.augmentation import augmented
from medfed.study import Augmentation

Words = Callable[[int], NDArray[np.uint64]]
LOW, HIGH = 0, (1 << 64) - 1  # draws of -1 and nearly 1


def constant(word: int) -> Words:
    return lambda count: np.full(count, word, np.uint64)


def seeded(seed: int) -> Words:
    return lambda count: np.random.default_rng(seed).integers(0, 1 << 64, count, np.uint64)


def pictures(count: int = 3, planes: int = 2, height: int = 6, width: int = 5) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(count, planes, height, width)).astype(np.float32)


def only_copy(words: Words, image: NDArray[np.float32], **settings: object) -> NDArray[np.float32]:
    return augmented(Augmentation.model_validate({"copies": 2, **settings}), image[None], words)[1]


def test_first_copy_is_the_image_itself() -> None:
    images = pictures()
    every = {"shift": 2.0, "turn_degrees": 20.0, "flip": True, "crop": 0.2, "contrast": 0.3, "brightness": 0.5}
    found = augmented(Augmentation.model_validate({"copies": 4, **every, "quarter_turns": False}), images, seeded(3))
    assert found.shape == (12, 2, 6, 5)
    assert np.array_equal(found[::4], images)
    assert not np.isclose(found[1::4], images).all()
    assert np.isfinite(found).all()


def test_copy_without_any_change_asked_for_is_the_image() -> None:
    images = pictures()
    assert np.array_equal(augmented(Augmentation(copies=3), images, seeded(1)), np.repeat(images, 3, axis=0))


def test_flip_exchanges_left_and_right_every_other_time() -> None:
    image = pictures(1)[0]
    assert np.array_equal(only_copy(constant(LOW), image, flip=True), image[:, :, ::-1])
    assert np.array_equal(only_copy(constant(HIGH), image, flip=True), image)


def test_shift_moves_by_pixels_and_repeats_the_edge() -> None:
    image = pictures(1)[0]
    found = only_copy(constant(LOW), image, shift=1.0)  # what lies one up and one to the left comes to each place
    assert np.allclose(found[:, 1:, 1:], image[:, :-1, :-1], atol=1e-6)
    assert np.allclose(found[:, 0, 1:], image[:, 0, :-1], atol=1e-6)


def test_quarter_turns_of_a_square_turn_it() -> None:
    image = pictures(1, height=5)[0]
    assert np.array_equal(only_copy(constant(HIGH), image, quarter_turns=True), np.rot90(image, 3, axes=(1, 2)))


def test_turn_by_half_a_circle_agrees_with_two_quarter_turns() -> None:
    image = pictures(1)[0]
    found = only_copy(constant(LOW), image, turn_degrees=180.0)
    assert np.allclose(found, np.rot90(image, 2, axes=(1, 2)), atol=1e-5)


def test_crop_enlarges_the_middle() -> None:
    ramp = np.tile(np.arange(9, dtype=np.float32), (1, 9, 1))
    found = only_copy(constant(HIGH), ramp, crop=0.5)
    assert np.allclose(found[0, 4], 4.0 + 0.5 * (np.arange(9) - 4.0), atol=1e-5)


def test_contrast_and_brightness_are_linear_in_the_encoded_values() -> None:
    image = pictures(1)[0]
    assert np.allclose(only_copy(constant(LOW), image, contrast=0.5, brightness=0.25), 0.5 * image - 0.25, atol=1e-6)


def test_copy_is_a_function_of_its_image_and_its_own_draws_alone() -> None:
    """To the last bit: with the same draws, an image's copies are the same beside any other images."""
    asked = Augmentation(copies=3, shift=2.0, turn_degrees=25.0, flip=True, crop=0.2, contrast=0.2, brightness=0.1)
    images = pictures(5)
    drawn = seeded(9)(5 * 3 * 8)
    together = augmented(asked, images, lambda count: drawn[:count])
    for place in range(5):
        own = drawn[place * 24 : place * 24 + 24]
        alone = augmented(asked, images[place : place + 1], lambda count, own=own: own[:count])
        assert np.array_equal(alone, together[3 * place : 3 * place + 3])


@pytest.mark.parametrize("key", ["shift", "crop", "brightness"])
def test_draws_differ_from_copy_to_copy(key: str) -> None:
    bounds = {"shift": 2.0, "crop": 0.4, "brightness": 1.0}
    found = augmented(Augmentation.model_validate({"copies": 4, key: bounds[key]}), pictures(2), seeded(4))
    assert len({copy.tobytes() for copy in found}) == 8
