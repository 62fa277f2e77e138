"""Norms record by record: scale and shift against torch's own gradients of each record alone in float64."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from medfed.privacy.gradients import normalization
from medfed.privacy.gradients.fixed_batches import steady_arithmetic
from medfed.privacy.gradients.normalization import taped_group_norm, taped_layer_norm, taped_rms_norm

RULES = {nn.GroupNorm: taped_group_norm, nn.LayerNorm: taped_layer_norm, nn.RMSNorm: taped_rms_norm}
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


class Collected:
    """A tape that keeps each parameter's gradients as [n, size]."""

    def __init__(self, dtype=None):
        self.dtype, self.found = dtype, {}

    def outer(self, weight, inputs, gradient):
        raise AssertionError("a norm is no product")

    def samples(self, parameter, each):
        assert each.dtype == parameter.dtype
        self.found[parameter] = each.reshape(len(each), parameter.numel())

    def rows(self, parameter, index, gradient):
        raise AssertionError("a norm has no rows")


def filled(*shape, dtype, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def drawn_weights(layer):
    with torch.no_grad():
        for place, weight in enumerate(layer.parameters()):
            weight.copy_(filled(*weight.shape, dtype=torch.float64, seed=10 + place))
    return layer


def taped_pass(layer, inputs, gradient, tape=None):
    tape = tape or Collected()
    inputs = inputs.clone().requires_grad_()
    result = RULES[type(layer)](layer, tape)(inputs)
    result.backward(gradient)
    assert all(weight.grad is None for weight in layer.parameters())
    return tape, result.detach(), inputs.grad


def error(found, true):
    """The largest, as a part of the largest value of the record."""
    found, true = found.double().reshape(true.shape).flatten(1), true.flatten(1)
    return float(((found - true).abs().amax(1) / (true.abs().amax(1) + 1e-30)).max()) if len(true) else 0.0


def check(layer, inputs):
    """The taped pass against torch in float64, one record after the other.

    Of two or three values a norm's gradient by its inputs is what is left of numbers that cancel, in torch as here: float32
    is for larger groups.
    """
    gradient = filled(*inputs.shape, dtype=inputs.dtype, seed=3)
    tape, result, back = taped_pass(layer, inputs, gradient)
    exact = copy.deepcopy(layer).double()
    bound = BOUND[inputs.dtype]
    torch.testing.assert_close(result, layer(inputs).detach(), rtol=bound, atol=bound)
    found = [[] for _ in range(1 + len(list(exact.parameters())))]
    for record, by_result in zip(inputs.double(), gradient.double(), strict=True):
        one = record[None].clone().requires_grad_()
        each = torch.autograd.grad(exact(one), [one, *exact.parameters()], by_result[None])
        for part, value in zip(found, each, strict=True):
            part.append(value.flatten())
    assert error(back, torch.stack(found[0])) < bound * (1 if inputs.dtype == torch.float64 else 10)
    for weight, true in zip(layer.parameters(), found[1:], strict=True):
        assert error(tape.found[weight], torch.stack(true)) < bound


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.sampled_from([1, 2, 3, 7]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.integers(2, 6), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0, 2048]),
)
def test_group_norm_agrees_with_torch_record_by_record(records, groups, of_group, space, dtype, most):
    assume(dtype == torch.float64 or of_group * math.prod(space) >= 16)
    layer = drawn_weights(nn.GroupNorm(groups, groups * of_group)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalization, "_LONG", most)  # 0: every sum goes the way of long ones
        check(layer, filled(records, groups * of_group, *space, dtype=dtype))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.sampled_from([1, 2, 3, 7]),
    st.lists(st.integers(1, 5), max_size=2),
    st.lists(st.integers(2, 20), min_size=1, max_size=2),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1, 1 << 18]),
    st.sampled_from(["both", "no bias", "rms", "rms eps"]),
)
def test_layer_and_rms_norm_agree_with_torch_record_by_record(records, steps, shape, dtype, at_once, kind):
    assume(dtype == torch.float64 or math.prod(shape) >= 16)
    layer = {
        "both": lambda: nn.LayerNorm(shape),
        "no bias": lambda: nn.LayerNorm(shape, bias=False, eps=1e-3),
        "rms": lambda: nn.RMSNorm(shape),
        "rms eps": lambda: nn.RMSNorm(shape, eps=1e-3),
    }[kind]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalization, "_BLOCK_BYTES", at_once)
        check(drawn_weights(layer).to(dtype), filled(records, *steps, *shape, dtype=dtype))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, functools.partial(nn.GroupNorm, 2)])
