"""How good the released model is on patients who never trained: one noised sum of counts after the last round.

A held-out record falls into cells of a histogram: which class it is, and in which of ``bins`` equal parts of 0 .. 1 the model's
probability lies. A patient's records are averaged, so that a patient adds a vector of non-negative numbers that sum to 1 for a
binary task: an L2 norm of at most 1. Of k classes there is one such histogram for each class against the rest, and one of the
likeliest class (is it right, how sure): a norm of at most sqrt(k + 1). All figures are worked out of the released cells, so
that they cost nothing more, and each comes with the standard deviation that the noise and the number of patients leave in it.

*Source*: area under the ROC curve by ranks, ties count half; its sampling error by Hanley and McNeil 1982 (Radiology 143,
equation 2); the noise's share by the delta method: the gradient of a figure by the cells, times the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.errors import LocalProtocolError
from medfed.study import Study
from medfed.task_choice import Classification
from medfed.wording import counted

Floats = NDArray[np.float64]
ASSUMED_HOLDOUT = 0.2  # of hospitals that have not said how many of their patients they hold out


def words(study: Study) -> int:
    """Length of the sum: 2 bins of a binary task, 2 bins (classes + 1) of another; 0 without metrics."""
    return 0 if study.metrics is None else _histograms(study) * 2 * study.metrics.bins


def _histograms(study: Study) -> int:
    return 1 if study.task.kind == "binary" else _classes(study) + 1


def _classes(study: Study) -> int:
    if not isinstance(study.task, Classification):  # the study's own schema forbids it
        raise LocalProtocolError(900, f"metrics of a {study.task.kind} task", "please report this")
    return study.task.classes


def most_of_one_patient(study: Study) -> float:
    """L2 norm that no patient's share of the sum exceeds."""
    return math.sqrt(_histograms(study))


def shares(study: Study, chances: Floats, labels: NDArray[np.int64], unit: NDArray[np.int64], patients: int) -> Floats:
    """Each patient's share of the sum: float64[patients, words]. ``chances``: the model's probability of each class,
    float64[n, classes]; ``labels``: int64[n]; ``unit``: int64[n], whose each record is; every patient has a record.

    A probability that is no number (weights may be absurd) counts as 0.
    """
    bins = _bins(study)
    chances = np.where(np.isfinite(chances), chances, 0.0)
    cells = np.zeros((patients, _histograms(study), 2, bins))
    place = np.minimum((chances * bins).astype(np.int64), bins - 1)
    records = np.bincount(unit, minlength=patients)[unit]
    for number, (truth, at) in enumerate(_one_hot(study, chances, place, labels)):
        np.add.at(cells[:, number], (unit, truth.astype(np.int64), at), 1.0 / records)
    return np.minimum(cells, 1.0).reshape(patients, -1)


