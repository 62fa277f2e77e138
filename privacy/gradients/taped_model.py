"""A private copy of a model whose layers write to a tape: one forward and one backward pass a batch."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfed.errors import UnsupportedModel
from medfed.privacy.gradients.layers import attach
from medfed.privacy.gradients.patient_tape import Matrices, PatientTape, Products, Samples
from medfed.privacy.gradients.recorder import Losses
from medfed.privacy.gradients.slots import Slots

_TOLERATED = 1e-2
_TOLERATED_OF_SHORT = 0.1


class TapedModel:
    """The caller's model sees neither a tape nor gradients.

    ``device``: where the copy goes. ``dtype``: what matrix products and convolutions are computed in (bfloat16), None for the
    model's own. Raises ``UnsupportedModel`` (MF-160) for a layer that has no rule.
    """

    def __init__(
        self, model: nn.Module, losses: Losses, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self._plain = model
        self._model = copy.deepcopy(model).to(device).train()
        self._losses = losses
        self._weights = [(name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad]
        self._constants = [(name, value, value.clone()) for name, value in self._model.named_buffers()]
        self.tape = PatientTape(dtype)
        attach(self._model, self.tape)

    def weights(self) -> list[nn.Parameter]:
        """The copy's trainable weights, in the model's order: write to them to take gradients elsewhere."""
        return [weight for _, weight in self._weights]

    def load(self, weights: NDArray[np.float32]) -> None:
        """Take other weights: float32[d], flattened in the model's order."""
        # torch takes no arrays that nobody may write to
        at, weights = 0, weights if weights.flags.writeable else weights.copy()
        with torch.no_grad():
            for _, weight in self._weights:
                weight.copy_(torch.from_numpy(weights[at : at + weight.numel()]).view_as(weight))
                at += weight.numel()

    def run(self, inputs: Tensor, labels: Tensor, shares: Tensor | None = None, of_each: int = 1) -> None:
        """Fill the tape with the gradient of each record's loss times its share (1 without ``shares``, float[n]).

        ``of_each`` records in a row belong to one patient. Raises ``UnsupportedModel`` (MF-160) for a loss that is not one
        number a record, and for a weight that is used outside its layer: that part of its gradient would escape clipping.
        """
        self.tape.start(len(inputs), of_each)
        logits = self._model(inputs)
        loss = self._losses(logits if self.tape.dtype is None else logits.float(), labels)
        if loss.shape != (len(inputs),):
            what = f"the loss has shape {tuple(loss.shape)} for {len(inputs)} records"
            raise UnsupportedModel(160, what, "return one loss a record")
        if loss.requires_grad:
            (loss if shares is None else loss * shares.to(loss.dtype)).sum().backward()  # type: ignore[no-untyped-call]
        for name, weight in self._weights:
            if weight.grad is not None:
                raise UnsupportedModel(160, f"{name} is used outside its layer", "use it in its own layer only")

    # ---------------------------------------------------------------------------------------------- for the slot test

    def slots(self, inputs: Tensor, labels: Tensor, of_each: int = 1) -> Slots:
        """What each patient's share of a sum is made of."""
        self.run(inputs, labels, of_each=of_each)
        forms = [self.tape.forms[weight] for _, weight in self._weights if weight in self.tape.forms]
        norms = torch.stack([form.squared_norms() for form in forms])
        return Slots([*(slot for form in forms for slot in form.slots()), *norms], norms.sum(0))

    def checked_slots(self, inputs: Tensor, labels: Tensor, of_each: int = 1) -> Slots:
        """``slots``, and ``UnsupportedModel`` (MF-160) for a model whose records are not what torch finds of them alone."""
        found = self.slots(inputs, labels, of_each)
        for name, value, constant in self._constants:
            if not torch.equal(value, constant):
                raise UnsupportedModel(160, f"buffer {name} changes with the records", "use a layer without statistics")
        for patient in {0, len(inputs) // of_each - 1}:
            self._check_patient(patient, inputs, labels, of_each)
        return found

    def bytes_held(self, batch: int, *, shared: bool) -> int:
        """Bytes of gradients in full that a batch like the last run's would hold, of ``batch`` records.

        ``shared``: several records may belong to one patient; then no form is smaller than the gradient.
        """
        held = 0
        for weight, form in self.tape.forms.items():
            if isinstance(form, Samples | Matrices):
                held += batch * weight.numel() * weight.element_size()
            elif isinstance(form, Products) and shared:
                held += batch // 2 * weight.numel() * weight.element_size()
        return held

    def _check_patient(self, patient: int, inputs: Tensor, labels: Tensor, of_each: int) -> None:
        """Against torch's own gradient of this patient's records without any others."""
        own = slice(patient * of_each, (patient + 1) * of_each)
        plain = copy.deepcopy(self._plain).to(inputs.device).train()
        for weight, (_, drawn) in zip(
            [each for each in plain.parameters() if each.requires_grad], self._weights, strict=True
        ):
            weight.data.copy_(drawn.data)
        self._losses(plain(inputs[own]), labels[own]).sum().backward()  # type: ignore[no-untyped-call]
        weights = dict(plain.named_parameters())
        true = {name: weights[name].grad for name, _ in self._weights}
        tolerated = _TOLERATED if self.tape.dtype is None else _TOLERATED_OF_SHORT
        scale = max((float(each.abs().max()) for each in true.values() if each is not None), default=0.0)
        for name, weight in self._weights:
            form, gradient = self.tape.forms.get(weight), true[name]
            sample = torch.zeros(weight.numel()) if form is None else form.dense()[patient]
            wanted = torch.zeros_like(sample) if gradient is None else gradient.flatten()
            if bool(((sample - wanted).abs() > tolerated * (wanted.abs() + scale)).any()):
                raise UnsupportedModel(160, f"{name} mixes records or is used outside its layer", "use a plain layer")
