"""Sessions of hospitals and a coordinator: exact sums, misuse, repeats, restarts, and what is forgotten.

The tables of moves are in ``test_secagg_moves``, drop-outs and liars in ``test_secagg_recovery``.
"""

import copy
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import ConfigError, LocalProtocolError, PrivacyError, RemoteProtocolError
from medfed.privacy.secagg import party as hospital
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.messages import parse_offer
from medfed.privacy.secagg.party import mask_entropy_bytes
from medfed.privacy.secagg.protocol import Cohort, SecaggConfig, Thresholds, derive_thresholds, least_survivors
from medfed.privacy.secagg.transitions import CloseReason, Masked, PartyPhase, Round, SendVector, Vector

REPEATABLE = settings(deadline=None, derandomize=True)


@settings(REPEATABLE, max_examples=40)
@given(st.data())
def test_total_any_cohort_and_integers_equals_sum_modulo_ring(federation, data):
    hospitals, words = data.draw(st.integers(3, 8)), data.draw(st.integers(1, 80))
    ring_bits, attempt = data.draw(st.sampled_from([16, 32])), data.draw(st.integers(1, 2**64 - 1))
    bound = data.draw(st.sampled_from([1, 2**10, 2**40]))
    fed = federation(hospitals, words, ring_bits).set_up()
    vectors = fed.vectors(data.draw(st.integers(0, 2**32)), bound)
    fed.open_round(attempt)
    uploads = fed.mask_all(vectors)
    for upload in data.draw(st.permutations(uploads)):
        fed.aggregator.add_upload(upload.payload)
    assert (fed.signed(fed.aggregator.total()) == fed.wrap(sum(vectors))).all()


def test_session_several_rounds_gives_each_sum_and_fresh_pads(federation):
    fed = federation(4, 300).set_up()
    pad_ids, seen = set(), []
    for attempt in (1, 2, 5):
        fed.open_round(attempt)
        uploads = fed.mask_all([np.full(300, position) for position in range(4)])
        for upload in uploads:
            assert len(upload.payload) == fed.parties[0].cohort.upload_bytes
            fed.aggregator.add_upload(upload.payload)
        assert (fed.aggregator.total() == 6).all()
        fed.close_round()
        pad_ids |= {upload.pad_id for upload in uploads}
        seen += [fed.words_of(upload.payload) for upload in uploads]
    assert len(pad_ids) == 3
    assert max((one == other).sum() for one, other in itertools.combinations(seen, 2)) <= 1


def test_offer_asked_again_gives_identical_bytes(federation):
    party = federation().parties[0]
    assert party.offer() == party.offer()


def test_accept_same_offers_again_changes_nothing_others_refused(federation):
    fed = federation().set_up()
    party, offers = fed.parties[0], fed.aggregator.offers()
    transcript = party.transcript
    party.accept(offers[::-1])
    other = (*offers[:3], fed.new_party(3, salt="restarted").offer())
    with pytest.raises(RemoteProtocolError, match="MF-183"):
        party.accept(other)
    assert party.transcript == transcript


def test_mask_second_vector_in_one_round_refused(federation, task):
    fed = federation().set_up()
    fed.parties[0].open_round(1, task)
    fed.parties[0].mask(fed.vectors()[0])
    with pytest.raises(LocalProtocolError, match="MF-104"):
        fed.parties[0].mask(fed.vectors()[0])


@pytest.mark.parametrize("attempt", [0, 6, 7, 2**64])
def test_open_round_attempt_not_above_all_before_refused(federation, task, attempt):
    fed = federation().set_up()
    party = fed.parties[0]
    party.open_round(7, task)
    party.close_round(CloseReason.ABORT)
    with pytest.raises(RemoteProtocolError, match="MF-181"):
        party.open_round(attempt, task)
    party.open_round(8, task)


