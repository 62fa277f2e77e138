"""What a hospital does with a released model: predict, calibrate, personalize, weigh the benefit, export. Nothing leaves."""

import csv
import json
import stat

import numpy as np
import pytest
from medfed_test_commands import call

from medfed.client import benefit as benefit_module
from medfed.client import local_calibration
from medfed.client.benefit import MODELS, resampled
from medfed.client.cli import main
from medfed.client.local_folder import LOCAL
from medfed.client.setup import SiteOptions, init_site
from medfed.client.site import load_site
from medfed.models import fine_tuning, load
from medfed.models.loading import marks
from medfed.seams import system_seams

PATIENTS = 300
WEIGHTS = np.array([0.3, 0.1, 0.2, -0.1], np.float32)


def rows_of(seed=3):
    """id, age, lactate, ventilated, ill: age and ventilation tell of the illness."""
    generator = np.random.default_rng(seed)
    for number in range(PATIENTS):
        age, lactate = generator.uniform(20, 100), generator.uniform(0.5, 6.0)
        ventilated = int(generator.random() < 0.4)
        odds = (age - 60) / 12 + 1.2 * ventilated - 0.5
        ill = int(generator.random() < 1 / (1 + np.exp(-odds)))
        yield [f"patient-{number}", f"{age:.1f}", f"{lactate:.2f}", "yes" if ventilated else "no", str(ill)]


def write(path, rows, names=("id", "age", "lactate", "ventilated", "ill")):
    path.write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Fewer passes and bootstrap samples than in earnest."""
    monkeypatch.setattr(fine_tuning, "PASSES", (1, 4, 16))
    monkeypatch.setattr(benefit_module, "SAMPLES", 60)


@pytest.fixture
def home(tmp_path):
    """A hospital's folder; 3 patients in 10 are held out."""
    options = SiteOptions(
        name="Bonn",
        nominal_patients=100,
        coordinator="localhost:8443",
        ca_certificate="ca.crt",
        fingerprint=None,
        proxy=None,
        data="patients.csv",
        patient_column="id",
        holdout=0.3,
        max_epsilon_study=4.0,
        max_epsilon_lifetime=8.0,
        lifetime_delta=1e-5,
        max_delta=1e-4,
        min_colluders=1,
    )
    init_site(system_seams(), tmp_path / "bonn", options)
    (tmp_path / "bonn" / "patients.key").write_bytes(bytes(range(32)))  # the same patients held out in every test
    write(tmp_path / "bonn" / "patients.csv", rows_of())
    return tmp_path / "bonn"


@pytest.fixture
def run(tmp_path, release, make_study):
    return release(tmp_path / "run", make_study(), WEIGHTS)


def client(*arguments, status=0):
    done = call(main, arguments)
    assert done.status == status, done.err
    return done


def config(home):
    return ("--config", home / "hospital.toml")


def refused(code, *arguments):
    done = call(main, arguments)
    assert done.err.startswith(f"MF-{code} ") and done.err.count("\n") == 1, done.err
    return done.err


def held_out(home):
    site = load_site(system_seams(), home / "hospital.toml")
    names = tuple(row[0] for row in rows_of())
    return {name for name, out in zip(names, site.holdout(names), strict=True) if out}


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ predict


def test_predict_writes_what_the_model_says_of_each_record(home, run, tmp_path, make_study):
    write(home / "new.csv", [row[:4] for row in list(rows_of())[:5]], ("id", "age", "lactate", "ventilated"))
    out = tmp_path / "out"
    client("predict", run, *config(home), "--data", home / "new.csv", "--out", out)
    table = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert [line["patient"] for line in table] == [f"patient-{number}" for number in range(5)]
    assert [line["row"] for line in table] == ["2", "3", "4", "5", "6"]
    page = json.loads((out / "predictions.json").read_text())
    assert page["names"] == ["probability_0", "probability_1"] and page["records"] == 5
    first = next(rows_of())
    encoded = [(float(first[1]) - 60) / 20, (float(first[2]) - 2) / 2, (float(first[3] == "yes") - 0.25) / 0.5]
    odds = float(np.dot(encoded, WEIGHTS[:3]) + WEIGHTS[3])
    assert page["predictions"][0]["values"][1] == pytest.approx(1 / (1 + np.exp(-odds)), rel=1e-5)
    assert float(table[0]["probability_1"]) == pytest.approx(page["predictions"][0]["values"][1], rel=1e-4)


