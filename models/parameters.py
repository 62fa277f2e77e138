"""Trainable parameters <-> float32[d], and safetensors files. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import nn

from medfed.errors import ConfigError


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and trainable parameters in the model's own order: the order of every flat vector."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def count(model: nn.Module) -> int:
    """d, the number of trainable parameters: the words of one upload."""
    return sum(parameter.numel() for _, parameter in trainable(model))


def flatten(model: nn.Module) -> NDArray[np.float32]:
    """All trainable parameters as float32[d]."""
    return np.concatenate([parameter.detach().numpy().ravel() for _, parameter in trainable(model)]).astype(np.float32)


def assign(model: nn.Module, flat: NDArray[np.float32]) -> None:
    """Write float32[d] into the trainable parameters."""
    at = 0
    with torch.no_grad():
        for _, parameter in trainable(model):
            size = parameter.numel()
            parameter.copy_(torch.from_numpy(flat[at : at + size].copy()).view_as(parameter))
            at += size


def to_safetensors(model: nn.Module, flat: NDArray[np.float32]) -> bytes:
    """float32[d] as a safetensors file, one tensor a parameter under the model's own names."""
    tensors: dict[str, NDArray[np.float32]] = {}
    at = 0
    for name, parameter in trainable(model):
        size = parameter.numel()
        tensors[name] = np.ascontiguousarray(flat[at : at + size].reshape(tuple(parameter.shape)))
        at += size
    return bytes(save(tensors))


def from_safetensors(model: nn.Module, data: bytes) -> NDArray[np.float32]:
    """float32[d] from a safetensors file that holds exactly this model's parameters.

    Raises ``ConfigError``: MF-151 no safetensors file, MF-152 other names, shapes or dtypes, MF-153 not finite.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(151, "model file is no safetensors file", "only safetensors are accepted") from error
    expected = trainable(model)
    if set(tensors) != {name for name, _ in expected}:
        raise ConfigError(152, "model file holds other tensors than the study's model", "ask for the right file")
    parts = []
    for name, parameter in expected:
        tensor = tensors[name]
        if tensor.shape != tuple(parameter.shape) or tensor.dtype != np.float32:
            raise ConfigError(152, f"tensor {name} has another shape or type", "ask for the right file")
        if not np.isfinite(tensor).all():
            raise ConfigError(153, f"tensor {name} holds numbers that are not finite", "ask for the right file")
        parts.append(tensor.ravel())
    return np.concatenate(parts)


def file_hash(data: bytes) -> str:
    """SHA-256 of a model file, 64 hex digits: what a study pins."""
    return hashlib.sha256(data).hexdigest()
