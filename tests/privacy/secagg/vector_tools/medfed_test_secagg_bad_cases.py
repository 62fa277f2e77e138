"""What must be refused: each case changes one thing in the course of a good round, and names its error."""

import struct

import medfed_test_secagg_reference as ref

SIGNATURE = 64


def flip(data, at):
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class Bad:
    """Gathers the cases of one base."""

    def __init__(self, base):
        self.base, self.cases, self.keys = base, [], ref.keys_of(base)
        self.offers = [bytes.fromhex(offer) for offer in base["offers"]]
        self.uploads = [bytes.fromhex(upload) for upload in base["uploads"]]
        self.releases = [bytes.fromhex(release) for release in base["releases"]]

    def add(self, name, to, error, **more):
        self.cases.append({"name": f"bad_{name}", "base": self.base["name"], "to": to, "error": error} | _as_json(more))

    def resigned(self, i, body):
        return body + ref.sign(self.base, i, body)

    def boxes_for(self, i):
        """(sender, box) of all survivors for hospital i."""
        senders = [j for j in self.base["survivors"] if j != i]
        return [(j, ref.box(self.base, j, i, self.keys)[1]) for j in senders]

    def votes(self, voters, ctx=None, survivors=None):
        return [(i, ref.vote(self.base, i, ctx or self.keys.ctx, survivors)) for i in voters]


def _as_json(value):
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def make_bad_strict(base):
    bad = Bad(base)
    _bad_offers(bad)
    bad.add("round_reused", "round", 181, at=0, attempt=base["attempt"])
    for name, number in (("nan", float("nan")), ("infinity", float("-inf"))):
        bad.add(name, "vector", 184, at=0, numbers=struct.pack("<d", number) + bytes(8 * (len(base["sum"]) - 1)))
    _bad_uploads(bad)
    first, keys = bad.uploads[0], bad.keys
    boxes, survivors = [(1, bytes(48)), (2, bytes(48))], base["members"]
    bad.add("strict_release", "boxes", 104, at=0, boxes=boxes)
    bad.add("strict_vote", "survivors", 104, at=0, survivors=survivors[:-1])
    two_faced = ref.upload(base, 0, keys, [number + 1 for number in base["vectors"][0]])
    bad.add("upload_two_faced", "upload", 183, uploads=[first, two_faced])
    return bad.cases


def _bad_offers(bad):
    offers, first = bad.offers, bad.offers[0]
    positions = {offer: position for position, offer in enumerate(offers)}  # unchanged ones need no bytes
    body = offers[1][:-SIGNATURE]
    position = len(ref.enc(ref.label(b"setup"), bytes(32), bytes(32))) + 5
    copy = body[:-32] + offers[2][-96:-64]
    spelled = copy[:-1] + bytes([copy[-1] ^ 0x80])  # the same point, top bit set

    def add(name, error, *items):
        bad.add(name, "offers", error, at=0, offers=[positions.get(item, item) for item in items])

    add("signature", 110, first, flip(offers[1], len(body)), offers[2])
    add("signer", 110, first, body + ref.sign(bad.base, 2, body), offers[2])
    add("roster", 111, first, bad.resigned(1, body[:position] + b"\x09" + body[position + 1 :]), offers[2])
    add("zero_key", 170, first, bad.resigned(1, body[:-32] + bytes(32)), offers[2])
    add("small_order_key", 170, first, bad.resigned(1, body[:-32] + struct.pack("<B31x", 1)), offers[2])
    add("duplicate_key", 170, first, bad.resigned(1, copy), offers[2])
    add("duplicate_key_other_spelling", 170, first, bad.resigned(1, spelled), offers[2])
    add("own_offer", 174, bad.resigned(0, flip(first[:-SIGNATURE], len(body) - 50)), *offers[1:])
    add("study", 112, first, bad.resigned(1, flip(body, 40)), offers[2])
    add("offer_twice", 143, first, offers[1], offers[1])
    add("offer_missing", 140, first, offers[1])
    add("offer_length", 103, first, offers[1][:-1], offers[2])
    add("offer_layout", 103, first, bad.resigned(1, flip(body, 3)), offers[2])