def test_records_of_width_alone_have_samples(kind):
    check(drawn_weights(kind(4)).double(), filled(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("places", [2000, 300_000])
def test_group_norm_over_long_sums_stays_exact(places):
    layer = drawn_weights(nn.GroupNorm(2, 4))
    inputs = filled(2, 4, places, dtype=torch.float32) + 2
    gradient = inputs.abs() + 0.5  # all of one sign: the sums are as large as their terms
    tape, _, _ = taped_pass(layer, inputs, gradient)
    exact = copy.deepcopy(layer).double()
    for record in range(2):
        result = exact(inputs[record : record + 1].double())
        true = torch.autograd.grad(result, list(exact.parameters()), gradient[record : record + 1].double())
        sizes = (gradient[record].double() * (inputs[record].double() - 2)).abs().sum(1)
        assert float(((tape.found[layer.weight][record] - true[0]).abs() / sizes).max()) < 1e-6
        assert float(((tape.found[layer.bias][record] - true[1]).abs() / true[1]).max()) < 1e-6


LAYERS = {
    "group norm": lambda: (nn.GroupNorm(3, 6), (6, 7, 5)),
    "long group norm": lambda: (nn.GroupNorm(3, 6), (6, 83, 61)),
    "layer norm": lambda: (nn.LayerNorm(11), (9, 11)),
    "layer norm of rows": lambda: (nn.LayerNorm(11), (11,)),
    "rms norm": lambda: (nn.RMSNorm(11), (9, 11)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_slots_bits_do_not_depend_on_its_place_or_on_other_slots(name):
    layer, shape = LAYERS[name]()
    inputs, gradient = (filled(32, *shape, dtype=torch.float32, seed=seed) for seed in (0, 1))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    with steady_arithmetic():
        tape, result, back = taped_pass(layer, inputs, gradient)
        other, mixed, mixed_back = taped_pass(layer, inputs[order], gradient[order])
        alone = torch.zeros_like(inputs), torch.zeros_like(gradient)
        alone[0][-1], alone[1][-1] = inputs[3], gradient[3]
        alone[0][0] = float("nan")
        single, _, single_back = taped_pass(layer, *alone)
    assert torch.equal(mixed, result[order])
    assert torch.equal(mixed_back, back[order])
    assert torch.equal(single_back[-1], back[3])
    for weight in layer.parameters():
        assert torch.equal(other.found[weight], tape.found[weight][order])
        assert torch.equal(single.found[weight][-1], tape.found[weight][3])


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.LayerNorm(4)])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_are_not_written_to_the_tape(layer, frozen):
    layer = copy.deepcopy(layer)
    getattr(layer, frozen).requires_grad_(False)
    values = filled(3, 4, dtype=torch.float32)
    tape, _, back = taped_pass(layer, values, values)
    assert back is not None
    assert set(tape.found) == {layer.bias if frozen == "weight" else layer.weight}


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4, affine=False),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.RMSNorm(4, elementwise_affine=False),
        nn.GroupNorm(2, 4).requires_grad_(False),
        nn.RMSNorm(4).requires_grad_(False),
    ],
)
def test_norms_with_nothing_to_train_are_torchs_own(layer):
    values = filled(3, 4, dtype=torch.float32)
    tape, result, back = taped_pass(layer, values, values)
    own = values.clone().requires_grad_()
    layer(own).backward(values)
    assert torch.equal(result, layer(values))
    assert torch.equal(back, own.grad)
    assert not tape.found


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4)])
def test_first_layer_whose_inputs_need_no_gradient_is_written_to_the_tape(layer):
    tape = Collected()
    RULES[type(layer)](layer, tape)(filled(3, 4, dtype=torch.float32)).sum().backward()
    assert set(tape.found) == set(layer.parameters())


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4)])
def test_norms_take_short_values_and_work_in_the_parameters_type(layer):
    tape = Collected(torch.bfloat16)
    inputs = filled(3, 4, dtype=torch.float32).bfloat16().requires_grad_()
    result = RULES[type(layer)](layer, tape)(inputs)
    result.sum().backward()
    assert result.dtype == torch.float32
    assert inputs.grad.dtype == torch.bfloat16
    assert set(tape.found) == set(layer.parameters())


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4)])
def test_empty_batch_leaves_empty_samples(layer):
    values = torch.zeros(0, 4)
    tape, *_ = taped_pass(layer, values, values)
    assert {len(each) for each in tape.found.values()} <= {0}
