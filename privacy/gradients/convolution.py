"""Convolutions in one, two and three dimensions: their weight's gradient record by record, and what they leave on a tape.

torch's own backward pass gives the sum over a batch. Three ways give every record its own, exactly; which one is quickest
was measured over the shapes of small image, volume and signal models (one core with AVX-512, float32, 64 records; in
milliseconds, "sum" is torch's gradient of the whole batch):

    inputs -> outputs, kernel, places             grouped  patches  across  slabs    sum
    1 -> 32, 3 x 3, 28 x 28                           1.7      1.2     1.0    1.6    1.2
    3 -> 32, 3 x 3, 32 x 32                           6.8      5.3     4.2    7.6    2.5
    32 -> 32, 3 x 3, 32 x 32                         15.4     20.9    18.5   20.2   15.0
    32 -> 64, 3 x 3, 16 x 16                          8.6     12.1    12.3   14.4    7.6
    64 -> 64, 3 x 3, 16 x 16                         15.4     17.5    18.9   22.6   12.6
    64 -> 128, 3 x 3, 8 x 8                          13.6     11.2    15.3   23.6    7.5
    128 -> 128, 3 x 3, 8 x 8                         23.2     19.0    26.8   63.8   11.5
    16 -> 32, 3 x 3, 14 x 14                          2.4      3.6     3.8    4.3    2.0
    8 -> 16, 3 x 3 x 3, 16 x 16 x 16                 59.4     48.9    61.0   36.0   59.8
    16 -> 32, 3 x 3 x 3, 16 x 16 x 16                83.2    185.3   151.6  126.7  104.7
    40 -> 64, 5, 200                                  6.0      5.3     5.6    6.6    5.5
    12 -> 32, 7, 1000                                10.2      6.5     5.7   12.2    7.1

"Across" is patches with the other factor first. Where a layer is wide and its image small (256 -> 256 at 4 x 4) the gradients
of 64 records are many times larger than what they are made of: there the tape gets patches, and forms no gradient at all.
Grouped convolutions of torch add up in long float32 sums (1e-5 off over 256 x 256 places): they are left to smaller images.

Records are taken a few at a time, so that patches stay in a processor's cache: always the same number, the last ones twice
where the batch is no multiple, so that every slot goes through kernels of one shape. A small matrix product rounds by where
in memory its rows begin: here every row begins at a multiple of 64 bytes, in whatever slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medfed.errors import UnsupportedModel
from medfed.tape import Tape

_PATCH_BYTES = 1 << 21
_PATCH_BYTES_ON_DEVICE = 1 << 26
_RECORDS_IN_GROUPS = 16
_CHANNELS_IN_GROUPS = 512
_MOST_PLACES_IN_GROUPS = 4096
_MANY_PLACES = 1000
_SHORT_PATCH = 32
_PRODUCTS_PAY = 0.5
_ALIGNED_BYTES = 64

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Of a convolution: a number for each dimension of space. ``padding`` zeros stand before and after."""

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int = 1


