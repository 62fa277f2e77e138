"""Reasons for the kinds of record beside tables, series, images and texts: events, molecules, views, volumes, mixed ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from medfed.data_contract import DataContract
from medfed.errors import LocalProtocolError
from medfed.models.attribution import (
    Asked,
    asked_of,
    blurred,
    from_embedded,
    grad_cam,
    integrated_gradients,
    of_features,
    usual,
)
from medfed.models.event_records import shown_gap
from medfed.models.loading import TrainedModel
from medfed.models.reasons import Floats, ImageReasons, TableReasons
from medfed.models.records import Inputs
from medfed.models.view_reasons import grad_cam_of_views, view_weights
from medfed.record_parts import ATOM_VALUES

_SLICES = 3  # of a volume, side by side


def of_events(trained: TrainedModel, record: Inputs, text: str) -> TableReasons:
    """An event's code and time together, by their embeddings. ``text``: the codes in the order of the record, a line each."""
    asked, contract = asked_of(trained, record), trained.study.data.events
    if contract is None:
        raise _wrong("events")
    found = from_embedded(asked).reshape(len(record), -1).sum(1)
    count = int(np.count_nonzero(record[:, 0]))
    codes = text.split("\n")[:count] if text else [f"event {place + 1}" for place in range(count)]
    when = [shown_gap(int(gap) - 1 - contract.buckets) for gap in record[:count, 1]]
    return TableReasons(asked.output, tuple(codes), tuple(when), found[:count])


def of_molecule(trained: TrainedModel, record: Inputs, text: str) -> TableReasons:
    """What is said of each atom; that it is there, and its bonds, stay. ``text``: the SMILES."""
    asked = asked_of(trained, record)
    baseline = np.array(record)
    baseline[:, 1:ATOM_VALUES] = 0.0
    found = integrated_gradients(asked, asked.inputs, torch.from_numpy(baseline)[None]).sum(1)
    count = int((np.asarray(record, np.float64)[:, 0] > 0).sum())
    names = [f"atom {place + 1}" for place in range(count)]
    return TableReasons(asked.output, tuple(names), tuple(_symbols(text, count)), found[:count])


def _symbols(smiles: str, count: int) -> list[str]:
    from medfed.models.molecule_records import parsed

    molecule = parsed(smiles) if smiles else None
    if molecule is None or molecule.GetNumAtoms() < count:
        return [""] * count
    return [str(molecule.GetAtomWithIdx(place).GetSymbol()) for place in range(count)]


def of_fingerprint(trained: TrainedModel, record: Inputs, text: str) -> TableReasons:
    """From a molecule that has none of the neighborhoods."""
    asked, contract = asked_of(trained, record), trained.study.data.fingerprint
    if contract is None:
        raise _wrong("fingerprint")
    none = torch.full_like(asked.inputs, -contract.center / contract.scale)
    found = integrated_gradients(asked, asked.inputs, none)
    there = np.asarray(record, np.float64) * contract.scale + contract.center > 0.5
    names = tuple(f"neighborhood {bit}" for bit in np.flatnonzero(there))
    return TableReasons(asked.output, names, ("there",) * len(names), found[there])


def of_views(trained: TrainedModel, record: Inputs, text: str) -> ImageReasons:
    """All views that are there side by side, each from itself blurred."""
    asked, contract = asked_of(trained, record), trained.study.data.image
    if contract is None:
        raise _wrong("views")
    baseline = torch.cat([blurred(asked.inputs[:, :-1]), asked.inputs[:, -1:]], 1)
    found = integrated_gradients(asked, asked.inputs, baseline)[:-1]
    there = np.flatnonzero(np.asarray(record, np.float64)[-1].ravel()[: len(found)] > 0.5).tolist() or [0]
    pictures = np.clip(np.asarray(record, np.float64) * contract.scale + contract.center, 0.0, 1.0)
    attention, weights = grad_cam_of_views(asked), view_weights(asked)
    return ImageReasons(
        asked.output,
        _beside([pictures[view] for view in there]),
        _beside([found[view] for view in there]),
        None if attention is None else _beside([attention[view] for view in there]),
        () if weights is None else tuple((view + 1, float(weights[view])) for view in there),
    )


