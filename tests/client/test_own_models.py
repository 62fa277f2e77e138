"""Own models at a hospital: nothing of a package runs that its policy does not name, and gradients are what they should be."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medfed.client.approval import caps_of, preview, review
from medfed.client.cli import main
from medfed.client.explain import _code, _runs, card, in_words
from medfed.client.ledger import Ledger
from medfed.client.own_models import allowed_model, require_true_gradients
from medfed.client.policy import Policy
from medfed.client.run_checks import _require_known_code, refuse_code
from medfed.errors import ExitStatus, MedfedError
from medfed.models import catalogue
from medfed.models.loading import load
from medfed.models.own_packages import read_package
from medfed.seams import system_seams
from medfed.server.planning import load_task
from medfed.server.study_file import render
from medfed.study import Study

MakeStudy = Callable[..., Study]
LOGISTIC = 'name = "logistic-regression"\nhidden = []'
HEART = Path(os.environ.get("MEDFED_DATA", "data")) / "heart_disease_uci"


def model_of(entry_point: str = "gated", **settings: object) -> dict[str, object]:
    return {
        "name": "own",
        "package": "ward-models",
        "entry_point": entry_point,
        "package_sha256": read_package("ward-models").sha256,
        "settings": settings or {"width": 5},
        "first_model_sha256": "ab" * 32,
    }


def model_table() -> str:
    return (
        'name = "own"\npackage = "ward-models"\nentry_point = "gated"\nsettings = { width = 8 }\n'
        f'package_sha256 = "{read_package("ward-models").sha256}"'
    )


def policy_of(own_models: list[str], models: list[str]) -> Policy:
    return Policy(
        max_epsilon_study=8.0,
        max_epsilon_lifetime=8.0,
        lifetime_delta=0.001,
        max_delta=0.01,
        min_noise_multiplier=0.5,
        min_hospitals=3,
        min_honest=2,
        min_colluders=1,
        modes=["local"],
        units=["patient"],
        tasks=["binary"],
        models=models,  # type: ignore[arg-type]
        own_models=own_models,
        max_sampling_rate=1.0,
        max_attempts=100,
        max_records_per_patient=10,
    )


# ------------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize(
    ("own_models", "models"), [([], ["mlp", "own"]), (["other-models"], ["own"]), (["ward-models"], ["mlp"])]
)
def test_package_that_the_policy_does_not_name_is_refused_before_its_code_runs(
    own_models: list[str], models: list[str], ward_models: Path, make_study: MakeStudy
) -> None:
    study = make_study({"model": model_of()})
    with pytest.raises(MedfedError, match="MF-134 code of package ward-models is not allowed here"):
        allowed_model(study, policy_of(own_models, models))
    with pytest.raises(MedfedError, match="MF-134"):
        policy_of(own_models, models).admit(study)
    assert "ward_models" not in sys.modules
    # the control
    policy = policy_of(["ward-models"], ["own"])
    policy.admit(study)
    assert sum(weight.numel() for weight in allowed_model(study, policy).parameters()) == 2 * (3 * 5 + 5) + 5 + 1


# ------------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("Borrows", "MF-160 own.first.weight is used outside its layer"),
        ("MeanGradient", "MF-160 the gradient engine's sums are not those of each record taken alone"),
    ],
)
def test_own_model_whose_gradients_the_engine_would_not_see_is_refused(
    fault: str, said: str, ward_models: Path, make_study: MakeStudy
) -> None:
    """Both keep records' outputs apart, and pass the trial of that."""
    study = make_study({"model": model_of("faulty", fault=fault)})
    model = catalogue.build(study)
    with pytest.raises(MedfedError) as refused:
        require_true_gradients(study, model)
    assert str(refused.value).startswith(said)
    with pytest.raises(MedfedError):
        allowed_model(study, policy_of(["ward-models"], ["own"]))


