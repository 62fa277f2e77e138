"""A hostile coordinator. Every attack of the design has its control: with that one rule switched off it succeeds.

An attack returns what the coordinator found and what it was after. It fails where a hospital refuses, where a pad is left, or
where what was found is noise. The two attacks on a hospital's disk have a second test where the disk is: torn_outbox in
tests/client/test_participation.py (altered, lost outbox), fork_and_restore in tests/client/test_startup_checks.py.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from medfed.errors import MedfedError, RemoteProtocolError
from medfed.privacy.secagg import aggregator, keys, messages, party, protocol, release
from medfed.privacy.secagg.party import Party
from medfed.privacy.secagg.protocol import SecaggConfig, Thresholds
from medfed.privacy.secagg.transitions import PartyPhase

sys.path.insert(0, str(Path(__file__).parent))

import medfed_test_hostile as hostile
from medfed_test_hostile import Change, Impostor, Plant, StillMasked, Wiretap, both, instead, open_all

TRAP = bytes(range(32))  # the hash of another model
NOISE = "noise"
Outcome = tuple[object, object]
"""What was found, and what was looked for."""


def five(make):
    """Five hospitals, one may collude, four must upload; three shares open a self mask."""
    return make(5, fewest=4).set_up()


# ------------------------------------------------------------------------------------- what is released, and for whom


def overlap_unmask(make, task) -> Outcome:
    """A share and a seed are asked for one peer, after an honest vote that leaves it out."""
    fed = five(make)
    tap, survivors = open_all(fed, 1, task).hear_uploads(fed.vectors()), (0, 1, 2, 3)
    votes = tap.ask_votes(survivors)
    for position in survivors:
        boxes = tap.boxes_for(position, range(5))
        tap.hear_release(position, fed.parties[position].release(survivors, votes, boxes))
    return tap.isolate({4}), fed.vectors()[4]


def split_survivors(make, task) -> Outcome:
    """Every honest hospital is told of another drop-out, so that two of them are left alone; the colluder agrees with all."""
    fed = five(make)
    tap, missing = open_all(fed, 1, task).hear_uploads(fed.vectors()), {0: 2, 1: 3, 2: 1, 3: 0}
    for position, drop_out in missing.items():
        survivors = tuple(member for member in range(5) if member != drop_out)
        own = fed.parties[position].vote(survivors)
        helped = fed.identities[4].sign(messages.vote_input(tap.contexts[4], 4, survivors))
        boxes = tap.boxes_for(position, survivors)
        tap.hear_release(position, fed.parties[position].release(survivors, ((position, own), (4, helped)), boxes))
    tap.read_memory(4)
    return tap.isolate({0, 1}), fed.vectors()[0] + fed.vectors()[1]


def late_upload(make, task) -> Outcome:
    """The upload of a hospital that was voted out arrives once all seeds shared with it are released."""
    fed = five(make)
    tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
    tap.ask_slow((0, 1, 2, 3))
    tap.read_memory(3)
    return tap.isolate({4}), fed.vectors()[4]


def second_release(make, task) -> Outcome:
    """After the sum of all, the sum of all but one: the difference is one vector."""
    fed = five(make)
    tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
    tap.ask_fast(range(5))
    whole = tap.isolate(range(5))
    assert (whole == sum(fed.vectors())).all()
    tap.ask_slow((0, 1, 2, 3))
    return whole - tap.isolate(range(4)), fed.vectors()[4]


def forgets_its_release(state, event, *, entropy, now):
    if state.phase is PartyPhase.RELEASED:
        state = replace(state, phase=PartyPhase.UPLOADED, survivors=(), asked=None)
    return HONEST_STEP(state, event, entropy=entropy, now=now)


HONEST_STEP = party.step


def threshold_floor(make, task) -> Outcome:
    """The coordinator wants four of six to do: two it votes out, and asks them for shares of each other."""
    fed = make(6, fewest=4).set_up()
    tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
    tap.ask_slow((0, 1, 2, 5), positions=(0, 1, 2))
    tap.ask_fast((3, 4))
    tap.read_memory(5)
    return tap.isolate({3, 4}), fed.vectors()[3] + fed.vectors()[4]


# --------------------------------------------------------------------------------------------------- one pad, two vectors


def round_replay(make, task) -> Outcome:
    """The same attempt is asked for again: two uploads under one pad."""
    return difference_of_attempts(make, task, 1, 1)


def retry_same_pad_other_vector(make, task) -> Outcome:
    """An attempt is voided and tried again, with fresh noise."""
    return difference_of_attempts(make, task, 1, 2)


def difference_of_attempts(make, task, *attempts: int) -> Outcome:
    fed = make(4).set_up()
    victim, words = fed.parties[0], []
    vectors = [fed.vectors(seed)[0] for seed in (1, 2)]
    for attempt, vector in zip(attempts, vectors, strict=True):
        victim.open_round(attempt, task)
        words.append(fed.words_of(victim.mask(vector).payload))
        victim.close_round()
    return fed.wrap(words[0] - words[1]), vectors[0] - vectors[1]


# --------------------------------------------------------------------------------------------------- who is in the session


def two_views(make, task, rosters: dict[int, bytes], identities: int) -> Outcome:
    """Hospital 0 is shown four hospitals, which is strict mode and no self mask; the others are shown it as the fifth and are
    told that it dropped out. ``identities``: in hospital 0's roster."""
    fed = make(5, fewest=4)
    for position, roster_hash in rosters.items():
        shared = replace(fed.config(0).shared, roster_hash=roster_hash)
        if position == 0:
            shared = replace(shared, identities=shared.identities[:identities], most_hospitals=identities)
        entropy = fed.parties[position]._entropy
        fed.parties[position] = Party(SecaggConfig(shared, position), fed.identities[position].sign, entropy)
    offers = [one.offer() for one in fed.parties]
    for position, one in enumerate(fed.parties):
        one.accept(offers if position else offers[:4])
    tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
    tap.ask_slow((1, 2, 3, 4))
    return tap.isolate({0}), fed.vectors()[0]


