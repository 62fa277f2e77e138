"""Every known way of getting the ledger wrong, planted in production code: a check of this file notices.

A check runs production code and raises ``Noticed``; it passes on the code as it is and must not with the bug.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import sqlite3
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from medfed_test_disk import sqlite_library
from medfed_test_power_cuts import CAPS, IDENTITY, approval, cut, digest, spend

from medfed import seams
from medfed.client import participation
from medfed.client.hospital import Hospital
from medfed.client.ledger import Caps, Head, Kind, Ledger, LedgerView, accounts, rows, view
from medfed.client.ledger import store as ledger_store
from medfed.client.ledger.entries import Body, Draft, ReservedBody, SealedBody
from medfed.client.ledger.store import Store
from medfed.errors import EnvironmentFault, MedfedError
from medfed.seams import SystemFiles
from medfed.server.exchange import Reply
from medfed.server.rounds import Rounds
from medfed.wire import Upload, decode

STUDY = approval("a").study
FILES = SystemFiles()


class Noticed(AssertionError):
    """The check saw that a promise is broken."""


def need(holds: object, what: object) -> None:
    if not holds:
        raise Noticed(what)


@contextlib.contextmanager
def refused(code: int, what: str) -> Iterator[None]:
    try:
        yield
    except MedfedError as error:
        need(error.code == code, f"{what}, but for another reason: {error}")
    else:
        raise Noticed(what)


@dataclass(frozen=True)
class Place:
    """What a check may use."""

    folder: Path
    make_world: Callable
    patch: pytest.MonkeyPatch

    @property
    def path(self) -> Path:
        return self.folder / "ledger.db"

    @contextlib.contextmanager
    def approved(self) -> Iterator[Ledger]:
        """A new ledger with one study of 50 attempts."""
        with Ledger.create(FILES, self.path, IDENTITY) as ledger:
            ledger.approve(approval("a"), [digest("patient")], CAPS)
            yield ledger


# ----------------------------------------------------------------------------------------------------------------- checks


class Wires:
    """Production's rounds over production's hospitals; what a ledger's file holds is read as each reply leaves."""

    def __init__(self, world) -> None:
        self.world, self.inbox, self.uploads, self.early = world, [], 0, []

    def online(self) -> frozenset[int]:
        return frozenset(self.world.hospitals)

    def send(self, position: int, kind: object, payload: bytes, timeout_s: float) -> None:
        reply = self.world.hospitals[position].handle(payload)
        message = decode(reply, vector_limit_bytes=1 << 16)
        if isinstance(message, Upload):
            self.uploads += 1
            if ("RELEASED", message.attempt) not in self.world.rows(position):
                self.early.append("an upload leaves before it is in the ledger")
        self.inbox.append(Reply(position, reply, None))

    def receive(self) -> list[Reply]:
        replies, self.inbox = self.inbox, []
        return replies


class Enough(Exception):
    """One round is."""


def after_one_round(checkpoint: object, what: str) -> None:
    if what.endswith(" done"):
        raise Enough


def debit_comes_before_use_and_sending(place: Place) -> None:
    world = place.make_world()
    wires = Wires(world)
    use, used = participation.noised_sum, []

    def watched_use(approved, *rest):
        used.append(approved.position)
        if world.charged(approved.position) < used.count(
            approved.position
        ):  # kept: a hospital tells nobody why it failed
            wires.early.append("records are used before the debit is in the ledger")
        return use(approved, *rest)

    place.patch.setattr(participation, "noised_sum", watched_use)
    world.start_all()
    with contextlib.suppress(Enough, EnvironmentFault):
        Rounds(world.assignment, wires, world.store, world.base, after_one_round).run()
    need(not wires.early, wires.early)
    need(wires.uploads == len(used) == len(world.hospitals), "not everybody sent")


def power_cuts_lose_no_debit(place: Place) -> None:
    if sqlite_library() is None:
        pytest.skip("Python's sqlite3 has no libsqlite3 of its own that a VFS could be registered in")
    for name in ("spent", "found"):
        (place.folder / name).mkdir()
    found = cut(spend(place.folder / "spent", {}), place.folder / "found", 60, seed=4)
    need((found.lost, found.refused, found.silent) == (0, [], 0), f"a power cut broke a promise: {found}")


