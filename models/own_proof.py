"""Does an own model keep patients apart? What it is made of is looked over, and what it does is tried out on made-up records.

The catalogue's layers are declared one by one (``separability``). A package's own modules cannot be: they are let in where they
hold no numbers themselves, call only known layers, and where a trial in float64 shows that a record's outputs do not move with
the other records, nor their gradient reach them. A trial shows coupling where there is some; that there is none it makes likely.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from medfed.data_contract import DataContract
from medfed.errors import UnsupportedModel
from medfed.models.made_up import made_up_inputs
from medfed.models.separability import COUPLING_LAYERS, SEPARABLE_LAYERS, SETTINGS

TORCH_LAYERS: dict[type[nn.Module], str] = {
    nn.Conv1d: "neighbouring places of one record",
    nn.Conv2d: "neighbouring places of one record",
    nn.Conv3d: "neighbouring places of one record",
    nn.RMSNorm: "mean square of one place of one record",
    nn.LSTM: "runs through the steps of each record by itself, given that records come first",
    nn.GRU: "runs through the steps of each record by itself, given that records come first",
    nn.Tanh: "value by value",
    nn.Sigmoid: "value by value",
    nn.GELU: "value by value",
    nn.SiLU: "value by value",
    nn.ELU: "value by value",
    nn.LeakyReLU: "value by value",
    nn.Softplus: "value by value",
    nn.MaxPool1d: "neighbouring places of one record",
    nn.MaxPool2d: "neighbouring places of one record",
    nn.MaxPool3d: "neighbouring places of one record",
    nn.AvgPool1d: "neighbouring places of one record",
    nn.AvgPool2d: "neighbouring places of one record",
    nn.AvgPool3d: "neighbouring places of one record",
    nn.AdaptiveAvgPool1d: "mean over places of one record",
    nn.AdaptiveAvgPool2d: "mean over places of one record",
    nn.AdaptiveAvgPool3d: "mean over places of one record",
    nn.ModuleDict: "holds layers",
}
"""Layers of torch beside those of the catalogue, with a rule in the gradient engine or no parameters, and why they keep records
apart."""

_SETTINGS: dict[type[nn.Module], dict[str, object]] = {
    **SETTINGS,
    nn.LSTM: {"batch_first": True, "dropout": 0.0, "proj_size": 0},
    nn.GRU: {"batch_first": True, "dropout": 0.0},
}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OF_THE_ENGINE = ("taped_forward", "used_weight")
_RECORDS = 9
_MANY, _MOST_VALUES = 40, 1 << 21
_SCALES = (1.0, 3.0)
_TOLERATED = 1e-9  # of float64, whose kernels may add up in another order beside other records


def require_known_layers(model: nn.Module, is_own: Callable[[type], bool]) -> frozenset[type[nn.Module]]:
    """The types of all layers, each of the catalogue, of ``TORCH_LAYERS`` or the package's own (``is_own``).

    Raises ``UnsupportedModel`` (MF-160) naming the first layer that is not known, holds what the gradient engine would not see,
    or would change or remember what goes through it.
    """
    for name, layer in model.named_modules():
        at, kind = name or "the model", type(layer)
        if kind not in SEPARABLE_LAYERS and kind not in TORCH_LAYERS:
            _require_plain_composite(at, layer, is_own(kind))
        for setting, wanted in _SETTINGS.get(kind, {}).items():
            if getattr(layer, setting) != wanted:
                what = f"{at}: {kind.__name__} with {setting} = {getattr(layer, setting)}"
                raise UnsupportedModel(160, what, f"use {setting} = {wanted}")
        _require_no_side_doors(at, layer)
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            raise UnsupportedModel(160, f"parameter {name} is not float32", "make it of torch.float32")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UnsupportedModel(160, "the model has no parameters to train", "leave some that are not frozen")
    return frozenset(type(layer) for layer in model.modules())


def _require_plain_composite(at: str, layer: nn.Module, is_own: bool) -> None:
    kind = type(layer).__name__
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        raise UnsupportedModel(160, f"{at}: {kind} is chance", "leave it out: the noise regularises")
    if not is_own or any(each.__name__ in COUPLING_LAYERS for each in type(layer).__mro__):
        what = f"{at}: {kind} is not known to keep patients apart"
        raise UnsupportedModel(160, what, "use layers of medfed/models/separability.py or own_proof.py")
    held = next(iter(layer._parameters), None)
    if held is not None:
        what = f"{at}: {kind} holds parameter {held} itself, whose gradient by record nobody knows"
        raise UnsupportedModel(160, what, "put it into an nn.Linear, nn.Embedding or another known layer")
    for name in _OF_THE_ENGINE:
        if hasattr(layer, name):
            raise UnsupportedModel(160, f"{at}: {kind} has {name}, which answers for its gradients", "leave it out")


def _require_no_side_doors(at: str, layer: nn.Module) -> None:
    """Hooks, buffers, tensors beside the parameters and replaced methods: what the layer's type does not tell."""
    kind = type(layer).__name__
    if any(getattr(layer, name, None) for name in _HOOKS):
        raise UnsupportedModel(160, f"{at}: {kind} has hooks", "write what they do into forward")
    if next(iter(layer._buffers), None) is not None:
        raise UnsupportedModel(160, f"{at}: {kind} has a buffer", "make constants in forward")
    values = vars(layer)
    if any(isinstance(value, Tensor) for value in values.values()):
        raise UnsupportedModel(160, f"{at}: {kind} holds a tensor", "make constants in forward")
    if any(name in values for name in ("forward", "__call__", "_call_impl", "_apply", "train")):
        raise UnsupportedModel(160, f"{at}: {kind} has a method replaced", "write it into the class")


