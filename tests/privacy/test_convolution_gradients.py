"""Convolutions record by record: against torch's own gradient of each record alone in float64, way by way and by the rule."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from medfed.errors import UnsupportedModel
from medfed.models.convolutional import StandardizedConv2d
from medfed.privacy.gradients import convolution
from medfed.privacy.gradients.convolution import (
    Geometry,
    by_groups,
    by_patches,
    by_patches_across,
    by_slabs,
    quickest_way,
    taped_convolution,
    taped_used_weight_convolution,
    weight_samples,
)
from medfed.privacy.gradients.fixed_batches import steady_arithmetic

WAYS = [by_patches, by_patches_across, by_slabs, by_groups]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


class Collected:
    """A tape that keeps each parameter's gradients as [n, size]."""

    def __init__(self, dtype=None):
        self.dtype, self.found = dtype, {}
        self.products = 0

    def outer(self, weight, inputs, gradient):
        self.products += 1
        a, g = (
            inputs.reshape(len(inputs), -1, inputs.shape[-1]),
            gradient.reshape(len(gradient), -1, gradient.shape[-1]),
        )
        self.samples(weight, torch.bmm(g.transpose(1, 2).to(weight.dtype), a.to(weight.dtype)))

    def samples(self, parameter, each):
        assert each.dtype == parameter.dtype
        self.found.setdefault(parameter, []).append(each.reshape(len(each), parameter.numel()).clone())

    def rows(self, parameter, index, gradient):
        raise AssertionError("a convolution has no rows")

    def total(self, parameter):
        return torch.stack(self.found[parameter]).sum(0)


def filled(*shape, dtype, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def true_samples(inputs, gradient, shape, geometry):
    """[n, *shape] in float64: torch's gradient of each record alone."""
    each = []
    for record, by_result in zip(inputs.double(), gradient.double(), strict=True):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        result = FUNCTIONS[len(geometry.kernel)](
            record[None], weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        each.append(torch.autograd.grad(result, weight, by_result[None])[0])
    return torch.stack(each) if each else torch.zeros(0, *shape, dtype=torch.float64)


def error(found, true):
    """The largest, as a part of the largest value of the record."""
    found, true = found.double().reshape(true.shape).flatten(1), true.flatten(1)
    return float(((found - true).abs().amax(1) / (true.abs().amax(1) + 1e-30)).max()) if len(true) else 0.0


@st.composite
def convolutions(draw):
    """(records, channels, outputs, space, geometry) of a convolution with at least one place."""
    dimensions = draw(st.integers(1, 3))

    def sizes(least, most):
        return tuple(draw(st.lists(st.integers(least, most), min_size=dimensions, max_size=dimensions)))

    groups = draw(st.integers(1, 3))
    kernel, dilation = sizes(1, 4 if dimensions < 3 else 3), sizes(1, 2)
    geometry = Geometry(kernel, sizes(1, 3), sizes(0, 2), dilation, groups)
    space = sizes(1, 12 if dimensions < 3 else 7)
    seen = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    assume(all(size + 2 * pad >= least for size, pad, least in zip(space, geometry.padding, seen, strict=True)))
    records = draw(st.sampled_from([0, 1, 2, 3, 5, 17]))
    return records, groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4)), space, geometry


def drawn(case, dtype):
    records, channels, outputs, space, geometry = case
    inputs = filled(records, channels, *space, dtype=dtype)
    shape = (outputs, channels // geometry.groups, *geometry.kernel)
    places = FUNCTIONS[len(space)](
        torch.zeros(1, channels, *space),
        torch.zeros(shape),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    ).shape[2:]
    return inputs, filled(records, outputs, *places, dtype=dtype, seed=1), shape, geometry


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(convolutions(), st.sampled_from([torch.float32, torch.float64]))
def test_samples_by_the_rule_are_those_of_each_record_alone(case, dtype):
    inputs, gradient, shape, geometry = drawn(case, dtype)
    samples = weight_samples(inputs, gradient, geometry)
    assert samples.dtype == dtype
    assert samples.shape == (len(inputs), *shape)
    assert error(samples, true_samples(inputs, gradient, shape, geometry)) < BOUND[dtype]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(convolutions(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1, 1 << 12, 1 << 21]))
