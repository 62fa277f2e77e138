"""Pretrained weights of a catalogue model: frozen, the same for everybody, and trained only beside and behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load, save
from torch import Tensor

from medfed.client.own_models import require_true_gradients
from medfed.errors import MedfedError
from medfed.models import catalogue
from medfed.models.marks import marked
from medfed.models.own_packages import read_package
from medfed.models.parameters import count, flatten, from_safetensors, to_safetensors, trainable
from medfed.models.separability import require_separable
from medfed.server.study_file import render
from medfed.study import Study

MakeStudy = Callable[..., Study]
FILE = "ward_models/notes.safetensors"
TEXT = {"column": "note", "tokens": "hashed-words", "buckets": 256, "length": 11}


def study_of(make_study: MakeStudy, changes: dict[str, object] | None = None) -> Study:
    pretrained = {
        "package": "ward-models",
        "package_sha256": read_package("ward-models").sha256,
        "file": FILE,
        "trained": ["head"],
        "adapters": 2,
        **(changes or {}),
    }
    model = {
        "name": "transformer",
        "embedding_size": 8,
        "heads": 2,
        "layers": 1,
        "feedforward_size": 12,
        "first_model_sha256": "ab" * 32,
        "pretrained": pretrained,
    }
    return make_study({"data.features": [], "data.text": TEXT, "model": model})


def weights_of(study: Study) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in catalogue.build(study).named_parameters()}


def test_pretrained_weights_are_frozen_and_the_same_each_time(ward_models: Path, make_study: MakeStudy) -> None:
    study = study_of(make_study)
    first, again = weights_of(study), weights_of(study)
    model = catalogue.build(study)
    require_separable(model)
    names = {name for name, _ in trainable(model)}
    assert {name.rsplit(".", 2)[-2] for name in names} == {"down", "up", "head"}
    tensors = load((ward_models / FILE).read_bytes())
    for name in first.keys() - names:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], torch.from_numpy(tensors[name.replace(".base.", ".")]))
    width, forward = 8, 12
    assert count(model) == 2 * ((width + 3 * width) + 2 * width + 2 * (width + forward)) + width + 1
    # what is released and read again is what was trained
    assert (from_safetensors(catalogue.build(study), to_safetensors(model, flatten(model))) == flatten(model)).all()


def test_pretrained_model_without_adapters_trains_the_named_layers_alone(
    ward_models: Path, make_study: MakeStudy
) -> None:
    model = catalogue.build(study_of(make_study, {"adapters": None}))
    assert [name for name, _ in trainable(model)] == ["head.weight", "head.bias"]


def test_gradients_beside_pretrained_weights_pass_the_oracle(ward_models: Path, make_study: MakeStudy) -> None:
    """The float64 loop of one record that own models are held against."""
    for changes in ({}, {"adapters": None}, {"trained": ["head", "encoder.blocks.0.feedforward_in"]}):
        study = study_of(make_study, changes)
        require_true_gradients(study, catalogue.build(study))


REFUSED: dict[str, dict[str, object]] = {
    "MF-161 package ward-models has no file ward_models/other": {"file": "ward_models/other.safetensors"},
    "MF-152 the pretrained file holds no float32 tensor embedding": {"file": "ward_models/backbone.safetensors"},
    "MF-161 package ward-models as installed here is not the one": {"package_sha256": "0" * 64},
    "MF-161 package ward-weights is not installed here": {"package": "ward-weights"},
    "MF-203 the model has no layer tail": {"trained": ["tail"]},
    "MF-160 the model has no weights to train": {"trained": [], "adapters": None},
}


@pytest.mark.parametrize("said", REFUSED)
def test_pretrained_weights_that_do_not_fit_are_refused(said: str, ward_models: Path, make_study: MakeStudy) -> None:
    with pytest.raises(MedfedError) as refused:
        catalogue.build(study_of(make_study, REFUSED[said]))
    assert str(refused.value).startswith(said)


def test_pretrained_weights_that_are_no_numbers_or_no_safetensors_are_refused(
    ward_models: Path, make_study: MakeStudy
) -> None:
    path = ward_models / FILE
    tensors = load(path.read_bytes())
    path.write_bytes(save(tensors | {"embedding.weight": tensors["embedding.weight"] * float("nan")}))
    with pytest.raises(MedfedError, match=r"MF-153 tensor embedding\.weight holds numbers that are not finite"):
        catalogue.build(study_of(make_study))
    path.write_bytes(marked(save(tensors), ("LOCAL",)))
    with pytest.raises(MedfedError, match="MF-195 this model was trained at one hospital without privacy"):
        catalogue.build(study_of(make_study))
    path.write_bytes(b"\x80\x04}q\x00.")
    with pytest.raises(MedfedError, match="MF-151 the pretrained file is no safetensors file"):
        catalogue.build(study_of(make_study))


def test_study_with_pretrained_weights_reads_back_and_others_keep_their_hash(
    ward_models: Path, make_study: MakeStudy
) -> None:
    text = render(study_of(make_study))
    assert '[model.pretrained]\npackage = "ward-models"' in text
    plain = make_study()
    assert b"pretrained" not in plain.canonical_bytes()
    gru = {"name": "gru", "hidden_size": 4, "layers": 1, "summaries": False, "first_model_sha256": "ab" * 32}
    variable = {"name": "pulse", "unit": "", "minimum": 0.0, "maximum": 9.0, "center": 0.0, "scale": 1.0}
    series = {"steps": 3, "step_hours": 1.0, "variables": [{**variable, "outside": "clip"}], "fill": "center"}
    assert b"pretrained" not in make_study({"model": gru, "data.series": series}).canonical_bytes()


def test_pretrained_weights_with_statistics_or_an_own_model_are_refused(
    ward_models: Path, make_study: MakeStudy
) -> None:
    pretrained = study_of(make_study).model.pretrained
    assert pretrained is not None
    mlp = {"name": "mlp", "hidden": [4], "first_model_sha256": "ab" * 32, "pretrained": pretrained.model_dump()}
    asked = {"statistics": {"noise_multiplier": 4.0, "attempts": 1, "least_scale": 0.02, "range": 64.0}}
    make_study({"model": mlp})
    with pytest.raises(ValueError, match="statistics are for logistic-regression and mlp"):
        make_study({"model": mlp, **asked})
    own = {
        "name": "own",
        "package": "ward-models",
        "entry_point": "gated",
        "package_sha256": "0" * 64,
        "settings": {},
        "first_model_sha256": "ab" * 32,
        "pretrained": pretrained.model_dump(),
    }
    with pytest.raises(ValueError, match="an own model loads pretrained weights itself"):
        make_study({"model": own})