def roster_diff(make, task) -> Outcome:
    """Hospital 0 was given another roster than the others."""
    return two_views(make, task, {0: bytes(32)}, 4)


def inconsistent_cohort(make, task) -> Outcome:
    """One roster, but hospital 0 is shown fewer offers than the others."""
    return two_views(make, task, {}, 5)


ANY_SETUP = instead(party, "transcript_hash", lambda config, bodies: bytes(32))


def key_swap(make, task) -> Outcome:
    """Keys of the coordinator's own making in the names of all other pinned hospitals."""
    fed = make(5, fewest=4)
    return against_impostors(fed, fed.parties[1], (0, 2, 3, 4), task)


def sybil(make, task) -> Outcome:
    """Invented hospitals beside the pinned ones: there are enough of them to be the victim's whole cohort."""
    fed = make(5, fewest=4)
    return against_impostors(fed, fed.new_party(1, ROSTER(fed)), (5, 6, 7, 8), task)


def pinned(fed) -> list[bytes]:
    return [identity.public for identity in fed.identities]


def of_the_coordinator(fed) -> list[bytes]:
    return [*pinned(fed), *(hostile.invented(position).public for position in range(5, 9))]


ROSTER = pinned


def against_impostors(fed, victim: Party, played: tuple[int, ...], task: bytes) -> Outcome:
    impostor, own = Impostor(fed.config(0).shared, played), victim.offer()
    victim.accept([own, *impostor.offers.values()])
    victim.open_round(1, task)
    tap = Wiretap(fed, {1: victim}).hear_uploads(fed.vectors())
    impostor.tell(tap, 1, own)
    return tap.isolate({1}), fed.vectors()[1]


def old_key_replay(make, task) -> Outcome:
    """An old signed offer of hospital 1 is shown to all: a stall, as nobody has that key any more.

    What the coordinator is after: that the hospital spends budget on an upload which no sum can ever hold.
    """
    fed = make(5, fewest=4)
    old = fed.new_party(1, salt="an earlier session").offer()
    offers = [old if position == 1 else one.offer() for position, one in enumerate(fed.parties)]
    fed.parties[1].offer()
    fed.parties[1].accept(offers)
    fed.parties[1].open_round(1, task)
    return len(fed.parties[1].mask(fed.vectors()[1]).payload), fed.parties[1].cohort.upload_bytes


def small_group(make, task) -> Outcome:
    """Of five pinned hospitals the victim is shown one, the colluder."""
    fed = make(5, fewest=4)
    offers = [fed.parties[position].offer() for position in (0, 1)]
    for position in (0, 1):
        fed.parties[position].accept(offers)
        fed.parties[position].open_round(1, task)
    tap = Wiretap(fed, dict(enumerate(fed.parties[:2]))).hear_uploads(fed.vectors())
    tap.read_memory(1)
    return tap.isolate({0}), fed.vectors()[0]


