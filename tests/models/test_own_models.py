"""Own models: whose code it is, to the byte, and that a model which couples records is not let in."""

from __future__ import annotations

import importlib
import json
import os
import py_compile
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medfed.errors import MedfedError, UnsupportedModel
from medfed.models import catalogue
from medfed.models.installed_models import in_words, models
from medfed.models.own_model import OwnModel
from medfed.models.own_packages import installed_packages, load_entry_point, read_package
from medfed.models.separability import require_separable
from medfed.study import Study

MakeStudy = Callable[..., Study]
VARIABLE = {"unit": "", "minimum": -9.0, "maximum": 9.0, "center": 0.0, "scale": 1.0, "outside": "clip"}
IMAGE = {"column": "film", "height": 12, "width": 10, "center": 0.5, "scale": 0.25}
SERIES = {"steps": 9, "step_hours": 1.0, "variables": [{"name": "pulse", **VARIABLE}], "fill": "center"}
TEXT = {"column": "note", "tokens": "hashed-words", "buckets": 256, "length": 11}
GOOD: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "gated": ({"width": 5}, {}),
    "tower": ({"channels": 4}, {"data.features": [], "data.image": IMAGE}),
    "notes": ({"width": 5}, {"data.features": [], "data.text": TEXT}),
    "stays": ({"width": 5}, {"data.series": SERIES}),
    "adapted": ({"rank": 2}, {}),
}


def own_study(
    make_study: MakeStudy, entry_point: str, settings: dict[str, object], changes: dict[str, object] | None = None
) -> Study:
    model = {
        "name": "own",
        "package": "ward-models",
        "entry_point": entry_point,
        "package_sha256": read_package("ward-models").sha256,
        "settings": settings,
        "first_model_sha256": "ab" * 32,
    }
    return make_study({"model": model, **(changes or {})})


# ------------------------------------------------------------------------------------------------ models that are let in


@pytest.mark.parametrize("name", GOOD)
def test_own_model_that_keeps_records_apart_is_built(name: str, ward_models: Path, make_study: MakeStudy) -> None:
    settings, changes = GOOD[name]
    study = own_study(make_study, name, settings, changes)
    torch.manual_seed(5)
    model = catalogue.build(study)
    assert isinstance(model, OwnModel)
    require_separable(model)
    records = torch.ones(3, *study.data.shape, dtype=torch.int64 if study.data.is_tokens else torch.float32)
    assert model(records).shape == (3, 1)
    # a second one is not tried out again, and takes as many numbers of the generator as the first
    torch.manual_seed(5)
    again = catalogue.build(study)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_own_model_of_listed_layers_alone_is_built(ward_models: Path, make_study: MakeStudy) -> None:
    assert isinstance(catalogue.build(own_study(make_study, "faulty", {"fault": "Sequential"})), OwnModel)


# --------------------------------------------------------------------------------------------------- models that are not

