"""A federation on one machine: the production client, server, masking, ledger and policy code over an in-process grid.

``rehearse`` lays out real hospitals' folders (keys, policy, ledger, CSV file), enrols them, plans and approves a study and
runs it. What production refuses exists here only: seeded randomness, and no noise at all (``epsilon=None``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medfed.advance import released_weights
from medfed.client.approval import approve, review
from medfed.client.compute import choose_compute
from medfed.client.daemon import open_hospital
from medfed.client.ledger import Ledger
from medfed.client.local_steps import LocalUpdate, Noise, own_sum, private_update
from medfed.client.setup import SiteOptions, init_site, open_site
from medfed.client.site import CONFIG_NAME, Site
from medfed.display import shown
from medfed.errors import ConfigError
from medfed.model_choice import (
    Autoencoder,
    Cnn,
    Cnn3d,
    Fusion,
    LogisticRegression,
    MessagePassing,
    Mlp,
    ModelChoice,
    MultiView,
    Own,
    Recurrent,
    ResNet,
    Summaries,
    Tagger,
    TextBag,
    TextCnn,
    Transformer,
    TwoArm,
)
from medfed.models.catalogue import build, is_rowwise
from medfed.models.parameters import file_hash, flatten, to_safetensors
from medfed.models.warm_start import WarmStart, take_over
from medfed.privacy.noise import discrete_gaussian
from medfed.roster import Roster
from medfed.seams import Entropy, Files, Seams, system_seams
from medfed.server.assignment import Assignment
from medfed.server.daemon import load_assignment, run_folder
from medfed.server.ending import RunRecord
from medfed.server.exchange import Exchange
from medfed.server.planning import Decisions, TaskFile, load_task, plan_study
from medfed.server.rounds import Rounds
from medfed.server.setup import (
    CONFIG_NAME as SERVER_CONFIG_NAME,
)
from medfed.server.setup import (
    MODEL_NAME,
    ROSTER_NAME,
    STUDY_NAME,
    Listen,
    enroll,
    init_office,
    load_office,
)
from medfed.server.store import Checkpoint, Store
from medfed.server.study_file import render
from medfed.simulations.absence import Absences, Handle, absent_in, handle_of
from medfed.simulations.entropy import SeededEntropy
from medfed.simulations.extract import EVENTS_NAME, IMAGES_NAME, PATIENT_COLUMN, SERIES_NAME, TABLE_NAME, Cohort
from medfed.simulations.extract import Hospital as Split
from medfed.simulations.joint_sums import JointSums
from medfed.simulations.outcome import stamps
from medfed.simulations.plain_training import SharedAdvance, plain_update
from medfed.simulations.watch import Watch
from medfed.study import Adam, DpAdamBC, Metrics, Study, Training

log = logging.getLogger("medfed.simulations")

LIFETIME = 1000.0  # a rehearsal's budget: wide, as these patients are public
UNUSED_EPSILON = 8.0  # what the study says when no noise is added; such a run is stamped not private


MOST_SCORED = 25
HELD_OUT = 0.2
METRICS = Metrics(bins=20, attempts=2)  # what a run with metrics asks; the noise follows from its epsilon

MODELS: dict[str, ModelChoice] = {
    "logistic-regression": LogisticRegression(name="logistic-regression", hidden=[]),
    "mlp": Mlp(name="mlp", hidden=[16]),
    "cnn": Cnn(name="cnn", channels=[16, 32, 32], groups=4, first_stride=1, head="mean"),
    "resnet": ResNet(name="resnet", channels=[16, 32], blocks=1, groups=4, first_stride=2, head="mean"),
    "cnn3d": Cnn3d(name="cnn3d", channels=[8, 16, 16], first_stride=1, groups=4, head="largest"),
    "multi-view": MultiView(
        name="multi-view",
        channels=[8, 16, 16],
        first_stride=1,
        groups=4,
        head="largest",
        pooling="attention",
        attention_size=8,
    ),
    "lstm": Recurrent(name="lstm", hidden_size=8, layers=1, summaries=True),
    "gru": Recurrent(name="gru", hidden_size=8, layers=1, summaries=True),
    "summaries": Summaries(name="summaries"),
    "transformer": Transformer(name="transformer", embedding_size=32, heads=4, layers=1, feedforward_size=64),
    "text-bag": TextBag(name="text-bag"),
    "text-cnn": TextCnn(name="text-cnn", embedding_size=32, widths=[3, 4, 5], channels=32),
    "tagger": Tagger(name="tagger", embedding_size=8, hidden_size=64, dilations=[1, 2, 4]),
    "message-passing": MessagePassing(name="message-passing", hidden_size=32, layers=3),
    "autoencoder": Autoencoder(name="autoencoder", hidden=[16], latent=4),
    "variational-autoencoder": Autoencoder(name="variational-autoencoder", hidden=[16], latent=4),
    "two-arm": TwoArm(name="two-arm", hidden=[16], arm_hidden=[]),
    "fusion": Fusion(name="fusion", how="hybrid", width=16, image_channels=[16, 32], groups=4, embedding_size=16),
}
"""What ``--model`` puts in the place of a task's own model, of a modest size."""

