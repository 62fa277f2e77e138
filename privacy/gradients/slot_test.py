"""The self-test behind fixed batches: does every slot of a batch give a record the same bits, on this machine, now?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from medfed.privacy.gradients.fixed_batches import steady_arithmetic
from medfed.privacy.gradients.opacus_engine import refuse_unsupported
from medfed.privacy.gradients.recorder import Losses, Recorder

Examples = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
"""(generator, n) -> n made-up records of a study's form, inputs [n, ...] and labels [n, ...] on the CPU."""

# multiples of what a processor's vector loops take at a time: in other batches the end of a tensor is computed by other code
# than the rest, and where it is a few values of one record that seldom differ, a test might miss it
_SIZES = (64, 32)
_GRADIENT_BYTES = {64: 1 << 28, 32: 1 << 29}
# of the weights, and how many arrangements of records to try at each: most where a model is at work, one where numbers
# fade and one where they overflow
_DRAWS = ((1.0, 5), (3.0, 5), (1.0, 5), (0.3, 2), (1e-12, 1), (1e9, 1))


def settle_batch(model: nn.Module, losses: Losses, examples: Examples, *, device: torch.device) -> int:
    """The largest physical batch of 64 or 32 records in which all slots are alike; else 1, which is always right.

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
        _draw_weights(recorder, torch.Generator().manual_seed(1), 1.0)
        inputs, labels = examples(torch.Generator().manual_seed(1), 1)
        recorder.checked_gradients(inputs.to(device), labels.to(device))
    return 1


def _slots_are_alike(recorder: Recorder, examples: Examples, size: int, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(size)  # made-up numbers, no secret: the same at every start
    is_telling = False
    for scale, arrangements in _DRAWS:
        _draw_weights(recorder, generator, scale)
        inputs, labels = examples(generator, size)
        # where numbers fade or cancel, samples need not add up to the gradient: that is tried where a model is at work
        take = recorder.checked_gradients if scale == 1.0 else recorder.gradients
        reference = [sample.clone() for sample in take(inputs.to(device), labels.to(device))]
        is_telling |= _tells(reference)
        for slots, spoiled in itertools.islice(_arrangements(generator, size), arrangements):
            mixed, answers = inputs[slots], labels[slots]
            mixed[slots < 0], answers[slots < 0] = 0, 0
            if spoiled is not None and mixed.is_floating_point():
                mixed[spoiled], slots[spoiled] = float("nan"), -1
            samples = recorder.gradients(mixed.to(device), answers.to(device))
            if not _same_bits(samples, reference, slots):
                return False
    # all zeros or nothing finite would be alike in any kernel
    return is_telling


def _draw_weights(recorder: Recorder, generator: torch.Generator, scale: float) -> None:
    """Normal numbers; matrices and filters scaled by their fan-in, so that at scale 1 a signal neither fades nor grows."""
    with torch.no_grad():
        for weight in recorder.weights():
            fan_in = weight[0].numel() if weight.dim() > 1 else 1
            weight.copy_(torch.empty(weight.shape).normal_(0.0, scale / fan_in**0.5, generator=generator))


def _tells(samples: list[Tensor]) -> bool:
    """Whether the gradients of all records are finite, and none is zero altogether."""
    norms = torch.stack([sample.double().square().sum(1) for sample in samples]).sum(0)
    return bool((torch.isfinite(norms) & (norms > 0)).all())


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


def _same_bits(samples: list[Tensor], reference: list[Tensor], slots: Tensor) -> bool:
    for sample, known in zip(samples, reference, strict=True):
        as_bits = torch.int64 if sample.dtype == torch.float64 else torch.int32
        for slot, record in enumerate(slots.tolist()):
            if record >= 0 and not torch.equal(sample[slot].view(as_bits), known[record].view(as_bits)):
                return False
    return True
