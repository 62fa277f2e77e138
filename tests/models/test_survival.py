"""Survival: losses of each record alone, curves, and metrics against lifelines and by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from medfed.data_contract import DataContract
from medfed.errors import DataError, PrivacyError
from medfed.models.tasks import losses, meaning
from medfed.models.tasks.survival import time_without_event
from medfed.models.tasks.survival_scores import brier_scores, censoring_curve, concordance, integrated_brier
from medfed.seams import system_seams
from medfed.server.planning import load_task, template_text
from medfed.study import Study
from medfed.task_choice import Survival

MakeStudy = Callable[..., Study]
EDGES = [10.0, 20.0, 40.0]
KEYS = {"kind": "survival", "time": "days", "event": "died", "unit": "days", "edges": EDGES}
HAZARD = Survival.model_validate({**KEYS, "head": "hazard"})
WEIBULL = Survival.model_validate({**KEYS, "head": "weibull"})
SHAPED = Survival.model_validate({**KEYS, "head": "weibull", "shape": 1.5})
HEADS = pytest.mark.parametrize(
    "task", [HAZARD, WEIBULL, SHAPED], ids=["hazard", "weibull", "weibull of a public shape"]
)


def drawn(task: Survival, size: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(size, task.outputs, generator=generator, dtype=torch.float64)
    labels = torch.stack([torch.randint(high, (size,), generator=generator) for high in (60, 2)], 1)
    return outputs, labels


def gradients(task: Survival, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    leaf = outputs.clone().requires_grad_()
    (found,) = torch.autograd.grad(losses(task)(leaf, labels).sum(), leaf)
    return found


# -------------------------------------------------------------------------------------------------------------- losses


@HEADS
def test_gradient_by_a_records_outputs_is_a_function_of_that_record_alone_to_the_last_bit(task: Survival) -> None:
    outputs, labels = drawn(task, 203)
    for kind in (torch.float64, torch.float32):
        whole = gradients(task, outputs.to(kind), labels)
        order = torch.from_numpy(np.random.default_rng(3).permutation(203))
        assert torch.equal(gradients(task, outputs.to(kind)[order], labels[order]), whole[order])
        for size in (1, 2, 7, 64):
            parts = [
                gradients(task, outputs.to(kind)[start : start + size], labels[start : start + size])
                for start in range(0, 203, size)
            ]
            assert torch.equal(torch.cat(parts), whole)


@HEADS
def test_private_and_plain_losses_are_the_same_numbers_with_the_same_gradients(task: Survival) -> None:
    outputs, labels = drawn(task, 50)
    plain = meaning(task).plain_losses()
    leaf = outputs.clone().requires_grad_()
    assert torch.allclose(losses(task)(outputs, labels), plain(outputs, labels), rtol=1e-12)
    (expected,) = torch.autograd.grad(plain(leaf, labels).sum(), leaf)
    assert torch.allclose(gradients(task, outputs, labels), expected, rtol=1e-10, atol=1e-12)


def test_hazard_loss_is_minus_log_likelihood_of_intervals_come_through() -> None:
    logits = torch.tensor([[0.3, -0.4, 1.2]], dtype=torch.float64).expand(6, 3)
    hazard = 1 / (1 + np.exp(-np.array([0.3, -0.4, 1.2])))
    stays, comes = -np.log(1 - hazard), -np.log(hazard)
    labels = torch.tensor([[10, 1], [11, 1], [14, 0], [15, 0], [60, 0], [60, 1]])
    expected = [
        comes[0],  # an edge belongs to the interval that it ends
        stays[0] + comes[1],
        stays[0],  # censored before half of the second interval
        stays[0] + stays[1],  # after it
        stays.sum(),
        stays.sum(),  # beyond the last edge nothing is asked
    ]
    assert losses(HAZARD)(logits, labels).numpy() == pytest.approx(expected)


def test_event_at_time_zero_falls_into_the_first_interval() -> None:
    found = gradients(HAZARD, torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0, 1]]))
    assert found.tolist() == [[-0.5, 0.0, 0.0]]


def test_weibull_loss_is_the_likelihood_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    outputs, labels = drawn(WEIBULL, 40)
    scale, shape = (np.exp(outputs[:, place].numpy()) for place in (0, 1))
    times = np.maximum(labels[:, 0].numpy(), 0.5) / 40.0
    law = stats.weibull_min(shape, scale=scale)
    expected = -np.where(labels[:, 1].numpy() == 1, law.logpdf(times), law.logsf(times))
    assert losses(WEIBULL)(outputs, labels).numpy() == pytest.approx(expected, rel=1e-9)
    fixed = losses(SHAPED)(outputs[:, :1], labels).numpy()
    law = stats.weibull_min(1.5, scale=scale)
    assert fixed == pytest.approx(-np.where(labels[:, 1].numpy() == 1, law.logpdf(times), law.logsf(times)), rel=1e-9)


@HEADS
def test_gradient_stays_a_number_whatever_finite_weights_say(task: Survival) -> None:
    _, labels = drawn(task, 8)
    for size in (1e3, -1e3, 1e30):
        assert torch.isfinite(gradients(task, torch.full((8, task.outputs), size, dtype=torch.float64), labels)).all()


# --------------------------------------------------------------------------------------------------------- predictions


@HEADS
def test_curves_fall_from_one_and_have_one_value_an_edge(task: Survival) -> None:
    curves = meaning(task).predictions(drawn(task, 30)[0].numpy())
    assert curves.shape == (30, 3)
    assert ((curves >= 0) & (curves < 1)).all() and curves[:, 0].min() > 0
    assert (np.diff(curves, axis=1) <= 0).all()


def test_curve_is_the_product_of_what_is_left_and_the_weibull_one_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    outputs, _ = drawn(HAZARD, 5)
    expected = np.cumprod(1 - 1 / (1 + np.exp(-outputs.numpy())), 1)
    assert meaning(HAZARD).predictions(outputs.numpy()) == pytest.approx(expected)
    outputs, _ = drawn(WEIBULL, 5)
    scale, shape = np.exp(outputs.numpy()).T
    expected = stats.weibull_min.sf(np.array(EDGES) / 40.0, shape[:, None], scale=scale[:, None])
    assert meaning(WEIBULL).predictions(outputs.numpy()) == pytest.approx(expected)


def test_time_without_event_is_the_area_under_the_curve() -> None:
    assert time_without_event(np.array(EDGES), np.array([[1.0, 1.0, 1.0], [0.5, 0.5, 0.0]])) == pytest.approx(
        [40.0, 7.5 + 5.0 + 5.0]
    )


# -------------------------------------------------------------------------------------------------------------- metrics


def cohort(size: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Times with many ties, events, risks with ties."""
    draw = np.random.default_rng(seed)
    risks = draw.integers(0, 6, size) / 5
    return draw.integers(0, 25, size) - (2 * risks).astype(np.int64) + 2, draw.integers(0, 2, size), risks


