"""``medfed-server run``: the parent that serves the port, and the training task its child runs."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from medfed.advance import first_state
from medfed.errors import ConfigError, ExitStatus, MedfedError, PrivacyError
from medfed.health import COORDINATOR, health_service
from medfed.models import catalogue, parameters
from medfed.privacy.plan import make_plan
from medfed.privacy.statement import SIMULATION
from medfed.process import give_large_memory_back
from medfed.progress import Progress
from medfed.roster import load_roster
from medfed.seams import Seams, require_system_entropy, system_seams
from medfed.server.assignment import Assignment
from medfed.server.exchange import Exchange
from medfed.server.results import write_results
from medfed.server.rounds import Rounds
from medfed.server.setup import MODEL_NAME, ROSTER_NAME, Office, load_office
from medfed.server.store import Checkpoint, Store
from medfed.study import load_study
from medfed.wire import frame_limit_bytes

log = logging.getLogger("medfed.server")

STOPPED = "stopped"


def load_assignment(office: Office) -> Assignment:
    """The study that ``server.toml`` names, with its attachments beside it, every pin checked.

    Raises: MF-124 if roster or first model are not those the study pins, MF-144 if the roster names another
    coordinator, MF-120 once it expired, MF-135 if the study claims too little epsilon.
    """
    files = office.seams.files
    study = load_study(files, office.study_path)
    if study.expired(office.seams.clock.wall()):
        raise PrivacyError(120, f"study {study.study.name} expired on {study.study.expires}", "plan a new one")
    roster = load_roster(files, office.study_path.parent / ROSTER_NAME)
    if not roster.extends(study):
        raise PrivacyError(
            124, "roster.json is not the study's roster", "plan the study again: medfed-server study new"
        )
    identity = office.identity()
    if identity.public.hex() != roster.coordinator:
        raise PrivacyError(144, "the roster names another coordinator", "use the folder that enrolled the hospitals")
    model_file = files.read(office.study_path.parent / MODEL_NAME)
    if parameters.file_hash(model_file) != study.model.first_model_sha256:
        raise PrivacyError(124, f"{MODEL_NAME} is not the study's first model", "restore it beside study.toml")
    model = catalogue.build(study)
    plan = make_plan(study, parameters.count(model))
    if plan.epsilon > study.privacy.epsilon:
        what = f"the study states epsilon {study.privacy.epsilon:g}, it is {plan.epsilon:.4f}"
        raise PrivacyError(135, what, "plan it again: medfed-server study new")
    first = first_state(parameters.from_safetensors(model, model_file), study)
    return Assignment(study, roster, plan, first, identity, (SIMULATION,) if office.config.is_rehearsal else ())


def run_folder(office: Office, assignment: Assignment) -> Path:
    """Where this study's checkpoints and results lie: one folder a study hash, so that no run overwrites another."""
    return office.folder / "runs" / f"{assignment.study.study.name}-{assignment.study.hash().hex()[:12]}"


class StatusFile:
    """Keeps ``status.json`` and the progress bar up to date."""

    def __init__(self, office: Office, assignment: Assignment, progress: Progress) -> None:
        self._office = office
        self._assignment = assignment
        self._progress = progress
        self._last = ""

    def __call__(self, checkpoint: Checkpoint, what: str) -> None:
        if what == self._last:
            return
        self._last = what
        if "waiting for" in what:
            log.info("%s", what)
        used = checkpoint.last_attempt
        self._progress.update(checkpoint.state.completed_rounds, f"{what}, epsilon at most {self._at_most(used):.3g}")
        self.write(checkpoint, what)

    def write(self, checkpoint: Checkpoint, what: str, failed: str | None = None) -> None:
        """``epsilon_spent`` is null as long as the run goes on: it takes a moment, and ``read_status`` works it out."""
        study, plan, used = self._assignment.study, self._assignment.plan, checkpoint.last_attempt
        has_ended = what in ("done", STOPPED)
        status = {
            "study": study.study.name,
            "study_sha256": study.hash().hex(),
            "what": what,
            "failed": failed,
            "round": checkpoint.state.completed_rounds,
            "rounds": study.released_sums,
            "rounds_by_kind": study.rounds_by_kind,
            "attempts_used": used,
            "attempts": plan.attempts,
            "epsilon_spent": plan.epsilon_after(used) if has_ended else None,
            "epsilon_spent_at_most": self._at_most(used),
            "epsilon": plan.epsilon,
            "updated": self._office.seams.clock.wall(),
        }
        self._office.seams.files.write(self._office.folder / "status.json", json.dumps(status, indent=1).encode())

    def stopped(self, checkpoint: Checkpoint, error: Exception) -> None:
        """Say why the run ends, also by an error that nobody expected."""
        why = str(error) if isinstance(error, MedfedError) else f"ended by {type(error).__name__}, its log says more"
        self.write(checkpoint, STOPPED, why)

    def _at_most(self, attempts: int) -> float:
        return self._assignment.plan.running_epsilon(attempts)


