"""A hospital helps to open one sum an attempt: over the survivors it voted on, of this session and attempt, for free.

The rules themselves are tested at the party (tests/privacy/secagg); here, that the requests of the wire reach them, that each
refusal is the right word of the list, and that the model moves by no other sum than the one that was opened.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from medfed.advance import state_hash
from medfed.errors import RemoteProtocolError
from medfed.identity import SIGNATURE_BYTES
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.protocol import BOX_BYTES
from medfed.wire import Finished, Refused, Release, ReleaseRequest, Upload, Vote, numbered, pack_positions
from medfed.witness import Head

sys.path.insert(0, str(Path(__file__).parent))

from test_participation import Desk, opened, refused, unchanged

ALL, WITHOUT_LAST, WITHOUT_SECOND = (0, 1, 2, 3, 4), (0, 1, 2, 3), (0, 2, 3, 4)


@pytest.fixture
def five(make_world) -> Desk:
    """Five hospitals, of which a round can do without one; keys are exchanged."""
    world = make_world(hospitals=5, drop_outs=1)
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    return desk


@pytest.fixture
def four(world) -> Desk:
    """Four hospitals that are all needed."""
    world.start_all()
    desk = Desk(world)
    desk.set_up()
    return desk


def uploaded(desk: Desk, survivors: tuple[int, ...]) -> Aggregator:
    """An attempt is open and the uploads of ``survivors`` are in its sum, still masked."""
    request = desk.request()
    return desk.sum_of(request, [each for each in desk.upload_all(request) if each.position in survivors])


def made_up_release(desk: Desk, survivors: tuple[int, ...], **changes: object) -> ReleaseRequest:
    """As it looks for hospital 0, with nothing in it that was ever signed or closed."""
    votes = numbered((position, bytes(SIGNATURE_BYTES)) for position in survivors)
    boxes = numbered((position, bytes(BOX_BYTES)) for position in survivors if position)
    vote = desk.vote_request(survivors, desk.attempt)
    named = vote.study_hash, vote.session, vote.nonce, vote.attempt, vote.survivors
    return replace(ReleaseRequest(*named, () if survivors == ALL else votes, boxes), **changes)


# --------------------------------------------------------------------------------------------------- what is asked, and when


def test_strict_study_opens_nothing_whatever_is_asked(four: Desk) -> None:
    """One trip: what would open a sum does not exist there, neither while the upload is fresh nor before."""
    for attempt in (1, 2):
        four.round()
        with unchanged(four.world):
            for survivors in ((0, 1, 2, 3), (0, 1, 2), (0, 1)):
                refused(four.ask(0, four.vote_request(survivors, attempt)), Refused.SURVIVORS)
                refused(four.ask(0, made_up_release(four, survivors)), Refused.SURVIVORS)
    assert isinstance(four.ask(0, four.request()), Upload)


def test_vote_and_release_spend_nothing_and_are_the_same_bytes_again(five: Desk) -> None:
    aggregator = uploaded(five, WITHOUT_LAST)
    charged = five.world.rows(0)
    with unchanged(five.world):
        five.collect_votes(aggregator, 1)
        vote, release = five.vote_request(WITHOUT_LAST, 1), five.release_request(aggregator, 0, 1)
        told = [five.ask(0, message) for message in (vote, vote, release, release, vote)]
    assert [type(each) for each in told] == [Vote, Vote, Release, Release, Vote]
    assert told[0] == told[1] == told[4] and told[2] == told[3]
    assert five.world.rows(0) == charged


@pytest.mark.parametrize("kind", ["vote", "release"])
def test_question_about_another_session_or_attempt_is_refused(five: Desk, kind: str) -> None:
    five.round()
    uploaded(five, WITHOUT_LAST)

    def asked(**changes: object):
        plain = five.vote_request(WITHOUT_LAST, 2) if kind == "vote" else made_up_release(five, ALL)
        return replace(plain, **changes)

    with unchanged(five.world):
        refused(five.ask(0, asked(session=b"x" * 16)), Refused.NO_SESSION)
        for attempt in (0, 1, 3):
            refused(five.ask(0, asked(attempt=attempt)), Refused.OUT_OF_ORDER)
    assert isinstance(five.ask(0, asked()), Vote if kind == "vote" else Release), "the positive control"


@pytest.mark.parametrize("kind", ["vote", "release"])
def test_process_that_did_not_mask_the_vector_opens_nothing(five: Desk, kind: str) -> None:
    """After a restart the upload still leaves, byte for byte; the keys that could open it are gone."""
    request = five.request()
    first = five.upload_all(request)[0]
    asked = five.vote_request(WITHOUT_LAST, 1) if kind == "vote" else made_up_release(five, ALL)
    five.world.start(0)
    assert five.ask(0, request) == first
    refused(five.ask(0, asked), Refused.NO_SESSION)
    five.ask(0, five.setup(five.session))  # the same session's name, another key
    refused(five.ask(0, asked), Refused.OUT_OF_ORDER)


def test_nothing_is_opened_before_an_upload(five: Desk) -> None:
    with unchanged(five.world):
        for attempt, reason in ((0, Refused.SURVIVORS), (1, Refused.OUT_OF_ORDER)):
            refused(five.ask(0, five.vote_request(WITHOUT_LAST, attempt)), reason)
            refused(five.ask(0, made_up_release(five, ALL, attempt=attempt)), reason)


def test_withdrawn_study_opens_nothing(five: Desk) -> None:
    uploaded(five, WITHOUT_LAST)
    five.world.hospitals[0].participations[0]._ledger.withdraw(five.world.study_hash, "changed our mind")
    refused(five.ask(0, five.vote_request(WITHOUT_LAST, 1)), Refused.NOT_APPROVED)
    refused(five.ask(0, made_up_release(five, ALL)), Refused.NOT_APPROVED)


# ------------------------------------------------------------------------------------------------------- for which survivors


@pytest.mark.parametrize(
    "survivors",
    [(), (0,), (0, 1, 2), (1, 2, 3, 4), ALL, (0, 1, 2, 5), (0, 1, 2, 3, 4, 5)],
    ids=["none", "alone", "too few", "without this one", "all", "a stranger", "all and a stranger"],
)
def test_survivors_that_no_hospital_may_vote_on_are_refused(five: Desk, survivors: tuple[int, ...]) -> None:
    uploaded(five, WITHOUT_LAST)
    with unchanged(five.world):
        refused(five.ask(0, five.vote_request(survivors, 1)), Refused.SURVIVORS)
    assert isinstance(five.ask(0, five.vote_request(WITHOUT_LAST, 1)), Vote)


@pytest.mark.parametrize("packed", [b"\0", pack_positions((1, 0, 2, 3)), pack_positions((0, 1, 1, 2, 3))])
def test_survivors_that_are_no_ascending_list_are_malformed(five: Desk, packed: bytes) -> None:
    uploaded(five, WITHOUT_LAST)
    messages = [
        replace(five.vote_request((), 1), survivors=packed),
        replace(made_up_release(five, ()), survivors=packed),
        five.request(survivors=packed),
    ]
    with unchanged(five.world):
        for message in messages:
            with pytest.raises(RemoteProtocolError, match="MF-103"):
                five.ask(0, message)
    assert isinstance(five.ask(0, five.vote_request(WITHOUT_LAST, 1)), Vote)


def test_second_survivor_set_of_an_attempt_is_refused(five: Desk) -> None:
    """Two sums of one attempt differ by one hospital's vector."""
    aggregator = uploaded(five, WITHOUT_LAST)
    assert isinstance(five.ask(0, five.vote_request(WITHOUT_LAST, 1)), Vote)
    with unchanged(five.world):
        refused(five.ask(0, five.vote_request(WITHOUT_SECOND, 1)), Refused.SURVIVORS)
        refused(five.ask(0, made_up_release(five, ALL)), Refused.SURVIVORS)
    five.collect_votes(aggregator, 1)
    assert isinstance(five.ask(0, five.release_request(aggregator, 0, 1)), Release)
    with unchanged(five.world):
        refused(five.ask(0, five.vote_request(WITHOUT_SECOND, 1)), Refused.SURVIVORS)
        refused(five.ask(0, made_up_release(five, ALL)), Refused.SURVIVORS)


