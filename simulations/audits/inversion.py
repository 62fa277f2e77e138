"""Gradient inversion: a patient's film rebuilt from what leaves a hospital.

The model is linear over all pixels of a chest film, so that a patient's gradient is the film itself times a number that
follows from the diagnosis: whoever sees the bare update has the film to the last pixel. No model tells more of a patient, and
none asks less of an attacker, who here knows the diagnosis and has taken away what everybody else contributed. Three views
of one attempt with this one patient, by production's path:

- the bare update, neither clipped nor noised nor masked: the control;
- the hospital's upload. Its masks have to do alone: the noise is left out;
- the opened sum, less what the colluding hospitals added themselves. Only noise protects it, and the least that a study can
  have for its epsilon: one round, mode distributed.

Films of chests are all alike. So similarity is the correlation of pixels after what a constant and the mean film of others
explain has been taken out of both: what was learned of this one patient, about 0 by chance.

*Source* Phong et al. 2018 (IEEE TIFS 13(5), section III) and Geiping et al. 2020 (arXiv:2003.14053, proposition 3.1): the
gradient of a linear layer gives its input away.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from medfed.advance import first_state
from medfed.client.local_steps import Noise
from medfed.client.trainer import gradient_sum
from medfed.errors import DataError
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import calibrate
from medfed.simulations.audits.real_path import Opened, RealPath, Shape, audited_study
from medfed.simulations.audits.setting import Setting
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.rehearsal import no_noise
from medfed.simulations.threads import one_torch_thread
from medfed.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPSILON, WEAKER_EPSILON = 3.0, 8.0
DELTA = 1e-5
LEAST_CONTROL = 0.95
MARGIN = 0.1  # of the mean similarity above that to other patients
CONFIDENCE = 0.999

_SIDE = 28
_PIXELS = _SIDE * _SIDE
_TARGETS, _TARGETS_QUICK = 200, 50
_OTHERS = 400
_UNCLIPPED = 1000.0  # a film's gradient has norm 14 or so
_CENTER, _SCALE = 127.5, 63.75  # of pixels from 0 to 255: the constants of the task pneumonia
_COLLUDERS = 1

Floats = NDArray[np.float64]


class View(TypedDict):
    """How well films were rebuilt from one view, means over all targets.

    ``similarity``: to the patient's own film; ``chance``: to other patients'. ``percentile``: the share of others whose films
    the rebuilt one is less like, 0.5 by chance; ``percentile_limit``: what it can be for somebody who has all films.
    """

    similarity: float
    chance: float
    percentile: float
    percentile_limit: float


class InversionResult(TypedDict):
    """``sum``: at ``claimed_epsilon``; ``weaker_sum``: at ``weaker_epsilon``; the four keys that end in ``_similarity`` say
    again what the views do. ``pictures``: the first patient's film and what became of it, base64 of uint8[28, 28] each."""

    claimed_epsilon: float
    weaker_epsilon: float
    delta: float
    control_similarity: float
    upload_similarity: float
    sum_similarity: float
    chance_similarity: float
    control: View
    upload: View
    sum: View
    weaker_sum: View
    margin: float
    confidence: float
    targets: int
    others: int
    data: str
    pictures: dict[str, str]
    violations: list[str]
    weak: list[str]


def inversion_audit(setting: Setting, noise: Noise = discrete_gaussian) -> InversionResult:
    """Rebuild films from each view and compare. ``noise``: of the opened sums; tests leave it out."""
    films, labels, data = _films(setting)
    targets = _TARGETS_QUICK if setting.quick else _TARGETS
    attacker = _Attacker(setting, films[:targets], labels[:targets])
    study, weaker = (_study(epsilon) for epsilon in (EPSILON, WEAKER_EPSILON))
    with one_torch_thread():
        rebuilt = {
            "control": attacker.from_bare_updates(study),
            "upload": attacker.from_attempts(study, no_noise, "upload", _upload),
            "sum": attacker.from_attempts(study, noise, "sum", _sum),
            "weaker": attacker.from_attempts(weaker, noise, "weaker sum", _sum),
        }
    limits = {"control": 1.0, "upload": 0.5, "sum": _limit(study), "weaker": _limit(weaker)}
    likeness = _Likeness(films[:targets], films[targets:])
    views = {name: likeness.view(rebuilt[name], limits[name]) for name in rebuilt}
    result = InversionResult(
        claimed_epsilon=EPSILON,
        weaker_epsilon=WEAKER_EPSILON,
        delta=DELTA,
        control_similarity=views["control"]["similarity"],
        upload_similarity=views["upload"]["similarity"],
        sum_similarity=views["sum"]["similarity"],
        chance_similarity=views["sum"]["chance"],
        control=views["control"],
        upload=views["upload"],
        sum=views["sum"],
        weaker_sum=views["weaker"],
        margin=MARGIN,
        confidence=CONFIDENCE,
        targets=targets,
        others=len(films) - targets,
        data=data,
        pictures={
            "the film": _picture(films[0]),
            "from the bare update": _picture(rebuilt["control"][0]),
            f"from the sum at epsilon {WEAKER_EPSILON:g}": _picture(rebuilt["weaker"][0]),
            f"from the sum at epsilon {EPSILON:g}": _picture(rebuilt["sum"][0]),
            "from the upload": _picture(rebuilt["upload"][0]),
        },
        violations=[],
        weak=[],
    )
    _conclude(result)
    return result