@pytest.mark.parametrize(
    ("name", "settings", "changes"),
    [
        ("gated", {"width": 5}, {"task": {"kind": "multiclass", "label": "ill", "classes": 3}}),
        ("adapted", {"rank": 2}, {}),
        (
            "tower",
            {"channels": 4},
            {
                "data.features": [],
                "data.image": {"column": "film", "height": 12, "width": 10, "center": 0.5, "scale": 0.25},
            },
        ),
        (
            "notes",
            {"width": 5},
            {
                "data.features": [],
                "data.text": {"column": "note", "tokens": "hashed-words", "buckets": 256, "length": 11},
            },
        ),
    ],
)
def test_own_model_that_the_engine_sees_whole_passes_the_oracle(
    name: str, settings: dict[str, object], changes: dict[str, object], ward_models: Path, make_study: MakeStudy
) -> None:
    study = make_study({"model": model_of(name, **settings), **changes})
    generator = torch.get_rng_state()
    require_true_gradients(study, catalogue.build(study))
    assert not torch.equal(
        torch.get_rng_state(), generator
    )  # first weights are drawn by chance; the trial draws nothing of it


# ------------------------------------------------------------------------------------------- a hospital, from day to day


def test_study_says_that_it_runs_code_and_reads_back(ward_models: Path, make_study: MakeStudy) -> None:
    study = make_study({"model": model_of("gated", width=5, rate=0.5, deep=True, kind="plain")})
    text = render(study)
    assert 'settings = { width = 5, rate = 0.5, deep = true, kind = "plain" }' in text
    assert study.model.package_sha256 in text  # type: ignore[union-attr]
    other = make_study({"model": {**model_of(), "package_sha256": "0" * 64}})
    assert other.hash() != make_study({"model": model_of()}).hash()
    code = _code(study)
    assert code is not None
    said = "\n".join(_runs(code))
    assert "IT RUNS CODE THAT IS NOT MEDFED'S: package ward-models" in said
    assert read_package("ward-models").sha256 in said
    assert _code(make_study()) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"package": "Ward_Models"},
        {"package": "../ward"},
        {"entry_point": "os:system"},
        {"package_sha256": "ab"},
        {"settings": {"Width": 1}},
        {"settings": {"width": [1]}},
        {"settings": {"note": "two\nlines"}},
        {"settings": {"rate": 1e300}},
        {"code": "print()"},
    ],
)
def test_study_with_an_own_model_that_is_no_data_is_refused(
    changes: dict[str, object], ward_models: Path, make_study: MakeStudy
) -> None:
    with pytest.raises(ValueError, match="validation error"):
        make_study({"model": {**model_of(), **changes}})


def test_statistics_with_an_own_model_are_refused(ward_models: Path, make_study: MakeStudy) -> None:
    """They are folded into a first layer that medfed would have to know."""
    asked = {"statistics": {"noise_multiplier": 4.0, "attempts": 1, "least_scale": 0.02, "range": 64.0}}
    assert make_study(asked).statistics is not None
    with pytest.raises(ValueError, match="statistics are for logistic-regression and mlp, not for own"):
        make_study({"model": model_of(), **asked})


def test_hospital_starts_with_the_approved_package_only(ward_models: Path, make_world: Callable[..., object]) -> None:
    world = make_world((LOGISTIC, model_table()))
    world.start(0)  # type: ignore[attr-defined]
    source = ward_models / "ward_models" / "models.py"
    text = source.read_text()
    source.write_text(text.replace("torch.tanh", "torch.relu"))
    with pytest.raises(MedfedError, match="MF-161 package ward-models as installed here is not the one that the study"):
        world.start(0)  # type: ignore[attr-defined]
    source.write_text(text)
    world.start(0)  # type: ignore[attr-defined]
    config = world.folder / world.names[0] / "hospital.toml"  # type: ignore[attr-defined]
    config.write_text(config.read_text().replace('own_models = ["ward-models"]', "own_models = []"))
    with pytest.raises(MedfedError, match="MF-134 code of package ward-models is not allowed here"):
        world.start(0)  # type: ignore[attr-defined]