def test_release_needs_the_votes_of_enough_survivors(five: Desk) -> None:
    aggregator = uploaded(five, WITHOUT_LAST)
    five.collect_votes(aggregator, 1)
    plain = five.release_request(aggregator, 0, 1)
    with unchanged(five.world):
        *others, last = plain.votes
        for votes in ((), tuple(others), (*others, others[0]), (*others, last[:2] + bytes(SIGNATURE_BYTES))):
            refused(five.ask(0, replace(plain, votes=votes)), Refused.SURVIVORS)
        for changed in ({"votes": (b"\0",)}, {"boxes": (b"\0\1" + bytes(BOX_BYTES - 1),)}):
            with pytest.raises(RemoteProtocolError, match="MF-103"):
                five.ask(0, replace(plain, **changed))
    assert isinstance(five.ask(0, plain), Release)


# ---------------------------------------------------------------------------------------------- which sum the model follows


def test_round_without_a_hospital_leads_all_to_one_model(five: Desk) -> None:
    """Also the one whose upload never arrived: it does as the others did, and says so in its ledger."""
    five.round(lost=(4,))
    assert five.survivors == WITHOUT_LAST
    five.round()
    five.round(lost=(1,))
    finish = five.finish()
    assert all(isinstance(five.ask(position, finish), Finished) for position in five.everybody)
    models = {(five.world.place(position) / "model.safetensors").read_bytes() for position in five.everybody}
    assert len(models) == 1
    acknowledged = [[attempt for kind, attempt in five.world.rows(at) if kind == "ACKED"] for at in five.everybody]
    assert acknowledged == [[1, 2, 3], [1, 2], [1, 2, 3], [1, 2, 3], [2, 3]], "not where the coordinator never got it"


