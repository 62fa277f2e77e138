"""A hospital group's own package of models: found where pip installed it, hashed, and imported from the bytes that were hashed.

A study pins the hash; a hospital's policy names the package. Python would run a cached ``.pyc`` in the place of a source, and a
file may change between the look and the import: so modules of such a package are compiled from the verified bytes alone.
"""

from __future__ import annotations

import ast
import configparser
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType

from medfed.errors import ConfigError, MedfedError, PrivacyError
from medfed.seams import Files, SystemFiles

GROUP = "medfed.models"
MOST_FILES, MOST_BYTES = 1000, 256 << 20

_DOMAIN = b"medfed/own-package/v1"
# what an installer writes of itself, and caches that are never run here; all else of a package counts
_NOT_HASHED = frozenset(
    {"RECORD", "RECORD.jws", "RECORD.p7s", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json"}
)

MAY_IMPORT = frozenset(
    {
        "torch",
        "numpy",
        "medfed",
        "__future__",
        "abc",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "itertools",
        "math",
        "operator",
        "pkgutil",  # get_data reads the package's own files from the bytes that were hashed
        "typing",
    }
)
"""Packages that an own model's code may import beside itself: other code would not be in its hash."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnPackage:
    """An installed package's bytes. ``files``: relative path -> content, of everything that is hashed; ``sha256``: over them."""

    name: str
    version: str
    folder: Path
    files: Mapping[str, bytes]
    sha256: str

    @property
    def entry_points(self) -> dict[str, str]:
        """Name -> ``module:function``, of the group ``medfed.models``."""
        text = next((data for path, data in self.files.items() if path.endswith(".dist-info/entry_points.txt")), b"")
        parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        try:
            parser.read_string(text.decode())
        except (UnicodeDecodeError, configparser.Error):
            raise _refused(self.name, "has an entry_points.txt that cannot be read") from None
        return dict(parser[GROUP]) if parser.has_section(GROUP) else {}

    @property
    def modules(self) -> dict[str, str]:
        """Dotted name -> path of its source."""
        found = {}
        for path in self.files:
            if path.endswith(".py"):
                parts = PurePosixPath(path).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found


def read_package(name: str, files: Files | None = None) -> OwnPackage:
    """The bytes of the installed package ``name``, and their hash. Nothing of it is imported or run.

    The hash is SHA-256 over each file's path and SHA-256, sorted by path: of all files that pip's ``RECORD`` lists but those that
    tell how it was installed, and caches. Raises ``ConfigError`` MF-161 for a package that is not installed, is installed as a
    link to sources (editable), has files outside its folder, or a ``.pth`` file (which runs at every start of Python).
    """
    files = files or SystemFiles()  # not a seam's: Python's import reads the real disk, too
    try:
        found = importlib.metadata.distribution(name)
        listed = found.files
    except (importlib.metadata.PackageNotFoundError, UnicodeDecodeError, ValueError):
        raise ConfigError(161, f"package {name} is not installed here", "pip install its wheel") from None
    if listed is None:
        raise _refused(name, "has no RECORD of its files", "install it from a wheel with pip")
    folder = Path(str(found.locate_file("."))).resolve()
    content: dict[str, bytes] = {}
    size = 0
    for path in listed:
        place = PurePosixPath(path)
        if place.is_absolute() or ".." in place.parts or not (folder / place).resolve().is_relative_to(folder):
            raise _refused(name, "has files outside its folder", "build it without scripts and data files")
        if place.suffix == ".pth":
            raise _refused(name, "is installed as a link to sources, or has code that runs at every start of Python")
        if _is_apart(place):
            continue
        data = _content(name, files, folder / place)
        size += len(data)
        if len(content) == MOST_FILES or size > MOST_BYTES:
            raise _refused(name, f"is larger than {MOST_FILES} files or {MOST_BYTES >> 20} MiB", "build a smaller one")
        content[place.as_posix()] = data
    _require_wheel(name, files, folder, {PurePosixPath(path).parent for path in content})
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in content.items()}
    told = json.dumps(sorted(digests.items()), separators=(",", ":")).encode()
    return OwnPackage(name, found.version, folder, content, hashlib.sha256(_DOMAIN + b"\0" + told).hexdigest())


def verified_package(name: str, sha256: str) -> OwnPackage:
    """``read_package``, and ``PrivacyError`` MF-161 if the study pins another hash."""
    package = read_package(name)
    if package.sha256 != sha256:
        hashes = f"({package.sha256[:12]}..., not {sha256[:12]}...)"
        what = f"package {name} as installed here is not the one that the study names {hashes}"
        raise PrivacyError(161, what, "install the wheel that was agreed on; medfed-client models tells its hash")
    return package


def installed_packages() -> list[str]:
    """Names, in pip's normal form, of the installed packages that offer own models, by their metadata alone."""
    names = {point.dist.name for point in importlib.metadata.entry_points(group=GROUP) if point.dist is not None}
    return sorted(re.sub(r"[-_.]+", "-", name).lower() for name in names)