Train = Callable[[Exchange], None]  # the coordinator's part, to be called with an exchange to the hospitals
Onlooker = Callable[[Assignment, Checkpoint, str], None]  # the coordinator's observer, and what it runs


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What to rehearse. ``epsilon`` None: no noise. ``seed`` None: randomness of the operating system. ``drop_outs``: hospitals
    that a round can do without; ``absences``: who takes no part when. ``metrics``: hold
    ``HELD_OUT`` of the training patients out, and measure the released model on them through the masked sum. ``exact``: each
    hospital works its sums of gradients out by itself, as over a network, to the last bit (``joint_sums.py``). ``start``: first
    weights that are not drawn by chance."""

    epsilon: float | None
    mode: Literal["local", "distributed"]
    colluders: int = 1
    drop_outs: int = 0
    rounds: int | None = None
    spare_attempts: int | None = None
    seed: int | None = None
    model: str | None = None
    metrics: bool = False
    absences: Absences = ()
    exact: bool = False
    start: WarmStart | None = None


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback ports of a rehearsal with real processes; an in-process one opens none."""

    public: int
    admin: int


NO_PORTS = Ports(8443, 8444)

Backend = Callable[[Sequence[Site], Rehearsal, Train], None]
"""Opens the hospitals of these sites, calls ``Train`` with an exchange that reaches them by position, closes them."""


@dataclass(frozen=True, slots=True, eq=False)
class Rehearsed:
    """A finished rehearsal. ``weights``: float32[d] of the released model; ``history``: the same by round, for
    the rounds that are scored.

    ``train_seconds``: by attempt, what the slowest hospital's training took.
    """

    assignment: Assignment
    checkpoint: Checkpoint
    record: RunRecord
    weights: NDArray[np.float32]
    history: Mapping[int, NDArray[np.float32]]
    seconds: float
    train_seconds: Mapping[int, float]
    folder: Path


def no_noise(key: bytes, standard_deviation: float, size: int) -> NDArray[np.int64]:
    """Adds nothing: for measuring what privacy costs. Exists in simulations only."""
    return np.zeros(size, np.int64)


def rehearse(
    folder: Path,
    cohort: Cohort,
    plan: Rehearsal,
    seams: Seams,
    study: Study | None = None,
    observe: Onlooker | None = None,
    backend: Backend | None = None,
) -> Rehearsed:
    """Lay out, enrol, approve, run; everything a run leaves lies under ``folder``. ``backend``: None for this process."""
    started = seams.clock.monotonic()
    sites = lay_out(folder, cohort, plan, seams, study)
    history: dict[int, NDArray[np.float32]] = {}
    carry = in_this_process if backend is None else backend
    coordinator = _seams_of(seams, plan, "coordinator")
    marks = stamps(cohort, noise=plan.epsilon is not None, seeded=plan.seed is not None)
    assignment, checkpoint, record = _run(
        folder, coordinator, marks, history, observe, lambda train: carry(sites, plan, train)
    )
    return Rehearsed(
        assignment=assignment,
        checkpoint=checkpoint,
        record=record,
        weights=released_weights(checkpoint.state, assignment.study),
        history=history,
        seconds=seams.clock.monotonic() - started,
        train_seconds=slowest_training(sites, assignment.study),
        folder=run_folder(load_office(seams, folder / "coordinator" / SERVER_CONFIG_NAME), assignment),
    )


