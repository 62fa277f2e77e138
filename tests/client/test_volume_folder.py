"""A folder of NIfTI files: voxels as nibabel reads them, upright; faults name row and column, never a file or what it holds."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

nibabel = pytest.importorskip("nibabel")

from medfed.client.sources import volumes  # noqa: E402
from medfed.client.sources.volumes import read_volumes  # noqa: E402
from medfed.errors import MedfedError  # noqa: E402
from medfed.models.volume_records import Scan  # noqa: E402
from medfed.seams import SystemFiles  # noqa: E402

SECRET = "Erika-Mustermann"
VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)  # from left to right, back to front, foot to head
PUBLIC = Path(os.environ.get("MEDFED_DATA", "")) / "nifti_nibabel"


def read(folder: Path, *names: str) -> list[Scan]:
    return list(read_volumes(SystemFiles(), folder, names, range(2, 2 + len(names)), "scan"))


def measured(scan: Scan) -> NDArray[np.float64]:
    return scan.values.astype(np.float64) * scan.slope + scan.intercept


def nifti(voxels: NDArray[np.generic] = VOXELS, affine: NDArray[np.float64] | None = None) -> bytes:
    return bytes(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine).to_bytes())


def refused(folder: Path, content: bytes, words: str) -> None:
    (folder / f"{SECRET}.nii").write_bytes(content)
    with pytest.raises(MedfedError) as caught:
        read(folder, f"{SECRET}.nii")
    assert caught.value.code == 301
    assert "row 2, column scan" in str(caught.value) and words in str(caught.value)
    assert SECRET not in str(caught.value)


def test_voxels_run_from_foot_to_head_back_to_front_left_to_right(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(nifti())
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(nifti()))
    for scan in read(tmp_path, "a.nii", "b.nii.gz"):
        assert np.array_equal(scan.values, VOXELS.transpose(2, 1, 0))


def test_scan_that_lies_otherwise_is_turned_upright(tmp_path: Path) -> None:
    """Axes head, left, front: stored from head to foot, left to right mirrored."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -2.0, -1.0, 1.5, 1.0
    stored = VOXELS.transpose(2, 0, 1)[::-1, ::-1]
    (tmp_path / "a.nii").write_bytes(nifti(np.ascontiguousarray(stored), affine))
    assert np.array_equal(read(tmp_path, "a.nii")[0].values, VOXELS.transpose(2, 1, 0))


def test_slope_and_intercept_give_what_was_measured(tmp_path: Path) -> None:
    data = bytearray(nifti())
    data[112:120] = struct.pack("<ff", 2.0, -1024.0)
    (tmp_path / "a.nii").write_bytes(bytes(data))
    assert np.array_equal(measured(read(tmp_path, "a.nii")[0]), VOXELS.transpose(2, 1, 0) * 2.0 - 1024.0)


def test_second_version_and_big_endian_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "two.nii").write_bytes(nibabel.Nifti2Image(VOXELS, np.eye(4)).to_bytes())
    header = nibabel.Nifti1Header(endianness=">")
    image = nibabel.Nifti1Image(VOXELS.astype(">i2"), np.eye(4), header)
    (tmp_path / "big.nii").write_bytes(image.to_bytes())
    for scan in read(tmp_path, "two.nii", "big.nii"):
        assert np.array_equal(scan.values, VOXELS.transpose(2, 1, 0))


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public NIfTI files are not here")
@pytest.mark.parametrize(
    "name", ["anatomical.nii", "standard.nii.gz", "someones_anatomy.nii.gz", "example_nifti2.nii.gz"]
)
def test_public_files_are_read_as_nibabel_reads_them(name: str) -> None:
    image = nibabel.as_closest_canonical(nibabel.load(PUBLIC / name))
    if len(image.shape) != 3:
        with pytest.raises(MedfedError, match=r"row 2, column scan.*several"):
            read(PUBLIC, name)
        return
    assert np.allclose(measured(read(PUBLIC, name)[0]), image.get_fdata().transpose(2, 1, 0), rtol=1e-12, atol=1e-9)


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public NIfTI files are not here")
@pytest.mark.parametrize("name", ["functional.nii", "example4d.nii.gz", "someones_epi.nii.gz"])
def test_public_files_of_several_volumes_are_refused(name: str) -> None:
    if nibabel.load(PUBLIC / name).ndim == 3:
        pytest.skip("one volume")
    with pytest.raises(MedfedError, match=r"MF-301 row 2, column scan: its file holds no volume, or several"):
        read(PUBLIC, name)


COLOURS = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "no NIfTI": (lambda: b"\x89PNG" + bytes(400), "is no NIfTI file"),
    "empty": (lambda: b"", "is no NIfTI file"),
    "a pair's header": (lambda: nifti().replace(b"n+1\0", b"ni1\0"), "is no NIfTI file"),
    "cut off": (lambda: nifti()[:-1], "is cut off"),
    "header alone": (lambda: nifti()[:348], "is cut off"),
    "several volumes": (lambda: nifti(np.zeros((2, 2, 2, 3), np.int16)), "several"),
    "a plane": (lambda: nifti(np.zeros((4, 4), np.int16)), "holds no volume"),
    "colours": (lambda: nifti(COLOURS), "does not hold real numbers"),
    "complex": (lambda: nifti(np.zeros((2, 2, 2), np.complex64)), "does not hold real numbers"),
    "unknown type": (lambda: nifti()[:70] + struct.pack("<h", 9999) + nifti()[72:], "damaged header"),
    "data inside the header": (lambda: nifti()[:108] + struct.pack("<f", 4.0) + nifti()[112:], "is cut off"),
    "absurd offset": (lambda: nifti()[:108] + struct.pack("<f", float("nan")) + nifti()[112:], ""),
    "negative side": (lambda: nifti()[:42] + struct.pack("<h", -2) + nifti()[44:], ""),
    "damaged gzip": (lambda: gzip.compress(nifti())[:20] + b"\xff" * 40, ""),
    "gzip cut off": (lambda: gzip.compress(nifti())[:-9], "is cut off"),
}


@pytest.mark.parametrize("case", CASES)
def test_fault_names_row_and_column_and_never_the_file(tmp_path: Path, case: str) -> None:
    make, words = CASES[case]
    refused(tmp_path, make(), words)


def test_header_of_more_voxels_than_are_allowed_is_refused_before_they_are_read(tmp_path: Path) -> None:
    refused(tmp_path, nifti()[:42] + struct.pack("<hhh", 30_000, 30_000, 30_000) + nifti()[48:], "more than")


def test_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "_MOST_UNPACKED", 1 << 16)
    refused(tmp_path, gzip.compress(nifti() + bytes(1 << 20)), "unpacks to too much")


def test_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedfedError, match="lies outside") as caught:
        read(tmp_path, f"../{SECRET}.nii")
    assert SECRET not in str(caught.value)
    with pytest.raises(MedfedError, match="MF-606") as caught:
        read(tmp_path, f"{SECRET}.nii")
    assert SECRET not in str(caught.value)
