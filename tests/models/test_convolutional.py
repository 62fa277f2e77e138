"""Weight standardisation: what is convolved with, and how the gradient finds its way back."""

from __future__ import annotations

import pytest
import torch

from medfed.models.convolutional import StandardizedConv2d, cnn


def test_used_filters_have_mean_zero_and_the_variance_of_their_fan_in() -> None:
    torch.manual_seed(2)
    layer = StandardizedConv2d(3, 8, stride=2).double()
    layer.weight.data = layer.weight.data * 5 + 2
    used = layer.used_weight(layer.weight).flatten(1)
    assert used.mean(1).tolist() == pytest.approx([0.0] * 8, abs=1e-12)
    assert (used.var(1, correction=0) * 27).tolist() == pytest.approx([1.0] * 8, rel=1e-4)
    # so an image that is the same everywhere gives nothing but at the padded border, whatever the weight's mean
    even = torch.ones(1, 3, 9, 9, dtype=torch.float64)
    assert layer(even)[:, :, 1:-1, 1:-1].abs().max() < 1e-12


def test_gradient_of_a_weight_has_no_part_along_its_mean_or_itself() -> None:
    """A filter's mean and size change nothing: a noised step along them would be lost."""
    torch.manual_seed(2)
    layer = StandardizedConv2d(2, 4, stride=1).double()
    layer.weight.data *= 100  # far from the stabilizer
    layer(torch.randn(5, 2, 6, 6, dtype=torch.float64)).sin().sum().backward()
    gradient, weight = layer.weight.grad.flatten(1), layer.weight.detach().flatten(1)
    assert gradient.norm() > 1e-3
    assert gradient.sum(1).abs().max() < 1e-12
    assert (gradient * weight).sum(1).abs().max() < 1e-5 * gradient.norm() * weight.norm()


def test_filters_of_zeros_are_finite() -> None:
    layer = StandardizedConv2d(1, 2, stride=1)
    torch.nn.init.zeros_(layer.weight)
    layer(torch.randn(1, 1, 5, 5)).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize(("height", "width", "first_stride"), [(28, 28, 1), (28, 28, 2), (9, 17, 2), (8, 8, 1)])
def test_head_of_places_fits_any_image(height: int, width: int, first_stride: int) -> None:
    model = cnn(height, width, 2, [4, 4, 4], first_stride, 2, "places")
    assert model(torch.zeros(3, 1, height, width)).shape == (3, 2)
