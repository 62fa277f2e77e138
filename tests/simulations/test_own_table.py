"""A table of one's own as a cohort: the task made from it, whole patients, and faults named by the file's own rows."""

import csv
import json

import numpy as np
import pytest

from medfed.errors import ConfigError, DataError, PrivacyError
from medfed.seams import SystemFiles
from medfed.server.planning import load_task
from medfed.simulations.cli import main
from medfed.simulations.own_table import CONSTANTS_FROM_DATA, OwnTable, own_cohorts
from medfed.simulations.partition import Partition

FILES = SystemFiles()
IID = Partition("iid")
HEADER = ("id", "site", "Age (years)", "sex", "lactate", "always", "outcome")
SITES = ("Bonn", "Köln", "Rome")


def rows_of(count, seed=0):
    """Two records a patient; the outcome moves age and lactate."""
    generator = np.random.default_rng(seed)
    rows = []
    for patient in range(count):
        dead = int(generator.random() < 0.4)
        for record in range(2):
            age = int(generator.normal(55 + 15 * dead, 8))
            lactate = "" if record else f"{generator.normal(1.5 + 2 * dead, 0.5):.2f}"
            sex = ("m", "f", "NA")[patient % 3]
            rows.append((f"p{patient}", SITES[patient % 3], str(age), sex, lactate, "same", ("alive", "dead")[dead]))
    return rows


@pytest.fixture
def write(tmp_path):
    def write_table(rows, header=HEADER, name="my table.csv"):
        path = tmp_path / name
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write_table


def cohort_of(path, **options):
    options = {
        "label": "outcome",
        "partition": IID,
        "hospitals": 3,
        "patient_column": "id",
        "leave_out": ("site",),
    } | options
    (cohort,) = own_cohorts(FILES, OwnTable(path, **options), [1])
    return cohort


def changed(rows, row, column, value):
    cells = [list(each) for each in rows]
    cells[row][HEADER.index(column)] = value
    return cells


# ---------------------------------------------------------------------------------------------------------- what is made


def test_own_table_makes_a_task_from_its_columns(write):
    task = cohort_of(write(rows_of(30))).task
    age, sex, lactate = task.data.features
    assert (age.name, age.kind, age.missing, age.outside) == ("Age _years_", "number", None, "clip")
    ages = [float(row[2]) for row in rows_of(30)]
    assert (age.minimum, age.maximum) == (min(ages), max(ages))
    assert age.center == pytest.approx(np.mean(ages), rel=0.005)
    assert age.scale == pytest.approx(np.std(ages), rel=0.005)
    assert (sex.kind, sex.levels) == ("category", ["f", "m"])
    assert sex.missing in ("f", "m")
    known = [float(row[4]) for row in rows_of(30) if row[4]]
    assert lactate.missing == pytest.approx(np.median(known))
    assert (task.task.kind, task.task.label, task.task.classes) == ("binary", "outcome", 2)
    assert "0 = alive, 1 = dead" in task.purpose
    assert task.data.max_records_per_patient == 2


def test_own_table_keeps_patients_whole_and_sets_test_patients_aside_everywhere(write):
    cohort = cohort_of(write(rows_of(40)), test_share=0.25)
    parts = [set(part.patients) for hospital in cohort.hospitals for part in (hospital.training, hospital.test)]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 40
    for hospital in cohort.hospitals:
        assert len(hospital.training.patients) == 2 * len(set(hospital.training.patients))
        assert round(0.25 * 13) <= len(set(hospital.test.patients)) <= 4
    labels = np.concatenate([[int(cell) for cell in hospital.test.columns["outcome"]] for hospital in cohort.hospitals])
    assert 0 < labels.mean() < 1


def test_own_table_without_a_patient_column_takes_each_row_for_a_patient(write):
    rows = [row[1:] for row in rows_of(20)]
    cohort = cohort_of(write(rows, HEADER[1:]), patient_column=None)
    patients = [
        patient for each in cohort.hospitals for part in (each.training, each.test) for patient in part.patients
    ]
    assert len(set(patients)) == len(patients) == 40
    assert "each row counts as a patient" in cohort.split


def test_own_table_by_column_takes_its_hospitals_and_does_not_predict_from_it(write):
    cohort = cohort_of(write(rows_of(30)), partition=Partition("column", column="site"), hospitals=None, leave_out=())
    assert [hospital.name for hospital in cohort.hospitals] == ["site-Bonn", "site-K_ln", "site-Rome"]
    assert "site" not in [feature.name for feature in cohort.task.data.features]


