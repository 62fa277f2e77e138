"""Parameters as flat vectors and safetensors files; nothing else is read, and nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from torch import nn

from medfed.errors import ConfigError, MedfedError
from medfed.models.parameters import assign, count, file_hash, flatten, from_safetensors, to_safetensors, trainable
from medfed.models.tabular import logistic_regression, mlp


def model() -> nn.Module:
    torch.manual_seed(5)
    return mlp(3, 2, [4])


SIZE = 3 * 4 + 4 + 4 * 2 + 2


def file(**changes: np.ndarray) -> bytes:
    tensors = {name: parameter.detach().numpy().copy() for name, parameter in trainable(model())}
    return bytes(save(tensors | {name.replace("__", "."): value for name, value in changes.items()}))


def refused(code: int, data: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        from_safetensors(model(), data)
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ flat vectors


def test_flat_vector_is_every_parameter_in_the_models_order() -> None:
    one = model()
    flat = flatten(one)
    assert flat.dtype == np.float32
    assert count(one) == SIZE == flat.size
    assert flat[:12].tolist() == one[0].weight.detach().ravel().tolist()
    assert flat[-2:].tolist() == one[2].bias.detach().tolist()


def test_flat_vector_assigned_is_read_again() -> None:
    one, other = model(), mlp(3, 2, [4])
    assign(other, flatten(one))
    assert np.array_equal(flatten(other), flatten(one))
    x = torch.ones(2, 3)
    assert torch.equal(one(x), other(x))


def test_assigned_vector_is_copied() -> None:
    """A later change of the vector must not change the model."""
    one, flat = model(), np.arange(SIZE, dtype=np.float32)
    assign(one, flat)
    flat[:] = 0
    assert np.array_equal(flatten(one), np.arange(SIZE, dtype=np.float32))


def test_frozen_parameters_stay_out_of_the_vector() -> None:
    one = model()
    one[0].weight.requires_grad_(False)
    before = one[0].weight.detach().clone()
    assert count(one) == SIZE - 12
    assign(one, np.zeros(SIZE - 12, np.float32))
    assert torch.equal(one[0].weight, before)


# ------------------------------------------------------------------------------------------------------- safetensors


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=SIZE, max_size=SIZE))
def test_file_written_is_read_again(values: list[float]) -> None:
    flat = np.array(values, np.float32)
    assert from_safetensors(model(), to_safetensors(model(), flat)).tobytes() == flat.tobytes()


def test_same_weights_give_the_same_file() -> None:
    """A study pins the file's hash, so it must not depend on anything but the weights."""
    assert to_safetensors(model(), flatten(model())) == to_safetensors(model(), flatten(model())) == file()
    assert file_hash(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_file_of_another_model_is_refused() -> None:
    for other in (mlp(3, 2, [5]), mlp(4, 2, [4]), logistic_regression(3, 2)):
        refused(152, to_safetensors(other, flatten(other)))


def test_file_with_other_tensors_is_refused() -> None:
    refused(152, file(more=np.zeros(1, np.float32)))
    refused(152, bytes(save({})))
    refused(152, bytes(save({"0.weight": np.zeros((4, 3), np.float32)})))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8, np.bool_])
def test_tensor_of_another_type_is_refused(dtype: type) -> None:
    refused(152, file(**{"2__bias": np.zeros(2, dtype)}))


@pytest.mark.parametrize("shape", [(3,), (1, 2), (2, 1), (0,), ()])
def test_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    refused(152, file(**{"2__bias": np.zeros(shape, np.float32)}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    refused(153, file(**{"2__bias": np.array([0, bad], np.float32)}))


# ------------------------------------------------------------------------------------------------- malformed, hostile


class Bomb:
    """Runs code when it is unpickled: makes a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (self.path,))

    def __init__(self, path: Path) -> None:
        self.path = str(path)


def hostile(folder: Path) -> dict[str, bytes]:
    pickled = io.BytesIO()
    torch.save({"0.weight": torch.zeros(4, 3), "x": Bomb(folder / "ran")}, pickled)
    older = io.BytesIO()
    torch.save({"x": Bomb(folder / "ran")}, older, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("model.safetensors", file())
    return {"pt": pickled.getvalue(), "pickle": older.getvalue(), "zip": archive.getvalue()}


@pytest.mark.parametrize("kind", ["pt", "pickle", "zip"])
def test_pickle_and_archive_are_refused_unopened(tmp_path: Path, kind: str) -> None:
    refused(151, hostile(tmp_path)[kind])
    assert not (tmp_path / "ran").exists()


def test_pickle_of_the_test_above_would_run_code(tmp_path: Path) -> None:
    """The positive control: the harmless marker appears once somebody unpickles."""
    torch.load(io.BytesIO(hostile(tmp_path)["pt"]), weights_only=False)
    assert (tmp_path / "ran").exists()


def raw(header: object, body: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        bytes(8),
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 100) + b"{}",
        raw(b"not json"),
        raw(b"\xff\xfe"),
        raw([]),
        raw({"a": 1}),
        raw({"a": tensor(0, 4, [2])}, bytes(4)),
        raw({"a": tensor(0, 8, [2])}, bytes(4)),
        raw({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
        raw({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12)),
        raw({"a": tensor(0, 4, [1])}, bytes(5)),
        raw({"a": tensor(4, 0, [1])}, bytes(4)),
        raw({"a": tensor(0, 4, [1], "F99")}, bytes(4)),
        raw({"a": tensor(0, 4, [1 << 62, 1 << 62])}, bytes(4)),
        raw(b"[" * 10_000),
    ],
    ids=range(18),
)
def test_malformed_file_is_refused(data: bytes) -> None:
    """Overlap, hole, false type, trailing bytes, sizes that overflow, nesting."""
    refused(151, data)


def test_damaged_file_raises_medfed_errors_only() -> None:
    whole = file()
    rng = np.random.default_rng(2)
    outcomes = set()
    for _ in range(600):
        data = bytearray(whole)
        match int(rng.integers(3)):
            case 0:
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            case 1:
                del data[int(rng.integers(len(data))) :]
            case _:
                data[int(rng.integers(200))] ^= 1 << int(rng.integers(8))
        try:
            from_safetensors(model(), bytes(data))
            outcomes.add(0)
        except MedfedError as error:
            outcomes.add(error.code)
    assert {0, 151, 152} <= outcomes <= {0, 151, 152, 153}