def _bad_uploads(bad):
    """Those of any mode."""
    base, first = bad.base, bad.uploads[0]

    def add(name, error, item):
        bad.add(name, "upload", error, uploads=[item])

    # an upload for another model, or with its pad tied to anything else, is signed over another ctx
    other = ref.keys_of(base)
    other.ctx = ref.sha(b"ctx of another model")
    add("model", 110, ref.upload(base, base["members"][0], other))
    add("upload_signature", 110, flip(first, -1))
    add("upload_words", 110, flip(first, 60))
    add("upload_of_other", 110, first[:42] + bytes([base["members"][1]]) + first[43:])
    add("upload_position", 111, first[:41] + b"\x01" + first[42:])
    add("length", 180, first[:-1])
    add("length_longer", 180, first + b"\0")
    add("empty", 180, b"")
    add("bits", 180, first[:43] + bytes([48 - first[43]]) + first[44:])
    add("words", 180, flip(first, 51))
    add("version", 102, b"\x02" + first[1:])
    add("session", 182, flip(first, 1))
    add("attempt", 182, flip(first, 40))


def make_bad_fast(base):
    """Uploads with boxes, and the release when nobody is lost."""
    bad, members = Bad(base), base["members"]
    first, tail = bad.uploads[0], 52 + len(base["sum"]) * base["ring_bits"] // 8
    head, body, committed, boxes = first[:52], first[52:tail], first[tail : tail + 32], first[tail + 32 : -SIGNATURE]
    swapped = boxes[50:100] + boxes[:50] + boxes[100:]
    strict = ref.signed_upload(base, members[0], bad.keys.ctx, head, body, b"", b"")
    bad.add("recovery_upload_signature", "upload", 110, uploads=[flip(first, -1)])
    bad.add("recovery_commitment", "upload", 110, uploads=[flip(first, tail)])
    bad.add("recovery_box_bytes", "upload", 110, uploads=[flip(first, tail + 32 + 2)])
    bad.add("recovery_receiver", "upload", 180, uploads=[flip(first, tail + 32 + 1)])
    swap = ref.signed_upload(base, members[0], bad.keys.ctx, head, body, committed, swapped)
    bad.add("recovery_receivers_order", "upload", 180, uploads=[swap])
    bad.add("recovery_strict_upload", "upload", 180, uploads=[strict])
    at = members[1]
    closed = bad.boxes_for(at)
    bad.add("boxes_missing", "boxes", 180, at=at, boxes=closed[1:])
    bad.add("boxes_order", "boxes", 180, at=at, boxes=closed[::-1])
    bad.add("boxes_own", "boxes", 180, at=at, boxes=sorted([*closed, (at, bytes(48))]))
    bad.add("fast_survivors_all", "survivors", 185, at=at, survivors=members)
    _bad_box(bad, at, closed)
    body = bad.releases[0][:-SIGNATURE]
    seed = body[:2] + b"\x02" + bad.keys.leaf(members[0], members[1]) + body[35:]
    bad.add(
        "release_seed_of_survivor",
        "release",
        187,
        releases=[(members[0], ref.release(base, members[0], bad.keys, seed))],
    )
    return bad.cases


def _bad_box(bad, at, closed):
    """A box that does not open is no error of the hospital that finds it: kind 0 says whose it was."""
    base, (sender, box) = bad.base, closed[0]
    other = ref.seal(bad.keys.box_key(at, sender), bytes(32), bad.keys.ctx + ref.be16(sender, at))
    body = bytes.fromhex(base["releases"][base["survivors"].index(at)])[:-SIGNATURE]
    answer = ref.release(base, at, bad.keys, body[:2] + bytes(33) + body[35:])
    for name, data in (("box", flip(box, 3)), ("box_tag", flip(box, -1)), ("box_of_other_direction", other)):
        bad.add(name, "boxes", None, at=at, boxes=[(sender, data), *closed[1:]], release=answer)


def _bad_releases(bad, lost):
    base, keys = bad.base, bad.keys
    at, first = base["survivors"][0], bad.releases[0]
    body = first[:-SIGNATURE]

    def add(name, error, payload, position=at):
        bad.add(name, "release", error, releases=[(position, payload)])

    other = ref.keys_of(base)
    other.ctx = ref.sha(b"ctx of another attempt")
    add("release_length", 180, first[:-1])
    add("release_empty", 180, b"")
    add("release_signature", 110, flip(first, -1))
    add("release_of_other", 180, first, base["survivors"][1])
    add("release_other_ctx", 110, ref.release(base, at, other, body))
    add("release_changed_share", 110, flip(first, 5))
    add("release_order", 180, ref.release(base, at, keys, body[35:70] + body[:35] + body[70:]))
    add("release_kind_3", 187, ref.release(base, at, keys, body[:2] + b"\x03" + body[3:]))
    add("release_of_drop_out", 111, first, lost)


