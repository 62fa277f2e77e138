"""The gradient oracle of own models: before a study with one is approved or started, the engine's sums are held against a loop.

That no record's outputs reach another's inputs is shown where the model is made (``models/own_proof``). Here, with the task's own
loss, that the gradient engine takes the gradients it should: each record's, all of them, and clips them.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfed.client.policy import Policy
from medfed.client.trainer import made_up_patients
from medfed.errors import ConfigError, MedfedError, UnsupportedModel
from medfed.model_choice import Own
from medfed.models import catalogue, tasks
from medfed.privacy.gradients.engine import CLIPPING_MARGIN, clipped_sum
from medfed.privacy.gradients.layers import without_rule
from medfed.privacy.gradients.recorder import Losses
from medfed.study import Study

AGREEMENT = 1e-5
_RECORDS_OF = (1, 2, 1, 3, 1, 1, 4, 1)  # records of each made-up patient


def allowed_model(study: Study, policy: Policy) -> nn.Module:
    """The study's model, made and, if it is an own one, held against the oracle; policy first, as making it runs its code.

    Raises MF-134 for a package that the policy does not name, and what ``catalogue.build`` and ``require_true_gradients`` raise.
    """
    policy.admit_code(study)
    model = catalogue.build(study)
    if isinstance(study.model, Own):
        require_true_gradients(study, model)
    return model


def require_true_gradients(study: Study, model: nn.Module) -> None:
    """Raise ``UnsupportedModel`` (MF-160) unless the engine's clipped sums are those of a float64 loop of one record at a time.

    On made-up records of patients with one to four each, at random weights, in float64, in batches of 1 and of 8: to within
    ``AGREEMENT``, relative. Whether float32 gives the same bits in each slot of a batch is tried at the start (``slot_test``).
    """
    lacking = without_rule(model)
    if lacking is not None:
        raise UnsupportedModel(160, f"{lacking} has no rule in the gradient engine", "use layers that have one")
    try:
        _compare(study, model)
    except MedfedError:
        raise
    except Exception as error:  # somebody else's code may raise anything; what it says is not passed on
        what = f"the study's own model failed on made-up records ({type(error).__name__})"
        raise ConfigError(162, what, "ask the authors of its package") from None


def _compare(study: Study, model: nn.Module) -> None:
    losses = tasks.losses(study.task)
    double = copy.deepcopy(model).double().train()
    _draw_weights(double, torch.Generator().manual_seed(2))
    records = made_up_patients(study, sum(_RECORDS_OF)).records
    inputs, labels = torch.from_numpy(records.inputs), torch.from_numpy(records.labels)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    owners = np.repeat(np.arange(len(_RECORDS_OF)), _RECORDS_OF).astype(np.int64)
    each = np.array([_gradient(double, losses, inputs[at : at + 1], labels[at : at + 1]) for at in range(len(inputs))])
    means = np.array([each[owners == patient].mean(0) for patient in range(len(_RECORDS_OF))])
    norms = np.linalg.norm(means, axis=1)
    if not np.isfinite(norms).all() or not norms.any():
        raise UnsupportedModel(160, "the model has no finite gradient at made-up records", "nothing could be shown")
    bound = float(np.median(norms)) * 1.01
    wanted = (means * np.minimum(1.0, bound / np.maximum(norms, 1e-300))[:, None]).sum(0)
    for batch in (1, 8):
        found = clipped_sum(
            double,
            losses,
            inputs,
            labels,
            owners,
            np.arange(len(owners)),
            bound * (1 + CLIPPING_MARGIN),
            batch=batch,
            device=torch.device("cpu"),
        ).total
        off = float(np.linalg.norm(found - wanted))
        if not off <= AGREEMENT * float(np.linalg.norm(wanted)):
            what = "the gradient engine's sums are not those of each record taken alone"
            raise UnsupportedModel(160, what, "use each layer by calling it, and no other way to its parameters")


def _gradient(model: nn.Module, losses: Losses, record: Tensor, label: Tensor) -> NDArray[np.float64]:
    """Of one record's loss by all trained parameters, by torch alone: float64[d]."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(losses(model(record), label)[0], weights, allow_unused=True)
    parts = [torch.zeros_like(weight) if one is None else one for one, weight in zip(found, weights, strict=True)]
    flat: NDArray[np.float64] = torch.cat([part.flatten() for part in parts]).detach().numpy()
    return flat


def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for weight in (each for each in model.parameters() if each.requires_grad):
            fan_in = weight[0].numel() if weight.dim() > 1 else 1
            weight.copy_(torch.empty(weight.shape).normal_(0.0, 1.0 / fan_in**0.5, generator=generator))