def test_each_way_is_exact_whatever_goes_at_once(way, case, dtype, at_once):
    inputs, gradient, shape, geometry = drawn(case, dtype)
    assume(way is not by_slabs or geometry.stride[0] == 1)
    assume(len(inputs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "quickest_way", lambda *_: way)
        patch.setattr(convolution, "_PATCH_BYTES", at_once)
        patch.setattr(convolution, "_CHANNELS_IN_GROUPS", at_once)
        samples = weight_samples(inputs, gradient, geometry)
    assert error(samples, true_samples(inputs, gradient, shape, geometry)) < BOUND[dtype]


KNOWN = {
    "first layer": (1, 32, (28, 28), 3, 1, 1, by_patches_across),
    "one color, stride": (1, 16, (28, 28), 3, 2, 1, by_patches_across),
    "images": (32, 64, (14, 14), 3, 1, 1, by_groups),
    "stride": (16, 32, (14, 14), 3, 2, 1, by_groups),
    "wide": (64, 128, (16, 16), 3, 2, 1, by_patches),
    "one tap": (32, 64, (16, 16), 1, 2, 0, by_patches),
    "signal": (40, 64, (200,), 5, 1, 2, by_groups),
    "odd channels": (12, 30, (100,), 7, 1, 3, by_patches),
    "volume": (8, 16, (8, 8, 8), 3, 1, 1, by_slabs),
    "large image": (16, 16, (80, 80), 3, 1, 1, by_patches_across),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_go_their_measured_way_and_are_exact(name):
    channels, outputs, space, kernel, stride, padding, way = KNOWN[name]
    layer = CONVOLUTIONS[len(space)](channels, outputs, kernel, stride, padding)
    geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    inputs = filled(5, channels, *space, dtype=torch.float32)
    gradient = torch.randn_like(layer(inputs))
    assert quickest_way(inputs, gradient, geometry) is (
        way
        if way is not by_groups or torch.backends.mkldnn.is_available()
        else quickest_way(inputs, gradient, geometry)
    )
    true = true_samples(inputs, gradient, layer.weight.shape, geometry)
    assert error(weight_samples(inputs, gradient, geometry), true) < 1e-5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(convolutions())
def test_slots_of_any_convolution_are_alike(case):
    """Small products with odd sizes round by where in memory their rows begin, unless all begin alike."""
    records = 32
    inputs, gradient, _, geometry = drawn((records, *case[1:]), torch.float32)
    order = torch.randperm(records, generator=torch.Generator().manual_seed(2))
    with steady_arithmetic():
        samples = weight_samples(inputs, gradient, geometry)
        assert torch.equal(weight_samples(inputs[order], gradient[order], geometry), samples[order])


@pytest.mark.parametrize("name", [*KNOWN, "depthwise"])
@pytest.mark.parametrize("records", [32, 64, 17])
def test_a_slots_bits_do_not_depend_on_its_place_or_on_other_slots(name, records):
    channels, outputs, space, kernel, stride, padding, _ = KNOWN.get(name, (24, 24, (9, 9), 3, 1, 1, None))
    groups = 24 if name == "depthwise" else 1
    layer = CONVOLUTIONS[len(space)](channels, outputs, kernel, stride, padding, groups=groups)
    geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups)
    inputs = filled(records, channels, *space, dtype=torch.float32)
    gradient = filled(*layer(inputs).shape, dtype=torch.float32, seed=1)
    order = torch.randperm(records, generator=torch.Generator().manual_seed(2))
    with steady_arithmetic():
        samples = weight_samples(inputs, gradient, geometry)
        assert torch.equal(weight_samples(inputs[order], gradient[order], geometry), samples[order])
        alone = torch.zeros_like(inputs), torch.zeros_like(gradient)
        alone[0][-1], alone[1][-1] = inputs[3], gradient[3]
        alone[0][0] = float("nan")
        assert torch.equal(weight_samples(*alone, geometry)[-1], samples[3])


# ----------------------------------------------------------------------------------------------------------- the rules


def taped_pass(layer, inputs, rule=taped_convolution, tape=None):
    """(tape, result, gradient by the inputs) of a taped pass with one weight for each value of the result."""
    tape = tape or Collected()
    inputs = inputs.clone().requires_grad_()
    result = rule(layer, tape)(inputs)
    result.backward(filled(*result.shape, dtype=result.dtype, seed=3))
    assert all(weight.grad is None for weight in layer.parameters())
    return tape, result.detach(), inputs.grad


def plain_pass(layer, inputs):
    """(gradients [n, size] of each parameter, result, gradient by the inputs) by torch, one record after the other."""
    parts = [[] for _ in layer.parameters()]
    results, backs = [], []
    with torch.no_grad():
        by_result = filled(*layer(inputs).shape, dtype=inputs.dtype, seed=3)
    for record, gradient in zip(inputs, by_result, strict=True):
        one = record[None].clone().requires_grad_()
        result = layer(one)
        found = torch.autograd.grad(result, [*layer.parameters(), one], gradient[None])
        for part, each in zip(parts, found[:-1], strict=True):
            part.append(each.flatten())
        results.append(result.detach())
        backs.append(found[-1])
    return [torch.stack(part) for part in parts], torch.cat(results), torch.cat(backs)


LAYERS = {
    "same": lambda: nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(1, 3)),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
    "circular": lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 2), padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    "one tap": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "wide": lambda: nn.Conv2d(4, 64, 7, stride=7),
    "signal": lambda: nn.Conv1d(4, 6, 4, padding="same"),
    "volume": lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=(0, 1, 1)),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_taped_convolution_agrees_with_torch_record_by_record(name, records):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    inputs = filled(records, 4, *[9] * (layer.weight.dim() - 2), dtype=torch.float64)
    tape, result, back = taped_pass(layer, inputs)
    true, plain, by_inputs = plain_pass(layer, inputs)
    torch.testing.assert_close(result, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back, by_inputs, rtol=1e-12, atol=1e-12)
    for parameter, each in zip(layer.parameters(), true, strict=True):
        assert error(tape.total(parameter), each) < 1e-10
    assert bool(tape.products) == (name == "wide")


