"""``medfed-client status`` and ``stop``: how a hospital stands, from its process where one runs and from its folder.

Budget, rounds and times are read from the folder beside a running hospital, without its lock: they are the same whether
it runs or not. Only the process itself knows whether it is connected.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from typing import TypedDict

from pydantic import BaseModel, ValidationError

from medfed.client.budget import StudyBudget, budget
from medfed.client.control import SOCKET_NAME, DaemonNow, StudyNow, ask_status, ask_to_stop
from medfed.client.ledger import AttemptState, Ledger, LedgerView, require_unlocked
from medfed.client.policy import hours_in_words
from medfed.client.site import Site
from medfed.display import shown
from medfed.errors import MedfedError
from medfed.study import Study
from medfed.wording import rounded_down, rounded_up, rounds_by_kind

log = logging.getLogger("medfed.client")

LOOK_EVERY_S = 0.1
TELL_EVERY_S = 30.0
ENDING_WITHIN_S = 10.0
"""How long a process that no longer answers may still hold the ledger before somebody else must be holding it."""
FILE_LIMIT_BYTES = 1 << 26


class _RoundNote(BaseModel):
    """The one key of a line of ``rounds.jsonl`` that is shown."""

    total_s: float


class StudyStatus(StudyBudget):
    """``round``: of the last attempt charged here, 0 before the first; ``completed_rounds``: whose sums have come back.

    ``rounds``: of all kinds together. None where it is not known: ``completed_rounds``, ``device`` and ``engine`` without a
    process, ``rounds`` without the study's file (``rounds_by_kind`` is then empty), ``last_round_s`` before the first round.
    """

    round: int
    rounds: int | None
    rounds_by_kind: dict[str, int]
    completed_rounds: int | None
    under_way: bool
    last_round_s: float | None
    device: str | None
    engine: str | None


class Status(TypedDict):
    """How a hospital stands.

    ``since`` and ``connection_since``: seconds since 1970. ``locked``: why the ledger is locked (MF-405), None if it is not.
    ``hours``: those of hospital.toml, None without; ``next_opening``: outside of them, when they begin (seconds since 1970).
    All but name, ``locked``, ``running``, hours and studies are None without a process.
    """

    hospital: str
    locked: str | None
    hours: str | None
    next_opening: float | None
    running: bool
    pid: int | None
    version: str | None
    since: float | None
    stopping: bool | None
    connected: bool | None
    connection_since: float | None
    why_not_connected: str | None
    studies: list[StudyStatus]


def status(site: Site) -> Status:
    """How the hospital of this folder stands."""
    now = ask_status(site.folder / SOCKET_NAME)
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        locked = _why_locked(site, ledger)
        spent = budget(ledger, site.config.policy.caps)["studies"]
        at_work = {} if now is None else {each.study_sha256: each for each in now.studies}
        studies = [_study(site, ledger, each, at_work.get(each["study_sha256"])) for each in spent]
    return Status(
        hospital=site.config.hospital.name,
        locked=locked,
        hours=site.config.policy.hours,
        next_opening=site.config.policy.next_opening(site.seams.clock.wall()),
        running=now is not None,
        pid=now.pid if now else None,
        version=now.version if now else None,
        since=now.since_s if now else None,
        stopping=now.stopping if now else None,
        connected=now.connected if now else None,
        connection_since=now.connection_since_s if now else None,
        why_not_connected=_why_not(now),
        studies=studies,
    )


def _why_locked(site: Site, ledger: LedgerView) -> str | None:
    try:
        require_unlocked(site.seams.files, site.ledger_path, ledger, site.identity().public)
    except MedfedError as error:
        return str(error)
    return None


def _why_not(now: DaemonNow | None) -> str | None:
    return None if now is None or now.connected else now.why_not


def _study(site: Site, ledger: LedgerView, spent: StudyBudget, now: StudyNow | None) -> StudyStatus:
    study = bytes.fromhex(spent["study_sha256"])
    attempt = ledger.highest_attempt(study)
    is_reserved, pinned = ledger.attempt_status(study, attempt) is AttemptState.RESERVED, _pinned(site, study)
    return StudyStatus(
        **spent,
        round=ledger.charged_round(study, attempt) or 0,
        rounds=None if pinned is None else pinned.released_sums,
        rounds_by_kind={} if pinned is None else pinned.rounds_by_kind,
        completed_rounds=now.completed_rounds if now else None,
        under_way=is_reserved and now is not None,
        last_round_s=_last_round_s(site, study),
        device=now.device if now else None,
        engine=now.engine if now else None,
    )


def _pinned(site: Site, study: bytes) -> Study | None:
    """The approved study's file; a start checks that file, here it is only not believed if it is another."""
    text = _text(site, study, "study.json")
    try:
        pinned = Study.model_validate_json(text, strict=True)
    except ValidationError:
        return None
    return pinned if pinned.hash() == study else None


