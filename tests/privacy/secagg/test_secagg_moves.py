"""The two tables of moves, pair by pair, and a search for an order of events that releases too much."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from medfed_test_boxes import split_boxes

from medfed.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from medfed.privacy.secagg import aggregator as coordinator
from medfed.privacy.secagg import party as hospital
from medfed.privacy.secagg import release
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.boxes import close_box
from medfed.privacy.secagg.messages import Secret, vote_input
from medfed.privacy.secagg.party import mask_entropy_bytes
from medfed.privacy.secagg.transitions import (
    AGGREGATOR_TABLE,
    PARTY_TABLE,
    AggregatorPhase,
    Begin,
    Certificate,
    Close,
    CloseReason,
    Fast,
    Freeze,
    Masked,
    MaskVector,
    Offered,
    Offers,
    Opened,
    PartyPhase,
    Released,
    Round,
    Send,
    SendVector,
    Settle,
    Survivors,
    Uploaded,
    Vector,
    Voted,
)

sys.path.insert(0, str(Path(__file__).parent))

import medfed_test_hostile as hostile
from medfed_test_hostile import open_all

WITHOUT_4 = (0, 1, 2, 3)


class Rounds:
    """One round of five hospitals (four in strict mode), every message of it at hand."""

    def __init__(self, make, task, fewest: int = 4) -> None:
        self.fed = make(5, fewest=fewest).set_up()
        self.offers, self.task = self.fed.aggregator.offers(), task
        tap = open_all(self.fed, 1, task)
        self.uploads = [party.mask(vector) for party, vector in zip(self.fed.parties, self.fed.vectors(), strict=True)]
        for position, upload in enumerate(self.uploads):
            tap.hear_upload(position, upload)
        self.tap, self.strict = tap, fewest == 5
        if not self.strict:
            self.votes = tap.ask_votes(WITHOUT_4)
            self.slow = {position: self._slow(position) for position in WITHOUT_4}

    def _slow(self, position: int) -> bytes:
        return self.fed.parties[position].release(WITHOUT_4, self.votes, self.tap.boxes_for(position, WITHOUT_4))

    def fast_event(self) -> Fast:
        return Fast(() if self.strict else self.tap.boxes_for(0, range(5)))

    def certificate_event(self) -> Certificate:
        return Certificate(WITHOUT_4, *(((), ()) if self.strict else (self.votes, self.tap.boxes_for(0, WITHOUT_4))))


@pytest.fixture(scope="module")
def rounds(federation, task) -> Rounds:
    return Rounds(federation, task)


@pytest.fixture(scope="module")
def strict_rounds(federation, task) -> Rounds:
    return Rounds(federation, task, fewest=5)


# ---------------------------------------------------------------------------------------------------- a hospital's table

_P = PartyPhase
_ALWAYS = {"Offers": "same", "Close": _P.READY}  # the same offers again
PARTY_MOVES: dict[str, dict[str, object]] = {
    "new": {"Begin": _P.OFFERED},
    "offered": {"Offers": _P.READY},
    "ready": {**_ALWAYS, "Round": _P.TRAINING},
    "training": {**_ALWAYS, "Vector": _P.MASKING},
    "masking": {**_ALWAYS, "Masked": _P.UPLOADED},
    "uploaded": {**_ALWAYS, "Fast": _P.RELEASED, "Survivors": _P.VOTED},
    "voted": {**_ALWAYS, "Survivors": "same", "Certificate": _P.RELEASED},
    "released, fast": {**_ALWAYS, "Fast": "same", "Survivors": 183, "Certificate": 183},
    "released, slow": {**_ALWAYS, "Fast": 183, "Survivors": "same", "Certificate": "same"},
}
STRICT_MOVES = {name: moves for name, moves in PARTY_MOVES.items() if name in list(PARTY_MOVES)[:5]} | {
    "uploaded": _ALWAYS
}
"""In strict mode there is nothing after the upload. What is not listed is MF-104."""


def party_events(rounds: Rounds):
    messages = [rounds.fast_event(), Survivors(WITHOUT_4), rounds.certificate_event()]
    closes = [Close(reason) for reason in CloseReason]
    return [Begin(), Offers(rounds.offers), Round(2, rounds.task), Vector(64), Masked(bytes(32)), *messages, *closes]


def party_states(rounds: Rounds):
    """Hospital 0 in every phase: a twin with its keys, moved by ``step``."""
    twin = rounds.fed.new_party(0)
    states = {"new": twin._state}
    twin.offer()
    states["offered"] = twin._state
    entropy = twin._entropy.draw("secagg/self mask", mask_entropy_bytes(rounds.fed.parties[0].cohort))
    for name, event in (
        ("ready", Offers(rounds.offers)),
        ("training", Round(1, rounds.task)),
        ("masking", Vector(64)),
        ("uploaded", Masked(bytes(32))),
    ):
        states[name] = move(list(states.values())[-1], event, entropy)
    if not rounds.strict:
        states["voted"] = move(states["uploaded"], Survivors(WITHOUT_4))
        states["released, fast"] = move(states["uploaded"], rounds.fast_event())
        states["released, slow"] = move(states["voted"], rounds.certificate_event())
    return states


def move(state, event, entropy=b""):
    return hospital.step(state, event, entropy=entropy if isinstance(event, Vector) else b"", now=0.0)[0]


def everything(state) -> tuple:
    """All fields, secret ones too."""
    return tuple(getattr(state, name) for name in type(state).__dataclass_fields__)


@pytest.mark.parametrize("mode", ["rounds", "strict_rounds"])
def test_party_every_pair_moves_as_the_table_says_or_raises_intact(mode, request):
    rounds = request.getfixturevalue(mode)
    table = STRICT_MOVES if rounds.strict else PARTY_MOVES
    states = party_states(rounds)
    assert set(states) == set(table)
    for (name, state), event in itertools.product(states.items(), party_events(rounds)):
        outcome, before = table[name].get(type(event).__name__, 104), everything(state)
        size = {Begin: 64, Vector: 0 if rounds.strict else 3 * 32}.get(type(event), 0)
        if isinstance(outcome, int):
            with pytest.raises(ProtocolError, match=f"MF-{outcome}"):
                hospital.step(state, event, entropy=bytes(range(size)), now=0.0)
        else:
            after, _ = hospital.step(state, event, entropy=bytes(range(size)), now=0.0)
            assert after.phase is (state.phase if outcome == "same" else outcome)
            assert after.phase in PARTY_TABLE[state.phase, type(event)]
            assert outcome != "same" or everything(after) == before
        assert everything(state) == before


def test_party_table_lists_no_pair_that_never_moves():
    """Each pair of production's table is one of those above, and each of those is in it."""
    names = {name: PartyPhase(name.split(",")[0]) for name in PARTY_MOVES}
    listed = {(names[name], event) for name, moves in PARTY_MOVES.items() for event in moves}
    assert listed == {(phase, event.__name__) for phase, event in PARTY_TABLE}


