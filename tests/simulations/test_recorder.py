"""A recorder between hospitals and coordinator: what it sees of an update is nothing, and the sum is exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.client import local_steps, participation
from medfed.client.daemon import open_hospital
from medfed.privacy.noise import discrete_gaussian
from medfed.privacy.secagg import masks
from medfed.seams import system_seams
from medfed.server.daemon import load_assignment
from medfed.server.exchange import Kind, Reply
from medfed.server.rounds import Rounds
from medfed.server.setup import load_office
from medfed.server.store import Checkpoint, Store
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.rehearsal import Rehearsal, lay_out
from medfed.wire import Upload, decode

ROUNDS = 3
LIMIT = 1 << 20


@dataclass
class Recorder:
    """An exchange over hospitals in this process that keeps every frame, and what each hospital truly computed."""

    handles: list[Callable[[bytes], bytes]]
    frames: list[tuple[int, bytes]] = field(default_factory=list)
    clipped: list[NDArray[np.int64]] = field(default_factory=list)
    noised: list[NDArray[np.int64]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    def online(self) -> frozenset[int]:
        return frozenset(range(len(self.handles)))

    def send(self, position: int, kind: Kind, payload: bytes, timeout_s: float) -> None:
        reply = self.handles[position](payload)
        self.frames.append((position, reply))
        self.replies.append(Reply(position, reply, None))

    def receive(self) -> list[Reply]:
        replies, self.replies = self.replies, []
        return replies

    def uploads(self) -> list[NDArray[np.uint32]]:
        """The masked words of every upload, in order."""
        found = []
        for _, frame in self.frames:
            message = decode(frame, vector_limit_bytes=LIMIT)
            if isinstance(message, Upload):
                words = len(self.noised[0])
                found.append(np.frombuffer(message.payload[-64 - 4 * words : -64], "<u4").astype(np.uint32))
        return found


@contextlib.contextmanager
def _recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Recorder, Checkpoint]]:
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", 1, 4)
    plan = Rehearsal(epsilon=1.0, mode="distributed", rounds=ROUNDS, model="mlp", seed=7)
    sites = lay_out(folder, cohort, plan, seams)
    true_quantize = local_steps.quantize
    true_mask = participation.Party.mask
    with contextlib.ExitStack() as stack:
        hospitals = [stack.enter_context(open_hospital(site, discrete_gaussian)) for site in sites]
        recorder = Recorder([hospital.handle for hospital in hospitals])

        def quantize(
            vector: NDArray[np.float64], exponent: int, bound: int, out: NDArray[np.int64]
        ) -> NDArray[np.int64]:
            words = true_quantize(vector, exponent, bound, out)
            recorder.clipped.append(words.copy())  # the noise is added in place
            return words

        def mask(party: participation.Party, vector: NDArray[np.int64]) -> object:
            recorder.noised.append(vector.copy())
            return true_mask(party, vector)

        monkeypatch.setattr(local_steps, "quantize", quantize)
        monkeypatch.setattr(participation.Party, "mask", mask)
        office = load_office(seams, folder / "coordinator" / "server.toml")
        assignment = load_assignment(office)
        store = Store(seams.files, folder / "run", assignment.study, assignment.plan.words)
        yield recorder, Rounds(assignment, recorder, store, seams, lambda checkpoint, what: None).run()


def _correlation(a: list[NDArray[np.int64]], words: list[NDArray[np.uint32]]) -> float:
    """Pearson correlation of all true values with all masked words read as signed integers."""
    left = np.concatenate([vector.astype(np.float64) / np.abs(vector).max() for vector in a])
    right = np.concatenate([word.view(np.int32).astype(np.float64) for word in words])
    return float(np.corrcoef(left, right)[0, 1])


def test_recorder_sees_no_update_and_the_sum_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _recorded(tmp_path, monkeypatch) as (recorder, checkpoint):
        uploads = recorder.uploads()
        assert len(uploads) == len(recorder.noised) == 4 * ROUNDS
        samples = sum(len(words) for words in uploads)
        for true in (recorder.clipped, recorder.noised):
            equal = sum(
                int((words.view(np.int32) == vector).sum()) for words, vector in zip(uploads, true, strict=True)
            )
            assert equal <= 1  # 2^-32 a word
            assert abs(_correlation(true, uploads)) < 4.5 / np.sqrt(samples)
        for number in range(ROUNDS):
            chosen = slice(4 * number, 4 * number + 4)
            total = np.sum(recorder.noised[chosen], axis=0)
            masked = np.sum(uploads[chosen], axis=0, dtype=np.uint32).view(np.int32)
            np.testing.assert_array_equal(masked, total)
        last = np.frombuffer(checkpoint.total, "<i4")
        np.testing.assert_array_equal(last, np.sum(recorder.noised[-4:], axis=0))


def test_recorder_without_masks_reads_the_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the pads left out, the same recorder has every noised update in clear."""

    def no_pads(self: masks.Masker, out: NDArray[np.uint32], vector: NDArray[np.int64], *rest: object) -> None:
        out[:] = (vector & 0xFFFFFFFF).astype(out.dtype)

    monkeypatch.setattr(masks.Masker, "mask_into", no_pads)
    with _recorded(tmp_path, monkeypatch) as (recorder, _):
        assert _correlation(recorder.noised, recorder.uploads()) > 0.95
        for words, vector in zip(recorder.uploads(), recorder.noised, strict=True):
            np.testing.assert_array_equal(words.view(np.int32), vector)


def test_recorder_every_frame_is_listed_and_of_constant_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _recorded(tmp_path, monkeypatch) as (recorder, _):
        lengths: dict[type, set[int]] = {}
        for _, frame in recorder.frames:
            lengths.setdefault(type(decode(frame, vector_limit_bytes=LIMIT)), set()).add(len(frame))
        assert {kind.__name__ for kind in lengths} == {"OfferReply", "Upload", "Finished"}
        assert all(len(sizes) == 1 for sizes in lengths.values())
