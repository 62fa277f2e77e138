"""The real party against ``release_model``: what any requests bring it to say, and what its very bytes then give away.

Together with ``test_release_rule_exhaustive``: what the model's search says of views holds of the code. The controls play the
model's worst views against weakened rules, and read single hospitals' vectors.
"""

import importlib.util
from itertools import chain
from pathlib import Path

import pytest
from medfed_test_boxes import split_boxes

from medfed.errors import ProtocolError, RemoteProtocolError
from medfed.privacy.secagg import party, protocol, release, shamir
from medfed.privacy.secagg.boxes import open_box
from medfed.privacy.secagg.keys import leaf_seed, stream_key
from medfed.privacy.secagg.masks import pad_words
from medfed.privacy.secagg.messages import Secret, commitment_of, parse_upload, vote_input
from medfed.privacy.secagg.protocol import BOX_BYTES, RELEASE_ENTRY_BYTES, Thresholds
from medfed.privacy.secagg.transitions import Certificate, Close, CloseReason, Fast, PartyPhase, Round, Send, Survivors

_spec = importlib.util.spec_from_file_location("release_model", Path(__file__).with_name("release_model.py"))
model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(model)
Setting = model.Setting

RECOVERY = Setting(5, 1, 4, 3)
STRICT = [Setting(n, c, n, 0) for n in (3, 4, 5) for c in range(1, n - 1)]
NO_BOX = bytes(BOX_BYTES)
WORDS = 2


def members(mask):
    return tuple(position for position in range(mask.bit_length()) if mask >> position & 1)


def as_mask(positions):
    return sum(1 << position for position in positions)


def entries(body):
    """Of a release's body: (peer, kind, secret)."""
    cuts = [body[start : start + RELEASE_ENTRY_BYTES] for start in range(0, len(body), RELEASE_ENTRY_BYTES)]
    return [(int.from_bytes(cut[:2], "big"), Secret(cut[2]), cut[3:]) for cut in cuts]


class Session:
    """The federation of a setting in its first round, all masked, and a coordinator that holds the uploads and the colluders."""

    def __init__(self, federation, setting):
        self.setting = setting
        self.fed = federation(setting.hospitals, WORDS, fewest=setting.survivors, colluders=setting.colluders).set_up()
        assert self.fed.aggregator.cohort.thresholds == Thresholds(setting.survivors, setting.shares)
        self.fed.open_round(1)
        self.vectors = self.fed.vectors()
        self.uploads = [masked.payload for masked in self.fed.mask_all(self.vectors)]
        cohort, transcript = self.fed.aggregator.cohort, self.fed.aggregator.transcript
        self.parts = [parse_upload(upload, cohort, transcript, 1) for upload in self.uploads]
        self.states = [each._state for each in self.fed.parties]
        self.context = self.states[0].context

    def boxes(self, position, senders):
        boxes = {sender: split_boxes(self.parts[sender].boxes) for sender in senders if sender != position}
        return tuple((sender, found.get(position, NO_BOX)) for sender, found in boxes.items())

    def vote(self, voter, mask):
        return voter, self.fed.identities[voter].sign(vote_input(self.context, voter, members(mask)))

    # ---- one view, played

    def play(self, view):
        """Entries by honest hospital, as a coordinator gets them that shows each hospital what leads to its answer."""
        votes = {}
        for position, answer in enumerate(view):
            if answer.voted:
                vote = position, self.fed.parties[position].vote(members(answer.voted))
                assert vote == self.vote(position, answer.voted)
                votes.setdefault(answer.voted, []).append(vote)
        released = {}
        for position, answer in enumerate(view):
            if answer.released:
                theirs = [colluder for colluder in members(answer.voted) if colluder not in self.setting.honest]
                shown = [*votes.get(answer.voted, ()), *(self.vote(each, answer.voted) for each in theirs)]
                named = members(answer.released)
                message = self.fed.parties[position].release(named, shown, self.boxes(position, named))
                released[position] = entries(message[:-64])
        return released

    # ---- what the coordinator and its colluders make of it

    def pad(self, seed):
        return pad_words(stream_key(seed, self.context), 0, WORDS, 32).astype(int)

    def self_mask(self, owner, released):
        """b of an honest hospital from all shares at hand; None where those are fewer than t."""
        colluders = range(len(self.setting.honest), self.setting.hospitals)
        own = split_boxes(self.parts[owner].boxes)
        held = [
            (each, open_box(self.states[each].roots[owner], self.context, owner, each, own[each])) for each in colluders
        ]
        told = chain(*([(by, *entry) for entry in found] for by, found in released.items()))
        held += [(by, secret) for by, peer, kind, secret in told if peer == owner and kind is Secret.SHARE]
        if len(held) < self.setting.shares:
            return None
        found = shamir.combine(held, self.setting.shares)
        assert commitment_of(self.context, owner, found) == self.parts[owner].commitment
        return found

    def seeds(self, released):
        """Leaf seeds by pair, lower position first: those released, and those of colluders."""
        found = {}
        for by, told in released.items():
            found |= {tuple(sorted((by, peer))): seed for peer, kind, seed in told if kind is Secret.SEED}
        for colluder in range(len(self.setting.honest), self.setting.hospitals):
            roots = self.states[colluder].roots
            found |= {tuple(sorted((colluder, peer))): leaf_seed(roots[peer], self.context) for peer in roots}
        return found

    def known(self, view, released):
        """``model.known``, from bytes: self masks that verify, pads of pairs without a seed."""
        honest, seeds = self.setting.honest, self.seeds(released)
        opened = [i for i in honest if view[i].uploaded and self.self_mask(i, released) is not None]
        secret = [[j for j in honest if j != i and (min(i, j), max(i, j)) not in seeds] for i in honest]
        return model.Known(as_mask(opened), tuple(as_mask(each) for each in secret))

    def read(self, subset, released):
        """The sum of the vectors of ``subset``, by uploads, released secrets and colluders alone."""
        inside, seeds = members(subset), self.seeds(released)
        total = sum(self.fed.words_of(self.uploads[i]) - self.pad(self.self_mask(i, released)) for i in inside)
        for i in inside:
            for j in range(self.setting.hospitals):
                if j not in inside:
                    total = total - (1 if i < j else -1) * self.pad(seeds[min(i, j), max(i, j)])
        return self.fed.wrap(total).tolist()

    def truth(self, subset):
        return sum(self.vectors[i] for i in members(subset)).tolist()


