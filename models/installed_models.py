"""Which models there are on this machine: the catalogue, and the installed packages of own models. Runs no code of these."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypedDict, get_args

from medfed.errors import MedfedError
from medfed.model_choice import READS, ModelName
from medfed.models.own_packages import GROUP, installed_packages, read_package


class Installed(TypedDict):
    """A package of own models. ``sha256``: null where ``refused`` says why it cannot be used. ``allowed``: by the hospital's
    policy, null where none was looked at."""

    package: str
    version: str | None
    sha256: str | None
    entry_points: list[str]
    allowed: bool | None
    refused: str | None


class Models(TypedDict):
    """``catalogue``: name -> the kinds of record it takes."""

    catalogue: dict[str, list[str]]
    own: list[Installed]


def models(allowed: Collection[str] | None) -> Models:
    """All of them. ``allowed``: packages that a hospital's policy names; None where there is no hospital."""
    names = [name for name in get_args(ModelName) if name != "own"]
    return Models(
        catalogue={name: sorted(READS[name]) for name in names},
        own=[_installed(name, None if allowed is None else name in allowed) for name in installed_packages()],
    )


def _installed(name: str, is_allowed: bool | None) -> Installed:
    try:
        package = read_package(name)
        points = sorted(package.entry_points)
    except MedfedError as error:
        return Installed(
            package=name, version=None, sha256=None, entry_points=[], allowed=is_allowed, refused=str(error)
        )
    return Installed(
        package=name,
        version=package.version,
        sha256=package.sha256,
        entry_points=points,
        allowed=is_allowed,
        refused=None,
    )


def in_words(found: Models) -> Iterator[str]:
    """For a terminal."""
    yield "The catalogue:"
    for name, kinds in found["catalogue"].items():
        yield f"  {name:22} of {', '.join(kinds)}"
    yield f"Installed packages of own models (entry points {GROUP}):" if found["own"] else "No package of own models."
    for one in found["own"]:
        if one["refused"] is not None:
            yield f"  {one['package']}: {one['refused']}"
            continue
        mark = {None: "", True: ", allowed here", False: ", NOT ALLOWED by hospital.toml"}[one["allowed"]]
        yield f"  {one['package']} {one['version']}{mark}: {', '.join(one['entry_points'])}"
        yield f'    package_sha256 = "{one["sha256"]}"'