def test_concordance_equals_lifelines_ties_included() -> None:
    utils = pytest.importorskip("lifelines.utils")
    for seed in range(30):
        times, events, risks = cohort(40, seed)
        expected = utils.concordance_index(times, -risks, events)
        assert concordance(times, events, risks) == pytest.approx(expected, abs=1e-12)


def test_concordance_of_perfect_reversed_equal_and_no_pairs() -> None:
    times, events = np.array([1, 2, 3]), np.array([1, 1, 0])
    assert concordance(times, events, np.array([3.0, 2.0, 1.0])) == 1.0
    assert concordance(times, events, np.array([1.0, 2.0, 3.0])) == 0.0
    assert concordance(times, events, np.zeros(3)) == 0.5
    assert concordance(times, np.zeros(3, np.int64), np.zeros(3)) is None
    assert concordance(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)) is None


def test_censoring_curve_equals_lifelines_without_ties_of_both_kinds() -> None:
    lifelines = pytest.importorskip("lifelines")
    draw = np.random.default_rng(5)
    times = draw.permutation(200)[:60] + 1
    events = draw.integers(0, 2, 60)
    fitted = lifelines.KaplanMeierFitter().fit(times, 1 - events)
    distinct, chances = censoring_curve(times, events)
    assert chances == pytest.approx(fitted.predict(distinct).to_numpy())


def test_brier_scores_without_censoring_are_mean_squares() -> None:
    times, events = np.array([5, 15, 30, 50]), np.ones(4, np.int64)
    curves = np.array([[0.9, 0.5, 0.1], [0.8, 0.4, 0.2], [0.7, 0.7, 0.7], [1.0, 1.0, 0.5]])
    alive = times[:, None] > np.array(EDGES)
    scores = brier_scores(np.array(EDGES), curves, times, events)
    assert scores == pytest.approx(((curves - alive) ** 2).mean(0))
    values = np.concatenate([[0.0], scores])
    expected = np.trapezoid(values, [0.0, *EDGES]) / 40.0
    assert integrated_brier(np.array(EDGES), curves, times, events) == pytest.approx(expected)


