"""What hospitals may answer in one round, and what a coordinator with colluders can work out from it: a model of the release
rule, small enough to try every view. Sets of hospitals are bit masks; the honest hospitals are the first h = n - c positions.

One round is one ctx: hospitals to which the coordinator shows another round, setup or model have no part in it and stand here
as not uploaded. Every request is answered from what that hospital saw itself, so a view is one ``Answer`` an honest hospital;
colluders sign, release and tell whatever they like. Boxes are closed for their receiver, so that other bytes in their place
only make the coordinator know less.

Source: medfed's secure aggregation design, sections 6, 7, 9 and 10; Bonawitz et al. 2017, section 6.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


class Answer(NamedTuple):
    """What one honest hospital gave away: its upload, a vote on a survivor set, a release for one. 0: none; a fast release is
    one for everybody."""

    uploaded: bool = True
    voted: int = 0
    released: int = 0


View = tuple[Answer, ...]
ABSENT, SILENT = Answer(uploaded=False), Answer()


class Known(NamedTuple):
    """What the coordinator and its colluders hold of the honest hospitals.

    ``opened``: whose upload is in and self mask known. ``closed``: for each hospital, the others with whom its pad is secret.
    """

    opened: int
    closed: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """n, c, m and t. ``shares`` 0: strict mode. ``votes``: whether a release needs m of them (rule 14)."""

    hospitals: int
    colluders: int
    survivors: int
    shares: int
    votes: bool = True

    @property
    def everybody(self) -> int:
        return (1 << self.hospitals) - 1

    @property
    def honest(self) -> range:
        return range(self.hospitals - self.colluders)

    @property
    def all_honest(self) -> int:
        return (1 << len(self.honest)) - 1

    def survivor_sets(self, hospital: int) -> tuple[int, ...]:
        """On which ``hospital`` would vote: rule 11, and not the whole cohort (rule 13)."""
        if not self.shares:
            return ()
        sets = range(1 << self.hospitals)
        return tuple(
            found
            for found in sets
            if found >> hospital & 1 and found != self.everybody and found.bit_count() >= self.survivors
        )

    def votes_missing(self, survivors: int) -> int:
        """How many honest votes a certificate needs beside the colluders' own."""
        return self.survivors - (survivors & ~self.all_honest).bit_count() if self.votes else 1


def every_view(setting: Setting) -> Iterator[View]:
    """All views, nothing left out: each honest hospital not reached, silent, voting on any set, released or not."""
    stances = [
        (ABSENT, SILENT, *(Answer(voted=found) for found in setting.survivor_sets(hospital)))
        for hospital in setting.honest
    ]
    for stance in itertools.product(*stances):
        votes = Counter(answer.voted for answer in stance)
        yield from itertools.product(*(_then(setting, answer, votes) for answer in stance))


def _then(setting: Setting, answer: Answer, votes: Counter[int]) -> tuple[Answer, ...]:
    """With or without the release that it may be brought to."""
    if not answer.uploaded or not setting.shares:
        return (answer,)
    if not answer.voted:
        return answer, answer._replace(released=setting.everybody)
    if votes[answer.voted] < setting.votes_missing(answer.voted):
        return (answer,)
    return answer, answer._replace(released=answer.voted)


def strongest_views(setting: Setting) -> Iterator[View]:
    """Enough of them to find every smallest sum: all have uploaded, and released for a certificate or fast.

    A release only adds to what is known, and a colluder in a survivor set only adds a vote; so nobody is silent, and each set
    holds all colluders, or all but one where it holds everybody else. Honest hospitals that released for one set voted on it.
    """
    if not setting.shares:
        return iter([tuple(SILENT for _ in setting.honest)])
    return _assign(setting, [None] * len(setting.honest))


def _assign(setting: Setting, answers: list[Answer | None]) -> Iterator[View]:
    left = [hospital for hospital, answer in enumerate(answers) if answer is None]
    if not left:
        yield tuple(answer for answer in answers if answer is not None)
        return
    first, *others = left
    yield from _assign(setting, _with(answers, [first], Answer(released=setting.everybody)))
    colluders = setting.everybody & ~setting.all_honest
    taken = {answer.voted for answer in answers if answer is not None}
    for part in range(setting.all_honest + 1):
        found = part | (colluders if part != setting.all_honest else colluders & (colluders - 1))
        if not part >> first & 1 or found.bit_count() < setting.survivors or found in taken:
            continue
        candidates = [hospital for hospital in others if part >> hospital & 1]
        for size in range(max(setting.votes_missing(found) - 1, 0), len(candidates) + 1):
            for with_it in itertools.combinations(candidates, size):
                yield from _assign(setting, _with(answers, [first, *with_it], Answer(voted=found, released=found)))


def _with(answers: list[Answer | None], hospitals: list[int], answer: Answer) -> list[Answer | None]:
    return [answer if hospital in hospitals else old for hospital, old in enumerate(answers)]


def known(setting: Setting, view: View) -> Known:
    """Self masks of which the colluders' own shares and those released make t; pads whose seed one end released."""
    opened, closed = 0, [setting.all_honest & ~(1 << hospital) for hospital in setting.honest]
    for hospital, answer in enumerate(view):
        sharers = (peer for peer in setting.honest if peer != hospital and view[peer].released >> hospital & 1)
        if answer.uploaded and setting.colluders + sum(1 for _ in sharers) >= setting.shares:
            opened |= 1 << hospital
        if answer.released:
            for peer in setting.honest:
                if not answer.released >> peer & 1:
                    closed[hospital] &= ~(1 << peer)
                    closed[peer] &= ~(1 << hospital)
    return Known(opened, tuple(closed))


@cache
def isolated(held: Known) -> tuple[int, ...]:
    """Every subset of the honest hospitals whose sum of vectors can be read: no secret pad is left in the sum of its uploads."""
    subsets = range(1, 1 << len(held.closed))
    return tuple(
        subset
        for subset in subsets
        if not subset & ~held.opened
        and all(not pads & ~subset for hospital, pads in enumerate(held.closed) if subset >> hospital & 1)
    )
