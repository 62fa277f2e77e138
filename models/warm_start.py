"""First weights from an earlier model, such as a released one, in the place of random ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import nn

from medfed.errors import ConfigError
from medfed.models import parameters
from medfed.models.marks import refuse_local
from medfed.wording import counted


@dataclass(frozen=True, slots=True, eq=False)
class WarmStart:
    """``file``: a safetensors file. ``partly``: it need not hold all weights of the model, and may hold others: what has the same
    name and shape is taken, such as all layers but a head of other classes."""

    file: bytes
    partly: bool


@dataclass(frozen=True, slots=True)
class Taken:
    """Names of the model's weights that were ``taken`` from the file and of those ``drawn`` anew, and how many of the file's were
    ``unused``."""

    taken: tuple[str, ...]
    drawn: tuple[str, ...]
    unused: int

    def in_words(self) -> Iterator[str]:
        """For a terminal."""
        yield f"First weights: {counted(len(self.taken), 'tensor')} of {len(self.taken) + len(self.drawn)} from the file."
        if self.drawn:
            yield f"  drawn anew: {', '.join(self.drawn)}"
        if self.unused:
            yield f"  {counted(self.unused, 'tensor')} of the file unused: no weight has this name and shape"


def take_over(model: nn.Module, start: WarmStart) -> Taken:
    """Write the file's weights into the model's trainable parameters.

    Raises ``ConfigError``: MF-151 no safetensors file, MF-152 other names, shapes or dtypes (where ``partly``: if nothing at all
    fits), MF-153 not finite; ``PrivacyError`` MF-195 for a model that a hospital fine-tuned without privacy for itself.
    """
    names = [name for name, _ in parameters.trainable(model)]
    if not start.partly:
        flat = parameters.from_safetensors(model, start.file)
        refuse_local(start.file)
        parameters.assign(model, flat)
        return Taken(tuple(names), (), 0)
    try:
        tensors = load(start.file)
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise ConfigError(151, "model file is no safetensors file", "only safetensors are accepted") from None
    refuse_local(start.file)
    taken = [
        (name, weight, tensors[name])
        for name, weight in parameters.trainable(model)
        if name in tensors and tensors[name].shape == tuple(weight.shape) and tensors[name].dtype == np.float32
    ]
    if not taken:
        raise ConfigError(152, "model file holds no tensor of the model's", "name a file of a model alike")
    with torch.no_grad():
        for name, weight, tensor in taken:
            if not np.isfinite(tensor).all():
                raise ConfigError(153, f"tensor {name} holds numbers that are not finite", "ask for the right file")
            weight.copy_(torch.from_numpy(tensor))
    found = {name for name, _, _ in taken}
    return Taken(tuple(sorted(found)), tuple(name for name in names if name not in found), len(tensors) - len(found))