def make_bad_slow(base):
    """Votes, certificates and releases after a loss; n = 5, c = 1, m = 4, one lost."""
    bad, survivors = Bad(base), base["survivors"]
    lost, at = (set(base["members"]) - set(survivors)).pop(), survivors[1]
    index = base["members"].index(lost)
    bad.add("late_upload", "late_upload", 182, uploads=[bad.uploads[index]])
    without_me = sorted({lost, *survivors} - {at})
    for name, shown in (
        ("duplicate", [survivors[0], survivors[0], *survivors[1:]]),
        ("unknown", [*survivors[:-1], len(base["identities"])]),
        ("unknown_more", [*survivors, len(base["identities"])]),
        ("self_missing", without_me),
        ("few", sorted({at, *survivors[:3]})),
        ("none", []),
        ("descending", survivors[::-1]),
        ("all", base["members"]),
    ):
        bad.add(f"survivors_{name}", "survivors", 185, at=at, survivors=shown)
    _bad_certificates(bad, at, lost)
    good = ref.vote(base, at, bad.keys.ctx)
    bad.add("vote_signature", "vote", 110, position=at, vote=flip(good, 0))
    bad.add("vote_of_other", "vote", 110, position=survivors[0], vote=good)
    bad.add("vote_other_set", "vote", 110, position=at, vote=ref.vote(base, at, bad.keys.ctx, without_me))
    bad.add("vote_of_drop_out", "vote", 111, position=lost, vote=ref.vote(base, lost, bad.keys.ctx))
    _bad_releases(bad, lost)
    _bad_recovery(bad, lost)
    return bad.cases


def _bad_certificates(bad, at, lost):
    base, survivors = bad.base, bad.base["survivors"]
    boxes = bad.boxes_for(at)
    votes = bad.votes(survivors)
    other = sorted({lost, *survivors} - {survivors[-1]})

    def add(name, shown, over=None, error=186, closed=boxes):
        over = survivors if over is None else over
        bad.add(f"certificate_{name}", "certificate", error, at=at, survivors=over, votes=shown, boxes=closed)

    add("short", votes[:-1])
    add("none", [])
    add("repeated_signer", [votes[0], votes[0], *votes[1:3]])
    add("repeated_signer_more", [votes[0], *votes])
    add("descending", votes[::-1])
    add("other_ctx", bad.votes(survivors, ref.sha(b"ctx of another attempt")))
    add("other_set", bad.votes(other, None, other), other)
    add("votes_on_other_set", bad.votes(survivors, None, other))
    add("vote_of_drop_out", sorted([*votes[:-1], (lost, ref.vote(base, lost, bad.keys.ctx))]))
    add("signature", [(votes[0][0], flip(votes[0][1], 40)), *votes[1:]])
    add("votes_swapped", [(votes[0][0], votes[1][1]), (votes[1][0], votes[0][1]), *votes[2:]])
    add("boxes_of_drop_out", votes, error=180, closed=sorted([*boxes, (lost, bytes(48))]))


def _bad_recovery(bad, lost):
    """Releases that verify and do not open the sum. t others hold shares of each self mask: none may be wrong."""
    base, keys, survivors = bad.base, bad.keys, bad.base["survivors"]
    at, first = survivors[0], bad.releases[0][:-SIGNATURE]
    entry = 35 * [i for i in base["members"] if i != at].index(lost)

    def of_lost(name, kind, secret):
        body = first[: entry + 2] + bytes([kind]) + secret + first[entry + 35 :]
        bad.add(name, "release", 187, releases=[(at, ref.release(base, at, keys, body))])

    of_lost("release_share_of_drop_out", 1, ref.box(base, lost, at, keys)[0])
    of_lost("release_nothing_of_drop_out", 0, bytes(32))
    where = 35 * [i for i in base["members"] if i != at].index(survivors[1])
    liar = ref.release(base, at, keys, flip(first, where + 3))
    rest = list(zip(survivors, bad.releases, strict=True))[1:]
    bad.add("share", "release", 187, releases=[(at, liar), *rest], lost=True)