def train(exchange: Exchange, config_path: Path) -> None:
    """The child's task: run the study of ``server.toml`` to its end on the real machine."""
    train_with(exchange, config_path, system_seams())


def train_with(exchange: Exchange, config_path: Path, seams: Seams) -> Checkpoint:
    """The same with any seams: what a rehearsal calls. The last sum is on disk, not in what is returned."""
    office = load_office(seams, config_path)
    whole = load_assignment(office)
    assignment = whole.without_first()
    folder = run_folder(office, assignment)
    store = Store(seams.files, folder, assignment.study, assignment.plan.words)
    with Progress(assignment.study.study.name, assignment.study.released_sums, sys.stderr) as progress:
        observe = StatusFile(office, assignment, progress)
        rounds = Rounds(whole, exchange, store, seams, observe)
        del whole
        try:
            checkpoint = rounds.run()
        except Exception as error:
            observe.stopped(rounds.checkpoint, error)
            raise
        record = rounds.record
        del rounds  # the last sum with it: what is left to do needs the memory
        checkpoint = replace(checkpoint, total=b"")
        try:
            write_results(seams.files, folder, assignment, checkpoint, record)
        except Exception as error:
            observe.stopped(checkpoint, error)
            raise
        observe.write(checkpoint, "done")
    log.info("the model is in %s", folder)
    return checkpoint


def run_coordinator(config_path: Path, seams: Seams, stop: threading.Event) -> int:
    """``medfed-server run``. One process a folder; refuses (MF-614) a port in use."""
    require_system_entropy(seams.entropy)
    from medfed.server.link.serve import ChildTask, serve
    from medfed.server.link.superlink import LinkSettings

    give_large_memory_back()
    office = load_office(seams, config_path)
    assignment = load_assignment(office)
    listen = office.config.listen
    settings = LinkSettings(
        host=listen.host,
        port=listen.port,
        admin_port=listen.admin_port,
        certificate=office.certificates.certificate,
        key=office.certificates.key,
        certificate_authority=office.certificates.authority,
        stored_bytes=_stored_bytes(assignment),
    )
    node_keys = [entry.node_key.encode() for entry in assignment.roster.hospitals]
    work = ChildTask("medfed.server.daemon:train", config_path, frame_limit_bytes(assignment.vector_limit_bytes))
    del assignment  # the first model with it: the child has its own
    with (
        seams.files.lock(office.folder / "run.lock"),
        health_service(office.config.health, COORDINATOR, stop) as tell,
    ):
        return serve(settings, node_keys, work, seams, stop, tell)


def _stored_bytes(assignment: Assignment) -> int:
    """What may be in transit: a request and its successor, and from every hospital a reply and one repeated."""
    frames = 2 + 2 * len(assignment.roster.hospitals)
    return 2 * frames * frame_limit_bytes(assignment.vector_limit_bytes)  # twice: a slot is larger than what is in it


def read_status(config_path: Path, seams: Seams, *, exact: bool = True) -> dict[str, object]:
    """What ``medfed-server status`` shows, with ``running`` told by the lock of the folder.

    ``exact``: work out ``epsilon_spent`` of a run that goes on, which takes up to a second; else it stays null, and
    ``epsilon_spent_at_most`` says what is known at once.
    """
    office = load_office(seams, config_path)
    path = office.folder / "status.json"
    if not seams.files.exists(path):
        raise ConfigError(606, "nothing has run here yet", "medfed-server run server.toml")
    status: dict[str, object] = json.loads(seams.files.read(path))
    status["running"] = _is_running(office)
    if exact and status["epsilon_spent"] is None:
        status["epsilon_spent"] = _epsilon_spent(office, status)
    return status


def _epsilon_spent(office: Office, status: Mapping[str, object]) -> float | None:
    """Of the attempts in ``status``; None where the study beside it is another by now."""
    study, used = load_study(office.seams.files, office.study_path), status["attempts_used"]
    if study.hash().hex() != status["study_sha256"] or not isinstance(used, int):
        return None
    return make_plan(study, parameters.count(catalogue.build(study))).epsilon_after(used)


def _is_running(office: Office) -> bool:
    try:
        with office.seams.files.lock(office.folder / "run.lock"):
            return False
    except MedfedError as error:
        if error.exit_status is ExitStatus.INTEGRITY:
            return True
        raise
