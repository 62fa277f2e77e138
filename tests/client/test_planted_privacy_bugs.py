"""Every known way of getting privacy wrong, planted in production code by changing its source: a check of this file notices.

A check runs production code and raises ``Noticed``; it passes on the code as it is and must not on the code with the bug. Keys
are fixed, so that nothing here depends on chance; the limits are such that other keys would raise a false alarm in less than
one of 10,000 runs of the file.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from medfed import wire
from medfed.client import daemon, local_steps, trainer
from medfed.client.compute import Compute
from medfed.errors import UnsupportedModel
from medfed.models.catalogue import build
from medfed.models.parameters import count
from medfed.models.records import Records
from medfed.privacy import noise, plan
from medfed.privacy.gradients import engine, fixed_batches, opacus_engine
from medfed.seams import SystemEntropy
from medfed.simulations.entropy import SeededEntropy
from medfed.study import Study

MakeStudy = Callable[..., Study]
NOBODY, EVERYBODY = {"privacy.sampling_rate": 1e-9}, {"privacy.sampling_rate": 1.0}
WIDE = {"model.name": "mlp", "model.hidden": [2000]}  # 10,001 parameters: as many draws of noise
STEPS = 4
LOCAL = {
    "training.aggregate": "update",
    "training.server_step": {"kind": "momentum", "momentum": 0.0},
    "training.local": {"steps": STEPS, "learning_rate": 0.5, "proximal": 0.0, "sum_range": 32.0},
}
STANDARD_ERRORS = 5.0  # two-sided: 6e-7 a comparison


class Noticed(AssertionError):
    """The check saw that a promise is broken."""


def need(holds: object, what: str) -> None:
    if not holds:
        raise Noticed(what)


def hospital(make_study: MakeStudy, changes: dict[str, object], patients: int = 8, folder: Path | None = None):
    """What production's functions take for an approved study: ``patients`` with a record each, other numbers declared."""
    study = make_study(changes)
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(50, study.data.inputs)).astype(np.float32)[:patients]
    records = Records(inputs, np.arange(patients) % 2, tuple(f"p{number:02}" for number in range(patients)))
    model = build(study)
    return SimpleNamespace(
        study=study,
        model=model,
        plan=plan.make_plan(study, count(model)),
        patients=trainer.number_patients(study, records),
        compute=Compute(),
        nominal_patients=10,
        roster=SimpleNamespace(patients_at_start=lambda study: 40),
        folder=folder,
    )


