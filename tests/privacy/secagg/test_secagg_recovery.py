"""Drop-outs, late joiners, liars and restarts: the sum over the survivors comes out exactly, or the round ends by name."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import LocalProtocolError, MedfedError, PrivacyError, RemoteProtocolError
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.messages import Secret, release_signature_input
from medfed.privacy.secagg.transitions import AggregatorPhase, PartyPhase

sys.path.insert(0, str(Path(__file__).parent))

import medfed_test_hostile as hostile

REPEATABLE = settings(deadline=None, derandomize=True)


@pytest.fixture
def fed(federation):
    """Five hospitals in their first round: four must upload, three shares open a self mask."""
    fed = federation(5, fewest=4).set_up()
    fed.open_round(1)
    return fed


def assert_sum(fed, aggregator, survivors, vectors=None):
    vectors = fed.vectors() if vectors is None else vectors
    assert (fed.signed(aggregator.total()) == fed.wrap(sum(vectors[each] for each in survivors))).all()
    assert bytes(aggregator.total_bytes()) == aggregator.total().tobytes()


def next_round_works(fed):
    fed.close_round()
    if fed.aggregator.phase is not AggregatorPhase.FAILED:
        fed.aggregator.close_round()
    vectors = fed.vectors(7)
    fed.open_round(fed.parties[0].highest_attempt + 1)
    fed.upload(vectors)
    assert_sum(fed, fed.aggregator, fed.open_sum(), vectors)


# ------------------------------------------------------------------------------------------------------------- exact sums


@settings(REPEATABLE, max_examples=30)
@given(st.data())
def test_sum_any_survivors_and_any_order_of_messages_is_exact(federation, data):
    """Uploads, votes and releases in any order, some of them twice, over any survivor set of m or more."""
    colluders = data.draw(st.integers(1, 2))
    hospitals = data.draw(st.integers(4 + colluders, 9))
    fewest = data.draw(st.integers(colluders + 2, hospitals - 1))
    words, ring_bits = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([16, 32]))
    fed = federation(hospitals, words, ring_bits, fewest=fewest, colluders=colluders).set_up()
    thresholds = fed.aggregator.cohort.thresholds
    kept = data.draw(st.permutations(range(hospitals)))[: data.draw(st.integers(thresholds.survivors, hospitals))]
    fed.open_round(data.draw(st.integers(1, 2**64 - 1)))
    vectors = fed.vectors(data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from([1, 2**20, 2**40])))
    uploads = fed.mask_all(vectors)
    for position in shuffled(data, kept):
        fed.aggregator.add_upload(uploads[position].payload)
    if not thresholds.is_strict:
        survivors = fed.aggregator.freeze()
        assert survivors == tuple(sorted(kept))
        if len(survivors) < hospitals:
            for position in shuffled(data, survivors):
                fed.aggregator.add_vote(position, fed.parties[position].vote(survivors))
        for position in shuffled(data, survivors):
            fed.aggregator.add_release(position, fed.release(position))
    assert_sum(fed, fed.aggregator, kept, vectors)


def shuffled(data, positions):
    """All of them in some order, and some of them again."""
    again = data.draw(st.lists(st.sampled_from(sorted(positions)), max_size=3))
    return data.draw(st.permutations([*positions, *again]))


def test_sum_many_hospitals_and_rounds_is_exact(federation):
    fed = federation(20, 40, 16, fewest=13, colluders=4).set_up()
    for attempt, lost in enumerate(((), (0, 19), (1, 3, 5, 7, 9, 11, 13)), start=1):
        fed.open_round(attempt)
        vectors = fed.vectors(attempt, 100)
        fed.upload(vectors, lost)
        survivors = fed.open_sum()
        assert set(survivors) == set(range(20)) - set(lost)
        assert_sum(fed, fed.aggregator, survivors, vectors)
        fed.close_round()


def test_fast_sum_opens_with_the_last_release_it_needs(fed):
    """Between upload and release as many may vanish as before: n - m; more releases are checked and change nothing."""
    fed.upload(fed.vectors())
    survivors = fed.aggregator.freeze()
    for position in (0, 2, 4):
        fed.aggregator.add_release(position, fed.release(position))
        with pytest.raises(LocalProtocolError, match="MF-104"):
            fed.aggregator.total()
    assert fed.aggregator.silent == {1, 3}
    fed.aggregator.add_release(3, fed.release(3))
    assert_sum(fed, fed.aggregator, survivors)
    fed.aggregator.add_release(1, fed.release(1))
    with pytest.raises(RemoteProtocolError, match="MF-110"):
        fed.aggregator.add_release(1, bytes(fed.release(1))[:-1] + b"\0")
    assert_sum(fed, fed.aggregator, survivors)


def test_upload_and_release_lengths_depend_on_the_cohort_alone(fed):
    masked = fed.mask_all(fed.vectors())
    assert {len(each.payload) for each in masked} == {52 + 4 * 64 + 32 + 4 * 50 + 64}
    for upload in masked[:4]:
        fed.aggregator.add_upload(upload.payload)
    fed.open_sum()
    assert {len(fed.release(position)) for position in range(4)} == {35 * 4 + 64}


# --------------------------------------------------------------------------------------------------- who is in, and who is not


def test_setup_some_absent_settles_on_those_who_offered_and_a_late_joiner_waits_for_the_next(federation, task):
    fed = federation(6, fewest=4)
    present = {position: fed.parties[position] for position in (0, 2, 3, 4, 5)}
    for party in present.values():
        fed.aggregator.add_offer(party.offer())
    fed.aggregator.settle()
    assert fed.aggregator.cohort.members == tuple(present)
    late = fed.parties[1].offer()
    with pytest.raises(RemoteProtocolError, match="MF-104"):
        fed.aggregator.add_offer(late)
    with pytest.raises(RemoteProtocolError, match="MF-174"):
        fed.parties[1].accept(fed.aggregator.offers())
    fed.aggregator.open_round(1, task)
    for position, party in present.items():
        party.accept(fed.aggregator.offers())
        assert party.cohort == fed.aggregator.cohort
        party.open_round(1, task)
        fed.aggregator.add_upload(party.mask(fed.vectors()[position]).payload)
    for position in fed.aggregator.freeze():
        fed.aggregator.add_release(position, fed.release(position))
    assert_sum(fed, fed.aggregator, present)
    fed.parties = [fed.new_party(position, salt="the next setup") for position in range(6)]
    fed.aggregator = Aggregator(fed.config(0).shared)
    fed.set_up().open_round(2)
    fed.upload(fed.vectors())
    assert_sum(fed, fed.aggregator, fed.open_sum())


def test_settle_fewer_than_agreed_refused_and_may_wait_on(federation):
    fed = federation(5, fewest=4)
    for party in fed.parties[:3]:
        fed.aggregator.add_offer(party.offer())
    with pytest.raises(MedfedError, match="MF-140"):
        fed.aggregator.settle()
    fed.aggregator.add_offer(fed.parties[4].offer())
    fed.aggregator.settle()
    fed.aggregator.settle()
    assert fed.aggregator.cohort.is_strict


def test_freeze_below_m_refused_and_next_round_works(fed):
    fed.upload(fed.vectors(), lost=(1, 3))
    assert fed.aggregator.missing == {1, 3}
    with pytest.raises(PrivacyError, match="MF-140"):
        fed.aggregator.freeze()
    next_round_works(fed)


def test_freeze_in_strict_mode_refused(federation):
    fed = federation(4).set_up()
    fed.open_round(1)
    fed.upload(fed.vectors(), lost=(0,))
    with pytest.raises(PrivacyError, match="MF-140"):
        fed.aggregator.freeze()


def test_upload_after_the_freeze_refused_and_not_in_the_sum(fed):
    masked = fed.mask_all(fed.vectors())
    for upload in masked[1:]:
        fed.aggregator.add_upload(upload.payload)
    fed.aggregator.freeze()
    with pytest.raises(RemoteProtocolError, match="MF-182"):
        fed.aggregator.add_upload(masked[0].payload)
    for position in (1, 2, 3, 4):
        fed.aggregator.add_vote(position, fed.parties[position].vote((1, 2, 3, 4)))
    for position in (1, 2, 3, 4):
        fed.aggregator.add_release(position, fed.release(position))
    assert_sum(fed, fed.aggregator, (1, 2, 3, 4))


@pytest.mark.parametrize("silent_from", ["vote", "release"])
def test_survivor_that_vanishes_in_the_slow_path_loses_the_round_alone(fed, silent_from):
    fed.upload(fed.vectors(), lost=(4,))
    survivors = fed.aggregator.freeze()
    for position in survivors[: 3 if silent_from == "vote" else 4]:
        fed.aggregator.add_vote(position, fed.parties[position].vote(survivors))
    if silent_from == "release":
        for position in survivors[:3]:
            fed.aggregator.add_release(position, fed.release(position))
    assert fed.aggregator.silent == {3}
    with pytest.raises(LocalProtocolError, match="MF-104"):
        fed.aggregator.total()
    next_round_works(fed)


def test_votes_and_releases_of_others_than_the_survivors_refused(fed):
    fed.upload(fed.vectors(), lost=(4,))
    survivors = fed.aggregator.freeze()
    vote = fed.parties[0].vote(survivors)
    for position, signature, code in ((4, vote, 111), (1, vote, 110), (0, bytes(64), 110), (9, vote, 111)):
        with pytest.raises(RemoteProtocolError, match=f"MF-{code}"):
            fed.aggregator.add_vote(position, signature)
    for position in survivors:
        fed.aggregator.add_vote(position, fed.parties[position].vote(survivors))
    for position, payload, code in ((4, fed.release(0), 111), (1, fed.release(0), 180), (0, bytes(204), 180)):
        with pytest.raises(RemoteProtocolError, match=f"MF-{code}"):
            fed.aggregator.add_release(position, payload)


# -------------------------------------------------------------------------------------------------------- repeats, restarts


@pytest.mark.parametrize("lost", [(), (4,)])
def test_repeated_requests_get_identical_bytes_other_ones_nothing(fed, lost):
    fed.upload(fed.vectors(), lost)
    survivors = fed.open_sum()
    boxes, votes, party = fed.aggregator.boxes_for(0), fed.aggregator.certificate(), fed.parties[0]
    first = party.release(survivors, votes, boxes)
    assert {party.release(survivors, votes, boxes) for _ in range(3)} == {first}
    spoiled = ((*boxes[0][:1], bytes(48)), *boxes[1:])
    other = (0, 1, 2, 4) if lost else (0, 1, 2, 3)
    for ask in (
        lambda: party.release(survivors, votes, spoiled),
        lambda: party.release(survivors, votes, boxes[1:]),
        lambda: party.release(other, votes or ((0, bytes(64)),), boxes),
        lambda: party.vote(other),
    ):
        with pytest.raises(RemoteProtocolError, match="MF-183"):
            ask()
    assert party.release(survivors, votes, boxes) == first
    if lost:
        assert party.vote(survivors) == dict(votes)[0]
        with pytest.raises(RemoteProtocolError, match="MF-183"):
            party.release((0, 1, 2, 3, 4), (), boxes)


def test_second_vote_on_another_set_refused_before_the_release_too(fed):
    fed.upload(fed.vectors())
    first = fed.parties[0].vote((0, 1, 2, 3))
    with pytest.raises(RemoteProtocolError, match="MF-183"):
        fed.parties[0].vote((0, 1, 2, 4))
    with pytest.raises(RemoteProtocolError, match="MF-104"):
        fed.parties[0].release(range(5), (), ())
    assert fed.parties[0].vote((0, 1, 2, 3)) == first


@pytest.mark.parametrize(
    ("survivors", "why"),
    [
        ((0, 1, 2, 3, 4), "all of the cohort is the fast path's"),
        ((1, 2, 3, 4), "not among them"),
        ((0, 1, 2), "too few"),
        ((0, 1, 2, 2), "one twice"),
        ((0, 1, 3, 2), "not ascending"),
        ((0, 1, 2, 5), "not in the cohort"),
        ((), "nobody"),
    ],
)
def test_vote_on_a_set_that_is_none_refused(fed, survivors, why):
    fed.upload(fed.vectors())
    with pytest.raises(RemoteProtocolError, match="MF-185"):
        fed.parties[0].vote(survivors)
    assert fed.parties[0].phase is PartyPhase.UPLOADED, why


def test_certificate_that_does_not_hold_refused_and_a_good_one_still_taken(fed):
    fed.upload(fed.vectors(), lost=(4,))
    survivors = fed.aggregator.freeze()
    votes = tuple((position, fed.parties[position].vote(survivors)) for position in survivors)
    others = fed.identities[4].sign(b"anything")
    boxes = fed.aggregator.boxes_for(0)
    for bad in (
        (),
        votes[:3],
        (*votes[:3], votes[2]),
        (*votes[:3], (3, bytes(64))),
        (*votes[:3], (3, votes[2][1])),
        (*votes[:3], (4, others)),
        (*votes, (4, others)),
        votes[::-1],
    ):
        with pytest.raises(RemoteProtocolError, match="MF-186"):
            fed.parties[0].release(survivors, bad, boxes)
    with pytest.raises(RemoteProtocolError, match="MF-186"):
        fed.parties[0].release((0, 1, 2, 4), votes, boxes)
    assert len(fed.parties[0].release(survivors, votes, boxes)) == fed.parties[0].cohort.release_bytes


def test_restarted_coordinator_expects_the_survivors_it_may_have_told_of(fed, task):
    """It froze, told some, and crashed: only those survivors' uploads are taken again, and the same votes and releases fit."""
    masked = fed.mask_all(fed.vectors())
    for upload in masked[:4]:
        fed.aggregator.add_upload(upload.payload)
    survivors = fed.aggregator.freeze()
    first = fed.parties[1].vote(survivors)
    restarted = Aggregator.from_offers(fed.config(0).shared, fed.aggregator.offers())
    restarted.open_round(1, task, expected=survivors)
    assert restarted.missing == set(survivors)
    with pytest.raises(RemoteProtocolError, match="MF-182"):
        restarted.add_upload(masked[4].payload)
    for upload in masked[3::-1]:
        restarted.add_upload(upload.payload)
    fed.aggregator = restarted
    assert fed.open_sum() == survivors
    assert dict(restarted.certificate())[1] == first
    assert_sum(fed, restarted, survivors)