# ------------------------------------------------------------------------------------- any requests, any order, repeated


def requests(session, position, task):
    """All that a coordinator could ask of ``position``, whoever signs: valid, short, forged, misspelled, broken boxes.

    With each the set it names, and the hospitals whose valid votes it shows, as masks.
    """
    hospitals = session.setting.hospitals
    yield Close(CloseReason.ABORT), 0, 0
    yield Round(1, task), 0, 0
    for mask in range(1 << hospitals):
        named = members(mask)
        for spelled in (named, named[::-1], (*named, *named[-1:]), (*named, hospitals)):
            yield Survivors(spelled), mask, 0
        ballot = [session.vote(voter, mask) for voter in range(hospitals)]
        other = [session.vote(voter, mask ^ 1) for voter in named[:1]]
        genuine = session.boxes(position, named)
        for boxes in (genuine, tuple((sender, NO_BOX) for sender, _ in genuine)):
            yield Fast(boxes), mask, 0
            for voters in range(1 << hospitals):
                yield Certificate(named, tuple(ballot[voter] for voter in members(voters)), boxes), mask, voters
            yield Certificate(named, tuple(ballot[position : position + 1] * hospitals), boxes), mask, 1 << position
            yield Certificate(named, (*other, *(ballot[voter] for voter in named[1:])), boxes), mask, mask & mask - 1
            yield Certificate(members(mask ^ 1), tuple(ballot[voter] for voter in named), boxes), mask ^ 1, 0


def said(session, event, position, send):
    """A message that left the party: ("vote", set), or ("release", whose shares, whose seeds)."""
    if isinstance(event, Survivors):
        assert send.signed == vote_input(session.context, position, event.members)
        return "vote", as_mask(event.members)
    told = entries(send.head)
    assert [peer for peer, _, _ in told] == [peer for peer in range(session.setting.hospitals) if peer != position]
    masks = {kind: as_mask(peer for peer, found, _ in told if found is kind) for kind in Secret}
    return "release", masks[Secret.SHARE], masks[Secret.SEED]


