"""A hostile coordinator. Every attack has its control: with that one rule switched off the attack succeeds.

What the attacker holds: all offers, all uploads, the keys it made itself.
"""

import numpy as np
import pytest

from medfed.errors import PrivacyError, RemoteProtocolError
from medfed.identity import Identity
from medfed.privacy.secagg import keys, party, protocol
from medfed.privacy.secagg.masks import pad_words
from medfed.privacy.secagg.protocol import SecaggConfig

CHI2_LIMIT = 376.0  # 255 degrees of freedom, exceeded by chance about once in a million
TRAP = bytes(range(32))  # the hash of another model


class Impostor:
    """Invented hospitals: the coordinator knows their private keys, so it can take their pads off."""

    def __init__(self, fed, victim, identities):
        self.fed, self.victim, self.private, self.offers = fed, victim, {}, {}
        for peer in range(len(fed.parties)):
            if peer != victim:
                self.private[peer] = bytes([peer + 1]) * 32
                offer = protocol.Offer(peer, bytes(32), keys.public_key(self.private[peer]))
                body = offer.encode(fed.config(0).shared)
                self.offers[peer] = body + identities[peer].sign(body)

    def offers_with(self, victims_offer):
        return [self.offers.get(peer, victims_offer) for peer in range(len(self.fed.parties))]

    def unmask(self, upload, victims_offer, transcript):
        """The victim's words with all pads taken off."""
        words = self.fed.words_of(upload.payload)
        for peer, private in self.private.items():
            root = keys.derive_root(private, victims_offer[-96:-64], transcript, peer, self.victim)
            stream = keys.stream_key(keys.leaf_seed(root, upload.pad_id), upload.pad_id)
            pad = pad_words(stream, 0, self.fed.words, self.fed.ring_bits).astype(np.int64)
            words = words - pad if self.victim < peer else words + pad
        return self.fed.wrap(words)


def invented_identities():
    return [Identity.from_seed(bytes([200 + position]) * 32) for position in range(4)]


def run_impostor(fed, victim, party_, task):
    impostor = Impostor(fed, victim, invented_identities())
    offer = party_.offer()
    party_.accept(impostor.offers_with(offer))
    party_.open_round(1, task)
    vector = fed.vectors()[victim]
    return impostor.unmask(party_.mask(vector), offer, party_.transcript), vector


def test_attack_key_swap_is_refused(federation, task):
    """The coordinator relays keys of its own making in the names of pinned hospitals."""
    fed = federation()
    with pytest.raises(RemoteProtocolError, match="MF-110"):
        run_impostor(fed, 1, fed.parties[1], task)


def test_attack_key_swap_control_unsigned_keys_give_the_vector(federation, task, monkeypatch):
    monkeypatch.setattr(keys, "verify", lambda *_: None)
    fed = federation()
    found, vector = run_impostor(fed, 1, fed.parties[1], task)
    assert (found == vector).all()


def test_attack_sybil_is_refused(federation, task):
    """Invented hospitals beyond the roster: their offers name no pinned position."""
    fed = federation()
    invented = invented_identities()
    larger = federation(4).config(0, [*(identity.public for identity in fed.identities), invented[0].public]).shared
    body = protocol.Offer(4, bytes(32), keys.public_key(bytes(range(32)))).encode(larger)
    offers = [other.offer() for other in fed.parties]
    with pytest.raises(RemoteProtocolError, match="MF-111"):
        fed.parties[0].accept([*offers[:3], body + invented[0].sign(body)])


def test_attack_sybil_control_roster_of_the_coordinator_gives_the_vector(federation, task):
    """A hospital that took its roster from the coordinator instead of pinning it."""
    fed = federation()
    identities = [identity.public for identity in invented_identities()]
    identities[1] = fed.identities[1].public
    found, vector = run_impostor(fed, 1, fed.new_party(1, identities), task)
    assert (found == vector).all()


def test_attack_old_key_replay_stalls_and_reveals_nothing(federation, task):
    """An old signed offer of hospital 1 shown to the others; hospital 1 sees its own. Control: the honest relay."""
    fed = federation(4, 5000)
    old = fed.new_party(1, salt="an earlier session").offer()
    true = [other.offer() for other in fed.parties]
    stale = [true[0], old, true[2], true[3]]
    with pytest.raises(RemoteProtocolError, match="MF-174"):
        fed.parties[1].accept(stale)
    fed.parties[1].accept(true)
    for position in (0, 2, 3):
        fed.parties[position].accept(stale)
    assert (sum_in_spite(fed, [task] * 4) != fed.wrap(sum(fed.vectors()))).mean() > 0.999
    honest = federation(4, 5000).set_up()
    assert (sum_in_spite(honest, [task] * 4) == sum(honest.vectors())).all()


def sum_in_spite(fed, tasks):
    """What a coordinator gets that adds all words and checks nothing."""
    for one, task in zip(fed.parties, tasks, strict=True):
        one.open_round(1, task)
    return fed.wrap(sum(fed.words_of(upload.payload) for upload in fed.mask_all(fed.vectors())))


def test_attack_inconsistent_model_gives_a_uniform_sum(federation, task):
    """The victim gets a trap model, the others a harmless one."""
    fed = federation(4, 50_000).set_up()
    total = sum_in_spite(fed, [TRAP, task, task, task])
    assert chi2_of_low_bytes(total) < CHI2_LIMIT
    assert chi2_of_low_bytes(sum(fed.vectors(bound=50))) > CHI2_LIMIT