def load_entry_point(package: OwnPackage, name: str) -> object:
    """What the package's entry point ``name`` stands for, imported from the package's verified bytes.

    Raises ``ConfigError`` MF-161: no such entry point, its module is not among the package's files, code that imports others than
    ``MAY_IMPORT``, or a module of that name was imported from elsewhere before; MF-162 if the import fails.
    """
    points = package.entry_points
    if name not in points:
        known = ", ".join(sorted(points)) or "none"
        raise _refused(package.name, f"has no entry point of this name in {GROUP}", f"name one of: {known}")
    module, _, attribute = points[name].partition(":")
    if module not in package.modules or not attribute.isidentifier():
        raise _refused(package.name, f"names no module:function of its own as entry point {name}")
    _serve(package)
    try:
        return getattr(importlib.import_module(module), attribute)
    except MedfedError:
        raise
    except Exception as error:
        what = f"package {package.name} could not be imported ({type(error).__name__})"
        raise ConfigError(162, what, "ask its authors") from None


def is_of_package(kind: type, package: OwnPackage) -> bool:
    """Whether a class was defined in a module that was imported from this package's verified bytes."""
    module = sys.modules.get(kind.__module__)
    return _is_served(module, package.sha256)


# ------------------------------------------------------------------------------------------------------------ the files


def _is_apart(place: PurePosixPath) -> bool:
    in_metadata = place.parent.suffix == ".dist-info"
    return (in_metadata and place.name in _NOT_HASHED) or "__pycache__" in place.parts


def _require_wheel(name: str, files: Files, folder: Path, inside: set[PurePosixPath]) -> None:
    """That pip put a wheel's files here, and did not only note where the sources are."""
    metadata = [place for place in inside if place.suffix == ".dist-info"]
    if not metadata:
        raise _refused(name, "has no metadata of a wheel")
    for place in metadata:
        path = folder / place / "direct_url.json"
        try:
            told = json.loads(files.read(path)) if files.exists(path) else {}
            is_link = bool(told.get("dir_info", {}).get("editable", False))
        except (ValueError, AttributeError):
            is_link = True  # unknown means refuse
        if is_link:
            raise _refused(name, "is installed as a link to sources")


def _content(name: str, files: Files, path: Path) -> bytes:
    try:
        return files.read(path, limit_bytes=MOST_BYTES)
    except MedfedError:
        raise _refused(name, "lacks a file that its RECORD lists, or one cannot be read", "install it anew") from None


def _refused(name: str, why: str, remedy: str = "install it from a wheel of pure Python with pip") -> ConfigError:
    return ConfigError(161, f"package {name} {why}", remedy)


# ----------------------------------------------------------------------------------------------------------- the import


class _Verified(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):  # type: ignore[misc]
    """Imports the modules of one package from bytes in memory: no cache is read or written, nothing else is found under its
    names."""

    def __init__(self, package: OwnPackage) -> None:
        self.sha256 = package.sha256
        self.tops = frozenset(name.split(".")[0] for name in package.modules)
        self._modules = {name: str(package.folder / path) for name, path in package.modules.items()}
        self._content = {str(package.folder / path): data for path, data in package.files.items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self.tops:
            return None
        if fullname not in self._modules:
            raise ModuleNotFoundError(f"{fullname} is not in the package", name=fullname)
        source = self._modules[fullname]
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=source, is_package=source.endswith("__init__.py"))
        spec.has_location = True
        return spec

    def get_filename(self, fullname: str) -> str:
        return self._modules[fullname]

    def get_data(self, path: str | bytes) -> bytes:
        """Of sources, and of the package's own data files; ``SourceLoader`` looks for no cache, as there are no times."""
        try:
            return self._content[path if isinstance(path, str) else path.decode()]
        except KeyError:
            raise OSError("not in the package") from None

    def is_package(self, fullname: str) -> bool:
        return self._modules[fullname].endswith("__init__.py")


def _is_served(module: ModuleType | None, sha256: str) -> bool:
    loader = getattr(module, "__loader__", None)
    return isinstance(loader, _Verified) and loader.sha256 == sha256


def _serve(package: OwnPackage) -> None:
    """Let ``import`` find the package's modules in its verified bytes; those of an earlier look stay, if they are the same."""
    tops = {name.split(".")[0] for name in package.modules}
    for top in sorted(tops):
        if top in sys.stdlib_module_names or top in MAY_IMPORT:
            raise _refused(
                package.name, f"calls a module {top}, which there is already", "ask its authors to rename it"
            )
        if top in sys.modules and not _is_served(sys.modules[top], package.sha256):
            what = (
                f"a module {top} was imported before package {package.name} was checked, or is of another version of it"
            )
            raise ConfigError(161, what, "start again with one version installed")
    _require_known_imports(package, tops)
    if not any(isinstance(finder, _Verified) and finder.sha256 == package.sha256 for finder in sys.meta_path):
        sys.meta_path.insert(0, _Verified(package))


def _require_known_imports(package: OwnPackage, tops: set[str]) -> None:
    """Code that the hash does not cover would run as well, and may be another at each hospital."""
    for path in package.modules.values():
        try:
            tree = ast.parse(package.files[path])
        except (SyntaxError, ValueError, RecursionError):
            raise ConfigError(
                162, f"package {package.name} holds a module that is no Python", "ask its authors"
            ) from None
        for node in ast.walk(tree):
            named: list[str] = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module or ""]
            other = sorted({name.split(".")[0] for name in named} - tops - MAY_IMPORT)
            if other:
                what = f"imports {', '.join(other)}, which its hash does not cover"
                raise _refused(package.name, what, f"import only {', '.join(sorted(MAY_IMPORT))}")