def lost_attempts_stay_charged(place: Place) -> None:
    with place.approved() as ledger:
        for attempt in (1, 2):
            reservation = ledger.reserve(STUDY, attempt, attempt, CAPS, 0.0)
            ledger.abandon(STUDY, attempt, "lost")
            stands = ledger.account(STUDY, CAPS)
            need(stands.attempts_used == attempt, "a lost attempt is not charged")
            need(stands.lifetime_spent == reservation.lifetime_after, "a lost attempt's epsilon came back")


def spending_outlasts_the_years(place: Place) -> None:
    with place.approved() as ledger:
        for attempt, year in ((1, 0), (2, 30)):
            reservation = ledger.reserve(STUDY, attempt, attempt, CAPS, year * 31_557_600.0)
            stands = ledger.account(STUDY, CAPS)
            need(stands.attempts_used == attempt, "an old attempt is forgotten")
            need(stands.lifetime_spent == reservation.lifetime_after, "an old attempt's epsilon came back")


def nothing_is_recorded_twice(place: Place) -> None:
    """The database itself refuses, should the code above it ever not."""
    with place.approved() as ledger:
        for attempt in (1, 2):
            ledger.reserve(STUDY, attempt, attempt, CAPS, 0.0)
        ledger.seal(STUDY, 1, digest("v"), digest("pad"), digest("r"))
        reserved = next(entry for entry in ledger.entries() if entry.kind is Kind.RESERVED)
        again: list[tuple[str, Kind, int, Body]] = [
            ("an attempt is reserved twice", Kind.RESERVED, 1, reserved.read(ReservedBody)),
            ("a pad covers two vectors", Kind.SEALED, 2, ledger.entries()[-1].read(SealedBody)),
        ]
        for what, kind, attempt, body in again:
            with refused(181, what), ledger._store.transaction():
                ledger._store.append(Draft(kind, STUDY, attempt, body))


def money_is_rounded_up(place: Place) -> None:
    with place.approved() as ledger:
        for attempt in range(1, 6):
            debit = ledger.reserve(STUDY, attempt, attempt, CAPS, 0.0)
            body = ledger.entries()[-1].read(ReservedBody)
            for kept, true in (
                (body.study_after_micro, debit.epsilon_after),
                (body.filter_after_micro, debit.filter_after),
            ):
                need(kept >= Fraction(true) * 1_000_000, "less is recorded than was spent")


def cap_is_never_exceeded(place: Place) -> None:
    """By less than a millionth either."""
    with place.approved() as ledger:
        cost = ledger.preview(approval("b"), [digest("other")], CAPS).epsilon_study
        below = Caps(math.floor(cost * 1e6) / 1e6, CAPS.max_epsilon_lifetime, CAPS.lifetime_delta)
        need(below.max_epsilon_study < cost, "this study costs whole millionths")
        with refused(501, f"{cost} fits under a cap of {below.max_epsilon_study}"):
            ledger.approve(approval("b"), [digest("other")], below)


def changed_row_is_refused(place: Place) -> None:
    with place.approved() as ledger:
        ledger.reserve(STUDY, 1, 1, CAPS, 0.0)
        ledger.abandon(STUDY, 1, "lost")
    with contextlib.closing(sqlite3.connect(place.path, isolation_level=None)) as shell:
        (rule,) = shell.execute("SELECT sql FROM sqlite_master WHERE name = 'entries_update'").fetchone()
        shell.execute("DROP TRIGGER entries_update")
        shell.execute("UPDATE entries SET body = replace(body, '\"wall_s\":0.0', '\"wall_s\":1.0') WHERE attempt = 1")
        shell.execute(rule)
    with refused(403, "a row was changed and the ledger opens"):
        Ledger.open(FILES, place.path, IDENTITY).close()


