"""Sessions: exact sums, the two tables of moves, misuse, restart of the coordinator."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import ConfigError, LocalProtocolError, PrivacyError, ProtocolError, RemoteProtocolError
from medfed.privacy.secagg import aggregator as coordinator
from medfed.privacy.secagg import party as hospital
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.protocol import SecaggConfig, Thresholds, derive_thresholds, parse_offer
from medfed.privacy.secagg.transitions import (
    AGGREGATOR_TABLE,
    PARTY_TABLE,
    AggregatorPhase,
    Begin,
    Certificate,
    Close,
    CloseReason,
    Fast,
    Masked,
    Offered,
    Offers,
    PartyPhase,
    Round,
    Send,
    Survivors,
    Uploaded,
    Vector,
)

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
            assert len(upload.payload) == fed.config(0).shared.upload_bytes
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
    assert fed.aggregator.missing_offers == {0, 1, 3}
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


def test_party_close_erases_words_and_context(federation, task):
    fed = federation().set_up()
    party = fed.parties[0]
    party.open_round(1, task)
    party.mask(fed.vectors()[0])
    party.close_round()
    assert party._state.context == b""
    assert party._state.private == b""
    assert not party._words.any()


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


def test_party_repr_and_effects_hold_no_secret(federation, task):
    fed = federation().set_up()
    state = fed.parties[0]._state
    state, _ = hospital.step(state, Round(1, task), entropy=b"", now=0.0)
    masking, effects = hospital.step(state, Vector(64), entropy=b"", now=0.0)
    uploaded, sent = hospital.step(masking, Masked(bytes(32)), entropy=b"", now=0.0)
    secrets = [*state.roots, *effects[0].streams]
    for secret in secrets:
        assert repr(secret) not in repr((state, effects, uploaded, sent))
        assert all(secret not in effect.head + effect.signed for effect in sent if isinstance(effect, Send))


# ------------------------------------------------------------------------------------------------------------ tables of moves


def party_states(fed, task):
    """One state for each phase; recovery's are made up, as strict mode never gets there."""
    party = fed.new_party(0)
    states = {PartyPhase.NEW: party._state}
    for move in (
        party.offer,
        lambda: party.accept(fed.aggregator.offers()),
        lambda: party.open_round(1, task),
        lambda: party._step(Vector(fed.words)),
        lambda: party._step(Masked(bytes(32))),
    ):
        move()
        states[party.phase] = party._state
    for phase in (PartyPhase.VOTED, PartyPhase.RELEASED):
        states[phase] = hospital.replace(states[PartyPhase.UPLOADED], phase=phase)
    return states


def party_events(fed, task):
    offers = fed.aggregator.offers()
    closes = [Close(reason) for reason in CloseReason]
    ask = [Fast(), Survivors((0, 1, 2, 3)), Certificate((0, 1, 2, 3))]
    return [Begin(), Offers(offers), Round(2, task), Vector(fed.words), Masked(bytes(32)), *ask, *closes]


def test_party_table_every_pair_moves_as_listed_or_raises_intact(federation, task):
    fed = federation().set_up()
    states, moves = party_states(fed, task), 0
    assert set(states) == set(PartyPhase)
    for state, event in itertools.product(states.values(), party_events(fed, task)):
        before = repr(state)
        entropy = bytes(range(64)) if isinstance(event, Begin) else b""
        listed = PARTY_TABLE.get((state.phase, type(event)))
        try:
            after, effects = hospital.step(state, event, entropy=entropy, now=0.0)
        except ProtocolError as error:
            assert error.code == 104
            assert listed is None or isinstance(event, Fast | Survivors | Certificate)
        else:
            moves += 1
            assert listed is not None
            assert after.phase in listed
            assert not any(isinstance(effect, Send) for effect in effects) or isinstance(event, Begin | Masked)
        assert repr(state) == before
    assert moves == 1 + 7 + 1 + 1 + 1 + 6 * 3  # Begin, Offers, Round, Vector, Masked, Close for three reasons


