"""Sliding over a scan, keeping the surest of what lies together, and the free-response metric against an example by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.errors import ConfigError
from medfed.models.detection import RATES, Finding, free_response, slide, suppress
from medfed.simulations.image_cohorts import SCAN, invented_scan

NOTHING = np.zeros((0, 3))


def brightest(patches: NDArray[np.float32]) -> NDArray[np.float64]:
    return patches[:, 0, 1:-1, 1:-1, 1:-1].mean((1, 2, 3)).astype(np.float64)


def test_patches_cover_the_scan_to_its_ends() -> None:
    places, scores = slide(lambda patches: np.ones(len(patches)), np.zeros((5, 6, 9), np.float32), (3, 3, 4), 2)
    assert len(places) == len(scores) == 2 * 3 * 4
    assert places.min(0).tolist() == [1.0, 1.0, 1.5]
    assert places.max(0).tolist() == [3.0, 4.0, 6.5]


def test_score_of_a_patch_is_of_what_lies_round_its_middle() -> None:
    scan = np.zeros((7, 7, 7), np.float32)
    scan[4, 2, 3] = 1.0
    places, scores = slide(lambda patches: patches[:, 0, 1, 1, 1].astype(np.float64), scan, (3, 3, 3), 1)
    assert places[scores.argmax()].tolist() == [4.0, 2.0, 3.0]
    assert scores.sum() == 1.0


def test_scan_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="MF-203 the scan is smaller"):
        slide(brightest, np.zeros((4, 9, 9), np.float32), (5, 5, 5), 2)


def test_of_findings_that_lie_together_the_surest_is_kept() -> None:
    places = np.array([[0, 0, 0], [0, 0, 2], [0, 0, 5], [0, 0, 4]], np.float64)
    kept = suppress(places, np.array([0.5, 0.9, 0.8, 0.85]), 2.5)
    assert kept == [Finding((0.0, 0.0, 2.0), 0.9), Finding((0.0, 0.0, 5.0), 0.8)]


def test_free_response_of_an_example_by_hand() -> None:
    """Four scans, four things. By falling score: hit, false, hit, (a second hit of one thing counts neither way), false, hit; one
    thing is never found. Sensitivity 1/4 without a false positive, 2/4 with one (1/4 a scan), 3/4 with two (1/2 a scan)."""
    there = np.array([[5.0, 5.0, 5.0]])
    findings = [
        [Finding((5.0, 5.0, 6.0), 0.9), Finding((5.0, 5.0, 4.0), 0.65)],
        [Finding((0.0, 0.0, 0.0), 0.8), Finding((5.0, 5.0, 5.0), 0.7)],
        [Finding((9.0, 9.0, 9.0), 0.6), Finding((5.0, 6.0, 5.0), 0.5)],
        [],
    ]
    found = free_response(findings, [there] * 4, within=2.0)
    assert found is not None
    assert RATES == (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    assert found.sensitivities == (0.25, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75)
    assert found.mean == pytest.approx((0.25 + 0.5 + 5 * 0.75) / 7)


def test_findings_of_one_score_are_taken_together() -> None:
    findings = [[Finding((5.0, 5.0, 5.0), 0.5), Finding((0.0, 0.0, 0.0), 0.5)]]
    found = free_response(findings, [np.array([[5.0, 5.0, 5.0]])], within=1.0)
    assert found is not None and found.sensitivities == (0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)


def test_scan_without_anything_has_false_positives_only() -> None:
    findings = [[Finding((1.0, 1.0, 1.0), 0.9)], [Finding((5.0, 5.0, 5.0), 0.8)]]
    found = free_response(findings, [NOTHING, np.array([[5.0, 5.0, 5.0]])], within=1.0)
    assert found is not None and found.sensitivities == (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert free_response([[]], [NOTHING], within=1.0) is None


def test_brightness_alone_finds_many_invented_nodules_and_chance_does_not() -> None:
    generator = np.random.default_rng(1)
    scans = [invented_scan(generator, SCAN, 2) for _ in range(4)]
    means = []
    for scores in (brightest, lambda patches: generator.random(len(patches))):
        slid = [slide(scores, scan.values.astype(np.float32), (8, 8, 8), 2) for scan in scans]
        found = [suppress(places, each, 6.0) for places, each in slid]
        measured = free_response(found, [scan.nodules for scan in scans], within=4.0)
        means.append(0.0 if measured is None else measured.mean)
    assert means[0] > 0.4 > means[1]
