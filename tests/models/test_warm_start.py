"""First weights from an earlier model: all of them, or those that fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch import nn

from medfed.errors import ConfigError, PrivacyError
from medfed.models import catalogue
from medfed.models.marks import marked, marks
from medfed.models.parameters import flatten, to_safetensors
from medfed.models.warm_start import Taken, WarmStart, take_over
from medfed.study import Study

MakeStudy = Callable[..., Study]


def mlp(make_study: MakeStudy, classes: int = 2) -> nn.Module:
    kind = "binary" if classes == 2 else "multiclass"
    model = {"name": "mlp", "hidden": [6], "first_model_sha256": "ab" * 32}
    return catalogue.build(make_study({"model": model, "task.kind": kind, "task.classes": classes}))


def file_of(model: nn.Module) -> bytes:
    return to_safetensors(model, flatten(model))


def test_warm_start_takes_every_weight(make_study: MakeStudy) -> None:
    earlier, model = mlp(make_study), mlp(make_study)
    assert (flatten(model) != flatten(earlier)).any()
    taken = take_over(model, WarmStart(file_of(earlier), partly=False))
    assert (flatten(model) == flatten(earlier)).all()
    assert list(taken.in_words()) == ["First weights: 4 tensors of 4 from the file."]


def test_warm_start_with_another_head_takes_the_rest_only_if_told_so(make_study: MakeStudy) -> None:
    earlier, model = mlp(make_study), mlp(make_study, 5)
    before = flatten(model)
    with pytest.raises(ConfigError, match="MF-152"):
        take_over(model, WarmStart(file_of(earlier), partly=False))
    assert (flatten(model) == before).all()
    taken = take_over(model, WarmStart(file_of(earlier), partly=True))
    assert taken == Taken(("0.bias", "0.weight"), ("2.weight", "2.bias"), 2)
    shared = 6 * 3 + 6
    assert (flatten(model)[:shared] == flatten(earlier)[:shared]).all()
    assert (flatten(model)[shared:] == before[shared:]).all()
    assert list(taken.in_words())[1:] == [
        "  drawn anew: 2.weight, 2.bias",
        "  2 tensors of the file unused: no weight has this name and shape",
    ]


def test_warm_start_leaves_frozen_weights_alone() -> None:
    earlier, model = nn.Linear(3, 2), nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    bias = model.bias.clone()
    assert take_over(model, WarmStart(file_of(earlier), partly=True)).taken == ("weight",)
    assert torch.equal(model.bias, bias) and torch.equal(model.weight, earlier.weight)


@pytest.mark.parametrize("partly", [True, False])
def test_warm_start_from_a_hospitals_own_model_is_refused(partly: bool, make_study: MakeStudy) -> None:
    """It was fine-tuned on its patients without privacy: as first weights it would tell everybody of them."""
    earlier, model = mlp(make_study), mlp(make_study)
    before = flatten(model)
    with pytest.raises(PrivacyError, match="MF-195"):
        take_over(model, WarmStart(marked(file_of(earlier), ("LOCAL",)), partly=partly))
    assert (flatten(model) == before).all()


@pytest.mark.parametrize("partly", [True, False])
def test_warm_start_from_what_does_not_fit_is_refused(partly: bool, make_study: MakeStudy) -> None:
    model = mlp(make_study)
    before = flatten(model)
    tensors = load(file_of(mlp(make_study)))
    bad = {
        151: b"\x80\x04}q\x00.",
        152: save({f"other.{name}": tensor for name, tensor in tensors.items()}),
        153: save(tensors | {"0.bias": np.full(6, np.nan, np.float32)}),
    }
    for code, file in bad.items():
        with pytest.raises(ConfigError) as refused:
            take_over(mlp(make_study), WarmStart(file, partly))
        assert refused.value.code == code
    halves = save({name: tensor.astype(np.float16) for name, tensor in tensors.items()})
    with pytest.raises(ConfigError, match="MF-152"):
        take_over(model, WarmStart(halves, partly))
    assert (flatten(model) == before).all()


def test_rehearsal_begins_at_the_weights_it_is_given(tmp_path: Path) -> None:
    """One round of a tiny step leaves the model where it began; without a start it is elsewhere."""
    from medfed.seams import system_seams
    from medfed.server.planning import load_task
    from medfed.simulations.cohorts import load_cohort
    from medfed.simulations.rehearsal import Rehearsal, rehearse

    seams = system_seams()
    task = load_task(seams.files, "breast-cancer")
    still = task.training.model_copy(update={"learning_rates": [[1, 1e-9]], "average_last_rounds": 1, "rounds": 1})
    cohort = replace(load_cohort(seams.files, "breast-cancer", 1, 3), task=task.model_copy(update={"training": still}))
    names = {"weight": (1, task.data.inputs), "bias": (1,)}
    begin = {name: np.full(shape, 0.5, np.float32) for name, shape in names.items()}
    plan = Rehearsal(epsilon=8.0, mode="local", seed=3, start=WarmStart(save(begin), partly=False))
    done = rehearse(tmp_path / "warm", cohort, plan, seams)
    assert np.allclose(done.weights, 0.5, atol=1e-4)
    cold = rehearse(tmp_path / "cold", cohort, replace(plan, start=None), seams)
    assert np.abs(cold.weights - 0.5).min() > 0.1


@pytest.mark.parametrize("mark", ["x", "5", "null", "[[1]]", "[" * 5000])
def test_marks_that_are_no_list_of_texts_are_one_error(mark: str, make_study: MakeStudy) -> None:
    header = json.dumps({"__metadata__": {"medfed-stamps": mark}}).encode()
    with pytest.raises(ConfigError, match="MF-151"):
        marks(len(header).to_bytes(8, "little") + header)


def test_mark_of_a_file_with_a_long_header_is_found() -> None:
    many = save({f"tensor {number} {'long ' * 30}": np.zeros(1, np.float32) for number in range(9000)})
    assert int.from_bytes(many[:8], "little") > 1 << 20
    assert marks(many) == ()
    assert marks(marked(many, ("LOCAL",))) == ("LOCAL",)
