"""Membership inference: from a released model, can anybody tell whether a patient trained it?

Models of one study are trained by production's path on random halves of a cohort, once as the study says and once without
noise, the control; everything else is the same. Each is attacked by somebody who knows the study, the first weights, all
patients, and who trained each of the other models. To give the attacker a chance, the model is larger and trains longer on
fewer patients than anybody would plan it, until without noise it knows its patients by heart; and one round's sum has no more
noise than mode distributed needs for epsilon.

The attacker looks at the released model only. What the sums of single rounds give away to somebody who can aim at them is
what the mechanism's and the one-run audit measure.

*Source* Dong, Roth, Su 2022 (J. R. Stat. Soc. B 84, corollary 1 and section 2.2) for what no attack can exceed; the attacks
are those of ``membership_attacks``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from medfed.advance import advance, first_state, released_weights
from medfed.client.local_steps import Noise
from medfed.errors import DataError
from medfed.model_choice import Mlp
from medfed.models import catalogue, parameters
from medfed.models.records import Records
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.plan import calibrate
from medfed.server.planning import load_task
from medfed.simulations.audits.membership_attacks import ATTACKS, GRID, Bools, Floats, area, attack
from medfed.simulations.audits.real_path import RealPath, Shape, audited_study
from medfed.simulations.audits.setting import Setting
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.pooled import pooled_records
from medfed.simulations.rehearsal import no_noise
from medfed.simulations.threads import one_torch_thread
from medfed.study import Study, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPSILON, DELTA = 3.0, 3e-4
MOST_AUC = 0.55
LEAST_CONTROL = 0.65
CONFIDENCE = 0.95

_COHORT, _SPLIT = "heart-disease", 43  # the split plays no part: both sides of it are used
_PATIENTS = 400  # of whom a random half trains a model
_MODELS, _MODELS_QUICK = 40, 10
_HIDDEN, _ROUNDS, _AVERAGED, _RATE, _MOMENTUM = 64, 40, 10, 8.0, 0.8


class MembershipResult(TypedDict):
    """``auc`` and what belongs to it are the strongest attack's, means over all models; ``_upper`` and ``_lower`` are one-sided
    bounds with ``confidence``. ``auc_limit``: of any attack on anything that such a study releases.

    ``tpr_at_fpr_001``: share of members found at a false-positive rate of 0.001. ``model_auc``: of the study's own task, on
    the patients who did not train. ``attacks``: [private, control] by name. ``curve``: members found at each of ``GRID``.
    """

    claimed_epsilon: float
    delta: float
    attack: str
    auc: float
    auc_upper: float
    auc_limit: float
    tpr_at_fpr_001: float
    model_auc: float
    attack_control: str
    auc_control: float
    auc_control_lower: float
    tpr_at_fpr_001_control: float
    model_auc_control: float
    attacks: dict[str, list[float]]
    confidence: float
    models: int
    shadows: int
    patients: int
    targets: int
    parameters: int
    rounds: int
    data: str
    curve: list[float]
    curve_control: list[float]
    violations: list[str]
    weak: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """``confidences``: float[k, n], the logit of the probability that model k gives patient n's own label; ``inside``:
    bool[k, n], who trained it; ``model_auc``: of the task on the others, the models' mean."""

    confidences: Floats
    inside: Bools
    model_auc: float


def membership_audit(setting: Setting) -> MembershipResult:
    """Train with noise and without, attack both, compare."""
    study, first = audited(setting)
    records, data = audited_patients(setting, study)
    count = _MODELS_QUICK if setting.quick else _MODELS
    with one_torch_thread():
        private = train(setting, "private", discrete_gaussian, study, first, records, count)
        control = train(setting, "control", no_noise, study, first, records, count)
    return compare(study, private, control, data, quick=setting.quick)