def no_noise(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
    return np.zeros(size, np.int64)


def noised(site, entropy, draw=None) -> NDArray[np.int64]:
    draw = draw or daemon.discrete_gaussian
    return local_steps.noised_sum(site, np.zeros(site.plan.words, np.float32), entropy, draw)


def added(site, entropies) -> NDArray[np.int64]:
    """The noise of a sum alone: the same coins with and without."""
    return noised(site, next(entropies)) - noised(site, next(entropies), no_noise)


def twins(label: str):
    while True:
        yield SeededEntropy(7, label)


def wanted_sd(site) -> float:
    """What the study states, times what one patient can move a sum on the grid."""
    privacy, grid = site.study.privacy, 2.0**site.plan.noise_exponent
    return privacy.noise_multiplier * (privacy.clipping_norm * grid + math.sqrt(site.plan.words))


def need_scale(values: NDArray[np.float64], sd: float) -> None:
    square = float((np.asarray(values, np.float64) / sd) @ (np.asarray(values, np.float64) / sd))
    off = (square - values.size) / math.sqrt(2 * values.size)
    need(abs(off) < STANDARD_ERRORS, f"noise of the wrong scale: {off:.1f} standard errors")


# ----------------------------------------------------------------------------------------------------------------- checks


def noise_has_the_stated_scale(make_study: MakeStudy, folder: Path) -> None:
    """Whoever takes part, and if nobody does."""
    for changes in (NOBODY, EVERYBODY):
        site = hospital(make_study, {**WIDE, **changes})
        need_scale(added(site, twins("scale")), wanted_sd(site))


def every_round_and_step_is_noised(make_study: MakeStudy, folder: Path) -> None:
    site, entropy = hospital(make_study, {**WIDE, **NOBODY}), SeededEntropy(7, "rounds")
    for _ in range(3):
        need_scale(noised(site, entropy), wanted_sd(site))
    site = hospital(make_study, {**WIDE, **NOBODY, **LOCAL, "privacy.sampling_rate": 1e-6})
    start = np.zeros(site.plan.words, np.float32)
    update = local_steps.private_update(site, start, SeededEntropy(7, "steps"), daemon.discrete_gaussian)
    one_step = 0.5 * wanted_sd(site) * 2.0**-site.plan.noise_exponent / (1e-6 * site.nominal_patients)
    need_scale(update, math.sqrt(STEPS) * one_step)


def noise_is_fresh(make_study: MakeStudy, folder: Path) -> None:
    """For every attempt; where the hospital's folder is a copy or was restored; the folder is no part of it."""
    site = hospital(make_study, {**WIDE, **NOBODY}, folder=folder)
    first, again = (noised(site, SystemEntropy()).astype(np.float64) for _ in range(2))
    alike = abs(float(np.corrcoef(first, again)[0, 1])) * math.sqrt(first.size)
    need(alike < 7, "two attempts have the same noise")  # keys of the system: 3e-12
    need(not any(folder.iterdir()), "something of the noise was stored")


def noise_has_the_stated_shape(make_study: MakeStudy, folder: Path) -> None:
    """Integers, and of the discrete Gaussian's law: at 0.7 a rounded one has another."""
    site = hospital(make_study, EVERYBODY)
    need(noised(site, SeededEntropy(7, "shape")).dtype == np.int64, "the noised sum is not one of integers")
    draws = daemon.discrete_gaussian(bytes(32), 0.7, 1 << 17)
    support = np.arange(-2, 3)
    mass = np.exp(-(np.arange(-9, 10) ** 2) / (2 * 0.7**2))
    mass = mass[7:12] / mass.sum()
    seen = [int((draws == value).sum()) for value in support]
    seen, expected = [*seen, draws.size - sum(seen)], np.append(mass, 1 - mass.sum()) * draws.size
    need(stats.chisquare(seen, expected).pvalue > 1e-6, "the noise is no discrete Gaussian")


def noise_is_never_cut(make_study: MakeStudy, folder: Path) -> None:
    """Sums are saturated, noise is not: what the noise adds is the noise, however large both are."""
    site = hospital(make_study, EVERYBODY)
    for size in (3, site.plan.noise_limit, 2**40):
        huge = np.array([size, -size, size, -size])
        with_noise = noised(site, SeededEntropy(7, "cut"), lambda *_, huge=huge: huge.copy())
        without = noised(site, SeededEntropy(7, "cut"), no_noise)
        need(np.array_equal(with_noise - without, huge), "noise was cut")


def summed(
    make_study: MakeStudy, changes: dict[str, object], records: Records, compute: Compute | None = None
) -> NDArray[np.float64]:
    study = make_study({**EVERYBODY, "data.max_records_per_patient": 30, "privacy.clipping_norm": 0.1, **changes})
    patients = trainer.number_patients(study, records)
    model = build(study)
    weights = np.zeros(count(model), np.float32)
    return trainer.gradient_sum(study, model, weights, patients, sampling_key=bytes(64), compute=compute)


def summed_in_batches(make_study: MakeStudy, changes: dict[str, object], records: Records) -> NDArray[np.float64]:
    """The engine of deep models, three records at a time."""
    torch.manual_seed(0)
    _, owners = np.unique(records.patients, return_inverse=True)
    return fixed_batches.clipped_sum_in_fixed_batches(
        nn.Linear(3, 1),
        lambda logits, labels: nn.functional.binary_cross_entropy_with_logits(
            logits[:, 0], labels.to(logits.dtype), reduction="none"
        ),
        torch.from_numpy(records.inputs),
        torch.from_numpy(records.labels),
        owners,
        np.arange(len(owners)),
        0.1,
        batch=3,
        device=torch.device("cpu"),
    )


def summed_by_opacus(make_study: MakeStudy, changes: dict[str, object], records: Records) -> NDArray[np.float64]:
    """A table's model by the exact and slow engine."""
    return summed(make_study, changes, records, Compute(engine="opacus"))


def summed_in_taped_batches(make_study: MakeStudy, changes: dict[str, object], records: Records) -> NDArray[np.float64]:
    """The gradient engine, four records at a time."""
    torch.manual_seed(0)
    _, owners = np.unique(records.patients, return_inverse=True)
    return engine.clipped_sum(
        nn.Linear(3, 1),
        lambda logits, labels: nn.functional.binary_cross_entropy_with_logits(
            logits[:, 0], labels.to(logits.dtype), reduction="none"
        ),
        torch.from_numpy(records.inputs),
        torch.from_numpy(records.labels),
        owners,
        np.arange(len(owners)),
        0.1,
        batch=4,
        device=torch.device("cpu"),
    ).total


ENGINES = (summed, summed_in_batches, summed_by_opacus, summed_in_taped_batches)


def people(number: int, records_each: int = 1, scale: float = 1.0) -> Records:
    rng = np.random.default_rng(4)
    owners = np.repeat(np.arange(number), records_each)
    inputs = (scale * rng.normal(size=(owners.size, 3))).astype(np.float32)
    return Records(inputs, np.zeros(owners.size, np.int64), tuple(f"p{owner:02}" for owner in owners))


def one_patient_moves_the_sum_by_at_most_c(make_study: MakeStudy, folder: Path) -> None:
    """With one record or thirty, moderate or extreme, beside others or alone."""
    for sums in ENGINES:
        for others, records, scale in ((0, 1, 1.0), (0, 1, 1e4), (7, 1, 1e4), (7, 30, 1.0)):
            before = people(others)
            extra = Records(np.full((records, 3), -scale, np.float32), np.ones(records, np.int64), ("new",) * records)
            after = Records(
                np.concatenate([before.inputs, extra.inputs]),
                np.concatenate([before.labels, extra.labels]),
                (*before.patients, *extra.patients),
            )
            moved = np.linalg.norm(sums(make_study, {}, after) - (sums(make_study, {}, before) if others else 0.0))
            need(moved <= 0.1, f"one patient of {records} records moves the sum by {moved:.2f}, not 0.1")


def every_patient_counts(make_study: MakeStudy, folder: Path) -> None:
    """The sum is that of its patients, one by one: nobody is left out with a batch that is not full."""
    everybody = people(7)
    for sums in ENGINES:
        alone = [
            sums(make_study, {}, Records(everybody.inputs[at : at + 1], everybody.labels[at : at + 1], (f"p{at:02}",)))
            for at in range(7)
        ]
        need(all(each.any() for each in alone), "a patient was left out")
        whole = sums(make_study, {}, everybody)
        need(np.allclose(whole, np.sum(alone, axis=0), rtol=1e-4, atol=1e-7), "the sum is not that of its patients")


FEATURE = {
    "kind": "number",
    "unit": "1",
    "minimum": 0.0,
    "maximum": 1.0,
    "center": 0.0,
    "scale": 1.0,
    "outside": "clip",
}
TWELVE = {"data.features": [{"name": f"feature-{number}", **FEATURE} for number in range(12)]}


def who_takes_part(make_study: MakeStudy, patients: int, number: int) -> NDArray[np.bool_]:
    """Of patients with a feature each: the sum says who was in."""
    study = make_study(TWELVE)
    ids = tuple(f"p{patient:02}" for patient in range(patients))
    records = Records(np.eye(12, dtype=np.float32)[:patients], np.zeros(patients, np.int64), ids)
    key = SeededEntropy(number, "coins").draw("sampling", 64)
    numbered = trainer.number_patients(study, records)
    total = trainer.gradient_sum(study, build(study), np.zeros(13, np.float32), numbered, sampling_key=key)
    return total[:patients] != 0


def patients_take_part_independently(make_study: MakeStudy, folder: Path) -> None:
    """Each one's chance is q, and the number of them spreads as independent coins make it."""
    runs = 150
    coins = np.array([who_takes_part(make_study, 12, number) for number in range(runs)])
    off = np.abs(coins.sum(0) - runs / 2) / math.sqrt(runs / 4)
    need((off < STANDARD_ERRORS).all(), "a patient's chance is not q")
    spread = ((coins.sum(1) - 6.0) ** 2).sum() / 3.0
    need(abs(spread - runs) < STANDARD_ERRORS * math.sqrt(2 * runs), "the batch's size does not spread like coins")


def nothing_public_depends_on_the_number_of_patients(make_study: MakeStudy, folder: Path) -> None:
    """Coins, divisor and weight: the same for the others with a patient more."""
    for number in range(40):
        with_more = who_takes_part(make_study, 9, number)
        need(np.array_equal(who_takes_part(make_study, 8, number), with_more[:8]), "a chance depends on the data")
    outcomes = []
    for patients in (8, 9):
        site = hospital(make_study, {**NOBODY, **LOCAL}, patients)
        start = np.zeros(site.plan.words, np.float32)
        update = local_steps.private_update(site, start, SeededEntropy(7, "x"), daemon.discrete_gaussian)
        outcomes.append((update, local_steps.weighted_words(site, np.full(4, 0.01), SeededEntropy(7, "y"))))
    need(np.array_equal(outcomes[0][0], outcomes[1][0]), "the divisor depends on the data")
    need(np.array_equal(outcomes[0][1], outcomes[1][1]), "the weight depends on the data")


def exact_epsilon(mu: float, delta: float) -> float:
    """Of the Gaussian mechanism (Balle, Wang 2018, Theorem 8), from below, by bisection."""

    def chance(epsilon: float) -> float:
        return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu))

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) > delta else (low, middle)
    return low


