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
from medfed.models.lora import LoraLinear
from medfed.models.made_up import made_up_inputs
from medfed.models.parameters import count, flatten
from medfed.models.separability import SEPARABLE_LAYERS, SETTINGS, require_separable
from medfed.privacy.gradients.opacus_engine import CLIPPING_MARGIN, clipped_sum
from medfed.study import Study
from medfed.task_choice import TaskKind

MakeStudy = Callable[..., Study]
PIN = {"first_model_sha256": "ab" * 32}
IMAGE = {"column": "film", "height": 12, "width": 10, "center": 0.5, "scale": 0.25}
VOLUME = {
    "column": "scan",
    "depth": 6,
    "height": 9,
    "width": 8,
    "lower": -1000.0,
    "upper": 400.0,
    "center": 0.5,
    "scale": 0.25,
    "resize": "refuse",
}
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
BLOCK = {
    "prefix": "gene_",
    "count": 7,
    "unit": "",
    "minimum": -9.0,
    "maximum": 9.0,
    "center": 0.0,
    "scale": 1.0,
    "outside": "clip",
}
FUSED = {"width": 4, "image_channels": [4], "groups": 2, "embedding_size": 3}
# features, image, series, text, block
PARTS = 4 * 4 + (36 + 8 + 5 * 4) + (12 * 10 + 16 * 4) + (257 * 3 + 4 * 4) + 8 * 4

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
    "cnn3d, mean": (
        {"name": "cnn3d", "channels": [4, 6], "first_stride": 2, "groups": 2, "head": "mean"},
        "volume",
        27 * 4 + 8 + 27 * 24 + 12 + 6 + 1,
    ),
    "cnn3d, largest": (
        {"name": "cnn3d", "channels": [4, 16, 16], "first_stride": 1, "groups": 2, "head": "largest"},
        "volume",
        27 * 4 + 8 + 27 * 64 + 32 + 27 * 256 + 32 + 16 + 1,
    ),
    "multi-view, attention": (
        {
            "name": "multi-view",
            "channels": [4, 6],
            "first_stride": 1,
            "groups": 2,
            "head": "largest",
            "pooling": "attention",
            "attention_size": 5,
        },
        "views",
        9 * 4 + 4 + 9 * 24 + 6 + 2 * (6 * 5 + 5) + 5 + 6 + 1,
    ),
    "multi-view, mean": (
        {
            "name": "multi-view",
            "channels": [4, 6],
            "first_stride": 2,
            "groups": 2,
            "head": "mean",
            "pooling": "mean",
            "attention_size": 5,
        },
        "views",
        9 * 4 + 4 + 9 * 24 + 6 + 6 + 1,
    ),
    "resnet, mean": (
        {"name": "resnet", "channels": [4, 6], "blocks": 2, "first_stride": 1, "groups": 2, "head": "mean"},
        "image",
        (9 * 4 + 8) + 2 * (18 * 16 + 16) + (9 * 24 + 9 * 36 + 24 + 24 + 12) + (18 * 36 + 24) + 6 + 1,
    ),
    "resnet, places": (
        {"name": "resnet", "channels": [4], "blocks": 1, "first_stride": 2, "groups": 2, "head": "places"},
        "image",
        (9 * 4 + 8) + (18 * 16 + 16) + 4 * 6 * 5 + 1,
    ),
    "lstm": ({"name": "lstm", "hidden_size": 5, "layers": 1, "summaries": False}, "series", 20 * 14 + 6),
    "lstm, two layers, summaries": (
        {"name": "lstm", "hidden_size": 5, "layers": 2, "summaries": True},
        "series",
        20 * 14 + 20 * 11 + 5 + 5 * 2 + 1 + 3 + 1,
    ),
    "gru": ({"name": "gru", "hidden_size": 5, "layers": 1, "summaries": False}, "series", 15 * 14 + 6),
    "gru, two layers, summaries": (
        {"name": "gru", "hidden_size": 5, "layers": 2, "summaries": True},
        "series",
        15 * 14 + 15 * 11 + 5 + 5 * 2 + 1 + 3 + 1,
    ),
    "summaries": ({"name": "summaries"}, "series", 5 * 2 + 1 + 3 + 1),
    "transformer, text": ({"name": "transformer", **SMALL}, "text", 257 * 8 + BLOCKS + 8 + 1),
    "text-bag": ({"name": "text-bag"}, "text", 257),
    "text-cnn": (
        {"name": "text-cnn", "embedding_size": 4, "widths": [1, 3], "channels": 5},
        "text",
        257 * 4 + (4 + 1) * 5 + (3 * 4 + 1) * 5 + 2 * 5 + 1,
    ),
    "tagger": (
        {"name": "tagger", "embedding_size": 4, "hidden_size": 6, "dilations": [1, 2]},
        "text",
        257 * 4 + (8 * 4 + 1) * 6 + 2 * (3 * 36 + 3 * 6) + (2 * 6 + 1) * 3,
    ),
    "gru, both ways": (
        {"name": "gru", "hidden_size": 5, "layers": 2, "summaries": False, "bidirectional": True},
        "series",
        2 * 15 * 14 + 2 * 15 * 16 + 2 * 5 + 1,
    ),
    "gru, decay": (
        {"name": "gru", "hidden_size": 5, "layers": 1, "summaries": True, "decay": True},
        "series",
        2 * 2 + 15 * 16 + 5 + 5 * 2 + 1 + 3 + 1,
    ),
    "logistic-regression, fingerprint": ({"name": "logistic-regression", "hidden": []}, "fingerprint", 16 + 1),
    "mlp, fingerprint": ({"name": "mlp", "hidden": [8]}, "fingerprint", 16 * 8 + 8 + 8 + 1),
    "message-passing": (
        {"name": "message-passing", "hidden_size": 4, "layers": 2},
        "molecule",
        41 * 4 + 2 * (5 * 4 + 3) * 4 + 2 * 4 + 2 * 4 + 1,
    ),
    "transformer, events": ({"name": "transformer", **SMALL}, "events", 81 * 8 + BLOCKS + 8 + 1),
    "fusion, early": ({"name": "fusion", "how": "early", **FUSED}, "mixed", PARTS + 5 * 4 + 4 + 1),
    "fusion, late": ({"name": "fusion", "how": "late", **FUSED}, "mixed", PARTS + 5 * (4 + 1)),
    "fusion, hybrid": ({"name": "fusion", "how": "hybrid", **FUSED}, "mixed", PARTS + 5 * 4 + 4 + 1 + 5 * (4 + 1)),
    "transformer, series": ({"name": "transformer", **SMALL}, "series", 9 * 8 + BLOCKS + 2 * 8 + 8 + 1),
    "autoencoder": (
        {"name": "autoencoder", "hidden": [4], "latent": 2},
        "table",
        (3 * 4 + 4) + (4 * 2 + 2) + (2 * 4 + 4) + (4 * 3 + 3),
    ),
    "variational-autoencoder": (
        {"name": "variational-autoencoder", "hidden": [4], "latent": 2},
        "table",
        (3 * 4 + 4) + 2 * (4 * 2 + 2) + (2 * 4 + 4) + (4 * 3 + 3),
    ),
    "two-arm": (
        {"name": "two-arm", "hidden": [5], "arm_hidden": [4]},
        "table",
        (3 * 5 + 5) + 2 * ((5 * 4 + 4) + (4 + 1)),
    ),
}
TASKS: dict[str, dict[str, object]] = {
    "tagger": {"kind": "tagging", "label": "tags", "entities": ["Disease"]},
    "autoencoder": {"kind": "reconstruction", "label": "ill", "divergence": 0.0},
    "variational-autoencoder": {"kind": "reconstruction", "label": "ill", "divergence": 0.5},
    "two-arm": {"kind": "effect", "outcome": "ill", "treatment": "treated", "assumptions": "None holds."},
}
"""Of models that solve tasks of their own only."""
CLASSIFIERS = [name for name in CHOICES if name not in TASKS]
LINEAR = ("summaries", "text-bag")
ROWWISE = (
    *("logistic-regression", "logistic-regression, fingerprint", "mlp", "mlp, fingerprint"),
    *("autoencoder", "variational-autoencoder", "two-arm"),
)
DEEP = [name for name in CHOICES if name not in ROWWISE and CHOICES[name][1] != "table" and name not in LINEAR]
PADDED = [name for name in CHOICES if CHOICES[name][1] in ("series", "text", "events")]