@pytest.mark.parametrize("event", [Fast(()), Survivors(WITHOUT_4), Certificate(WITHOUT_4, (), ())])
def test_party_strict_mode_releases_nothing(strict_rounds, event):
    """MF-104 as the peer's fault, in every phase."""
    for state in party_states(strict_rounds).values():
        with pytest.raises(RemoteProtocolError, match="MF-104"):
            hospital.step(state, event, entropy=b"", now=0.0)


def test_step_with_entropy_of_another_length_refused(rounds):
    states = party_states(rounds)
    for name, event, size in (("new", Begin(), 63), ("training", Vector(64), 95), ("training", Vector(64), 0)):
        with pytest.raises(LocalProtocolError, match="MF-900"):
            hospital.step(states[name], event, entropy=bytes(size), now=0.0)


# ------------------------------------------------------------------------------------------------ the coordinator's table

_A = AggregatorPhase
_RUNNING = {"the same offer": "same", "Close": _A.FAILED}
_FROZEN = {**_RUNNING, "the same upload": "same", "a late upload": 182}
AGGREGATOR_MOVES: dict[str, dict[str, object]] = {
    "offers": {"the same offer": "same", "a last offer": _A.READY, "Settle": _A.READY},
    "ready": {"the same offer": "same", "Opened": _A.OPEN},
    "open": {**_RUNNING, "the same upload": "same", "a late upload": _A.OPEN, "Freeze": _A.VOTING},
    "open, all in": {**_RUNNING, "the same upload": "same", "Freeze": _A.RELEASING},
    "voting": {**_FROZEN, "a vote": _A.VOTING, "a last vote": _A.RELEASING},
    "releasing": {
        **_FROZEN,
        **dict.fromkeys(("a vote", "a last vote"), "same"),
        "a release": _A.RELEASING,
        "a last release": _A.DONE,
    },
    "done": {
        **_FROZEN,
        **dict.fromkeys(("a vote", "a last vote", "a release", "a last release"), "same"),
        "Opened": _A.OPEN,
    },
    "failed": {**_RUNNING, "Opened": _A.OPEN},
}
AGGREGATOR_MOVES["open, all in"]["a late upload"] = "same"
REPEATS = {"offers": ("a last offer",), "ready": ("a last offer",)}


