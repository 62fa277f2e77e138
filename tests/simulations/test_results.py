"""The results page: what is measured once stays, what is missing says so, floors are judged by what was measured."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import medfed.simulations.results.measure as measuring
from medfed.errors import ConfigError
from medfed.models.tasks import meaning
from medfed.seams import system_seams
from medfed.server.planning import load_task
from medfed.simulations.cohorts import COHORTS, CohortInfo, load_cohort, missing
from medfed.simulations.pooled import pooled_records
from medfed.simulations.results import cells, opacus_peer
from medfed.simulations.results.__main__ import main
from medfed.simulations.results.arms import measure_cell, open_split
from medfed.simulations.results.cells import Cell, Environment, GroupFigure
from medfed.simulations.results.figures import groups, judge, left_out, standard_error, worst
from medfed.simulations.results.measure import measure, plan, this_environment
from medfed.simulations.results.page import NOT_MEASURED, PAGE, page, write_page
from medfed.simulations.results.protocol import ARMS, ROWS, Floors, Key, Row, Seconds, Subgroup, keys

DOCS = Path(__file__).parents[2] / "docs"
FIXTURE = Path(__file__).parents[1] / "vectors"
TINY = Row(
    name="results_tiny",
    cohort="tiny",
    metric="auc",
    metric_name="AUC",
    delta=1e-3,
    seeds=(1, 2),
    splits="no splits",
    floors=(Floors("any model", {None: 0.0, 3.0: 1.1}),),
    anchors=(),
    seconds=Seconds(1.0, 2.0, 3.0, 4.0),
    epsilons=(3.0,),
    study=str(Path(__file__).parents[1] / "tiny_task.toml"),
    subgroup=Subgroup("ventilated", {"no": "breathing alone", "yes": "ventilated"}),
)


@pytest.fixture
def row(monkeypatch, tiny_cohort):
    """Made-up patients with a record each, as a cohort of the catalogue."""

    def alone(extract):
        first = [place for place, name in enumerate(extract.patients) if name not in extract.patients[:place]]
        return extract.rows(np.array(first))

    hospitals = tuple(replace(one, training=alone(one.training), test=alone(one.test)) for one in tiny_cohort.hospitals)
    info = CohortInfo(
        lambda files, wish: replace(tiny_cohort, hospitals=hospitals, seed=wish.seed),
        (1, 2),
        "4",
        "20",
        "table",
        "here",
    )
    monkeypatch.setitem(COHORTS, "tiny", info)
    monkeypatch.setattr(opacus_peer, "PASSES", 2)
    monkeypatch.setattr(opacus_peer, "SETTINGS", opacus_peer.SETTINGS[:2])
    return TINY


@pytest.fixture(scope="module")
def fixture():
    return cells.load(system_seams().files, FIXTURE, "results_tiny")


def cell(arm="federation", epsilon=None, mode="distributed", seed=1, auc=0.9, **others):
    values = {
        "arm": arm,
        "epsilon": epsilon,
        "mode": mode,
        "seed": seed,
        "metrics": {"auc": auc},
        "hospitals": {},
        "subgroups": {},
        "classes": [100, 100],
        "spent": None,
        "setting": None,
        "tried": {},
        "failed": None,
        "recipe": "a",
        "study": "b",
        "environment": "c",
        "seconds": 1.0,
        "processor_s": 1.0,
    }
    return Cell.model_validate(values | others)


def measured(*found):
    return cells.nothing("results_tiny").model_copy(update={"cells": list(found)})


# ---------------------------------------------------------------------------------------------------------------- measure


def test_every_cell_is_measured_once_and_again_when_the_study_changes(row, tmp_path, monkeypatch):
    row, seams = replace(row, seeds=(1,)), system_seams()
    first = plan(seams.files, tmp_path, [row])
    assert [key for each in first for key in each.keys] == keys(row)
    assert {key.arm for key in keys(row)} == set(ARMS)
    measure(tmp_path, first, seams)
    found = cells.load(seams.files, tmp_path, row.name)
    assert {one.key for one in found.cells} == set(keys(row))
    assert {one.failed for one in found.cells} == {None}
    assert min(one.seconds for one in found.cells) > 0
    assert [environment.versions["torch"] for environment in found.environments.values()]
    assert plan(seams.files, tmp_path, [row])[0].keys == ()
    assert plan(seams.files, tmp_path, [row], again=True)[0].keys == first[0].keys
    monkeypatch.setattr(measuring, "recipe", lambda files, row: "another study")
    assert plan(seams.files, tmp_path, [row])[0].keys == first[0].keys


def test_interrupted_measurement_keeps_its_finished_cells(row, tmp_path, monkeypatch):
    seams, real, asked = system_seams(), measure_cell, []

    def twice(split, key, *others):
        asked.append(key)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(split, key, *others)

    monkeypatch.setattr(measuring, "measure_cell", twice)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, plan(seams.files, tmp_path, [row]), seams)
    assert {one.key for one in cells.load(seams.files, tmp_path, row.name).cells} == set(asked[:2])
    assert plan(seams.files, tmp_path, [row])[0].keys[0] == asked[2]


def test_federation_cell_is_the_same_when_it_is_measured_again(row):
    split, key = open_split(row, 1, system_seams()), Key("federation", 3.0, "local", 1)
    one, other = (measure_cell(split, key, system_seams()) for _ in range(2))
    assert one.figures == other.figures  # the study's hash names keys of hospitals, which are fresh each time
    assert 0 < one.spent < 3.0
    assert one.figures != measure_cell(split, replace(key, mode="distributed"), system_seams()).figures


def test_best_single_hospital_is_the_best_on_everybody(row):
    split = open_split(row, 1, system_seams())
    found = measure_cell(split, Key("single", None, None, 1), system_seams())
    values = {name: one.value for name, one in found.figures.hospitals.items()}
    assert len(values) == 4
    assert found.figures.metrics["auc"] == pytest.approx(max(values.values()))
    assert values[found.setting.removeprefix("best: ")] == max(values.values())


def test_subgroups_and_hospitals_part_the_test_patients(row):
    split = open_split(row, 1, system_seams())
    found = measure_cell(split, Key("pooled", None, None, 1), system_seams()).figures
    size = sum(found.classes)
    assert size == sum(len(part.labels) for part in split.test)
    assert sum(one.records for one in found.hospitals.values()) == size
    assert sum(one.records for one in found.subgroups.values()) == size


def test_plan_says_what_is_to_do_and_how_long(row, tmp_path):
    files = system_seams().files
    (todo,) = plan(files, tmp_path, [row], arms=["single", "opacus-choice"])
    assert [key.arm for key in todo.keys] == ["single", "opacus-choice", "single"]
    assert todo.seconds == (2.0, 16.0, 2.0)
    (federations,) = plan(files, tmp_path, [row], arms=["federation"], mode="distributed")
    assert {(key.epsilon, key.mode) for key in federations.keys} == {(None, "distributed"), (3.0, "distributed")}
    found = measured(cell("single", mode=None, processor_s=7.0)).model_copy(update={"environments": {}})
    cells.save(files, tmp_path, found)
    assert plan(files, tmp_path, [row], arms=["single"], splits=1)[0].seconds == (7.0,)
    absent = replace(row, cohort="nobody")
    assert plan(files, tmp_path, [absent])[0].absent == "this tree has no such cohort"


def test_command_plans_and_refuses_a_cohort_without_results(tmp_path, capsys):
    assert main(["measure", "--plan", "--json", "--cohort", "breast-cancer", "--folder", str(tmp_path)]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["cells_to_measure"] == told["cells"] == 61
    assert main(["measure", "--plan", "--cohort", "nobody", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("MF-203 there are no results for nobody")


# ----------------------------------------------------------------------------------------------------------------- opacus


def test_opacus_spends_no_more_than_it_is_asked_and_repeats(row):
    split = open_split(row, 1, system_seams())
    records, setting = pooled_records(split.training), opacus_peer.SETTINGS[1]
    one, other = (
        opacus_peer.train_by_opacus(split.study, split.first, records, 3.0, 1e-3, setting, 1) for _ in range(2)
    )
    assert 2.5 < one.epsilon <= 3.0
    assert one.weights.tobytes() == other.weights.tobytes()
    assert np.abs(one.weights - split.first).max() > 0


def test_opacus_refusal_is_written_down_in_place_of_a_figure(row, tiny_cohort, monkeypatch):
    """Its unit is a record: where a patient has several, it promises less than the others on the page."""
    several = replace(COHORTS["tiny"], load=lambda files, wish: replace(tiny_cohort, seed=wish.seed))
    monkeypatch.setitem(COHORTS, "tiny", several)
    split = open_split(row, 1, system_seams())
    for key in (Key("opacus-choice", 3.0, None, 1), Key("opacus", 3.0, None, 1)):
        found = measure_cell(split, key, system_seams(), opacus_peer.SETTINGS[0].name)
        assert found.figures is None
        assert found.failed == "it protects records, and here patients have several"


def test_opacus_is_not_measured_before_its_setting_is_chosen(row, tmp_path):
    seams = system_seams()
    with pytest.raises(ConfigError, match="no setting of Opacus is chosen"):
        measure(tmp_path, plan(seams.files, tmp_path, [row], arms=["opacus"]), seams)
    assert not (tmp_path / "results_tiny.json").exists()


# ---------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(("second", "met"), [(0.86, True), (0.8599, False)])
def test_floor_is_judged_by_the_mean_of_the_distributed_federation(second, met):
    row = replace(TINY, floors=(Floors("any", {8.0: 0.88}),))
    local = [cell(epsilon=8.0, mode="local", seed=seed, auc=1.0) for seed in (1, 2)]
    (judged,) = judge(row, measured(cell(epsilon=8.0, auc=0.90), cell(epsilon=8.0, seed=2, auc=second), *local))
    assert judged.is_met is met
    assert judged.reached == pytest.approx((0.9 + second) / 2)


def test_floor_is_not_met_before_every_split_is_measured():
    row = replace(TINY, floors=(Floors("any", {8.0: 0.5}),))
    (judged,) = judge(row, measured(cell(epsilon=8.0)))
    assert judged.reached is None
    assert not judged.is_met


def test_worst_hospital_has_enough_patients_of_every_class():
    def of(value, fewest):
        return GroupFigure(value=value, records=40, fewest=fewest)

    found = [
        cell(seed=seed, hospitals={"A": of(0.9, 20), "B": of(0.8, 10), "C": of(0.1, 9), "D": of(None, 0)})
        for seed in (1, 2)
    ]
    name, mean = worst(found)
    assert (name, mean.value) == ("B", pytest.approx(0.8))
    assert left_out(found) == ["C", "D"]
    assert groups([], "hospitals") == {}


def test_standard_error_is_that_of_hanley_and_mcneil():
    """Of an AUC of .9 with 100 patients each: Q1 = .9 / 1.1, Q2 = 2 * .81 / 1.9."""
    variance = (0.09 + 99 * (0.9 / 1.1 - 0.81) + 99 * (1.62 / 1.9 - 0.81)) / 1e4
    assert standard_error(TINY, cell()) == pytest.approx(math.sqrt(variance))
    accuracy = replace(TINY, metric="accuracy")
    assert standard_error(accuracy, cell(metrics={"accuracy": 0.8})) == pytest.approx(math.sqrt(0.16 / 200))
    assert standard_error(replace(TINY, metric="c_index"), cell(metrics={"c_index": 0.7})) is None
    assert standard_error(TINY, cell(classes=[200, 0])) is None


# ------------------------------------------------------------------------------------------------------------------- page


def test_page_of_the_fixture_shows_means_floors_and_what_is_missing(fixture):
    """Its second split lacks the federation at epsilon 3 in distributed mode."""
    text = page([TINY], {TINY.name: fixture})
    start = text.index("| AUC, mean ± sd")
    lines = {line.split("|")[1].strip(): line for line in text[start : text.index("![", start)].splitlines() if line}
    one = next(each for each in fixture.cells if each.epsilon == 3.0 and each.mode == "distributed")
    shown = f"{one.metrics['auc']:.3f}".removeprefix("0")
    assert f"{shown} (1 of 2 splits)" in lines["**federation, distributed**"]
    assert " ± " in lines["federation, local"]
    assert "≥ .000, met" in lines["floor, any model"]
    assert f"≥ 1.100, {NOT_MEASURED}" in lines["floor, any model"]
    assert "1 of 1 measured floor met; 1 of 2 not measured" in text
    assert "1 of 13 trainings are not measured yet" in text
    assert "breathing alone" in text


def test_page_says_not_measured_of_a_cohort_without_figures():
    text = page([TINY], {TINY.name: cells.nothing(TINY.name)})
    assert f"**{NOT_MEASURED}**" in text
    assert "0 of 0 measured floors met; 2 of 2 not measured." in text
    assert "![" not in text


def test_page_says_missed_where_a_floor_is_missed(fixture):
    other = cell(epsilon=3.0, seed=2, auc=0.5, environment=fixture.cells[0].environment)
    whole = fixture.model_copy(update={"cells": [*fixture.cells, other]})
    assert "1.100: **missed** by" in page([TINY], {TINY.name: whole})
    assert "an earlier version of the study" in page([TINY], {TINY.name: whole})


def test_page_and_its_pictures_are_written_beside_the_figures(fixture, tmp_path):
    files, folder = system_seams().files, tmp_path / "results"
    cells.save(files, folder, fixture)
    assert cells.load(files, folder, TINY.name) == fixture
    written = write_page(files, folder, [TINY])
    assert written == [folder / "results_tiny.png", tmp_path / PAGE]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert "results/results_tiny.png" in written[1].read_text()


def test_file_of_figures_that_is_none_is_refused_by_its_field(tmp_path):
    (tmp_path / "tiny.json").write_text('{"format": 2, "cohort": "tiny"}')
    with pytest.raises(ConfigError, match=r"tiny\.json is not a file of results: format"):
        cells.load(system_seams().files, tmp_path, "tiny")


def test_results_page_is_what_the_committed_figures_give():
    """Written anew by ``make results``."""
    files = system_seams().files
    found = {row.name: cells.load(files, DOCS / "results", row.name) for row in ROWS}
    assert (DOCS / PAGE).read_text() == page(ROWS, found)
    pictures = {path.stem for path in (DOCS / "results").glob("*.png")}
    assert pictures == {name for name, one in found.items() if one.cells}


def test_committed_figures_belong_to_the_table():
    assert {path.stem for path in (DOCS / "results").glob("*.json")} <= {row.name for row in ROWS}
    for row in ROWS:
        found = cells.load(system_seams().files, DOCS / "results", row.name)
        assert {one.key for one in found.cells} <= set(keys(row))
        assert {one.environment for one in found.cells} == set(found.environments)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_of_the_table_fits_its_cohort(row):
    """Delta and metric are those of the catalogue, seeds at least five."""
    files = system_seams().files
    if row.cohort not in COHORTS:
        pytest.skip(f"no cohort {row.cohort} in this tree")
    if missing(files, row.cohort) is not None:
        pytest.skip(f"the data of {row.cohort} are not here")
    assert len(row.seeds) == len(set(row.seeds)) >= 5
    cohort = load_cohort(files, row.cohort, row.seeds[0], None)
    assert cohort.delta == row.delta
    assert row.study is not None or cohort.task == row.task
    task = load_task(files, row.task)
    if row.subgroup is not None:
        (feature,) = [one for one in task.data.features if one.name == row.subgroup.feature]
        assert feature.levels == list(row.subgroup.levels)
    if task.task.kind in ("binary", "multiclass"):
        labels = np.arange(20) % task.task.classes
        assert row.metric in meaning(task.task).metrics(np.full((20, task.task.classes), 0.5), labels)


def test_environment_names_tree_machine_and_packages():
    environment = this_environment()
    assert environment.tree
    assert {"torch", "opacus", "numpy", "medfed"} <= set(environment.versions)
    assert environment.name == Environment.model_validate(environment.model_dump()).name