def noise_of(plan: Rehearsal) -> Noise:
    return no_noise if plan.epsilon is None else discrete_gaussian


def local_update_of(plan: Rehearsal) -> LocalUpdate:
    """Private steps; without noise ordinary ones, neither clipped nor sampled."""
    return plain_update if plan.epsilon is None else private_update


def sums_jointly(plan: Rehearsal, study: Study) -> bool:
    """Whether the hospitals of one process work their sums out together."""
    return study.training.aggregate == "gradient" and not plan.exact


def _seams_of(seams: Seams, plan: Rehearsal, owner: str) -> Seams:
    """The given seams, with this owner's own seeded entropy where a seed is asked for."""
    entropy: Entropy = seams.entropy if plan.seed is None else SeededEntropy(plan.seed, owner)
    return replace(seams, entropy=entropy)


def lay_out(
    folder: Path,
    cohort: Cohort,
    plan: Rehearsal,
    seams: Seams,
    study: Study | None = None,
    ports: Ports = NO_PORTS,
) -> list[Site]:
    """Hospitals' and coordinator's folders with an approved study, ready to run, by the code of the three commands."""
    files = seams.files
    asked = task_of(files, cohort).metrics if study is None else study.metrics
    holdout = HELD_OUT if plan.metrics or asked is not None else 0.0
    model = task_of(files, cohort).model if study is None else study.model
    packages = (model.package,) if isinstance(model, Own) else ()
    names = [hospital.name for hospital in cohort.hospitals]
    for name, _ in plan.absences:
        if name not in names:
            raise ConfigError(203, f"no hospital is called {shown(name)}", f"name one of {', '.join(names)}")
    for hospital in cohort.hospitals:
        own = _seams_of(seams, plan, hospital.name)
        lay_out_hospital(folder / hospital.name, hospital, own, holdout, ports, packages)
    office = folder / "coordinator"
    listen = Listen(host="127.0.0.1", port=ports.public, admin_port=ports.admin)
    init_office(_seams_of(seams, plan, "coordinator"), office, ["localhost", "127.0.0.1"], listen)
    files.append(office / SERVER_CONFIG_NAME, b"\n[rehearsal]\nsimulated = true\n")
    documents = [folder / hospital.name / "enrolment.json" for hospital in cohort.hospitals]
    roster = enroll(seams, office, documents)
    write_study(office / "study", *_study(cohort, plan, roster, seams, study), roster, seams)
    sites = []
    for hospital, document in zip(cohort.hospitals, documents, strict=True):
        site = open_site(_seams_of(seams, plan, hospital.name), folder / hospital.name / CONFIG_NAME)
        peers = [peer for peer in documents if peer != document]
        reviewed = review(site, office / "study" / STUDY_NAME, peers)
        with Ledger.open(files, site.ledger_path, site.identity()) as ledger:
            approve(site, reviewed, ledger)
        sites.append(site)
    return sites


def lay_out_hospital(
    place: Path,
    hospital: Split,
    seams: Seams,
    holdout: float = 0.0,
    ports: Ports = NO_PORTS,
    own_models: tuple[str, ...] = (),
) -> None:
    """One hospital's folder with its data, not yet enrolled. ``own_models``: packages that its policy lets make models."""
    seams.files.make_folder(place, private=True)
    hospital.training.write(seams.files, place)
    init_site(seams, place, replace(_options(hospital, holdout, ports), own_models=own_models, experimental=True))