def epsilon_covers_all_attempts(make_study: MakeStudy, folder: Path) -> None:
    """Without sampling the truth is known in closed form: never below it, and near."""
    site = hospital(make_study, {**EVERYBODY, "privacy.noise_multiplier": 5.0})
    for attempts in (1, 2, 5):
        stated = site.plan.epsilon_after(attempts)
        truth = exact_epsilon(math.sqrt(attempts) / 5.0, site.study.privacy.delta)
        need(
            truth * (1 - 1e-6) <= stated <= 1.2 * truth + 0.01, f"epsilon {stated} of {attempts} attempts, not {truth}"
        )


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def batch_norm_is_refused(make_study: MakeStudy, folder: Path) -> None:
    """By both guards: its statistics could not travel, and its gradients belong to no single patient."""
    site = hospital(make_study, EVERYBODY)
    inputs, labels, owners = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), np.arange(2)
    guards = (
        lambda: trainer.gradient_sum(
            site.study, with_batch_norm(), np.zeros(29, np.float32), site.patients, sampling_key=bytes(64)
        ),
        lambda: opacus_engine.clipped_sum(with_batch_norm(), lambda out, _: out[:, 0], inputs, labels, owners, 2, 1.0),
        lambda: engine.Engine(with_batch_norm(), lambda out, _: out[:, 0], torch.device("cpu")),
    )
    for guard in guards:
        try:
            guard()
        except UnsupportedModel as error:
            need("BatchNorm1d" in str(error), "the refusal does not name the layer")
        except NotImplementedError as error:
            raise Noticed("only the library beneath refused it, without the way out") from error
        else:
            raise Noticed("a model with BatchNorm was trained")


