"""What secure aggregation costs: its parts, whole rounds of clients and coordinator, and the same work by other means.

``python -m medfed.simulations.benchmarks secagg --repeats 3 --json``; ``make bench-peers`` installs what is compared with.

Seconds are the processor's, of all threads of this one process: what one core takes, whatever else the machine does. Rounds
go through the ``Party`` of every hospital and the ``Aggregator``, with recovery from drop-outs on and nobody dropped, and each
sum is checked. A client's work is its vector from float64 to the signed upload (quantise, n pads, shares, boxes, hash,
signature) and its release. The coordinator's is to check and add all uploads, relay boxes, take releases, take off the self
masks. ``*_fixed_ms``: the same with a vector of a thousand parameters; ``setup_*``, once a run, is in neither. Rounds are the
median over repeats (and hospitals). ``threads_gain`` needs a machine that does nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.identity import Identity
from medfed.privacy.quantize import grid_exponent, limit, quantize
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.party import MaskedUpload, Party
from medfed.privacy.secagg.protocol import AggregatorConfig, SecaggConfig
from medfed.seams import Entropy
from medfed.simulations.benchmarks import secagg_peers
from medfed.simulations.benchmarks.secagg_parts import Parts
from medfed.simulations.benchmarks.secagg_peers import Peer
from medfed.study import least_survivors

RANGE, SPREAD = 1.0, 0.02
FEW_PARAMETERS = 1000
TASK = hashlib.sha256(b"task").digest()


@dataclass(frozen=True, slots=True)
class Size:
    """n, c and d of a round."""

    hospitals: int
    colluders: int
    parameters: int

    @property
    def threshold(self) -> int:
        """t, where as many may drop out as can."""
        return least_survivors(self.hospitals, self.colluders) - 1


SIZES = (Size(5, 1, 1_000_000), Size(10, 2, 1_000_000), Size(10, 2, 10_000_000), Size(100, 33, 1_000_000))
DETAILED = Size(10, 2, 10_000_000)
"""Of the parts and of the comparison."""


def _vector(parameters: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(0.0, SPREAD, parameters)


class Meter:
    """Adds up processor seconds of this process, of all its threads."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Meter:
        self.seconds -= time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time()