@pytest.mark.parametrize("depth", [5])
def test_party_any_order_of_events_uploads_once_an_attempt_and_releases_never(federation, task, depth):
    """All sequences of events from READY: never a second ``Send`` for one attempt, never VOTED or RELEASED."""
    fed = federation().set_up()
    events = [
        Round(1, task),
        Round(2, task),
        Vector(fed.words),
        Masked(bytes(32)),
        Fast(),
        Survivors((0,)),
        Close(CloseReason.ABORT),
    ]
    seen = 0
    frontier = [(fed.parties[0]._state, ())]
    for _ in range(depth):
        following = []
        for (state, sent), event in itertools.product(frontier, events):
            try:
                after, effects = hospital.step(state, event, entropy=b"", now=0.0)
            except ProtocolError:
                continue
            assert after.phase not in (PartyPhase.VOTED, PartyPhase.RELEASED)
            now_sent = sent + tuple(after.highest_attempt for effect in effects if isinstance(effect, Send))
            assert len(set(now_sent)) == len(now_sent)
            seen += len(now_sent) > len(sent)
            following.append((after, now_sent))
        frontier = following
    assert seen > 0


def test_aggregator_table_every_pair_moves_as_listed_or_raises_intact(federation, task):
    fed = federation().set_up()
    fed.open_round(1)
    uploads = fed.mask_all(fed.vectors())
    opened = fed.aggregator._state
    partly = opened
    for upload in uploads[:3]:
        partly, _ = coordinator.step(partly, Uploaded(upload.payload), entropy=b"", now=0.0)
    done, _ = coordinator.step(partly, Uploaded(uploads[3].payload), entropy=b"", now=0.0)
    states = {
        AggregatorPhase.OFFERS: coordinator.new_state(opened.config),
        AggregatorPhase.READY: Aggregator.from_offers(opened.config, fed.aggregator.offers())._state,
        AggregatorPhase.OPEN: partly,
        AggregatorPhase.DONE: done,
        AggregatorPhase.FAILED: coordinator.step(partly, Close(CloseReason.DEADLINE), entropy=b"", now=0.0)[0],
        AggregatorPhase.VOTING: coordinator.replace(partly, phase=AggregatorPhase.VOTING),
        AggregatorPhase.RELEASING: coordinator.replace(partly, phase=AggregatorPhase.RELEASING),
    }
    assert set(states) == set(AggregatorPhase)
    events = [Offered(fed.aggregator.offers()[0]), Round(2, task), Uploaded(uploads[3].payload), Close(CloseReason.SUM)]
    for state, event in itertools.product(states.values(), events):
        before = repr(state)
        listed = AGGREGATOR_TABLE.get((state.phase, type(event)))
        if listed is None:
            with pytest.raises(ProtocolError, match="MF-104"):
                coordinator.step(state, event, entropy=b"", now=0.0)
        else:
            assert coordinator.step(state, event, entropy=b"", now=0.0)[0].phase in listed
        assert repr(state) == before


def test_step_begin_with_too_little_entropy_refused(federation):
    state = federation().new_party(0)._state
    with pytest.raises(LocalProtocolError, match="MF-900"):
        hospital.step(state, Begin(), entropy=bytes(63), now=0.0)


# ----------------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("hospitals", "colluders", "survivors"), [(3, 1, 3), (5, 1, 4), (10, 2, 7), (20, 4, 13), (100, 33, 68)]
)
def test_thresholds_equal_the_design_table(hospitals, colluders, survivors):
    found = derive_thresholds(hospitals, colluders)
    assert found.survivors == survivors
    assert found.is_strict == (hospitals == 3)


def test_thresholds_every_cohort_keeps_the_counting_argument():
    for hospitals in range(3, 129):
        for colluders in range(1, hospitals - 1):
            found = derive_thresholds(hospitals, colluders)
            if found.is_strict:
                assert found == Thresholds(hospitals, 0)
                continue
            assert found.survivors + found.shares > hospitals + colluders
            assert colluders < found.shares <= found.survivors - 1
            assert 2 * found.survivors > hospitals + colluders


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
    ],
)
def test_config_nonsense_refused(federation, change, code):
    good = federation().config(0)
    values = {name: getattr(good, name) for name in SecaggConfig.__dataclass_fields__ if name != "shared"}
    if "identities" in change:
        count = change["identities"]
        many = tuple(number.to_bytes(32, "big") for number in range(count)) if count else (good.identities[0],) * 4
        change = {"identities": many}
    with pytest.raises((PrivacyError, ConfigError)) as refusal:
        SecaggConfig(**values | change)
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
