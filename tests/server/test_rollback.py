"""A hospital whose ledger was restored from an old copy is found out at first contact, whoever is silent about it.

Real hospitals in real folders; the coordinator is the real one, over a postman who can change what it relays.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medfed.client.cli import main
from medfed.client.ledger import Caps, Ledger, LedgerView
from medfed.client.status import in_words, status
from medfed.errors import EnvironmentFault, ExitStatus, MedfedError, PrivacyError
from medfed.identity import Identity
from medfed.server.exchange import Kind, Reply
from medfed.server.rounds import Rounds
from medfed.server.store import Store
from medfed.wire import (
    Finish,
    Message,
    OfferReply,
    Refusal,
    Refused,
    RoundRequest,
    SetupRequest,
    Upload,
    decode,
    encode,
)
from medfed.witness import Head, Witness, item, newest, read_heads, signed_bytes

EVERYBODY = range(4)
NAMES = ("Ahaus", "Bonn", "Celle", "Daun")
BONN = 1
CAPS = Caps(1000.0, 1000.0, 1e-5)

Change = Callable[[int, Message], Message]


class Killed(BaseException):
    """The coordinator's process is gone."""


class Post:
    """Hands the coordinator's frames to the hospitals; ``change(position, request)`` makes a liar of it."""

    def __init__(self, world, change: Change = lambda position, request: request) -> None:
        self.world, self.change, self.inbox = world, change, []
        self.replies: list[tuple[int, Message]] = []

    def online(self) -> frozenset[int]:
        return frozenset(EVERYBODY)

    def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
        request = self.change(position, opened(payload))
        frame = self.world.hospitals[position].handle(encode(request, self.world.assignment.identity))
        self.replies.append((position, opened(frame)))
        self.inbox.append(Reply(position, frame, None))

    def receive(self) -> list[Reply]:
        replies, self.inbox = self.inbox, []
        return replies


def opened(frame: bytes) -> Message:
    return decode(frame, vector_limit_bytes=1 << 16)


def coordinator(world, post: Post, observe: Callable[[str], None] = lambda what: None) -> Rounds:
    """One process of it."""
    store = Store(world.base.files, world.run_folder, world.study, world.assignment.plan.words)
    tell = world.seams_of("coordinator")
    return Rounds(world.assignment, post, store, tell, lambda checkpoint, what: observe(what))


def until(end: str) -> Callable[[str], None]:
    def observe(what: str) -> None:
        if what == end:
            raise Killed

    return observe


class Backups:
    """Copies of Bonn's folder."""

    def __init__(self, world) -> None:
        self.world, self.home = world, world.folder / "Bonn"

    def make(self, name: str) -> None:
        shutil.copytree(self.home, self.world.folder / name)

    def restore(self, name: str) -> None:
        """Power off, restore, on again."""
        self.world.kill(BONN)
        shutil.rmtree(self.home)
        shutil.copytree(self.world.folder / name, self.home)
        self.world.start(BONN)


@pytest.fixture
def restored(world) -> Backups:
    """Two rounds are done, the coordinator has died, and Bonn's machine is back at yesterday: nothing was spent there."""
    backups = Backups(world)
    world.start_all()
    backups.make("yesterday")
    with contextlib.suppress(Killed):
        coordinator(world, Post(world), until("round 2 done")).run()
    assert world.charged(BONN) == 2
    backups.make("newest")
    backups.restore("yesterday")
    return backups


def witnesses_of(world) -> Path:
    return world.run_folder.parent / "witnesses.bin"


def found_out(world, rounds: Rounds) -> None:
    """The run ends with Bonn's name, and Bonn spent nothing on its old ledger."""
    with pytest.raises(PrivacyError, match="MF-192 Bonn") as caught:
        rounds.run()
    assert "MF-405" in str(caught.value)
    assert world.hospitals[BONN].is_locked
    assert world.rows(BONN) == [("BEGUN", 0), ("APPROVED", 0)]


# ------------------------------------------------------------------------------------------------------- who notices


def test_yesterdays_ledger_is_noticed_through_the_coordinators_witness(restored: Backups) -> None:
    post = Post(restored.world)
    found_out(restored.world, coordinator(restored.world, post))
    assert not any(isinstance(reply, Upload) for _, reply in post.replies)
    assert [reply for position, reply in post.replies if position == BONN and isinstance(reply, OfferReply)] == []


def test_yesterdays_ledger_is_noticed_through_a_peers_witness_alone(restored: Backups) -> None:
    witnesses_of(restored.world).unlink()
    post = Post(restored.world)
    found_out(restored.world, coordinator(restored.world, post))
    bonns = [reply for position, reply in post.replies if position == BONN]
    assert [type(reply) for reply in bonns] == [OfferReply, Refusal], "it told its head before it was shown a later one"
    assert bonns[1].reason == Refused.LEDGER_BEHIND


