"""The wheel: every module under its import name, the files that belong to it, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("client", "models", "privacy", "server", "simulations", "studies")
SOURCES = ("medfed", *ROOMS)


def import_name(path: Path) -> str:
    """Where a file of the sources must lie in the wheel: the rooms stand beside the hall and are imported below it."""
    relative = path.relative_to(ROOT).as_posix()
    return relative if relative.startswith("medfed/") else f"medfed/{relative}"


def files_on_disk() -> set[Path]:
    return {
        path
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts
    }


def setuptools_table() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_on_disk_is_listed() -> None:
    """With an explicit package-dir nothing is found by itself: a new folder must be written into pyproject.toml."""
    folders = {path.parent for path in files_on_disk() if path.name == "__init__.py"}
    expected = {import_name(folder).replace("/", "."): folder.relative_to(ROOT).as_posix() for folder in folders}
    expected["medfed"] = expected.pop("medfed.medfed", "medfed")
    table = setuptools_table()
    assert sorted(table["packages"]) == sorted(expected)
    assert table["package-dir"] == expected


def test_every_folder_with_code_is_a_package() -> None:
    assert {path.parent for path in files_on_disk() if path.suffix == ".py"} == {
        path.parent for path in files_on_disk() if path.name == "__init__.py"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the checkout stays clean; without network, with the installed setuptools."""
    place = tmp_path_factory.mktemp("wheel")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, place / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place / "out"), str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (place / "out").glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_every_source_under_its_import_name_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {import_name(path) for path in files_on_disk()}


def test_wheel_holds_templates_and_type_marker(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "medfed/py.typed" in names
    assert {f"medfed/studies/{task}.toml" for task in ("breast-cancer", "heart-disease", "example")} <= names


def test_wheel_has_the_three_commands(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    scripts = wheel.read(entry_points).decode()
    for room in ("client", "server"):
        assert f"medfed-{room} = medfed.{room}.cli:main" in scripts
        assert (ROOT / room / "cli.py").exists()
    assert "medfed-simulate = medfed.simulations.cli:main" in scripts
    assert (ROOT / "simulations" / "cli.py").exists()


def test_wheel_says_what_it_needs(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    text = wheel.read(metadata).decode()
    for line in ("Name: medfed", "Requires-Python: >=3.11", "Requires-Dist: flwr==1.41.*", "Provides-Extra: sim"):
        assert line in text.splitlines()


def test_installed_wheel_is_imported_from_where_it_lies(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked anywhere, without the checkout: names resolve, templates are found."""
    wheel.extractall(tmp_path)
    program = (
        "import medfed, medfed.client.ledger, medfed.privacy.secagg.party, medfed.server.planning as planning;"
        "print(medfed.__file__); print(planning.template_names())"
    )
    # -S leaves the editable install's finder out; the libraries are named instead
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, *{libraries!r}]; {program}"
    done = subprocess.run([sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, templates = done.stdout.splitlines()
    assert where == str(tmp_path / "medfed" / "__init__.py")
    assert templates == str(sorted(path.stem for path in (ROOT / "studies").glob("*.toml")))


def test_what_the_tests_need_is_pinned() -> None:
    """A fresh clone installs from constraints.txt only: every direct dependency must stand in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].strip().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    named = {
        text.split(";")[0].split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip().lower() for text in wanted
    }
    assert named - pinned == set()
    assert "setuptools" in named