def compare(study: Study, private: Trained, control: Trained, data: str, *, quick: bool) -> MembershipResult:
    """The strongest attack on each, and what follows. ``quick``: too few models for the bound, so the figure is judged."""
    attacked = [{name: attack(name, one.confidences, one.inside) for name in ATTACKS} for one in (private, control)]
    best, other = (max(found.values(), key=lambda one: one.auc) for found in attacked)
    # to choose the strongest by its outcome only raises the upper bound; the lower one has to pay for the choice
    z_upper, z_lower = norm.ppf(CONFIDENCE), norm.ppf(1 - (1 - CONFIDENCE) / len(ATTACKS))
    mu = math.sqrt(study.training.rounds) / study.privacy.noise_multiplier
    models, patients = private.inside.shape
    result = MembershipResult(
        claimed_epsilon=study.privacy.epsilon,
        delta=study.privacy.delta,
        attack=best.name,
        auc=best.auc,
        auc_upper=min(1.0, best.auc + float(z_upper) * best.error),
        auc_limit=float(norm.cdf(mu / math.sqrt(2))),
        tpr_at_fpr_001=best.found,
        model_auc=private.model_auc,
        attack_control=other.name,
        auc_control=other.auc,
        auc_control_lower=max(0.0, other.auc - float(z_lower) * other.error),
        tpr_at_fpr_001_control=other.found,
        model_auc_control=control.model_auc,
        attacks={name: [found[name].auc for found in attacked] for name in ATTACKS},
        confidence=CONFIDENCE,
        models=models,
        shadows=models - 1,
        patients=patients,
        targets=models * patients,
        parameters=_words(study),
        rounds=study.training.rounds,
        data=data,
        curve=list(best.curve),
        curve_control=list(other.curve),
        violations=[],
        weak=[],
    )
    _conclude(result, result["auc"] if quick else result["auc_upper"])
    return result


def _conclude(result: MembershipResult, judged: float) -> None:
    if judged > MOST_AUC:
        result["violations"].append(
            f"membership inference at epsilon {result['claimed_epsilon']:g}: AUC {judged:.3f}, {MOST_AUC:g} at most"
        )
    if result["auc_control"] < LEAST_CONTROL:
        result["weak"].append(
            f"membership inference without noise: AUC {result['auc_control']:.3f}, {LEAST_CONTROL:g} at least"
        )


# ------------------------------------------------------------------------------------------------- patients and study


def audited(setting: Setting) -> tuple[Study, NDArray[np.float32]]:
    """The study, all of whose epsilon is spent, and its first weights float32[d]."""
    shape = Shape(1, "distributed", 1.0, rounds=_ROUNDS, delta=DELTA)
    draft, task = audited_study(shape), load_task(setting.seams.files, _COHORT)
    training = {
        "aggregate": "gradient",
        "rounds": _ROUNDS,
        "spare_attempts": 0,
        "learning_rates": [[1, _RATE]],
        "average_last_rounds": _AVERAGED,
        "server_step": {"kind": "momentum", "momentum": _MOMENTUM},
    }
    changes = {
        "task": task.task,
        "data": task.data,
        "model": Mlp(name="mlp", hidden=[_HIDDEN], first_model_sha256="0" * 64),
        "training": Training.model_validate(training),
        "quantization": draft.quantization.model_copy(update={"range": 256.0}),
    }
    study = draft.model_copy(update=changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(setting.generator("membership/first").integers(2**62)))
        first = parameters.flatten(catalogue.build(study))
    return calibrate(study, len(first), EPSILON), first


def _words(study: Study) -> int:
    return parameters.count(catalogue.build(study))


def audited_patients(setting: Setting, study: Study) -> tuple[Records, str]:
    """Real patients where they are on this machine, else invented ones; and in words which."""
    try:
        cohort = load_cohort(setting.seams.files, _COHORT, _SPLIT, None)
    except DataError as error:
        if error.code != 320:
            raise
        return _invented(setting, study), f"invented patients: {_COHORT} is not on this machine"
    extracts = [part for hospital in cohort.hospitals for part in (hospital.training, hospital.test)]
    everybody = pooled_records([extract.encode(study) for extract in extracts])
    chosen = np.zeros(len(everybody.labels), np.bool_)
    chosen[setting.generator("membership/patients").permutation(len(chosen))[:_PATIENTS]] = True
    return everybody.subset(chosen), f"{_COHORT}: real patients"


def _invented(setting: Setting, study: Study) -> Records:
    """Findings without meaning, and a disease that hangs loosely on three of them."""
    generator = setting.generator("membership/patients")
    inputs = generator.normal(size=(_PATIENTS, study.data.inputs)).astype(np.float32)
    chances = 1 / (1 + np.exp(-inputs[:, :3].sum(1)))
    labels = (generator.random(_PATIENTS) < chances).astype(np.int64)
    return Records(inputs, labels, tuple(f"invented-{number:03d}" for number in range(_PATIENTS)))


