"""Production code, fed with the secrets and messages of a case of ``secagg_rounds.json``, up to any point of its course."""

import json
from pathlib import Path

import numpy as np

from medfed.identity import Identity
from medfed.privacy.secagg import protocol
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.party import Party

VECTORS = Path(__file__).parents[3] / "vectors"


def load(name):
    return json.loads((VECTORS / name).read_text())["cases"]


ROUNDS = {case["name"]: case for case in load("secagg_rounds.json")}


class GivenEntropy:
    """Hands out the secrets that a case has for one hospital."""

    def __init__(self, case, rank):
        self.offer = bytes.fromhex(case["private"][rank] + case["nonces"][rank])
        self.mask = (
            b"" if case["mode"] == "strict" else bytes.fromhex(case["self_masks"][rank] + case["coefficients"][rank])
        )

    def draw(self, purpose, size_bytes):
        data = {"secagg/offer": self.offer, "secagg/self mask": self.mask}[purpose]
        assert size_bytes == len(data)
        return data


def hexes(items):
    return [bytes.fromhex(item) for item in items]


def pairs_of(items):
    """(position, bytes) of a list of [position, hexadecimal]."""
    return tuple((position, bytes.fromhex(item)) for position, item in items)


def shared_config(case):
    return protocol.AggregatorConfig(
        bytes.fromhex(case["config_hash"]),
        bytes.fromhex(case["roster_hash"]),
        tuple(hexes(case["identities"])),
        case["colluders"],
        len(case["vectors"][0]),
        case["ring_bits"],
        case["fewest_survivors"],
    )


def new_party(case, position):
    config = protocol.SecaggConfig(shared_config(case), position)
    sign = Identity.from_seed(bytes.fromhex(case["identity_seeds"][position])).sign
    return Party(config, sign, GivenEntropy(case, case["members"].index(position)))


def ready_party(case, position):
    party = new_party(case, position)
    party.offer()
    party.accept(hexes(case["offers"]))
    return party


def open_party(case, position):
    party = ready_party(case, position)
    party.open_round(case["attempt"], bytes.fromhex(case["task_hash"]))
    return party


def vector_of(case, position):
    return np.array(case["vectors"][case["members"].index(position)], dtype=np.int64)


def uploaded_party(case, position):
    party = open_party(case, position)
    party.mask(vector_of(case, position))
    return party


def voted_party(case, position):
    party = uploaded_party(case, position)
    party.vote(case["survivors"])
    return party


def open_aggregator(case):
    aggregator = Aggregator.from_offers(shared_config(case), hexes(case["offers"]))
    aggregator.open_round(case["attempt"], bytes.fromhex(case["task_hash"]))
    return aggregator


def frozen_aggregator(case):
    aggregator = open_aggregator(case)
    for position in case["survivors"]:
        aggregator.add_upload(bytes.fromhex(case["uploads"][case["members"].index(position)]))
    aggregator.freeze()
    return aggregator


def releasing_aggregator(case):
    aggregator = frozen_aggregator(case)
    for position, vote in zip(case["survivors"], hexes(case["votes"]), strict=case["mode"] == "slow"):
        aggregator.add_vote(position, vote)
    return aggregator


def sum_of(aggregator, case):
    return aggregator.total().view(f"<i{case['ring_bits'] // 8}").tolist()