@pytest.mark.parametrize("expected", [(0, 1, 2), (0, 1, 2, 5)])
def test_open_round_expecting_too_few_or_strangers_refused(fed, task, expected):
    with pytest.raises(LocalProtocolError, match="MF-182"):
        fed.aggregator.close_round()
        fed.aggregator.open_round(2, task, expected=expected)


def test_restarted_coordinator_of_a_partial_setup_has_the_same_cohort(federation, task):
    fed = federation(6, fewest=4)
    for party in fed.parties[1:]:
        fed.aggregator.add_offer(party.offer())
    fed.aggregator.settle()
    restarted = Aggregator.from_offers(fed.config(0).shared, fed.aggregator.offers())
    assert (restarted.cohort, restarted.transcript) == (fed.aggregator.cohort, fed.aggregator.transcript)


def test_restarted_hospital_cannot_vote_or_release_and_the_round_goes_on(fed):
    """It has lost its keys; its upload stays in the sum."""
    fed.upload(fed.vectors())
    restarted = fed.new_party(0, salt="restarted")
    restarted.offer()
    for ask in (
        lambda: restarted.vote((0, 1, 2, 3)),
        lambda: restarted.release((0, 1, 2, 3), (), ()),
    ):
        with pytest.raises(MedfedError, match="MF-104"):
            ask()
    fed.aggregator.freeze()
    for position in (1, 2, 3, 4):
        fed.aggregator.add_release(position, fed.release(position))
    assert_sum(fed, fed.aggregator, range(5))