def explore(session, position, task):
    """All that ``position`` can be brought to say in one round: by any requests in any order, any number of times.

    The sets of messages said by the end of some course, and (set, voters) of every certificate that was taken.
    """
    asked = list(requests(session, position, task))
    ends, taken, seen = {frozenset()}, set(), set()
    left = [(session.states[position], frozenset())]
    while left:
        state, spoken = left.pop()
        for event, mask, voters in asked:
            try:
                after, effects = party.step(state, event, entropy=b"", now=0.0)
            except ProtocolError:
                continue
            assert after.phase is not PartyPhase.TRAINING  # the round is never opened again
            sends = [effect for effect in effects if isinstance(effect, Send)]
            now = spoken | {said(session, event, position, send) for send in sends}
            if isinstance(event, Certificate):
                taken.add((mask, voters))
            ends.add(now)
            if (key := (after.phase, after.survivors, after.asked, now)) not in seen:
                seen.add(key)
                left.append((after, now))
    return ends, taken


def expected(setting, position):
    """The same by the model: one vote at most, one release at most, for that set; broken boxes yield no share."""
    peers, ends, taken = setting.everybody & ~(1 << position), {frozenset()}, set()
    if setting.shares:
        ends |= {frozenset({("release", shares, 0)}) for shares in (0, peers)}
    for found in setting.survivor_sets(position):
        vote = "vote", found
        releases = [("release", shares, setting.everybody & ~found) for shares in (0, found & peers)]
        ends |= {frozenset({vote}), *(frozenset({vote, each}) for each in releases)}
        voters = (mask for mask in range(setting.everybody) if not mask & ~found)
        taken |= {(found, mask) for mask in voters if mask.bit_count() >= setting.survivors}
    return ends, taken


@pytest.mark.parametrize("setting", [*STRICT, RECOVERY], ids=str)
def test_party_brought_to_anything_says_what_the_model_says(setting, federation, task):
    """Up to five hospitals, each of them: so the model's views are those of the code, as each answers for itself."""
    session = Session(federation, setting)
    for position in range(setting.hospitals):
        assert explore(session, position, task) == expected(setting, position)


@pytest.mark.soak
@pytest.mark.parametrize("setting", [Setting(6, 1, 5, 4), Setting(7, 1, 5, 4)], ids=str)
def test_party_of_a_larger_cohort_says_what_the_model_says(setting, federation, task):
    assert explore(Session(federation, setting), 0, task) == expected(setting, 0)


# --------------------------------------------------------------------------------------------------- what the bytes give


@pytest.mark.parametrize("setting", [RECOVERY, Setting(6, 2, 5, 4)], ids=str)
def test_bytes_of_every_view_give_what_the_model_says(setting, federation):
    """One view for each thing that can be known: self masks, seeds, and every sum that they open, from the bytes alone."""
    views = {model.known(setting, view): view for view in model.every_view(setting)}
    sums = set()
    for held, view in views.items():
        session = Session(federation, setting)
        released = session.play(view)
        assert session.known(view, released) == held
        for subset in model.isolated(held):
            assert session.read(subset, released) == session.truth(subset)
            sums.add(subset)
    assert min(subset.bit_count() for subset in sums) == setting.survivors - setting.colluders


@pytest.mark.parametrize(
    ("setting", "honest"),
    [(Setting(5, 1, 3, 2, votes=False), 1), (Setting(6, 1, 4, 2), 2), (Setting(5, 1, 4, 3, votes=False), 2)],
    ids=str,
)
def test_weakened_party_gives_its_vector_away_and_the_real_one_refuses(setting, honest, federation, monkeypatch):
    """Controls: the model's worst view of a weaker rule, played, reads ``honest`` hospitals' sum; as shipped it is refused."""
    views = {model.known(setting, view): view for view in model.strongest_views(setting)}
    worst = min((subset.bit_count(), subset, view) for held, view in views.items() for subset in model.isolated(held))
    _, subset, view = worst
    with pytest.raises(RemoteProtocolError, match=r"MF-18[56]"):
        Session(federation, protocol_setting(setting)).play(view)
    thresholds = Thresholds(setting.survivors, setting.shares)
    monkeypatch.setattr(protocol, "derive_thresholds", lambda *_: thresholds)
    if not setting.votes:
        monkeypatch.setattr(release, "check_certificate", lambda *_: None)
    session = Session(federation, setting)
    assert session.read(subset, session.play(view)) == session.truth(subset)
    assert subset.bit_count() == honest


def protocol_setting(setting):
    """With the thresholds that the same cohort derives."""
    derived = protocol.derive_thresholds(setting.hospitals, setting.colluders, setting.survivors)
    return Setting(setting.hospitals, setting.colluders, derived.survivors, derived.shares)