def test_approval_card_says_whose_code_will_run(ward_models: Path, make_world: Callable[..., object]) -> None:
    world = make_world((LOGISTIC, model_table()))
    site = world.site(0)  # type: ignore[attr-defined]
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        standing = ledger.standing(world.study_hash)  # type: ignore[attr-defined]
        reviewed = review(site, world.office.study_path, [], standing)  # type: ignore[attr-defined]
        asked = card(reviewed, preview(site, reviewed, ledger), caps_of(site), coordinator_confirmed=False)
    assert asked["code"] == {
        "package": "ward-models",
        "package_sha256": read_package("ward-models").sha256,
        "entry_point": "gated",
    }
    said = "\n".join(in_words(asked))
    assert "It trains: own package=ward-models entry_point=gated" in said
    assert "IT RUNS CODE THAT IS NOT MEDFED'S: package ward-models" in said


def test_run_with_an_own_model_is_verified_only_where_a_policy_names_the_package(
    ward_models: Path, make_study: MakeStudy, make_world: Callable[..., object]
) -> None:
    study = make_study({"model": model_of()})
    with pytest.raises(MedfedError, match="MF-134 this run's model is code of package ward-models"):
        _require_known_code(study, None)
    with pytest.raises(MedfedError, match="MF-134 code of package ward-models is not allowed here"):
        _require_known_code(study, make_world().site(0))  # type: ignore[attr-defined]
    _require_known_code(study, make_world((LOGISTIC, model_table())).site(0))  # type: ignore[attr-defined]
    _require_known_code(make_study(), None)


def test_models_command_lists_what_is_installed_and_what_is_allowed(
    ward_models: Path, make_world: Callable[..., object]
) -> None:
    world = make_world((LOGISTIC, model_table()))
    config = str(world.folder / world.names[0] / "hospital.toml")  # type: ignore[attr-defined]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["models", "--json", "--config", config]) == ExitStatus.HANDLED
    (one,) = json.loads(out.getvalue())["own"]
    assert (one["package"], one["allowed"]) == ("ward-models", True)
    assert one["sha256"] == read_package("ward-models").sha256


def test_coordinator_plans_no_study_with_a_model_that_couples(
    ward_models: Path, make_world: Callable[..., object]
) -> None:
    table = model_table().replace('"gated"', '"faulty"').replace("width = 8", 'fault = "BatchMean"')
    with pytest.raises(MedfedError, match="MF-160 what the model says of a record depends on the others of its batch"):
        make_world((LOGISTIC, table))


@pytest.mark.skipif(not HEART.exists(), reason="needs heart-disease in MEDFED_DATA")
def test_own_model_learns_heart_disease_in_a_private_federation(ward_models: Path, tmp_path: Path) -> None:
    """End to end: four hospitals of real patients, epsilon 8, local noise; far above chance (0.5)."""
    from medfed.simulations.cohorts import load_cohort
    from medfed.simulations.rehearsal import Rehearsal
    from medfed.simulations.runs import simulate

    files = system_seams().files
    task = (Path(__file__).parent.parent.parent / "studies" / "heart-disease.toml").read_text()
    assert LOGISTIC in task
    (tmp_path / "task.toml").write_text(task.replace(LOGISTIC, model_table()))
    assert load_task(files, str(tmp_path / "task.toml")).model.name == "own"
    cohort = replace(load_cohort(files, "heart-disease", 43, None), task=str(tmp_path / "task.toml"))
    done = simulate(
        None, [cohort], Rehearsal(epsilon=8.0, mode="local", seed=1), out=tmp_path / "run", has_baseline=False
    )
    (score,) = done.outcomes
    assert (score.scores.metrics["auc"] or 0.0) > 0.8


def test_released_own_model_is_not_made_where_the_policy_does_not_name_its_package(
    ward_models: Path, make_study: MakeStudy, release: Callable[..., Path], tmp_path: Path
) -> None:
    """A run's folder comes from the coordinator: what it names must not run because it happens to be installed."""
    study = make_study({"model": model_of()})
    folder = release(tmp_path / "run", study)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ward_models"]:
        del sys.modules[name]
    for admit in (policy_of([], ["own"]).admit_code, refuse_code):
        with pytest.raises(MedfedError, match="MF-134"):
            load(folder, None, admit)
    assert "ward_models" not in sys.modules
    assert load(folder, None, policy_of(["ward-models"], ["own"]).admit_code).study == study