def _options(hospital: Split, holdout: float, ports: Ports) -> SiteOptions:
    return SiteOptions(
        name=hospital.name,
        nominal_patients=max(1, round(len(set(hospital.training.patients)) * (1.0 - holdout))),
        coordinator=f"localhost:{ports.public}",
        ca_certificate="../coordinator/tls/ca.crt",
        fingerprint=None,
        proxy=None,
        data=TABLE_NAME,
        patient_column=PATIENT_COLUMN,
        holdout=holdout,
        max_epsilon_study=LIFETIME,
        max_epsilon_lifetime=LIFETIME,
        lifetime_delta=0.001,
        max_delta=0.01,
        min_colluders=1,
        images=None if hospital.training.images is None else IMAGES_NAME,
        series=None if hospital.training.series is None else SERIES_NAME,
        events=None if hospital.training.events is None else EVENTS_NAME,
    )


def _study(cohort: Cohort, plan: Rehearsal, roster: Roster, seams: Seams, given: Study | None) -> tuple[Study, bytes]:
    """The given study pinned to the rehearsal's roster and a first model of its own, or the cohort's task planned."""
    if plan.seed is not None:
        torch.manual_seed(plan.seed)  # first weights; they are public in any case
    if given is not None:
        noiseless = given.model_copy(update={"training": _noiseless(given.training)})
        return _repinned(given if plan.epsilon is not None else noiseless, roster, plan.start)
    task = task_of(seams.files, cohort)
    training = task.training.model_copy(
        update={
            key: value
            for key, value in (("rounds", plan.rounds), ("spare_attempts", plan.spare_attempts))
            if value is not None
        }
    )
    training = training.model_copy(update={"average_last_rounds": min(training.average_last_rounds, training.rounds)})
    training = training if plan.epsilon is not None else _noiseless(training)
    model = task.model if plan.model is None or plan.model == task.model.name else MODELS[plan.model]
    decisions = Decisions(
        name=cohort.name,
        expires="2099-12-31",
        epsilon=plan.epsilon if plan.epsilon is not None else UNUSED_EPSILON,
        delta=cohort.delta,
        mode=plan.mode,
        unit="patient",
        colluders=plan.colluders,
        drop_outs=plan.drop_outs,
    )
    metrics = METRICS if plan.metrics and task.metrics is None else task.metrics
    wanted = task.model_copy(update={"training": training, "model": model, "metrics": metrics})
    return plan_study(wanted, decisions, roster, plan.start)


def _noiseless(training: Training) -> Training:
    """DP-AdamBC takes off the variance of the noise that a study states. Where none is added that would be too much: all sides
    are told Adam, which is what is left of it, but for adding the floor where it would only bound."""
    rule = training.server_step
    if not isinstance(rule, DpAdamBC):
        return training
    adam = Adam(kind="adam", beta1=rule.beta1, beta2=rule.beta2, stabilizer=math.sqrt(rule.floor))
    return training.model_copy(update={"server_step": adam})


def task_of(files: Files, cohort: Cohort) -> TaskFile:
    """What a cohort's model predicts, from what and how."""
    return load_task(files, cohort.task) if isinstance(cohort.task, str) else cohort.task


def scored_rounds(study: Study) -> frozenset[int]:
    """The rounds after which the model is scored: all, or of a deep model ``MOST_SCORED`` of them and always the last."""
    rounds = study.sums_to_train
    if is_rowwise(study) or rounds <= MOST_SCORED:
        return frozenset(range(1, rounds + 1))
    return frozenset(math.ceil(rounds * step / MOST_SCORED) for step in range(1, MOST_SCORED + 1))


def _repinned(study: Study, roster: Roster, start: WarmStart | None) -> tuple[Study, bytes]:
    model = build(study)
    if start is not None:
        take_over(model, start)
    model_file = to_safetensors(model, flatten(model))
    choice = study.model.model_copy(update={"first_model_sha256": file_hash(model_file)})
    hospitals = len(roster.hospitals)
    pinned = {
        "hospitals": hospitals,
        "fewest_survivors": hospitals - study.cohort.drop_outs,
        "most_hospitals": max(hospitals, study.cohort.most_hospitals),
        "roster_sha256": roster.hash().hex(),
    }
    cohort = study.cohort.model_copy(update=pinned)
    return study.model_copy(update={"model": choice, "cohort": cohort}), model_file


