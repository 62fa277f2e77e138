"""The self-test behind fixed batches: does every slot of a batch give a record the same bits, on this machine, now?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from medfed.privacy.gradients.fixed_batches import steady_arithmetic
from medfed.privacy.gradients.opacus_engine import refuse_mixing, refuse_unsupported
from medfed.privacy.gradients.recorder import Losses, Recorder
from medfed.privacy.gradients.slots import Slots
from medfed.privacy.gradients.taped_model import TapedModel

Examples = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
"""(generator, n) -> n made-up records of a study's form, inputs [n, ...] and labels [n, ...] on the CPU."""

# multiples of what a processor's vector loops take at a time: in other batches the end of a tensor is computed by other code
# than the rest, and where it is a few values of one record that seldom differ, a test might miss it
_SIZES = (64, 32)
_GRADIENT_BYTES = {64: 1 << 28, 32: 1 << 29}
_HELD_BYTES = {256: 1 << 27, 64: 1 << 27, 32: 1 << 29}
_SIZE_OF_DENSE = 256
MANY = 192
"""Patients expected in a step from which on batches of 256 records pay, of models of dense layers alone."""
# of the weights, and how many arrangements of records to try at each: most where a model is at work, one where numbers
# fade and one where they overflow
_DRAWS = ((1.0, 5), (3.0, 5), (1.0, 5), (0.3, 2), (1e-12, 1), (1e9, 1))


class Probe(Protocol):
    """What takes gradients: ``Recorder`` or ``TapedModel``."""

    def weights(self) -> list[nn.Parameter]: ...

    def slots(self, inputs: Tensor, labels: Tensor, of_each: int = 1) -> Slots: ...

    def checked_slots(self, inputs: Tensor, labels: Tensor, of_each: int = 1) -> Slots: ...


def settle_batch(model: nn.Module, losses: Losses, examples: Examples, *, device: torch.device) -> int:
    """For ``fixed_batches``: the largest physical batch of 64 or 32 records in which all slots are alike; else 1, which is
    always right.

    Made-up records stand in all slots, beside other records, beside copies of themselves, in batches that are half empty
    and beside a record that is not a number, at random weights of several scales: a record's gradient must be the same
    bits throughout. A kernel that rounds by place differs in a good part of thousands of values at every draw.

    Also bounded by memory: the gradients of 64 records stay within 256 MiB, of 32 within 512 MiB. Raises
    ``UnsupportedModel`` (MF-160) for a model or loss that couples records.
    """
    refuse_unsupported(model)
    record_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    with steady_arithmetic(), Recorder(model, losses, device) as recorder:
        for size in _SIZES:
            if size * record_bytes <= _GRADIENT_BYTES[size] and _slots_are_alike(recorder, examples, size, device):
                return size
        _try_one(recorder, examples, device)
    return 1


def settle_taped_batch(
    model: nn.Module,
    losses: Losses,
    examples: Examples,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    most_records: int = 1,
    are_many: bool = False,
) -> int:
    """For ``engine``, as ``settle_batch``: 64, 32 or 1; of models of dense layers alone, where patients ``are_many``, 256.

    What must be the same bits is all that a patient's share of a sum is made of, and its norm; also of patients with up to
    ``most_records`` records each. Gradients in full stay within 128 MiB, those of 32 records within 512 MiB. Each of two
    patients is compared with torch's own gradient of it alone.
    """
    refuse_mixing(model)
    with steady_arithmetic():
        taped = TapedModel(model, losses, device, dtype)
        _try_one(taped, examples, device)
        for size in (_SIZE_OF_DENSE, *_SIZES) if are_many and taped.tape.is_dense else _SIZES:
            if taped.bytes_held(size, shared=most_records > 1) > _HELD_BYTES[size]:
                continue
            widths = [1 << power for power in range((min(most_records, size // 2) - 1).bit_length() + 1)]
            if all(_slots_are_alike(taped, examples, size, device, width) for width in widths):
                return size
    return 1


def _try_one(probe: Probe, examples: Examples, device: torch.device) -> None:
    _draw_weights(probe, torch.Generator().manual_seed(1), 1.0)
    inputs, labels = examples(torch.Generator().manual_seed(1), 1)
    probe.checked_slots(inputs.to(device), labels.to(device))


def _slots_are_alike(probe: Probe, examples: Examples, size: int, device: torch.device, of_each: int = 1) -> bool:
    """``of_each`` records in a row are one patient's, whose slot they fill together."""
    generator = torch.Generator().manual_seed(size)  # made-up numbers, no secret: the same at every start
    is_telling = False
    for scale, arrangements in _DRAWS if of_each == 1 else _DRAWS[:1]:
        _draw_weights(probe, generator, scale)
        inputs, labels = (_by_patient(part, of_each) for part in examples(generator, size))
        # where numbers fade or cancel, samples need not add up to the gradient: that is tried where a model is at work
        take = probe.checked_slots if scale == 1.0 else probe.slots
        reference = take(inputs.flatten(0, 1).to(device), labels.flatten(0, 1).to(device), of_each).copy()
        is_telling |= reference.tells()
        for slots, spoiled in itertools.islice(_arrangements(generator, size // of_each), arrangements):
            mixed, answers = inputs[slots], labels[slots]
            mixed[slots < 0], answers[slots < 0] = 0, 0
            if spoiled is not None and mixed.is_floating_point():
                mixed[spoiled], slots[spoiled] = float("nan"), -1
            found = probe.slots(mixed.flatten(0, 1).to(device), answers.flatten(0, 1).to(device), of_each)
            if not found.same_bits(reference, slots):
                return False
    # all zeros or nothing finite would be alike in any kernel
    return is_telling


def _by_patient(records: Tensor, of_each: int) -> Tensor:
    return records.view(-1, of_each, *records.shape[1:])


def _draw_weights(probe: Probe, generator: torch.Generator, scale: float) -> None:
    """Normal numbers; matrices and filters scaled by their fan-in, so that at scale 1 a signal neither fades nor grows."""
    with torch.no_grad():
        for weight in probe.weights():
            fan_in = weight[0].numel() if weight.dim() > 1 else 1
            weight.copy_(torch.empty(weight.shape).normal_(0.0, scale / fan_in**0.5, generator=generator))


def _arrangements(generator: torch.Generator, size: int) -> Iterator[tuple[Tensor, int | None]]:
    """Which record stands in each slot (-1: none), and the slot whose record is spoiled."""

    def shuffled() -> Tensor:
        return torch.empty(size, dtype=torch.float64).uniform_(generator=generator).argsort()

    def some() -> int:
        return int(torch.empty(()).random_(size, generator=generator))

    yield shuffled(), some()
    yield torch.full((size,), some()), None
    yield shuffled(), None
    half = shuffled()
    half[(size + 1) // 2 :] = -1
    yield half, None
    alone = torch.full((size,), -1)
    alone[some()] = some()
    yield alone, None
