"""A run's folder opened for use: what it says, what it refuses, and that nothing but data is opened."""

import json
import subprocess
import sys

import numpy as np
import pytest

from medfed import models
from medfed.errors import MedfedError
from medfed.models import catalogue, parameters, tasks
from medfed.models.loading import load
from medfed.models.marks import marked, marks
from medfed.models.records import encode_records

COLUMNS = {"age": ("60", "80"), "lactate": ("2", "?"), "ventilated": ("no", "yes")}


@pytest.fixture
def run(tmp_path, release, make_study):
    return release(tmp_path / "run", make_study(), np.array([1.0, 0.5, -0.25, 0.125], np.float32))


def refused(folder, code):
    with pytest.raises(MedfedError) as caught:
        load(folder)
    assert caught.value.code == code
    return str(caught.value)


def test_loaded_model_predicts_for_records_without_labels(run, make_study):
    records = encode_records(make_study(), ("p", "q"), COLUMNS, labelled=False)
    found = models.load(str(run)).predict(records.inputs)
    # age 60 and lactate 2 are the centers; ventilated: (0 - .25) / .5; and age 80, lactate missing counts as 1
    odds = np.array([-0.25 * -0.5 + 0.125, 1.0 + 0.5 * -0.5 - 0.25 * 1.5 + 0.125])
    assert found[:, 1] == pytest.approx(1 / (1 + np.exp(-odds)), rel=1e-6)
    assert found.sum(1) == pytest.approx(1.0)


def test_loaded_model_takes_class_weights_back(tmp_path, release, make_study):
    weighted = make_study({"task.class_weights": [1.0, 4.0]})
    trained = load(release(tmp_path / "run", weighted, np.zeros(4, np.float32)))
    inputs = np.zeros((1, 3), np.float32)
    assert tasks.predictions(trained.model, weighted.task, inputs)[0, 1] == 0.5
    assert trained.predict(inputs)[0, 1] == pytest.approx(0.2)


def test_study_is_read_from_toml_where_there_is_one(run, make_study):
    from medfed.server.study_file import render

    (run / "study.toml").write_text(render(make_study({"study.name": "from toml"})))
    assert load(run).study.study.name == "from toml"


def test_importing_the_room_of_models_is_light():
    program = "import sys, medfed.models; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], capture_output=True).stdout == b"False\n"
    with pytest.raises(AttributeError):
        models.unload  # noqa: B018


# ----------------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_run_is_refused(run, tmp_path):
    refused(run / "study.json", 100)
    refused(tmp_path, 606)
    (run / "model.safetensors").unlink()
    assert "finished run" in refused(run, 606)


def test_foreign_weights_open_only_as_safetensors(run):
    """A pickle, which ``torch.load`` would run, is refused without a look into it."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    (run / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(run, 151)


def test_weights_of_another_model_are_refused(run, make_study):
    other = catalogue.build(make_study({"model.name": "mlp", "model.hidden": [3]}))
    data = parameters.to_safetensors(other, parameters.flatten(other))
    (run / "model.safetensors").write_bytes(data)
    refused(run, 152)


@pytest.mark.parametrize("wrong", ["study_sha256", "model_sha256"])
def test_privacy_statement_of_another_run_is_refused(run, make_study, wrong):
    said = {
        "study_sha256": make_study().hash().hex(),
        "model_sha256": parameters.file_hash((run / "model.safetensors").read_bytes()),
        "stamps": ["simulation"],
        "epsilon": 1.0,
    }
    (run / "privacy.json").write_text(json.dumps(said))
    assert load(run).stamps == ("simulation",)
    (run / "privacy.json").write_text(json.dumps(said | {wrong: "00" * 32}))
    refused(run, 194)


@pytest.mark.parametrize("text", ["", "[]", '{"stamps": []}'])
def test_privacy_statement_that_cannot_be_read_is_refused(run, text):
    (run / "privacy.json").write_text(text)
    refused(run, 194)


def test_study_that_cannot_be_read_is_refused(run):
    (run / "study.json").write_text("{}")
    refused(run, 201)


def test_records_of_another_shape_are_refused(run):
    with pytest.raises(MedfedError) as caught:
        load(run).predict(np.zeros((1, 4), np.float32))
    assert caught.value.code == 203


# ------------------------------------------------------------------------------------------------------------- stamps


def test_marks_stay_in_a_copied_file_and_change_no_tensor(run):
    path = run / "model.safetensors"
    before, data = load(run), path.read_bytes()
    assert marks(data) == () == before.stamps
    path.write_bytes(marked(data, ("never to be shared", "Ä")))
    after = load(run)
    assert after.stamps == ("never to be shared", "Ä") == marks(path.read_bytes())
    assert (parameters.flatten(after.model) == parameters.flatten(before.model)).all()
    assert after.sha256 != before.sha256
