"""A catalogue model that begins with pretrained weights and keeps them: frozen layers, adapters beside them, a head to train.

The weights lie in an installed package, as a safetensors file, and the study pins the package's hash: nothing of it is run. So
every party has the same frozen numbers without their being part of a study's files or of an upload.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import nn

from medfed.errors import ConfigError, UnsupportedModel
from medfed.model_choice import Pretrained
from medfed.models.lora import adapt
from medfed.models.marks import refuse_local
from medfed.models.own_packages import verified_package


def take_pretrained(model: nn.Module, chosen: Pretrained) -> None:
    """Load and freeze all weights of ``model`` but those of the layers ``chosen.trained``, and put adapters beside linear layers.

    Raises ``ConfigError``: MF-161 another package than the study's, or without that file; MF-151 no safetensors; MF-152 a weight
    is missing or of another shape or type; MF-153 not finite; ``PrivacyError`` MF-195 a hospital's own model;
    ``UnsupportedModel`` MF-160 if nothing is left to train.
    """
    tensors = _tensors(chosen)
    layers = dict(model.named_modules())
    unknown = [name for name in chosen.trained if name not in layers]
    if unknown:
        raise ConfigError(203, f"the model has no layer {', '.join(unknown)}", "correct model.pretrained.trained")
    trained = {weight for name in chosen.trained for weight in layers[name].parameters()}
    for name, weight in model.named_parameters():
        if weight not in trained:
            _freeze(name, weight, tensors)
    if chosen.adapters is not None:
        adapt(model, chosen.adapters, trained=chosen.trained)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UnsupportedModel(160, "the model has no weights to train", "name layers in trained, or adapters")


def _freeze(name: str, weight: nn.Parameter, tensors: dict[str, NDArray[np.generic]]) -> None:
    found = tensors.get(name)
    if found is None or found.shape != tuple(weight.shape) or found.dtype != np.float32:
        what = f"the pretrained file holds no float32 tensor {name} of the model's shape"
        raise ConfigError(152, what, "list its layer in trained, or take another model")
    if not np.isfinite(found).all():
        raise ConfigError(153, f"tensor {name} holds numbers that are not finite", "ask for the right file")
    with torch.no_grad():
        weight.copy_(torch.from_numpy(found))
    weight.requires_grad_(False)


def _tensors(chosen: Pretrained) -> dict[str, NDArray[np.generic]]:
    package = verified_package(chosen.package, chosen.package_sha256)
    if chosen.file not in package.files:
        raise ConfigError(161, f"package {chosen.package} has no file {chosen.file}", "correct model.pretrained.file")
    try:
        tensors: dict[str, NDArray[np.generic]] = load(package.files[chosen.file])
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise ConfigError(151, "the pretrained file is no safetensors file", "only safetensors are accepted") from None
    refuse_local(package.files[chosen.file])
    return tensors
