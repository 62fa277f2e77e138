"""The closed table of models: what a study may name, and nothing that would couple patients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medfed import model_choice
from medfed.data_contract import DataContract
from medfed.errors import ConfigError
from medfed.models import tasks
from medfed.models.catalogue import build, is_rowwise
from medfed.models.parameters import count, flatten
from medfed.privacy.gradients.opacus_engine import CLIPPING_MARGIN, clipped_sum
from medfed.study import Study

MakeStudy = Callable[..., Study]
PIN = {"first_model_sha256": "ab" * 32}
IMAGE = {"column": "film", "height": 12, "width": 10, "center": 0.5, "scale": 0.25}
VARIABLE = {"unit": "", "minimum": -9.0, "maximum": 9.0, "center": 0.0, "scale": 1.0, "outside": "clip"}
SERIES = {
    "steps": 9,
    "step_hours": 1.0,
    "variables": [{"name": name, **VARIABLE} for name in ("pulse", "lactate")],
    "fill": "center",
}
TEXT = {"column": "note", "tokens": "hashed-words", "buckets": 256, "length": 11}
SMALL = {"embedding_size": 8, "heads": 2, "layers": 2, "feedforward_size": 12}
BLOCKS = 2 * (4 * 8 * 8 + 2 * 8 * 12 + 9 * 8 + 12)

# name -> (model, kind of record, parameters where the task has one output). A series has 2 * 2 + 1 + 3 = 8 channels
CHOICES: dict[str, tuple[dict[str, object], str, int]] = {
    "logistic-regression": ({"name": "logistic-regression", "hidden": []}, "table", 3 + 1),
    "mlp": ({"name": "mlp", "hidden": [8, 4]}, "table", 3 * 8 + 8 + 8 * 4 + 4 + 4 + 1),
    "cnn, mean": (
        {"name": "cnn", "channels": [4, 6], "first_stride": 1, "groups": 2, "head": "mean"},
        "image",
        9 * 4 + 8 + 9 * 4 * 6 + 12 + 6 + 1,
    ),
    "cnn, places": (
        {"name": "cnn", "channels": [4, 6], "first_stride": 2, "groups": 2, "head": "places"},
        "image",
        9 * 4 + 8 + 9 * 4 * 6 + 12 + 6 * 3 * 3 + 1,
    ),
    "lstm": ({"name": "lstm", "hidden_size": 5, "layers": 1, "summaries": False}, "series", 20 * 14 + 6),
    "lstm, two layers, summaries": (
        {"name": "lstm", "hidden_size": 5, "layers": 2, "summaries": True},
        "series",
        20 * 14 + 20 * 11 + 5 + 3 * 2 + 1 + 3 + 1,
    ),
    "gru": ({"name": "gru", "hidden_size": 5, "layers": 1, "summaries": False}, "series", 15 * 14 + 6),
    "gru, two layers, summaries": (
        {"name": "gru", "hidden_size": 5, "layers": 2, "summaries": True},
        "series",
        15 * 14 + 15 * 11 + 5 + 3 * 2 + 1 + 3 + 1,
    ),
    "transformer, text": ({"name": "transformer", **SMALL}, "text", 257 * 8 + BLOCKS + 8 + 1),
    "transformer, series": ({"name": "transformer", **SMALL}, "series", 9 * 8 + BLOCKS + 2 * 8 + 8 + 1),
}
DEEP = [name for name in CHOICES if CHOICES[name][1] != "table"]
PADDED = [name for name in CHOICES if CHOICES[name][1] in ("series", "text")]


def study_of(make_study: MakeStudy, name: str, changes: dict[str, object] | None = None) -> Study:
    model, kind, _ = CHOICES[name]
    parts: dict[str, dict[str, object]] = {
        "table": {},
        "image": {"data.features": [], "data.image": IMAGE},
        "series": {"data.series": SERIES},
        "text": {"data.features": [], "data.text": TEXT},
    }
    return make_study({"model": {**model, **PIN}, **parts[kind], **(changes or {})})


def records(data: DataContract, size: int, seed: int = 5) -> Tensor:
    """Encoded records of any kind; of series and texts the first is full and the last is padding alone."""
    generator = torch.Generator().manual_seed(seed)
    if data.text is not None:
        tokens = torch.randint(1, data.text.buckets + 1, (size, *data.shape), generator=generator)
        return torch.where(_real(size, data.text.length, generator), tokens, 0)
    inputs = torch.randn(size, *data.shape, generator=generator)
    if data.series is not None:
        variables = len(data.series.variables)
        real = _real(size, data.series.steps, generator)
        observed = torch.rand(size, data.series.steps, variables, generator=generator) < 0.5
        inputs[:, :, variables : 2 * variables] = observed.float()
        inputs[:, :, :variables] *= observed
        inputs[:, :, 2 * variables] = 1.0
        inputs = torch.where(real[:, :, None], inputs, 0.0)
    return inputs


def _real(size: int, steps: int, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(1, steps + 1, (size,), generator=generator)
    lengths[0], lengths[-1] = steps, 0
    return torch.arange(steps)[None] < lengths[:, None]


def grown(study: Study) -> nn.Module:
    """The study's model with weights as after some training: the deep models' last layer begins at zero."""
    torch.manual_seed(3)
    model = build(study)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape)
    return model


def test_every_model_of_the_schema_is_built_for_each_kind_of_record_it_reads() -> None:
    alternatives = get_args(get_args(model_choice.ModelChoice)[0])
    names = {name for kind in alternatives for name in get_args(kind.model_fields["name"].annotation)}
    assert names == set(model_choice.READS)
    tested = {(str(model["name"]), kind) for model, kind, _ in CHOICES.values()}
    assert tested == {(name, kind) for name, kinds in model_choice.READS.items() for kind in kinds}


@pytest.mark.parametrize("name", CHOICES)
def test_model_takes_records_and_gives_logits(make_study: MakeStudy, name: str) -> None:
    for kind, classes, outputs in (("binary", 2, 1), ("multiclass", 5, 5)):
        study = study_of(make_study, name, {"task.kind": kind, "task.classes": classes})
        logits = build(study)(records(study.data, 6))
        assert logits.shape == (6, outputs)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", CHOICES)
def test_size_is_the_documented_one(make_study: MakeStudy, name: str) -> None:
    assert count(build(study_of(make_study, name))) == CHOICES[name][2]


def test_model_that_does_not_read_the_records_is_refused(make_study: MakeStudy) -> None:
    # a study that says so is refused before; this is the catalogue's own word
    image = study_of(make_study, "cnn, mean").data
    for name in ("mlp", "lstm", "transformer, text"):
        with pytest.raises(ConfigError, match=r"MF-203 .*kind image"):
            build(study_of(make_study, name).model_copy(update={"data": image}))


def test_tables_are_rowwise_and_deep_models_are_not(make_study: MakeStudy) -> None:
    assert [name for name in CHOICES if is_rowwise(study_of(make_study, name))] == ["logistic-regression", "mlp"]


def test_logistic_regression_begins_at_zero(make_study: MakeStudy) -> None:
    assert not flatten(build(make_study())).any()


@pytest.mark.parametrize("name", DEEP)
def test_deep_model_begins_with_equal_chances_and_a_body_that_is_not_zero(make_study: MakeStudy, name: str) -> None:
    study = study_of(make_study, name)
    assert not build(study)(records(study.data, 4)).any()
    assert flatten(build(study)).std() > 0.05


@pytest.mark.parametrize("name", CHOICES)
def test_model_holds_parameters_only(make_study: MakeStudy, name: str) -> None:
    """No buffer: statistics of patients have no place to hide in (threats.md, T21)."""
    model = build(study_of(make_study, name))
    assert list(model.buffers()) == []
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.parametrize("name", CHOICES)
def test_clipped_gradients_equal_a_float64_loop_of_one_record_at_a_time(make_study: MakeStudy, name: str) -> None:
    """Every model of the catalogue passes through the gradient engine; a record's outputs depend on it alone."""
    study = study_of(make_study, name, {"task.kind": "multiclass", "task.classes": 3})
    model, inputs, labels = grown(study), records(study.data, 6), torch.tensor([0, 1, 2, 2, 1, 0])
    losses = tasks.losses(study.task)
    alone = torch.cat([model(inputs[i : i + 1]) for i in range(6)])
    assert torch.allclose(model(inputs), alone, atol=1e-5)

    precise = copy.deepcopy(model).double()
    inputs64 = inputs.double() if inputs.is_floating_point() else inputs
    gradients = []
    for i in range(6):
        loss = losses(precise(inputs64[i : i + 1]), labels[i : i + 1]).sum()
        parts = torch.autograd.grad(loss, list(precise.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]).numpy())
    norms = np.linalg.norm(gradients, axis=1)
    bound = float(np.median(norms))
    expected = sum(g * min(1.0, bound / norm) for g, norm in zip(gradients, norms, strict=True))
    found = clipped_sum(model, losses, inputs, labels, np.arange(6), 6, bound * (1 + CLIPPING_MARGIN))
    assert found.shape == (count(model),)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    # every weight is in it: none is left out by the hooks or unused
    assert all(part.any() for part in np.split(found, np.cumsum([w.numel() for w in model.parameters()])[:-1]))


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(make_study: MakeStudy, name: str) -> None:
    study = study_of(make_study, name)
    model, inputs = grown(study), records(study.data, 6)
    expected = model(inputs)
    assert torch.isfinite(expected).all()
    if study.data.series is not None:
        # what stands in the steps outside the stay is not looked at, to the last bit, nor does it get a gradient
        inside = 2 * len(study.data.series.variables)
        junk = torch.where(inputs[:, :, inside : inside + 1] > 0, inputs, 7.5)
        junk[:, :, inside] = inputs[:, :, inside]
        junk.requires_grad_()
        found = model(junk)
        assert torch.equal(found, expected)
        (gradient,) = torch.autograd.grad(found.sum(), junk)
        assert not gradient[inputs[:, :, inside] == 0].any()
        assert gradient[inputs[:, :, inside] > 0].any()
    longer = torch.cat([inputs, torch.zeros_like(inputs)], 1)
    if not getattr(model, "summaries", False):  # one of them is the stay's share of the steps
        torch.testing.assert_close(model(longer), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PADDED)
def test_order_of_the_steps_counts(make_study: MakeStudy, name: str) -> None:
    """The control: a model that looked at nothing would pass the test of padding."""
    study = study_of(make_study, name)
    model, inputs = grown(study), records(study.data, 2)[:1]
    assert (model(inputs) - model(inputs.flip(1))).abs().max() > 1e-3


HUGE: dict[str, dict[str, object]] = {
    "mlp": {"model": {"name": "mlp", "hidden": [4096] * 8, **PIN}},
    "cnn": {
        "data.features": [],
        "data.image": {**IMAGE, "height": 1024, "width": 1024},
        "model": {"name": "cnn", "channels": [1024], "first_stride": 1, "groups": 1, "head": "places", **PIN},
        "task": {"kind": "multiclass", "label": "ill", "classes": 1000},
    },
}


@pytest.mark.parametrize("name", HUGE)
def test_model_that_no_machine_holds_is_refused_before_it_is_made(make_study: MakeStudy, name: str) -> None:
    """The study comes from a stranger, and whoever reads it builds the model: 4 TB of the second one."""
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=r"MF-203 model of \d+ parameters"):
        build(make_study(HUGE[name]))
    assert torch.equal(before, torch.get_rng_state())