def test_predict_needs_no_hospital_toml(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "new.csv", [["p", "60", "2", "no"]], ("Fall", "Alter", "lactate", "ventilated"))
    arguments = ("predict", run, "--data", "new.csv", "--out", "out")
    assert "--patient-column" in refused(100, *arguments)
    assert "STUDY=OWN" in refused(100, *arguments, "--patient-column", "Fall", "--column", "age")
    client(*arguments, "--patient-column", "Fall", "--column", "age=Alter")
    assert (tmp_path / "out" / "predictions.csv").exists()


def test_predictions_are_for_their_owner_only_and_never_on_the_screen(home, run, tmp_path):
    for place, more in enumerate(([], ["--json"])):
        out = tmp_path / f"out-{place}"
        done = client("predict", run, *config(home), "--out", out, *more)
        assert "patient-" not in done.out + done.err
        assert stat.S_IMODE(out.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}


@pytest.mark.parametrize("wrong", [["x", "130", "2", "no"], ["x", "", "2", "no"], ["x", "60", "2", "maybe"]])
def test_predict_refuses_what_the_contract_refuses_and_leaves_nothing(home, run, tmp_path, wrong):
    write(home / "new.csv", [["p", "60", "2", "no"], wrong], ("id", "age", "lactate", "ventilated"))
    line = refused(301, "predict", run, *config(home), "--data", home / "new.csv", "--out", tmp_path / "out")
    assert "row 3" in line and wrong[1] not in line.replace("row 3", "") if wrong[1] else "row 3" in line
    assert not (tmp_path / "out").exists()


def test_predict_writes_into_no_folder_that_is_in_use(home, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    refused(212, "predict", run, *config(home), "--out", tmp_path / "out")
    assert snapshot(tmp_path / "out") == {(tmp_path / "out" / "mine.txt").relative_to(tmp_path / "out"): b"x"}


def test_predict_explains_the_first_records_by_row(home, run, tmp_path):
    pytest.importorskip("captum")
    client("predict", run, *config(home), "--out", tmp_path / "out", "--explain", "2")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"explanation-row-2.png", "explanation-row-3.png", "explanations.csv"} < names
    assert (tmp_path / "out" / "explanation-row-2.png").read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader((tmp_path / "out" / "explanations.csv").read_text().splitlines()))
    assert [line["what"] for line in table] == ["age", "lactate", "ventilated"] * 2
    first = next(rows_of())
    assert float(table[0]["contribution"]) == pytest.approx(0.3 * (float(first[1]) - 60) / 20, abs=1e-4)
    refused(100, "predict", run, *config(home), "--out", tmp_path / "other", "--explain", "-1")


def test_page_of_a_text_cannot_be_broken_by_the_text():
    from medfed.client.explanation_pictures import _draw_text
    from medfed.models.reasons import TextReasons

    found = TextReasons("logit", ("<script>", "a"), np.array([1.0, -2.0]), " ")
    page = _draw_text(found, 'row 2: "<b>"').decode()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>&quot;" not in page


# --------------------------------------------------------------------------------------------------------- calibrate