def restored_ledger_is_noticed(place: Place) -> None:
    with place.approved() as ledger:
        before = place.path.read_bytes()
        ledger.reserve(STUDY, 1, 1, CAPS, 0.0)
        seen: Head = ledger.head()
    place.path.write_bytes(before)
    with Ledger.open(FILES, place.path, IDENTITY) as ledger, refused(405, "yesterday's ledger passes for today's"):
        ledger.check_witness(seen, IDENTITY.public)


def one_process_writes(place: Place) -> None:
    with place.approved(), refused(620, "a second writer opened the ledger"):
        Ledger.open(FILES, place.path, IDENTITY).close()


def one_name_a_ledger(place: Place) -> None:
    second = place.folder / "second" / "ledger.db"
    second.parent.mkdir()
    for link in (os.symlink, os.link):
        with place.approved() if not place.path.exists() else Ledger.open(FILES, place.path, IDENTITY):
            link(place.path, second)
            with refused(204, "a second writer opened the ledger under another name"):
                Ledger.open(FILES, second, IDENTITY).close()
            second.unlink()


def patients_are_never_strangers_to_their_account(place: Place) -> None:
    """The same people, hashed by another key or known by another column."""
    ids = approval("a").ids
    with place.approved() as ledger:
        for other in (replace(ids, key=digest("key")), replace(ids, column="stay")):
            with refused(340, "the same patients begin a fresh account"):
                ledger.approve(replace(approval("b"), ids=other), [digest("hashed otherwise")], CAPS)


def edited_caps_forget_nothing(place: Place) -> None:
    with place.approved() as ledger:
        first = ledger.reserve(STUDY, 1, 1, CAPS, 0.0).filter_after
        second = ledger.reserve(STUDY, 2, 2, replace(CAPS, lifetime_delta=1e-2), 0.0).filter_after
        need(second > first, "the same spending counts less once the caps are edited")


CHECKS = [
    debit_comes_before_use_and_sending,
    power_cuts_lose_no_debit,
    lost_attempts_stay_charged,
    spending_outlasts_the_years,
    nothing_is_recorded_twice,
    money_is_rounded_up,
    cap_is_never_exceeded,
    changed_row_is_refused,
    restored_ledger_is_noticed,
    one_process_writes,
    one_name_a_ledger,
    patients_are_never_strangers_to_their_account,
    edited_caps_forget_nothing,
]


@pytest.fixture
def place(tmp_path: Path, make_world, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, make_world, monkeypatch)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_production_keeps_the_promise(check: Callable[[Place], None], place: Place) -> None:
    check(place)


# ------------------------------------------------------------------------------------------------------------------- bugs


@dataclass(frozen=True)
class Change:
    """In the source of ``owner.name``: each ``old``, which stands there once, becomes its ``new``."""

    owner: type | ModuleType
    name: str
    pairs: tuple[tuple[str, str], ...]

    def __call__(self, patch: pytest.MonkeyPatch) -> None:
        function = getattr(self.owner, self.name)
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in self.pairs:
            assert source.count(old) == 1, f"{self.name} no longer says {old!r}: plant the bug anew"
            source = source.replace(old, new)
        scope: dict[str, object] = {}
        exec(
            compile(f"from __future__ import annotations\n{source}", f"<planted in {self.name}>", "exec"),
            function.__globals__,
            scope,
        )
        patch.setattr(self.owner, self.name, scope[self.name])


