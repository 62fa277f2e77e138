"""The mechanism and one-run audits: what they say of sound code, and that planted faults do not pass.

All seeds are fixed. Counts of runs (caught, false alarms) are of production's noise on production's grid; masks and
clipping are in those tests that take the real path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

import medfed.simulations.audits.real_path as real_path
from medfed.errors import MedfedError, PrivacyError
from medfed.privacy.gradients import engine
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.secagg.masks import Masker
from medfed.seams import system_seams
from medfed.simulations.audits import command, mechanism, one_run
from medfed.simulations.audits.bounds import (
    any_shape_lower_bound,
    gaussian_epsilon,
    highest_rate,
    mu_lower_bound,
    one_run_lower_bound,
)
from medfed.simulations.audits.draws import DIRECTION, Sample, observe
from medfed.simulations.audits.mechanism import judge, mechanism_audit, verdict
from medfed.simulations.audits.real_path import RealPath, Shape, audited_study
from medfed.simulations.audits.setting import Setting
from medfed.simulations.cli import main
from medfed.simulations.threads import one_torch_thread
from medfed.study import Cohort

LOCAL = mechanism.cases(2.0, quick=True)[0]
SHARES = mechanism.cases(2.0, quick=True)[1]
SAMPLED, RECOVERED = mechanism.cases(2.0, quick=False)[2:]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def setting(seed: int = 1) -> Setting:
    return Setting(system_seams(), seed, quick=True)


# ------------------------------------------------------------------------------------------------------------ the bounds


@pytest.mark.parametrize(
    ("mu", "rate", "epsilon"),
    [  # dp_accounting 0.6.0, PLD at interval 1e-5, delta 1e-5
        (1.0, 1.0, 4.377178),
        (1.0, 0.5, 3.533998),
        (2.0, 1.0, 9.997256),
        (2.0, 0.5, 8.981456),
        (2.0, 0.25, 7.953870),
    ],
)
def test_epsilon_of_one_event_is_exact(mu: float, rate: float, epsilon: float) -> None:
    assert gaussian_epsilon(mu, 1e-5, rate) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "epsilon"),
    # printed in arXiv:2305.08846v1, Appendix D (rounded) and section 7 (cut off)
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_one_run_bound_is_the_papers(canaries: int, guesses: int, correct: int, delta: float, epsilon: float) -> None:
    assert one_run_lower_bound(canaries, guesses, correct, delta, 0.95) == pytest.approx(epsilon, abs=1e-3)


def test_bounds_are_below_the_truth_as_often_as_they_say() -> None:
    """600 tests of 500 draws at the true rates: the bounds exceed the truth in at most 5% of them, and are not empty."""
    rng, truth = np.random.default_rng(3), gaussian_epsilon(1.0, 1e-5)
    error = 0.5 * math.erfc(0.5 / math.sqrt(2))
    counts = rng.binomial(500, error, size=(600, 2)).tolist()
    assert np.mean([highest_rate(alarms, 500, 0.95) < error for alarms, _ in counts]) < 0.05
    bounds = np.array([mu_lower_bound(alarms, misses, 500, 0.95) for alarms, misses in counts])
    assert np.mean(bounds > 1.0) < 0.05
    assert np.median(bounds) > 0.7
    assert max(any_shape_lower_bound(alarms, misses, 500, 0.95, 1e-5) for alarms, misses in counts) < truth


# -------------------------------------------------------------------------------------------------- the mechanism audit


def test_mechanism_audit_by_the_real_path_bounds_epsilon_between_93_and_100_percent() -> None:
    """20,000 draws a side at mu 2, confidence 95%, each through clipping, rounding, noise, masks and the opened sum."""
    path = RealPath(audited_study(LOCAL), setting(), "test")
    result = judge(observe(path, LOCAL, mechanism.DRAWS, lambda share: None), path.plan, LOCAL)
    assert verdict(result) == ([], [])
    assert result["mu"] == pytest.approx(2.0)
    assert 0.93 <= result["lower_bound"] / result["claimed_epsilon"] <= 1.0
    assert result["draws_a_side"] == 20_000
    assert result["accounted_epsilon"] >= result["claimed_epsilon"]


def quick_sample(seed: int, share: float) -> Sample:
    """20,000 draws a side without the masks: production's noise at a share of its size, and the patient's clipped words."""
    plan, words = PLAN, 4
    keys = np.random.default_rng(seed)
    noise = [
        discrete_gaussian(keys.bytes(32), share * plan.noise_sd, mechanism.DRAWS * words).reshape(-1, words)
        for _ in range(2)
    ]
    return Sample(noise[0].astype(float), (noise[1] + PATIENT).astype(float), 0, 1, 0, 1, True)


PLAN = RealPath(audited_study(LOCAL), setting(), "plan").plan
CLIPPED = 2.0**PLAN.noise_exponent / (1 + engine.CLIPPING_MARGIN)
PATIENT = np.rint(CLIPPED * DIRECTION / np.linalg.norm(DIRECTION)).astype(np.int64)


def alarms(runs: int, share: float, by_bound_alone: bool = False) -> int:
    found = 0
    for seed in range(runs):
        result = judge(quick_sample(seed, share), PLAN, LOCAL)
        found += result["lower_bound"] > result["claimed_epsilon"] if by_bound_alone else bool(verdict(result)[0])
    return found


def test_vectorised_draws_are_those_of_the_real_path() -> None:
    path = RealPath(audited_study(LOCAL), setting(), "test", lambda key, sd, size: np.zeros(size, np.int64))
    seen = observe(path, LOCAL, 50, lambda share: None)
    assert not seen.without.any()
    assert np.abs(seen.present - PATIENT).max() <= 1


def test_mechanism_audit_catches_noise_five_percent_low_and_raises_no_false_alarm() -> None:
    """A share of the soak test's runs. False-alarm rate by design: 0.3% by the bound, 1e-4 by each of the other tests."""
    assert alarms(8, 1.0) == 0
    assert alarms(8, 0.95) == 8