def inconsistent_model(make, task) -> Outcome:
    """The victim gets a trap model, the others one on which they have nothing to say: the sum is the victim's vector."""
    fed = make(4, 4000).set_up()
    vectors = [fed.vectors()[0], *(np.zeros(4000, np.int64) for _ in range(3))]
    tap = open_all(fed, 1, task, {0: TRAP}).hear_uploads(vectors)
    return tap.isolate(range(4)), vectors[0]


# ------------------------------------------------------------------------------------------------------ memory and disk


RESTARTED = "restarted"


def fork_and_restore(make, task) -> Outcome:
    """All hospitals are started again in the middle of a round, once before and once after their release."""
    fed = five(make)
    tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
    tap.ask_fast(range(5))
    for position in range(5):
        again = fed.new_party(position, salt=RESTARTED)
        again.offer()
        again.accept(fed.aggregator.offers())
        again.open_round(1, task)
        again.mask(fed.vectors()[position])
        tap.parties[position] = again
    tap.ask_slow((0, 1, 2, 3))
    return tap.isolate({4}), fed.vectors()[4]


def torn_outbox(make, task) -> Outcome:
    """An upload comes back from a disk with one byte changed; what is after is a wrong sum that passes for right."""
    fed = make(4).set_up()
    fed.open_round(1)
    uploads = [upload.payload for upload in fed.mask_all(fed.vectors())]
    torn = bytearray(uploads[0])
    torn[60] ^= 1
    for payload in (bytes(torn), *uploads[1:]):
        fed.aggregator.add_upload(payload)
    return bool((fed.signed(fed.aggregator.total()) != sum(fed.vectors())).any()), True


def clear_metrics(make, task) -> Outcome:
    """Anything of one hospital outside its masked words."""
    fed, beside = five(make), []
    vectors = np.zeros(64, np.int64), np.arange(64)
    for attempt, vector in enumerate(vectors, start=1):
        fed.parties[0].open_round(attempt, task)
        payload = fed.parties[0].mask(vector).payload
        fed.parties[0].close_round()
        beside.append(payload[:33] + payload[41:52] + payload[fed.parties[0].cohort.upload_bytes :])
    if beside[0] == beside[1]:
        raise StillMasked("the envelope is the same whatever was trained")
    return beside[1][-1], np.count_nonzero(vectors[1])


METRIC = Change(
    party.Party,
    "mask",
    "pieces = self._assemble(effect)",
    "pieces = (*self._assemble(effect), bytes([np.count_nonzero(vector)]))",
)


# ---------------------------------------------------------------------------------------------------------------- the tests


@dataclass(frozen=True)
class Attack:
    """``fails``: how, by code or kind of failure; ``rule``: switched off, the attack succeeds."""

    run: Callable[..., Outcome]
    fails: int | str | type[Exception]
    rule: Plant


def without(part: str) -> Plant:
    """The context without one part."""
    return Change(protocol, "context_hash", f"{part}, ", "", (party,))


ONE_SESSION = both(ANY_SETUP, without("members"))  # neither wall: transcript and cohort both tell who takes part