def test_one_peer_that_remembers_is_enough(restored: Backups) -> None:
    witnesses_of(restored.world).unlink()
    for name in ("Ahaus", "Celle"):
        (restored.world.folder / name / "witnesses.bin").unlink()
    for position in (0, 2):
        restored.world.start(position)
    found_out(restored.world, coordinator(restored.world, Post(restored.world)))


def test_ledger_that_nobody_saw_later_is_not_noticed(restored: Backups) -> None:
    """The control: it is the witnesses that notice. Without one the old ledger has its attempts to give once more."""
    world = restored.world
    witnesses_of(world).unlink()
    for position, name in enumerate(NAMES):
        if position != BONN:
            (world.folder / name / "witnesses.bin").unlink()
            world.start(position)
    post = Post(world)
    with pytest.raises(MedfedError) as caught:  # for want of the state alone, which a newer folder has
        coordinator(world, post).run()
    assert "MF-405" not in str(caught.value)
    assert not world.hospitals[BONN].is_locked
    bonns = [reply for position, reply in post.replies if position == BONN]
    assert isinstance(bonns[0], OfferReply) and bonns[0].highest_attempt == 0
    assert Refused.LEDGER_BEHIND not in {reply.reason for reply in bonns if isinstance(reply, Refusal)}


def test_witness_ignored_lets_yesterdays_ledger_answer(restored: Backups, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a hospital that looks no head up goes on; the coordinator notices by itself."""
    monkeypatch.setattr(LedgerView, "check_witness", lambda self, head, public: None)
    post = Post(restored.world)
    with pytest.raises(PrivacyError, match="MF-192 Bonn goes on with an old or a second ledger"):
        coordinator(restored.world, post).run()
    assert (BONN, OfferReply) in [(position, type(reply)) for position, reply in post.replies]
    assert not restored.world.hospitals[BONN].is_locked


def test_ledger_restored_within_a_session_is_noticed_at_the_next_request(world) -> None:
    """A witness is as fresh as the last round: here all that is missing is one round."""
    backups = Backups(world)
    world.start_all()

    def observe(what: str) -> None:
        if what == "round 1 done":
            backups.make("an hour ago")
        if what == "round 2 done":
            backups.restore("an hour ago")

    with pytest.raises(PrivacyError, match=r"MF-192 Bonn.*MF-405"):
        coordinator(world, Post(world), observe).run()
    assert world.charged(BONN) == 1


def test_ledger_restored_after_the_last_round_is_noticed_at_the_end(world) -> None:
    backups = Backups(world)
    world.start_all()
    backups.make("yesterday")

    def observe(what: str) -> None:
        if what == "round 3 done":
            backups.restore("yesterday")

    found_out(world, coordinator(world, Post(world), observe))


@pytest.mark.parametrize("who_remembers", ["coordinator", "peers"])
def test_old_ledger_that_went_on_is_noticed_by_the_row_that_differs(restored: Backups, who_remembers: str) -> None:
    """A fork: it has more rows than anybody saw, but one of them was another."""
    world = restored.world
    world.kill(BONN)
    site = world.site(BONN)
    with Ledger.open(site.seams.files, site.ledger_path, site.identity()) as ledger:
        for attempt in (1, 2, 3, 4):
            ledger.reserve(world.study_hash, 1, attempt, CAPS, world.clock.wall())
            ledger.abandon(world.study_hash, attempt, "tried out")
        rows = ledger.head().seq
    world.start(BONN)
    if who_remembers == "peers":
        witnesses_of(world).unlink()
    with pytest.raises(PrivacyError, match=r"MF-192 Bonn.*MF-405"):
        coordinator(world, Post(world)).run()
    assert len(world.rows(BONN)) == rows


# ------------------------------------------------------------------------------------------------ the lock, and out


def test_lock_survives_a_restart_and_says_so_everywhere(
    restored: Backups, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    world = restored.world
    heard: list[bool] = []
    world.hospitals[BONN].on_lock = lambda: heard.append(True)
    with pytest.raises(PrivacyError, match="MF-192"), caplog.at_level(logging.ERROR, "medfed.client"):
        coordinator(world, Post(world)).run()
    assert "LOCKED" in caplog.text and "MF-405" in caplog.text
    assert heard, "a probe is told"
    site = world.site(BONN)
    said = status(site)
    assert said["locked"] is not None and said["locked"].startswith("MF-405")
    assert any("LOCKED" in line and "restore the newest ledger.db" in line for line in in_words(said))
    config = str(world.folder / "Bonn" / "hospital.toml")
    assert main(["ledger", "--verify", "--config", config]) == ExitStatus.INTEGRITY
    assert "MF-405" in capsys.readouterr().err
    assert main(["ledger", "--config", config]) == ExitStatus.HANDLED, "looking is allowed"
    witnesses_of(world).unlink()
    with pytest.raises(PrivacyError, match="MF-405"):
        world.start(BONN)
    with pytest.raises(PrivacyError, match="MF-405"):
        Ledger.open(site.seams.files, site.ledger_path, site.identity())


def test_locked_hospital_refuses_whatever_it_is_asked(restored: Backups) -> None:
    world = restored.world
    post = Post(world)
    with pytest.raises(PrivacyError, match="MF-192"):
        coordinator(world, post).run()
    rows = world.rows(BONN)
    state = world.assignment.first
    requests = [
        SetupRequest(world.study_hash, bytes(16), ()),
        RoundRequest(world.study_hash, bytes(16), bytes(16), 3, state.completed_rounds, bytes(32), (), (), b"", b""),
        Finish(world.study_hash, bytes(16), 3, bytes(32), (), b"", bytes(64), b"", b""),
    ]
    for request in requests:
        reply = opened(world.hospitals[BONN].handle(encode(request, world.assignment.identity)))
        assert isinstance(reply, Refusal) and reply.reason == Refused.LEDGER_BEHIND
    assert world.rows(BONN) == rows


def test_newest_backup_unlocks_and_the_run_goes_on(restored: Backups) -> None:
    world = restored.world
    with pytest.raises(PrivacyError, match="MF-192"):
        coordinator(world, Post(world)).run()
    marker = restored.home / "ledger.db.behind"
    seen = marker.read_bytes()
    world.kill(BONN)
    shutil.copyfile(world.folder / "yesterday" / "ledger.db", restored.home / "ledger.db")
    with pytest.raises(PrivacyError, match="MF-405"):  # the wrong copy once more
        world.start(BONN)
    restored.restore("newest")
    marker.write_bytes(seen)  # whoever restores the ledger alone need not remove it
    world.start(BONN)
    done = coordinator(world, Post(world)).run()
    assert done.state.completed_rounds == 3
    assert world.charged(BONN) == 3
    assert status(world.site(BONN))["locked"] is None


# ------------------------------------------------------------------------------------------------------ liars


def test_forged_witness_changes_nothing(world, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the coordinator nor a peer can lock a hospital out: they cannot sign in its name."""
    world.start_all()
    liars = {world.assignment.identity, world.site(0).identity()}
    forged = [item(BONN, Head(999, b"x" * 32, liar.sign(signed_bytes(999, b"x" * 32)))) for liar in liars]

    def lie(position: int, request: Message) -> Message:
        if isinstance(request, SetupRequest | Finish):
            return replace(request, heads=(*request.heads, *forged))
        return request

    class LyingPeer(Post):
        def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
            super().send(position, kind, payload, timeout_s)
            reply = opened(self.inbox[-1].payload)
            if position == 0 and isinstance(reply, OfferReply):
                heads = (reply.heads[0], forged[0], *reply.heads[2:])
                frame = encode(replace(reply, heads=heads), world.site(0).identity())
                self.inbox[-1] = Reply(position, frame, None)

    assert coordinator(world, LyingPeer(world, lie)).run().state.completed_rounds == 3
    assert not world.hospitals[BONN].is_locked
    assert not (world.folder / "Bonn" / "ledger.db.behind").exists()
    assert "do not verify" in caplog.text


def test_coordinator_that_withholds_a_peers_witness_is_refused_by_the_peer(restored: Backups) -> None:
    """It shows Bonn's present head in place of every later one: each peer misses its own word."""
    world = restored.world
    witnesses_of(world).unlink()
    identities = world.assignment.roster.identities
    site = world.site(BONN)
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        old = item(BONN, ledger.head())

    def silent(position: int, request: Message) -> Message:
        if not isinstance(request, RoundRequest):
            return request
        others = (item(place, head) for place, head in read_heads(request.heads, identities) if place != BONN)
        return replace(request, heads=(*others, old))

    post = Post(world, silent)
    with pytest.raises(PrivacyError, match="MF-192 Ahaus stops the study: it misses what hospitals told"):
        coordinator(world, post).run()
    refusals = {position: reply.reason for position, reply in post.replies if isinstance(reply, Refusal)}
    assert {refusals[position] for position in (0, 2, 3)} == {Refused.HEADS_MISSING}
    assert not any(isinstance(reply, Upload) for _, reply in post.replies)


def test_coordinator_that_shows_one_hospital_other_heads_gets_no_sum(world, caplog: pytest.LogCaptureFixture) -> None:
    """The pads are bound to the heads shown: what Bonn sends does not fit what the others send."""
    world.start_all()
    site = world.site(0)
    with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
        older = item(0, ledger.entries()[0].head)

    def lie(position: int, request: Message) -> Message:
        if position != BONN or not isinstance(request, RoundRequest):
            return request
        return replace(request, heads=(older, *(each for each in request.heads if each[:2] != older[:2])))

    post = Post(world, lie)
    with pytest.raises(EnvironmentFault, match="MF-190 all attempts are used after round 0"):
        coordinator(world, post).run()
    assert (BONN, Upload) in [(position, type(reply)) for position, reply in post.replies], (
        "the lie went as far as that"
    )
    assert "ALARM: upload of Bonn refused" in caplog.text


def test_coordinator_that_relays_the_heads_of_an_earlier_round_is_refused(world) -> None:
    """Every upload names a newer row, so heads that did not grow were held back."""
    world.start_all()
    first: list[tuple[bytes, ...]] = []

    def stale(position: int, request: Message) -> Message:
        if not isinstance(request, RoundRequest):
            return request
        first.append(request.heads)
        return replace(request, heads=first[0])

    post = Post(world, stale)
    with pytest.raises(PrivacyError, match="MF-192"):
        coordinator(world, post).run()
    assert {reply.reason for _, reply in post.replies if isinstance(reply, Refusal)} == {Refused.HEADS_MISSING}
    assert [world.charged(position) for position in EVERYBODY] == [1] * 4


def test_upload_that_names_no_new_row_is_an_alarm(world, caplog: pytest.LogCaptureFixture) -> None:
    world.start_all()
    identity = world.site(BONN).identity()

    class Lazy(Post):
        def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
            super().send(position, kind, payload, timeout_s)
            request, reply = opened(payload), opened(self.inbox[-1].payload)
            if position == BONN and isinstance(request, RoundRequest) and isinstance(reply, Upload):
                old = newest(read_heads(request.heads, world.assignment.roster.identities))[BONN]
                self.inbox[-1] = Reply(position, encode(replace(reply, head=old.to_bytes()), identity), None)

    with pytest.raises(EnvironmentFault, match="MF-190"):
        coordinator(world, Lazy(world)).run()
    assert "ALARM: upload of Bonn refused: MF-405" in caplog.text


@pytest.mark.parametrize("spoil", ["no own", "forged own", "cut"])
def test_setup_reply_without_its_own_head_is_asked_for_again(world, spoil: str, caplog) -> None:
    world.start_all()
    identity, done = world.site(BONN).identity(), []
    stranger = Identity.from_seed(b"\x99" * 32)

    class Careless(Post):
        def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
            super().send(position, kind, payload, timeout_s)
            reply = opened(self.inbox[-1].payload)
            if position == BONN and isinstance(reply, OfferReply) and not done:
                done.append(1)
                heads = list(reply.heads)
                forged = Head(9, b"x" * 32, stranger.sign(signed_bytes(9, b"x" * 32)))
                heads[BONN] = {"no own": item(BONN, None), "forged own": item(BONN, forged)}.get(spoil, heads[BONN])
                heads = heads[BONN:] if spoil == "cut" else heads
                self.inbox[-1] = Reply(position, encode(replace(reply, heads=tuple(heads)), identity), None)

    assert coordinator(world, Careless(world)).run().state.completed_rounds == 3
    assert "ALARM: offer of Bonn refused: MF-103" in caplog.text


# ----------------------------------------------------------------------------------------------- what it tells


def test_length_of_a_setup_reply_is_the_same_whatever_is_known(world) -> None:
    world.start_all()
    identity = world.assignment.identity
    seen: list[tuple[int, int]] = []

    def ask(what: str) -> None:
        """What Daun would answer to a setup, how many peers' heads are in it, and its length."""
        if what in ("waiting for Ahaus, Bonn, Celle, Daun", "round 3 done"):
            session = bytes([len(seen)]) * 16
            frame = world.hospitals[3].handle(encode(SetupRequest(world.study_hash, session, ()), identity))
            heads = read_heads(opened(frame).heads, world.assignment.roster.identities)
            seen.append((len(heads), len(frame)))

    coordinator(world, Post(world), ask).run()
    (first, short), *_, (last, long) = seen
    assert (first, last) == (1, 4)
    assert short == long


def test_everybody_keeps_everybodys_newest_head(world) -> None:
    """After a run the coordinator's and every peer's witness is the row of the last charge."""
    world.start_all()
    coordinator(world, Post(world)).run()
    identities = world.assignment.roster.identities
    paths = [witnesses_of(world), *(world.folder / name / "witnesses.bin" for name in NAMES)]
    for owner, path in enumerate(paths, start=-1):
        witness = Witness(world.base.files, path)
        for position in set(EVERYBODY) - {owner}:
            site = world.site(position)
            with LedgerView.inspect(site.seams.files, site.ledger_path, site.identity()) as ledger:
                last = max(entry.seq for entry in ledger.entries() if entry.kind.value == "RESERVED")
            kept = witness.head(identities[position])
            assert kept is not None and kept.seq == last