def study_of(make_study: MakeStudy, name: str, changes: dict[str, object] | None = None) -> Study:
    model, kind, _ = CHOICES[name]
    parts: dict[str, dict[str, object]] = {
        "table": {},
        "image": {"data.features": [], "data.image": IMAGE},
        "views": {"data.features": [], "data.image": {**IMAGE, "views": 3}},
        "volume": {"data.features": [], "data.volume": VOLUME},
        "series": {"data.series": SERIES},
        "text": {"data.features": [], "data.text": TEXT},
        "fingerprint": {
            "data.features": [],
            "data.fingerprint": {"column": "smiles", "bits": 16, "radius": 2, "center": 0.0, "scale": 1.0},
        },
        "molecule": {"data.features": [], "data.molecule": {"column": "smiles", "atoms": 6, "larger": "refuse"}},
        "events": {"data.features": [], "data.events": {"buckets": 64, "length": 7}},
        "mixed": {
            "data.image": IMAGE,
            "data.series": SERIES,
            "data.text": TEXT,
            "data.block": BLOCK,
            "data.mixed": {"may_lack": ["image", "series", "block"]},
        },
    }
    if name == "tagger":
        parts["text"] |= {"data.text": {**TEXT, "tokens": "given-words"}}
    if name == "gru, decay":
        parts["series"] |= {"data.series": {**SERIES, "fill": "forward"}}
    if name in TASKS:
        parts[kind] |= {"task": TASKS[name]}
    return make_study({"model": {**model, **PIN}, **parts[kind], **(changes or {})})