@pytest.mark.soak
def test_mechanism_audit_in_a_hundred_runs() -> None:
    """At most 1 of 100 false alarms, at least 99 of 100 shortfalls of 5% caught, by the bound on epsilon alone as well."""
    assert alarms(100, 1.0) <= 1
    assert alarms(100, 0.95) >= 99
    assert alarms(100, 0.95, by_bound_alone=True) >= 99


Plant = Callable[[pytest.MonkeyPatch], None]


def small_verdict(shape: Shape, draws: int = 1000) -> tuple[str, str]:
    path = RealPath(audited_study(shape), setting(), "planted")
    broken, blind = verdict(judge(observe(path, shape, draws, lambda share: None), path.plan, shape))
    return " ".join(broken), " ".join(blind)


def planted_noise(change: Callable[[np.ndarray, bytes, float], np.ndarray]) -> Plant:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        original = real_path.noised_sum

        def noised_sum(hospital, weights, entropy, noise):
            position = hospital.position.to_bytes(1)
            return original(
                hospital, weights, entropy, lambda key, sd, size: change(noise(key, sd, size), position + key, sd)
            )

        monkeypatch.setattr(real_path, "noised_sum", noised_sum)

    return plant


def without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    mask_into = Masker.mask_into
    monkeypatch.setattr(
        Masker, "mask_into", lambda self, out, vector, streams, signs: mask_into(self, out, vector, [], [])
    )


def same_pad_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt with the streams of the party's first."""
    mask_into, first = Masker.mask_into, {}

    def again(self, out, vector, streams, signs) -> None:
        mask_into(self, out, vector, first.setdefault(id(self), streams), signs)

    monkeypatch.setattr(Masker, "mask_into", again)


def unclipped_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the clipping norm gets through."""
    clip = engine.clip_factors
    monkeypatch.setattr(engine, "clip_factors", lambda norms, bound: clip(norms, 2 * bound))


def records_for_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is clipped for itself: a patient of two records counts twice."""
    batches = engine._batches
    monkeypatch.setattr(engine, "_batches", lambda owners, *rest: batches(np.arange(len(owners)), *rest))


def everybody_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    from medfed.client import trainer

    monkeypatch.setattr(trainer, "poisson_mask", lambda key, population, rate: np.ones(population, np.bool_))


def noise_of_drop_outs_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares sized as if nobody could drop out."""
    everybody = property(lambda cohort: cohort.hospitals - cohort.colluders)
    monkeypatch.setattr(Cohort, "honest_survivors", everybody)


def seldom_fresh(noise: np.ndarray, key: bytes, sd: float) -> np.ndarray:
    """One draw for all attempts of a hospital."""
    return discrete_gaussian(key[:1] * 32, sd, len(noise))


def one_word_bare(noise: np.ndarray, key: bytes, sd: float) -> np.ndarray:
    return np.where(np.arange(len(noise)) % 4 == 1, 0, noise)


def one_draw_for_words(noise: np.ndarray, key: bytes, sd: float) -> np.ndarray:
    """Neighboring words share their noise."""
    return np.repeat(noise[::2], 2)[: len(noise)]


PLANTED = {
    "noise/sqrt(hospitals) in local mode": (
        LOCAL,
        planted_noise(lambda noise, key, sd: np.rint(noise / 3**0.5).astype(int)),
    ),
    "no noise at one hospital of three": (SHARES, planted_noise(lambda noise, key, sd: noise * (key[0] != 1))),
    "noise divided by the batch": (LOCAL, planted_noise(lambda noise, key, sd: noise // 50)),
    "noise is seeded": (LOCAL, planted_noise(seldom_fresh)),
    "a word in four has no noise": (LOCAL, planted_noise(one_word_bare)),
    "words share their noise": (LOCAL, planted_noise(one_draw_for_words)),
    "noise of drop-outs counted on": (RECOVERED, noise_of_drop_outs_counted),
    "no mask": (SHARES, without_masks),
    "one pad for all attempts": (SHARES, same_pad_again),
    "clipped to twice the norm": (LOCAL, unclipped_patients),
    "patient unit ignored": (LOCAL, records_for_patients),
    "everybody sampled for Poisson": (SAMPLED, everybody_sampled),
}


@pytest.mark.parametrize("name", PLANTED)
def test_mechanism_audit_catches_planted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1,000 draws a side: these faults are gross."""
    shape, plant = PLANTED[name]
    plant(monkeypatch)
    assert small_verdict(shape)[0]