def _one_hot(
    study: Study, chances: Floats, place: NDArray[np.int64], labels: NDArray[np.int64]
) -> list[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """Of each histogram, for each record: whether it is of the class in question, and its bin."""
    if study.task.kind == "binary":
        return [(labels == 1, place[:, 1])]
    likeliest = chances.argmax(1)
    each = [(labels == index, place[:, index]) for index in range(_classes(study))]
    return [*each, (labels == likeliest, place[np.arange(len(labels)), likeliest])]


def _bins(study: Study) -> int:
    return 1 if study.metrics is None else study.metrics.bins


@dataclass(frozen=True, slots=True)
class Figure:
    """An estimate. ``noise_sd``: what the privacy noise makes of it; ``sampling_sd``: what the number of patients does (None
    where no formula for it is used). ``low`` and ``high``: 1.96 of both together, inside the figure's range."""

    value: float
    noise_sd: float
    sampling_sd: float | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """What the cells say. ``patients``: held-out ones, an estimate too. ``auc``: of several classes the mean over each against
    the rest. ``calibration_gap``: mean probability minus observed rate (of several classes: of the likeliest one).
    ``log_loss`` and ``brier`` take each probability as the middle of its bin. A figure is None where the noise drowns it."""

    patients: Figure
    auc: Figure | None
    accuracy: Figure | None
    calibration_gap: Figure | None
    brier: Figure | None
    log_loss: Figure | None
    bins: int
    noise_sd_of_cell: float
    cells: tuple[tuple[tuple[float, ...], ...], ...]

    def to_json(self) -> dict[str, object]:
        """As it is written into a run's folder; ``cells`` is [histogram][not of the class, of the class][bin]."""
        return asdict(self)


def from_cells(study: Study, cells: NDArray[np.floating], noise_sd: float) -> Metrics:
    """Figures from released cells float[words], whose noise has standard deviation ``noise_sd`` each."""
    bins = _bins(study)
    counts = np.asarray(cells, np.float64).reshape(-1, 2, bins)
    known = _Noised(noise_sd)
    binary = study.task.kind == "binary"
    each = counts if binary else counts[:-1]
    middle = (np.arange(bins) + 0.5) / bins
    top = counts[-1]  # of a binary task the only one
    total = np.ones((2, bins))
    truth = np.stack([np.zeros(bins), np.ones(bins)])
    right = np.stack([middle < 0.5, middle >= 0.5]) if binary else truth
    return Metrics(
        patients=known.figure(float(top.sum()), math.sqrt(2 * bins), None, (0.0, math.inf)),
        auc=_mean([known.auc(one) for one in each]),
        accuracy=known.ratio(right.astype(np.float64), total, top, (0.0, 1.0)),
        calibration_gap=known.ratio(middle - truth, total, top, (-1.0, 1.0)),
        brier=known.ratio((middle - truth) ** 2, total, top, (0.0, 1.0)) if binary else None,
        log_loss=_log_loss(known, each, middle, binary),
        bins=bins,
        noise_sd_of_cell=noise_sd,
        cells=tuple(tuple(tuple(row) for row in one) for one in counts.tolist()),
    )


def noise_sd_of_cell(noise_sd: float, exponent: int, hospitals: int) -> float:
    """Of a released cell, in patients: ``noise_sd`` in units of 2^-exponent is what each hospital adds."""
    return noise_sd * 2.0**-exponent * math.sqrt(hospitals)


def in_words(found: Metrics) -> Iterator[str]:
    """A line a figure: its value, and between which two it lies (95 %)."""
    figures = (
        ("held-out patients", found.patients, ".0f"),
        ("AUC", found.auc, ".3f"),
        ("accuracy", found.accuracy, ".3f"),
        ("calibration gap", found.calibration_gap, "+.3f"),
        ("Brier score", found.brier, ".3f"),
        ("log loss", found.log_loss, ".3f"),
    )
    for name, figure, digits in figures:
        if figure is not None:
            yield f"{name} {figure.value:{digits}} ({figure.low:{digits}} to {figure.high:{digits}})"
        elif name != "Brier score":
            yield f"{name}: drowned by the noise"


def held_out(declared: int, holdout: float = ASSUMED_HOLDOUT) -> float:
    """Patients held out beside ``declared`` ones who train, where the share ``holdout`` of both together is."""
    return declared * holdout / (1.0 - holdout)


def noise_in_auc(study: Study, patients: float, noise_sd: float) -> float | None:
    """Standard deviation that the noise leaves in an AUC of 0.80, as ``expected``; None where it would drown it."""
    auc = expected(study, patients, noise_sd).auc
    return None if auc is None else auc.noise_sd


def noise_in_auc_in_words(patients: int, noise_sd: float | None) -> str:
    """The same for a terminal, with what it takes for granted."""
    told = "drown an AUC of 0.80" if noise_sd is None else f"move an AUC of 0.80 by {noise_sd:.3g} (standard deviation)"
    who = counted(patients, "patient")
    return f"with {who} held out at all hospitals together, half of them of each class, the noise would {told}"


def expected(study: Study, patients: float, noise_sd: float) -> Metrics:
    """What the figures would look like with ``patients`` held out and a model of AUC 0.80, half of them of each class: to see
    beforehand how wrong they will be; unequal classes make it worse. Scores are normal in the logit, 1.19 standard
    deviations apart."""
    bins = _bins(study)
    edges = np.arange(1, bins) / bins
    logits = np.concatenate([[-math.inf], np.log(edges / (1 - edges)), [math.inf]])
    shift = 1.19
    cumulated = [[_normal(edge - side * shift / 2) for edge in logits] for side in (-1.0, 1.0)]
    one = np.diff(np.array(cumulated), axis=1) * patients / 2
    return from_cells(study, np.tile(one, (_histograms(study), 1, 1)).ravel(), noise_sd)


def _normal(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2.0))