@pytest.mark.parametrize(
    ("vector", "code"),
    [
        (np.zeros(63, np.int64), 180),
        (np.zeros((8, 8), np.int64), 180),
        (np.zeros(64), 180),
        (np.zeros(64, np.int32), 180),
        (np.full(64, np.nan), 184),
        (np.full(64, np.inf), 184),
    ],
)
def test_mask_bad_vector_refused_and_good_one_still_taken(federation, task, vector, code):
    fed = federation().set_up()
    fed.parties[0].open_round(1, task)
    with pytest.raises(LocalProtocolError, match=f"MF-{code}"):
        fed.parties[0].mask(vector)
    assert len(fed.parties[0].mask(fed.vectors()[0]).payload) == 52 + 256 + 64


def test_total_one_hospital_missing_is_refused_and_named(federation):
    fed = federation().set_up()
    fed.open_round(1)
    uploads = fed.mask_all(fed.vectors())
    for upload in uploads[:3]:
        fed.aggregator.add_upload(upload.payload)
    assert fed.aggregator.missing == {3}
    with pytest.raises(LocalProtocolError, match="MF-104"):
        fed.aggregator.total()


def test_close_round_late_upload_refused_and_next_attempt_is_clean(federation):
    fed = federation().set_up()
    fed.open_round(1)
    uploads = fed.mask_all(fed.vectors())
    fed.aggregator.add_upload(uploads[0].payload)
    fed.aggregator.close_round()
    with pytest.raises(RemoteProtocolError, match="MF-104"):
        fed.aggregator.add_upload(uploads[1].payload)
    fed.close_round()
    fed.open_round(2)
    with pytest.raises(RemoteProtocolError, match="MF-182"):
        fed.aggregator.add_upload(uploads[1].payload)
    for upload in fed.mask_all(fed.vectors(1)):
        fed.aggregator.add_upload(upload.payload)
    assert (fed.signed(fed.aggregator.total()) == sum(fed.vectors(1))).all()


def test_add_upload_repeat_ignored_other_signed_bytes_quarantine(federation, task):
    fed = federation().set_up()
    fed.open_round(1)
    twin = hospital_twin(fed)  # the same keys run twice: what a copied memory would do
    uploads = fed.mask_all(fed.vectors())
    assert fed.aggregator.add_upload(uploads[0].payload) == 0
    assert fed.aggregator.add_upload(uploads[0].payload) == 0
    twin.open_round(1, task)
    with pytest.raises(RemoteProtocolError, match="MF-183"):
        fed.aggregator.add_upload(twin.mask(fed.vectors(1)[0]).payload)
    assert fed.aggregator.quarantined == {0}
    for upload in uploads[1:]:
        fed.aggregator.add_upload(upload.payload)
    assert (fed.signed(fed.aggregator.total()) == sum(fed.vectors())).all()
    fed.close_round()
    fed.open_round(2)
    with pytest.raises(RemoteProtocolError, match="MF-183"):
        fed.aggregator.add_upload(fed.parties[0].mask(fed.vectors()[0]).payload)


def test_add_upload_forged_bytes_never_quarantine_the_honest(federation):
    fed = federation().set_up()
    fed.open_round(1)
    uploads = fed.mask_all(fed.vectors())
    fed.aggregator.add_upload(uploads[0].payload)
    forged = bytearray(uploads[0].payload)
    forged[60] ^= 1
    with pytest.raises(RemoteProtocolError, match="MF-110"):
        fed.aggregator.add_upload(bytes(forged))
    assert fed.aggregator.quarantined == frozenset()


def hospital_twin(fed):
    twin = fed.new_party(0)
    twin.offer()
    twin.accept(fed.aggregator.offers())
    return twin


def test_add_offer_restarted_hospital_needs_new_setup(federation):
    fed = federation()
    assert fed.aggregator.add_offer(fed.parties[2].offer()) == 2
    assert fed.aggregator.add_offer(fed.parties[2].offer()) == 2
    assert fed.aggregator.offered == {2}
    with pytest.raises(RemoteProtocolError, match="MF-183"):
        fed.aggregator.add_offer(fed.new_party(2, salt="restarted").offer())
    with pytest.raises(LocalProtocolError, match="MF-104"):
        fed.aggregator.offers()