COUPLED = "MF-160 what the model says of a record depends on the others of its batch"
REFUSED = {
    "BatchMean": COUPLED,
    "HiddenBatchMean": COUPLED,
    "ByRank": COUPLED,
    "ByPlace": COUPLED,
    "BySize": COUPLED,
    "WhenSpoiled": COUPLED,
    "HiddenBackward": "MF-160 what the model says of a record has a gradient by another record's inputs",
    "Chance": "MF-160 what the model says of a record depends|MF-160 the model says something else when asked again",
    "ConstantByChance": "MF-160 two models of the package with the same parameters say different things",
    "Remembers": "MF-160 what the model says of a record depends|MF-160 the model says something else when asked again",
    "Writes": "MF-160 a forward pass changes a parameter|MF-160 the model says something else when asked again",
    "Holds": "MF-160 the model: Holds holds parameter scale itself",
    "Buffer": "MF-160 the model: Buffer has a buffer",
    "Tensor": "MF-160 the model: Tensor holds a tensor",
    "Hooked": "MF-160 first: Linear has hooks",
    "Frozen": "MF-160 parameter first.weight is frozen and drawn by chance",
    "Dropping": "MF-160 drop: Dropout is chance",
    "Normed": "MF-160 norm: BatchNorm1d is not known to keep patients apart",
    "Replaced": "MF-160 first: Linear has a method replaced",
    "Answers": "MF-160 the model: Answers has taped_forward",
    "Mute": "MF-160 the model says the same of all made-up records",
    "Flat": "MF-160 the model does not give 1 numbers of each of 1 records",
    "Stepwise": "MF-160 steps: GRU with batch_first = False: use batch_first = True",
    "Raises": r"MF-162 code of package ward-models failed \(RuntimeError\)",
    "NoModel": "MF-162 package ward-models made a float",
    "Endless": "MF-203 model of 6000000",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_own_model_with_a_fault_is_refused(fault: str, ward_models: Path, make_study: MakeStudy) -> None:
    with pytest.raises(MedfedError) as refused:
        catalogue.build(own_study(make_study, "faulty", {"fault": fault}))
    assert re.match(REFUSED[fault], str(refused.value)), str(refused.value)
    assert "4711" not in str(refused.value)
    assert refused.value.__cause__ is None or isinstance(refused.value, UnsupportedModel)


def test_own_model_without_the_fault_is_let_in(ward_models: Path, make_study: MakeStudy) -> None:
    """The control: what all the faulty ones are made of."""
    assert isinstance(catalogue.build(own_study(make_study, "faulty", {"fault": "none"})), OwnModel)


def test_layer_put_in_after_the_looking_over_is_refused(ward_models: Path, make_study: MakeStudy) -> None:
    model = catalogue.build(own_study(make_study, "gated", {"width": 5}))
    assert isinstance(model, OwnModel)
    model.own.much = torch.nn.BatchNorm1d(3)
    with pytest.raises(UnsupportedModel, match=r"MF-160 own\.much: BatchNorm1d mixes patients"):
        require_separable(model)
    with pytest.raises(UnsupportedModel, match="MF-160 the model: Gated is not known"):
        require_separable(model.own)


# ---------------------------------------------------------------------------------------------------------- the package


def refusal(study: Study) -> str:
    with pytest.raises(MedfedError) as refused:
        catalogue.build(study)
    return str(refused.value)


def test_hash_is_of_paths_and_contents_and_not_of_caches(ward_models: Path) -> None:
    before = read_package("ward-models").sha256
    assert read_package("ward-models").sha256 == before
    for cache in ward_models.rglob("*.pyc"):
        cache.unlink()
    (ward_models / "ward_models" / "stray.py").write_text("raise SystemExit")  # in no RECORD, never run
    (next(ward_models.glob("*.dist-info")) / "INSTALLER").write_text("another\n")
    assert read_package("ward-models").sha256 == before
    source = ward_models / "ward_models" / "models.py"
    source.write_text(source.read_text().replace("torch.tanh", "torch.atan"))
    assert read_package("ward-models").sha256 != before


def test_tampered_file_of_the_package_is_refused(ward_models: Path, make_study: MakeStudy) -> None:
    study = own_study(make_study, "gated", {"width": 5})
    catalogue.build(study)
    source = ward_models / "ward_models" / "faulty.py"  # not even the module that is used
    source.write_text(source.read_text() + "\n")
    assert refusal(study).startswith("MF-161 package ward-models as installed here is not the one that the study names")


def test_tampered_entry_point_is_refused(ward_models: Path, make_study: MakeStudy) -> None:
    study = own_study(make_study, "gated", {"width": 5})
    points = next(ward_models.glob("*.dist-info")) / "entry_points.txt"
    points.write_text(points.read_text().replace("models:gated", "models:tower"))
    assert refusal(study).startswith("MF-161 package ward-models as installed here is not the one")


def test_tampered_cache_of_a_module_is_not_run(ward_models: Path, make_study: MakeStudy) -> None:
    """Python alone would run it: its time and size are those of the source."""
    source = ward_models / "ward_models" / "models.py"
    status, text = source.stat(), source.read_text()
    source.write_text("raise SystemExit\n".ljust(status.st_size, "#"))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    py_compile.compile(str(source), doraise=True)
    source.write_text(text)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert isinstance(catalogue.build(own_study(make_study, "gated", {"width": 5})), OwnModel)
    # the control: whoever imports it without medfed runs the cache
    for name in [name for name in sys.modules if name.split(".")[0] == "ward_models"]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_Verified"]
    importlib.invalidate_caches()
    with pytest.raises(SystemExit):
        importlib.import_module("ward_models.models")


def test_file_changed_between_hash_and_import_is_not_run(ward_models: Path) -> None:
    package = read_package("ward-models")
    (ward_models / "ward_models" / "models.py").write_text("raise SystemExit")
    assert callable(load_entry_point(package, "gated"))


def test_module_imported_before_it_was_checked_is_refused(ward_models: Path, make_study: MakeStudy) -> None:
    study = own_study(make_study, "gated", {"width": 5})
    importlib.import_module("ward_models")
    assert refusal(study).startswith("MF-161 a module ward_models was imported before package ward-models was checked")


def test_editable_install_is_refused(ward_models: Path) -> None:
    told = {"url": "file:///somewhere", "dir_info": {"editable": True}}
    (next(ward_models.glob("*.dist-info")) / "direct_url.json").write_text(json.dumps(told))
    with pytest.raises(MedfedError, match="MF-161 package ward-models is installed as a link to sources"):
        read_package("ward-models")


RECORDS = {
    "../../bin/ward,,": "has files outside its folder",
    "/etc/hosts,,": "has files outside its folder",
    "ward.pth,,": "is installed as a link to sources, or has code that runs at every start of Python",
    "ward_models/lost.py,,": "lacks a file that its RECORD lists",
}


@pytest.mark.parametrize("line", RECORDS)
def test_record_that_lists_what_no_wheel_should_is_refused(line: str, ward_models: Path) -> None:
    record = next(ward_models.glob("*.dist-info")) / "RECORD"
    record.write_text(record.read_text() + line + "\n")
    with pytest.raises(MedfedError, match=f"MF-161 package ward-models {RECORDS[line]}"):
        read_package("ward-models")


def test_file_of_the_package_that_is_a_link_to_elsewhere_is_refused(ward_models: Path, tmp_path: Path) -> None:
    source = ward_models / "ward_models" / "models.py"
    (tmp_path / "elsewhere.py").write_text(source.read_text())
    source.unlink()
    source.symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(MedfedError, match="MF-161 package ward-models has files outside its folder"):
        read_package("ward-models")


def test_package_without_record_or_not_installed_is_refused(ward_models: Path) -> None:
    (next(ward_models.glob("*.dist-info")) / "RECORD").unlink()
    with pytest.raises(MedfedError, match=r"MF-161 package ward-models (has no RECORD|is installed as)"):
        read_package("ward-models")
    with pytest.raises(MedfedError, match="MF-161 package other-models is not installed here"):
        read_package("other-models")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("import requests", "imports requests, which its hash does not cover"),
        ("from subprocess import run", "imports subprocess, which its hash does not cover"),
        ("def f(:", "holds a module that is no Python"),
    ],
)
def test_code_that_imports_what_the_hash_does_not_cover_is_refused(
    line: str, what: str, ward_models: Path, make_study: MakeStudy
) -> None:
    (ward_models / "ward_models" / "faulty.py").write_text(line + "\n")
    assert what in refusal(own_study(make_study, "gated", {"width": 5}))


