"""The parts of secure aggregation by themselves, for its benchmark: masking, quantising, hashing, sharing."""

from __future__ import annotations

import gc
import hashlib
import threading
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medfed.privacy.keystream import KEY_BYTES, Keystream
from medfed.privacy.quantize import FLOAT32_EXACT, quantize, quantize_stochastic
from medfed.privacy.secagg import shamir
from medfed.privacy.secagg.keys import STREAM_BYTES
from medfed.privacy.secagg.masks import Masker
from medfed.privacy.secagg.protocol import SHARE_BYTES
from medfed.seams import Entropy

EXPONENT = 20
BLOCK_WORDS, BLOCKS = 1 << 13, 800
"""64 KiB at a time: memory for more would come from the kernel anew each time."""


class Parts:
    """``pads`` pads on ``vector``. A figure is the best of ``repeats`` times, of three at least: when nothing disturbs it."""

    def __init__(self, pads: int, vector: NDArray[np.float64], repeats: int, entropy: Entropy) -> None:
        self._vector, self._repeats, self._entropy = vector, max(3, repeats), entropy
        self._integers = np.zeros(vector.size, np.int64)
        self._streams = [entropy.draw("stream", STREAM_BYTES) for _ in range(pads)]
        self._signs = [1 - 2 * (number % 2) for number in range(pads)]

    def figures(self) -> dict[str, float]:
        """Nanoseconds are of one parameter; of masking, of one parameter and pad."""
        vector, integers, coins = self._vector, self._integers, self._entropy.draw("coins", 32)
        as_sent = integers.data[: vector.size // 2]
        words, total = np.ones(vector.size, np.uint32), np.ones(vector.size, np.uint32)
        return {
            "aes_ctr_gb_per_s": round(8 * BLOCK_WORDS * BLOCKS / self._best_s(self._draw_keystream) / 1e9, 2),
            "mask_ns_per_param_per_peer": self._mask_ns(words),
            "mask_ns_per_param_per_peer_16_bits": self._mask_ns(np.ones(vector.size, np.uint16)),
            "threads_gain": self._threads_gain(),
            "quantize_ns_per_param": self._ns(lambda: quantize(vector, EXPONENT, FLOAT32_EXACT, out=integers)),
            "quantize_stochastic_ns_per_param": self._ns(
                lambda: quantize_stochastic(vector, EXPONENT, FLOAT32_EXACT, coins, out=integers)
            ),
            "hash_ns_per_param": self._ns(lambda: hashlib.sha256(as_sent).digest()),
            "sum_ns_per_param": self._ns(lambda: np.add(total, words, out=total)),
            "scratch_mb": self._scratch_mb(),
        }

    def shamir(self, hospitals: int, threshold: int) -> dict[str, object]:
        """One hospital's shares, and the secrets of all hospitals from them."""
        draw, holders = self._entropy.draw, range(hospitals)
        secret, coefficients = draw("secret", SHARE_BYTES), draw("shares", SHARE_BYTES * (threshold - 1))
        shares = np.frombuffer(b"".join(shamir.split(secret, threshold, holders, coefficients)), np.uint8)
        of_all = np.tile(shares, hospitals).reshape(hospitals, hospitals, SHARE_BYTES)
        split_s = self._best_s(lambda: shamir.split(secret, threshold, holders, coefficients))
        combine_s = self._best_s(lambda: shamir.combine_all(holders, of_all, threshold))
        return {
            "hospitals": hospitals,
            "threshold": threshold,
            "split_ms": round(split_s * 1e3, 3),
            "combine_all_ms": round(combine_s * 1e3, 3),
        }

    def _best_s(self, work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
        times = []
        for _ in range(self._repeats):
            started = clock()
            work()
            times.append(clock() - started)
        return min(times)

    def _ns(self, work: Callable[[], object]) -> float:
        return round(self._best_s(work) / self._vector.size * 1e9, 3)

    def _draw_keystream(self) -> None:
        stream = Keystream(self._entropy.draw("key", KEY_BYTES))
        for _ in range(BLOCKS):
            stream.words(BLOCK_WORDS)

    def _mask_ns(self, words: NDArray[np.uint16] | NDArray[np.uint32]) -> float:
        masker = Masker(words.itemsize * 8)
        return round(self._ns(lambda: masker.add_pads(words, self._streams, self._signs)) / len(self._streams), 3)

    def _threads_gain(self) -> float:
        """Wall time of masking on one thread over that on two, each with half of the pads and an accumulator of its own: a pad
        in the fast backend cannot be begun in the middle, so that the words themselves cannot be shared out."""
        maskers, streams, signs = (Masker(32), Masker(32)), self._streams, self._signs
        sums = [np.ones(self._vector.size, np.uint32) for _ in maskers]

        def both() -> None:
            halves = [
                threading.Thread(target=masker.add_pads, args=(sums[part], streams[part::2], signs[part::2]))
                for part, masker in enumerate(maskers)
            ]
            for half in halves:
                half.start()
            for half in halves:
                half.join()
            np.add(sums[0], sums[1], out=sums[0])

        alone = self._best_s(lambda: maskers[0].add_pads(sums[0], streams, signs), time.perf_counter)
        return round(alone / self._best_s(both, time.perf_counter), 2)

    def _scratch_mb(self) -> float:
        """The most that quantising and masking allocate beside the vector and the words, with what is kept for later
        rounds. A client besides has its upload twice while it puts it together."""
        words = np.ones(self._vector.size, np.uint32)
        gc.collect()
        tracemalloc.start()
        try:
            quantize(self._vector, EXPONENT, FLOAT32_EXACT, out=self._integers)
            Masker(32).mask_into(words, self._integers, self._streams, self._signs)
            return round(tracemalloc.get_traced_memory()[1] / 1e6, 3)
        finally:
            tracemalloc.stop()