def _log_loss(known: _Noised, each: Floats, middle: Floats, binary: bool) -> Figure | None:
    loss = -np.log(np.stack([1 - middle, middle]))
    if not binary:  # of each record its own class only
        loss[0] = 0.0
    own = np.ones_like(loss) if binary else np.stack([np.zeros_like(middle), np.ones_like(middle)])
    shape = each.shape
    return known.ratio(np.broadcast_to(loss, shape), np.broadcast_to(own, shape), each, (0.0, math.inf))


def _mean(figures: list[Figure | None]) -> Figure | None:
    """Mean over classes; noises of different classes are independent, samples are not: their deviation is not divided."""
    known = [figure for figure in figures if figure is not None]
    if not known:
        return None
    value = sum(figure.value for figure in known) / len(known)
    noise = math.sqrt(sum(figure.noise_sd**2 for figure in known)) / len(known)
    sampling = sum(figure.sampling_sd or 0.0 for figure in known) / len(known)
    return _figure(value, noise, sampling, (0.0, 1.0))


def _figure(value: float, noise_sd: float, sampling_sd: float | None, bounds: tuple[float, float]) -> Figure:
    spread = 1.96 * math.hypot(noise_sd, sampling_sd or 0.0)
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in (value - spread, value + spread))
    return Figure(min(max(value, bounds[0]), bounds[1]), noise_sd, sampling_sd, low, high)


@dataclass(frozen=True, slots=True)
class _Noised:
    """Figures of cells whose noise has this standard deviation each. A denominator within 3 of its noise says nothing."""

    noise_sd: float

    def figure(self, value: float, norm: float, sampling_sd: float | None, bounds: tuple[float, float]) -> Figure:
        """``norm``: of the figure's gradient by the cells."""
        return _figure(value, self.noise_sd * norm, sampling_sd, bounds)

    def _is_drowned(self, amount: float, cells: int) -> bool:
        return amount < 1.0 or amount < 3.0 * self.noise_sd * math.sqrt(cells)

    def ratio(self, above: Floats, below: Floats, cells: Floats, bounds: tuple[float, float]) -> Figure | None:
        """<above, cells> / <below, cells>: a mean over records of a number that each cell stands for."""
        amount = float((below * cells).sum())
        if self._is_drowned(amount, int(np.count_nonzero(below))):
            return None
        value = float((above * cells).sum()) / amount
        norm = float(np.linalg.norm(above - value * below)) / amount
        spread = float((below * np.maximum(cells, 0.0) * (above - value) ** 2).sum())
        return self.figure(value, norm, math.sqrt(spread) / amount, bounds)

    def auc(self, cells: Floats) -> Figure | None:
        """Of one histogram [2, bins]: not of the class, of the class."""
        others, own = cells
        if self._is_drowned(float(others.sum()), others.size) or self._is_drowned(float(own.sum()), own.size):
            return None
        negatives, positives = float(others.sum()), float(own.sum())
        below = (np.cumsum(others) - others / 2) / negatives  # share of the others that a record in this bin beats
        above = (positives - np.cumsum(own) + own / 2) / positives
        value = float((own * below).sum()) / positives
        norm = math.hypot(
            float(np.linalg.norm((below - value) / positives)), float(np.linalg.norm((above - value) / negatives))
        )
        return self.figure(value, norm, _hanley_mcneil(min(max(value, 0.0), 1.0), positives, negatives), (0.0, 1.0))


def _hanley_mcneil(area: float, positives: float, negatives: float) -> float:
    both = area / (2 - area) - area**2
    one = 2 * area**2 / (1 + area) - area**2
    variance = (area * (1 - area) + (positives - 1) * both + (negatives - 1) * one) / (positives * negatives)
    return math.sqrt(max(variance, 0.0))