def aggregator_events(rounds: Rounds):
    return {
        "the same offer": Offered(rounds.offers[0]),
        "a last offer": Offered(rounds.offers[4]),
        "Settle": Settle(),
        "Opened": Opened(2, rounds.task, range(5)),
        "the same upload": Uploaded(rounds.uploads[0].payload),
        "a late upload": Uploaded(rounds.uploads[4].payload),
        "Freeze": Freeze(),
        "a vote": Voted(*rounds.votes[0]),
        "a last vote": Voted(*rounds.votes[3]),
        "a release": Released(0, rounds.slow[0]),
        "a last release": Released(3, rounds.slow[3]),
        "Close": Close(CloseReason.DEADLINE),
    }


def aggregator_states(rounds: Rounds):
    config = rounds.fed.config(0).shared
    states, state = {}, Aggregator(config)._state

    def moved(state, *events):
        for event in events:
            state, _ = coordinator.step(state, event, entropy=b"", now=0.0)
        return state

    states["offers"] = moved(state, *(Offered(offer) for offer in rounds.offers[:4]))
    states["ready"] = moved(states["offers"], Offered(rounds.offers[4]))
    opened = moved(states["ready"], Opened(1, rounds.task, range(5)))
    states["open"] = moved(opened, *(Uploaded(upload.payload) for upload in rounds.uploads[:4]))
    states["open, all in"] = moved(states["open"], Uploaded(rounds.uploads[4].payload))
    states["voting"] = moved(states["open"], Freeze(), *(Voted(*vote) for vote in rounds.votes[:3]))
    releasing = moved(states["voting"], Voted(*rounds.votes[3]))
    states["releasing"] = moved(releasing, *(Released(position, rounds.slow[position]) for position in (0, 1, 2)))
    states["done"] = moved(states["releasing"], Released(3, rounds.slow[3]))
    states["failed"] = moved(states["open"], Close(CloseReason.ABORT))
    return states


def test_aggregator_every_pair_moves_as_the_table_says_or_raises_intact(rounds):
    states = aggregator_states(rounds)
    assert set(states) == set(AGGREGATOR_MOVES)
    for (name, state), (what, event) in itertools.product(states.items(), aggregator_events(rounds).items()):
        known = what == "a last offer" and name != "offers"
        outcome = AGGREGATOR_MOVES[name].get("the same offer" if known else what, 104)
        before = everything(state)
        if isinstance(outcome, int):
            with pytest.raises(ProtocolError, match=f"MF-{outcome}"):
                coordinator.step(state, event, entropy=b"", now=0.0)
        else:
            after, effects = coordinator.step(state, event, entropy=b"", now=0.0)
            assert after.phase is (state.phase if outcome == "same" else outcome)
            assert after.phase in AGGREGATOR_TABLE[state.phase, type(event)]
            assert outcome != "same" or (everything(after) == before and effects == ())
        assert everything(state) == before


def test_aggregator_strict_mode_is_done_with_the_last_upload_and_asks_for_nothing(strict_rounds):
    aggregator = Aggregator.from_offers(strict_rounds.fed.config(0).shared, strict_rounds.offers)
    aggregator.open_round(1, strict_rounds.task)
    for upload in strict_rounds.uploads:
        with pytest.raises(ProtocolError, match="MF-104"):
            aggregator.add_release(0, bytes(204))
        aggregator.add_upload(upload.payload)
    assert aggregator.phase is AggregatorPhase.DONE
    for ask in (aggregator.freeze, lambda: aggregator.add_vote(0, bytes(64))):
        with pytest.raises(ProtocolError):
            ask()


