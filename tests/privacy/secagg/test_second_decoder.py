"""docs/secure_aggregation.md against the known answers, by a decoder written from that page: two readings, one protocol."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
VECTORS = HERE.parent.parent / "vectors"

_spec = importlib.util.spec_from_file_location("second_decoder", HERE / "second_decoder.py")
assert _spec is not None and _spec.loader is not None
second = sys.modules["second_decoder"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(second)

Case = dict[str, Any]
READ = {"secagg_pads", "secagg_shamir", "secagg_rounds", "bad_secagg_strict", "bad_secagg_recovery"}


def cases(name: str) -> dict[str, Case]:
    return {case["name"]: case for case in json.loads((VECTORS / f"{name}.json").read_text())["cases"]}


PADS, SHARES, ROUNDS = cases("secagg_pads"), cases("secagg_shamir"), cases("secagg_rounds")
BAD = cases("bad_secagg_strict") | cases("bad_secagg_recovery")
un = bytes.fromhex


def refused(code: int, act: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(second.Refused) as caught:
        act(*arguments)
    assert caught.value.code == code


class Course:
    """A round of the vectors, from the setup to the sum, and what is known of each step."""

    def __init__(self, base: Case) -> None:
        self.base = base
        self.members: list[int] = base["members"]
        self.survivors: list[int] = base["survivors"]
        self.study = second.Study(
            config_hash=un(base["config_hash"]),
            roster_hash=un(base["roster_hash"]),
            identities=[un(each) for each in base["identities"]],
            colluders=base["colluders"],
            fewest_survivors=base["fewest_survivors"],
            bits=base["ring_bits"],
            words=len(base["vectors"][0]),
            most_hospitals=len(base["identities"]),
        )
        self.task = second.sha(second.enc("task", un(base["model"]), un(base["settings"])))
        self.offers = dict(zip(self.members, map(un, base["offers"]), strict=True))
        self.uploads = dict(zip(self.members, map(un, base["uploads"]), strict=True))
        self.votes = dict(zip(self.survivors, map(un, base["votes"]), strict=False))
        self.releases = dict(zip(self.survivors, map(un, base["releases"]), strict=False))
        self.hospitals = {each: self._hospital(place) for place, each in enumerate(self.members)}

    def _hospital(self, place: int) -> Any:
        position, base = self.members[place], self.base
        private, nonce, seed = base["private"][place], base["nonces"][place], base["identity_seeds"][position]
        return second.Hospital(self.study, position, un(private), un(nonce), un(seed))

    def set_up(self) -> None:
        for hospital in self.hospitals.values():
            assert hospital.offer() == self.offers[hospital.position]
            hospital.take_offers(list(self.offers.values()))

    def open(self) -> None:
        for hospital in self.hospitals.values():
            hospital.open(self.base["attempt"], self.task)
        self.coordinator = second.Coordinator(self.hospitals[self.members[0]].cohort, self.base["attempt"], self.task)

    def secrets_of(self, position: int) -> tuple[bytes, bytes]:
        if self.base["mode"] == "strict":
            return b"", b""
        place = self.members.index(position)
        return un(self.base["self_masks"][place]), un(self.base["coefficients"][place])

    def upload(self) -> None:
        for place, (position, hospital) in enumerate(self.hospitals.items()):
            made = hospital.upload(self.base["vectors"][place], *self.secrets_of(position))
            assert made == self.uploads[position]

    def collect(self) -> None:
        for position in self.survivors:
            if position not in self.coordinator.uploads:
                self.coordinator.take_upload(self.uploads[position])

    def freeze(self) -> None:
        if self.base["mode"] != "strict":
            self.coordinator.freeze()
        assert self.coordinator.survivors == self.survivors

    def vote(self) -> None:
        for position, vote in self.votes.items():
            assert self.hospitals[position].vote(self.survivors) == vote

    def collect_votes(self) -> None:
        for position, vote in self.votes.items():
            self.coordinator.take_vote(position, vote)

    def release(self) -> None:
        certificate = sorted(self.votes.items())
        for position, release in self.releases.items():
            boxes = self.coordinator.boxes_for(position)
            more = (self.survivors, certificate) if certificate else ()
            assert self.hospitals[position].release(boxes, *more) == release

    def collect_releases(self) -> None:
        for position, release in self.releases.items():
            if self.coordinator.state != "done":
                self.coordinator.take_release(position, release)

    def finish(self) -> None:
        assert self.coordinator.state == "done"
        assert self.coordinator.sum == self.base["sum"]

    STEPS = (
        *(
            "set_up",
            "open",
            "upload",
            "collect",
            "freeze",
            "vote",
            "collect_votes",
            "release",
            "collect_releases",
            "finish",
        ),
    )

    def go(self, begin: str, end: str) -> None:
        """The steps from ``begin`` up to, and not with, ``end``."""
        for step in self.STEPS[self.STEPS.index(begin) : self.STEPS.index(end)]:
            getattr(self, step)()


# ---------------------------------------------------------------------------------------------------------------- what holds


def test_every_file_is_read() -> None:
    assert {path.stem for path in VECTORS.glob("*secagg*.json")} == READ
    assert all(name.startswith("ok_") for name in (*PADS, *SHARES, *ROUNDS))
    assert all(name.startswith("bad_") for name in BAD)
    assert {case["base"] for case in BAD.values()} <= ROUNDS.keys()


def test_pad_of_the_page() -> None:
    seed, ctx = bytes(range(32)), bytes(32)
    expected = "ecec432a428d81a6b37b9cd42bb0826226b64a93e0b4fdd37b4c86206d09fdb1890b1dab21905e00c8593537"
    assert second.stream(seed, ctx).hex() == expected
    assert second.pad(seed, ctx, 32, 0, 4).tolist() == [0x240E7341, 0xC26482C0, 0x6DA7940A, 0x6484900D]
    assert second.pad(seed, ctx, 16, 0, 4).tolist() == [0x7341, 0x240E, 0x82C0, 0xC264]


@pytest.mark.parametrize("name", PADS)
def test_pad(name: str) -> None:
    case = PADS[name]
    words = [int(each, 16) for each in case["words"]]
    found = second.pad(un(case["seed"]), un(case["ctx"]), case["ring_bits"], case["first"], len(words))
    assert found.tolist() == words


@pytest.mark.parametrize("name", SHARES)
def test_shares(name: str) -> None:
    case = SHARES[name]
    secret, coefficients, threshold = un(case["secret"]), un(case["coefficients"]), case["threshold"]
    shares = {each: second.share(secret, coefficients, each) for each in case["positions"]}
    assert [each.hex() for each in shares.values()] == case["shares"]
    for start in range(len(shares)):  # any t of them: all runs of t in a circle
        some = [case["positions"][(start + step) % len(shares)] for step in range(threshold)]
        assert second.combine({each: shares[each] for each in some}, threshold) == secret
    assert second.combine(shares, threshold) == secret


@pytest.mark.parametrize("name", ROUNDS)
def test_whole_round(name: str) -> None:
    Course(ROUNDS[name]).go("set_up", "finish")


@pytest.mark.parametrize("name", ROUNDS)
def test_round_is_what_it_says(name: str) -> None:
    course = Course(ROUNDS[name])
    course.go("set_up", "release")
    base, cohort = course.base, course.hospitals[course.members[0]].cohort
    assert (cohort.needed, cohort.threshold) == (base["needed"], base["threshold"])
    assert cohort.is_strict == (base["mode"] == "strict")
    assert (cohort.transcript.hex(), cohort.hash.hex()) == (base["transcript"], base["cohort_hash"])
    assert course.task.hex() == base["task_hash"]
    ctx = course.coordinator.ctx
    assert ctx.hex() == base["ctx"]
    for seed, public in zip(base["identity_seeds"], base["identities"], strict=True):
        key = second.Ed25519PrivateKey.from_private_bytes(un(seed)).public_key()
        assert key.public_bytes_raw().hex() == public
    assert [pair["pair"] for pair in base["pairs"]] == [[course.members[0], other] for other in course.members[1:]]
    for pair in base["pairs"]:
        (one, other), keys = pair["pair"], (pair["root"], pair["leaf"], pair["share_forth"], pair["share_back"])
        for mine, peer in ((one, other), (other, one)):
            at = course.hospitals[mine]
            found = (at.roots[peer], at.leaf(peer), at.box_key(one, other), at.box_key(other, one))
            assert tuple(each.hex() for each in found) == keys
        assert second.stream(un(pair["leaf"]), ctx).hex() == pair["stream"]


@pytest.mark.parametrize("name", [name for name in ROUNDS if ROUNDS[name]["mode"] != "strict"])
def test_self_masks_and_boxes(name: str) -> None:
    course = Course(ROUNDS[name])
    course.go("set_up", "upload")
    base, ctx = course.base, course.coordinator.ctx
    for place, position in enumerate(course.members):
        mask, _ = course.secrets_of(position)
        assert second.commitment(ctx, position, mask).hex() == base["commitments"][place]
        assert second.stream(mask, ctx).hex() == base["self_streams"][place]
    assert [box["to"] for box in base["boxes"]] == [each for each in course.members if each != course.members[1]]
    for box in base["boxes"]:
        sender, receiver, plain = box["from"], box["to"], un(box["share"])
        assert sender == course.members[1]
        assert second.share(*course.secrets_of(sender), receiver) == plain
        key = course.hospitals[receiver].box_key(sender, receiver)
        assert second.close_box(key, plain, ctx, sender, receiver).hex() == box["box"]
        assert second.open_box(key, un(box["box"]), ctx, sender, receiver) == plain


# --------------------------------------------------------------------------------------------------------- what is refused


def _pairs(items: Sequence[tuple[int, str]]) -> list[tuple[int, bytes]]:
    return [(position, un(data)) for position, data in items]


def _offers(course: Course, case: Case) -> None:
    shown = [course.offers[each] if isinstance(each, int) else un(each) for each in case["offers"]]
    refused(case["error"], course.hospitals[case["at"]].take_offers, shown)
    course.go("set_up", "finish")


def _round(course: Course, case: Case) -> None:
    course.go("set_up", "upload")
    hospital = course.hospitals[case["at"]]
    hospital.close()
    refused(case["error"], hospital.open, case["attempt"], course.task)
    hospital.open(course.base["attempt"] + 1, course.task)


def _vector(course: Course, case: Case) -> None:
    course.go("set_up", "upload")
    numbers = struct.unpack(f"<{course.study.words}d", un(case["numbers"]))
    refused(case["error"], course.hospitals[case["at"]].upload, numbers, *course.secrets_of(case["at"]))
    course.go("upload", "finish")


def _upload(course: Course, case: Case) -> None:
    begin, after = ("collect", "collect") if case["to"] == "upload" else ("vote", "vote")
    course.go("set_up", begin)
    *taken, last = map(un, case["uploads"])
    for upload in taken:
        course.coordinator.take_upload(upload)
    refused(case["error"], course.coordinator.take_upload, last)
    course.go(after, "finish")


def _survivors(course: Course, case: Case) -> None:
    course.go("set_up", "vote")
    refused(case["error"], course.hospitals[case["at"]].vote, case["survivors"])
    course.go("vote", "finish")


def _certificate(course: Course, case: Case) -> None:
    course.go("set_up", "release")
    request = _pairs(case["boxes"]), case["survivors"], _pairs(case["votes"])
    refused(case["error"], course.hospitals[case["at"]].release, *request)
    course.go("release", "finish")


def _boxes(course: Course, case: Case) -> None:
    course.go("set_up", "release")
    hospital, boxes = course.hospitals[case["at"]], _pairs(case["boxes"])
    if case["error"] is not None:
        refused(case["error"], hospital.release, boxes)
        course.go("release", "finish")
        return
    released = hospital.release(boxes)
    assert released.hex() == case["release"]
    course.coordinator.take_release(case["at"], released)


def _vote(course: Course, case: Case) -> None:
    course.go("set_up", "collect_votes")
    refused(case["error"], course.coordinator.take_vote, case["position"], un(case["vote"]))
    course.go("collect_votes", "finish")


def _release(course: Course, case: Case) -> None:
    course.go("set_up", "collect_releases")
    *taken, last = _pairs(case["releases"])
    for each in taken:
        course.coordinator.take_release(*each)
    refused(case["error"], course.coordinator.take_release, *last)
    if case.get("lost"):
        assert course.coordinator.state == "failed"
        assert course.coordinator.sum is None
    else:
        course.go("collect_releases", "finish")


SITUATIONS: dict[str, Callable[[Course, Case], None]] = {
    "offers": _offers,
    "round": _round,
    "vector": _vector,
    "upload": _upload,
    "late_upload": _upload,
    "survivors": _survivors,
    "certificate": _certificate,
    "boxes": _boxes,
    "vote": _vote,
    "release": _release,
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    SITUATIONS[BAD[name]["to"]](Course(ROUNDS[BAD[name]["base"]]), BAD[name])
