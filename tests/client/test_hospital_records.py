"""A hospital's folder of images, series or texts to encoded records, as ``hospital.toml`` names its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfed.client.explain import _columns, _series
from medfed.client.policy import DataSection
from medfed.client.setup import SiteOptions, init_site
from medfed.client.site import load_site
from medfed.client.sources.hospital_records import read_records
from medfed.errors import MedfedError
from medfed.models.records import Records
from medfed.seams import Seams, SystemFiles
from medfed.study import Study

MakeStudy = Callable[..., Study]
FILM = {"column": "film", "height": 8, "width": 8, "center": 0.0, "scale": 1.0}
PULSE = {"name": "pulse", "unit": "1/min", "minimum": 0.0, "maximum": 300.0, "center": 80.0, "scale": 20.0}
COURSE = {
    "steps": 3,
    "step_hours": 2.0,
    "variables": [
        PULSE | {"outside": "refuse"},
        PULSE | {"name": "gcs", "outside": "clip", "unit": "", "maximum": 15.0},
    ],
    "fill": "center",
}
NOTE = {"column": "note", "tokens": "hashed-words", "buckets": 4096, "length": 8}
CNN = {"name": "cnn", "channels": [8], "groups": 4, "first_stride": 1, "head": "mean", "first_model_sha256": "ab" * 32}
LSTM = {"name": "lstm", "hidden_size": 8, "layers": 1, "summaries": True, "first_model_sha256": "ab" * 32}
TRANSFORMER = {
    "name": "transformer",
    "embedding_size": 8,
    "heads": 2,
    "layers": 1,
    "feedforward_size": 16,
    "first_model_sha256": "ab" * 32,
}


@pytest.fixture(scope="session")
def image_study(make_study: MakeStudy) -> Study:
    return make_study({"data.features": [], "data.image": FILM, "model": CNN})


@pytest.fixture(scope="session")
def series_study(make_study: MakeStudy) -> Study:
    """With the small study's three features beside the two variables."""
    return make_study({"data.series": COURSE, "model": LSTM})


@pytest.fixture(scope="session")
def text_study(make_study: MakeStudy) -> Study:
    return make_study({"data.features": [], "data.text": NOTE, "model": TRANSFORMER})


def section(**changes: object) -> DataSection:
    return DataSection.model_validate({"path": "patients.csv", "patient_column": "id"} | changes)


def read(folder: Path, study: Study, **changes: object) -> Records:
    return read_records(SystemFiles(), folder, section(**changes), study)


def refused(folder: Path, study: Study, code: int, **changes: object) -> str:
    with pytest.raises(MedfedError) as caught:
        read(folder, study, **changes)
    assert caught.value.code == code
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ images


def test_images_are_those_that_the_table_names(tmp_path: Path, image_study: Study) -> None:
    (tmp_path / "x-rays").mkdir()
    for name, grey in (("a", 0), ("b", 255)):
        Image.fromarray(np.full((8, 8), grey, np.uint8)).save(tmp_path / "x-rays" / f"{name}.png")
    (tmp_path / "patients.csv").write_text("id,ill,Bild\np,1,b.png\nq,0,a.png\np,0,b.png\n")
    records = read(tmp_path, image_study, images="x-rays", columns={"film": "Bild"})
    assert records.inputs.shape == (3, *image_study.data.shape)
    assert records.inputs[:, 0, 0, 0].tolist() == [1.0, 0.0, 1.0]
    assert records.labels.tolist() == [1, 0, 0]
    assert records.patients == ("p", "q", "p")


def test_image_of_another_size_is_named_by_row(tmp_path: Path, image_study: Study) -> None:
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "patients.csv").write_text("id,ill,film\n\np,1,a.png\n")
    assert "row 3, column film" in refused(tmp_path, image_study, 301, images=".")


def test_images_must_be_named_in_hospital_toml(tmp_path: Path, image_study: Study) -> None:
    (tmp_path / "patients.csv").write_text("id,ill,film\np,1,a.png\n")
    assert 'images = "images"' in refused(tmp_path, image_study, 203)