def test_from_offers_restart_in_a_round_resent_uploads_give_the_sum(federation, task):
    fed = federation().set_up()
    fed.open_round(3)
    uploads = fed.mask_all(fed.vectors())
    fed.aggregator.add_upload(uploads[0].payload)
    restarted = Aggregator.from_offers(fed.config(0).shared, fed.aggregator.offers())
    assert restarted.transcript == fed.parties[0].transcript
    restarted.open_round(3, task)
    for upload in uploads:
        restarted.add_upload(upload.payload)
    assert (fed.signed(restarted.total()) == sum(fed.vectors())).all()


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_party_pickled_or_copied_refused(federation, duplicate):
    party = federation().set_up().parties[0]
    for secret in (party, party._state):
        with pytest.raises(LocalProtocolError, match="MF-900"):
            duplicate(secret)


def test_party_close_without_a_round_changes_nothing(federation, task):
    fed = federation()
    party = fed.parties[0]
    party.close_round(CloseReason.ABORT)
    offer = party.offer()
    party.close_round(CloseReason.ABORT)
    assert party.offer() == offer
    fed.set_up()
    party.close_round()
    party.open_round(1, task)
    assert party.phase is PartyPhase.TRAINING


@pytest.mark.parametrize("fewest", [4, 5])
def test_party_repr_and_effects_hold_no_secret(federation, task, fewest):
    fed = federation(5, fewest=fewest).set_up()
    state = fed.parties[0]._state
    entropy = bytes(range(100, 100 + mask_entropy_bytes(state.cohort)))
    state, _ = hospital.step(state, Round(1, task), entropy=b"", now=0.0)
    masking, effects = hospital.step(state, Vector(64), entropy=entropy, now=0.0)
    uploaded, sent = hospital.step(masking, Masked(bytes(32)), entropy=b"", now=0.0)
    secrets = [*state.roots.values(), *effects[0].streams, *filter(None, [entropy[:32]])]
    assert len(secrets) == 4 + len(effects[0].streams) + (fewest == 4)
    for secret in secrets:
        assert repr(secret) not in repr((state, masking, effects, uploaded, sent))
        assert all(secret not in one.head + one.tail + one.signed for one in sent if isinstance(one, SendVector))


@pytest.mark.parametrize("fewest", [4, 5])
@pytest.mark.parametrize("ending", ["uploaded", "released", "aborted in training"])
def test_party_close_leaves_nothing_of_the_round(federation, task, fewest, ending):
    """After it the state is what it was before the round, but for the attempt's number; buffers are zeros."""
    fed = federation(5, fewest=fewest).set_up()
    party = fed.parties[0]
    before = party._state
    if ending == "aborted in training":
        party.open_round(1, task)
    else:
        fed.open_round(1)
        fed.upload(fed.vectors())
    if ending == "released" and fewest == 4:
        fed.open_sum()
    assert party._state.context
    party.close_round()
    for name in type(before).__dataclass_fields__:
        wanted = 1 if name == "highest_attempt" else getattr(before, name)
        assert getattr(party._state, name) == wanted
    assert party._state.private == b""
    assert not party._words.any()
    assert not any(party._masker._pad)


def test_party_keeps_no_self_mask_once_it_is_uploaded(federation):
    """Nor a share of it that it could give away: its own boxes are closed for the others, and it has none."""
    fed = federation(5, fewest=4).set_up()
    drawn = []
    draw = fed.parties[0]._entropy.draw
    fed.parties[0]._entropy.draw = lambda *request: drawn.append(draw(*request)) or drawn[-1]
    fed.open_round(1)
    fed.upload(fed.vectors())
    held = b"".join(value for value in everything(fed.parties[0]._state) if isinstance(value, bytes))
    pieces = [drawn[0][start : start + 32] for start in range(0, len(drawn[0]), 32)]
    assert len(pieces) == 3
    assert not any(piece in held for piece in pieces)


def everything(state):
    return [getattr(state, name) for name in type(state).__dataclass_fields__]


# ----------------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("hospitals", "colluders", "survivors"), [(3, 1, 3), (5, 1, 4), (10, 2, 7), (20, 4, 13), (100, 33, 68)]
)
def test_thresholds_equal_the_design_table(hospitals, colluders, survivors):
    found = derive_thresholds(hospitals, colluders, 0)
    assert found.survivors == survivors == least_survivors(hospitals, colluders)
    assert found.is_strict == (hospitals == 3)