def led_by(desk: Desk, survivors: tuple[int, ...]) -> dict[str, object]:
    """The last sum with other survivors, and the hash of the state that a hospital gets to by it."""
    state = desk.it.advance(desk.previous, desk.total, survivors)
    return {"survivors": pack_positions(survivors), "state_hash": state_hash(desk.world.study_hash, state)}


def test_sum_over_others_than_those_released_for_is_refused(five: Desk) -> None:
    """The mean over four would be taken for the mean over five, or over four others."""
    five.round(lost=(4,))
    with unchanged(five.world):
        refused(five.ask(0, five.request(**led_by(five, ALL))), Refused.HEADS_MISSING)
        withheld = [each for each in opened(five) if isinstance(each, Upload)]
        five.note((each.position, Head.from_bytes(each.head)) for each in withheld)
        for survivors in (ALL, WITHOUT_SECOND, (0, 1, 2)):
            refused(five.ask(0, five.request(**led_by(five, survivors))), Refused.STATE_MISMATCH)
    assert isinstance(five.ask(0, five.request()), Upload)


def test_sum_over_fewer_than_all_is_refused_in_a_strict_study(four: Desk) -> None:
    four.round()
    with unchanged(four.world):
        refused(four.ask(0, four.request(**led_by(four, (0, 1, 2)))), Refused.STATE_MISMATCH)
    four.world.start(0)
    four.set_up()
    with unchanged(four.world):
        refused(four.ask(0, four.request(**led_by(four, (0, 1, 2)))), Refused.STATE_MISMATCH)
    assert isinstance(four.ask(0, four.request()), Upload)


def test_sum_over_fewer_than_the_study_allows_is_refused_by_any_process(five: Desk) -> None:
    """One that has restarted does not know any more whom it released for; the study's bound it knows."""
    five.round(lost=(4,))
    five.world.start(0)
    five.set_up()
    with unchanged(five.world):
        refused(five.ask(0, five.request(**led_by(five, (0, 1, 2)))), Refused.STATE_MISMATCH)
        refused(five.ask(0, five.request(survivors=pack_positions((0, 1, 2, 9)))), Refused.STATE_MISMATCH)
        refused(five.ask(0, five.request(survivors=pack_positions(ALL))), Refused.STATE_MISMATCH)
    assert isinstance(five.ask(0, five.request()), Upload)


def test_last_sum_over_others_than_those_released_for_is_not_signed(five: Desk) -> None:
    for _ in range(3):
        five.round()
    with unchanged(five.world):
        refused(five.ask(0, five.finish(**led_by(five, WITHOUT_LAST))), Refused.STATE_MISMATCH)
    assert isinstance(five.ask(0, five.finish()), Finished)


def test_attempt_that_was_never_opened_leaves_the_next_one_free(five: Desk) -> None:
    """A vote binds its attempt only: the pads of the next one are others."""
    uploaded(five, WITHOUT_LAST)
    assert isinstance(five.ask(0, five.vote_request(WITHOUT_LAST, 1)), Vote)
    five.round(lost=(1,))
    assert five.survivors == WITHOUT_SECOND
    assert isinstance(five.ask(0, five.request()), Upload)
    refused(five.ask(0, five.vote_request(WITHOUT_LAST, 1)), Refused.OUT_OF_ORDER)