def test_brier_scores_weigh_by_the_chance_to_be_not_yet_censored() -> None:
    """By hand (Graf et al. 1999): one of four is censored at 7, so each of the two that stay counts 3 / 2."""
    times, events = np.array([5, 7, 15, 50]), np.array([1, 0, 1, 1])
    curves = np.full((4, 1), 0.25)
    # after 7 the chance to be not censored is 1 - 1/3; the event at 5 came before anybody was
    expected = (0.25**2 / 1.0 + (0.75**2 + 0.75**2) / (2 / 3)) / 4
    assert brier_scores(np.array([10.0]), curves, times, events) == pytest.approx([expected])


def test_brier_score_beyond_the_last_time_is_not_known() -> None:
    times, events = np.array([5, 8]), np.array([1, 0])
    assert np.isnan(brier_scores(np.array([10.0]), np.zeros((2, 1)), times, events)).all()
    assert integrated_brier(np.array([10.0]), np.zeros((2, 1)), times, events) is None


def test_metrics_prefer_a_model_that_knows_the_times() -> None:
    times, events, _ = cohort(80, 2)
    times = times + 1
    labels = np.stack([times, events], 1)
    knows = np.log((times + 0.5 * (events == 0)) / 40.0)[:, None]  # who is censored then, had the event later
    found = meaning(SHAPED).metrics(meaning(SHAPED).predictions(knows), labels)
    guess = meaning(SHAPED).metrics(meaning(SHAPED).predictions(np.zeros((80, 1))), labels)
    assert found["c_index"] == 1.0 and guess["c_index"] == 0.5
    assert found["integrated_brier"] < guess["integrated_brier"]  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------- labels and schema


def test_labels_are_times_in_whole_units_and_events(make_study: MakeStudy) -> None:
    data = make_study().data
    columns = {"days": ["12.0", "0", " 8"], "died": ["1", "0.0", "1"]}
    found = meaning(HAZARD).labels(data, columns, [2, 3, 4])
    assert found.tolist() == [[12, 1], [0, 0], [8, 1]]
    assert meaning(HAZARD).strata(found).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("days", "died", "line"),
    [
        ("-1", "1", "row 7, column days: value is not a time of 0 or more"),
        ("", "1", "column days"),
        ("1.4", "1", "row 7, column days: value is no whole number"),
        ("nan", "1", "column days"),
        ("1e300", "1", "column days"),
        ("3", "2", "row 7, column died: value is neither 0 nor 1"),
        ("3", "", "column died"),
    ],
)
def test_label_that_is_none_is_refused_by_row_and_column(
    make_study: MakeStudy, days: str, died: str, line: str
) -> None:
    data: DataContract = make_study().data
    with pytest.raises(DataError, match=rf"MF-301 .*{line}") as caught:
        meaning(HAZARD).labels(data, {"days": [days], "died": [died]}, [7])
    assert "1e300" not in str(caught.value)


def test_made_up_labels_are_possible_ones(make_study: MakeStudy) -> None:
    for task in (HAZARD, WEIBULL):
        found = meaning(task).made_up_labels(make_study().data, torch.Generator().manual_seed(1), 500)
        assert set(found[:, 1].tolist()) == {0, 1}
        assert int(found[:, 0].min()) >= 0 and int(found[:, 0].max()) > EDGES[-1]


def test_survival_task_that_makes_no_sense_is_refused() -> None:
    for changes in ({"edges": [2.0, 1.0]}, {"head": "hazard", "shape": 1.0}, {"event": "days"}, {"edges": []}):
        with pytest.raises(ValidationError):
            Survival.model_validate({**KEYS, "head": "weibull", **changes})


@pytest.mark.parametrize("change", ['head = "cox"', 'loss = "cox"', 'kind = "cox"'])
def test_batch_cox_is_refused_by_name_with_the_way_out(tmp_path, change: str) -> None:
    """It compares each patient with all others of the batch: with privacy or without, there is no such study."""
    key, lines = change.split(" = ")[0], template_text(system_seams().files, "brca-survival").splitlines()
    kept = [line for line in lines if key == "loss" or not line.startswith(f"{key} = ") or "category" in line]
    kept.insert(kept.index("[task]") + 1, change)
    path = tmp_path / "cox.toml"
    path.write_text("\n".join(kept) + "\n")
    with pytest.raises(PrivacyError, match=r"MF-160 cox\.toml: task\..*compares each patient.*head = \"hazard\""):
        load_task(system_seams().files, str(path))