def test_patches_of_a_wide_layer_are_those_of_the_used_weight_without_products():
    class Doubled(nn.Conv2d):
        def used_weight(self, weight):
            return 2 * weight

        def forward(self, inputs):
            return functional.conv2d(inputs, self.used_weight(self.weight), self.bias, self.stride)

    layer = Doubled(4, 64, 7, stride=7).double()
    inputs = filled(3, 4, 9, 9, dtype=torch.float64)
    tape, *_ = taped_pass(layer, inputs, taped_used_weight_convolution)
    true, *_ = plain_pass(layer, inputs)
    assert not tape.products
    for parameter, each in zip(layer.parameters(), true, strict=True):
        assert error(tape.total(parameter), each) < 1e-10


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardized_convolution_agrees_with_torch_record_by_record(stride, dtype):
    torch.manual_seed(0)
    layer = StandardizedConv2d(16, 32, stride).to(dtype)
    exact = copy.deepcopy(layer).double()
    inputs = filled(5, 16, 14, 14, dtype=dtype)
    tape = Collected()
    result = taped_used_weight_convolution(layer, tape)(inputs)
    gradient = filled(*result.shape, dtype=dtype, seed=3)
    result.backward(gradient)
    torch.testing.assert_close(result, layer(inputs))
    each = [
        torch.autograd.grad(exact(record[None].double()), exact.weight, by_result[None].double())[0]
        for record, by_result in zip(inputs, gradient, strict=True)
    ]
    assert error(tape.total(layer.weight), torch.stack(each)) < BOUND[dtype]