# ------------------------------------------------------------------------------------- any order of what a coordinator says

HONEST, COLLUDER = range(4), 4
SETS = [*itertools.combinations(range(5), 4), (0, 1, 2), (0, 1, 2, 3, 4), (1, 0, 2, 3), (0, 0, 1, 2)]
SOME = st.one_of(st.just(HONEST), st.just(HONEST), st.sets(st.sampled_from(HONEST)))
SEARCH = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    stateful_step_count=10,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    print_blob=False,
)


class HostileCoordinator(RuleBasedStateMachine):
    """Says anything to four honest hospitals, in any order, with everything a colluder knows; two attempts."""

    start: tuple[hospital.PartyState, ...]
    identities: Sequence
    roots: dict[int, bytes]
    task: bytes
    reached: set[type]

    def __init__(self) -> None:
        super().__init__()
        self.states = dict(enumerate(self.start))
        self.boxes: dict[tuple[bytes, int], dict[int, bytes]] = {}
        self.votes: dict[tuple[bytes, tuple[int, ...]], dict[int, bytes]] = {}
        self.masked: list[tuple[bytes, int]] = []
        self.released: dict[tuple[bytes, int], set[bytes]] = {}

    def say(self, position: int, event, entropy: bytes = b""):
        state = self.states[position]
        try:
            self.states[position], effects = hospital.step(state, event, entropy=entropy, now=0.0)
        except ProtocolError:
            return ()
        context = self.states[position].context
        if isinstance(event, Fast | Certificate):
            self.reached.add(type(event))
            self.released.setdefault((context, position), set()).add(effects[0].head)
        if isinstance(event, Survivors):
            signature = self.identities[position].sign(effects[0].signed)
            self.votes.setdefault((context, event.members), {})[position] = signature
        return effects

    @rule(attempt=st.integers(1, 2), positions=SOME)
    def open(self, attempt: int, positions: Iterable[int]) -> None:
        """Ask for an attempt; hospitals train, mask and upload."""
        for position in sorted(positions):
            self.say(position, Round(attempt, self.task))
            for effect in self.say(position, Vector(64), bytes([attempt, position]) * 48):
                assert isinstance(effect, MaskVector)
                self.masked.append((self.states[position].context, position))
            for effect in self.say(position, Masked(bytes(32))):
                if isinstance(effect, SendVector):
                    self.boxes[self.states[position].context, position] = split_boxes(effect.tail[32:])

    def boxes_for(self, position: int, senders: Iterable[int]) -> tuple[tuple[int, bytes], ...]:
        """Those that were uploaded; the colluder's are made up, and what nobody uploaded is zeros."""
        context = self.states[position].context
        colluders = close_box(self.roots[position], context, COLLUDER, position, bytes(32))
        found = {sender: self.boxes.get((context, sender), {}).get(position, bytes(48)) for sender in HONEST}
        return tuple((sender, {**found, COLLUDER: colluders}[sender]) for sender in senders if sender != position)

    @rule(position=st.sampled_from(HONEST), senders=st.sampled_from([*SETS, range(5), range(5)]))
    def fast(self, position: int, senders: Iterable[int]) -> None:
        self.say(position, Fast(self.boxes_for(position, senders)))

    @rule(survivors=st.sampled_from(SETS), voters=SOME, asked=SOME, senders=st.sampled_from([None, None, None, *SETS]))
    def slow(self, survivors: tuple[int, ...], voters, asked, senders: tuple[int, ...] | None) -> None:
        """Let some vote, then ask some to release; where too few vote or another set of boxes comes, all refuse."""
        for position in sorted(voters):
            self.say(position, Survivors(survivors))
        self.certify_to(asked, survivors, senders or survivors)

    def certify_to(self, positions: Iterable[int], survivors: tuple[int, ...], senders: tuple[int, ...]) -> None:
        """With all votes there are and the colluder's."""
        for position in sorted(positions):
            context = self.states[position].context
            colluders = self.identities[COLLUDER].sign(vote_input(context, COLLUDER, survivors))
            votes = {**self.votes.get((context, survivors), {}), COLLUDER: colluders}
            certificate = Certificate(survivors, tuple(sorted(votes.items())), self.boxes_for(position, senders))
            self.say(position, certificate)

    @rule(missing=st.permutations(HONEST))
    def split(self, missing: Sequence[int]) -> None:
        """Tell every hospital of a drop-out of its own."""
        for position, drop_out in enumerate(missing):
            survivors = tuple(each for each in range(5) if each != drop_out)
            self.say(position, Survivors(survivors))
            self.certify_to((position,), survivors, survivors)

    @rule(positions=SOME)
    def close(self, positions: Iterable[int]) -> None:
        for position in sorted(positions):
            self.say(position, Close(CloseReason.ABORT))

    @invariant()
    def one_vector_a_pad(self) -> None:
        assert len(set(self.masked)) == len(self.masked)

    @invariant()
    def one_vote_and_one_release_an_attempt(self) -> None:
        voters = [(context, voter) for (context, _), votes in self.votes.items() for voter in votes]
        assert len(set(voters)) == len(voters)
        assert all(len(bodies) == 1 for bodies in self.released.values())

    @invariant()
    def nobody_is_isolated(self) -> None:
        """No sum of fewer than m - c = 3 honest hospitals can be opened; of each peer a share or a seed, none of oneself."""
        for context in {context for context, _ in self.released}:
            shares: dict[int, set[int]] = {owner: {COLLUDER} for owner in HONEST}
            seeds: set[frozenset[int]] = set()
            for (_, holder), bodies in ((key, value) for key, value in self.released.items() if key[0] == context):
                told = {(peer, kind) for body in bodies for peer, kind, _ in hostile.entries(body + bytes(64))}
                assert len({peer for peer, _ in told}) == len(told) == 4
                assert holder not in {peer for peer, _ in told}
                for peer, kind in told:
                    if kind == Secret.SHARE and peer != COLLUDER:
                        shares[peer].add(holder)
                    elif kind == Secret.SEED:
                        seeds.add(frozenset((holder, peer)))
            opened = [owner for owner in HONEST if len(shares[owner]) >= 3]
            for size in (1, 2):
                for inside in itertools.combinations(opened, size):
                    outside = set(HONEST) - set(inside)
                    edges = {frozenset(pair) for pair in itertools.product(inside, outside)}
                    assert not edges <= seeds, f"the sum of {inside} is open"