def _conclude(result: InversionResult) -> None:
    # a percentile that is uniform by chance varies at least as much as one that is not
    error = float(norm.ppf(CONFIDENCE)) * math.sqrt(1 / 12 / result["targets"])
    views = {
        "an upload": result["upload"],
        f"the sum at epsilon {EPSILON:g}": result["sum"],
        f"the sum at epsilon {WEAKER_EPSILON:g}": result["weaker_sum"],
    }
    for name, view in views.items():
        similarity, limit = view["similarity"], view["chance"] + MARGIN
        if similarity > limit:
            result["violations"].append(
                f"films are rebuilt from {name}: similarity {similarity:.2f}, {limit:.2f} at most"
            )
        elif view["percentile"] > view["percentile_limit"] + error:
            what = f"percentile {view['percentile']:.3f}, {view['percentile_limit']:.3f} at most"
            result["violations"].append(f"{name} tells patients apart: {what}")
    if result["control_similarity"] < LEAST_CONTROL:
        what = f"similarity {result['control_similarity']:.2f}, {LEAST_CONTROL:g} at least"
        result["weak"].append(f"films are not rebuilt from bare updates: {what}")


# ------------------------------------------------------------------------------------------------------ films and study


def _films(setting: Setting) -> tuple[Floats, NDArray[np.int64], str]:
    """Films in random order, encoded as float64[n, 784], and labels: of real patients where they are on this machine."""
    try:
        cohort, data = load_cohort(setting.seams.files, "pneumonia", 1, None), "pneumonia: real films of children"
    except DataError as error:
        if error.code != 320:
            raise
        cohort = load_cohort(setting.seams.files, "synthetic-images", 1, None)
        data = "invented films: pneumonia is not on this machine"
    pixels, labels = [], []
    for part in (hospital.training for hospital in cohort.hospitals):
        column = part.columns["pneumonia" if "pneumonia" in part.columns else "lesion"]
        if part.images is not None:
            pixels.append(part.images.reshape(-1, _PIXELS))
            labels.append(np.array(column).astype(np.int64))
    wanted = _OTHERS + (_TARGETS_QUICK if setting.quick else _TARGETS)
    chosen = setting.generator("inversion/films").permutation(sum(map(len, labels)))[:wanted]
    films = np.concatenate(pixels)[chosen].astype(np.float64)
    return (films - _CENTER) / _SCALE, np.concatenate(labels)[chosen], data


def _study(epsilon: float) -> Study:
    """One round, on whose one sum all of epsilon is spent."""
    draft = audited_study(Shape(_PIXELS, "distributed", 1.0, delta=DELTA, colluders=_COLLUDERS))
    return calibrate(draft, _PIXELS + 1, epsilon)


def _limit(study: Study) -> float:
    """How often at most anybody who has two patients' films knows whose is in the sum.

    Their gradients are at most 2 C apart: two normal laws of deviation sigma C with means that far apart are told from each
    other with probability Phi(1 / sigma).
    """
    return float(norm.cdf(1 / study.privacy.noise_multiplier))


# --------------------------------------------------------------------------------------------------------- the attacker


def _upload(opened: Opened) -> NDArray[np.int64]:
    upload: NDArray[np.int64] = opened.uploads[0]
    return upload


def _sum(opened: Opened) -> NDArray[np.int64]:
    """What the coordinator is left with when the colluding hospitals tell what they masked."""
    return np.asarray(opened.total - opened.vectors[-_COLLUDERS:].sum(axis=0), np.int64)


