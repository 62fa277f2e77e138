"""Sessions at the coordinator: every hospital's fresh key offer, and who is in without whom it can begin.

A session is one setup of the secure aggregation, good for many rounds. In a study that can do without some hospitals one begins
with those who are there, and another once somebody is back.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from medfed.errors import EnvironmentFault, PrivacyError, RemoteProtocolError
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.messages import parse_offer, split_offer
from medfed.privacy.secagg.protocol import Cohort
from medfed.seams import Seams
from medfed.server.assignment import Assignment
from medfed.server.exchange import Exchange, Kind
from medfed.server.heads import LedgerHeads
from medfed.server.mail import RETRY_S, Frames, Mail, same
from medfed.server.replies import AWAITED, Names, reason_of, stop
from medfed.server.standing import Standing
from medfed.wire import Message, OfferReply, Refusal, Refused, SetupRequest, encode

log = logging.getLogger("medfed.server")

MOST_RESTARTS = 3  # in setups, of one hospital, before it is suspected

MakeMail = Callable[[Frames, Kind, float], Mail]


class SessionLost(Exception):
    """A hospital restarted during setup: the keys of its first offer are gone. Costs nothing."""

    def __init__(self, position: int, name: str) -> None:
        super().__init__(f"{name} restarted")
        self.position = position


@dataclass(slots=True)
class _Setup:
    """What hospitals said in one setup: why not, that their last attempt was so and so; and whose offers were ``wrong``.

    ``has_begun``: whether an attempt was made before.
    """

    has_begun: bool
    refused: dict[int, Refused] = field(default_factory=dict)
    claims: dict[int, int] = field(default_factory=dict)
    wrong: set[int] = field(default_factory=set)


class Sessions:
    """Begins the sessions of one run. ``session``: the open one's name; ``without_keys``: who has lost its keys since."""

    def __init__(
        self,
        assignment: Assignment,
        exchange: Exchange,
        seams: Seams,
        heads: LedgerHeads,
        standing: Standing,
        make_mail: MakeMail,
        observe: Callable[[str], None],
    ) -> None:
        self._it = assignment
        self._study_hash = assignment.study.hash()
        self._fewest = assignment.study.cohort.fewest_survivors
        self._exchange = exchange
        self._clock = seams.clock
        self._entropy = seams.entropy
        self._heads = heads
        self._standing = standing
        self._names = Names(assignment.roster)
        self._make_mail = make_mail
        self._observe = observe
        self._restarts: Counter[int] = Counter()
        self._absent = ""  # from the last setup, as it was said
        self.session = b""
        self.without_keys: set[int] = set()

    def begin(self, last_attempt: int) -> tuple[Aggregator, int]:
        """Fresh key offers of all hospitals, or of enough; waits for those that are away or have not approved yet.

        Returns the session, and the last attempt that was used: ``last_attempt``, or a later one that hospitals know of. Raises
        MF-191 if too few came by the deadline, MF-192 if one that is needed stops the study.
        """
        end = self._clock.monotonic() + self._setup_s(last_attempt)
        while True:
            try:
                return self._gather_offers(last_attempt, max(0.0, end - self._clock.monotonic()))
            except SessionLost as lost:
                log.warning("setup begins anew: %s", lost)
                self._restarts[lost.position] += 1
                if self._restarts[lost.position] % MOST_RESTARTS == 0:
                    self._standing.suspect({lost.position}, "restarts in every setup", last_attempt)
                self._clock.sleep(RETRY_S)

    def _gather_offers(self, last_attempt: int, timeout_s: float) -> tuple[Aggregator, int]:
        """One session's setup. Raises ``SessionLost`` if a hospital restarted in it, MF-191 if too few came by the deadline."""
        self.session = self._entropy.draw("session", 16)
        self.without_keys.clear()
        aggregator = Aggregator(self._it.secagg_config())
        request = encode(SetupRequest(self._study_hash, self.session, self._heads.begin()), self._it.identity)
        mail = self._make_mail(same(lambda: request), Kind.QUERY, timeout_s)
        everybody = frozenset(range(len(self._it.roster.hospitals)))
        left_out = self._left_out(last_attempt)
        setup = _Setup(has_begun=last_attempt > 0)
        while not aggregator.is_settled:
            waiting = everybody - aggregator.offered - left_out
            self._observe(f"waiting for {self._names.several(waiting, setup.refused)}")
            is_enough = len(aggregator.offered) >= self._fewest
            if is_enough and all(self._is_not_waited_for(position, setup, mail) for position in waiting):
                aggregator.settle()  # who is away, or does not take part yet, may come back for a later round
                break
            try:
                replies = mail.gather(waiting, f"{self._names.several(waiting)} did not join")
            except EnvironmentFault:
                if not is_enough:
                    raise
                aggregator.settle()
                self._standing.pass_over(waiting - {each for each in waiting if mail.away(each)}, last_attempt)
                break
            for position, message, _ in replies:
                self._take_setup_reply(aggregator, mail, setup, position, message)
        self._heads.save()
        absent = self._names.several(everybody - frozenset(aggregator.cohort.members), setup.refused)
        if absent and absent != self._absent:
            log.warning("setup without %s", absent)
        self._absent = absent
        claims = {member: setup.claims[member] for member in aggregator.cohort.members}
        return aggregator, self._believed(last_attempt, claims)

    def _is_not_waited_for(self, position: int, setup: _Setup, mail: Mail) -> bool:
        """Once enough have offered: not for wrong offers; once the study has begun not for those who are away or cannot come."""
        if position in setup.wrong:
            return True
        return setup.has_begun and (mail.away(position) or setup.refused.get(position) in AWAITED)

    def _take_setup_reply(
        self, aggregator: Aggregator, mail: Mail, setup: _Setup, position: int, message: Message
    ) -> None:
        if isinstance(message, OfferReply) and message.session == self.session:
            if self._is_offered(aggregator, mail, position, message):
                setup.claims[position] = message.highest_attempt
            else:
                setup.wrong.add(position)
        elif isinstance(message, Refusal):
            is_behind = message.nonce == self.session and message.reason == Refused.LEDGER_BEHIND
            if is_behind and not self._standing.is_robust:
                raise stop(self._names.one(position), Refused.LEDGER_BEHIND)
            if is_behind:
                setup.wrong.add(position)
            setup.refused[position] = reason_of(message)  # told with whom is waited for, once
            mail.again(position, RETRY_S)

    def _setup_s(self, last_attempt: int) -> float:
        """Once an attempt was made nobody is waited for long who is away, as long as enough are there."""
        deadlines = self._it.study.deadlines
        return deadlines.round_s if last_attempt > 0 and self._standing.is_robust else deadlines.setup_s

    def is_wider_possible(self, cohort: Cohort, last_attempt: int) -> bool:
        """Whether a hospital is there that the open session cannot sum: it was away, or has lost its keys.

        Where as many are there as may be summed, the others of a longer roster wait.
        """
        if not self._standing.is_robust:
            return False
        everybody, online = frozenset(range(len(self._it.roster.hospitals))), self._exchange.online()
        members = frozenset(cohort.members)
        is_full = len(members & online) == self._it.study.cohort.most_hospitals
        without = self.without_keys if is_full else (everybody - members) | self.without_keys
        return bool((without & online) - self._left_out(last_attempt))

    def _left_out(self, last_attempt: int) -> frozenset[int]:
        return self._standing.left_out(last_attempt, len(self._exchange.online()))

    def _is_offered(self, aggregator: Aggregator, mail: Mail, position: int, reply: OfferReply) -> bool:
        """Take an offer. One that does not verify or is not the sender's own is an alarm, and asked for again."""
        if aggregator.is_settled:
            return True  # as many are in as may be summed
        try:
            self._checked_claim(position, reply.highest_attempt)
            body, _ = split_offer(reply.offer)
            if parse_offer(body, self._it.secagg_config()).position != position:
                raise RemoteProtocolError(111, "an offer in another hospital's name", "refused")
            self._heads.take_told(position, reply.heads)
            aggregator.add_offer(reply.offer)
        except RemoteProtocolError as error:
            if error.code == 183:
                raise SessionLost(position, self._names.one(position)) from error
            log.error("ALARM: offer of %s refused: %s", self._names.one(position), error)
            mail.again(position, RETRY_S)
            return False
        except PrivacyError as error:
            if not self._standing.is_robust:
                raise
            log.error("ALARM: offer of %s refused: %s", self._names.one(position), error)
            return False
        return True

    def _checked_claim(self, position: int, claimed: int) -> int:
        """The attempt a hospital says it used last. Raises MF-192 for one that the study does not have."""
        if claimed > self._it.study.attempts:
            raise PrivacyError(
                192, f"{self._names.one(position)} claims to have used attempt {claimed}", "ask it what runs there"
            )
        return claimed

    def _believed(self, last_attempt: int, claims: Mapping[int, int]) -> int:
        """The last attempt that hospitals have used: each one's word where each is needed, else what more than c say,
        so that no c of them can use up the list by a word."""
        said = sorted(claims.values(), reverse=True)
        highest = said[self._it.study.cohort.colluders if self._standing.is_robust else 0]
        if highest > last_attempt:
            saying = self._names.several(frozenset(each for each, claimed in claims.items() if claimed >= highest))
            log.warning("attempt %d was used already, says %s", highest, saying)
        return max(last_attempt, highest)
