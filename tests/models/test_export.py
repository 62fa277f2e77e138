"""A model written for others says the same as the model itself."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from medfed.errors import MedfedError  # noqa: E402
from medfed.models import catalogue, export  # noqa: E402
from medfed.models.export import AGREEMENT, plain, to_json, to_onnx  # noqa: E402
from medfed.models.loading import TrainedModel  # noqa: E402
from medfed.models.made_up import made_up_records  # noqa: E402

FILM = {"column": "film", "height": 12, "width": 10, "center": 0.4, "scale": 0.2}
PULSE = {"unit": "1/min", "minimum": 0.0, "maximum": 300.0, "center": 80.0, "scale": 20.0, "outside": "clip"}
COURSE = {"steps": 3, "step_hours": 2.0, "variables": [PULSE | {"name": "pulse"}], "fill": "center"}
NOTE = {"column": "note", "tokens": "hashed-words", "buckets": 256, "length": 8}
PIN = {"first_model_sha256": "ab" * 32}
SIZES = {"embedding_size": 8, "heads": 2, "layers": 1, "feedforward_size": 16} | PIN
CNN = {"name": "cnn", "channels": [8, 8], "groups": 4, "first_stride": 2, "head": "places"} | PIN
CASES = {
    "mlp": {"model.name": "mlp", "model.hidden": [5], "task.class_weights": [1.0, 3.0]},
    "cnn": {"data.features": [], "data.image": FILM, "model": CNN},
    "lstm": {"data.series": COURSE, "model": {"name": "lstm", "hidden_size": 5, "layers": 2, "summaries": True} | PIN},
    "gru": {"data.series": COURSE, "model": {"name": "gru", "hidden_size": 4, "layers": 1, "summaries": False} | PIN},
    "series transformer": {"data.series": COURSE, "model": {"name": "transformer"} | SIZES},
    "text transformer": {"data.features": [], "data.text": NOTE, "model": {"name": "transformer"} | SIZES},
}


def trained_of(make_study, changes):
    study = make_study(changes)
    torch.manual_seed(4)
    model = catalogue.build(study)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    return TrainedModel(study, model, "00" * 32, ("simulation",))


def inputs_of(trained, count):
    return made_up_records(trained.study, torch.Generator().manual_seed(9), count)[0]


@pytest.mark.parametrize("name", CASES)
def test_plain_layers_compute_the_same(make_study, name):
    trained = trained_of(make_study, CASES[name])
    inputs = inputs_of(trained, 7)
    with torch.no_grad():
        torch.testing.assert_close(plain(trained.model)(inputs), trained.model(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gru", "text transformer"])
def test_onnx_file_agrees_with_the_model_within_1e_5(make_study, name):
    """On other records, and another number of them, than those it was checked on; the LSTM's layers above, as it takes long."""
    trained = trained_of(make_study, CASES[name])
    made = to_onnx(trained)
    assert made.distance <= AGREEMENT == 1e-5
    session = onnxruntime.InferenceSession(made.data, providers=["CPUExecutionProvider"])
    inputs = inputs_of(trained, 3)
    outputs, chances = session.run(None, {"records": inputs.numpy()})
    with torch.no_grad():
        assert np.abs(outputs - trained.model(inputs).numpy()).max() < 1e-5 * max(1.0, np.abs(outputs).max())
    assert chances == pytest.approx(trained.predict(inputs.numpy()), abs=1e-5)


def test_wrong_plain_layer_is_noticed_before_anything_is_written(make_study, monkeypatch):
    """The positive control of the check: a layer that forgets its bias."""

    def forgetful(layer):
        made = export._linear(layer)
        torch.nn.init.zeros_(made.bias)
        return made

    monkeypatch.setitem(export._PLAIN, export.RowLinear, forgetful)
    with pytest.raises(MedfedError) as caught:
        to_onnx(trained_of(make_study, CASES["mlp"]))
    assert caught.value.code == 203 and "differ" in str(caught.value)


def test_long_recurrent_model_is_refused_by_name(make_study, monkeypatch):
    monkeypatch.setattr(export, "MOST_STEPS", 2)
    with pytest.raises(MedfedError) as caught:
        to_onnx(trained_of(make_study, CASES["gru"]))
    assert caught.value.code == 203 and "3 steps" in str(caught.value)


def test_what_onnx_has_no_word_for_is_refused_by_name(make_study):
    class Odd(torch.nn.Module):
        def forward(self, records):
            return torch.from_numpy(records.numpy())

    trained = trained_of(make_study, CASES["mlp"])
    with pytest.raises(MedfedError) as caught:
        to_onnx(TrainedModel(trained.study, Odd(), "00" * 32))
    assert caught.value.code == 203 and "mlp" in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_json_page_tells_all_that_is_needed(make_study, name):
    trained = trained_of(make_study, CASES[name])
    page = json.loads(to_json(trained))
    assert page["study"] == trained.study.model_dump(mode="json")
    assert page["input"]["shape"] == ["n", *trained.study.data.shape]
    assert page["input"]["dtype"] == ("int64" if "text" in name else "float32")
    assert len(page["input"]["made_of"]) >= 1 and page["stamps"] == ["simulation"]
    sizes = [int(np.prod(each["shape"])) for each in page["tensors"].values()]
    assert sum(sizes) == sum(weight.numel() for weight in trained.model.parameters())


def test_json_page_alone_gives_the_chances_back(make_study):
    """What it says in words, done by hand for a record, is what the model says."""
    changes = {"task.class_weights": [1.0, 3.0]}
    trained = trained_of(make_study, changes)
    age, lactate, ventilated = json.loads(to_json(trained))["input"]["made_of"]
    assert age.startswith("age: (value - 60) / 20") and lactate.startswith("lactate: (value - 2) / 2")
    assert ventilated == "ventilated: one value for each of yes: (1 or 0 - 0.25) / 0.5"
    record = np.array([[(80 - 60) / 20, (4 - 2) / 2, (1 - 0.25) / 0.5]], np.float32)
    weight, bias = (each.detach().numpy() for each in trained.model.parameters())
    odds = np.exp(float((record @ weight.T + bias)[0, 0]))
    assert "divided by the class weights [1.0, 3.0]" in json.loads(to_json(trained))["output"]["to_predictions"]
    assert trained.predict(record)[0, 1] == pytest.approx(odds / 3 / (1 + odds / 3), rel=1e-5)