# ------------------------------------------------------------------------------------------------------------- series

PATIENTS = "id,stay,age,lactate,ventilated,ill\np,s1,60,2,no,1\nq,s2,80,2,no,0\n"


def test_series_go_to_their_patients(tmp_path: Path, series_study: Study) -> None:
    (tmp_path / "patients.csv").write_text(PATIENTS)
    (tmp_path / "course.csv").write_text("id,hours,pulse,GCS\nq,1,100,\np,5.9,60,16\nq,0.5,120,15\n")
    records = read(tmp_path, series_study, series="course.csv", columns={"gcs": "GCS"})
    assert records.inputs.shape == (2, *series_study.data.shape) == (2, 3, 8)
    # pulse, gcs (center 80, scale 20), both observed, inside, age, lactate, ventilated
    assert records.inputs[0, 2].tolist() == [-1.0, (15.0 - 80.0) / 20.0, 1.0, 1.0, 1.0, 0.0, 0.0, -0.5]
    assert records.inputs[1, 0].tolist() == [1.5, -3.25, 1.0, 1.0, 1.0, 1.0, 0.0, -0.5]
    assert records.inputs[1, 2, :5].tolist() == [0.0] * 5
    assert records.labels.tolist() == [1, 0]


def test_patient_with_two_stays_needs_a_record_column(tmp_path: Path, series_study: Study) -> None:
    (tmp_path / "patients.csv").write_text(PATIENTS + "q,s3,81,2,no,1\n")
    (tmp_path / "s.csv").write_text("stay,time,pulse,gcs\ns3,0,100,\ns2,0,60,\n")
    records = read(tmp_path, series_study, series="s.csv", record_column="stay", time_column="time")
    assert records.patients == ("p", "q", "q")
    assert records.inputs[:, 0, 0].tolist() == [0.0, -1.0, 1.0]
    line = refused(tmp_path, series_study, 301, series="s.csv")
    assert 'row 4, column "id": an earlier row has the same id' in line and "record_column" in line


def test_record_must_stand_in_the_table_once(tmp_path: Path, series_study: Study) -> None:
    (tmp_path / "patients.csv").write_text(PATIENTS + "r,s1,81,2,no,1\n")
    (tmp_path / "s.csv").write_text("stay,hours,pulse,gcs\ns1,0,100,\n")
    assert 'row 4, column "stay"' in refused(tmp_path, series_study, 301, series="s.csv", record_column="stay")
    (tmp_path / "patients.csv").write_text(PATIENTS + "r,,81,2,no,1\n")
    line = refused(tmp_path, series_study, 301, series="s.csv", record_column="stay")
    assert 'row 4, column "stay" holds no record id' in line


def test_series_of_nobody_is_refused(tmp_path: Path, series_study: Study) -> None:
    (tmp_path / "patients.csv").write_text(PATIENTS)
    (tmp_path / "s.csv").write_text("id,hours,pulse,gcs\np,0,100,\n00p,0,100,\n")
    assert "in the series, row 3" in refused(tmp_path, series_study, 301, series="s.csv")


def test_value_out_of_range_is_named_by_the_row_of_its_file(tmp_path: Path, series_study: Study) -> None:
    (tmp_path / "patients.csv").write_text(PATIENTS)
    (tmp_path / "s.csv").write_text("id,hours,pulse,gcs\np,0,100,\n\np,0,301.75,\n")
    line = refused(tmp_path, series_study, 301, series="s.csv")
    assert "in the series, row 4, column pulse: value is outside [0, 300] 1/min" in line and "301.75" not in line


def test_series_must_be_named_in_hospital_toml(tmp_path: Path, series_study: Study) -> None:
    (tmp_path / "patients.csv").write_text(PATIENTS)
    assert 'series = "series.csv"' in refused(tmp_path, series_study, 203)