def after_send(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    """These of the ledger's methods write once the reply has left, when the next request comes."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        late: list[Callable[[], object]] = []
        handle = Hospital.handle

        def put_off(write: Callable) -> Callable:
            def later(*arguments: object) -> object:
                late.append(lambda: write(*arguments))
                return SimpleNamespace(epsilon_after=0.0)

            return later

        def catch_up_first(self: Hospital, frame: bytes) -> bytes:
            while late:
                late.pop(0)()
            return handle(self, frame)

        for name in names:
            patch.setattr(Ledger, name, put_off(getattr(Ledger, name)))
        patch.setattr(Hospital, "handle", catch_up_first)

    return plant


def synced(how: str, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        Change(Store, "attach", (("PRAGMA synchronous = EXTRA", f"PRAGMA synchronous = {how}"),))(patch)
        patch.setattr(ledger_store, "_SYNCHRONOUS_EXTRA", number)

    return plant


def counted_only(where: str) -> Change:
    return Change(Store, "tallies", (("kind = 'RESERVED' {only}", f"kind = 'RESERVED' AND {where} {{only}}"),))


ABANDONED = (
    "NOT EXISTS (SELECT 1 FROM entries AS a WHERE a.study = entries.study AND a.attempt = entries.attempt "
    "AND a.kind = 'ABANDONED')"
)
LAST_YEAR = "json_extract(body, '$.wall_s') > (SELECT max(json_extract(body, '$.wall_s')) FROM entries) - 31557600"


def without_rule(*gone: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The schema without each of these words, or the whole statement that begins with them."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        schema = ledger_store._SCHEMA
        for words in gone:
            assert sum(words in statement for statement in schema) == 1
            schema = tuple(statement.replace(words, "") for statement in schema if not statement.startswith(words))
        patch.setattr(ledger_store, "_SCHEMA", schema)

    return plant


def rounding_down(module) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, "micro", lambda value: math.floor(value * 1e6))


BUGS: list[tuple[str, Callable[[Place], None], Callable[[pytest.MonkeyPatch], None]]] = [
    ("debit after send", debit_comes_before_use_and_sending, after_send("reserve", "seal_and_release")),
    ("seal after send", debit_comes_before_use_and_sending, after_send("seal_and_release")),
    (
        "debit after use",
        debit_comes_before_use_and_sending,
        Change(
            participation.Participation,
            "_take_part",
            (
                ("    self._reserve(request)\n", ""),
                (
                    "reply = self._train_and_seal(",
                    "self._noised_vector(); self._reserve(request); reply = self._train_and_seal(",
                ),
            ),
        ),
    ),
    ("no fsync", power_cuts_lose_no_debit, synced("OFF", 0)),
    ("NORMAL sync", power_cuts_lose_no_debit, synced("NORMAL", 1)),
    ("FULL sync of a rollback journal", power_cuts_lose_no_debit, synced("FULL", 2)),
    ("refund on abort", lost_attempts_stay_charged, counted_only(ABANDONED)),
    ("UNIQUE attempt dropped", nothing_is_recorded_twice, without_rule(",\n        UNIQUE (study, attempt, kind)")),
    ("UNIQUE pad dropped", nothing_is_recorded_twice, without_rule("CREATE UNIQUE INDEX one_vector_a_pad")),
    ("rounding down what is recorded", money_is_rounded_up, rounding_down(rows)),
    ("rounding down at the cap", cap_is_never_exceeded, rounding_down(accounts)),
    (
        "chain unchecked",
        changed_row_is_refused,
        lambda patch: patch.setattr(ledger_store, "check_chain", lambda *_: None),
    ),
    (
        "witness ignored",
        restored_ledger_is_noticed,
        lambda patch: patch.setattr(LedgerView, "check_witness", lambda *_: None),
    ),
    ("time refill", spending_outlasts_the_years, counted_only(LAST_YEAR)),
    (
        "two writers",
        one_process_writes,
        lambda patch: patch.setattr(SystemFiles, "lock", lambda *_: contextlib.nullcontext()),
    ),
    ("two names", one_name_a_ledger, lambda patch: patch.setattr(seams, "_refuse_links", lambda _: None)),
    (
        "another key",
        patients_are_never_strangers_to_their_account,
        Change(view, "require_same", (("now.key != before.key", "False"),)),
    ),
    (
        "another column",
        patients_are_never_strangers_to_their_account,
        Change(view, "require_same", (("now.column != before.column", "False"),)),
    ),
    (
        "order of the day",
        edited_caps_forget_nothing,
        Change(
            accounts,
            "filtered",
            (("[known.caps for known in account if not known.shares_patients_with] or [caps]", "[caps]"),),
        ),
    ),
]


@pytest.mark.parametrize(("check", "plant"), [bug[1:] for bug in BUGS], ids=[bug[0] for bug in BUGS])
def test_planted_bug_is_noticed(
    check: Callable[[Place], None], plant: Callable[[pytest.MonkeyPatch], None], place: Place
) -> None:
    plant(place.patch)
    with pytest.raises(Noticed):
        check(place)
