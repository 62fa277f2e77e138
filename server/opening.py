"""Opening a masked sum at the coordinator: who survived is frozen, voted on if somebody is missing, and released for.

What hospitals were asked to vote on is on disk before the first of them is asked: after a crash the same survivors are asked
again, and answer with identical bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from medfed.errors import EnvironmentFault, MedfedError, PrivacyError
from medfed.identity import Identity
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.transitions import AggregatorPhase
from medfed.server.mail import Frames, Mail
from medfed.server.store import Store
from medfed.wire import (
    Message,
    Refusal,
    Refused,
    Release,
    ReleaseRequest,
    Vote,
    VoteRequest,
    encode,
    numbered,
    pack_positions,
)

log = logging.getLogger("medfed.server")


class AttemptLost(Exception):
    """This attempt cannot complete; its event is spent."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What every request of one attempt names."""

    study_hash: bytes
    session: bytes
    nonce: bytes
    attempt: int


MakeMail = Callable[[Frames], Mail]


class Opening:
    """One attempt's way from uploads to a sum. ``name``: a hospital's, by position."""

    def __init__(
        self,
        aggregator: Aggregator,
        asked: Asked,
        identity: Identity,
        store: Store,
        make_mail: MakeMail,
        name: Callable[[int], str],
    ) -> None:
        self._aggregator = aggregator
        self._asked = asked
        self._identity = identity
        self._store = store
        self._make_mail = make_mail
        self._name = name
        self.without_keys: set[int] = set()
        """Hospitals that have restarted since they uploaded."""
        self.suspects: set[int] = set()
        """Who may be at fault if the attempt is lost."""

    def open(self) -> None:
        """Freeze, ask for votes and releases until the sum is open. Raises ``AttemptLost``."""
        named = self._store.load_survivors(self._asked.nonce)
        if named and set(named) != self._aggregator.uploaded:
            raise AttemptLost("not all those are there who were named as survivors before a crash")
        try:
            survivors = self._aggregator.freeze()
        except PrivacyError as error:
            raise AttemptLost(error.what) from error
        self._store.save_survivors(self._asked.nonce, survivors)
        cohort = self._aggregator.cohort
        absent = [self._name(each) for each in cohort.members if each not in survivors]
        if absent:
            log.warning("attempt %d goes on without %s", self._asked.attempt, ", ".join(absent))
        if self._aggregator.phase is AggregatorPhase.VOTING:
            self._gather(self._vote_request, AggregatorPhase.VOTING, self._take_vote)
        self._gather(self._release_request, AggregatorPhase.RELEASING, self._take_release)

    def _gather(
        self, request: Callable[[int], bytes], phase: AggregatorPhase, take: Callable[[int, Message], None]
    ) -> None:
        """Ask those who are silent until the phase is over, or cannot end well any more."""
        mail = self._make_mail(lambda positions: {position: request(position) for position in positions})
        refused = set[int]()
        while self._aggregator.phase is phase:
            waiting = self._aggregator.silent - refused
            if not waiting:
                raise AttemptLost(f"too few answer while {phase.value}")
            try:
                replies = mail.gather(waiting, f"deadline passed while {phase.value}")
            except EnvironmentFault as error:
                self.suspects |= {position for position in waiting if not mail.away(position)}
                raise AttemptLost(error.what) from error
            for position, message, _ in replies:
                if isinstance(message, Refusal) and message.nonce == self._asked.nonce:
                    log.warning(
                        "%s gives no answer while %s: reason %d", self._name(position), phase.value, message.reason
                    )
                    refused.add(position)
                    if message.reason == Refused.NO_SESSION:
                        self.without_keys.add(position)
                    else:
                        self.suspects.add(position)
                elif not self._is_taken(position, message, take):
                    refused.add(position)
                    self.suspects.add(position)

    def _is_taken(self, position: int, message: Message, take: Callable[[int, Message], None]) -> bool:
        """A wrong answer is an alarm, and its sender done without where others are enough; one to another request is nothing."""
        if not isinstance(message, Vote | Release) or message.nonce != self._asked.nonce:
            return True
        try:
            take(position, message)
        except MedfedError as error:
            log.error("ALARM: answer of %s refused: %s", self._name(position), error)
            if self._aggregator.phase is AggregatorPhase.FAILED:
                raise AttemptLost(error.what) from error
            return False
        return True

    def _take_vote(self, position: int, message: Message) -> None:
        if isinstance(message, Vote):
            self._aggregator.add_vote(position, message.vote)

    def _take_release(self, position: int, message: Message) -> None:
        if isinstance(message, Release):
            self._aggregator.add_release(position, message.released)

    def _vote_request(self, _: int) -> bytes:
        asked = self._asked
        survivors = pack_positions(self._aggregator.survivors)
        return encode(
            VoteRequest(asked.study_hash, asked.session, asked.nonce, asked.attempt, survivors), self._identity
        )

    def _release_request(self, position: int) -> bytes:
        asked, aggregator = self._asked, self._aggregator
        request = ReleaseRequest(
            asked.study_hash,
            asked.session,
            asked.nonce,
            asked.attempt,
            pack_positions(aggregator.survivors),
            numbered(aggregator.certificate()),
            numbered(aggregator.boxes_for(position)),
        )
        return encode(request, self._identity)
