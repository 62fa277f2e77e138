"""What must be refused, with which code, and that nothing has changed then. The format: docs/secure_aggregation.md."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medfed.errors import MedfedError
from medfed.privacy.quantize import quantize
from medfed.privacy.secagg.aggregator import Aggregator

sys.path.insert(0, str(Path(__file__).parent / "vector_tools"))
from medfed_test_secagg_fed import (
    ROUNDS,
    frozen_aggregator,
    hexes,
    load,
    new_party,
    open_aggregator,
    open_party,
    pairs_of,
    releasing_aggregator,
    sum_of,
    uploaded_party,
    vector_of,
    voted_party,
)

BAD = [*load("bad_secagg_strict.json"), *load("bad_secagg_recovery.json")]


def offers_to(case, base):
    party = new_party(base, case["at"])
    party.offer()
    return party, lambda: party.accept(
        [bytes.fromhex(base["offers"][item] if isinstance(item, int) else item) for item in case["offers"]]
    )


def round_to(case, base):
    party = open_party(base, case["at"])
    party.close_round()
    return party, lambda: party.open_round(case["attempt"], bytes.fromhex(base["task_hash"]))


def vector_to(case, base):
    party, numbers = open_party(base, case["at"]), np.frombuffer(bytes.fromhex(case["numbers"]), "<f8")
    return party, lambda: party.mask(quantize(numbers, 0, 1000))


def upload_to(case, base, start=open_aggregator):
    aggregator, uploads = start(base), hexes(case["uploads"])
    for upload in uploads[:-1]:
        aggregator.add_upload(upload)
    return aggregator, lambda: aggregator.add_upload(uploads[-1])


def late_upload_to(case, base):
    return upload_to(case, base, frozen_aggregator)


def survivors_to(case, base):
    party = uploaded_party(base, case["at"])
    return party, lambda: party.vote(case["survivors"])


def certificate_to(case, base):
    party = voted_party(base, case["at"])
    return party, lambda: party.release(case["survivors"], pairs_of(case["votes"]), pairs_of(case["boxes"]))


def boxes_to(case, base):
    party = uploaded_party(base, case["at"])
    return party, lambda: party.release(base["members"], (), pairs_of(case["boxes"]))


def vote_to(case, base):
    aggregator = frozen_aggregator(base)
    return aggregator, lambda: aggregator.add_vote(case["position"], bytes.fromhex(case["vote"]))


def release_to(case, base):
    aggregator, releases = releasing_aggregator(base), pairs_of(case["releases"])
    for position, release in releases[:-1]:
        aggregator.add_release(position, release)
    return aggregator, lambda: aggregator.add_release(*releases[-1])


SITUATIONS: dict[str, Callable] = {
    "offers": offers_to,
    "round": round_to,
    "vector": vector_to,
    "upload": upload_to,
    "late_upload": late_upload_to,
    "survivors": survivors_to,
    "certificate": certificate_to,
    "boxes": boxes_to,
    "vote": vote_to,
    "release": release_to,
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["name"])
def test_bad_vector_is_refused_with_its_code_and_the_good_course_goes_on(case):
    base = ROUNDS[case["base"]]
    subject, call = SITUATIONS[case["to"]](case, base)
    phase = subject.phase
    if case["error"] is None:
        assert call().hex() == case["release"]
        return
    with pytest.raises(MedfedError) as refusal:
        call()
    assert refusal.value.code == case["error"]
    if case.get("lost"):
        with pytest.raises(MedfedError):
            subject.total()
        return
    assert subject.phase is phase
    go_on(subject, case, base)


def go_on(subject, case, base):
    """After the refusal the honest course still works: nothing has changed."""
    if isinstance(subject, Aggregator):
        finish_round(subject, base)
        assert sum_of(subject, base) == base["sum"]
    elif case["to"] == "offers":
        subject.accept(hexes(base["offers"]))
        assert subject.transcript.hex() == base["transcript"]
    elif case["to"] == "round":
        subject.open_round(base["attempt"] + 1, bytes.fromhex(base["task_hash"]))
    elif case["to"] == "vector":
        upload = subject.mask(vector_of(base, case["at"])).payload
        assert upload.hex() == base["uploads"][base["members"].index(case["at"])]
    elif base["mode"] != "strict":
        assert release_of(subject, case["at"], base).hex() == base["releases"][base["survivors"].index(case["at"])]


def finish_round(aggregator, base):
    """The base's messages from wherever the round stands."""
    if aggregator.phase is aggregator.phase.OPEN:
        for position in sorted(aggregator.missing & set(base["survivors"])):
            aggregator.add_upload(bytes.fromhex(base["uploads"][base["members"].index(position)]))
        if base["mode"] != "strict":
            aggregator.freeze()
    for position, vote in zip(base["survivors"], hexes(base["votes"]), strict=base["mode"] == "slow"):
        aggregator.add_vote(position, vote)
    for position, release in zip(base["survivors"], hexes(base["releases"]), strict=base["mode"] != "strict"):
        aggregator.add_release(position, release)


def release_of(party, position, base):
    certificate = list(zip(base["survivors"], hexes(base["votes"]), strict=True)) if base["votes"] else []
    if certificate:
        party.vote(base["survivors"])
    return party.release(base["survivors"], certificate, releasing_aggregator(base).boxes_for(position))


def test_bad_vectors_name_every_error_of_a_hospital_and_a_coordinator():
    """The design's list (section 14), and that each situation is shown."""
    assert {case["error"] for case in BAD} == {102, 103, 104, 110, 111, 112, 140, 143, 170, 174, *range(180, 188), None}
    assert {case["to"] for case in BAD} == set(SITUATIONS)
    assert len({case["name"] for case in BAD}) == len(BAD)