# -------------------------------------------------------------------------------------------------------------- texts


def test_texts_are_read_with_their_line_breaks(tmp_path: Path, text_study: Study) -> None:
    (tmp_path / "patients.csv").write_text('id,ill,Befund\np,1,"Heart\nfailure, ""acute"""\nq,0,heart\n')
    records = read(tmp_path, text_study, columns={"note": "Befund"})
    assert records.inputs.dtype == np.int64
    assert records.inputs[:, :2].tolist() == [[3042, 1055], [3042, 0]]
    assert records.inputs[0].astype(bool).sum() == 3
    assert records.labels.tolist() == [1, 0]


def test_missing_text_is_named_by_the_row_of_its_file(tmp_path: Path, text_study: Study) -> None:
    (tmp_path / "patients.csv").write_text('id,ill,note\np,1,"a\nb\nc"\nq,0,\n')
    assert "row 5, column note: value is missing" in refused(tmp_path, text_study, 301)


# ---------------------------------------------------------------------------------------------------- what approve says


def test_card_says_how_an_image_is_read(image_study: Study, make_study: MakeStudy) -> None:
    (line,) = _columns(image_study.data)
    assert line.startswith("film: ") and "8 x 8 pixels" in line and "another size is an error" in line
    (line,) = _columns(make_study({"data.features": [], "data.image": FILM | {"resize": "area"}, "model": CNN}).data)
    assert "averaging" in line


def test_card_lists_every_variable_with_unit_and_bounds(series_study: Study) -> None:
    assert len(list(_columns(series_study.data))) == 3
    sentence, refuse, clip = _series(series_study.data.series)
    assert "2 variables, in 3 steps of 2 h" in sentence
    assert refuse == "outside is an error: pulse 0 to 300 1/min"
    assert clip == "outside counts as the bound: gcs 0 to 15"


def test_card_says_how_much_of_a_text_is_read(text_study: Study, make_study: MakeStudy) -> None:
    (line,) = _columns(text_study.data)
    assert line.startswith("note: a text, its first 8 words") and "4096" in line
    as_bytes = NOTE | {"tokens": "bytes", "buckets": 256}
    (line,) = _columns(make_study({"data.features": [], "data.text": as_bytes, "model": TRANSFORMER}).data)
    assert line == "note: a text, its first 8 bytes"


# --------------------------------------------------------------------------------------------------------------- init

OPTIONS = SiteOptions(
    name="Bonn",
    nominal_patients=100,
    coordinator="localhost:8443",
    ca_certificate="ca.crt",
    fingerprint=None,
    proxy=None,
    data="patients.csv",
    patient_column="id",
    holdout=0.0,
    max_epsilon_study=4.0,
    max_epsilon_lifetime=8.0,
    lifetime_delta=1e-5,
    max_delta=1e-4,
    min_colluders=1,
)


def test_init_writes_where_images_and_series_are(tmp_path: Path, seams: Seams) -> None:
    more = replace(OPTIONS, images='x "rays"', series="course.csv", record_column="stay")
    init_site(seams, tmp_path / "bonn", more)
    data = load_site(seams, tmp_path / "bonn" / "hospital.toml").config.data
    assert (data.images, data.series, data.record_column, data.time_column) == (
        'x "rays"',
        "course.csv",
        "stay",
        "hours",
    )


def test_init_leaves_them_as_comments_to_be_filled_in(tmp_path: Path, seams: Seams) -> None:
    init_site(seams, tmp_path / "bonn", OPTIONS)
    path = tmp_path / "bonn" / "hospital.toml"
    data = load_site(seams, path).config.data
    assert (data.images, data.series, data.record_column) == (None, None, None)
    for key in ("images", "series", "time_column", "record_column"):
        path.write_text(path.read_text().replace(f"\n# {key} = ", f"\n{key} = "))
    data = load_site(seams, path).config.data
    assert (data.images, data.series, data.time_column) == ("images", "series.csv", "hours")
    assert data.record_column == "stay"
