"""The benchmark of a whole simulation: what it says of a small one, and that it leaves nothing behind."""

import json

import pytest

from medfed.simulations.benchmarks.__main__ import main
from medfed.simulations.benchmarks.load import hidden_layers


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The figures of a run of 5 hospitals, 1000 parameters and 2 rounds, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("load")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("medfed.simulations.benchmarks.__main__.say_json", said.append)
        size = ["--hospitals", "5", "--parameters", "1000", "--rounds", "2", "--threads", "2"]
        assert main(["load", *size, "--folder", str(folder), "--json"]) == 0
    (figures,) = said
    return figures, folder


def test_load_runs_all_rounds_with_recovery_on(told):
    figures, _ = told
    assert (figures["hospitals"], figures["colluders"], figures["drop_outs_allowed"]) == (5, 1, 1)
    assert (figures["rounds"], figures["threads"]) == (2, 2)
    assert figures["attempts"] == 2  # none was lost


def test_load_uploads_are_those_of_the_protocol_with_boxes(told):
    """Flower's and our frame around a header, four bytes a parameter, a commitment, a box a peer and a signature."""
    figures, _ = told
    words = figures["parameters"]
    assert 1000 <= words < 1010
    payload = 52 + 4 * words + 32 + 4 * 50 + 64
    assert payload < figures["upload_bytes"] < payload + 1000


def test_load_says_what_it_took(told):
    figures, _ = told
    assert 0 < figures["core_s"]["noise"] < figures["core_s"]["all"]
    assert 0 < figures["s_per_round"] <= figures["s_per_round_most"] < figures["seconds"]
    assert figures["peak_rss_mib"] > 50
    json.dumps(figures)


def test_load_leaves_nothing_behind(told):
    _, folder = told
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("parameters", [1, 1000, 1_000_000, 10_000_000])
def test_hidden_layers_make_as_many_parameters_as_asked_for_or_a_few_more(parameters):
    first, second = hidden_layers(parameters)
    found = 31 * first + (first + 1) * second + second + 1
    assert parameters <= found <= parameters + 2 * first + 40
    assert max(first, second) <= 4096
