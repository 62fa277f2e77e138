"""Grey images to one fixed shape: exact values, exact averages, each image by itself."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medfed.data_contract import Image
from medfed.errors import DataError
from medfed.models.image_records import Pixels, encode_images


def contract(**changes: object) -> Image:
    plain = {"column": "film", "height": 8, "width": 8, "center": 0.5, "scale": 0.25, "resize": "area"}
    return Image.model_validate(plain | changes)


def encode(image: Pixels, **changes: object) -> NDArray[np.float32]:
    (encoded,) = encode_images(contract(**changes), [image], [2])
    return encoded[0]


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_black_is_0_and_white_is_1_before_center_and_scale(dtype: type, white: int) -> None:
    image = np.zeros((8, 8), dtype)
    image[0, 0], image[7, 3] = white, white // 5
    encoded = encode(image)
    assert encoded.dtype == np.float32
    assert encoded[0, 0] == 2.0 and encoded[1, 1] == -2.0
    assert encoded[7, 3] == np.float32((0.2 - 0.5) / 0.25)


def test_image_of_the_contracts_size_is_taken_as_it_is_whatever_resize_says() -> None:
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    expected = ((image / 255 - 0.5) / 0.25).astype(np.float32)
    assert np.array_equal(encode(image), expected)
    assert np.array_equal(encode(image, resize="refuse"), expected)


def test_whole_blocks_are_averaged() -> None:
    image = np.kron(np.arange(64).reshape(8, 8), np.array([[0, 2], [2, 0]])).astype(np.uint8)  # blocks of mean v
    assert np.array_equal(encode(image), encode(np.arange(64, dtype=np.uint8).reshape(8, 8)))


def overlaps(sources: int, targets: int) -> list[list[Fraction]]:
    """How much of each target pixel's length lies in each source pixel, by the definition."""

    def overlap(source: int, target: int) -> Fraction:
        low = max(Fraction(source, sources), Fraction(target, targets))
        high = min(Fraction(source + 1, sources), Fraction(target + 1, targets))
        return max(Fraction(0), high - low) * targets

    return [[overlap(source, target) for source in range(sources)] for target in range(targets)]


def areas(image: Pixels, height: int, width: int) -> list[list[Fraction]]:
    """The mean over each target pixel's rectangle, in exact fractions."""
    down, across = overlaps(image.shape[0], height), overlaps(image.shape[1], width)
    cells = image.tolist()
    return [
        [
            sum(
                y_share * x_share * cells[i][j]
                for i, y_share in enumerate(y_shares)
                if y_share
                for j, x_share in enumerate(x_shares)
                if x_share
            )
            for x_shares in across
        ]
        for y_shares in down
    ]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_areas_are_averaged_exactly(height: int, width: int, dtype: type, seed: int) -> None:
    white = np.iinfo(dtype).max
    image = np.random.default_rng(seed).integers(0, white, (height, width), dtype, endpoint=True)
    expected = [[float(area / white) for area in row] for row in areas(image, 8, 9)]
    assert np.array_equal(encode(image, width=9, center=0.0, scale=1.0), np.array(expected, np.float32))


def test_largest_image_of_all_white_stays_exact() -> None:
    assert np.all(encode(np.full((1 << 13, 1 << 10), 65535, np.uint16), center=0.0, scale=1.0) == 1.0)


def test_image_is_encoded_alike_in_any_company() -> None:
    random = np.random.default_rng(1)
    images = [random.integers(0, 256, (random.integers(5, 40), random.integers(5, 40)), np.uint8) for _ in range(7)]
    together = encode_images(contract(), images, range(7))
    assert together.shape == (7, 1, 8, 8)
    for index, image in enumerate(images):
        assert np.array_equal(together[index, 0], encode(image))


def test_images_are_taken_one_by_one() -> None:
    asked = []

    def images() -> object:
        for index in range(3):
            asked.append(index)
            yield np.zeros((8, 8 if index < 2 else 9), np.uint8)

    with pytest.raises(DataError, match="row 4, column film"):
        encode_images(contract(resize="refuse"), images(), [2, 3, 4])
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("shape", [(8, 9), (9, 8), (16, 16), (1, 64)])
def test_other_size_is_refused_where_it_is_not_to_be_changed(shape: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"row 2, column film: .* another size than 8 x 8 pixels") as caught:
        encode(np.zeros(shape, np.uint8), resize="refuse")
    assert caught.value.code == 301


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8)), np.zeros((0, 8), np.uint8), np.zeros((8, 8), np.int16)]
)
def test_what_is_no_grey_image_is_refused(image: Pixels) -> None:
    with pytest.raises(DataError, match="no grey image") as caught:
        encode(image)
    assert caught.value.code == 301


def test_no_records_give_no_images() -> None:
    assert encode_images(contract(), [], []).shape == (0, 1, 8, 8)