def _last_round_s(site: Site, study: bytes) -> float | None:
    """From the hospital's own notes, whose last line a crash may have cut."""
    for line in reversed(_text(site, study, "rounds.jsonl").split(b"\n")):
        try:
            return _RoundNote.model_validate_json(line).total_s
        except ValidationError:
            continue
    return None


def _text(site: Site, study: bytes, name: str) -> bytes:
    path = site.study_folder(study) / name
    return site.seams.files.read(path, limit_bytes=FILE_LIMIT_BYTES) if site.seams.files.exists(path) else b""


def in_words(status: Status) -> Iterator[str]:
    """The status as lines for a terminal."""
    name = shown(status["hospital"])
    if not status["running"]:
        yield f"{name}: not running (nobody answers in its folder)"
    else:
        doing = "stopping" if status["stopping"] else "running"
        yield f"{name}: {doing}, process {status['pid']} since {_when(status['since'])}, medfed {status['version']}"
        if status["connected"]:
            yield f"  connected since {_when(status['connection_since'])}"
        else:
            yield f"  not connected since {_when(status['connection_since'])}: {status['why_not_connected']}"
    if status["locked"] is not None:
        yield f"  LOCKED, nothing leaves this hospital: {status['locked']}"
    if status["hours"] is not None:
        yield f"  takes part within hours: {hours_in_words(status['hours'], status['next_opening'])}"
    if not status["studies"]:
        yield "  no study was approved"
    for study in status["studies"]:
        yield from _study_in_words(study)


def _study_in_words(study: StudyStatus) -> Iterator[str]:
    yield (
        f"  {shown(study['study'])} ({study['study_sha256'][:12]}, {study['state']}): round {study['round']} of "
        f"{'?' if study['rounds'] is None else study['rounds']}{rounds_by_kind(study['rounds_by_kind'])}"
        f"{', at work' if study['under_way'] else ''}"
        f"{'' if study['device'] is None else ', on ' + study['device'] + ' by ' + str(study['engine'])}"
    )
    yield (
        f"    attempts: {study['attempts_used']} used, {study['attempts_left']} left; epsilon: "
        f"{rounded_up(study['epsilon_spent'])} spent, {rounded_down(study['epsilon_left'])} left (delta {study['delta']:g})"
    )
    if study["last_round_s"] is not None:
        yield f"    the last round took {study['last_round_s']:.1f} s here"


def _when(seconds: float | None) -> str:
    moment = datetime.datetime.fromtimestamp(seconds or 0.0, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def stop(site: Site) -> bool:
    """End the hospital's process in order and wait for it; False if none ran.

    Afterwards the ledger is free. Raises MF-618 if a process answers with something else, MF-620 if another medfed
    command holds the ledger.
    """
    asked = ask_to_stop(site.folder / SOCKET_NAME)
    clock, began = site.seams.clock, site.seams.clock.monotonic()
    tell_at = began + 1.0
    while Ledger.is_held(site.seams.files, site.ledger_path):
        waited = clock.monotonic() - began
        if asked is None and waited > ENDING_WITHIN_S:
            raise MedfedError(
                620,
                "another medfed command holds the ledger",
                "is a hospital just starting, or someone approving? end that, or try medfed-client stop again",
            )
        if asked is not None and clock.monotonic() >= tell_at:
            log.info("waiting for process %d until the attempt under way is sealed (%.0f s)", asked.pid, waited)
            tell_at = clock.monotonic() + TELL_EVERY_S
        clock.sleep(LOOK_EVERY_S)
    return asked is not None
