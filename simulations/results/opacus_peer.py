"""Plain Opacus on everybody's data in one place: the strongest position it can have, to compare the federation with.

Its own engine, accountant, Poisson sampling, flat clipping and optimisers, on the same model of the catalogue from the same
first weights; on one record of each patient, so that its record is our patient. Its noise is ``torch.normal`` of
one trusted place that sees every patient: no hospital, mask or integer is in the way. The setting is one of a small stated
set, chosen once a cohort on a held-out fifth of the training patients of the first split; that choice costs it nothing here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from medfed.models import catalogue, parameters, tasks
from medfed.models.records import Records
from medfed.models.rowwise import RowLinear
from medfed.simulations.threads import one_torch_thread
from medfed.study import Study

CLIPPING_NORM = 1.0
PASSES, DEEP_PASSES = 20, 10  # of a deep model fewer, as a pass is long
BATCHES = 8  # expected batches in a pass
LEAST_BATCH, MOST_BATCH = 64, 512
HELD = 5
LEAST_ALONE = 0.95  # least share of records that are their patient's first: the others are left out


_CANNOT = (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError, KeyError, IndexError)


class Refused(Exception):
    """Why there is no figure of Opacus: written down in its place."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An optimiser of Opacus's users, and its rate."""

    optimizer: Literal["adam", "sgd"]
    rate: float

    @property
    def name(self) -> str:
        return f"{'Adam' if self.optimizer == 'adam' else 'SGD with momentum 0.9'}, rate {self.rate:g}"


SETTINGS = (Setting("adam", 0.003), Setting("adam", 0.02), Setting("sgd", 0.03), Setting("sgd", 0.2))


def setting_named(name: str) -> Setting:
    return next(setting for setting in SETTINGS if setting.name == name)


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """``weights``: float32[d]; ``epsilon``: what Opacus's accountant says was spent."""

    weights: NDArray[np.float32]
    epsilon: float


def train_by_opacus(
    study: Study,
    first: NDArray[np.float32],
    records: Records,
    epsilon: float,
    delta: float,
    setting: Setting,
    seed: int,
) -> Trained:
    """Train from first weights float32[d] on each patient's first record, until Opacus has spent ``epsilon`` at ``delta``.

    Raises ``Refused`` if that leaves out many records, or Opacus cannot take the model.
    """
    is_first = np.zeros(len(records.patients), np.bool_)
    is_first[np.unique(np.array(records.patients, np.str_), return_index=True)[1]] = True
    if is_first.mean() < LEAST_ALONE:
        raise Refused("it protects records, and here patients have several")
    records = records.subset(is_first)
    try:
        return _train(study, first, records, epsilon, delta, setting, seed)
    except _CANNOT as error:
        raise Refused(f"it cannot take this model ({type(error).__name__})") from error


def _train(
    study: Study,
    first: NDArray[np.float32],
    records: Records,
    epsilon: float,
    delta: float,
    setting: Setting,
    seed: int,
) -> Trained:
    from opacus import PrivacyEngine

    with one_torch_thread(), _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _plain(catalogue.build(study)).train()
        parameters.assign(model, first)
        engine, passes = PrivacyEngine(), PASSES if catalogue.is_rowwise(study) else DEEP_PASSES
        private, optimizer, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=_optimizer(model, setting),
            data_loader=_loader(records),
            target_epsilon=epsilon,
            target_delta=delta,
            epochs=passes,
            max_grad_norm=CLIPPING_NORM,
        )
        losses = tasks.losses(study.task)
        for _ in range(passes):
            for inputs, labels in loader:
                optimizer.zero_grad()
                torch.autograd.backward(losses(private(inputs), labels).mean())
                optimizer.step()
        return Trained(parameters.flatten(model), float(engine.get_epsilon(delta)))


def held_out(records: Records) -> NDArray[np.bool_]:
    """bool[n]: a fifth of the patients, by the hash of their ids."""
    return np.array(
        [hashlib.sha256(patient.encode()).digest()[0] % HELD == 0 for patient in records.patients], np.bool_
    )


def _loader(records: Records) -> DataLoader[tuple[torch.Tensor, ...]]:
    batch = min(MOST_BATCH, max(LEAST_BATCH, len(records.labels) // BATCHES))
    data = TensorDataset(torch.from_numpy(records.inputs), torch.from_numpy(records.labels))
    return DataLoader(data, batch_size=min(batch, len(records.labels)))


def _optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    weights = [weight for _, weight in parameters.trainable(model)]
    if setting.optimizer == "adam":
        return torch.optim.Adam(weights, lr=setting.rate)
    return torch.optim.SGD(weights, lr=setting.rate, momentum=0.9)


def _plain(model: nn.Module) -> nn.Module:
    """The model with torch's own linear layers, which Opacus knows, in the place of those that add up in one order."""
    if isinstance(model, RowLinear):
        linear = nn.Linear(model.in_features, model.out_features, bias=model.bias is not None)
        linear.load_state_dict(model.state_dict())
        return linear
    for name, child in model.named_children():
        setattr(model, name, _plain(child))
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch and Opacus say of every such training."""
    log = logging.getLogger("opacus")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