def of_volume(trained: TrainedModel, record: Inputs, text: str) -> ImageReasons:
    """The slices across the body in which most happened, from feet to head side by side."""
    asked, contract = asked_of(trained, record), trained.study.data.volume
    if contract is None:
        raise _wrong("volume")
    coarse = functional.adaptive_avg_pool3d(asked.inputs, 2)
    size = [int(side) for side in asked.inputs.shape[2:]]
    baseline = functional.interpolate(coarse, size=size, mode="trilinear", align_corners=False)
    found = integrated_gradients(asked, asked.inputs, baseline).sum(0)
    weight = np.abs(found).sum((1, 2))
    chosen = sorted(np.argsort(-weight, kind="stable")[:_SLICES].tolist())
    picture = np.clip(np.asarray(record, np.float64)[0] * contract.scale + contract.center, 0.0, 1.0)
    attention = grad_cam(asked)
    return ImageReasons(
        asked.output,
        _beside([picture[at] for at in chosen]),
        _beside([found[at] for at in chosen]),
        None if attention is None else _beside([attention[at] for at in chosen]),
    )


def of_mixed(trained: TrainedModel, record: Inputs, text: str) -> TableReasons:
    """Features, and each of the other parts as a whole; of a series its variables, of a block its numbers, one by one. A text's
    tokens have nothing between them: its part stays as it is."""
    asked, data = asked_of(trained, record), trained.study.data
    flat = np.asarray(record, np.float32)
    baseline, at = flat.copy(), len(data.mixed_parts) + data.inputs
    first = len(data.mixed_parts)
    baseline[first:at] = usual(data.features)
    names: list[str] = []
    places: list[NDArray[np.int64]] = []
    for part, shape in data.mixed_parts.items():
        size = math.prod(shape)
        own = flat[at : at + size].reshape(shape)
        baseline[at : at + size] = _without(data, part, own).ravel()
        for name, inside in _named_places(data, part, shape):
            names.append(name)
            places.append(at + inside)
        at += size
    found = integrated_gradients(asked, asked.inputs, torch.from_numpy(baseline)[None])
    features = of_features(
        asked.output, data.features, np.asarray(record, np.float64)[first:], found[first : first + data.inputs]
    )
    sums = np.array([float(found[place].sum()) for place in places])
    return TableReasons(
        asked.output,
        (*features.names, *names),
        (*features.values, *[""] * len(names)),
        np.concatenate([features.contributions, sums]),
        tuple(_left_out(asked, data)),
    )


def _left_out(asked: Asked, data: DataContract) -> Iterator[tuple[str, float]]:
    """Each part that is there, a text's too, and by how much the output is lower without it."""
    at = len(data.mixed_parts) + data.inputs
    with torch.no_grad():
        whole = float(asked(asked.inputs)[0])
        for place, (part, shape) in enumerate(data.mixed_parts.items()):
            size = math.prod(shape)
            if asked.inputs[0, place] > 0:
                without = asked.inputs.clone()
                without[:, place], without[:, at : at + size] = 0.0, 0.0
                yield part, whole - float(asked(without)[0])
            at += size


def _without(data: DataContract, part: str, own: NDArray[np.float32]) -> NDArray[np.float32]:
    """The baseline of one part of a mixed record."""
    if part == "image":
        return np.asarray(blurred(torch.from_numpy(own)[None])[0].numpy(), np.float32)
    if part == "text":
        return own
    nothing = np.zeros_like(own)
    if part == "series" and data.series is not None:
        inside = 2 * len(data.series.variables)
        nothing[:, inside] = own[:, inside]
    return nothing


def _named_places(data: DataContract, part: str, shape: tuple[int, ...]) -> list[tuple[str, NDArray[np.int64]]]:
    """(name, int64[k] within the part's values in a row) of what is shown of it."""
    every = np.arange(math.prod(shape)).reshape(shape)
    if part == "series" and data.series is not None:
        count = len(data.series.variables)
        return [
            (variable.name, every[:, [place, count + place]].ravel())
            for place, variable in enumerate(data.series.variables)
        ]
    if part == "block" and data.block is not None:
        return [(column, every[place : place + 1]) for place, column in enumerate(data.block.columns)]
    return [] if part == "text" else [(part, every.ravel())]


def _beside(pictures: list[Floats]) -> Floats:
    return np.concatenate(pictures, axis=1)


def _wrong(part: str) -> LocalProtocolError:
    return LocalProtocolError(900, f"a record without {part}", "please report this")