@pytest.fixture
def machine(federation, task):
    fed = federation(5, fewest=4).set_up()
    HostileCoordinator.start = tuple(fed.parties[position]._state for position in HONEST)
    HostileCoordinator.identities, HostileCoordinator.task = fed.identities, task
    HostileCoordinator.reached = set()
    HostileCoordinator.roots = fed.parties[COLLUDER]._state.roots
    return HostileCoordinator


def test_no_order_of_events_reaches_a_forbidden_release(machine):
    run_state_machine_as_test(machine, settings=SEARCH)
    assert machine.reached == {Fast, Certificate}


def forgets_its_release(state, event, *, entropy, now):
    if state.phase is PartyPhase.RELEASED:
        state = replace(state, phase=PartyPhase.UPLOADED)
    return HONEST_STEP(state, event, entropy=entropy, now=now)


def votes_again(state, event):
    release.check_survivors(state.settled, state.config.position, event.members)
    voted = replace(state, phase=PartyPhase.VOTED, survivors=event.members)
    return voted, (Send(b"", vote_input(state.context, state.config.position, event.members)),)


HONEST_STEP = hospital.step
BROKEN = {
    "a second release": (hospital, "step", forgets_its_release),
    "a second vote": (hospital, "_vote", votes_again),
    "no certificate": (release, "check_certificate", hostile.nothing),
    "both kinds": (release, "body", hostile.obliging_body),
}


@pytest.mark.parametrize("name", BROKEN)
def test_search_for_a_forbidden_release_finds_it_where_a_rule_is_off(machine, monkeypatch, name):
    """The control: the same search over hospitals that lack one rule."""
    monkeypatch.setattr(*BROKEN[name])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=SEARCH)