def test_thresholds_every_cohort_keeps_the_counting_argument():
    for hospitals, colluders in ((n, c) for n in range(3, 129) for c in range(1, n - 1)):
        for fewest in {colluders + 2, least_survivors(hospitals, colluders) + 1, hospitals - 1, hospitals}:
            if fewest > hospitals:
                continue
            found = derive_thresholds(hospitals, colluders, fewest)
            assert found.survivors >= fewest
            if found.is_strict:
                assert found == Thresholds(hospitals, 0)
                continue
            assert found.survivors + found.shares > hospitals + colluders
            assert colluders < found.shares <= found.survivors - 1
            assert 2 * found.survivors > hospitals + colluders


def test_cohort_smaller_or_larger_than_agreed_refused(federation):
    config = federation(6, fewest=5).config(0).shared
    with pytest.raises(PrivacyError, match="MF-140"):
        Cohort(config, (0, 1, 2, 3))
    assert Cohort(config, (0, 1, 2, 3, 5)).is_strict
    with pytest.raises(PrivacyError, match="MF-140"):
        Cohort(replace(config, most_hospitals=5), tuple(range(6)))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"colluders": 0}, 141),
        ({"colluders": 3}, 141),
        ({"colluders": -1}, 141),
        ({"identities": 2}, 140),
        ({"identities": 129}, 140),
        ({"identities": 0}, 143),
        ({"position": 4}, 144),
        ({"position": -1}, 144),
        ({"ring_bits": 64}, 203),
        ({"ring_bits": 31}, 203),
        ({"words": 0}, 203),
        ({"words": 2**33 + 1}, 203),
        ({"config_hash": b"short"}, 203),
        ({"roster_hash": b""}, 203),
        ({"fewest_survivors": 2}, 140),
        ({"fewest_survivors": 5}, 140),
    ],
)
def test_config_nonsense_refused(federation, change, code):
    good = federation().config(0)
    if "identities" in change:
        count = change["identities"]
        many = tuple(number.to_bytes(32, "big") for number in range(count))
        change = {"identities": many or (good.shared.identities[0],) * 4, "fewest_survivors": 0, "most_hospitals": 0}
    shared = {name: value for name, value in change.items() if name != "position"}
    with pytest.raises((PrivacyError, ConfigError)) as refusal:
        SecaggConfig(replace(good.shared, **shared), change.get("position", 0))
    assert refusal.value.code == code


# -------------------------------------------------------------------------------------------------------------------- parsers


@pytest.fixture(scope="module")
def opened(federation):
    """A federation in its first round, and one upload not yet handed in."""
    fed = federation(3, 8).set_up()
    fed.open_round(1)
    return fed, fed.parties[0].mask(fed.vectors()[0]).payload


@REPEATABLE
@given(st.binary(max_size=400))
def test_parsers_any_bytes_raise_named_errors_only(opened, data):
    fed, _ = opened
    for parse in (Aggregator(fed.config(0).shared).add_offer, fed.aggregator.add_upload):
        with pytest.raises(RemoteProtocolError):
            parse(data)
    with pytest.raises(RemoteProtocolError):
        parse_offer(data, fed.config(0).shared)


@REPEATABLE
@given(st.binary(min_size=148, max_size=148))
def test_uploads_right_length_any_bytes_raise_named_errors_only(opened, data):
    fed, good = opened
    assert len(good) == len(data)
    for tail in (data, good[:1] + data[1:], good[:52] + data[52:]):
        with pytest.raises(RemoteProtocolError):
            fed.aggregator.add_upload(tail)


@REPEATABLE
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_parsers_one_bit_flipped_anywhere_is_refused(opened, place, bit):
    fed, good = opened
    for message, parse in (
        (good, fed.aggregator.add_upload),
        (fed.parties[0].offer(), Aggregator(fed.config(0).shared).add_offer),
    ):
        flipped = bytearray(message)
        flipped[place % len(message)] ^= 1 << bit
        with pytest.raises(RemoteProtocolError):
            parse(bytes(flipped))
    assert fed.aggregator.missing == {0, 1, 2}
