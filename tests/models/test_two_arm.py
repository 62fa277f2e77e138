"""Effects of a treatment: only the arm that a record was in is trained on, and figures against the truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from medfed.errors import DataError
from medfed.models.tasks import losses, meaning
from medfed.models.tasks.effect import MILLION, effects_of, rank_correlation, unadjusted_difference
from medfed.models.two_arm import TwoArm
from medfed.study import Study
from medfed.task_choice import Effect, cautions

MakeStudy = Callable[..., Study]
KEYS = {"kind": "effect", "outcome": "ill", "treatment": "treated", "assumptions": "Nothing else mattered."}
TASK = Effect.model_validate(KEYS)
KNOWN = Effect.model_validate({**KEYS, "truth": ["chance_0", "chance_1"]})


def drawn(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(size, 2, dtype=torch.float64, generator=generator)
    return logits, torch.randint(2, (size, 2), generator=generator)


def gradients(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(losses(TASK)(leaf, labels).sum(), leaf)[0]


def test_gradient_by_a_records_outputs_is_a_function_of_that_record_alone_to_the_last_bit() -> None:
    logits, labels = drawn(203)
    for kind in (torch.float64, torch.float32):
        whole = gradients(logits.to(kind), labels)
        order = torch.from_numpy(np.random.default_rng(3).permutation(203))
        assert torch.equal(gradients(logits.to(kind)[order], labels[order]), whole[order])
        for size in (1, 5, 64):
            parts = [(start, start + size) for start in range(0, 203, size)]
            found = [gradients(logits.to(kind)[low:high], labels[low:high]) for low, high in parts]
            assert torch.equal(torch.cat(found), whole)


def test_only_the_factual_arm_has_a_loss() -> None:
    logits, labels = drawn(50)
    own = logits[torch.arange(50), labels[:, 1]]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(own, labels[:, 0].double(), reduction="none")
    assert torch.allclose(losses(TASK)(logits, labels), expected)
    assert torch.allclose(meaning(TASK).plain_losses()(logits, labels), expected)
    found = gradients(logits, labels)
    assert not found[torch.arange(50), 1 - labels[:, 1]].any()
    assert torch.allclose(found[torch.arange(50), labels[:, 1]], torch.sigmoid(own) - labels[:, 0])


def test_truth_is_never_trained_on() -> None:
    logits, labels = drawn(20)
    known = torch.cat([labels, torch.randint(MILLION, (20, 2))], 1)
    assert torch.equal(losses(KNOWN)(logits, known), losses(TASK)(logits, labels))
    assert torch.equal(gradients(logits, known), gradients(logits, labels))


def test_arms_share_a_trunk_and_begin_alike() -> None:
    torch.manual_seed(1)
    model, inputs = TwoArm(3, [4], [2]), torch.randn(5, 3)
    assert model(inputs).shape == (5, 2) and not model(inputs).any()
    for weight in model.parameters():
        weight.data += 0.5
    used = torch.autograd.grad(model(inputs)[:, 0].sum(), list(model.parameters()))
    untouched = {name for (name, _), found in zip(model.named_parameters(), used, strict=True) if not found.any()}
    assert untouched == {name for name, _ in model.named_parameters() if name.startswith("treated")}


def test_predictions_are_both_chances_and_their_difference() -> None:
    found = meaning(TASK).predictions(np.array([[0.0, np.log(3.0)]]))
    assert found == pytest.approx(np.array([[0.5, 0.75, 0.25]]))
    assert effects_of(found) == pytest.approx([0.25])


def test_rank_correlation_equals_scipy_ties_included() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(2)
    for _ in range(30):
        first, second = draw.integers(0, 9, (2, 40)) / 8
        expected = stats.spearmanr(first, second).statistic
        assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(np.ones(4), np.arange(4.0)) == 0.0
    assert rank_correlation(np.arange(4.0), np.ones(4)) is None


def truth(size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Predictions that are the truth, and labels drawn from it, with the sicker treated more often."""
    draw = np.random.default_rng(6)
    sick = draw.random(size)
    chances = np.stack([0.2 + 0.6 * sick, 0.1 + 0.7 * sick], 1)
    treated = (draw.random(size) < 0.05 + 0.9 * sick).astype(np.int64)
    outcome = (draw.random(size) < chances[np.arange(size), treated]).astype(np.int64)
    labels = np.column_stack([outcome, treated, np.rint(chances * MILLION).astype(np.int64)])
    return np.column_stack([chances, chances[:, 1] - chances[:, 0]]), labels


def test_metrics_of_the_truth_are_perfect_and_of_the_unadjusted_difference_nothing() -> None:
    predictions, labels = truth()
    found = meaning(KNOWN).metrics(predictions, labels)
    assert found["rank_of_effect"] == pytest.approx(1.0, abs=1e-3)
    assert found["effect_gain"] == pytest.approx(1.0) and found["effect_error"] == pytest.approx(0.0, abs=1e-6)
    plain = unadjusted_difference(labels)
    assert plain is not None and plain > 0 > predictions[:, 2].mean(), "confounding turns the sign round"
    constant = np.full_like(predictions, plain)
    trivial = meaning(KNOWN).metrics(constant, labels)
    assert trivial["effect_gain"] == pytest.approx(0.0) and trivial["rank_of_effect"] == 0.0
    assert trivial["average_effect_error"] == pytest.approx(trivial["unadjusted_error"])
    assert found["unadjusted_error"] == pytest.approx(plain - predictions[:, 2].mean(), abs=1e-6)


def test_task_without_truth_is_measured_by_what_happened() -> None:
    predictions, labels = truth()
    assert (meaning(TASK).primary, meaning(TASK).chance) == ("auc", 0.5)
    assert (meaning(KNOWN).primary, meaning(KNOWN).chance) == ("rank_of_effect", 0.0)
    found = meaning(TASK).metrics(predictions, labels[:, :2])
    assert set(found) == {"auc", "average_effect"} and found["auc"] > 0.6  # type: ignore[operator]


def test_metrics_of_nobody_are_unknown() -> None:
    assert set(meaning(KNOWN).metrics(np.zeros((0, 3)), np.zeros((0, 4), np.int64)).values()) == {None}
    one_arm = np.array([[1, 1, 500_000, 600_000], [0, 1, 500_000, 700_000]])
    assert meaning(KNOWN).metrics(np.zeros((2, 3)), one_arm)["effect_gain"] is None


def test_labels_are_outcome_treatment_and_truth_in_millionths(make_study: MakeStudy) -> None:
    columns = {"ill": ["1", "0"], "treated": ["0", "1"], "chance_0": ["0.25", "0"], "chance_1": ["0.5", "1"]}
    found = meaning(KNOWN).labels(make_study().data, columns, [1, 2])
    assert found.tolist() == [[1, 0, 250_000, 500_000], [0, 1, 0, MILLION]]
    assert meaning(KNOWN).strata(found).tolist() == [2, 1]
    with pytest.raises(DataError, match="MF-301 row 1, column chance_1: value is not a chance from 0 to 1"):
        meaning(KNOWN).labels(make_study().data, {**columns, "chance_1": ["1.5", "1"]}, [1, 2])


def test_assumptions_are_said_with_every_prediction_and_cannot_be_left_out() -> None:
    assert cautions(TASK) == ["Assumptions: Nothing else mattered."]
    for changes in ({"assumptions": ""}, {"treatment": "ill"}, {"truth": ["ill", "chance_1"]}):
        with pytest.raises(ValidationError):
            Effect.model_validate({**KEYS, **changes})