# ------------------------------------------------------------------------------------------------------------ the trial


def require_apart(model: nn.Module, twin: nn.Module, data: DataContract, outputs: int) -> None:
    """Try a model out on made-up records, at weights of several scales, in float64; ``model`` stays as it is.

    *Guarantees* Each of these raises ``UnsupportedModel`` (MF-160): outputs of a record that depend on which other records are in
    the batch, on their number or its place among them; a gradient of a record's outputs by another record's inputs that is not
    exactly zero; outputs that differ when asked again, between two models made alike (``twin``), or that are not
    [n, ``outputs``]; a forward pass that changes parameters or buffers; outputs alike for all records, which would show nothing.
    """
    generator = torch.Generator().manual_seed(1)
    model, twin = copy.deepcopy(model).double(), copy.deepcopy(twin).double()
    _require_alike(model, twin)
    has_frozen = not all(weight.requires_grad for weight in model.parameters())
    is_telling = False
    for scale, is_pretrained in [*([(1.0, True)] if has_frozen else []), *((scale, False) for scale in _SCALES)]:
        _draw_weights(model, twin, generator, scale, is_pretrained=is_pretrained)
        before = [weight.detach().clone() for weight in model.parameters()]
        for mode in (True, False):
            is_telling |= _require_outputs_apart(model.train(mode), twin.train(mode), data, outputs, generator)
        _require_gradients_apart(model.train(), data, generator)
        if not all(torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True)):
            raise UnsupportedModel(160, "a forward pass changes a parameter", "only training may")
        if any(True for _ in model.buffers()):
            raise UnsupportedModel(160, "a forward pass makes a buffer", "keep nothing of records")
    if not is_telling:
        raise UnsupportedModel(
            160, "the model says the same of all made-up records", "nothing could be learned or shown"
        )


def _require_alike(model: nn.Module, twin: nn.Module) -> None:
    """The same layers twice; and what is frozen, which no model file carries, the same numbers."""
    pairs = list(itertools.zip_longest(model.named_parameters(), twin.named_parameters()))
    for one, other in pairs:
        if one is None or other is None or (one[0], one[1].shape) != (other[0], other[1].shape):
            raise UnsupportedModel(160, "the package makes another model each time", "make it of the settings alone")
        if not one[1].requires_grad and not torch.equal(one[1], other[1]):
            what = f"parameter {one[0]} is frozen and drawn by chance: it would be another at each hospital"
            raise UnsupportedModel(160, what, "load it from a file of the package")