def weight_samples(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of a convolution's weight by each record: [n, outputs, channels / groups, *kernel].

    ``inputs``: [n, channels, *space]; ``gradient``: of the result, [n, outputs, *places], of the same type.
    """
    records, groups = len(inputs), geometry.groups
    outputs, channels = gradient.shape[1], inputs.shape[1] // groups
    if not records:
        return gradient.new_zeros(0, outputs, channels, *geometry.kernel)
    # a group of a record is as good as a record
    inputs = inputs.reshape(records * groups, channels, *inputs.shape[2:])
    gradient = gradient.reshape(records * groups, outputs // groups, *gradient.shape[2:])
    alone = replace(geometry, groups=1)
    samples = quickest_way(inputs, gradient, alone)(inputs, gradient, alone)
    return samples.view(records, outputs, channels, *geometry.kernel)


Way = Callable[[Tensor, Tensor, Geometry], Tensor]
"""(inputs [m, c, *space], gradient [m, o, *places], geometry of one group) -> [m, o, c * kernel]."""


def quickest_way(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Way:
    """By shape, type and device alone, as measured (above)."""
    channels, outputs = inputs.shape[1], gradient.shape[1]
    places, taps = math.prod(gradient.shape[2:]), math.prod(geometry.kernel)
    if (
        _has_quick_groups(inputs)
        and taps > 1
        and channels >= 16
        and channels % 8 == outputs % 8 == 0
        and outputs <= places <= _MOST_PLACES_IN_GROUPS
    ):
        return by_groups
    if len(geometry.kernel) == 3 and geometry.kernel[0] > 1 and geometry.stride[0] == 1:
        return by_slabs
    if channels * taps < _SHORT_PATCH or places >= _MANY_PLACES:
        return by_patches_across
    return by_patches


def _has_quick_groups(inputs: Tensor) -> bool:
    library = torch.backends.mkldnn
    has_library = library.is_available() and bool(library.enabled)  # type: ignore[no-untyped-call]
    return has_library and inputs.device.type == "cpu" and inputs.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------- the ways


def by_patches(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """What each place of the result saw, side by side, and one matrix product a record."""

    def product(some: Tensor, of_result: Tensor, out: Tensor) -> None:
        seen = patches(some, geometry, gradient.shape[2:])
        torch.bmm(_aligned(of_result), seen.transpose(1, 2), out=out)

    return _in_parts(product, inputs, gradient, geometry, _at_once(inputs, gradient, geometry.kernel))


def by_patches_across(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """``by_patches``, its product transposed: quicker where a patch is short, or the product long."""

    def product(some: Tensor, of_result: Tensor, out: Tensor) -> None:
        seen = patches(some, geometry, gradient.shape[2:])
        each = torch.bmm(seen, _aligned(of_result).transpose(1, 2))
        out.copy_(each.transpose(1, 2))

    return _in_parts(product, inputs, gradient, geometry, _at_once(inputs, gradient, geometry.kernel))


def by_slabs(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """Patches over all dimensions but the first, along which the product only moves on: less to copy.

    For a first dimension without stride.
    """
    first, *rest = geometry.kernel
    places = gradient.shape[2:]
    layer = math.prod(places[1:])
    deep = places[0] + (first - 1) * geometry.dilation[0]
    flat = replace(geometry, kernel=(1, *rest))

    def product(some: Tensor, of_result: Tensor, out: Tensor) -> None:
        slabs, of_places = patches(some, flat, (deep, *places[1:])), _aligned(of_result)
        starts = [tap * geometry.dilation[0] * layer for tap in range(first)]
        taps = [torch.bmm(of_places, slabs[:, :, at : at + of_places.shape[2]].transpose(1, 2)) for at in starts]
        apart = out.view(*out.shape[:2], inputs.shape[1], first, -1)
        for tap, each in enumerate(taps):
            apart[:, :, :, tap] = each.view(*out.shape[:2], inputs.shape[1], -1)

    return _in_parts(product, inputs, gradient, geometry, _at_once(inputs, gradient, flat.kernel))


def by_groups(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """All records as one record with a group for each: torch's gradient of that grouped convolution's weight."""
    channels, outputs, zeros = inputs.shape[1], gradient.shape[1], [0] * len(geometry.kernel)

    def product(some: Tensor, of_result: Tensor, out: Tensor) -> None:
        count = len(some)
        unread = some.new_empty(count * outputs, channels, *geometry.kernel)
        _, by_weight, _ = torch.ops.aten.convolution_backward(
            of_result.reshape(1, count * outputs, *gradient.shape[2:]),
            some.reshape(1, count * channels, *some.shape[2:]),
            unread,
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            zeros,
            count,
            [False, True, False],
        )
        out.copy_(by_weight.view_as(out))

    at_once = max(_RECORDS_IN_GROUPS, _CHANNELS_IN_GROUPS // channels)
    return _in_parts(product, inputs, gradient, geometry, at_once)


def patches(inputs: Tensor, geometry: Geometry, places: Sequence[int]) -> Tensor:
    """What each of ``places`` sees of ``inputs`` [m, c, *space]: [m, c * kernel, places], in the weight's order, aligned."""
    around = []
    for size, place, kernel, stride, padding, dilation in zip(
        inputs.shape[2:], places, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
    ):
        seen = (place - 1) * stride + (kernel - 1) * dilation + 1
        around.append((padding, max(0, seen - padding - size)))
    if any(before or after for before, after in around):
        inputs = functional.pad(inputs, [zeros for both in reversed(around) for zeros in both])
    steps = inputs.stride()
    of_taps = [step * dilation for step, dilation in zip(steps[2:], geometry.dilation, strict=True)]
    of_places = [step * stride for step, stride in zip(steps[2:], geometry.stride, strict=True)]
    shape = (*inputs.shape[:2], *geometry.kernel, *places)
    view = inputs.as_strided(shape, (*steps[:2], *of_taps, *of_places))
    length, step = math.prod(places), _ALIGNED_BYTES // inputs.element_size()
    if length % step == 0:
        return _aligned(view.reshape(len(inputs), -1, length))
    rows = inputs.new_empty(*shape[: 2 + len(geometry.kernel)], -(-length // step) * step)[..., :length]
    rows.unflatten(-1, tuple(places)).copy_(view)  # type: ignore[no-untyped-call]
    return rows.flatten(1, -2)


def _aligned(rows: Tensor) -> Tensor:
    """[m, r, length], each row beginning at a multiple of 64 bytes: a copy, or as it is."""
    step = _ALIGNED_BYTES // rows.element_size()
    if rows.stride(2) == 1 and rows.stride(1) % step == rows.stride(0) % step == rows.data_ptr() % _ALIGNED_BYTES == 0:
        return rows
    length = rows.shape[2]
    return rows.new_empty(*rows.shape[:2], -(-length // step) * step)[:, :, :length].copy_(rows)


def _in_parts(
    product: Callable[[Tensor, Tensor, Tensor], None],
    inputs: Tensor,
    gradient: Tensor,
    geometry: Geometry,
    at_once: int,
) -> Tensor:
    """``product`` writes [part, o, c * kernel] of ``at_once`` records at a time, all parts alike."""
    samples = gradient.new_empty(len(inputs), gradient.shape[1], inputs.shape[1] * math.prod(geometry.kernel))
    flat = gradient.flatten(2)
    for part in _parts(len(inputs), at_once):
        product(inputs[part], flat[part], samples[part])
    return samples


def _parts(records: int, at_once: int) -> Iterator[slice]:
    """Of the same length all: the last one reaches back over records that another part has had."""
    length = min(records, at_once)
    for start in range(0, records, length):
        end = min(start + length, records)
        yield slice(end - length, end)


def _at_once(inputs: Tensor, gradient: Tensor, kernel: Sizes) -> int:
    bound = _PATCH_BYTES if inputs.device.type == "cpu" else _PATCH_BYTES_ON_DEVICE
    of_record = inputs.shape[1] * math.prod(kernel) * math.prod(gradient.shape[2:]) * inputs.element_size()
    return max(1, bound // max(1, of_record))


# ----------------------------------------------------------------------------------------------------------- the rules


def taped_convolution(layer: Convolution, tape: Tape) -> Callable[[Tensor], Tensor]:
    """What takes the place of ``layer.forward``. Raises ``UnsupportedModel`` (MF-160) for inputs without a batch dimension."""
    geometry, around = _settings(layer)

    def forward(inputs: Tensor) -> Tensor:
        return _convolved(_padded(layer, inputs, around), layer.weight, layer.bias, layer.weight, None, geometry, tape)

    return forward


def taped_used_weight_convolution(layer: nn.Module, tape: Tape) -> Callable[[Tensor], Tensor]:
    """Of a convolution that uses ``layer.used_weight(layer.weight)`` instead of its weight.

    ``layer.way_back(samples)``, if there is one, turns gradients of the weight that is used, [n, *weight.shape], into
    gradients of ``layer.weight``; else torch is asked for it. Raises ``UnsupportedModel`` (MF-160) for another layer.
    """
    if not isinstance(layer, Convolution):
        what = f"{type(layer).__name__} has a used_weight and is no convolution"
        raise UnsupportedModel(160, what, "give it a taped_forward")
    geometry, around = _settings(layer)
    used_weight = cast("Callable[[Tensor], Tensor]", layer.used_weight)
    own_way = cast("Callable[[Tensor], Tensor] | None", getattr(layer, "way_back", None))

    def way_back(samples: Tensor) -> Tensor:
        if own_way is not None:
            return own_way(samples)
        torchs_way = torch.func.vjp(used_weight, layer.weight.detach())[1]
        (by_weight,) = torch.func.vmap(torchs_way)(samples)
        return cast("Tensor", by_weight)

    def forward(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            used = used_weight(layer.weight)
        return _convolved(_padded(layer, inputs, around), layer.weight, layer.bias, used, way_back, geometry, tape)

    return forward


def _settings(layer: Convolution) -> tuple[Geometry, list[int]]:
    """The layer's geometry, and what is to be padded before it: [last dimension's before, after, ...]."""
    padding: str | Sizes = layer.padding
    by_name = isinstance(padding, str)
    total = [dilation * (kernel - 1) for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
    if padding == "same":
        both = [(size // 2, size - size // 2) for size in total]
    else:
        both = [(0, 0)] * len(total) if by_name else [(int(size), int(size)) for size in padding]
    inside = layer.padding_mode == "zeros" and all(before == after for before, after in both)
    within = tuple(before if inside else 0 for before, _ in both)
    around = [] if inside else [size for pair in reversed(both) for size in pair]
    return Geometry(layer.kernel_size, layer.stride, within, layer.dilation, layer.groups), around


def _padded(layer: Convolution, inputs: Tensor, around: list[int]) -> Tensor:
    """Refuses inputs without a batch dimension: their channels would pass for records."""
    if inputs.dim() != len(layer.kernel_size) + 2:
        what = f"{type(layer).__name__} over a record without a batch dimension"
        raise UnsupportedModel(160, what, "add the batch dimension")
    if not around:
        return inputs
    return functional.pad(inputs, around, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _convolved(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    used: Tensor,
    way_back: Callable[[Tensor], Tensor] | None,
    geometry: Geometry,
    tape: Tape,
) -> Tensor:
    result: Tensor = _Convolution.apply(inputs, weight, bias, used.detach(), way_back, geometry, tape)  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        used: Tensor,
        way_back: Callable[[Tensor], Tensor] | None,
        geometry: Geometry,
        tape: Tape,
    ) -> Tensor:
        ctx.layer = weight, bias, way_back, geometry, tape, inputs.dtype  # type: ignore[attr-defined]
        shift = bias
        if tape.dtype is not None:
            inputs, used = inputs.to(tape.dtype), used.to(tape.dtype)
            shift = None if bias is None else bias.to(tape.dtype)  # type: ignore[assignment]
        ctx.save_for_backward(inputs, used)
        settings = geometry.stride, geometry.padding, geometry.dilation
        nothing = [0] * len(geometry.kernel)
        return torch.convolution(inputs, used, shift, *settings, False, nothing, geometry.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, used = ctx.saved_tensors  # type: ignore[attr-defined]
        weight, bias, way_back, geometry, tape, dtype = ctx.layer  # type: ignore[attr-defined]
        gradient = gradient.contiguous()
        exact = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        if weight.requires_grad:
            if way_back is None and _is_wide(gradient, geometry, weight):
                seen = patches(inputs, geometry, gradient.shape[2:])
                tape.outer(weight, seen.transpose(1, 2), gradient.flatten(2).transpose(1, 2))
            else:
                samples = weight_samples(inputs.to(exact), gradient.to(exact), geometry)
                tape.samples(weight, samples if way_back is None else way_back(samples))
        if bias is not None and bias.requires_grad:
            tape.samples(bias, gradient.flatten(2).sum(2, dtype=exact))
        by_inputs = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            by_inputs, _, _ = torch.ops.aten.convolution_backward(
                gradient,
                inputs,
                used,
                None,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                False,
                [0] * len(geometry.kernel),
                geometry.groups,
                [True, False, False],
            )
            by_inputs = by_inputs.to(dtype)
        return by_inputs, None, None, None, None, None, None


def _is_wide(gradient: Tensor, geometry: Geometry, weight: Tensor) -> bool:
    """Whether what a record's gradient is made of is much smaller than the gradient."""
    places = math.prod(gradient.shape[2:])
    size = weight[0].numel() + len(weight)
    return geometry.groups == 1 and places * size < _PRODUCTS_PAY * weight.numel()