def processor_s(work: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    with Meter() as meter:
        work()
    return meter.seconds


# ----------------------------------------------------------------------------------------------------------- rounds


class Session:
    """n hospitals, all with the same vector, and the coordinator, after their setup."""

    def __init__(self, size: Size, ring_bits: int, entropy: Entropy) -> None:
        n = size.hospitals
        identities = [Identity.from_seed(entropy.draw("identity", 32)) for _ in range(n)]
        shared = AggregatorConfig(
            config_hash=bytes(32),
            roster_hash=bytes(32),
            identities=tuple(identity.public for identity in identities),
            colluders=size.colluders,
            words=size.parameters,
            ring_bits=ring_bits,
            fewest_survivors=size.threshold + 1,
        )
        self.size, self.ring_bits, self.attempt = size, ring_bits, 0
        self.exponent, self.limit = grid_exponent(ring_bits, n, RANGE), limit(ring_bits, n)
        self.vector = _vector(size.parameters)
        self.integers = np.zeros(size.parameters, np.int64)
        self.parties = [
            Party(SecaggConfig(shared, position), identity.sign, entropy)
            for position, identity in enumerate(identities)
        ]
        self.aggregator = Aggregator(shared)
        offers = [party.offer() for party in self.parties]
        self.setup_server_s = processor_s(lambda: [self.aggregator.add_offer(offer) for offer in offers])
        setups = [processor_s(lambda party=party: party.accept(offers)) for party in self.parties]  # type: ignore[misc]
        self.setup_client_s = statistics.median(setups)

    def upload(self, party: Party) -> MaskedUpload:
        """A client's work before its release; the pieces go into a frame without another copy, as at a hospital."""
        party.open_round(self.attempt, TASK)
        quantize(self.vector, self.exponent, self.limit, out=self.integers)
        return party.mask(self.integers)

    def round(self) -> tuple[float, float]:
        """Processor seconds of the median client, and of the coordinator. ``RuntimeError`` if the sum is wrong."""
        self.attempt += 1
        aggregator, server, clients = self.aggregator, Meter(), [Meter() for _ in self.parties]
        with server:
            aggregator.open_round(self.attempt, TASK)
        for party, client in zip(self.parties, clients, strict=True):
            with client:
                masked = self.upload(party)
            payload = masked.payload
            with server:
                aggregator.add_upload(payload)
        with server:
            survivors = aggregator.freeze()
        for position, (party, client) in enumerate(zip(self.parties, clients, strict=True)):
            with server:
                boxes = aggregator.boxes_for(position)
            with client:
                release = party.release(survivors, (), boxes)
            with server:
                aggregator.add_release(position, release)
            party.close_round()
        total = np.frombuffer(aggregator.total_bytes(), f"<i{self.ring_bits // 8}")
        if not np.array_equal(total, self.integers * self.size.hospitals):
            raise RuntimeError("the sum is not that of the vectors")
        return statistics.median(client.seconds for client in clients), server.seconds


def _costs(session: Session, repeats: int) -> tuple[float, float]:
    """Medians of client and coordinator; the first round, which touches memory first, is not counted."""
    session.round()
    clients, servers = zip(*(session.round() for _ in range(repeats)), strict=True)
    return statistics.median(clients), statistics.median(servers)


def _row(size: Size, ring_bits: int, repeats: int, entropy: Entropy) -> dict[str, object]:
    session = Session(size, ring_bits, entropy)
    client, server = _costs(session, repeats)
    few = Session(Size(size.hospitals, size.colluders, FEW_PARAMETERS), ring_bits, entropy)
    client_fixed, server_fixed = _costs(few, repeats)
    return {
        "hospitals": size.hospitals,
        "colluders": size.colluders,
        "parameters": size.parameters,
        "ring_bits": ring_bits,
        "client_ms": _ms(client),
        "server_ms": _ms(server),
        "server_ns_per_param_per_client": round((server - server_fixed) / size.parameters / size.hospitals * 1e9, 3),
        "client_fixed_ms": _ms(client_fixed),
        "server_fixed_ms": _ms(server_fixed),
        "setup_client_ms": _ms(session.setup_client_s),
        "setup_server_ms": _ms(session.setup_server_s),
        "upload_bytes_per_param": round(session.aggregator.cohort.upload_bytes / size.parameters, 4),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


# ------------------------------------------------------------------------------------------------------------ peers


def _compared(size: Size, repeats: int, entropy: Entropy) -> dict[str, object]:
    """A round of medfed's, then each peer's, in turn; ratios are medians over the turns."""
    session = Session(size, 32, entropy)
    session.round()
    peers = {
        "flower": secagg_peers.flower(size.hospitals, size.threshold, session.vector, entropy),
        "ckks": secagg_peers.ckks(session.vector),
    }
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        ours = session.round()
        for name, peer in peers.items():
            if isinstance(peer, Peer):
                _turn(name, peer, ours, size, found)
    figures: dict[str, object] = {name: round(statistics.median(values), 2) for name, values in found.items()}
    for name, peer in peers.items():
        if isinstance(peer, str):
            figures |= {f"vs_{name}_client": None, f"{name}_missing": peer}
    return figures


def _turn(name: str, peer: Peer, ours: tuple[float, float], size: Size, found: dict[str, list[float]]) -> None:
    """One measurement of a peer. One that was given fewer parameters is taken to need as long for each of the others."""
    scale = size.parameters / peer.parameters
    uploads: list[bytes] = []
    client = scale * processor_s(lambda: uploads.extend(peer.client()))
    figures = {
        f"vs_{name}_client": client / ours[0],
        f"{name}_client_ms": client * 1e3,
        f"{name}_upload_bytes_per_param": sum(map(len, uploads)) / peer.parameters,
    }
    if peer.server is not None:
        server = processor_s(functools.partial(peer.server, uploads))
        figures |= {f"vs_{name}_server": server / ours[1], f"{name}_server_ms": server * 1e3}
    for key, value in figures.items():
        found.setdefault(key, []).append(value)


def run(sizes: Sequence[Size], detailed: Size, repeats: int, entropy: Entropy) -> dict[str, object]:
    """All figures as a JSON object. ``sizes`` are measured on the 32-bit ring, ``detailed`` on that of 16 bits too."""
    parts = Parts(detailed.hospitals - 1, _vector(detailed.parameters), repeats, entropy)
    return {
        **parts.figures(),
        **_compared(detailed, repeats, entropy),
        "rounds": [_row(size, 32, repeats, entropy) for size in sizes] + [_row(detailed, 16, repeats, entropy)],
        "shamir": [parts.shamir(size.hospitals, size.threshold) for size in sizes],
        "repeats": repeats,
    }