LEAVES = {
    wire.OfferReply: {"study_hash", "session", "position", "highest_attempt", "heads", "offer"},
    wire.Upload: {"study_hash", "nonce", "position", "attempt", "round", "attestation", "head", "payload"},
    wire.Vote: {"study_hash", "nonce", "position", "attempt", "vote"},
    wire.Release: {"study_hash", "nonce", "position", "attempt", "released"},
    wire.StateAccepted: {"study_hash", "nonce", "position", "round"},
    wire.Finished: {
        *{"study_hash", "nonce", "position", "round", "attempts_charged", "epsilon_spent_micro", "head"},
        *{"signature", "attestation"},
    },
    wire.Refusal: {"study_hash", "nonce", "position", "reason"},
}
"""All that a hospital's messages have room for: of its patients, the payload and nothing else. What is
``released`` are shares and seeds of pads."""


def no_message_has_room_for_a_metric(make_study: MakeStudy, folder: Path) -> None:
    for kind in wire.FROM_HOSPITAL:
        need({field.name for field in fields(kind)} == LEAVES.get(kind), f"{kind.__name__} carries something else")


CHECKS = [
    noise_has_the_stated_scale,
    every_round_and_step_is_noised,
    noise_is_fresh,
    noise_has_the_stated_shape,
    noise_is_never_cut,
    one_patient_moves_the_sum_by_at_most_c,
    every_patient_counts,
    patients_take_part_independently,
    nothing_public_depends_on_the_number_of_patients,
    epsilon_covers_all_attempts,
    batch_norm_is_refused,
    no_message_has_room_for_a_metric,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_production_keeps_the_promise(check, make_study: MakeStudy, tmp_path: Path) -> None:
    check(make_study, tmp_path)


# ------------------------------------------------------------------------------------------------------------------- bugs


@dataclass(frozen=True)
class Change:
    """In the source of ``owner.name``: ``old``, which stands there once, becomes ``new``."""

    owner: object
    name: str
    old: str
    new: str

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        function = getattr(self.owner, self.name)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.name} no longer says {self.old!r}: plant the bug anew"
        scope: dict[str, object] = {}
        changed = "from __future__ import annotations\n" + source.replace(self.old, self.new)
        exec(compile(changed, f"<planted in {self.name}>", "exec"), function.__globals__, scope)
        monkeypatch.setattr(self.owner, self.name, scope[self.name])


