"""Several findings of one record: what is not known takes no part, and no record sees another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics

from medfed.data_contract import DataContract
from medfed.errors import DataError
from medfed.models.tasks import losses, meaning
from medfed.task_choice import MultiLabel

TASK = MultiLabel(kind="multilabel", labels=["toxic", "approved", "stable"])
WEIGHTED = MultiLabel(kind="multilabel", labels=["toxic", "approved", "stable"], positive_weights=[2.0, 1.0, 0.5])
DATA = DataContract.model_construct()


def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    labels = torch.empty(count, 3, dtype=torch.int64).random_(-1, 2, generator=generator)
    return torch.randn(count, 3, generator=generator), labels


def test_labels_are_read_and_empty_cells_are_unknown() -> None:
    columns = {"toxic": ["0", "1.0", ""], "approved": ["1", "NA", "0"], "stable": ["", "?", "01"]}
    found = meaning(TASK).labels(DATA, columns, [2, 3, 4])
    assert found.tolist() == [[0, 1, -1], [1, -1, -1], [-1, 0, 1]]
    assert meaning(TASK).strata(found).tolist() == [0 if (row != 1).all() else 1 for row in found]


@pytest.mark.parametrize("cell", ["2", "yes", "-1", "0.5", "inf"])
def test_label_that_is_no_finding_is_refused_by_row_and_column(cell: str) -> None:
    columns = {"toxic": ["0", cell], "approved": ["1", "0"], "stable": ["1", "0"]}
    with pytest.raises(DataError, match=r"MF-301 .*row 7, column toxic") as caught:
        meaning(TASK).labels(DATA, columns, [6, 7])
    assert cell not in str(caught.value).replace("MF-301", "").replace("neither 0 nor 1", "")


def test_loss_is_the_mean_over_known_findings() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, 1.0, 1.0]])
    labels = torch.tensor([[1, -1, 0], [-1, -1, -1]])
    chance = 1 / (1 + np.exp(1.0))
    expected = (-np.log(0.5) - np.log(1 - chance)) / 2
    assert losses(TASK)(logits, labels).tolist() == pytest.approx([expected, 0.0], rel=1e-6)
    weighted = (-2.0 * np.log(0.5) - np.log(1 - chance)) / 2
    assert losses(WEIGHTED)(logits, labels).tolist() == pytest.approx([weighted, 0.0], rel=1e-6)


@pytest.mark.parametrize("task", [TASK, WEIGHTED], ids=["plain", "weighted"])
def test_gradient_is_torchs_and_each_records_own_to_the_last_bit(task: MultiLabel) -> None:
    logits, labels = drawn(9)
    logits.requires_grad_()
    (found,) = torch.autograd.grad(losses(task)(logits, labels).sum(), logits)
    (plain,) = torch.autograd.grad(meaning(task).plain_losses()(logits, labels).sum(), logits)
    torch.testing.assert_close(found, plain)
    assert not found[labels == -1].any()
    for record in range(9):
        alone = logits[record : record + 1].detach().requires_grad_()
        (own,) = torch.autograd.grad(losses(task)(alone, labels[record : record + 1]).sum(), alone)
        assert torch.equal(own[0], found[record])


def test_metrics_are_means_over_findings_of_known_records() -> None:
    logits, labels = drawn(60)
    predictions = meaning(TASK).predictions(logits.double().numpy())
    scores = meaning(TASK).metrics(predictions, labels.numpy())
    expected = {"auc": [], "auprc": [], "f1": []}
    for place in range(3):
        known = labels[:, place].numpy() >= 0
        truth, said = labels[:, place].numpy()[known], predictions[known, place]
        expected["auc"].append(metrics.roc_auc_score(truth, said))
        expected["auprc"].append(metrics.average_precision_score(truth, said))
        expected["f1"].append(metrics.f1_score(truth, said > 0.5))
    for name, values in expected.items():
        assert scores[name] == pytest.approx(np.mean(values), abs=1e-9)


def test_metrics_of_unknown_findings_are_undefined() -> None:
    scores = meaning(TASK).metrics(np.full((4, 3), 0.5), np.full((4, 3), -1))
    assert set(scores.values()) == {None}
