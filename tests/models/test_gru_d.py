"""Values that are carried forward fade with the time since they were observed; a layer may go through the stay both ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from medfed.models.gru_d import InputDecay
from medfed.models.recurrent import Recurrent
from medfed.study import Study

MakeStudy = Callable[..., Study]
VARIABLE = {
    "unit": "",
    "minimum": -9.0,
    "maximum": 9.0,
    "center": 0.0,
    "scale": 1.0,
    "outside": "clip",
    "name": "pulse",
}


def test_observed_value_stays_and_a_carried_one_fades_by_its_own_rate() -> None:
    layer = InputDecay(2)
    layer.rates.weight.data[:] = torch.tensor([0.5, 0.0])[:, None, None]
    series = torch.tensor([[[2.0, 3.0, 1, 1, 1], [2.0, 3.0, 0, 0, 1], [2.0, 5.0, 0, 1, 1], [2.0, 5.0, 0, 0, 1]]])
    (found,) = layer(series).detach()
    ago = torch.tensor([0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(found[:, 0], 2.0 * torch.exp(-0.5 * ago))
    assert found[:, 1].tolist() == [3, 3, 5, 5]
    torch.testing.assert_close(found[:, 2:5], series[0, :, 2:])
    assert found[:, 5].tolist() == [0, 0.25, 0.5, 0.75]
    assert found[:, 6].tolist() == [0, 0.25, 0, 0.25]


def test_value_never_grows() -> None:
    layer = InputDecay(1)
    layer.rates.weight.data[:] = -3.0
    series = torch.tensor([[[2.0, 1.0, 1.0], [2.0, 0.0, 1.0]]])
    assert layer(series)[0, 1, 0] == 2.0


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_first_step_reaches_the_end_of_the_way_back(cell: str) -> None:
    """The backward layers' last state is that of the first step, whatever lies outside the stay."""
    torch.manual_seed(1)
    model = Recurrent(cell, 1, 0, 1, 4, 1, False, both_ways=True)
    model.head.weight.data[:, :4], model.head.weight.data[:, 4:] = 0.0, 1.0
    series = torch.randn(1, 6, 3)
    series[:, :, 2] = 1.0
    series[:, 4:] = 0.0
    shorter = series[:, :4]
    torch.testing.assert_close(model(series), model(shorter))
    changed = series.clone()
    changed[:, 3, 0] += 5.0
    assert (model(changed) - model(series)).abs().item() > 1e-4


def test_decay_without_values_carried_forward_is_refused(make_study: MakeStudy) -> None:
    series = {"steps": 4, "step_hours": 1.0, "variables": [VARIABLE], "fill": "center"}
    model = {
        "name": "gru",
        "hidden_size": 4,
        "layers": 1,
        "summaries": False,
        "decay": True,
        "first_model_sha256": "ab" * 32,
    }
    with pytest.raises(ValidationError, match="carried forward"):
        make_study({"data.series": series, "model": model})
    study = make_study({"data.series": {**series, "fill": "forward"}, "model": model})
    written = study.model_dump(mode="json")["model"]
    assert written["decay"] is True
    assert "bidirectional" not in written