def test_way_back_is_what_torch_finds():
    torch.manual_seed(0)
    layer = StandardizedConv2d(3, 5, 1).double()
    samples = filled(4, *layer.weight.shape, dtype=torch.float64)
    _, back = torch.func.vjp(layer.used_weight, layer.weight.detach())
    (true,) = torch.func.vmap(back)(samples)
    torch.testing.assert_close(layer.way_back(samples.clone()), true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_are_not_written_to_the_tape(frozen):
    layer = nn.Conv2d(4, 6, 3)
    getattr(layer, frozen).requires_grad_(False)
    tape, _, back = taped_pass(layer, filled(3, 4, 9, 9, dtype=torch.float32))
    assert back is not None
    assert set(tape.found) == {layer.bias if frozen == "weight" else layer.weight}


def test_first_layer_whose_inputs_need_no_gradient_is_written_to_the_tape():
    layer, tape = nn.Conv2d(4, 6, 3), Collected()
    taped_convolution(layer, tape)(torch.ones(3, 4, 9, 9)).sum().backward()
    assert set(tape.found) == set(layer.parameters())


def test_frozen_layer_needs_no_backward_pass():
    layer, tape = nn.Conv2d(4, 6, 3).requires_grad_(False), Collected()
    assert not taped_convolution(layer, tape)(torch.ones(3, 4, 9, 9)).requires_grad


def test_layer_used_twice_is_written_twice():
    layer, tape = nn.Conv2d(4, 4, 3, padding=1), Collected()
    forward = taped_convolution(layer, tape)
    forward(forward(torch.ones(3, 4, 9, 9))).sum().backward()
    assert [len(each) for each in tape.found.values()] == [2, 2]


def test_short_type_gives_samples_in_float32_near_those_in_full():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1)
    inputs = filled(3, 16, 9, 9, dtype=torch.float32)
    tape = Collected(torch.bfloat16)
    own = inputs.clone().requires_grad_()
    result = taped_convolution(layer, tape)(own)
    assert result.dtype == torch.bfloat16
    gradient = filled(*result.shape, dtype=torch.float32, seed=3).bfloat16()
    result.backward(gradient)
    assert own.grad.dtype == torch.float32
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    seen = inputs.bfloat16().float()
    assert error(tape.total(layer.weight), true_samples(seen, gradient.float(), layer.weight.shape, geometry)) < 1e-5


def test_empty_batch_leaves_no_samples():
    layer, tape = nn.Conv2d(4, 6, 3), Collected()
    taped_convolution(layer, tape)(torch.ones(0, 4, 9, 9)).sum().backward()
    assert {len(tape.total(parameter)) for parameter in layer.parameters()} == {0}


def test_record_without_batch_dimension_is_refused():
    with pytest.raises(UnsupportedModel, match="MF-160 Conv2d over a record without a batch dimension"):
        taped_convolution(nn.Conv2d(4, 6, 3), Collected())(torch.ones(4, 9, 9))


def test_used_weight_of_another_layer_is_refused():
    class Scaled(nn.Linear):
        def used_weight(self, weight):
            return 2 * weight

    with pytest.raises(UnsupportedModel, match="MF-160 Scaled has a used_weight and is no convolution"):
        taped_used_weight_convolution(Scaled(3, 3), Collected())


def test_long_sums_stay_within_the_bound():
    """All products positive over 300 x 300 places: where one chain of float32 sums is off by 2e-5."""
    inputs, gradient = torch.rand(1, 16, 300, 300), torch.rand(1, 16, 300, 300)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    samples = weight_samples(inputs, gradient, geometry)
    assert error(samples, true_samples(inputs, gradient, (16, 16, 3, 3), geometry)) < 1e-5
    assert math.prod(gradient.shape[2:]) > convolution._MOST_PLACES_IN_GROUPS
