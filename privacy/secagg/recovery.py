"""What the coordinator puts together from releases: the pads that are left in its sum.

Each survivor's upload still holds the pad of its self mask, and one pad for every drop-out, whose other half never came.

Source: medfed's secure aggregation design, sections 5 to 7 and 12; Shamir 1979.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from medfed.errors import RemoteProtocolError
from medfed.privacy.secagg import shamir
from medfed.privacy.secagg.keys import stream_key
from medfed.privacy.secagg.messages import ReleaseEntry, Secret, commitment_of
from medfed.privacy.secagg.protocol import Cohort

Releases = Mapping[int, Sequence[ReleaseEntry]]
"""Entries by the position that released them."""


@dataclass(frozen=True, slots=True)
class Pads:
    """Streams to add (sign +1) to the sum or to subtract (-1) from it."""

    streams: tuple[bytes, ...]
    signs: tuple[int, ...]


def is_enough(cohort: Cohort, survivors: Sequence[int], releases: Releases) -> bool:
    """Whether the sum can be opened: t shares of every survivor's self mask, and all survivors' seeds of the drop-outs."""
    if len(releases) < cohort.thresholds.shares:
        return False
    if len(survivors) < cohort.hospitals and set(releases) != set(survivors):
        return False
    held = _shares(releases)
    return all(len(held.get(survivor, ())) >= cohort.thresholds.shares for survivor in survivors)


def pads_left(
    cohort: Cohort, context: bytes, survivors: Sequence[int], commitments: Mapping[int, bytes], releases: Releases
) -> Pads:
    """The pads in the sum of the survivors' words. ``commitments``: of the survivors, as they uploaded them.

    Raises ``RemoteProtocolError`` (MF-187), naming a hospital, where no t shares give what a survivor committed to.
    """
    streams, signs = [], []
    held = _shares(releases)
    for survivor in survivors:
        mask = _self_mask(cohort, context, survivor, commitments[survivor], held[survivor])
        streams.append(stream_key(mask, context))
        signs.append(-1)
    for survivor, peer, seed in _seeds(releases):
        streams.append(stream_key(seed, context))
        signs.append(-1 if survivor < peer else 1)
    return Pads(tuple(streams), tuple(signs))


def suspects(cohort: Cohort, survivors: Sequence[int], releases: Releases) -> frozenset[int]:
    """Who may be at fault that boxes did not open: their sender where more than c say so, else also those who say so."""
    found: set[int] = set()
    for owner in survivors:
        saying = {
            holder
            for holder, entries in releases.items()
            if any(peer == owner and kind is Secret.NOTHING for peer, kind, _ in entries)
        }
        if saying:
            found |= {owner} if len(saying) > cohort.config.colluders else {owner} | saying
    return frozenset(found)


def misfits(
    cohort: Cohort, context: bytes, survivors: Sequence[int], commitments: Mapping[int, bytes], releases: Releases
) -> frozenset[int]:
    """Survivors whose shares do not give what they committed to: their own fault, or that of several who hold the shares."""
    held = _shares(releases)
    found = set()
    for survivor in survivors:
        try:
            _self_mask(cohort, context, survivor, commitments[survivor], held.get(survivor, ()))
        except RemoteProtocolError:
            found.add(survivor)
    return frozenset(found)


def _shares(releases: Releases) -> dict[int, list[tuple[int, bytes]]]:
    """By owner of the self mask: (holder, share), ascending holders."""
    held: dict[int, list[tuple[int, bytes]]] = {}
    for holder in sorted(releases):
        for owner, kind, secret in releases[holder]:
            if kind is Secret.SHARE:
                held.setdefault(owner, []).append((holder, secret))
    return held


def _seeds(releases: Releases) -> Iterator[tuple[int, int, bytes]]:
    for survivor, entries in releases.items():
        for peer, kind, secret in entries:
            if kind is Secret.SEED:
                yield survivor, peer, secret


def _self_mask(
    cohort: Cohort, context: bytes, owner: int, commitment: bytes, held: Sequence[tuple[int, bytes]]
) -> bytes:
    """b of ``owner``. One hospital that lies about its share cannot spoil it where t others answered."""
    threshold = cohort.thresholds.shares
    # shares beyond the first t are not looked at, so that leaving out one of those would change nothing
    without_one = (tuple(item for item in held if item is not liar) for liar in held[:threshold])
    for shares in itertools.chain((tuple(held),), without_one):
        if len(shares) < threshold:
            continue
        found = shamir.combine(shares, threshold)
        if commitment_of(context, owner, found) == commitment:
            return found
    raise RemoteProtocolError(
        187, f"the shares of hospital {owner}'s self mask do not fit what it committed to", "the round is lost"
    )