def in_sum(old: str, new: str) -> list[Change]:
    return [Change(local_steps, "noised_sum", old, new)]


SCALED = "lambda: noise(noise_key, plan.noise_sd, plan.words)"
FRESH = 'entropy.draw("noise", 32)'
TAKEN = "integers += drawn.take()"
RESULT = "clipped: NDArray[np.float64] = (factors @ means).numpy()"
COINS = "sampled = poisson_mask(sampling_key[:32], patients.count, study.privacy.sampling_rate)"
STORED = '(lambda f: f.read_bytes() if f.exists() else (f.write_bytes(k := entropy.draw("noise", 32)), k)[1])'
SHUFFLED = "sampled = Keystream(sampling_key[:32]).words(patients.count).argsort().argsort() < patients.count // 2"
WEIGHTED = (
    "sampled = np.array([poisson_mask(sampling_key[:32], patients.count, (0.1, 0.9)[i % 2])[i] "
    "for i in range(patients.count)])"
)


@dataclass(frozen=True)
class FloatingMetric(wire.Message):
    """An upload with a loss in it."""

    KIND = 99
    loss: Annotated[int, object()]


def rounded_float_noise(key: bytes, sd: float, size: int) -> NDArray[np.int64]:
    seed = int.from_bytes(key, "big")
    return np.rint(np.random.default_rng(seed).normal(0.0, sd, size)).astype(np.int64)


NO_REFUSAL = Change(
    opacus_engine,
    "refuse_mixing",
    "elif isinstance(module, nn.modules.batchnorm._BatchNorm):",
    "elif False:",
)
NO_LIST = Change(trainer, "sums_of", "require_separable(model)", "pass")

Plant = list[Change] | Callable[[pytest.MonkeyPatch], None]