class _Attacker:
    """Rebuilds each patient's film from one attempt with this patient alone: float64[n, 784], up to a positive number."""

    def __init__(self, setting: Setting, films: Floats, labels: NDArray[np.int64]) -> None:
        self._setting = setting
        self._inputs = films.astype(np.float32)
        self._labels = labels

    def from_bare_updates(self, study: Study) -> Floats:
        """From gradients that nothing protects yet."""
        privacy = study.privacy.model_copy(update={"clipping_norm": _UNCLIPPED})
        path = RealPath(study, self._setting, "inversion/bare")
        bare, zeros = study.model_copy(update={"privacy": privacy}), np.zeros(_PIXELS + 1, np.float32)
        key = self._setting.entropy("inversion/bare").draw("sampling", 64)
        people = [path.patients(*self._patient(row)) for row in range(len(self._labels))]
        return self._rebuilt([gradient_sum(bare, path.model, zeros, one, sampling_key=key) for one in people])

    def from_attempts(
        self, study: Study, noise: Noise, name: str, view: Callable[[Opened], NDArray[np.int64]]
    ) -> Floats:
        """From what ``view`` shows of attempts at a model whose weights are zero."""
        path = RealPath(study, self._setting, f"inversion/{name}", noise)
        state = first_state(np.zeros(_PIXELS + 1, np.float32), study)
        seen = []
        for row in range(len(self._labels)):
            self._setting.tell(row / len(self._labels), f"inversion: {name}, film {row + 1} of {len(self._labels)}")
            seen.append(view(path.attempt(state, path.patients(*self._patient(row)))))
        return self._rebuilt(seen)

    def _patient(self, row: int) -> tuple[NDArray[np.float32], list[int], list[str]]:
        return self._inputs[row : row + 1], [int(self._labels[row])], [f"patient-{row}"]

    def _rebuilt(self, updates: Sequence[Floats] | Sequence[NDArray[np.int64]]) -> Floats:
        """At zero weights a gradient is (1/2 - label) * (film, 1)."""
        signs = 1.0 - 2.0 * self._labels
        films: Floats = np.array(updates, np.float64)[:, :_PIXELS] * signs[:, None]
        return films


class _Likeness:
    """Compares rebuilt films with the patients' own and with others', both float64[n, 784]."""

    def __init__(self, own: Floats, others: Floats) -> None:
        self._alike = np.linalg.qr(np.stack([np.ones(_PIXELS), others.mean(axis=0)], axis=1))[0]
        self._own, self._others = self._different(own), self._different(others)

    def _different(self, films: Floats) -> Floats:
        """What a constant and the mean film do not explain, of length 1."""
        rest = films - films @ self._alike @ self._alike.T
        return np.asarray(rest / np.linalg.norm(rest, axis=1, keepdims=True))

    def view(self, rebuilt: Floats, limit: float) -> View:
        found = self._different(rebuilt)
        to_own, to_others = (found * self._own).sum(axis=1), found @ self._others.T
        return View(
            similarity=float(to_own.mean()),
            chance=float(to_others.mean()),
            percentile=float((to_others < to_own[:, None]).mean()),
            percentile_limit=limit,
        )


# ---------------------------------------------------------------------------------------------------------- reporting


def _picture(film: Floats) -> str:
    """Its darkest and brightest hundredth black and white: base64 of uint8[28, 28]."""
    dark, bright = np.quantile(film, (0.01, 0.99))
    gray = np.clip((film - dark) / (bright - dark), 0.0, 1.0)
    return base64.b64encode(np.rint(255 * gray).astype(np.uint8).tobytes()).decode()


def inversion_rows(result: InversionResult) -> list[tuple[str, str]]:
    """What and figure, for the printed table; the first decides."""

    def shown(view: View) -> str:
        return f"{view['similarity']:.3f}, chance {view['chance']:.3f}; percentile {view['percentile']:.3f}"

    return [
        (f"similarity from the sum, epsilon {EPSILON:g}", shown(result["sum"])),
        (f"similarity from the sum, epsilon {WEAKER_EPSILON:g}", shown(result["weaker_sum"])),
        ("similarity from the upload", shown(result["upload"])),
        ("from the bare update (control)", shown(result["control"])),
        (
            "most that this noise allows anybody",
            f"percentile {result['sum']['percentile_limit']:.3f} and {result['weaker_sum']['percentile_limit']:.3f}",
        ),
        ("attacked", f"{result['targets']} patients, compared with {result['others']} others"),
        ("data", result["data"]),
    ]


def inversion_plot(axes: Axes, result: InversionResult) -> None:
    """One patient's film and what was rebuilt of it from each view, side by side. The patients are public."""
    gap = 2
    for place, (name, encoded) in enumerate(result["pictures"].items()):
        film = np.frombuffer(base64.b64decode(encoded), np.uint8).reshape(_SIDE, _SIDE)
        left = place * (_SIDE + gap)
        axes.imshow(film, cmap="gray", vmin=0, vmax=255, extent=(left, left + _SIDE, _SIDE, 0))
        words = name.replace(" at ", "\nat ").replace(" bare", "\nbare")
        axes.text(left + _SIDE / 2, _SIDE + 1.5, words, ha="center", va="top", fontsize=8)
    axes.set_xlim(0, len(result["pictures"]) * (_SIDE + gap) - gap)
    axes.set_ylim(_SIDE + 8, 0)
    axes.set_title("inversion: one patient's film and what is rebuilt of it", fontsize=10)
    axes.set_axis_off()
