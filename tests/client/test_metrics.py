"""Counts of held-out patients after the last round: whose they are, what they cost, and that nobody pays twice."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medfed import metrics
from medfed.advance import released_weights
from medfed.client.approval import caps_of, load_approved
from medfed.client.ledger import Ledger, LedgerView
from medfed.client.metrics import metrics_sum
from medfed.errors import PrivacyError
from medfed.models import parameters, tasks
from medfed.models.records import Records
from medfed.simulations.entropy import SeededEntropy
from medfed.wire import Finished, Refused, Upload

sys.path.insert(0, str(Path(__file__).parent))

from test_participation import EVERYBODY, Desk, refused, zeros

TRIES = 2
METRICS = ("[training]", f"[metrics]\nbins = 10\nattempts = {TRIES}\n[training]")


def started(world, noise=None) -> Desk:
    world.start_all(noise)
    desk = Desk(world)
    desk.set_up()
    return desk


def approved_of(world, position: int):
    site = world.site(position)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        return load_approved(site, world.study_hash, ledger)


def test_without_noise_the_cells_are_those_of_all_held_out_patients(make_world) -> None:
    """Through masks and ledger, to the grid; and the model is what it was."""
    world = make_world(METRICS)
    loaded = [approved_of(world, position) for position in EVERYBODY]
    held = [approved.holdout for approved in loaded]
    assert sum(len(set(each.patients)) for each in held) >= 3  # else this shows nothing
    desk = started(world, zeros)
    for _ in range(3):
        desk.round()
    before = released_weights(desk.state, world.study)
    desk.round()
    np.testing.assert_array_equal(released_weights(desk.state, world.study), before)
    expected = np.zeros(20)
    for position, records in enumerate(held):
        model = loaded[position].model
        parameters.assign(model, before)
        chances = tasks.predictions(model, world.study.task, records.inputs)
        ids, unit = np.unique(np.array(records.patients, np.str_), return_inverse=True)
        if len(ids):
            expected += metrics.shares(world.study, chances, records.labels, unit, len(ids)).sum(axis=0)
    np.testing.assert_allclose(desk.state.metrics, expected, atol=1e-4)
    for position in EVERYBODY:
        assert isinstance(desk.ask(position, desk.finish()), Finished)


def test_every_upload_is_of_one_length(make_world) -> None:
    world = make_world(METRICS)
    assert (world.assignment.plan.words, world.assignment.plan.ring_words) == (4, 20)
    desk = started(world)
    assert len({len(upload.payload) for _ in range(4) for upload in desk.round()}) == 1


def test_one_held_out_patient_moves_the_sum_by_no_more_than_the_sensitivity(make_world) -> None:
    """On the grid, one patient with one or with thirty records more; control: without the mean over records it does."""
    approved = approved_of(make_world(METRICS), 3)
    rng, plan = np.random.default_rng(3), approved.plan

    def cells(records: Records) -> np.ndarray:
        return metrics_sum(replace(approved, holdout=records), approved.first, SeededEntropy(1, "x"), zeros)

    def patients(names: list[str]) -> Records:
        inputs = rng.normal(size=(len(names), 3)).astype(np.float32)
        return Records(inputs, rng.integers(0, 2, len(names)), tuple(names))

    for many in (1, 30):
        records = patients([f"p{number // 3}" for number in range(12)] + ["one more"] * many)
        fewer = records.subset(np.array(records.patients) != "one more")
        moved = np.linalg.norm(cells(records) - cells(fewer))
        assert 0 < moved <= plan.mechanism.aside[0].sensitivity
    strangers = replace(records, patients=tuple(str(number) for number in range(42)))
    fewer = strangers.subset(np.arange(42) < 12)
    assert np.linalg.norm(cells(strangers) - cells(fewer)) > plan.mechanism.aside[0].sensitivity


def test_metrics_cost_held_out_patients_only_and_training_as_if_they_were_not(make_world) -> None:
    plain, with_them = make_world().assignment.plan, make_world(METRICS).assignment.plan
    assert with_them.attempts == plain.attempts + TRIES
    (aside,) = with_them.mechanism.aside
    assert (aside.sampling_rate, aside.repeats) == (1.0, TRIES)
    # the noise of both is calibrated to 8
    assert 7.99 < with_them.epsilon <= 8.0
    assert with_them.mechanism.sigma == pytest.approx(plain.mechanism.sigma, rel=1e-3)


def test_neither_more_tries_at_the_metrics_nor_more_training_than_listed(make_world) -> None:
    """A coordinator that spends spares of one kind on the other is refused with nothing written."""
    world = make_world(METRICS)
    desk = started(world)
    for attempt in range(1, 6):  # all five of training's, three of which count
        reply = desk.ask(0, desk.request(attempt))
        assert isinstance(reply, Upload)
    refused(desk.ask(0, desk.request(6)), Refused.BUDGET)
    assert world.charged(0) == 5
    other = make_world(METRICS)
    desk = started(other)
    for _ in range(3):
        desk.round()
    for attempt in (4, 5):
        assert isinstance(desk.ask(0, desk.request(attempt)), Upload)
    refused(desk.ask(0, desk.request(6)), Refused.BUDGET)
    assert other.charged(0) == 5


def test_changed_holdout_stops_a_study_with_metrics(make_world) -> None:
    """Else one patient could be trained on first and counted as held out afterwards."""
    for changes, stops in (((METRICS,), True), ((), False)):
        world = make_world(*changes)
        config = world.site(0).folder / "hospital.toml"
        text = config.read_text()
        old = next(line for line in text.splitlines() if line.startswith("holdout"))
        config.write_text(text.replace(old, "holdout = 0.4"))
        if stops:
            with pytest.raises(PrivacyError) as error:
                approved_of(world, 0)
            assert error.value.code == 340
        else:
            assert len(approved_of(world, 0).holdout.labels)


def test_ledger_knows_the_share_and_verifies(make_world) -> None:
    world = make_world(METRICS)
    desk = started(world)
    for _ in range(4):
        desk.round()
    site = world.site(1)
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        ledger.verify()
        view = ledger.account(world.study_hash, caps_of(site))
        assert ledger.approved(world.study_hash).approval.holdout == 0.2
    assert view.epsilon_reserved == pytest.approx(world.assignment.plan.epsilon, rel=1e-9)
