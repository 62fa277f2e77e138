"""``medfed-client verify``: everything that a run's folder claims, worked out anew. Needs no network, key or configuration.

docs/privacy_statement.md says what is checked, against what, and what that does not show. Beside a ``hospital.toml`` the
statement is also held against this hospital's own ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypedDict

from medfed.client.run_checks import CHECKS, NotChecked, Run, check_own_ledger, open_run
from medfed.client.site import Site
from medfed.display import shown
from medfed.errors import MedfedError, RemoteProtocolError
from medfed.seams import Files
from medfed.wording import rounded_up


class Check(TypedDict):
    """One check: its name, whether it holds (None: it was not made), and what was found."""

    check: str
    holds: bool | None
    detail: str


class Verification(TypedDict):
    """What ``verify --json`` prints. The figures are the statement's; None where ``privacy.json`` could not be read.

    ``not_signed_by``: hospitals of the roster, None where a hospital's own copy does not tell. ``covers``: the files that
    were held against what was signed; whatever else lies in the folder, nobody has signed. ``stamps``: the coordinator's word.
    """

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
    not_signed_by: list[str] | None
    covers: list[str]
    checks: list[Check]


def verify(files: Files, folder: Path, site: Site | None) -> Verification:
    """Make every check; one that does not hold stops none of the others. ``site``: the hospital that asks, if there is one."""
    checks: list[Check] = []
    opened: list[Run] = []

    def make(name: str, look: Callable[[], str]) -> None:
        try:
            checks.append(Check(check=name, holds=True, detail=look()))
        except NotChecked as reason:
            checks.append(Check(check=name, holds=None, detail=str(reason)))
        except MedfedError as error:
            checks.append(Check(check=name, holds=False, detail=error.what))

    def open_it() -> str:
        opened.append(open_run(files, folder, site))
        return "statement, study and roster can be read"

    make("documents", open_it)
    for run in opened:
        for name, look in CHECKS.items():
            make(name, partial(look, run))
        if site is not None and run.own is not None:
            make("own ledger", partial(check_own_ledger, run, site))
    return _result(opened, checks)


def _result(opened: list[Run], checks: list[Check]) -> Verification:
    run = opened[0] if opened else None
    said = None if run is None else run.file
    compared = {check["check"] for check in checks if check["holds"]}
    return Verification(
        verified=all(check["holds"] is not False for check in checks),
        study=None if said is None else said.study,
        study_sha256=None if said is None else said.study_sha256,
        epsilon=None if said is None else said.epsilon,
        epsilon_spent=None if said is None else said.epsilon_spent,
        delta=None if said is None else said.delta,
        unit=None if said is None else said.unit,
        mode=None if said is None else said.mode,
        stamps=said.stamps if said else [],
        signed_by=[mine.hospital for mine in said.hospitals] if said else [],
        not_signed_by=None if run is None or run.is_own_copy else run.not_signed_by,
        covers=[] if run is None else [name for check, name in run.covered() if check in compared],
        checks=checks,
    )


_MARKS = {True: "holds", False: "FAILS", None: "NOT CHECKED"}


def in_words(found: Verification) -> Iterator[str]:
    """One line a check, then what it comes to."""
    width = max(len(check["check"]) for check in found["checks"])
    marks = max(len(_MARKS[check["holds"]]) for check in found["checks"])
    for check in found["checks"]:
        yield f"{_MARKS[check['holds']]:<{marks}}  {check['check']:<{width}}  {shown(check['detail'])}"
    yield ""
    for stamp in found["stamps"]:
        yield f"[{shown(stamp)}] (the coordinator's word)"
    if found["verified"]:
        epsilon = rounded_up(found["epsilon"] or 0.0)
        made = sum(check["holds"] is True for check in found["checks"])
        of_all = f"All {made}" if made == len(found["checks"]) else f"{made} of {len(found['checks'])}"
        yield f"{of_all} checks hold: epsilon {epsilon}, delta {found['delta']:g}, by {found['unit']}."
        yield f"They cover {', '.join(found['covers'])}. Anything else in the folder, as report.md or result.json, nobody signed."
        yield "Whose keys these are, only people can tell: compare the fingerprints in privacy.md with the hospitals."
    else:
        failed = ", ".join(check["check"] for check in found["checks"] if check["holds"] is False)
        yield f"NOT verified: {failed}."


def require_verified(found: Verification) -> None:
    """Raise MF-194 unless every check holds."""
    failed = [check["check"] for check in found["checks"] if check["holds"] is False]
    if failed:
        raise RemoteProtocolError(
            194,
            f"{len(failed)} of {len(found['checks'])} checks do not hold ({', '.join(failed)})",
            "do not rely on this run",
        )
