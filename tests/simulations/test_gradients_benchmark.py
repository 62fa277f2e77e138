"""The benchmark of gradients: what its rows hold, how it pairs times, and what it refuses."""

import json
import os

import pytest
import torch

from medfed.errors import EnvironmentFault
from medfed.simulations.benchmarks import gradients, gradients_memory
from medfed.simulations.benchmarks.__main__ import main
from medfed.simulations.benchmarks.gradients_families import FAMILIES, QUICK, TINY
from medfed.simulations.benchmarks.gradients_peers import PEERS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def told():
    """The benchmark of a tiny family through all of its code, with few rounds and without the processes for memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "FEWEST_ROUNDS", 2)
        patch.setattr(gradients, "MOST_ROUNDS", 2)
        patch.setattr(gradients_memory, "growth_mb", lambda name, case, mode, batch: float(len(mode)))
        return gradients.run([TINY], [5], "cpu", "float32", quick=True)


def test_row_holds_what_was_promised(told):
    (row,) = told["rows"]
    promised = "model batch device plain_ms opacus_ms engine_ms ratio_plain speedup_opacus memory_growth_mb"
    more = (
        "plain_memory_growth_mb opacus_hooks_ms opacus_ghost_ms first_step_ms rounds precision clipped_share noise_ms"
    )
    assert set(f"{promised} {more}".split()) <= set(row)
    assert (row["model"], row["batch"], row["device"], row["precision"]) == (TINY, 5, "cpu", "float32")
    assert (row["notes"], row["rounds"]) == ({}, 2)
    json.dumps(told)


def test_row_is_measured_not_made_up(told):
    (row,) = told["rows"]
    assert all(row[f"{mode}_ms"] > 0 for mode in ("plain", "opacus", "engine", "noise"))
    assert row["opacus_ms"] == min(row[f"{name}_ms"] for name in PEERS)
    assert set(row["plain_variants_ms"]) == {"torch", "without_bias"}
    assert row["plain_variant"] in row["plain_variants_ms"]
    assert set(row["first_step_ms"]) == {"plain_torch", "plain_without_bias", "engine", *PEERS}
    assert 0 < row["clipped_share"] < 1
    assert row["memory_growth_mb"] == len("engine")


def test_table_shows_a_line_a_row_and_a_dash_for_what_is_missing(told):
    (row,) = told["rows"]
    lines = gradients.table([row, {**row, "opacus_ms": None}])
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == list(gradients.COLUMNS)
    assert lines[2].split()[3] == "-"


def test_benchmark_leaves_threads_and_cores_as_they_were():
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    with gradients.steady_arithmetic(), gradients.one_core():
        assert (torch.get_num_threads(), len(os.sched_getaffinity(0))) == (1, 1)
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before


# ------------------------------------------------------------------------------------------------------------- pairing


def test_paired_ratio_is_the_median_within_rounds_not_of_medians():
    rounds = [{"a": 10.0, "b": 5.0}, {"a": 100.0, "b": 100.0}, {"a": 30.0, "b": 10.0}, {"a": 1.0}]
    assert gradients.paired_ratio(rounds, "a", "b") == 2.0
    assert gradients.median_ms(rounds, "a") == 20.0
    assert gradients.median_ms(rounds, "b") == 10.0


def test_paired_ratio_of_a_mode_that_never_ran_is_none():
    assert gradients.paired_ratio([{"a": 1.0}], "b", "a") is None
    assert gradients.median_ms([{"a": 1.0}], "b") is None
    assert gradients.fastest([{"a": 1.0}], ["b"]) is None


def test_rounds_turn_the_order_and_peers_sit_out_when_their_share_is_spent(monkeypatch):
    case = gradients.new_case(TINY, 2, CPU, None)
    order = []
    monkeypatch.setattr(gradients, "FEWEST_ROUNDS", 3)
    monkeypatch.setattr(gradients, "timed_ms", lambda step, device: step())

    def mode(name, ms):
        return lambda: order.append(name) or ms

    timings = gradients.Timings(case, {"plain": mode("plain", 1.0), "engine": mode("engine", 2.0)})
    timings.steps["opacus_hooks"] = mode("opacus_hooks", 9.0)
    timings.run(1e-9, lambda share: None)
    assert order == ["plain", "engine", "opacus_hooks", "engine", "plain", "plain", "engine"]
    assert gradients.paired_ratio(timings.rounds, "opacus_hooks", "engine") == 4.5


def test_peer_that_needs_many_seconds_is_not_asked_again(monkeypatch):
    monkeypatch.setattr(gradients, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(gradients, "timed_ms", lambda step, device: step())
    timings = gradients.Timings(gradients.new_case(TINY, 2, CPU, None))
    timings.begin("engine", lambda: lambda: 2.0)
    timings.begin("opacus_ghost", lambda: lambda: 9000.0)
    timings.run(1e-9, lambda share: None)
    assert timings.rounds == [{"engine": 2.0, "opacus_ghost": 9000.0}, {"engine": 2.0}]
    assert timings.notes == {"opacus_ghost": "its first step alone"}


def test_only_plain_variants_near_the_fastest_stay(monkeypatch):
    monkeypatch.setattr(gradients, "timed_ms", lambda step, device: step())
    timings = gradients.Timings(gradients.new_case(TINY, 2, CPU, None))
    for name, ms in (("plain_a", 10.0), ("plain_b", 12.0), ("plain_c", 13.0)):
        timings.begin(name, lambda ms=ms: lambda: ms)
    assert timings.drop_slow(["plain_a", "plain_b", "plain_c"]) == {"plain_a": 10.0, "plain_b": 12.0, "plain_c": 13.0}
    assert set(timings.steps) == {"plain_a", "plain_b"}


def test_mode_that_cannot_run_is_noted_by_class_alone():
    def fails():
        raise ValueError("with a text that may hold anything")

    timings = gradients.Timings(gradients.new_case(TINY, 2, CPU, None))
    timings.begin("opacus_ghost", fails)
    assert timings.notes == {"opacus_ghost": "ValueError"}
    assert not timings.steps


# ------------------------------------------------------------------------------------------------- memory and families


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux can forget a peak")
def test_memory_is_measured_in_a_process_of_its_own():
    case = gradients.new_case(TINY, 3, CPU, None)
    assert 0 <= gradients_memory.growth_mb(TINY, case, "engine", 1) < 500


def test_memory_of_a_mode_that_fails_is_none(monkeypatch):
    monkeypatch.setattr(gradients_memory.sys, "executable", "false")
    assert gradients_memory.growth_mb(TINY, gradients.new_case(TINY, 3, CPU, None), "engine", 1) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_family_takes_its_records_in_every_variant(name):
    of = FAMILIES[name]
    inputs, labels = of.examples(torch.Generator().manual_seed(0), 1)
    assert 0 <= int(labels) < of.classes
    for build in (of.build, *of.variants.values()):
        with torch.no_grad(), gradients.steady_arithmetic():
            assert build()(inputs).shape == (1, of.classes)


def test_family_begins_with_the_same_weights_every_time():
    case = gradients.new_case(TINY, 1, CPU, None)
    assert all(torch.equal(a, b) for a, b in zip(case.model().parameters(), case.model().parameters(), strict=True))
    assert set(QUICK) < set(FAMILIES)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_without_a_device(monkeypatch, capsys):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(EnvironmentFault, match="MF-630 torch finds no CUDA device"):
        gradients.find_device("cuda")
    assert main(["gradients", "--family", "mlp", "--device", "cuda", "--json"]) == 6
    assert "MF-630" in capsys.readouterr().err


def test_unknown_family_is_refused(capsys):
    assert main(["gradients", "--family", "resnet1000"]) == 2
    assert "MF-100" in capsys.readouterr().err
