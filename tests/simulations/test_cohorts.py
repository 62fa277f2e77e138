"""The catalogue: what each cohort's hospitals hold, that test patients are nobody's, and that files fit the readers."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from medfed.errors import ConfigError, DataError, PrivacyError
from medfed.seams import SystemFiles
from medfed.server.planning import load_task, template_names
from medfed.simulations import Rehearsal, simulate
from medfed.simulations.cli import _MODELS, main
from medfed.simulations.cohorts import COHORTS, load_cohort
from medfed.simulations.datasets import DATASETS, read_arrays
from medfed.simulations.extract import Extract, SeriesRows
from medfed.simulations.intensive_care import STATIC, VARIABLES, read_stays
from medfed.simulations.rehearsal import MODELS, lay_out, scored_rounds
from medfed.simulations.synthetic import SYNTHETIC
from medfed.study import load_study

FILES = SystemFiles()
SYNTHETICS = (
    "synthetic-images",
    "synthetic-views",
    "synthetic-series",
    "synthetic-notes",
    "synthetic-relations",
    "synthetic-events",
    "synthetic-fusion",
)
KINDS = {"images": {"image", "views"}, "volumes": {"volume"}, "molecules": {"fingerprint"}}
HERE = os.environ.get("MEDFED_DATA")
needs_data = pytest.mark.skipif(not HERE, reason="the public data are found through MEDFED_DATA")


def all_patients(cohort):
    return [patient for each in cohort.hospitals for part in (each.training, each.test) for patient in part.patients]


def same(one, other):
    assert one.columns == other.columns
    for left, right in ((one.images, other.images), (one.series, other.series)):
        assert (left is None) == (right is None)
    if one.images is not None:
        np.testing.assert_array_equal(one.images, other.images)
    if one.series is not None:
        np.testing.assert_array_equal(one.series.values, other.series.values)
    return True


# ------------------------------------------------------------------------------------------------------------- synthetic


@pytest.mark.parametrize("name", SYNTHETICS)
def test_synthetic_cohort_says_so_and_has_as_many_patients_as_one_likes(name):
    cohort = load_cohort(FILES, name, 3, 4, 12)
    assert [len(hospital.training.patients) for hospital in cohort.hospitals] == [12] * 4
    assert [len(hospital.test.patients) for hospital in cohort.hospitals] == [4] * 4
    assert len(set(all_patients(cohort))) == 64
    assert "synthetic" in cohort.name
    assert "synthetic" in cohort.source
    assert cohort.stamps == (SYNTHETIC,)
    assert cohort.evaluation == "synthetic"
    assert 10 * 48 * cohort.delta <= 1.0


@pytest.mark.parametrize("name", SYNTHETICS)
def test_synthetic_patients_come_from_the_seed_whatever_the_number_of_hospitals(name):
    few, many, other = (load_cohort(FILES, name, seed, count, 8) for seed, count in ((1, 3), (1, 5), (2, 3)))
    assert all(same(one.training, two.training) for one, two in zip(few.hospitals, many.hospitals[:3], strict=True))
    label = list(few.hospitals[0].training.columns)[-1]
    assert few.hospitals[0].training.columns[label] != other.hospitals[0].training.columns[label]


@pytest.mark.parametrize("name", SYNTHETICS)
def test_synthetic_cohort_is_trained_and_scored_end_to_end(name, quick_folder, capsys):
    out = quick_folder / name
    plan = Rehearsal(epsilon=8.0, mode="distributed", rounds=2, seed=1)
    run = simulate(None, name, plan, hospitals=3, patients=10, split_seeds=(1,), out=out)
    outcome = run.outcomes[0]
    assert outcome.rounds_scored == (1, 2)
    assert outcome.metric_by_round[-1] == outcome.scores.metric is not None
    assert len(outcome.scores.predictions) == len(outcome.scores.labels) == 12
    assert run.result.training_patients == 30
    assert outcome.pooled.is_ordinary
    assert run.result.pooled_rounds == (outcome.pooled.rounds,)
    for file in ("report.md", "privacy.json", "study.toml", "result.json"):
        assert SYNTHETIC in (out / file).read_text()
    assert "trained in the ordinary way" in (out / "report.md").read_text()
    assert main(["evaluate", str(out), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["as_recorded"] is True
    assert evaluated["evaluation"] == "synthetic"


def test_run_without_a_baseline_says_that_there_is_none(quick_folder):
    out = quick_folder / "bare-baseline"
    plan = Rehearsal(epsilon=None, mode="local", rounds=1, seed=1)
    run = simulate(None, "breast-cancer", plan, hospitals=3, split_seeds=(1,), out=out, has_baseline=False)
    assert run.result.pooled_metric is None
    assert run.result.pooled_rounds == (None,)
    assert "not trained" in (out / "report.md").read_text()


# ----------------------------------------------------------------------------------------------------------- extracts


def test_extract_writes_the_files_that_a_hospital_has(tmp_path):
    from PIL import Image

    images = np.arange(2 * 9 * 8, dtype=np.uint8).reshape(2, 9, 8)
    extract = Extract({"patient": ("a", "b"), "film": ("a.png", "b.png"), "ill": ("0", "1")}, images, "film")
    extract.write(FILES, tmp_path)
    assert (tmp_path / "patients.csv").read_text() == "patient,film,ill\na,a.png,0\nb,b.png,1\n"
    with Image.open(tmp_path / "images" / "b.png") as picture:
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), images[1])


def test_extract_takes_series_with_its_rows_and_writes_gaps_as_empty_cells(tmp_path):
    series = SeriesRows(
        np.array([0, 0, 2], np.int64),
        np.array([0.0, 1.5, 3.0]),
        np.array([[80, np.nan], [81.1, 5], [90, np.nan]], np.float32),
        ("pulse", "lactate"),
    )
    extract = Extract({"patient": ("a", "b", "c")}, series=series)
    extract.write(FILES, tmp_path)
    assert (
        tmp_path / "series.csv"
    ).read_text() == "patient,hours,pulse,lactate\na,0,80.0,\na,1.5,81.1,5.0\nc,3,90.0,\n"
    turned = extract.rows(np.array([2, 0]))
    assert turned.patients == ("c", "a")
    assert turned.series.owner.tolist() == [0, 1, 1]
    assert turned.series.hours.tolist() == [3.0, 0.0, 1.5]


@pytest.mark.parametrize("name", SYNTHETICS)
def test_extract_encodes_as_the_hospital_that_reads_its_files(name, quick_folder, seams):
    """What is scored outside the federation is what trains inside it."""
    cohort = load_cohort(FILES, name, 1, 3, 6)
    folder = quick_folder / f"read-{name}"
    sites = lay_out(folder, cohort, Rehearsal(epsilon=8.0, mode="local", seed=1), seams)
    study = load_study(FILES, folder / "coordinator" / "study" / "study.toml")
    for site, hospital in zip(sites, cohort.hospitals, strict=True):
        read, encoded = site.read_records(study), hospital.training.encode(study)
        np.testing.assert_array_equal(read.inputs, encoded.inputs)
        np.testing.assert_array_equal(read.labels, encoded.labels)
        assert read.patients == encoded.patients
        assert read.inputs.any()


# ------------------------------------------------------------------------------------------------------------- the table


def test_every_cohort_has_a_task_of_its_kind():
    for name, info in COHORTS.items():
        assert name in template_names()
        kind = load_task(FILES, name).data.kind
        assert kind in KINDS.get(info.kind, {info.kind})


def test_cohorts_command_lists_kind_patients_licence_and_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MEDFED_DATA", str(tmp_path))
    assert main(["cohorts", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(COHORTS)
    assert rows["icu-mortality"]["kind"] == "series"
    assert "ODC-By" in rows["icu-mortality"]["source"]
    assert rows["pneumonia"]["missing"].startswith("MF-320")
    assert "medfed-simulate fetch pneumonia" in rows["pneumonia"]["missing"]
    assert rows["synthetic-notes"]["missing"] is None
    assert {name for name, row in rows.items() if row["is_synthetic"]} > set(SYNTHETICS)
    assert all(name.startswith("synthetic-") == row["is_synthetic"] for name, row in rows.items())


@pytest.mark.parametrize(
    ("name", "hospitals", "patients"),
    [
        ("heart-disease", 5, None),
        ("icu-mortality", 3, None),
        ("synthetic-images", 129, None),
        ("synthetic-images", None, 1),
        ("breast-cancer", None, 50),
        ("nowhere", None, None),
    ],
)
def test_cohort_that_cannot_be_is_refused(name, hospitals, patients):
    with pytest.raises(ConfigError, match="MF-203"):
        load_cohort(FILES, name, 1, hospitals, patients)


def test_cohort_of_two_hospitals_is_refused():
    with pytest.raises(PrivacyError, match="MF-140"):
        load_cohort(FILES, "synthetic-notes", 1, 2)


@pytest.mark.parametrize("name", DATASETS)
def test_cohort_whose_data_are_not_here_says_how_to_get_them(name, monkeypatch, tmp_path):
    for value in ("", str(tmp_path)):
        monkeypatch.setenv("MEDFED_DATA", value)
        with pytest.raises(DataError, match=f"MF-320 .*medfed-simulate fetch {name}"):
            load_cohort(FILES, name, COHORTS[name].protocol_seeds[0], None)


def test_scored_rounds_of_a_deep_model_are_few_and_end_with_the_last(make_study):
    table = make_study({"training.rounds": 300, "training.average_last_rounds": 1})
    assert len(scored_rounds(table)) == 300
    image = {"column": "film", "height": 28, "width": 28, "center": 0.5, "scale": 0.2}
    deep = make_study(
        {
            "training.rounds": 300,
            "data.image": image,
            "data.features": [],
            "model": MODELS["cnn"].model_copy(update={"first_model_sha256": "ab" * 32}).model_dump(),
        }
    )
    assert len(scored_rounds(deep)) == 25
    assert max(scored_rounds(deep)) == 300


# ------------------------------------------------------------------------------------------------------- spoiled files


def test_npz_that_is_not_the_file_is_refused(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, images=np.zeros((2, 2), np.uint8), objects=np.array([{}], object))
    assert read_arrays(FILES, path, ["images"])["images"].shape == (2, 2)
    for wanted in (["labels"], ["objects"]):
        with pytest.raises(DataError, match="MF-301"):
            read_arrays(FILES, path, wanted)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="MF-301"):
        read_arrays(FILES, path, ["images"])


STAY = """Time,Parameter,Value
00:00,RecordID,132539
00:00,Age,54
00:00,ICUType,4
00:00,Height,-1
00:07,HR,70
00:50,HR,80
48:00,HR,90
01:10,Weight,-1
"""
OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n132539,6,1,5,-1,1\n"


@pytest.fixture
def put_archive(tmp_path, monkeypatch):
    def put(members, outcomes=OUTCOMES):
        place = tmp_path / "physionet2012"
        place.mkdir(exist_ok=True)
        with tarfile.open(place / "set-a.tar.gz", "w:gz") as archive:
            for name, text in members:
                member = tarfile.TarInfo(name)
                member.size = len(text)
                if text.startswith("->"):
                    member.type, member.linkname, member.size = tarfile.SYMTYPE, text[2:], 0
                archive.addfile(member, io.BytesIO(text.encode()))
        (place / "Outcomes-a.txt").write_text(outcomes)
        monkeypatch.setenv("MEDFED_DATA", str(tmp_path))

    return put


def test_stays_of_the_official_archive_become_hourly_means(put_archive):
    put_archive([("set-a/132539.txt", STAY)])
    stays = read_stays(FILES)
    pulse = stays.hourly[0, :, VARIABLES.index("HR")]
    assert (pulse[0], pulse[47], np.isnan(pulse[1:47]).all()) == (75.0, 90.0, True)
    assert np.isnan(stays.hourly[0, :, VARIABLES.index("Weight")]).all()
    assert stays.static[0, STATIC.index("Age")] == 54
    assert np.isnan(stays.static[0, STATIC.index("Height")])
    assert stays.died.tolist() == [1]


@pytest.mark.parametrize(
    "members",
    [
        [("../132539.txt", STAY)],
        [("set-a/132539.txt", "->/etc/passwd")],
        [("set-a/132539.txt", STAY), ("set-a/evil.sh", "rm")],
        [("set-a/132539.txt", STAY + "00:10,HR\n")],
        [("set-a/132539.txt", STAY + "xx:10,HR,3\n")],
        [("set-a/132539.txt", "x" * (2 << 20))],
        [("set-a/132540.txt", STAY)],
    ],
)
def test_archive_with_anything_else_in_it_is_refused(put_archive, members):
    put_archive(members)
    with pytest.raises(DataError, match="MF-301"):
        read_stays(FILES)


# ----------------------------------------------------------------------------------------------------- the public data


@needs_data
def test_pneumonia_is_split_as_published_without_films_of_both_sides():
    cohort = load_cohort(FILES, "pneumonia", 1, None)
    training = [film.tobytes() for hospital in cohort.hospitals for film in hospital.training.images]
    test = [film.tobytes() for hospital in cohort.hospitals for film in hospital.test.images]
    assert (len(training), len(test)) == (4698, 524)
    assert not set(training) & set(test)
    assert len(set(all_patients(cohort))) == len(training) + len(test)
    assert sum(cell == "1" for hospital in cohort.hospitals for cell in hospital.test.columns["pneumonia"]) == 389
    assert "10 training films" in cohort.split


@needs_data
def test_pneumonia_of_the_official_file_is_the_same_cohort_in_any_order(tmp_path, monkeypatch):
    there = load_cohort(FILES, "pneumonia", 2, 3)
    arrays = read_arrays(
        FILES,
        Path(HERE) / "medmnist" / "pneumoniamnist_train_val.npz",
        ("train_images", "train_labels", "val_images", "val_labels"),
    )
    order = np.random.default_rng(0).permutation(len(arrays["train_images"]))
    shuffled = {name: array[order] if name.startswith("train") else array for name, array in arrays.items()}
    (tmp_path / "medmnist").mkdir()
    np.savez(tmp_path / "medmnist" / "pneumoniamnist.npz", **shuffled, test_images=np.zeros((1, 28, 28), np.uint8))
    monkeypatch.setenv("MEDFED_DATA", str(tmp_path))
    here = load_cohort(FILES, "pneumonia", 2, 3)
    assert all(same(one.training, two.training) for one, two in zip(here.hospitals, there.hospitals, strict=True))


@needs_data
def test_icu_folds_test_every_stay_once_and_hold_outcomes_alike():
    cohorts = [load_cohort(FILES, "icu-mortality", fold, None) for fold in (1, 2, 3, 4, 5)]
    tested = [patient for cohort in cohorts for each in cohort.hospitals for patient in each.test.patients]
    assert len(tested) == len(set(tested)) == 4000
    for cohort in cohorts:
        assert len(set(all_patients(cohort))) == 4000
        died = [cell == "1" for hospital in cohort.hospitals for cell in hospital.test.columns["died"]]
        assert len(died) == 800
        assert 0.13 < np.mean(died) < 0.15
    assert [len(hospital.training.patients) for hospital in cohorts[0].hospitals] == [461, 699, 1185, 855]
    with pytest.raises(ConfigError, match="MF-203"):
        load_cohort(FILES, "icu-mortality", 6, None)


@needs_data
def test_icu_of_the_official_text_files_is_the_same_to_the_last_bit(tmp_path, monkeypatch):
    made = read_stays(FILES)
    (tmp_path / "physionet2012").mkdir()
    for name in ("set-a.tar.xz", "Outcomes-a.txt"):
        shutil.copy(Path(HERE) / "physionet2012" / name, tmp_path / "physionet2012" / name)
    monkeypatch.setenv("MEDFED_DATA", str(tmp_path))
    read = read_stays(FILES)
    for field in ("ids", "hourly", "static", "died"):
        np.testing.assert_array_equal(getattr(read, field), getattr(made, field))


@needs_data
def test_medical_abstracts_of_one_wording_stay_on_one_side():
    cohort = load_cohort(FILES, "medical-abstracts", 1, None)
    training = {text for each in cohort.hospitals for text in each.training.columns["abstract"]}
    test = {text for each in cohort.hospitals for text in each.test.columns["abstract"]}
    assert not training & test
    assert len(all_patients(cohort)) == 2888
    labels = [
        cell for each in cohort.hospitals for part in (each.training, each.test) for cell in part.columns["condition"]
    ]
    assert [labels.count(str(number)) for number in range(5)] == [633, 299, 385, 610, 961]


@needs_data
@pytest.mark.parametrize("name", DATASETS)
def test_public_cohort_fits_its_task(name, make_study):
    """Every record of every hospital is read by the contract that comes with medfed."""
    task = load_task(FILES, name)
    model = {**task.model.model_dump(), "first_model_sha256": "ab" * 32}
    study = make_study({"task": task.task.model_dump(), "data": task.data.model_dump(), "model": model})
    cohort = load_cohort(FILES, name, COHORTS[name].protocol_seeds[0], None)
    for hospital in cohort.hospitals:
        for part in (hospital.training, hospital.test):
            assert len(part.encode(study).labels) == len(part.patients)


def test_every_modest_model_can_be_asked_for() -> None:
    assert set(_MODELS) == set(MODELS)
