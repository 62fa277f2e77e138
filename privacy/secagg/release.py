"""What a hospital lets go of so that a sum can be opened, and on whose word: the rules that keep it from being opened twice.

A share of a peer's self mask, or the seed shared with a peer that dropped out, never both (rule 12): with both, the
coordinator would read that peer's vector. All hospitals of one round must mean the same survivors (rules 11, 13, 14): with two
sets, shares released for one and seeds released for the other would do the same.

Source: medfed's secure aggregation design, sections 6, 7, 9 and 10; Bonawitz et al. 2017, figure 4 (consistency check).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medfed.errors import MedfedError, RemoteProtocolError
from medfed.identity import verify
from medfed.privacy.secagg.boxes import open_box
from medfed.privacy.secagg.keys import leaf_seed
from medfed.privacy.secagg.messages import ReleaseEntry, Secret, encode_release, vote_input
from medfed.privacy.secagg.protocol import SHARE_BYTES, Cohort
from medfed.privacy.secagg.transitions import Boxes, Certificate

_REFUSED = "refused; nothing was revealed"


def check_survivors(cohort: Cohort, position: int, members: Sequence[int]) -> None:
    """Rule 11, and rule 13's part for the whole cohort. Raises ``RemoteProtocolError`` (MF-185), MF-104 in strict mode.

    ``members`` must be U2: strictly ascending, inside U1 and not all of it, ``position`` among them, m or more.
    """
    if cohort.is_strict:
        raise RemoteProtocolError(104, "something is to be unmasked in strict mode", _REFUSED)
    found = set(members)
    if list(members) != sorted(found) or not found < set(cohort.members):
        raise RemoteProtocolError(185, "survivors are not an ascending part of the cohort", _REFUSED)
    if position not in found:
        raise RemoteProtocolError(185, "this hospital is not among the survivors", _REFUSED)
    if len(members) < cohort.thresholds.survivors:
        raise RemoteProtocolError(185, f"{len(members)} survivors, need {cohort.thresholds.survivors}", _REFUSED)


def check_certificate(cohort: Cohort, context: bytes, survivors: Sequence[int], certificate: Certificate) -> None:
    """Rule 14: at least m votes of distinct survivors on the very set this hospital voted on. Raises MF-186."""
    if tuple(certificate.members) != tuple(survivors):
        raise RemoteProtocolError(186, "a certificate over other survivors than those voted on", _REFUSED)
    voters = [voter for voter, _ in certificate.votes]
    if voters != sorted(set(voters)) or not set(voters) <= set(survivors):
        raise RemoteProtocolError(186, "votes of others than the survivors, or one twice", _REFUSED)
    if len(voters) < cohort.thresholds.survivors:
        raise RemoteProtocolError(186, f"{len(voters)} votes, need {cohort.thresholds.survivors}", _REFUSED)
    for voter, signature in certificate.votes:
        try:
            verify(cohort.config.identities[voter], signature, vote_input(context, voter, survivors))
        except MedfedError as error:
            raise RemoteProtocolError(186, f"the vote of hospital {voter} does not verify", _REFUSED) from error


def body(
    cohort: Cohort,
    position: int,
    context: bytes,
    roots: Mapping[int, bytes],
    survivors: Sequence[int],
    boxes: Boxes,
) -> bytes:
    """The release: of each peer that survived its share, of each that did not its leaf seed. Rules 10 and 12 by construction:
    nothing is asked for, this hospital chooses one kind a peer itself, and holds no share of its own.

    Raises ``RemoteProtocolError`` (MF-180) unless ``boxes`` are those of all survivors but this hospital.
    """
    expected = [survivor for survivor in survivors if survivor != position]
    if [sender for sender, _ in boxes] != expected:
        raise RemoteProtocolError(180, "boxes of other hospitals than the survivors", _REFUSED)
    by_sender = dict(boxes)
    entries: list[ReleaseEntry] = []
    for peer in cohort.peers(position):
        if peer not in by_sender:
            entries.append((peer, Secret.SEED, leaf_seed(roots[peer], context)))
            continue
        share = open_box(roots[peer], context, peer, position, by_sender[peer])
        kind = Secret.NOTHING if share is None else Secret.SHARE
        entries.append((peer, kind, share or bytes(SHARE_BYTES)))
    return encode_release(entries)