# ---------------------------------------------------------------------------------------------------------------- liars


def test_two_uploads_of_one_hospital_quarantine_it_and_the_first_counts(fed, task):
    """In recovery mode too; also once the uploads are frozen."""
    twin = fed.new_party(0)
    twin.offer()
    twin.accept(fed.aggregator.offers())
    twin.open_round(1, task)
    other = twin.mask(fed.vectors(1)[0]).payload
    fed.upload(fed.vectors(), lost=(4,))
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="MF-183"):
            fed.aggregator.add_upload(other)
        assert fed.aggregator.quarantined == {0}
        survivors = fed.aggregator.survivors or fed.aggregator.freeze()
    for position in survivors:
        fed.aggregator.add_vote(position, fed.parties[position].vote(survivors))
    for position in survivors:
        fed.aggregator.add_release(position, fed.release(position))
    assert_sum(fed, fed.aggregator, survivors)


def lying_release(fed, position: int, about: int) -> bytes:
    """With one share of another value, signed by the liar."""
    body = b""
    for peer, kind, secret in hostile.entries(fed.release(position)):
        told = bytes([secret[0] ^ 1]) + secret[1:] if peer == about and kind == Secret.SHARE else secret
        body += peer.to_bytes(2, "big") + bytes([kind]) + told
    context = fed.parties[position]._state.context
    return body + fed.identities[position].sign(release_signature_input(context, position, body))


