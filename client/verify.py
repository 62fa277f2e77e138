"""``medfed-client verify``: everything that a run's folder claims, worked out anew. Needs no network, key or configuration.

docs/privacy_statement.md says what is checked, against what, and what that does not show. Beside a ``hospital.toml`` the
statement is also held against this hospital's own ledger.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar

from pydantic import BaseModel, ValidationError

from medfed import __version__
from medfed.client.ledger import LedgerView
from medfed.client.site import Site
from medfed.display import shown
from medfed.errors import MedfedError, RemoteProtocolError
from medfed.models import catalogue, parameters
from medfed.privacy.journal import LIMIT_BYTES, check_journal
from medfed.privacy.page import page, rounded_up
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

_Parsed = TypeVar("_Parsed", bound=BaseModel)


class Check(TypedDict):
    """One check: its name, whether it holds, and what was found."""

    check: str
    holds: bool
    detail: str


class Verification(TypedDict):
    """What ``verify --json`` prints. The figures are the statement's; None where ``privacy.json`` could not be read."""

    verified: bool
    study: str | None
    study_sha256: str | None
    epsilon: float | None
    epsilon_spent: float | None
    delta: float | None
    unit: str | None
    mode: str | None
    stamps: list[str]
    signed_by: list[str]
    checks: list[Check]


@dataclass(frozen=True, slots=True)
class _Run:
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


def verify(files: Files, folder: Path, site: Site | None) -> Verification:
    """Make every check; one that does not hold stops none of the others. ``site``: the hospital that asks, if there is one."""
    checks: list[Check] = []
    opened: list[_Run] = []

    def make(name: str, look: Callable[[], str]) -> None:
        try:
            checks.append(Check(check=name, holds=True, detail=look()))
        except MedfedError as error:
            checks.append(Check(check=name, holds=False, detail=error.what))

    def open_it() -> str:
        opened.append(_open(files, folder, site))
        return "statement, study and roster can be read"

    make("documents", open_it)
    for run in opened:
        for name, look in _CHECKS.items():
            make(name, partial(look, run))
        if site is not None and run.own is not None:
            make("own ledger", partial(_check_own_ledger, run, site))
    return _result(opened, checks)


def _result(opened: list[_Run], checks: list[Check]) -> Verification:
    said = opened[0].file if opened else None
    return Verification(
        verified=all(check["holds"] for check in checks),
        study=None if said is None else said.study,
        study_sha256=None if said is None else said.study_sha256,
        epsilon=None if said is None else said.epsilon,
        epsilon_spent=None if said is None else said.epsilon_spent,
        delta=None if said is None else said.delta,
        unit=None if said is None else said.unit,
        mode=None if said is None else said.mode,
        stamps=said.stamps if said else [],
        signed_by=[mine.hospital for mine in said.hospitals] if said else [],
        checks=checks,
    )


def in_words(found: Verification) -> Iterator[str]:
    """One line a check, then what it comes to."""
    width = max(len(check["check"]) for check in found["checks"])
    for check in found["checks"]:
        yield f"{'holds' if check['holds'] else 'FAILS'}  {check['check']:<{width}}  {shown(check['detail'])}"
    yield ""
    for stamp in found["stamps"]:
        yield f"[{shown(stamp)}]"
    if found["verified"]:
        epsilon = rounded_up(found["epsilon"] or 0.0)
        yield f"All {len(found['checks'])} checks hold: epsilon {epsilon}, delta {found['delta']:g}, by {found['unit']}."
        yield "Whose keys these are, only people can tell: compare the fingerprints in privacy.md with the hospitals."
    else:
        failed = ", ".join(check["check"] for check in found["checks"] if not check["holds"])
        yield f"NOT verified: {failed}."


def require_verified(found: Verification) -> None:
    """Raise MF-194 unless every check holds."""
    failed = [check["check"] for check in found["checks"] if not check["holds"]]
    if failed:
        raise RemoteProtocolError(
            194,
            f"{len(failed)} of {len(found['checks'])} checks do not hold ({', '.join(failed)})",
            "do not rely on this run",
        )


# ----------------------------------------------------------------------------------------------------------- documents


def _open(files: Files, folder: Path, site: Site | None) -> _Run:
    file = _parsed(files.read(folder / "privacy.json"), PrivacyFile, "privacy.json")
    study_bytes = files.read(folder / "study.json")
    study = _parsed(study_bytes, Study, "study.json")
    roster = load_roster(files, folder / "roster.json")
    plan = make_plan(study, parameters.count(catalogue.build(study)))
    public = None if site is None else site.identity().public
    own = roster.identities.index(public) if public in roster.identities else None
    return _Run(files, folder, file, study_bytes, study, roster, plan, own)


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