def test_attack_inconsistent_model_control_context_without_task_gives_the_sum(federation, task, monkeypatch):
    honest = protocol.context_hash
    monkeypatch.setattr(party, "context_hash", lambda config, t, attempt, _: honest(config, t, attempt, bytes(32)))
    fed = federation(4, 500).set_up()
    total = sum_in_spite(fed, [TRAP, task, task, task])
    assert (total == sum(fed.vectors())).all()


def chi2_of_low_bytes(integers):
    counts = np.bincount((integers & 0xFF).astype(np.int64), minlength=256)
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_attack_inconsistent_model_is_refused_by_an_honest_coordinator(federation, task):
    fed = federation().set_up()
    fed.aggregator.open_round(1, task)
    fed.parties[0].open_round(1, TRAP)
    with pytest.raises(RemoteProtocolError, match="MF-110"):
        fed.aggregator.add_upload(fed.parties[0].mask(fed.vectors()[0]).payload)


@pytest.mark.parametrize("part", ["transcript", "attempt", "task", "cohort", "words", "ring_bits", "nothing"])
def test_context_any_part_different_gives_another_pad(federation, task, part):
    """Control: with nothing changed the context is the same."""
    fed = federation(4, 64, 32)
    config = {"cohort": federation(5, 64, 32), "words": federation(4, 65, 32), "ring_bits": federation(4, 64, 16)}
    shared = config.get(part, fed).config(0).shared
    transcript = bytes(32) if part != "transcript" else bytes([1]) * 32
    other = bytes(32) if part == "task" else task
    attempt = 2 if part == "attempt" else 1
    honest = protocol.context_hash(fed.config(0).shared, bytes(32), 1, task)
    assert (protocol.context_hash(shared, transcript, attempt, other) == honest) == (part == "nothing")


def test_attack_round_replay_is_refused(federation, task):
    """The coordinator asks for the same attempt again, to subtract two uploads under one pad."""
    fed = federation().set_up()
    victim = fed.parties[0]
    victim.open_round(1, task)
    victim.mask(fed.vectors(1)[0])
    victim.close_round()
    with pytest.raises(RemoteProtocolError, match="MF-181"):
        victim.open_round(1, task)


def test_attack_round_replay_control_reused_attempt_gives_the_difference(federation, task):
    fed = federation().set_up()
    victim, uploads = fed.parties[0], []
    for seed in (1, 2):
        victim._state = party.replace(victim._state, highest_attempt=0)  # the rule switched off
        victim.open_round(1, task)
        uploads.append(fed.words_of(victim.mask(fed.vectors(seed)[0]).payload))
        victim.close_round()
    assert (fed.wrap(uploads[0] - uploads[1]) == fed.vectors(1)[0] - fed.vectors(2)[0]).all()


def test_attack_retry_same_pad_other_vector_next_attempt_has_another_pad(federation, task):
    """After a voided attempt the same hospital answers the next one: the difference is masked."""
    fed = federation(4, 5000).set_up()
    victim, uploads = fed.parties[0], []
    for attempt in (1, 2):
        victim.open_round(attempt, task)
        uploads.append(fed.words_of(victim.mask(fed.vectors(attempt)[0]).payload))
        victim.close_round()
    difference = fed.wrap(uploads[0] - uploads[1])
    assert (difference == fed.vectors(1)[0] - fed.vectors(2)[0]).mean() < 0.001


def test_attack_restart_old_session_cannot_be_continued(federation, task):
    """A restarted hospital has new keys: its old offer is not its own any more, so the old session ends."""
    fed = federation().set_up()
    restarted = fed.new_party(0, salt="restarted")
    restarted.offer()
    with pytest.raises(RemoteProtocolError, match="MF-174"):
        restarted.accept(fed.aggregator.offers())


def test_attack_small_group_is_refused(federation):
    """Two hospitals, one of them a colluder, would leave the victim alone in the sum."""
    good = federation().config(0)
    for identities, colluders, code in ((good.identities[:2], 1, 140), (good.identities, 3, 141)):
        with pytest.raises(PrivacyError, match=f"MF-{code}"):
            SecaggConfig(good.config_hash, good.roster_hash, 0, identities, colluders, 8, 32)


def test_attack_small_group_control_two_hospitals_give_the_vector(federation, task, monkeypatch):
    monkeypatch.setattr(protocol, "check_cohort", lambda *_: None)
    fed = federation(2).set_up()
    total = sum_in_spite(fed, [task] * 2)
    assert (total - fed.vectors()[1] == fed.vectors()[0]).all()


def test_attack_partial_sum_is_uniform(federation, task):
    """One upload left out: what remains is masked by the pads shared with it. Control: all together give the sum."""
    fed = federation(4, 50_000).set_up()
    fed.open_round(1)
    words = [fed.words_of(upload.payload) for upload in fed.mask_all(fed.vectors(bound=50))]
    for left_out in range(4):
        partial = fed.wrap(sum(word for position, word in enumerate(words) if position != left_out))
        assert chi2_of_low_bytes(partial) < CHI2_LIMIT
    assert chi2_of_low_bytes(fed.wrap(sum(words))) > CHI2_LIMIT


def test_attack_clear_metrics_upload_depends_on_the_vector_in_its_words_only(federation, task):
    """Header and length are the same whatever was trained; nothing else is in the envelope."""
    fed, heads = federation().set_up(), set()
    for attempt, vector in enumerate((np.zeros(64, np.int64), np.full(64, 10**6)), start=1):
        fed.parties[0].open_round(attempt, task)
        payload = fed.parties[0].mask(vector).payload
        fed.parties[0].close_round()
        assert len(payload) == 52 + 4 * 64 + 64
        heads.add(payload[:33] + payload[41:52])
    assert len(heads) == 1