# ----------------------------------------------------------------------------------------------------------- training


def train(
    setting: Setting,
    arm: str,
    noise: Noise,
    study: Study,
    first: NDArray[np.float32],
    records: Records,
    count: int,
) -> Trained:
    """``count`` models, each of a half of the patients that is drawn anew."""
    path, lots = RealPath(study, setting, f"membership/{arm}", noise), setting.generator(f"membership/{arm}/halves")
    patients = len(records.labels)
    confidences, inside = np.zeros((count, patients)), np.zeros((count, patients), np.bool_)
    ill, areas = records.labels == 1, []
    for number in range(count):
        share = number / count / 2 + (arm == "control") / 2
        setting.tell(share, f"membership: {arm} model {number + 1} of {count}")
        members = inside[number]
        # the halves are independent: were each patient in half of the models, the others would tell who is in this one
        members[lots.permutation(patients)[: patients // 2]] = True
        logits = _logits(path, _weights(path, first, records.subset(members)), records)
        confidences[number] = np.where(ill, logits, -logits)
        areas.append(area(logits[~members & ill], logits[~members & ~ill])[0])
    return Trained(confidences, inside, float(np.mean(areas)))


def _weights(path: RealPath, first: NDArray[np.float32], records: Records) -> NDArray[np.float32]:
    """The released model, float32[d], of these patients, all of them at one hospital."""
    patients = path.patients(records.inputs.astype(np.float32), records.labels.tolist(), records.patients)
    state = first_state(first, path.study)
    for _ in range(path.study.training.rounds):
        total = path.attempt(state, patients).total
        exponent = path.plan.exponent
        state = advance(state, total, path.study, grid_exponent=exponent, nominal_patients=patients.count)
    return released_weights(state, path.study)


def _logits(path: RealPath, weights: NDArray[np.float32], records: Records) -> Floats:
    """float64[n]. Not by way of probabilities, which lose what tells confident answers apart."""
    parameters.assign(path.model, weights)
    with torch.no_grad():
        logits = path.model(torch.from_numpy(records.inputs))[:, 0]
    return np.asarray(logits.double().numpy())


# ---------------------------------------------------------------------------------------------------------- reporting


def membership_rows(result: MembershipResult) -> list[tuple[str, str]]:
    """What and figure, for the printed table; the first decides."""
    bound, lower = f"at most {result['auc_upper']:.3f}", f"at least {result['auc_control_lower']:.3f}"
    found, other = result["tpr_at_fpr_001"], result["tpr_at_fpr_001_control"]
    half = result["patients"] // 2
    return [
        (f"AUC at epsilon {result['claimed_epsilon']:g}", f"{result['auc']:.3f}, {bound} ({result['attack']})"),
        ("without noise (control)", f"{result['auc_control']:.3f}, {lower} ({result['attack_control']})"),
        ("most that this noise allows anybody", f"{result['auc_limit']:.3f}"),
        ("members found at 0.1% false alarms", f"{found:.2%}, without noise {other:.2%}"),
        ("the models' own AUC", f"{result['model_auc']:.3f}, without noise {result['model_auc_control']:.3f}"),
        ("attacked", f"{result['models']} models of {half} patients each, {result['shadows']} shadow models"),
        ("data", result["data"]),
    ]


def membership_plot(axes: Axes, result: MembershipResult) -> None:
    """ROC of the strongest attack with and without noise, and the curve that nobody can cross."""
    gray = "#6b6b6b"
    shares = np.linspace(0.0, 1.0, 402)[1:-1]
    mu = math.sqrt(2) * float(norm.ppf(result["auc_limit"]))
    axes.plot(shares, norm.cdf(norm.ppf(shares) + mu), color=gray, linestyle=(0, (5, 3)), label="most for this noise")
    name = f"without noise (AUC {result['auc_control']:.3f})"
    axes.plot(GRID, result["curve_control"], color="#b8432f", linewidth=2, label=name)
    name = f"epsilon {result['claimed_epsilon']:g} (AUC {result['auc']:.3f})"
    axes.plot(GRID, result["curve"], color="#1f5fa8", linewidth=2, label=name)
    axes.plot([0, 1], [0, 1], color=gray, linewidth=1, linestyle=(0, (1, 2)), label="guessing")
    axes.set_xlabel("others taken for members")
    axes.set_ylabel("members found")
    axes.set_title("membership: how well trained patients are told from others", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