@pytest.mark.parametrize("shape", [LOCAL, SHARES, SAMPLED, RECOVERED])
def test_mechanism_audit_of_few_draws_finds_nothing_in_sound_code(shape: Shape) -> None:
    assert small_verdict(shape)[0] == ""


def test_mechanism_audit_says_where_it_has_gone_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patient who hardly moves the sum breaks no promise, and could not show one broken."""
    clip = engine.clip_factors
    monkeypatch.setattr(engine, "clip_factors", lambda norms, bound: 0.1 * clip(norms, bound))
    broken, blind = small_verdict(LOCAL)
    assert not broken
    assert "lower bound" in blind


# ---------------------------------------------------------------------------------------------------- the one-run audit


def test_one_run_audit_stays_below_the_claim_and_its_control_does_not() -> None:
    result = one_run.one_run_audit(setting(), canaries=1000)
    assert result["violations"] == result["weak"] == []
    assert 0.0 < result["lower_bound"] < result["claimed_epsilon"] == pytest.approx(3.0, abs=1e-3)
    assert result["control"]["lower_bound"] > result["control"]["claimed_epsilon"]


def test_one_run_audit_finds_noise_that_is_missing() -> None:
    tenth = one_run.one_run_audit(
        setting(), canaries=1000, noise=lambda key, sd, size: discrete_gaussian(key, sd / 10, size)
    )
    assert "above the claim" in tenth["violations"][0]


# ------------------------------------------------------------------------------------------------------------ the command


def small_mechanism(found: Setting) -> mechanism.MechanismResult:
    return mechanism_audit(replace(found, quick=True), draws=1000)


@pytest.fixture
def small_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 draws and canaries: enough to say nothing false, too few for the lower bound to come close."""
    monkeypatch.setattr(mechanism, "LEAST_SHARE", {})
    real = command.load_audit
    monkeypatch.setattr(
        command,
        "load_audit",
        lambda name: replace(real(name), run=small_mechanism) if name == "mechanism" else real(name),
    )


@pytest.mark.usefixtures("small_audits")
def test_audit_command_writes_json_and_plot(tmp_path, capsys) -> None:
    for _ in range(2):  # an earlier audit is replaced
        assert main(["audit", "--only", "mechanism", "--seed", "1", "--json", "--out", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out.split("\n{")[0])
    assert {"claimed_epsilon", "lower_bound", "mu", "confidence"} <= told["mechanism"].keys()
    assert told["mechanism"]["confidence"] == 0.95
    assert "from seed 1" in told["stamps"][1]
    kept = json.loads((tmp_path / "out" / "result.json").read_text())
    assert kept["mechanism"] == told["mechanism"]
    assert (tmp_path / "out" / "audit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("key", "code"), [("violations", "MF-710"), ("weak", "MF-711")])
def test_audit_command_fails_once_all_is_told(key: str, code: str, tmp_path, capsys, monkeypatch) -> None:
    result = {"violations": [], "weak": [], key: ["the thing found"]}
    monkeypatch.setattr(
        command,
        "load_audit",
        lambda name: command.Audit(lambda given: result, lambda _: [("what", "3")], lambda *_: None, 1.0),
    )
    assert main(["audit", "--only", "one-run", "--out", str(tmp_path / "out")]) == 4
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith(code)  # after the log
    assert "the thing found" in told.err
    assert "the thing found" in told.out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["one_run"] == result


def test_audit_errors_are_of_their_kinds() -> None:
    ran = {"violations": ["a"], "weak": ["b"]}
    with pytest.raises(PrivacyError, match="MF-710 a"):
        command._judge({"mechanism": ran})
    with pytest.raises(MedfedError, match="MF-711 b"):
        command._judge({"mechanism": ran | {"violations": []}})