BUGS: dict[str, tuple[Callable[[MakeStudy, Path], None], Plant]] = {
    "noise divided by the root of the patients": (
        noise_has_the_stated_scale,
        in_sum(SCALED, SCALED.replace("noise_sd", "noise_sd / approved.patients.count ** 0.5")),
    ),
    "noise divided by the batch": (
        noise_has_the_stated_scale,
        in_sum(SCALED, SCALED.replace("noise_sd", "noise_sd / (approved.study.privacy.sampling_rate * 8 + 1)")),
    ),
    "noise 5 percent low, in the sampler": (
        noise_has_the_stated_scale,
        lambda patch: patch.setattr(
            daemon, "discrete_gaussian", lambda k, sd, n: noise.discrete_gaussian(k, 0.95 * sd, n)
        ),
    ),
    "noise 5 percent low, in the plan": (
        noise_has_the_stated_scale,
        [Change(plan, "_mechanisms", "needed_sd = ", "needed_sd = 0.95 * ")],
    ),
    "noise once in several rounds": (
        every_round_and_step_is_noised,
        in_sum(
            TAKEN, "n = vars(approved).setdefault('n', []); n.append(1); integers += drawn.take() * (len(n) % 3 == 1)"
        ),
    ),
    "noise once an epoch of local steps": (
        every_round_and_step_is_noised,
        [
            Change(
                local_steps,
                "private_update",
                "entropy, noise)\n",
                "entropy, lambda *a: np.zeros(a[2], np.int64) if (at - start).any() else noise(*a))\n",
            )
        ],
    ),
    "noise seeded": (noise_is_fresh, in_sum(FRESH, 'b"the study says 42".ljust(32)')),
    "noise seeded by the attempt's state": (
        noise_is_fresh,
        in_sum(FRESH, '__import__("hashlib").sha256(weights.tobytes()).digest()'),
    ),
    "random numbers resumed from a file": (
        noise_is_fresh,
        in_sum(FRESH, f'{STORED}(approved.folder / "generator.bin")'),
    ),
    "noise key kept in memory": (
        noise_is_fresh,
        in_sum(FRESH, f"vars(approved).setdefault('key', {FRESH})"),
    ),
    "noise before the clip": (
        noise_has_the_stated_scale,
        in_sum(
            TAKEN,
            "integers += drawn.take(); bound = approved.study.privacy.clipping_norm * 2.0 ** plan.noise_exponent; "
            "integers = np.rint(integers * min(1.0, bound / max(1.0, np.linalg.norm(integers)))).astype(np.int64)",
        ),
    ),
    "saturation after the noise": (
        noise_is_never_cut,
        in_sum(TAKEN, f"{TAKEN}; np.clip(integers, -plan.noise_limit, plan.noise_limit, out=integers)"),
    ),
    "a batch clipped instead of a patient": (
        one_patient_moves_the_sum_by_at_most_c,
        [
            Change(
                opacus_engine,
                "_clip_and_sum",
                RESULT,
                "mean = means.mean(0); clipped = (len(means) * mean * min(1.0, bound / float(mean.norm()))).numpy()",
            )
        ],
    ),
    "clipped layer by layer without the root of their number": (
        one_patient_moves_the_sum_by_at_most_c,
        [
            Change(
                opacus_engine,
                "_clip_and_sum",
                RESULT,
                "parts = torch.split(means, [g.shape[1] for g in gradients], 1); clipped = torch.cat([(p * (bound / "
                "p.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(0) for p in parts]).numpy()",
            )
        ],
    ),
    "bias not clipped": (
        one_patient_moves_the_sum_by_at_most_c,
        [
            Change(
                opacus_engine,
                "_clip_and_sum",
                RESULT,
                f"{RESULT}; clipped[-1] = float(means[:, -1].sum())",
            )
        ],
    ),
    "a batch clipped instead of a patient, in the gradient engine": (
        one_patient_moves_the_sum_by_at_most_c,
        [Change(engine, "clip_factors", "bound / norms", "len(norms) * bound / norms.sum()")],
    ),
    "clipped by the largest layer, in the gradient engine": (
        one_patient_moves_the_sum_by_at_most_c,
        [Change(engine._Total, "add", ".sum(0).sqrt_()", ".amax(0).sqrt_()")],
    ),
    "bias not clipped, in the gradient engine": (
        one_patient_moves_the_sum_by_at_most_c,
        [
            Change(
                engine._Total,
                "add",
                "add_clipped(self._totals[:, at], factors, segments)",
                "add_clipped(self._totals[:, at], factors if weight.dim() > 1 else torch.ones_like(factors), segments)",
            )
        ],
    ),
    "records clipped instead of patients, in the gradient engine": (
        one_patient_moves_the_sum_by_at_most_c,
        [Change(engine, "_batches", "new = owners[1:] != owners[:-1]", "new = np.ones(len(owners) - 1, bool)")],
    ),
    "a patient of many batches not clipped": (
        one_patient_moves_the_sum_by_at_most_c,
        [Change(engine._Total, "_add_part", "self._open * clip_factors(norm, self._bound)", "self._open")],
    ),
    "a patient of many batches counts twice": (
        one_patient_moves_the_sum_by_at_most_c,
        [Change(engine, "_batches", "goes_on=at + batch < records", "goes_on=False")],
    ),
    "patient unit ignored": (
        one_patient_moves_the_sum_by_at_most_c,
        [Change(trainer, "number_patients", 'if study.privacy.unit == "record":', "if True:")],
    ),
    "a patient cut by a batch's end counts twice": (
        one_patient_moves_the_sum_by_at_most_c,
        [Change(fixed_batches, "clipped_sum_in_fixed_batches", "goes_on=bool(goes_on)", "goes_on=False")],
    ),
    "shuffled batches for Poisson sampling": (
        patients_take_part_independently,
        [Change(trainer, "chosen_rows", COINS, SHUFFLED)],
    ),
    "a weighted sampler": (patients_take_part_independently, [Change(trainer, "chosen_rows", COINS, WEIGHTED)]),
    "sampling rate from the data": (
        nothing_public_depends_on_the_number_of_patients,
        [
            Change(
                trainer,
                "chosen_rows",
                "patients.count, study.privacy.sampling_rate)",
                "patients.count, min(1.0, 4 / patients.count))",
            )
        ],
    ),
    "divisor from the data": (
        nothing_public_depends_on_the_number_of_patients,
        [Change(local_steps, "expected_patients", "approved.nominal_patients", "approved.patients.count")],
    ),
    "hospitals weighted by their true number of patients": (
        nothing_public_depends_on_the_number_of_patients,
        [
            Change(
                local_steps,
                "weighted_words",
                "update * (approved.nominal_patients",
                "update * (approved.patients.count",
            )
        ],
    ),
    "last batch dropped": (
        every_patient_counts,
        [
            Change(
                fixed_batches,
                "clipped_sum_in_fixed_batches",
                "range(0, len(rows), batch)",
                "range(0, len(rows) - len(rows) % batch, batch)",
            )
        ],
    ),
    "last batch dropped, in the gradient engine": (
        every_patient_counts,
        [
            Change(
                engine,
                "_batches",
                "range(0, len(owners), batch)",
                "range(0, len(owners) - len(owners) % batch, batch)",
            )
        ],
    ),
    "last batch dropped, in the exact engine": (
        every_patient_counts,
        [Change(opacus_engine, "_whole_patients", "yield slice(start, len(owners))", "yield from ()")],
    ),
    "empty batch skipped": (
        noise_has_the_stated_scale,
        in_sum(TAKEN, f"{TAKEN} if integers.any() else 0"),
    ),
    "epsilon not composed": (
        epsilon_covers_all_attempts,
        [Change(plan.Plan, "bounds_after", "attempts, self.delta)", "min(attempts, 1), self.delta)")],
    ),
    "a delta for every attempt": (
        epsilon_covers_all_attempts,
        [Change(plan.Plan, "bounds_after", "self.delta)", "min(0.9, attempts * self.delta))")],
    ),
    "float noise, rounded": (
        noise_has_the_stated_shape,
        lambda patch: patch.setattr(daemon, "discrete_gaussian", rounded_float_noise),
    ),
    "a float sum": (
        noise_has_the_stated_shape,
        in_sum(
            "quantize(total, plan.noise_exponent, plan.noise_limit, out=total.view(np.int64))",
            "np.ldexp(total, plan.noise_exponent)",
        ),
    ),
    "BatchNorm let through by the engine": (batch_norm_is_refused, [NO_REFUSAL]),
    "BatchNorm let through by both guards": (batch_norm_is_refused, [NO_REFUSAL, NO_LIST]),
    "a raw metric": (
        no_message_has_room_for_a_metric,
        lambda patch: patch.setattr(wire, "FROM_HOSPITAL", (*wire.FROM_HOSPITAL, FloatingMetric)),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(
    bug: str, make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, plant = BUGS[bug]
    if isinstance(plant, list):
        for change in plant:
            change.plant(monkeypatch)
    else:
        plant(monkeypatch)
    with pytest.raises(Noticed):
        check(make_study, tmp_path)


# ------------------------------------------------------------------------------------------- saturation, for any numbers

WORDS = st.lists(st.integers(-(2**45), 2**45), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sums=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), noises=WORDS)
def test_noise_is_added_whole_to_a_saturated_sum(sums, noises, make_study: MakeStudy, monkeypatch) -> None:
    """Shares of noise that were cut would not add up to what the secure sum promises; a wrap only spoils the model."""
    site = hospital(make_study, EVERYBODY)
    monkeypatch.setattr(local_steps, "gradient_sum", lambda *_, **__: np.array(sums))
    without = noised(site, SeededEntropy(7, "x"), no_noise)
    assert np.abs(without).max() <= site.plan.noise_limit
    total = noised(site, SeededEntropy(7, "x"), lambda *_: np.array(noises))
    assert (total - without).tolist() == noises
