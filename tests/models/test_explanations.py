"""Explanations add up to what they explain, find what a planted model uses, and leave the model as it was."""

import numpy as np
import pytest
import torch

pytest.importorskip("captum")

from medfed.errors import MedfedError
from medfed.models import catalogue, parameters
from medfed.models.attribution import blurred
from medfed.models.explanations import EXPLAINERS, explain
from medfed.models.loading import TrainedModel
from medfed.models.reasons import ImageReasons, SeriesReasons, TableReasons, TextReasons
from medfed.models.records import encode_records
from medfed.models.series_records import Measurements
from medfed.models.text_pieces import pieces
from medfed.models.text_records import encode_texts

FILM = {"column": "film", "height": 12, "width": 10, "center": 0.4, "scale": 0.2}
PULSE = {"unit": "1/min", "minimum": 0.0, "maximum": 300.0, "center": 80.0, "scale": 20.0, "outside": "clip"}
COURSE = {
    "steps": 4,
    "step_hours": 2.0,
    "variables": [PULSE | {"name": "pulse"}, PULSE | {"name": "breaths"}],
    "fill": "center",
}
NOTE = {"column": "note", "tokens": "hashed-words", "buckets": 256, "length": 8}
SIZES = {"embedding_size": 8, "heads": 2, "layers": 1, "feedforward_size": 16, "first_model_sha256": "ab" * 32}
CNN = {"name": "cnn", "channels": [8, 8], "groups": 4, "first_stride": 1, "head": "places"}
MODELS = {
    "table": {"model.name": "mlp", "model.hidden": [5]},
    "image": {"data.features": [], "data.image": FILM, "model": CNN},
    "lstm": {"data.series": COURSE, "model": {"name": "lstm", "hidden_size": 5, "layers": 2, "summaries": True}},
    "gru": {"data.series": COURSE, "model": {"name": "gru", "hidden_size": 4, "layers": 1, "summaries": False}},
    "series transformer": {"data.series": COURSE, "model": {"name": "transformer", **SIZES}},
    "text": {"data.features": [], "data.text": NOTE, "model": {"name": "transformer", **SIZES}},
}


def trained_of(make_study, name, **changes):
    values = dict(MODELS[name])
    if "model" in values:
        values["model"] = {"first_model_sha256": "ab" * 32} | values["model"]
    study = make_study(values | changes)
    torch.manual_seed(3)
    model = catalogue.build(study)
    with torch.no_grad():  # heads begin at zero: they would explain nothing
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    return TrainedModel(study, model, "00" * 32)


def record_of(study, seed=0):
    generator = np.random.default_rng(seed)
    columns = {"age": ("75",), "lactate": ("4.5",), "ventilated": ("yes",), "film": ("f",)}
    columns["note"] = ("Heart failure, acute",)
    images = [generator.integers(0, 255, (12, 10), np.uint8)]
    series = Measurements(
        np.zeros(3, np.int64),
        np.array([0.5, 2.5, 4.5]),
        np.array([[100.0, np.nan], [np.nan, 30.0], [60.0, 20.0]]),
        np.arange(3),
    )
    return encode_records(study, ("p",), columns, images=images, series=series, labelled=False).inputs[0]


def output(trained, record):
    with torch.no_grad():
        return trained.model(torch.from_numpy(np.asarray(record))[None])[0]


@pytest.mark.parametrize("name", ["table", "lstm", "gru", "series transformer"])
def test_contributions_add_up_to_the_distance_from_the_baseline(make_study, name):
    """Of the recurrent models through their own backward pass, of ``RowLinear`` through its own."""
    trained = trained_of(make_study, name)
    record = record_of(trained.study)
    baseline = np.zeros_like(record)
    baseline[..., -1] = -0.5  # ventilated: no
    if name != "table":
        baseline[:, 4] = record[:, 4]  # what lies inside the stay
    found = explain(trained, record)
    total = sum(line.contribution for line in found.lines())
    wanted = float(output(trained, record)[0])
    # a flag that is 0 at the baseline and above it on the way is a step: the value just behind it
    from_baseline = output(trained, baseline + 1e-6 * (record - baseline))
    assert total == pytest.approx(wanted - float(from_baseline[0]), abs=0.02)
    assert abs(total) > 0.05


