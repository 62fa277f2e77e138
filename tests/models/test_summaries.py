"""The summaries of a series against numpy, and what they promise of length and of steps outside the stay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medfed.models.summaries import SeriesSummaries, summarise, width

VARIABLES, STEPS = 3, 12


def series(seed: int = 6, scale: float = 1.0) -> NDArray[np.float64]:
    """Two records: the first stays for 7 steps; the second's third variable was never observed."""
    rng = np.random.default_rng(seed)
    values, observed = scale * rng.normal(size=(2, STEPS, VARIABLES)), rng.random((2, STEPS, VARIABLES)) < 0.4
    observed[1, :, 2] = False
    inside = np.arange(STEPS)[None] < np.array([[7], [12]])
    return np.concatenate([values, observed, inside[:, :, None], np.full((2, STEPS, 1), 0.75)], 2)


def of_one(record: NDArray[np.float64]) -> list[float]:
    """What the docstring says, value by value."""
    inside = record[:, 2 * VARIABLES] > 0
    parts: list[list[float]] = [[], [], [], [], []]
    for variable in range(VARIABLES):
        seen = (record[:, VARIABLES + variable] > 0) & inside
        values = 2 * np.tanh(record[:, variable] / 2)
        early, late = values[:6][seen[:6]], values[6:][seen[6:]]
        parts[0].append(values[seen].mean() if seen.any() else 0.0)
        parts[1].append(values[seen][-1] if seen.any() else 0.0)
        parts[2].append(np.hypot(values[seen].std(), 0.1) - 0.1 if seen.any() else 0.0)
        parts[3].append((late.mean() - early.mean()) / 2 if len(early) and len(late) else 0.0)
        parts[4].append(seen.mean() - 0.3)
    return [*itertools.chain(*parts), inside.mean(), record[0, 2 * VARIABLES + 1]]


def test_summaries_are_the_documented_ones_divided_by_their_length() -> None:
    found = summarise(torch.from_numpy(series()), VARIABLES).numpy()
    assert found.shape == (2, width(VARIABLES, 1))
    for record, mine in zip(series(), found, strict=True):
        expected = np.array(of_one(record))
        assert mine == pytest.approx(4 * expected / np.sqrt(1 + expected @ expected))


def test_absurd_values_move_no_summary_beyond_its_length() -> None:
    lengths = torch.linalg.vector_norm(summarise(torch.from_numpy(series(scale=1e6)), VARIABLES), dim=1)
    assert (lengths < 4).all() and (lengths > 3).all()


def test_record_without_a_measurement_has_finite_summaries_and_gradients() -> None:
    empty = torch.zeros(1, STEPS, 2 * VARIABLES + 2, requires_grad=True)
    found = summarise(empty, VARIABLES)
    assert torch.isfinite(found).all()
    (gradient,) = torch.autograd.grad(found.sum(), empty)
    assert torch.isfinite(gradient).all()


def test_series_of_one_constant_value_has_a_finite_gradient() -> None:
    constant = torch.ones(1, STEPS, 2 * VARIABLES + 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(summarise(constant, VARIABLES).sum(), constant)
    assert torch.isfinite(gradient).all()


def test_model_begins_with_equal_chances() -> None:
    model = SeriesSummaries(VARIABLES, 1, 2)
    assert not model(torch.from_numpy(series()).float()).any()
