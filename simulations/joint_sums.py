"""Clipped sums of all hospitals of one process at the same weights: one call of the engine over many hospitals' patients.

Of a study that sums gradients all hospitals stand at the same weights, and what each of them adds to production's code is a
sum over a few patients. So a rehearsal lets each hospital's own code come to that point, its attempt debited and its
patients sampled with its own secret key, works the sums of many out together, each hospital's apart from the others', and
lets each go on with its own: saturated, rounded, noised and masked as ever.

What differs from hospital by hospital is in which batch a record stands and the order in which a hospital's patients are
added up in float64: sums equal to within one step of the grid that they are rounded to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.client import trainer
from medfed.client.approved import Approved
from medfed.client.local_steps import expected_patients
from medfed.errors import LocalProtocolError
from medfed.simulations.gathering import Gathering

MEBIBYTE = 1 << 20
SUMS_BYTES = 512 * MEBIBYTE
"""Of the hospitals that are under way at a time: sums, and the noise that some draw meanwhile."""
RECORDS_BYTES = 256 * MEBIBYTE
"""Of the records in one call."""
MOST_HOSPITALS = 256
LEAST_RECORDS = 1024
"""A call of fewer is not split among the threads: the last of its batches is filled up with nobody."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A hospital's sum over rows ``chosen`` int64[k] of its records, or of ``copied`` ones, at ``weights`` float32[d]."""

    approved: Approved
    weights: NDArray[np.float32]
    chosen: NDArray[np.int64]
    copied: trainer.Patients | None = None

    @property
    def patients(self) -> trainer.Patients:
        return self.approved.patients if self.copied is None else self.copied

    @property
    def records_bytes(self) -> int:
        inputs = self.patients.records.inputs
        return len(self.chosen) * inputs[:1].nbytes

    def is_like(self, other: Wanted) -> bool:
        """Whether it is of the same study at the same weights, bit for bit."""
        return self.approved.study == other.approved.study and (
            self.weights is other.weights or self.weights.tobytes() == other.weights.tobytes()
        )


class JointSums:
    """What hospitals of one process call in the place of ``local_steps.own_sum``, once their number is known (``meet``)."""

    def __init__(self, at_work: int) -> None:
        """``at_work``: threads that compute at a time."""
        self._at_work = at_work
        self._gathering: Gathering[Wanted, NDArray[np.float64]] | None = None

    def meet(self, words: int) -> Gathering[Wanted, NDArray[np.float64]]:
        """Where hospitals with sums of ``words`` values meet: for the grid that runs them."""
        most = min(MOST_HOSPITALS, SUMS_BYTES // (2 * 8 * words))
        self._gathering = Gathering(
            lambda wanted: portions(wanted, self._at_work), sums, at_work=self._at_work, most=max(self._at_work, most)
        )
        return self._gathering

    def __call__(self, approved: Approved, weights: NDArray[np.float32], sampling_key: bytes) -> NDArray[np.float64]:
        """``own_sum`` of this hospital, worked out when nobody else is on the way here: float64[d]."""
        if self._gathering is None:
            raise LocalProtocolError(900, "a joint sum before the hospitals met", "report this as a fault of medfed")
        chosen = trainer.chosen_rows(approved.study, approved.patients, sampling_key)
        if approved.study.training.augmentation is None:
            return self._gathering.ask(Wanted(approved, weights, chosen))
        patients, rows = trainer.with_copies(approved.study, (approved.patients, chosen), sampling_key)
        return self._gathering.ask(Wanted(approved, weights, rows, patients))


def portions(wanted: Sequence[Wanted], at_work: int) -> list[list[int]]:
    """What to work out in one call each: of the same weights, within ``RECORDS_BYTES`` and in ``at_work`` parts of about the
    same numbers of records if there are enough. Who came first plays no part: sums repeat bit for bit."""
    alike: list[list[int]] = []
    for number in sorted(range(len(wanted)), key=lambda number: wanted[number].approved.position):
        group = next((group for group in alike if wanted[number].is_like(wanted[group[0]])), None)
        if group is None:
            alike.append([number])
        else:
            group.append(number)
    return [portion for group in alike for portion in _parts(group, wanted, at_work)]


def _parts(group: list[int], wanted: Sequence[Wanted], at_work: int) -> list[list[int]]:
    records = [len(wanted[number].chosen) for number in group]
    size = sum(wanted[number].records_bytes for number in group)
    count = max(-(-size // RECORDS_BYTES), min(at_work, sum(records) // LEAST_RECORDS), 1)
    ends = np.cumsum(records)
    # a hospital goes where the middle of its records lies, one without any at the end into the last part
    place = np.minimum((ends - np.array(records) / 2) * count // max(1, ends[-1]), count - 1)
    parts = [[group[at] for at in np.flatnonzero(place == part)] for part in range(count)]
    return [part for part in parts if part]


def sums(portion: Sequence[Wanted]) -> list[NDArray[np.float64]]:
    """Each one's clipped sum, float64[d], in one call of the engine. All stand at the same weights."""
    first = portion[0].approved
    parts = [(wanted.patients, wanted.chosen) for wanted in portion]
    expected = sum(expected_patients(wanted.approved) for wanted in portion)
    return list(trainer.sums_of(first.study, first.model, portion[0].weights, parts, first.compute, expected))
