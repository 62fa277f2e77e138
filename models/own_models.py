"""A hospital group's own model, from an installed package: made, looked over and tried out before anything is trained with it.

The looking over catches mistakes, not malice: the package's code runs with the rights of whoever starts medfed, and code that
means ill can behave while it is watched. What stands against that is whom a hospital lets install a wheel, and its hash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from medfed.data_contract import DataContract
from medfed.errors import ConfigError, MedfedError
from medfed.model_choice import Own
from medfed.models.own_model import OwnModel, RecordForm
from medfed.models.own_packages import OwnPackage, is_of_package, load_entry_point, verified_package
from medfed.models.own_proof import require_apart, require_known_layers

Settings = Mapping[str, bool | int | float | str]
Builder = Callable[[RecordForm, int, Settings], object]

_apart: set[str] = set()  # what was proven in this process: of this very code and form, so that it need not be again


def make(chosen: Own, data: DataContract, outputs: int) -> OwnModel:
    """The model that the study's package makes; on the device "meta" an outline of it, looked over but not tried out.

    Raises: MF-161 for another package than the study's, MF-162 where its code fails or makes no such model,
    ``UnsupportedModel`` MF-160 for a model that is not shown to keep patients apart.
    """
    package = verified_package(chosen.package, chosen.package_sha256)
    form = RecordForm.of(data)
    own = _called(package, chosen, form, outputs)
    known = require_known_layers(own, lambda kind: is_of_package(kind, package))
    what = "\n".join([chosen.model_dump_json(exclude={"first_model_sha256"}), data.model_dump_json(), str(outputs)])
    is_outline = any(weight.is_meta for weight in own.parameters())
    if not is_outline and what not in _apart:
        with torch.random.fork_rng(devices=[]):
            # the generator has gone on: constants drawn by chance are others here than in ``own``
            twin = _called(package, chosen, form, outputs)
        _run(chosen.package, lambda: require_apart(own, twin, data, outputs))
        _apart.add(what)
    return OwnModel(own, known)


def _called(package: OwnPackage, chosen: Own, form: RecordForm, outputs: int) -> nn.Module:
    builder = load_entry_point(package, chosen.entry_point)
    if not callable(builder):
        raise ConfigError(
            162, f"entry point {chosen.entry_point} of {chosen.package} is no function", "ask its authors"
        )
    settings: Settings = MappingProxyType(dict(chosen.settings))
    made = _run(chosen.package, lambda: builder(form, outputs, settings))
    if not isinstance(made, nn.Module):
        what = f"package {chosen.package} made a {type(made).__name__}"
        raise ConfigError(162, what, "its function must return a torch.nn.Module")
    return made


def _run(package: str, what: Callable[[], object]) -> object:
    """Somebody else's code may raise anything; what it says is not passed on."""
    try:
        return what()
    except MedfedError:
        raise
    except Exception as error:
        said = f"code of package {package} failed ({type(error).__name__})"
        raise ConfigError(162, said, "see docs/own_models.md, and ask its authors") from None
