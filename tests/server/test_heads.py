"""What the coordinator relays of hospitals' ledgers, however many of them keep whatever of each other."""

import hashlib
from types import SimpleNamespace

from medfed import wire
from medfed.identity import Identity
from medfed.seams import system_seams
from medfed.server.heads import LedgerHeads
from medfed.wire import RoundRequest, decode, encode
from medfed.witness import Head, Witness, item, read_heads, signed_bytes

HOSPITALS = 66


def head_of(identity, seq):
    digest = hashlib.sha256(seq.to_bytes(8, "big")).digest()
    return Head(seq, digest, identity.sign(signed_bytes(seq, digest)))


def test_hospitals_that_keep_each_another_head_of_every_peer_are_all_relayed(tmp_path):
    """After studies in ever other groups no two may know the same of a third, and a round relays all that was told."""
    identities = [Identity.from_seed(place.to_bytes(32, "big")) for place in range(HOSPITALS)]
    roster = SimpleNamespace(identities=tuple(each.public for each in identities), hospitals=())
    heads = LedgerHeads(Witness(system_seams().files, tmp_path / "witnesses.bin"), roster)
    heads.begin()
    for teller in range(HOSPITALS):
        newest = 2 * HOSPITALS
        told = [
            item(place, head_of(identity, newest if place == teller else teller + 1))
            for place, identity in enumerate(identities)
        ]
        heads.take_told(teller, told)
    shown = heads.for_round()
    assert len(shown) == HOSPITALS**2
    assert len(read_heads(shown, roster.identities)) == len(shown)
    request = RoundRequest(bytes(32), bytes(16), bytes(16), 1, 0, bytes(32), (), shown, b"", b"")
    frame = encode(request, identities[0])
    assert decode(frame, vector_limit_bytes=0) == request
    assert len(shown) <= wire.MOST_HEADS