def test_one_wrong_share_cannot_spoil_the_sum(fed):
    fed.upload(fed.vectors())
    fed.aggregator.freeze()
    fed.aggregator.add_release(1, lying_release(fed, 1, about=0))
    for position in (0, 2, 3):
        fed.aggregator.add_release(position, fed.release(position))
    assert fed.aggregator.phase is AggregatorPhase.RELEASING
    fed.aggregator.add_release(4, fed.release(4))
    assert_sum(fed, fed.aggregator, range(5))


def test_too_many_wrong_shares_lose_the_round_by_name_never_a_wrong_sum(fed):
    fed.upload(fed.vectors())
    fed.aggregator.freeze()
    for position in (0, 1, 2, 3):
        fed.aggregator.add_release(position, lying_release(fed, position, about=4))
    with pytest.raises(RemoteProtocolError, match=r"MF-187.*hospital 4"):
        fed.aggregator.add_release(4, fed.release(4))
    assert fed.aggregator.phase is AggregatorPhase.FAILED
    with pytest.raises(LocalProtocolError, match="MF-104"):
        fed.aggregator.total()
    next_round_works(fed)


def test_box_that_does_not_open_is_skipped_and_named(fed):
    """The others' shares are enough; the release says so in a constant length."""
    fed.upload(fed.vectors())
    survivors = fed.aggregator.freeze()
    boxes = fed.aggregator.boxes_for(0)
    spoiled = tuple((sender, bytes(48) if sender == 3 else box) for sender, box in boxes)
    payload = fed.parties[0].release(survivors, (), spoiled)
    assert len(payload) == fed.parties[0].cohort.release_bytes
    told = {peer: (kind, secret) for peer, kind, secret in hostile.entries(payload)}
    assert told[3] == (Secret.NOTHING, bytes(32))
    assert {told[peer][0] for peer in (1, 2, 4)} == {Secret.SHARE}
    fed.aggregator.add_release(0, payload)
    for position in (1, 2, 3, 4):
        fed.aggregator.add_release(position, fed.release(position))
    assert_sum(fed, fed.aggregator, survivors)