def of_classes(name: str, kind: str, classes: int) -> dict[str, object]:
    """What makes the task one of these classes, unless the model has a task of its own."""
    return {} if name in TASKS else {"task.kind": kind, "task.classes": classes}


def labels_for(study: Study, classes: list[int]) -> Tensor:
    """These labels, or as many made-up ones of a task without classes."""
    labels = torch.tensor(classes)
    if study.task.kind in KINDS:
        return labels
    return tasks.meaning(study.task).made_up_labels(study.data, torch.Generator().manual_seed(2), len(labels))


def records(data: DataContract, size: int, seed: int = 5) -> Tensor:
    """Encoded records of any kind; of series and texts the first is full and the last is padding alone."""
    generator = torch.Generator().manual_seed(seed)
    if data.kind in ("molecule", "mixed"):
        return made_up_inputs(data, generator, size)
    if data.events is not None:
        events = torch.randint(1, data.events.tokens, (size, *data.shape), generator=generator)
        return torch.where(_real(size, data.events.length, generator)[:, :, None], events, 0)
    if data.text is not None:
        tokens = torch.randint(1, data.text.buckets + 1, (size, *data.shape), generator=generator)
        real = _real(size, data.text.length, generator)
        return torch.where(real.view(*real.shape, *[1] * (tokens.dim() - 2)), tokens, 0)
    inputs = torch.randn(size, *data.shape, generator=generator)
    if data.kind == "views":
        inputs[:, -1] = (inputs[:, -1] > 0.0).float()
        inputs[:, -1, 0, 0] = 1.0
    if data.series is not None:
        variables = len(data.series.variables)
        real = _real(size, data.series.steps, generator)
        observed = torch.rand(size, data.series.steps, variables, generator=generator) < 0.5
        inputs[:, :, variables : 2 * variables] = observed.float()
        if data.series.fill == "center":
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
    # own models have a file of their own
    assert tested == {(name, kind) for name, kinds in model_choice.READS.items() for kind in kinds if name != "own"}


@pytest.mark.parametrize("name", CLASSIFIERS)
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
    assert sorted(name for name in CHOICES if is_rowwise(study_of(make_study, name))) == sorted(ROWWISE)


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
    study = study_of(make_study, name, of_classes(name, "multiclass", 3))
    model, inputs, labels = grown(study), records(study.data, 6), labels_for(study, [0, 1, 2, 2, 1, 0])
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
    expected = sum(g * min(1.0, bound / max(norm, 1e-30)) for g, norm in zip(gradients, norms, strict=True))
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
    if not getattr(model, "summaries", name == "summaries"):  # one of them is the stay's share of the steps
        found = model(longer)
        found = found[:, : inputs.shape[1]] if found.dim() == 3 else found
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PADDED if name != "text-bag"])
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
    study = study_of(make_study, name, of_classes(name, kind, KINDS[kind]))
    model, inputs = precise(grown(study), records(study.data, 6))
    model.train()
    labels = labels_for(study, [value * (KINDS[kind] - 1) for value in (0, 1, 1, 0, 1, 0)])
    touched = touches(model, inputs)
    assert not touched[~torch.eye(6, dtype=torch.bool)].any()
    padding_alone = 1 if name in PADDED else 0
    assert int(touched.diagonal().sum()) >= 6 - padding_alone, "the gradients are not all zero"
    together = gradient(model, study, inputs, labels)
    alone = sum(gradient(model, study, inputs[i : i + 1], labels[i : i + 1]) for i in range(6))
    assert (together - alone).norm() < 1e-12 * together.norm()


OF_NUMBERS: dict[str, dict[str, object]] = {
    "multilabel": {"kind": "multilabel", "labels": ["ill", "worse"]},
    "survival": {
        "kind": "survival",
        "time": "days",
        "event": "ill",
        "unit": "days",
        "head": "hazard",
        "edges": [2, 5, 9],
    },
}
"""Tasks without classes that any model of some numbers solves."""


@pytest.mark.parametrize("kind", OF_NUMBERS)
def test_loss_of_a_task_without_classes_is_separable_by_patient(make_study: MakeStudy, kind: str) -> None:
    study = study_of(make_study, "mlp", {"task": OF_NUMBERS[kind]})
    model, inputs = precise(grown(study), records(study.data, 6))
    labels = labels_for(study, [0] * 6)
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
    assert used | {LoraLinear} == set(SEPARABLE_LAYERS)  # of models with pretrained weights
    assert set(SETTINGS) < used


def test_every_kind_of_task_has_a_loss_that_is_declared_separable() -> None:
    own = {str(task["kind"]) for task in TASKS.values()}
    assert set(get_args(TaskKind)) == set(tasks.SEPARABLE_LOSSES) == {*KINDS, *OF_NUMBERS, *own}


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