def test_contributions_of_an_image_add_up(make_study):
    trained = trained_of(make_study, "image")
    record = record_of(trained.study)
    found = explain(trained, record)
    assert isinstance(found, ImageReasons)
    wanted = float(output(trained, record)[0] - output(trained, blurred(torch.from_numpy(record)[None])[0].numpy())[0])
    assert found.contributions.sum() == pytest.approx(wanted, rel=0.02)
    assert found.contributions.shape == found.picture.shape == found.attention.shape == (12, 10)
    fields = [line for line in found.lines() if line.method == "integrated gradients"]
    assert sum(line.contribution for line in fields) == pytest.approx(found.contributions.sum())


def test_contributions_of_a_text_stand_at_its_words(make_study):
    trained = trained_of(make_study, "text")
    found = explain(trained, record_of(trained.study), "Heart failure, acute")
    assert isinstance(found, TextReasons)
    assert found.words == ("heart", "failure", "acute")
    assert found.contributions.shape == (3,)
    hook = trained.model.embedding.register_forward_hook(lambda layer, inputs, output: torch.zeros_like(output))
    meaningless = output(trained, record_of(trained.study))
    hook.remove()
    wanted = float(output(trained, record_of(trained.study))[0] - meaningless[0])
    assert found.contributions.sum() == pytest.approx(wanted, abs=0.02) and abs(wanted) > 0.05


def test_planted_word_and_feature_are_found(make_study):
    """The positive control of the whole: a model that uses one thing alone."""
    trained = trained_of(make_study, "table", **{"model.name": "logistic-regression", "model.hidden": []})
    parameters.assign(trained.model, np.array([0.0, 2.0, 0.0, 1.0], np.float32))
    found = explain(trained, record_of(trained.study))
    assert isinstance(found, TableReasons)
    assert found.names == ("age", "lactate", "ventilated")
    assert found.values == ("75 years", "4.5 mmol/l", "yes")
    assert found.contributions == pytest.approx([0.0, 2.0 * (4.5 - 2.0) / 2.0, 0.0], abs=1e-5)


def test_category_counts_from_its_first_level(make_study):
    trained = trained_of(make_study, "table", **{"model.name": "logistic-regression", "model.hidden": []})
    parameters.assign(trained.model, np.array([0.0, 0.0, 3.0, 0.0], np.float32))
    found = explain(trained, record_of(trained.study))
    assert found.contributions == pytest.approx([0.0, 0.0, 3.0 / 0.5], abs=1e-5)


def test_series_tell_what_was_measured_and_when(make_study):
    trained = trained_of(make_study, "lstm")
    found = explain(trained, record_of(trained.study))
    assert isinstance(found, SeriesReasons)
    assert found.variables == ("pulse", "breaths") and found.inside == 3
    assert found.values[:3] == pytest.approx(np.array([[100.0, np.nan], [np.nan, 30.0], [60.0, 20.0]]), nan_ok=True)
    assert (found.steps[3] == 0).all()  # after the stay
    (pulse, *_) = [line for line in found.lines() if line.what == "pulse"]
    assert (pulse.where, pulse.value) == ("from hour 0", "100")


def test_of_several_classes_the_likeliest_is_explained(make_study):
    trained = trained_of(make_study, "table", **{"task.kind": "multiclass", "task.classes": 3})
    record = record_of(trained.study)
    found = explain(trained, record)
    assert found.output == f"logit of class {int(output(trained, record).argmax())} over the mean of all"


@pytest.mark.parametrize("name", MODELS)
def test_explaining_leaves_the_model_and_its_predictions_as_they_were(make_study, name):
    trained = trained_of(make_study, name)
    record = record_of(trained.study)
    before = parameters.flatten(trained.model), trained.predict(record[None])
    explain(trained, record, "Heart failure, acute")
    assert (parameters.flatten(trained.model) == before[0]).all()
    assert (trained.predict(record[None]) == before[1]).all()
    assert all(weight.grad is None for weight in trained.model.parameters())


