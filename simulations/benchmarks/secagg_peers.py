"""The work of secure aggregation by other means, for the benchmark to compare with: Flower's SecAgg+, TenSEAL's CKKS.

Flower: the last two stages of its mod, from float32 to the masked upload and the shares of self masks (its keys and shares,
new every round, are not counted); and for the coordinator the functions that its workflow calls, in that order and with its
default parameters. Messages and their records are left out. One client masks in earnest and the coordinator adds its upload
n times: that costs as much, and the sum means nothing. CKKS: a client's vector is encrypted and serialised, on one thread,
with 8192 coefficients and the least primes that leave a sum of such precision; sum and decryption are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfed.seams import Entropy

CKKS_PARAMETERS = 1_000_000
"""A longer vector takes as long a parameter, and up to 0.6 GB."""
_SLOTS = 4096
_CLIPPING_RANGE, _TARGET_RANGE, _MODULUS = 8.0, 1 << 22, 1 << 32
_EXAMPLES, _MOST_EXAMPLES = 100, 1000.0


@dataclass(frozen=True, slots=True)
class Peer:
    """Another way. ``client``: its work for one round, which gives the upload; ``server``: the coordinator's for n of them."""

    parameters: int
    client: Callable[[], list[bytes]]
    server: Callable[[list[bytes]], object] | None


def flower(hospitals: int, threshold: int, vector: NDArray[np.float64], entropy: Entropy) -> Peer | str:
    """SecAgg+ of the Flower that is installed, or why there is none."""
    try:
        client = _flower_client(hospitals, threshold, vector)
        return Peer(vector.size, client, _flower_server(hospitals, threshold, entropy))
    except ImportError as error:
        return f"not importable: {error}"


def ckks(vector: NDArray[np.float64]) -> Peer | str:
    """CKKS of the TenSEAL that is installed, or why there is none."""
    try:
        import tenseal  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        return f"not importable: {error}"
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=2 * _SLOTS, coeff_mod_bit_sizes=[60, 40, 60], n_threads=1
    )
    context.global_scale = 2.0**40
    part = vector[:CKKS_PARAMETERS]

    def client() -> list[bytes]:
        blocks = (part[start : start + _SLOTS] for start in range(0, part.size, _SLOTS))
        return [tenseal.ckks_vector(context, block).serialize() for block in blocks]

    return Peer(part.size, client, None)


def _flower_client(hospitals: int, threshold: int, vector: NDArray[np.float64]) -> Callable[[], list[bytes]]:
    """The first of ``hospitals`` clients, all of which have given out their shares."""
    from medfed.flower import hush  # noqa: I001 - before Flower's own import
    from flwr.client.mod.secure_aggregation.secaggplus_mod import (
        SecAggPlusState,
        _collect_masked_vectors,
        _setup,
        _share_keys,
        _unmask,
    )
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    hush()
    terms = {
        Key.SAMPLE_NUMBER: hospitals,
        Key.SHARE_NUMBER: hospitals,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: _CLIPPING_RANGE,
        Key.TARGET_RANGE: _TARGET_RANGE,
        Key.MOD_RANGE: _MODULUS,
        Key.MAX_WEIGHT: _MOST_EXAMPLES,
    }
    states = [SecAggPlusState(nid=node) for node in range(hospitals)]
    keys = {}
    for node, state in enumerate(states):
        offered = _setup(state, terms)
        keys[str(node)] = (offered[Key.PUBLIC_KEY_1], offered[Key.PUBLIC_KEY_2])
    sources, ciphertexts = [], []
    for node, state in enumerate(states):
        given = _share_keys(state, keys)
        if node:
            sources.append(node)
            ciphertexts.append(given[Key.CIPHERTEXT_LIST][given[Key.DESTINATION_LIST].index(0)])
    update = ndarrays_to_parameters([vector.astype(np.float32)])

    def client() -> list[bytes]:
        relayed = {Key.CIPHERTEXT_LIST: ciphertexts, Key.SOURCE_LIST: sources}
        masked: list[bytes] = _collect_masked_vectors(states[0], relayed, _EXAMPLES, update)[Key.MASKED_PARAMETERS]
        _unmask(states[0], {Key.ACTIVE_NODE_ID_LIST: list(range(hospitals)), Key.DEAD_NODE_ID_LIST: []})
        return masked

    return client


def _flower_server(hospitals: int, threshold: int, entropy: Entropy) -> Callable[[list[bytes]], object]:
    """What ``SecAggPlusWorkflow`` does between the masked uploads and the mean, nobody dropped out."""
    from flwr.common import bytes_to_ndarray
    from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.common.secure_aggregation.quantization import dequantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    shares = [create_shares(entropy.draw("peer", 32), threshold, hospitals) for _ in range(hospitals)]

    def server(upload: list[bytes]) -> object:
        total = [bytes_to_ndarray(part) for part in upload]
        for _ in range(hospitals - 1):
            total = arithmetic.parameters_addition(total, [bytes_to_ndarray(part) for part in upload])
        total = arithmetic.parameters_mod(total, _MODULUS)
        for held in shares:
            own = pseudo_rand_gen(combine_shares(held), _MODULUS, arithmetic.get_parameters_shape(total))
            total = arithmetic.parameters_subtraction(total, own)
        ratio, mean = arithmetic.factor_extract(arithmetic.parameters_mod(total, _MODULUS))
        means = dequantize(mean, _CLIPPING_RANGE, _TARGET_RANGE)
        for part in means:
            part += -(hospitals - 1) * _CLIPPING_RANGE
            part *= _TARGET_RANGE / ratio
        return means

    return server