def _require_outputs_apart(
    model: nn.Module, twin: nn.Module, data: DataContract, outputs: int, generator: torch.Generator
) -> bool:
    """Whether the records' outputs differ, and are numbers: if not, nothing was shown."""
    records = _records(data, generator, _RECORDS)
    with torch.no_grad():
        alone = torch.cat([_outputs(model, records[at : at + 1], outputs) for at in range(_RECORDS)])
        for places, spoiled in _arrangements(generator, math.prod(data.shape)):
            batch = records[places]
            if spoiled is not None:
                batch[spoiled] = float("nan") if batch.is_floating_point() else 0
            found, wanted = _outputs(model, batch, outputs), alone[places]
            if spoiled is not None:
                found[spoiled] = wanted[spoiled] = 0.0
            if not _are_close(found, wanted):
                what = f"what the model says of a record depends on the others of its batch (of {len(places)})"
                raise UnsupportedModel(160, what, "compute nothing over the first dimension of a tensor")
        again = torch.cat([_outputs(model, records[at : at + 1], outputs) for at in range(_RECORDS)])
        if not torch.equal(again.nan_to_num(), alone.nan_to_num()):
            raise UnsupportedModel(160, "the model says something else when asked again", "leave chance and memory out")
        if not _are_close(_outputs(twin, records, outputs), alone):
            what = "two models of the package with the same parameters say different things"
            raise UnsupportedModel(160, what, "draw nothing but parameters by chance")
    return bool(torch.isfinite(alone).all()) and float((alone - alone[0]).abs().max()) > 1e-6 * float(alone.abs().max())


def _arrangements(generator: torch.Generator, values: int) -> Iterator[tuple[Tensor, int | None]]:
    """Which record stands in each place of a batch, and the place whose record is replaced by one that is not a number."""
    for size in (_RECORDS, _RECORDS, 2, 3, 5, 8):
        yield _shuffled(generator)[:size], None
        yield _shuffled(generator)[:size], size // 2
    yield torch.zeros(4, dtype=torch.int64), None
    many = max(_RECORDS, min(_MANY, _MOST_VALUES // values))
    yield torch.empty(many, dtype=torch.int64).random_(_RECORDS, generator=generator), None


def _records(data: DataContract, generator: torch.Generator, count: int) -> Tensor:
    records = made_up_inputs(data, generator, count)
    return records.double() if records.is_floating_point() else records


def _shuffled(generator: torch.Generator) -> Tensor:
    return torch.empty(_RECORDS, dtype=torch.float64).uniform_(generator=generator).argsort()


def _require_gradients_apart(model: nn.Module, data: DataContract, generator: torch.Generator) -> None:
    """No output of a record has a gradient by another's inputs; of tokens, by what their embeddings give."""
    for size in (2, 5):
        found, watched = _watched(model, _records(data, generator, size))
        of_records = [each for each in watched if each.requires_grad and len(each) == size]
        for row in range(size):
            for gradient in torch.autograd.grad(found[row].sum(), of_records, retain_graph=True, allow_unused=True):
                # not a number counts as well
                if gradient is not None and bool((torch.cat([gradient[:row], gradient[row + 1 :]]) != 0).any()):
                    what = "what the model says of a record has a gradient by another record's inputs"
                    raise UnsupportedModel(160, what, "compute nothing over the first dimension of a tensor")


def _watched(model: nn.Module, records: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the model says, and what of each record to take its gradient by."""
    if records.is_floating_point():
        return model(records.requires_grad_()), [records]
    seen: list[Tensor] = []

    def note(layer: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output)

    embeddings = [layer for layer in model.modules() if isinstance(layer, nn.Embedding)]
    hooks = [layer.register_forward_hook(note) for layer in embeddings]
    try:
        return model(records), seen
    finally:
        for hook in hooks:
            hook.remove()


def _outputs(model: nn.Module, records: Tensor, outputs: int) -> Tensor:
    found = model(records)
    if not isinstance(found, Tensor) or found.shape != (len(records), outputs) or not found.is_floating_point():
        what = f"the model does not give {outputs} numbers of each of {len(records)} records"
        raise UnsupportedModel(160, what, "return float[n, outputs], also of one record")
    return found.detach().clone()


def _are_close(found: Tensor, wanted: Tensor) -> bool:
    scale = wanted.abs().nan_to_num().max() if len(wanted) else 0.0
    return torch.allclose(found, wanted, rtol=_TOLERATED, atol=_TOLERATED * float(scale), equal_nan=True)


def _draw_weights(
    model: nn.Module, twin: nn.Module, generator: torch.Generator, scale: float, *, is_pretrained: bool
) -> None:
    """Normal numbers, scaled by fan-in: a last layer that begins at zero would hide all that is before it. What is frozen stays
    as it is where the model ``is_pretrained``."""
    with torch.no_grad():
        for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
            if is_pretrained and not weight.requires_grad:
                continue
            fan_in = weight[0].numel() if weight.dim() > 1 else 1
            weight.copy_(torch.empty(weight.shape).normal_(0.0, scale / fan_in**0.5, generator=generator))
            other.copy_(weight)
