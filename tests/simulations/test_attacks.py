"""Membership inference and gradient inversion: the attacks succeed where a defence is off, and fail where it is on.

All seeds are fixed, so that nothing here fails by chance; how often another seed would is said where it matters.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from medfed.privacy.secagg.masks import Masker
from medfed.seams import system_seams
from medfed.simulations.audits import membership
from medfed.simulations.audits.inversion import InversionResult, inversion_audit, inversion_plot, inversion_rows
from medfed.simulations.audits.membership import MembershipResult, Trained
from medfed.simulations.audits.membership_attacks import ATTACKS, GRID, area, attack
from medfed.simulations.audits.setting import Setting
from medfed.simulations.rehearsal import no_noise
from medfed.study import Study

SETTING = Setting(system_seams(), seed=1, quick=True)


# ---------------------------------------------------------------------------------------------------------- membership


@pytest.fixture(scope="module")
def trained() -> tuple[Study, dict[str, Trained], MembershipResult]:
    """The quick audit once, with what its two arms trained."""
    kept: dict[str, Trained] = {}
    real = membership.train

    def keep(setting: Setting, arm: str, *rest: object) -> Trained:
        kept[arm] = real(setting, arm, *rest)
        return kept[arm]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "train", keep)
        result = membership.membership_audit(SETTING)
    return membership.audited(SETTING)[0], kept, result


def test_membership_is_not_told_at_epsilon_3_and_is_without_noise(
    trained: tuple[Study, dict[str, Trained], MembershipResult],
) -> None:
    """On real patients, or invented ones where those are missing; another seed in 100 would fail."""
    study, _, result = trained
    assert (result["violations"], result["weak"]) == ([], [])
    assert study.privacy.epsilon == result["claimed_epsilon"] == 3.0
    assert result["auc"] <= 0.55 < 0.65 <= result["auc_control"]
    assert result["auc_upper"] < result["auc_limit"] < 0.75
    assert result["auc_control_lower"] > result["auc_upper"]
    assert result["model_auc"] > 0.65  # noise has not made the model useless, which would prove nothing
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_membership_audit_notices_that_noise_is_missing(
    trained: tuple[Study, dict[str, Trained], MembershipResult],
) -> None:
    study, arms, _ = trained
    for quick in (True, False):
        result = membership.compare(study, arms["control"], arms["control"], "", quick=quick)
        assert len(result["violations"]) == 1
        assert "AUC" in result["violations"][0]


def test_membership_audit_says_when_its_attack_has_gone_blind(
    trained: tuple[Study, dict[str, Trained], MembershipResult],
) -> None:
    study, arms, _ = trained
    result = membership.compare(study, arms["private"], arms["private"], "", quick=True)
    assert result["violations"] == []
    assert len(result["weak"]) == 1


def test_membership_uses_invented_patients_where_real_ones_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDFED_DATA", str(tmp_path))
    study, _ = membership.audited(SETTING)
    records, data = membership.audited_patients(SETTING, study)
    assert data.startswith("invented")
    assert records.inputs.shape == (400, study.data.inputs)
    assert 0.3 < records.labels.mean() < 0.7


def _shadows(shift: float, models: int = 40, patients: int = 300) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Logits that are normal about each patient's own mean, those of members higher by ``shift``."""
    draws = np.random.default_rng(3)
    inside = draws.random((models, patients)) < 0.5
    return draws.normal(0, 3, patients) + draws.normal(size=(models, patients)) + shift * inside, inside


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_finds_nothing_where_there_is_nothing(name: str) -> None:
    """Within 3.5 of its own standard errors of 1/2: it would be missed once in 2,000."""
    found = attack(name, *_shadows(0.0))
    assert abs(found.auc - 0.5) < 3.5 * found.error
    assert found.error == pytest.approx(math.sqrt(1 / 12 * 2 / 150 / 40), rel=0.05)


@pytest.mark.parametrize(("name", "expected"), [("LiRA", 0.70), ("LiRA, common shift", 0.74)])
def test_shadow_models_find_what_the_loss_alone_does_not(name: str, expected: float) -> None:
    """The best there is, who knows the means, has Phi(1 / sqrt 2) = 0.76."""
    shadows = _shadows(1.0)
    assert expected < attack(name, *shadows).auc < norm.cdf(1 / math.sqrt(2)) + 0.02
    assert attack("loss threshold", *shadows).auc < 0.62


