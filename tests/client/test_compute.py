"""Where gradients are computed: the choice, the line that explains it, and the way back to the processor."""

from __future__ import annotations

import logging

import pytest
import torch

from medfed.client import compute
from medfed.client.compute import GIB, Compute, choose_compute
from medfed.client.policy import ComputeSection
from medfed.errors import ConfigError
from medfed.toml_files import parse

CUDA = torch.device("cuda:0")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "medfed.client")
    return caplog


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """Torch's answers on a machine with one GPU of 16 GiB, 6 of them free; gives the fractions of memory that are set."""
    fractions: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Example GPU")
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given))
    monkeypatch.setattr(compute, "_make_exact", lambda: None)  # it would hold for the whole test process
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "set so that it is undone")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    return fractions


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:1"])
def test_without_a_gpu_it_is_the_processor_and_a_line_says_why(
    asked: str, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert choose_compute(ComputeSection(device=asked)).device == torch.device("cpu")
    (record,) = lines.records
    assert record.getMessage() == "computing on the processor: torch finds no CUDA device"
    assert record.levelno == (logging.INFO if asked == "auto" else logging.WARNING)


def test_the_processor_is_taken_where_hospital_toml_says_so(
    one_gpu: list[tuple[float, torch.device]], lines: pytest.LogCaptureFixture
) -> None:
    assert choose_compute(ComputeSection(device="cpu")).device == torch.device("cpu")
    assert lines.messages == ["computing on the processor, as hospital.toml says"]


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0"])
def test_a_usable_gpu_is_taken(
    asked: str, one_gpu: list[tuple[float, torch.device]], lines: pytest.LogCaptureFixture
) -> None:
    assert choose_compute(ComputeSection(device=asked)).device == CUDA
    assert lines.messages == ["computing on cuda:0, Example GPU"]
    assert one_gpu == []


def test_memory_is_capped(one_gpu: list[tuple[float, torch.device]]) -> None:
    assert choose_compute(ComputeSection(device="auto", memory_gib=4.0)).device == CUDA
    assert one_gpu == [(0.25, CUDA)]


@pytest.mark.parametrize(
    ("asked", "memory_gib", "why"),
    [("auto", 8.0, "cuda:0 has 6.0 GiB free of 8.0 needed"), ("cuda:1", None, "cuda:1 is not there")],
)
def test_a_gpu_that_is_full_or_missing_is_left(
    asked: str,
    memory_gib: float | None,
    why: str,
    one_gpu: list[tuple[float, torch.device]],
    lines: pytest.LogCaptureFixture,
) -> None:
    assert choose_compute(ComputeSection(device=asked, memory_gib=memory_gib)).device == torch.device("cpu")
    assert lines.messages == [f"computing on the processor: {why}"]


def test_work_that_fails_on_the_gpu_is_done_on_the_processor_and_a_line_says_so(
    lines: pytest.LogCaptureFixture,
) -> None:
    tried = []

    def work(device: torch.device) -> str:
        tried.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("what a library writes may hold anything")
        return "done"

    assert Compute(CUDA).run(work) == "done"
    assert tried == ["cuda", "cpu"]
    assert lines.messages == ["cuda:0 fails (OutOfMemoryError): this step runs on the processor"]


def test_work_that_fails_on_the_processor_fails() -> None:
    def work(device: torch.device) -> str:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        Compute().run(work)


def test_engine_is_medfeds_own_unless_opacus_is_asked_for(lines: pytest.LogCaptureFixture) -> None:
    assert choose_compute(ComputeSection(device="cpu")).engine == "bookkeeping"
    assert len(lines.messages) == 1
    assert choose_compute(ComputeSection(device="cpu", engine="opacus")).engine == "opacus"
    assert lines.messages[1] == "gradients by opacus, as hospital.toml says"


def test_engine_that_is_not_there_is_refused_in_a_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"MF-203 hospital\.toml: engine .*'auto' or 'opacus'"):
        parse(b'engine = "own"', "hospital.toml", ComputeSection)


@pytest.mark.parametrize("text", ['device = "gpu"', 'device = "cuda:"', "memory_gib = 0.0", "threads = 3"])
def test_sections_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"MF-20[23]"):
        parse(text.encode(), "hospital.toml", ComputeSection)


def test_process_settings_of_a_gpu_are_exact() -> None:
    """In a process of its own: the settings hold for all of it."""
    import subprocess
    import sys

    code = (
        "import torch; from medfed.client.compute import _make_exact; _make_exact();"
        "print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,"
        "torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False", "ieee", "ieee"]
