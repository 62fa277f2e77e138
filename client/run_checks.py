"""The checks of ``medfed-client verify``, each a function that says what it found, or raises MF-194 with what does not hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from medfed import __version__
from medfed.client.ledger import LedgerView
from medfed.client.site import Site
from medfed.errors import PrivacyError, RemoteProtocolError
from medfed.model_choice import Own
from medfed.models import catalogue, parameters
from medfed.privacy.journal import LIMIT_BYTES, check_journal
from medfed.privacy.page import page
from medfed.privacy.plan import Plan, make_plan
from medfed.privacy.statement import (
    NOT_PRIVATE,
    Ending,
    HospitalStatement,
    PrivacyFile,
    hospital_statement,
    require_plausible,
    require_same,
    statement,
)
from medfed.roster import Roster, load_roster
from medfed.seams import Files
from medfed.study import Study, load_study
from medfed.wording import rounded_up

JOURNAL_NAME, TEXT_NAME = "journal.jsonl", "study.toml"
_ODD = "is not as medfed writes it: a key may stand twice, and mean something else to another reader"
_Parsed = TypeVar("_Parsed", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Run:
    """A folder whose documents could be read. ``own``: the position of the hospital that asks, where it is one of them."""

    files: Files
    folder: Path
    file: PrivacyFile
    study_bytes: bytes
    study: Study
    roster: Roster
    plan: Plan
    own: int | None

    @property
    def is_own_copy(self) -> bool:
        """Whether it is the copy that the hospital which asks made for itself: with its own signature and without a journal."""
        signers = [mine.position for mine in self.file.hospitals]
        return signers == [self.own] and len(self.roster.hospitals) > 1

    @property
    def not_signed_by(self) -> list[str]:
        """Hospitals of the roster whose signature is not there."""
        signers = {mine.position for mine in self.file.hospitals}
        return [entry.hospital for place, entry in enumerate(self.roster.hospitals) if place not in signers]

    def covered(self) -> Iterator[tuple[str, str]]:
        """Every file that is held against what was signed, behind the name of its check."""
        yield from (("documents", "privacy.json"), ("study", "study.json"), ("roster", "roster.json"))
        yield from (("model", "model.safetensors"), ("page", "privacy.md"))
        for check, name in (("study", TEXT_NAME), ("journal", JOURNAL_NAME)):
            if not self.may_lack(name):
                yield check, name

    def may_lack(self, name: str) -> bool:
        """Whether the file is not there and need not be: a hospital's own copy goes without the journal and study.toml."""
        return self.is_own_copy and not self.files.exists(self.folder / name)


class NotChecked(Exception):
    """A check that cannot be made here, and why; it says nothing for or against the run."""


# ----------------------------------------------------------------------------------------------------------- documents


def open_run(files: Files, folder: Path, site: Site | None) -> Run:
    """Read the documents. Raises MF-194 where one cannot be read, or says something twice: another reader may take the other."""
    said = files.read(folder / "privacy.json")
    file = _parsed(said, PrivacyFile, "privacy.json")
    _require(file.to_bytes() == said, f"privacy.json {_ODD}")
    study_bytes = files.read(folder / "study.json")
    study = _parsed(study_bytes, Study, "study.json")
    roster = load_roster(files, folder / "roster.json")
    _require(roster.to_bytes() == files.read(folder / "roster.json"), f"roster.json {_ODD}")
    _require_known_code(study, site)
    plan = make_plan(study, parameters.count(catalogue.build(study)))
    public = None if site is None else site.identity().public
    own = roster.identities.index(public) if public in roster.identities else None
    return Run(files, folder, file, study_bytes, study, roster, plan, own)


def _require_known_code(study: Study, site: Site | None) -> None:
    """Making an own model runs the code of a package: only where a hospital's policy names it (MF-134)."""
    if site is not None:
        site.config.policy.admit_code(study)
    else:
        refuse_code(study)