def test_curve_and_share_found_are_those_of_two_normal_laws() -> None:
    found = attack("loss threshold", *_normal_pair(2.0))
    np.testing.assert_allclose(found.curve[1:], norm.cdf(norm.ppf(GRID[1:]) + 2.0), atol=0.03)
    assert found.found == pytest.approx(norm.cdf(norm.ppf(0.001) + 2.0), abs=0.03)


def _normal_pair(distance: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    draws = np.random.default_rng(4)
    inside = np.arange(2000) < 1000
    return draws.normal(size=(8, 2000)) + distance * inside, np.broadcast_to(inside, (8, 2000))


def test_area_counts_pairs_and_ties_half() -> None:
    positive, negative = np.array([3.0, 2.0, 2.0, 1.0]), np.array([2.0, 0.0, 2.0])
    pairs = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    found, variance = area(positive, negative)
    assert found == pytest.approx(pairs.mean())
    by_hand = pairs.mean(1).var(ddof=1) / 4 + pairs.mean(0).var(ddof=1) / 3  # DeLong's structural components
    assert variance == pytest.approx(by_hand)


# ----------------------------------------------------------------------------------------------------------- inversion


@pytest.fixture(scope="module")
def rebuilt() -> InversionResult:
    return inversion_audit(SETTING)


def test_films_are_rebuilt_from_the_bare_update_only(rebuilt: InversionResult) -> None:
    """At another seed it would fail once in 1,000."""
    result = rebuilt
    assert (result["violations"], result["weak"]) == ([], [])
    assert result["control_similarity"] > 0.999
    assert result["control"]["percentile"] == 1.0
    for name in ("upload", "sum", "weaker_sum"):
        assert abs(result[name]["similarity"]) < 0.05
        assert abs(result[name]["chance"]) < 0.01
    assert result["upload"]["percentile"] == pytest.approx(0.5, abs=0.13)  # 3.1 standard errors
    assert 0.7 < result["sum"]["percentile_limit"] < result["weaker_sum"]["percentile_limit"] < 0.96
    assert {len(base64.b64decode(picture)) for picture in result["pictures"].values()} == {28 * 28}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_inversion_audit_notices_that_noise_is_missing() -> None:
    result = inversion_audit(SETTING, noise=no_noise)
    assert [what.split(":")[0] for what in result["violations"]] == [
        "films are rebuilt from the sum at epsilon 3",
        "films are rebuilt from the sum at epsilon 8",
    ]
    assert result["sum_similarity"] > 0.999


def test_inversion_audit_notices_that_masks_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(self: Masker, masked: NDArray[np.uint32], vector: NDArray[np.int64], *_: object) -> None:
        np.copyto(masked, vector, casting="unsafe")

    monkeypatch.setattr(Masker, "mask_into", bare)
    result = inversion_audit(SETTING)
    assert [what.split(":")[0] for what in result["violations"]] == ["films are rebuilt from an upload"]
    assert result["upload_similarity"] > 0.999


def test_inversion_uses_invented_films_where_real_ones_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDFED_DATA", str(tmp_path))
    result = inversion_audit(SETTING)
    assert result["data"].startswith("invented")
    assert (result["violations"], result["weak"]) == ([], [])


def test_reports_fit_and_plots_are_drawn_from_json(
    trained: tuple[Study, dict[str, Trained], MembershipResult], rebuilt: InversionResult
) -> None:
    from matplotlib.figure import Figure

    members, films = json.loads(json.dumps(trained[2])), json.loads(json.dumps(rebuilt))
    rows = [*membership.membership_rows(members), *inversion_rows(films)]
    assert all(len(what) + len(figure) <= 100 and (what + figure).isascii() for what, figure in rows)
    axes = Figure(figsize=(6.4, 3.2)).subplots(2)
    membership.membership_plot(axes[0], members)
    inversion_plot(axes[1], films)
    assert [len(axes[0].lines), len(axes[1].images)] == [4, len(films["pictures"])]