def write_study(folder: Path, study: Study, model_file: bytes, roster: Roster, seams: Seams) -> None:
    """A study and its attachments, as the coordinator hands them out."""
    seams.files.make_folder(folder)
    seams.files.write(folder / MODEL_NAME, model_file)
    seams.files.write(folder / ROSTER_NAME, roster.to_bytes())
    seams.files.write(folder / STUDY_NAME, render(study).encode())


def in_this_process(
    sites: Sequence[Site], plan: Rehearsal, train: Train, *, update: LocalUpdate | None = None, workers: int = 2
) -> None:
    """The ServerApp and ClientApps of production over the in-process grid, all hospitals in this process.

    ``update``: what hospitals do in a study of local steps, in place of the plan's. ``workers``: threads that they share.
    """
    from medfed.client.node import make_client_app
    from medfed.server.link.grid import make_server_app
    from medfed.simulations.grid import LocalGrid, run_local

    with contextlib.ExitStack() as stack:
        shared, joint, update = SharedAdvance(), JointSums(workers), update or local_update_of(plan)
        # one device for all, so that a deep model's batch is tried out once
        choose = functools.cache(choose_compute)
        clipped = own_sum if plan.exact else joint
        opened = (
            open_hospital(site, noise_of(plan), local_update=update, clipped=clipped, step=shared, choose=choose)
            for site in sites
        )
        hospitals = [stack.enter_context(hospital) for hospital in opened]
        approved = hospitals[0].participations[0].approved
        meeting = joint.meet(approved.plan.words) if sums_jointly(plan, approved.study) else None
        names = [site.config.hospital.name for site in sites]
        watch = Watch(names)
        handles = [
            watch.telling(position, handle_of(one, absent_in(plan.absences, names[position])))
            for position, one in enumerate(hospitals)
        ]
        grid = LocalGrid([make_client_app(handle) for handle in handles], workers, meeting)
        run_local(make_server_app(lambda exchange: train(watch.ending(exchange)), grid.node_ids), grid)


def enter_hospital(stack: contextlib.ExitStack, config_path: Path, plan: Rehearsal) -> Handle:
    """What answers for one hospital of a laid-out rehearsal until ``stack`` ends: for a backend that runs it elsewhere."""
    site = open_site(system_seams(), config_path)
    mine = open_site(_seams_of(site.seams, plan, site.config.hospital.name), config_path)
    hospital = stack.enter_context(open_hospital(mine, noise_of(plan), local_update=local_update_of(plan)))
    return handle_of(hospital, absent_in(plan.absences, site.config.hospital.name))


def _run(
    folder: Path,
    seams: Seams,
    marks: tuple[str, ...],
    history: dict[int, NDArray[np.float32]],
    observe: Onlooker | None,
    carry: Callable[[Train], None],
) -> tuple[Assignment, Checkpoint, RunRecord]:
    """The coordinator's rounds over whatever carries its messages to the hospitals."""
    office = load_office(seams, folder / "coordinator" / SERVER_CONFIG_NAME)
    assignment = replace(load_assignment(office), stamps=marks)
    store = Store(seams.files, run_folder(office, assignment), assignment.study, assignment.plan.words)
    results: list[tuple[Checkpoint, RunRecord]] = []
    scored = scored_rounds(assignment.study)

    def watch(checkpoint: Checkpoint, what: str) -> None:
        done = checkpoint.state.completed_rounds
        if done in scored and done not in history:
            history[done] = released_weights(checkpoint.state, assignment.study)
        if observe is not None:
            observe(assignment, checkpoint, what)

    def train(exchange: Exchange) -> None:
        rounds = Rounds(assignment, exchange, store, seams, watch)
        results.append((rounds.run(), rounds.record))

    carry(train)
    return assignment, *results[0]


def slowest_training(sites: list[Site], study: Study) -> dict[int, float]:
    """By attempt: seconds of the slowest hospital's training, from the hospitals' own notes."""
    slowest: dict[int, float] = {}
    for site in sites:
        path = site.study_folder(study.hash()) / "rounds.jsonl"
        for line in site.seams.files.read(path).splitlines():
            note = json.loads(line)
            slowest[note["attempt"]] = max(slowest.get(note["attempt"], 0.0), float(note["train_s"]))
    return slowest