def test_entry_point_that_is_not_the_packages_own_is_refused(ward_models: Path, make_study: MakeStudy) -> None:
    points = next(ward_models.glob("*.dist-info")) / "entry_points.txt"
    points.write_text("[medfed.models]\nshell = os:system\nsame = ward_models.models:Gated\n")
    assert "names no module:function of its own" in refusal(own_study(make_study, "shell", {}))
    assert "has no entry point of this name in medfed.models: name one of: same, shell" in refusal(
        own_study(make_study, "gated", {})
    )
    # a class is called, too, and takes other arguments than it gets
    assert refusal(own_study(make_study, "same", {})).startswith(
        "MF-162 code of package ward-models failed (TypeError)"
    )


def test_package_that_takes_a_name_of_pythons_is_refused(ward_models: Path, make_study: MakeStudy) -> None:
    record = next(ward_models.glob("*.dist-info")) / "RECORD"
    (ward_models / "json").mkdir()
    (ward_models / "json" / "__init__.py").write_text("")
    record.write_text(record.read_text() + "json/__init__.py,,\n")
    assert "calls a module json, which there is already" in refusal(own_study(make_study, "gated", {"width": 5}))


def test_installed_models_are_listed_with_hash_and_not_imported(ward_models: Path) -> None:
    assert installed_packages() == ["ward-models"]
    found = models(["ward-models"])
    (one,) = found["own"]
    assert (one["sha256"], one["allowed"], one["refused"]) == (read_package("ward-models").sha256, True, None)
    assert one["entry_points"] == ["adapted", "faulty", "gated", "notes", "stays", "tower"]
    assert "table" in found["catalogue"]["mlp"] and "own" not in found["catalogue"]
    assert "ward_models" not in sys.modules
    lines = list(in_words(models([])))
    assert "  ward-models 1.0, NOT ALLOWED by hospital.toml: adapted, faulty, gated, notes, stays, tower" in lines
    assert f'    package_sha256 = "{one["sha256"]}"' in lines
    (ward_models / "ward_models" / "models.py").unlink()
    assert "MF-161" in list(in_words(models(None)))[-1]