def test_release_of_the_wrong_kind_refused(fed):
    """A seed of a survivor, or a share of a drop-out, signed by a liar."""
    fed.upload(fed.vectors(), lost=(4,))
    fed.open_sum()
    for peer, kind in ((1, Secret.SEED), (4, Secret.SHARE), (4, Secret.NOTHING), (2, 3)):
        body = b"".join(
            each.to_bytes(2, "big") + bytes([kind if each == peer else honest]) + secret
            for each, honest, secret in hostile.entries(fed.release(0))
        )
        context = fed.parties[0]._state.context
        signed = body + fed.identities[0].sign(release_signature_input(context, 0, body))
        with pytest.raises(RemoteProtocolError, match="MF-187"):
            fed.aggregator.add_release(0, signed)


# ------------------------------------------------------------------------------------------------------------------ erasure


def test_coordinator_forgets_shares_with_the_sum_and_the_sum_with_the_round(fed):
    fed.upload(fed.vectors(), lost=(2,))
    fed.open_sum()
    state, view = fed.aggregator._state, fed.aggregator.total_bytes()
    assert state.releases == {}
    assert not any(fed.aggregator._masker._pad)
    assert np.frombuffer(view, np.uint8).any()
    fed.aggregator.close_round()
    assert not np.frombuffer(view, np.uint8).any()
    assert (fed.aggregator._state.context, fed.aggregator._state.receipts) == (b"", {})


@pytest.mark.parametrize("lost", [(), (4,)])
def test_party_repr_shows_nothing_of_a_release(fed, lost):
    fed.upload(fed.vectors(), lost)
    fed.open_sum()
    shown = repr(fed.parties[0]._state)
    told = [secret for _, _, secret in hostile.entries(fed.release(0))]
    assert len(set(told)) == 4
    assert "RELEASED" in shown
    assert not any(repr(secret)[2:-1] in shown for secret in told)
