"""Made-up records of a study's form, without any meaning: to try a computation out before patients are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medfed.data_contract import DataContract
from medfed.models.tasks import meaning
from medfed.record_parts import ATOM_VALUES, BOND_KINDS
from medfed.study import Study


def made_up_records(study: Study, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Inputs [count, *shape] and labels; of series, texts, molecules and events the last places are padding, as many as chance
    has it."""
    return made_up_inputs(study.data, generator, count), meaning(study.task).made_up_labels(
        study.data, generator, count
    )


def made_up_inputs(data: DataContract, generator: torch.Generator, count: int) -> Tensor:
    shape = (count, *data.shape)
    if data.mixed is not None:
        return _mixed(data, generator, count)
    if data.text is not None:
        inputs = torch.empty(shape, dtype=torch.int64).random_(1, data.text.buckets + 1, generator=generator)
    elif data.events is not None:
        inputs = torch.empty(shape, dtype=torch.int64).random_(1, data.events.tokens, generator=generator)
    else:
        inputs = torch.empty(shape).normal_(generator=generator)
    if data.image is not None and data.image.views is not None:
        inputs[:, -1] = (inputs[:, -1] > 0.0).float()  # some views are there, some absent
    if data.molecule is not None:
        _bind(inputs, generator)
    if data.kind in ("series", "text", "molecule", "events"):
        ends = torch.empty(count, 1, dtype=torch.int64).random_(1, shape[1] + 1, generator=generator)
        inputs[torch.arange(shape[1]) >= ends] = 0
    return inputs


def _bind(molecules: Tensor, generator: torch.Generator) -> None:
    """Writes atoms that are there, each bound to the next, in place of numbers of any size."""
    count, atoms, _ = molecules.shape
    molecules[:, :, 0] = 1.0
    molecules[:, :, ATOM_VALUES:] = 0.0
    kinds = torch.empty(count, atoms - 1).random_(1, BOND_KINDS + 1, generator=generator)
    first = torch.arange(atoms - 1)
    molecules[:, first, ATOM_VALUES + first + 1] = kinds
    molecules[:, first + 1, ATOM_VALUES + first] = kinds


def _mixed(data: DataContract, generator: torch.Generator, count: int) -> Tensor:
    """Any of the parts may be there or not."""
    parts = data.mixed_parts
    flags = torch.empty(count, len(parts)).random_(2, generator=generator)
    made = [flags, torch.empty(count, data.inputs).normal_(generator=generator)]
    for place, (part, shape) in enumerate(parts.items()):
        size = (count, math.prod(shape))
        if part == "text" and data.text is not None:
            values = torch.empty(size).random_(data.text.buckets + 1, generator=generator)
        else:
            values = torch.empty(size).normal_(generator=generator)
        made.append(torch.where(flags[:, place : place + 1] > 0, values, 0.0))
    return torch.cat(made, dim=1)