VOLUME = {
    "column": "scan",
    "depth": 8,
    "height": 8,
    "width": 8,
    "lower": 0.0,
    "upper": 1.0,
    "center": 0.4,
    "scale": 0.2,
}
MORE = {
    "events": {
        "data.features": [],
        "data.events": {"buckets": 64, "length": 5},
        "model": {"name": "transformer", **SIZES},
    },
    "volume": {
        "data.features": [],
        "data.volume": VOLUME | {"resize": "refuse"},
        "model": {"name": "cnn3d", "channels": [4], "first_stride": 1, "groups": 2, "head": "mean"},
    },
    "views": {
        "data.features": [],
        "data.image": FILM | {"views": 2},
        "model": {
            "name": "multi-view",
            "channels": [4],
            "first_stride": 1,
            "groups": 2,
            "head": "mean",
            "pooling": "attention",
            "attention_size": 4,
        },
    },
    "molecule": {
        "data.features": [],
        "data.molecule": {"column": "smiles", "atoms": 6, "larger": "refuse"},
        "model": {"name": "message-passing", "hidden_size": 4, "layers": 1},
    },
    "fingerprint": {
        "data.features": [],
        "data.fingerprint": {"column": "smiles", "bits": 16, "radius": 2, "center": 0.2, "scale": 0.4},
        "model": {"name": "logistic-regression", "hidden": []},
    },
}


def made_up(trained):
    """One record of the contract's form; of a molecule three atoms in a row, of views the first alone."""
    generator = np.random.default_rng(7)
    shape, kind = trained.study.data.shape, trained.study.data.kind
    if kind == "events":
        return np.array([[3, 70], [9, 66], [5, 65], [0, 0], [0, 0]], np.int64)
    record = generator.normal(size=shape).astype(np.float32)
    if kind == "views":
        record[1:] = 0.0
        record[2, 0, 0] = 1.0
    if kind == "fingerprint":
        record[:] = np.where(np.arange(16) % 3 == 0, 2.0, -0.5)
    if kind == "molecule":
        record = np.zeros(shape, np.float32)
        record[:3, 0] = 1.0
        record[:3, 1:40] = generator.normal(size=(3, 39)) > 0.5
        record[[0, 1, 1, 2], [41, 40, 42, 41]] = 1.0
    return record


@pytest.mark.parametrize("name", MORE)
def test_other_kinds_of_record_are_explained(make_study, monkeypatch, name):
    monkeypatch.setitem(MODELS, name, MORE[name])
    trained = trained_of(make_study, name)
    record = made_up(trained)
    found = explain(trained, record, {"events": "A\nB\nC", "molecule": ""}.get(name, ""))
    lines = list(found.lines())
    sums = [line.contribution for line in lines if line.method == "integrated gradients"]
    assert np.isfinite(sums).all() and np.abs(sums).sum() > 1e-3
    if name == "events":
        assert found.names == ("A", "B", "C") and found.values[2] == "within a day of the last"
    if name == "molecule":
        assert found.names == ("atom 1", "atom 2", "atom 3")
    if name == "views":  # the second is not there
        assert found.picture.shape == (12, 10)
    if name == "volume":
        assert found.picture.shape == found.attention.shape == (8, 24)
    if name == "fingerprint":
        assert found.names == tuple(f"neighborhood {bit}" for bit in range(0, 16, 3))


def test_every_kind_of_record_has_an_explainer():
    from typing import get_args

    from medfed.data_contract import RecordKind

    assert set(EXPLAINERS) == set(get_args(RecordKind))


def test_kind_of_record_without_an_explainer_is_refused(make_study, monkeypatch):
    monkeypatch.delitem(EXPLAINERS, "table")
    trained = trained_of(make_study, "table")
    with pytest.raises(MedfedError) as caught:
        explain(trained, record_of(trained.study))
    assert caught.value.code == 203


@pytest.mark.parametrize(
    ("contract", "text", "shown"),
    [
        (NOTE, "Große Ödeme; x_y, 3 Tage", ["große", "ödeme", "x", "y", "3", "tage"]),
        (NOTE | {"tokens": "bytes", "length": 9}, "Ödem, li", ["Ö", "", "d", "e", "m", ",", " ", "l", "i"]),
    ],
)
def test_pieces_stand_behind_the_tokens_of_the_encoder(make_study, contract, text, shown):
    study = make_study({"data.features": [], "data.text": contract, "model": {"name": "transformer", **SIZES}})
    tokens = encode_texts(study.data.text, [text], [1])[0]
    found = pieces(study.data.text, text)
    assert found == shown
    assert len(found) == int((tokens > 0).sum())
    for word, token in zip(found, tokens, strict=False):
        if contract["tokens"] == "hashed-words":
            assert encode_texts(study.data.text, [word], [1])[0, 0] == token
