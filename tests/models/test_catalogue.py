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
from medfed.errors import ConfigError, UnsupportedModel
from medfed.models import tasks
from medfed.models.catalogue import build, is_rowwise
from medfed.models.parameters import count, flatten
from medfed.models.separability import SEPARABLE_LAYERS, SETTINGS, require_separable
from medfed.privacy.gradients.opacus_engine import CLIPPING_MARGIN, clipped_sum
from medfed.study import Study, Task

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


# ------------------------------------------------------------------------------------------------ separable by patient

KINDS = {"binary": 2, "multiclass": 3}


def seen_and_logits(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What of the records can take a gradient, float[n, ...] (of texts the words looked up), and the logits [n, outputs]."""
    if inputs.is_floating_point():
        seen = inputs.clone().requires_grad_()
        return seen, model(seen)
    found: list[Tensor] = []
    (table,) = [layer for layer in model.modules() if isinstance(layer, nn.Embedding)]
    with table.register_forward_hook(lambda _, __, out: found.append(out)):
        logits = model(inputs)
    return found[0], logits


def touches(model: nn.Module, inputs: Tensor) -> Tensor:
    """bool[n, n]: whether the logits of record i have a gradient by the inputs of record j, or one that is not a number."""
    seen, logits = seen_and_logits(model, inputs)
    rows = [torch.autograd.grad(logit.sum(), seen, retain_graph=True)[0].flatten(1) for logit in logits]
    return torch.stack([(row != 0).any(1) for row in rows])


def gradient(model: nn.Module, study: Study, inputs: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the records' summed loss, float64[d]."""
    loss = tasks.losses(study.task)(model(inputs), labels).sum()
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def precise(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, Tensor]:
    return copy.deepcopy(model).double(), inputs.double() if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHOICES)
def test_model_and_loss_are_separable_by_patient(make_study: MakeStudy, name: str, kind: str) -> None:
    """What models/separability.py declares: no record's output sees another record, and gradients add up record by record."""
    study = study_of(make_study, name, {"task.kind": kind, "task.classes": KINDS[kind]})
    model, inputs = precise(grown(study), records(study.data, 6))
    model.train()
    labels = torch.tensor([0, 1, 1, 0, 1, 0]) * (KINDS[kind] - 1)
    touched = touches(model, inputs)
    assert not touched[~torch.eye(6, dtype=torch.bool)].any()
    padding_alone = 1 if name in PADDED else 0
    assert int(touched.diagonal().sum()) >= 6 - padding_alone, "the gradients are not all zero"
    together = gradient(model, study, inputs, labels)
    alone = sum(gradient(model, study, inputs[i : i + 1], labels[i : i + 1]) for i in range(6))
    assert (together - alone).norm() < 1e-12 * together.norm()


def test_batch_normalisation_is_not_separable_by_patient(make_study: MakeStudy) -> None:
    """The control: the same two tests on the model whose GroupNorm is a BatchNorm."""
    study = study_of(make_study, "cnn, mean")
    model, inputs = precise(grown(study), records(study.data, 6))
    model[1] = nn.BatchNorm2d(4).double()
    model.train()
    assert touches(model, inputs).all()
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    together = gradient(model, study, inputs, labels)
    alone = sum(gradient(model, study, inputs[i : i + 1], labels[i : i + 1]) for i in range(6))
    assert (together - alone).norm() > 0.1 * together.norm()
    with pytest.raises(UnsupportedModel, match=r"MF-160 1: BatchNorm2d mixes patients: use GroupNorm\(4, 4\)"):
        require_separable(model)


def test_every_declared_layer_is_one_of_the_catalogue(make_study: MakeStudy) -> None:
    """The list holds what was proved above and nothing else."""
    used = {type(layer) for name in CHOICES for layer in build(study_of(make_study, name)).modules()}
    assert used == set(SEPARABLE_LAYERS)
    assert set(SETTINGS) < used


def test_every_kind_of_task_has_a_loss_that_is_declared_separable() -> None:
    assert set(get_args(Task.model_fields["kind"].annotation)) == set(tasks.SEPARABLE_LOSSES) == set(KINDS)


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