def test_calibration_is_learned_from_held_out_patients_alone_and_used(home, run, tmp_path):
    done = client("calibrate", run, *config(home))
    assert "held-out patient" in done.out and "Kept in" in done.out
    (path,) = home.glob("local/*/calibration.json")
    kept = json.loads(path.read_text())
    assert kept["patients"] == len(held_out(home)) and kept["slope"] > 1.5  # the model is far too unsure
    assert kept["cross_entropy_after"] < kept["cross_entropy_before"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    client("predict", run, *config(home), "--out", tmp_path / "out")
    page = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert "platt" in page["calibration"]
    aside = held_out(home)
    ill = {row[0]: int(row[4]) for row in rows_of()}
    chances = [line["values"][1] for line in page["predictions"] if line["patient"] in aside]
    assert np.mean(chances) == pytest.approx(np.mean([ill[name] for name in aside]), abs=0.02)
    # others' labels do not matter
    write(home / "patients.csv", [row if row[0] in aside else [*row[:4], "0"] for row in rows_of()])
    client("calibrate", run, *config(home))
    assert json.loads(path.read_text()) == kept


def test_calibration_that_does_not_help_is_not_kept(home, run, monkeypatch):
    client("calibrate", run, *config(home))
    (path,) = home.glob("local/*/calibration.json")
    monkeypatch.setattr(local_calibration, "_crossed", lambda *given: 99.0)
    done = client("calibrate", run, *config(home))
    assert "nothing is kept" in done.out and not path.exists()
    assert not json.loads(client("calibrate", run, *config(home), "--json").out)["kept"]


def test_nobody_held_out_is_refused(home, run):
    text = (home / "hospital.toml").read_text()
    (home / "hospital.toml").write_text(text.replace("holdout = 0.3", "holdout = 0.0"))
    for command in ("calibrate", "benefit"):
        assert "holdout" in refused(310, command, run, *config(home))


# -------------------------------------------------------------------------------------------------------- personalize


def personal(home):
    (folder,) = home.glob("local/*/personalized")
    return folder


def test_personalized_model_is_marked_local_and_never_shared(home, run, tmp_path):
    before = snapshot(home)
    done = client("personalize", run, *config(home))
    folder = personal(home)
    assert LOCAL in done.out and LOCAL in (folder / "LOCAL.md").read_text()
    assert marks((folder / "model.safetensors").read_bytes()) == (LOCAL,)
    assert load(folder).stamps == (LOCAL,)
    # a copy under another name is still what it is
    (tmp_path / "copy").mkdir()
    for name in ("model.safetensors", "study.json"):
        (tmp_path / "copy" / name).write_bytes((folder / name).read_bytes())
    for place in (folder, tmp_path / "copy"):
        refused(195, "export", place, "--safetensors", "--out", tmp_path / "out")
        refused(195, "personalize", place, *config(home))
        refused(195, "benefit", place, *config(home))
        refused(195, "card", place)
    assert not (tmp_path / "out").exists()
    # ledger, keys and all else are as they were
    after = snapshot(home)
    assert {path: data for path, data in after.items() if path.parts[0] != "local"} == before


def test_personalizing_learns_from_training_patients_alone(home, run):
    client("personalize", run, *config(home))
    found = json.loads((personal(home) / "personalization.json").read_text())
    assert found["passes"] > 0 and found["loss_after"] < found["loss_before"]
    aside = held_out(home)
    assert found["held_out_patients"] == len(aside) > 20
    assert found["training_patients"] == PATIENTS - len(aside)
    before = (personal(home) / "model.safetensors").read_bytes()
    flipped = [[*row[:4], str(1 - int(row[4]))] if row[0] in aside else row for row in rows_of()]
    write(home / "patients.csv", flipped)
    client("personalize", run, *config(home))
    assert (personal(home) / "model.safetensors").read_bytes() == before
    # the positive control: a training patient does matter
    write(home / "patients.csv", [row if row[0] in aside else [*row[:4], str(1 - int(row[4]))] for row in flipped])
    client("personalize", run, *config(home))
    assert (personal(home) / "model.safetensors").read_bytes() != before


def test_personalized_model_predicts(home, run, tmp_path):
    client("personalize", run, *config(home))
    done = client("predict", personal(home), *config(home), "--out", tmp_path / "out")
    assert LOCAL in done.out


def test_few_training_patients_are_refused(home, run):
    write(home / "patients.csv", list(rows_of())[:8])
    refused(310, "personalize", run, *config(home))


# ------------------------------------------------------------------------------------------------------------ benefit


def test_benefit_judges_three_models_on_the_held_out_patients(home, run):
    before = snapshot(home)
    done = client("benefit", run, *config(home), "--json")
    found = json.loads(done.out)
    assert found["held_out_patients"] == len(held_out(home))
    every, *groups = found["groups"]
    assert every["group"] == "all" and set(every["models"]) == set(MODELS)
    for figures in every["models"].values():
        assert figures["auc"]["low"] <= figures["auc"]["value"] <= figures["auc"]["high"]
        assert {"accuracy", "brier"} < set(figures)
    # the recipe of this hospital is learned here; the released weights know little of it
    assert every["models"]["personalized"]["brier"]["value"] < every["models"]["global"]["brier"]["value"]
    assert set(every["differences"]) == {"global - local only", "personalized - global", "personalized - local only"}
    assert {group["group"] for group in groups} == {"ventilated = no", "ventilated = yes"}
    assert sum(group["patients"] for group in groups) == found["held_out_patients"]
    assert all(set(group["models"]["global"]) == {"auc"} for group in groups)
    folder = next(home.glob("local/*/benefit"))
    assert {path.name for path in folder.iterdir()} == {"benefit.json", "benefit.md", "benefit.png"}
    assert (folder / "benefit.png").read_bytes().startswith(b"\x89PNG")
    assert "patient-" not in (folder / "benefit.md").read_text() + done.out
    assert {path: data for path, data in snapshot(home).items() if path.parts[0] != "local"} == before


def test_benefit_of_a_study_starts_the_local_model_where_the_study_began(home, run, make_study, monkeypatch):
    from medfed.models import catalogue, parameters

    first = parameters.to_safetensors(catalogue.build(make_study()), np.full(4, 0.01, np.float32))
    study = make_study({"model.first_model_sha256": parameters.file_hash(first)})
    folder = home / "studies" / study.hash().hex()
    folder.mkdir(parents=True)
    (folder / "first_model.safetensors").write_bytes(first)
    (run / "study.json").write_bytes(study.canonical_bytes())
    begun = []
    real = benefit_module.tune
    monkeypatch.setattr(benefit_module, "tune", lambda *given: begun.append(given[1].tolist()) or real(*given))
    client("benefit", run, *config(home))
    assert begun == [pytest.approx([0.01] * 4)]


def test_small_groups_get_no_figures(home, run):
    few = [[*row[:3], "yes" if number % 20 == 0 else "no", row[4]] for number, row in enumerate(rows_of())]
    write(home / "patients.csv", few)
    found = json.loads(client("benefit", run, *config(home), "--json").out)
    (small,) = [group for group in found["groups"] if group["group"] == "ventilated = yes"]
    assert 0 < small["patients"] < benefit_module.FEWEST_IN_GROUP
    assert small["models"] == {} == small["differences"]


def test_bootstrap_draws_patients_with_all_their_records():
    patients = ("b", "a", "b", "c", "b")
    own = {"a": [1], "b": [0, 2, 4], "c": [3]}
    draws = list(resampled(patients, 200))
    assert [draw.tolist() for draw in resampled(patients, 200)] == [draw.tolist() for draw in draws]
    for draw in draws:
        counts = np.bincount(draw, minlength=5)
        assert all(len({counts[row] for row in rows}) == 1 for rows in own.values())
        assert sum(counts[rows[0]] for rows in own.values()) == 3
    assert np.mean([1 in draw for draw in draws]) == pytest.approx(1 - (2 / 3) ** 3, abs=0.12)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Accuracy of a coin on 60 patients: 95 % intervals over 120 such hospitals; false alarm below 1 in 1000 (binomial)."""
    generator = np.random.default_rng(11)
    patients = tuple(str(number) for number in range(60))
    draws = list(resampled(patients, 300))
    covered = 0
    for _ in range(120):
        right = generator.random(60) < 0.7
        low, high = np.quantile([right[draw].mean() for draw in draws], [0.025, 0.975])
        covered += low <= 0.7 <= high
    assert 101 <= covered <= 120


# ------------------------------------------------------------------------------------------------------ export and card


def test_export_writes_safetensors_json_and_the_card(run, tmp_path):
    client("export", run, "--safetensors", "--out", tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"MODEL_CARD.md", "model.json", "model.safetensors"}
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    refused(212, "export", run, "--safetensors", "--out", out)
    refused(100, "export", run, "--out", tmp_path / "other")


def test_export_of_a_calibrated_hospital_holds_nothing_of_it(home, run, tmp_path):
    client("export", run, "--safetensors", "--out", tmp_path / "before")
    client("calibrate", run, *config(home))
    client("export", run, "--safetensors", "--out", tmp_path / "after")
    assert snapshot(tmp_path / "before") == snapshot(tmp_path / "after")


def test_export_to_onnx_says_how_near_it_is(run, tmp_path):
    pytest.importorskip("onnxscript")
    done = client("export", run, "--onnx", "--out", tmp_path / "out", "--json")
    found = json.loads(done.out)
    assert found["onnx_distance"] <= 1e-5 and "model.onnx" in found["files"]
    assert done.err == ""


def test_card_of_a_bare_run_says_what_is_not_known(run):
    text = client("card", run).out
    assert text.startswith("# Model card: sepsis")
    assert "Nothing is known here" in text and "no privacy statement" in text
    assert "age: 0 to 120 years" in text and "no medical device" in text
