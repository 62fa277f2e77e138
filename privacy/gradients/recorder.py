"""Gradients record by record, through Opacus's hooks on a private copy of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfed.errors import UnsupportedModel
from medfed.privacy.gradients.slots import Slots

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModule

Losses = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, ...], labels [B, ...]) -> one loss a record, float[B]."""

_AGREEMENT = 1e-2
_ROUNDING = 1e-4


class Recorder:
    """A private copy of the model under Opacus's hooks; the caller's model sees neither hooks nor gradients.

    ``device``: where the copy goes; by default it stays where the model is.
    """

    def __init__(self, model: nn.Module, losses: Losses, device: torch.device | None = None) -> None:
        from opacus.grad_sample import GradSampleModule

        # hooks record in training mode only
        self._model = copy.deepcopy(model).to(device).train()
        self._losses = losses
        _know_more_layers(GradSampleModule, self._model)
        self._wrapped = GradSampleModule(self._model, batch_first=True, loss_reduction="sum", strict=False)
        self._weights = [(name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad]
        self._constants = {name: value.clone() for name, value in self._model.named_buffers()}

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._wrapped.remove_hooks()

    def weights(self) -> list[nn.Parameter]:
        """The copy's trainable weights, in the model's order: write to them to take gradients elsewhere."""
        return [weight for _, weight in self._weights]

    def gradients(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        """Per-record gradients of each weight, of a model that ``checked_gradients`` accepts: a list of float[B, size].

        They hold until the next call.
        """
        for _, weight in self._weights:
            weight.grad = weight.grad_sample = None  # type: ignore[attr-defined]
        loss = self._losses(self._wrapped(inputs), labels)
        if loss.shape != (len(inputs),):
            what = f"the loss has shape {tuple(loss.shape)} for {len(inputs)} records"
            raise UnsupportedModel(160, what, "return one loss a record")
        _expect_plain_inputs()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        return [_of_records(name, weight, len(inputs)) for name, weight in self._weights]

    def checked_gradients(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        """``gradients``, and ``UnsupportedModel`` (MF-160) for a model that couples records or uses a weight twice unseen."""
        samples = self.gradients(inputs, labels)
        for name, value in self._model.named_buffers():
            if not torch.equal(value, self._constants[name]):
                raise UnsupportedModel(160, f"buffer {name} changes with the records", "use a layer without statistics")
        for (name, weight), sample in zip(self._weights, samples, strict=True):
            _check_agreement(name, weight, sample)
        return samples

    def slots(self, inputs: Tensor, labels: Tensor, of_each: int = 1) -> Slots:
        """``gradients``, for the slot test; a slot is a record (``of_each`` is 1)."""
        return _as_slots(self.gradients(inputs, labels))

    def checked_slots(self, inputs: Tensor, labels: Tensor, of_each: int = 1) -> Slots:
        """``checked_gradients``, for the slot test."""
        return _as_slots(self.checked_gradients(inputs, labels))


def _as_slots(samples: list[Tensor]) -> Slots:
    return Slots(samples, torch.stack([sample.double().square().sum(1) for sample in samples]).sum(0))


def _of_records(name: str, weight: nn.Parameter, records: int) -> Tensor:
    sample: Tensor | None = getattr(weight, "grad_sample", None)
    if weight.grad is None:
        return torch.zeros(records, weight.numel(), dtype=weight.dtype, device=weight.device)
    if not isinstance(sample, Tensor) or len(sample) != records:
        raise UnsupportedModel(160, f"no gradient by record for {name}", "use the parameter in its own layer only")
    return sample.reshape(records, -1)


def _check_agreement(name: str, weight: nn.Parameter, sample: Tensor) -> None:
    """A use of the weight that the hooks did not see is in .grad but not in the samples: it would escape clipping."""
    if weight.grad is None:
        return
    difference, sizes = (sample.sum(0) - weight.grad.flatten()).abs(), sample.abs().sum(0)
    # of a weight whose true gradient is zero (a bias of attention's keys) there is rounding alone: see it in proportion
    tolerated = _AGREEMENT * sizes + _ROUNDING * sizes.max() + torch.finfo(sample.dtype).tiny
    if bool((difference > tolerated).any()):
        raise UnsupportedModel(160, f"{name} mixes records or is used outside its layer", "use a plain layer")


def _know_more_layers(wrapper: type[GradSampleModule], model: nn.Module) -> None:
    """Tell Opacus of layers that have their gradients in its own way: it looks a layer's exact type up.

    These are kinds of ``nn.Linear``, and convolutions that say by ``used_weight`` what they make of their weight. A layer
    that only calls itself so is found out when its samples do not add up to its gradient. Of an embedding Opacus would
    make and copy B x tokens x width values at every pass.
    """
    wrapper.GRAD_SAMPLERS[nn.Embedding] = _of_embedding
    for module in model.modules():
        if isinstance(module, nn.Linear):
            wrapper.GRAD_SAMPLERS.setdefault(type(module), wrapper.GRAD_SAMPLERS[nn.Linear])
        elif isinstance(module, nn.Conv2d) and hasattr(module, "used_weight"):
            wrapper.GRAD_SAMPLERS.setdefault(type(module), _of_used_weight)


def _of_used_weight(layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-record gradients of a convolution without bias or groups that uses ``layer.used_weight(layer.weight)``.

    The gradient by the used weight is that of any convolution; its way back to the weight is the same linear map for
    every record.
    """
    if layer.groups != 1 or layer.bias is not None or not isinstance(layer.padding, tuple):
        raise UnsupportedModel(160, f"{type(layer).__name__} with groups, bias or padding by name", "use a plain layer")
    patches = functional.unfold(activations[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    by_used = torch.bmm(backprops.flatten(2), patches.transpose(1, 2)).view(len(backprops), *weight.shape)
    used_weight: Callable[[Tensor], Tensor] = layer.used_weight  # type: ignore[assignment]
    way_back = torch.func.vjp(used_weight, weight.detach())[1]
    (by_weight,) = torch.func.vmap(way_back)(by_used)
    return {weight: by_weight}


def _of_embedding(layer: nn.Embedding, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-record gradients of an embedding, in one tensor that is kept: a pass clears the rows that the last one wrote.

    Put where Opacus would put its copy.
    """
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    tokens = activations[0].flatten(1)
    if layer.padding_idx is not None:
        backprops = backprops.masked_fill((activations[0] == layer.padding_idx)[..., None], 0.0)
    kept: Tensor | None
    kept, written = getattr(layer, "kept_samples", (None, tokens[:, :0]))
    if kept is None or len(kept) != len(tokens):
        kept, written = weight.new_zeros(len(tokens), *weight.shape), tokens[:, :0]
    if not hasattr(weight, "_current_grad_sample"):  # else the layer was called more than once in this pass
        kept.scatter_(1, written[:, :, None].expand(-1, -1, weight.shape[1]), 0.0)
        written = tokens[:, :0]
        weight._current_grad_sample = kept  # type: ignore[attr-defined]
    layer.kept_samples = (kept, torch.cat([written, tokens], 1))  # type: ignore[assignment]
    kept.scatter_add_(1, tokens[:, :, None].expand(-1, -1, weight.shape[1]), backprops.flatten(1, -2))
    return {}


def _expect_plain_inputs() -> None:
    """Torch warns that a first layer's inputs need no gradient. They are records: its output's gradient is all we need.

    For the whole process and this message only: ``catch_warnings`` restores the filters of whatever thread ended last,
    and hospitals of a rehearsal train in threads. Inputs that require gradients would cost one more backward pass.
    """
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