def _check_kind(run: _Run) -> str:
    spoiled = [stamp for stamp in run.file.stamps if stamp.startswith(NOT_PRIVATE)]
    _require(not spoiled, f"the run is stamped {', '.join(spoiled)}")
    if run.file.is_simulation:
        return "a simulation: keys made for it on one machine, no hospital signed"
    return f"stamped {', '.join(run.file.stamps)}" if run.file.stamps else "a run at hospitals"


def _check_study(run: _Run) -> str:
    _require(run.study.canonical_bytes() == run.study_bytes, "study.json is not in canonical form")
    _require(run.study.hash().hex() == run.file.study_sha256, "study.json is not the study that was signed")
    if run.files.exists(run.folder / "study.toml"):
        text = load_study(run.files, run.folder / "study.toml")
        _require(text == run.study, "study.toml is another study than study.json")
    return f"{run.study.study.name}, {run.file.study_sha256}"


def _check_roster(run: _Run) -> str:
    digest = run.roster.hash().hex()
    _require(
        digest == run.study.cohort.roster_sha256 == run.file.roster_sha256, "roster.json is not the study's roster"
    )
    _require(
        len(run.roster.hospitals) == run.study.cohort.hospitals, "study and roster differ in the number of hospitals"
    )
    return f"{len(run.roster.hospitals)} hospitals, every enrolment document signed by its own key"


def _check_coordinator(run: _Run) -> str:
    run.file.statement.check(bytes.fromhex(run.roster.coordinator), bytes.fromhex(run.file.coordinator_signature))
    return "the coordinator signed this statement"


def _check_signatures(run: _Run) -> str:
    """Every hospital of the roster, over this very statement; of a hospital's own copy its own."""
    expected = [run.own] if run.is_own_copy else list(range(len(run.roster.hospitals)))
    positions = [mine.position for mine in run.file.hospitals]
    _require(positions == expected, f"{len(positions)} of {len(expected)} hospitals signed, or one signed twice")
    for mine in run.file.hospitals:
        charged = (mine.attempts_charged, mine.epsilon_spent_micro)
        wanted = hospital_statement(run.file.statement, run.roster, mine.position, charged, mine.head)
        _require(
            HospitalStatement(**mine.model_dump(exclude={"signature"})) == wanted, f"{mine.hospital} signed another run"
        )
        mine.check()
    whose = "this hospital's own copy, its own signature" if run.is_own_copy else f"all {len(expected)} hospitals"
    return f"{whose}: statement, model, and the row that ended the study in the ledger"


def _check_attempts(run: _Run) -> str:
    used, approved = run.file.attempts_used, run.file.attempts_approved
    _require(used <= approved, f"{used} attempts were used, {approved} approved")
    for mine in run.file.hospitals:
        require_plausible(mine, run.file, run.plan)
    counts = sorted({mine.attempts_charged for mine in run.file.hospitals})
    charged = " to ".join(str(count) for count in (counts if len(counts) < 2 else (counts[0], counts[-1])))
    return f"{used} used of {approved} approved, charged at the hospitals: {charged}, {run.file.released_sums} sums released"


def _check_journal(run: _Run) -> str:
    path = run.folder / "journal.jsonl"
    if run.is_own_copy and not run.files.exists(path):
        return "with the coordinator, its last line is signed here"
    lost = check_journal(run.files.read(path, limit_bytes=LIMIT_BYTES), run.file, run.roster.identities)
    return f"whole, {run.file.attempts_used} attempts, {lost} of them lost"


def _check_model(run: _Run) -> str:
    data = run.files.read(run.folder / "model.safetensors", limit_bytes=1 << 34)
    _require(
        hashlib.sha256(data).hexdigest() == run.file.model_sha256, "model.safetensors is not the model that was signed"
    )
    parameters.from_safetensors(catalogue.build(run.study), data)
    return f"model.safetensors, {run.file.model_sha256}"


def _check_figures(run: _Run) -> str:
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


def _check_page(run: _Run) -> str:
    text = run.files.read(run.folder / "privacy.md")
    if run.file.versions.get("medfed") != __version__:
        return f"privacy.md is not compared: this is medfed {__version__}, which words it in its own way"
    _require(text == page(run.file, run.roster).encode(), "privacy.md is not the page of this privacy.json")
    return "privacy.md says what privacy.json says"


def _check_own_ledger(run: _Run, site: Site) -> str:
    """That this hospital's ledger holds the row stated for it, and charged as many attempts."""
    stated = [mine for mine in run.file.hospitals if mine.position == run.own]
    _require(bool(stated), "this hospital's signature is missing")
    study = run.study.hash()
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        for mine in stated:
            ledger.check_witness(mine.head, bytes.fromhex(mine.identity))
            events = ledger.approved(study).events
            _require(events == mine.attempts_charged, f"this hospital's ledger charged {events} attempts")
    return f"has row {stated[0].ledger_seq} as stated, and charged {stated[0].attempts_charged} attempts"


_CHECKS: dict[str, Callable[[_Run], str]] = {
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