def test_own_table_with_several_classes_orders_numbers_as_numbers(write):
    rows = [(*row[:-1], str(10 * (place // 2 % 3))) for place, row in enumerate(rows_of(30))]
    task = cohort_of(write(rows)).task
    assert (task.task.kind, task.task.classes) == ("multiclass", 3)
    assert "0 = 0, 1 = 10, 2 = 20" in task.purpose


def test_own_table_is_split_again_by_another_seed(write):
    table = OwnTable(write(rows_of(30)), "outcome", IID, 3, "id", ("site",))
    one, same, other = (own_cohorts(FILES, table, [seed])[0] for seed in (1, 1, 2))
    assert one.hospitals[0].training.columns == same.hospitals[0].training.columns
    assert one.hospitals[0].training.columns != other.hospitals[0].training.columns


def test_own_table_made_task_is_stamped_and_a_given_one_is_not(write, tmp_path):
    assert cohort_of(write(rows_of(30))).stamps == (CONSTANTS_FROM_DATA,)
    task = load_task(FILES, "example")
    rows = [(f"p{n}", str(40 + n), "2.5", ("no", "yes")[n % 2], str(n % 2)) for n in range(12)]
    path = write(rows, ("id", "age", "lactate", "ventilated", "died"))
    given = cohort_of(path, task=task, label=None, leave_out=())
    assert given.stamps == ()
    assert given.task is task


# ------------------------------------------------------------------------------------------------------------ bad tables


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ((3, "outcome", ""), {}, "MF-301 row 5, column outcome: value is missing"),
        ((3, "id", " "), {}, "MF-301 row 5, column id: value holds no patient id"),
        (None, {"label": "died"}, "MF-301 column died is not in the table"),
        (None, {"leave_out": ("weight",)}, "MF-301 column weight is not in the table"),
        (None, {"patient_column": "nobody"}, "MF-301 column nobody is not in the table"),
        (None, {"label": "always"}, "MF-301 column always holds 1 different values"),
        (None, {"hospitals": 2}, "MF-140 there would be 2 hospitals"),
        (None, {"hospitals": 100}, "MF-203 30 patients are too few for 100 hospitals"),
        (None, {"label": None}, "MF-203 nobody said"),
        (None, {"test_share": 1.0}, "MF-203 the share"),
        (None, {"partition": Partition("column", column="site")}, "MF-203 the column says"),
        (
            (3, "site", "Bonn"),
            {"partition": Partition("column", column="site"), "hospitals": None},
            "MF-301 row 5, column site: value puts a patient at a second hospital",
        ),
        ((3, "Age (years)", "1e300"), {}, "MF-301 column Age \\(years\\) holds numbers beyond"),
        (None, {"leave_out": ("site", "sex", "lactate", "Age (years)", "always")}, "MF-301 no column is left"),
    ],
)
def test_own_table_that_cannot_be_used_says_why(write, change, options, words):
    rows = rows_of(30) if change is None else changed(rows_of(30), *change)
    with pytest.raises((ConfigError, DataError, PrivacyError), match=f"^{words}"):
        cohort_of(write(rows), **options)


def test_own_table_with_free_text_names_the_column_not_the_text(write):
    rows = [(*row[:3], f"wrote {place} letters", *row[4:]) for place, row in enumerate(rows_of(60))]
    with pytest.raises(DataError, match=r"MF-301 column sex holds 120 different texts.*--leave-out") as caught:
        cohort_of(write(rows))
    assert "wrote" not in str(caught.value)


def test_own_table_with_a_given_task_is_checked_by_the_rows_of_the_file(write):
    task = load_task(FILES, "example")
    header = ("id", "age", "lactate", "ventilated", "died")
    rows = [(f"p{n}", str(40 + n), "2.5", ("no", "yes")[n % 2], str(n % 2)) for n in range(12)]
    wrong = [*rows[:4], ("p4", "400", "2.5", "no", "0"), *rows[5:]]
    with pytest.raises(DataError, match="MF-301 row 6, column age"):
        cohort_of(write(wrong, header), task=task, label=None, leave_out=())
    wrong = [*rows[:4], ("p4", "40", "2.5", "no", "2"), *rows[5:]]
    with pytest.raises(DataError, match="MF-301 row 6, column died"):
        cohort_of(write(wrong, header), task=task, label=None, leave_out=())


# ------------------------------------------------------------------------------------------------------------ end to end


def test_run_on_an_own_table_learns_and_says_where_its_constants_come_from(write, quick_folder, capsys):
    out = quick_folder / "own"
    options = ["--label", "outcome", "--patient-column", "id", "--partition", "column:site", "--epsilon", "none"]
    assert main(["run", "--data", str(write(rows_of(60))), *options, "--rounds", "5", "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cohort"] == "own-my-table"
    assert result["evaluation"] == "own-table"
    assert set(result["per_hospital"]) == {"site-Bonn", "site-K_ln", "site-Rome"}
    assert CONSTANTS_FROM_DATA in result["stamps"]
    assert result["test_auc"] > 0.85
    for name in ("report.md", "study.toml", "privacy.json"):
        assert CONSTANTS_FROM_DATA in (out / name).read_text()
    assert main(["evaluate", str(out)]) == 2
    assert "of your own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--label", "outcome"],
        ["--partition", "iid"],
        ["--data", "x.csv", "--cohort", "breast-cancer"],
        ["--data", "x.csv", "--patients", "10"],
    ],
)
def test_run_refuses_options_of_an_own_table_without_one(arguments, capsys):
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.startswith("MF-100 ")


def test_column_that_may_name_patients_is_refused_in_a_table_of_any_size(write):
    """Its texts would stand in the study's file as levels."""
    with pytest.raises(DataError, match=r"MF-301 column id .* may name patients") as caught:
        cohort_of(write(rows_of(12)), patient_column=None)
    assert "p1" not in str(caught.value)
