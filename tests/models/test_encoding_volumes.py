"""Volumes -> encoded records: the window, the mean over areas, what is refused. And several views of a record."""

from __future__ import annotations

import numpy as np
import pytest

from medfed.data_contract import Image
from medfed.errors import DataError
from medfed.models.image_records import encode_views
from medfed.models.volume_records import Scan, encode_volumes
from medfed.volume_part import Volume

VALUES = {
    "column": "scan",
    "depth": 4,
    "height": 5,
    "width": 6,
    "lower": -1000.0,
    "upper": 1000.0,
    "center": 0.5,
    "scale": 0.25,
}
VOLUME = Volume.model_validate({**VALUES, "resize": "refuse"})
ANY_SIZE = Volume.model_validate({**VALUES, "resize": "area"})
VIEWS = Image.model_validate({"column": "films", "height": 8, "width": 8, "center": 0.5, "scale": 0.25, "views": 3})


def test_values_are_windowed_centered_and_scaled() -> None:
    values = np.full((4, 5, 6), 0, np.int16)
    values[0, 0, :3] = -3000, -500, 3000
    (found,) = encode_volumes(VOLUME, [Scan(values)], [2])
    assert found.shape == (1, 4, 5, 6) and found.dtype == np.float32
    assert found[0, 0, 0, :4].tolist() == [-2.0, -1.0, 2.0, 0.0]
    (scaled,) = encode_volumes(VOLUME, [Scan(values, slope=2.0, intercept=500.0)], [2])
    assert scaled[0, 0, 0, :4].tolist() == [-2.0, -1.0, 2.0, 1.0]


def test_other_size_is_brought_by_averaging_or_refused() -> None:
    generator = np.random.default_rng(1)
    large = generator.integers(-900, 900, (8, 15, 12)).astype(np.int16)
    (found,) = encode_volumes(ANY_SIZE, [Scan(large)], [2])
    means = large.reshape(4, 2, 5, 3, 6, 2).mean((1, 3, 5))
    assert np.allclose(found[0], ((means + 1000.0) / 2000.0 - 0.5) / 0.25, atol=1e-5)
    with pytest.raises(DataError, match=r"MF-301 row 7, column scan.* 4 x 5 x 6 voxels"):
        encode_volumes(VOLUME, [Scan(large)], [7])


def test_small_scan_is_enlarged_and_keeps_its_mean() -> None:
    small = np.arange(24, dtype=np.int16).reshape(2, 3, 4) * 10
    (found,) = encode_volumes(ANY_SIZE, [Scan(small)], [2])
    assert found.mean() == pytest.approx(((small.mean() + 1000.0) / 2000.0 - 0.5) / 0.25, abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_value_that_is_no_finite_number_is_refused(bad: float) -> None:
    values = np.zeros((4, 5, 6), np.float32)
    values[1, 2, 3] = bad
    with pytest.raises(DataError, match=r"MF-301 row 2, column scan.*no finite number"):
        encode_volumes(VOLUME, [Scan(values)], [2])


def test_views_stand_where_the_cell_names_them_and_the_last_plane_says_which_are_there() -> None:
    films = [np.full((8, 8), grey, np.uint8) for grey in (255, 0, 255)]
    found = encode_views(VIEWS, ["a.png;;b.png", "c.png"], films, [2, 3])
    assert found.shape == (2, 4, 8, 8)
    assert found[:, :3, 0, 0].tolist() == [[2.0, 0.0, -2.0], [2.0, 0.0, 0.0]]
    assert found[:, 3].reshape(2, -1)[:, :3].tolist() == [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert found[:, 3].sum() == 3.0


@pytest.mark.parametrize(("cell", "words"), [("; ;", "names no image"), ("a.png;b.png;c.png;d.png", "more than 3")])
def test_cell_without_images_or_with_too_many_is_refused(cell: str, words: str) -> None:
    with pytest.raises(DataError, match=f"MF-301 row 2, column films.*{words}"):
        encode_views(VIEWS, [cell], [np.zeros((8, 8), np.uint8)] * 4, [2])