ATTACKS = {
    attack.run.__name__: attack
    for attack in (
        Attack(overlap_unmask, 180, instead(release, "body", hostile.obliging_body)),
        Attack(split_survivors, 186, instead(release, "check_certificate", hostile.nothing)),
        Attack(late_upload, StillMasked, Change(party, "_mask", "= entropy[:SHARE_BYTES]", "= bytes(SHARE_BYTES)")),
        Attack(second_release, 183, instead(party, "step", forgets_its_release)),
        Attack(threshold_floor, 185, instead(protocol, "derive_thresholds", lambda n, c, fewest: Thresholds(4, 2))),
        Attack(round_replay, 181, Change(party, "_open_round", "state.highest_attempt < event", "0 < event")),
        Attack(retry_same_pad_other_vector, NOISE, without("be64(attempt)")),
        Attack(
            roster_diff,
            112,
            both(ONE_SESSION, Change(messages, "parse_offer", " or parts[2] != config.roster_hash", "", (keys,))),
        ),
        Attack(inconsistent_cohort, NOISE, ONE_SESSION),
        Attack(key_swap, 110, instead(keys, "verify", hostile.nothing)),
        Attack(sybil, 111, instead(sys.modules[__name__], "ROSTER", of_the_coordinator)),
        Attack(
            old_key_replay,
            174,
            Change(party, "_accept_offers", "bodies[cohort.members.index(config.position)] != state.offer", "False"),
        ),
        Attack(small_group, 140, instead(protocol, "derive_thresholds", lambda n, c, fewest: Thresholds(n, 0))),
        Attack(inconsistent_model, NOISE, Change(protocol, "context_hash", "members, task, *", "members, *", (party,))),
        Attack(fork_and_restore, 174, instead(sys.modules[__name__], "RESTARTED", "")),
        Attack(torn_outbox, 110, instead(aggregator, "verify", hostile.nothing)),
        Attack(clear_metrics, StillMasked, METRIC),
    )
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails(name, federation, task):
    attack = ATTACKS[name]
    if attack.fails == NOISE:
        found, wanted = attack.run(federation, task)
        assert (found == wanted).mean() < 0.01
        return
    kind = attack.fails if isinstance(attack.fails, type) else MedfedError
    with pytest.raises(kind) as refusal:
        attack.run(federation, task)
    if kind is MedfedError:
        assert hostile.code_of(refusal.value) == attack.fails


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_control_without_its_rule_succeeds(name, federation, task, monkeypatch):
    ATTACKS[name].rule(monkeypatch)
    found, wanted = ATTACKS[name].run(federation, task)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("wall", [ANY_SETUP, without("members")], ids=["transcript", "cohort"])
def test_attack_inconsistent_cohort_either_wall_alone_stands(wall, federation, task, monkeypatch):
    wall(monkeypatch)
    found, wanted = inconsistent_cohort(federation, task)
    assert (found == wanted).mean() < 0.01


# ------------------------------------------------------------------------------------------------ what the attacks rest on


@pytest.mark.parametrize("part", ["transcript", "attempt", "task", "cohort", "words", "ring_bits", "nothing"])
def test_context_any_part_different_gives_another_pad(federation, task, part):
    """Control: with nothing changed the context is the same."""
    fed = federation(5, 64, 32, fewest=4)
    configs = {"words": federation(5, 65, 32, fewest=4), "ring_bits": federation(5, 64, 16, fewest=4)}
    members = (0, 1, 2, 4) if part == "cohort" else range(5)
    cohort = protocol.Cohort(configs.get(part, fed).config(0).shared, tuple(members))
    transcript = bytes([part == "transcript"]) * 32
    other = TRAP if part == "task" else task
    honest = protocol.context_hash(fed.config(0).shared.everybody, bytes(32), 1, task)
    found = protocol.context_hash(cohort, transcript, 1 + (part == "attempt"), other)
    assert (found == honest) == (part == "nothing")


def test_inconsistent_model_is_refused_by_an_honest_coordinator(federation, task):
    fed = five(federation)
    fed.aggregator.open_round(1, task)
    fed.parties[0].open_round(1, TRAP)
    with pytest.raises(RemoteProtocolError, match="MF-110"):
        fed.aggregator.add_upload(fed.parties[0].mask(fed.vectors()[0]).payload)


@pytest.mark.parametrize("left_out", range(4))
def test_sum_with_one_upload_missing_is_still_masked(federation, task, left_out):
    """In strict mode there is nothing to ask for. Control: all together give the sum."""
    fed = federation(4).set_up()
    tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
    with pytest.raises(StillMasked):
        tap.isolate(set(range(4)) - {left_out})
    assert (tap.isolate(range(4)) == sum(fed.vectors())).all()


def test_honest_rounds_isolate_nobody(federation, task):
    """Fast, slow and strict, with what the colluder's memory holds: no part of the honest hospitals' sum comes out."""
    for fewest, survivors in ((4, (0, 1, 2, 3, 4)), (4, (0, 1, 2, 4)), (5, ())):
        fed = federation(5, fewest=fewest).set_up()
        tap = open_all(fed, 1, task).hear_uploads(fed.vectors())
        if len(survivors) == 5:
            tap.ask_fast(survivors)
        elif survivors:
            tap.ask_slow(survivors)
        tap.read_memory(4)
        honest = tuple(survivors or range(5))[:-1]
        for size in range(1, 5):
            for members in itertools.combinations(range(4), size):
                if members == honest:
                    assert (tap.isolate(members) == sum(fed.vectors()[each] for each in members)).all()
                    continue
                with pytest.raises(StillMasked):
                    tap.isolate(members)