def refuse_code(study: Study) -> None:
    """Raise MF-134 for an own model, where no hospital's policy is at hand."""
    if isinstance(study.model, Own):
        what = f"this run's model is code of package {study.model.package}"
        raise PrivacyError(
            134, what, "do it beside the hospital.toml (--config) of a hospital whose policy names the package"
        )


def _parsed(data: bytes, kind: type[_Parsed], name: str) -> _Parsed:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the file"
        raise _refused(f"{name} cannot be read: {where} is wrong, or it is of another version of medfed") from error


def _refused(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(194, what, "do not rely on this run")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _refused(what)


# -------------------------------------------------------------------------------------------------------------- checks


def _check_kind(run: Run) -> str:
    spoiled = [stamp for stamp in run.file.stamps if stamp.startswith(NOT_PRIVATE)]
    _require(not spoiled, f"the run is stamped {', '.join(spoiled)}")
    if run.file.is_simulation:
        return "a simulation: keys made for it on one machine, no hospital signed"
    kind = f"stamped {', '.join(run.file.stamps)}" if run.file.stamps else "a run at hospitals"
    return f"{kind}, by the coordinator's word"


def _check_study(run: Run) -> str:
    _require(run.study.canonical_bytes() == run.study_bytes, "study.json is not in canonical form")
    _require(run.study.hash().hex() == run.file.study_sha256, "study.json is not the study that was signed")
    if not run.may_lack(TEXT_NAME):
        text = load_study(run.files, run.folder / TEXT_NAME)
        _require(text == run.study, "study.toml is another study than study.json")
    return f"{run.study.study.name}, {run.file.study_sha256}"


def _check_roster(run: Run) -> str:
    _require(run.roster.hash().hex() == run.file.roster_sha256, "roster.json is not the roster that was signed")
    _require(run.roster.extends(run.study), "roster.json is not the study's roster, nor one that begins with it")
    joined = len(run.roster.hospitals) - run.study.cohort.hospitals
    later = f", {joined} of them joined later" if joined else ""
    return f"{len(run.roster.hospitals)} hospitals{later}, every enrolment document signed by its own key"


def _check_coordinator(run: Run) -> str:
    run.file.statement.check(bytes.fromhex(run.roster.coordinator), bytes.fromhex(run.file.coordinator_signature))
    return "the coordinator signed this statement"


def _check_signatures(run: Run) -> str:
    """Hospitals of the roster, each once, over this very statement, as many as a sum must have; of an own copy its own."""
    hospitals, fewest = len(run.roster.hospitals), 1 if run.is_own_copy else run.study.cohort.fewest_survivors
    positions = [mine.position for mine in run.file.hospitals]
    each_once = all(one < other for one, other in pairwise((-1, *positions, hospitals)))
    _require(each_once, "a hospital signed that is not in the roster, or one signed twice")
    _require(len(positions) >= fewest, f"{len(positions)} of {hospitals} hospitals signed, {fewest} must")
    for mine in run.file.hospitals:
        charged = (mine.attempts_charged, mine.epsilon_spent_micro)
        wanted = hospital_statement(run.file.statement, run.roster, mine.position, charged, mine.head)
        _require(
            HospitalStatement(**mine.model_dump(exclude={"signature"})) == wanted, f"{mine.hospital} signed another run"
        )
        mine.check()
    what = "statement, model, and the row that ended the study in the ledger"
    if run.is_own_copy:
        return f"this hospital's own copy, its own signature: {what}"
    if run.not_signed_by:
        return f"{len(positions)} of {hospitals} hospitals: {what}; not signed by {', '.join(run.not_signed_by)}"
    return f"all {hospitals} hospitals: {what}"


def _check_attempts(run: Run) -> str:
    used, approved = run.file.attempts_used, run.file.attempts_approved
    _require(used <= approved, f"{used} attempts were used, {approved} approved")
    is_strict = run.study.cohort.fewest_survivors == len(run.roster.hospitals)
    survived = run.file.released_sums if is_strict else 0  # else the journal tells, where it is
    for mine in run.file.hospitals:
        require_plausible(mine, run.file, run.plan, survived)
    counts = sorted({mine.attempts_charged for mine in run.file.hospitals})
    charged = " to ".join(str(count) for count in (counts if len(counts) < 2 else (counts[0], counts[-1])))
    return f"{used} used of {approved} approved, charged at the hospitals: {charged}, {run.file.released_sums} sums released"


def _check_journal(run: Run) -> str:
    if run.may_lack(JOURNAL_NAME):
        return "with the coordinator, its last line is signed here"
    data = run.files.read(run.folder / JOURNAL_NAME, limit_bytes=LIMIT_BYTES)
    told = check_journal(data, run.file, run.roster.identities)
    for mine in run.file.hospitals:
        sums, charged = told.survived[mine.position], mine.attempts_charged
        _require(charged >= sums, f"{mine.hospital} is in {sums} sums, and {charged} attempts were charged there")
    without = sum(sums < run.file.released_sums for sums in told.survived)
    return f"whole, {run.file.attempts_used} attempts, {told.lost} of them lost, {without} hospitals missing from a sum"


def _check_model(run: Run) -> str:
    data = run.files.read(run.folder / "model.safetensors", limit_bytes=1 << 34)
    _require(
        hashlib.sha256(data).hexdigest() == run.file.model_sha256, "model.safetensors is not the model that was signed"
    )
    parameters.from_safetensors(catalogue.build(run.study), data)
    return f"model.safetensors, {run.file.model_sha256}"


def _check_figures(run: Run) -> str:
    said = run.file.statement
    ending = Ending(
        attempts_used=said.attempts_used,
        state=bytes.fromhex(said.state_sha256),
        model=bytes.fromhex(said.model_sha256),
        journal=bytes.fromhex(said.journal_sha256),
        stamps=tuple(said.stamps),
        versions=said.versions,
    )
    require_same(said, statement(run.study, run.roster, run.plan, ending))
    _require(said.epsilon <= run.study.privacy.epsilon, "epsilon exceeds what the study says")
    return f"epsilon {rounded_up(said.epsilon)}, delta {said.delta:g}, and all other figures worked out anew from the study"


def _check_page(run: Run) -> str:
    text = run.files.read(run.folder / "privacy.md")
    if run.file.versions.get("medfed") != __version__:
        raise NotChecked(
            f"privacy.md may say anything: it is of another medfed than this one, {__version__}; do not rely on it"
        )
    _require(text == page(run.file, run.roster).encode(), "privacy.md is not the page of this privacy.json")
    return "privacy.md says what privacy.json says"


def check_own_ledger(run: Run, site: Site) -> str:
    """That this hospital's ledger holds the row stated for it, and charged as many attempts; where it has not signed, not more
    than were used."""
    stated = [mine for mine in run.file.hospitals if mine.position == run.own]
    study = run.study.hash()
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        if not stated:
            events = ledger.approved(study).events
            _require(events <= run.file.attempts_used, f"this hospital's ledger charged {events} attempts")
            return f"this hospital has not signed; its ledger charged {events} attempts"
        for mine in stated:
            ledger.check_witness(mine.head, bytes.fromhex(mine.identity))
            events = ledger.approved(study).events
            _require(events == mine.attempts_charged, f"this hospital's ledger charged {events} attempts")
    return f"has row {stated[0].ledger_seq} as stated, and charged {stated[0].attempts_charged} attempts"


CHECKS: dict[str, Callable[[Run], str]] = {
    "kind": _check_kind,
    "study": _check_study,
    "roster": _check_roster,
    "coordinator": _check_coordinator,
    "signatures": _check_signatures,
    "attempts": _check_attempts,
    "journal": _check_journal,
    "model": _check_model,
    "figures": _check_figures,
    "page": _check_page,
}
