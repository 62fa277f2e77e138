"""Noise is fresh for every attempt: over forks, copies, restores and restarts; and of its keys nothing is ever stored.

Two uploads under one noise vector would give away the difference of their gradients. Where a test could pass by chance it
shows the control: the same with a source of randomness that can be copied.
"""

from __future__ import annotations

import base64
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.privacy.noise import discrete_gaussian
from medfed.seams import Entropy, SystemEntropy
from medfed.simulations.entropy import SeededEntropy
from medfed.wire import Upload

sys.path.insert(0, str(Path(__file__).parent))

from test_local_steps import UPDATE
from test_participation import Desk, failing


class Recording:
    """Real randomness of the system, written down by purpose; ``noise`` writes its vectors down too."""

    def __init__(self, inner: Entropy | None = None) -> None:
        self.inner = inner or SystemEntropy()
        self.drawn: list[tuple[str, bytes]] = []
        self.keys: list[bytes] = []
        self.vectors: list[NDArray[np.int64]] = []

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        drawn = self.inner.draw(purpose, size_bytes)
        self.drawn.append((purpose, drawn))
        return drawn

    def noise(self, key: bytes, sd: float, size: int) -> NDArray[np.int64]:
        self.keys.append(key)
        self.vectors.append(discrete_gaussian(key, sd, size))
        return self.vectors[-1].copy()


class Shuffled:
    """What a careless hospital might use: a generator in this process's memory."""

    def __init__(self) -> None:
        self.generator = random.Random(1)

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        return self.generator.randbytes(size_bytes)


# ------------------------------------------------------------------------------------------------------------------ fork


def drawn_in_a_fork(entropy: Entropy) -> tuple[bytes, bytes]:
    """What a child and then its parent draw after they parted, from a source that was in use before."""
    entropy.draw("noise", 32)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            os.write(write, entropy.draw("noise", 32))
        finally:
            os._exit(0)
    os.close(write)
    theirs = os.read(read, 32)
    os.close(read)
    os.waitpid(child, 0)
    return theirs, entropy.draw("noise", 32)


def test_parent_and_child_of_a_fork_draw_different_keys() -> None:
    theirs, ours = drawn_in_a_fork(SystemEntropy())
    assert len(theirs) == len(ours) == 32
    assert theirs != ours


@pytest.mark.parametrize("source", [lambda: SeededEntropy(1, "x"), Shuffled], ids=["seeded", "in memory"])
def test_fork_of_a_generator_in_memory_would_be_noticed(source: Callable[[], Entropy]) -> None:
    """The control of the test above."""
    theirs, ours = drawn_in_a_fork(source())
    assert theirs == ours


# -------------------------------------------------------------------------------------------------------- copy and restore


def first_upload(world, recording: Recording) -> Upload:
    """Hospital 0's, of attempt 1; the others' and the coordinator's randomness is the same in every copy of a federation."""
    world.start_all()
    world.start(0, recording.noise, entropy=recording)
    desk = Desk(world)
    desk.set_up()
    upload = desk.ask(0, desk.request())
    assert isinstance(upload, Upload)
    return upload


def test_two_copies_of_a_hospital_noise_the_same_attempt_differently(make_world) -> None:
    """Folder, keys, ledger, patients, coordinator's request: all the same but the system's randomness."""
    recordings = Recording(), Recording()
    uploads = [first_upload(make_world(), recording) for recording in recordings]
    assert uploads[0].attempt == uploads[1].attempt == 1
    assert uploads[0].payload != uploads[1].payload
    assert not np.array_equal(recordings[0].vectors[0], recordings[1].vectors[0])
    assert not {key for _, key in recordings[0].drawn} & {key for _, key in recordings[1].drawn}


def test_two_copies_with_one_seed_would_be_noticed(make_world) -> None:
    """The control of the test above: then noise and upload are the same, so nothing else tells the copies apart."""
    recordings = Recording(SeededEntropy(1, "copied")), Recording(SeededEntropy(1, "copied"))
    uploads = [first_upload(make_world(), recording) for recording in recordings]
    assert np.array_equal(recordings[0].vectors[0], recordings[1].vectors[0])
    assert uploads[0].payload == uploads[1].payload


def test_attempt_again_after_a_restore_has_fresh_noise(world, tmp_path: Path) -> None:
    """Yesterday's folder is put back, and a coordinator that tells nothing of the newer ledger asks for the same attempt again:
    the ledger cannot know of it, and the noise does not depend on its knowing."""
    world.start_all()
    world.kill(0)
    folder, backup = world.folder / "Ahaus", tmp_path / "backup"
    shutil.copytree(folder, backup)
    recordings, uploads = (Recording(), Recording()), []
    for recording in recordings:
        world.kill(0)
        shutil.rmtree(folder)
        shutil.copytree(backup, folder)
        world.start(0, recording.noise, entropy=recording)
        desk = Desk(world)
        desk.set_up()
        uploads.append(desk.ask(0, desk.request(attempt=1)))
    assert [type(upload) for upload in uploads] == [Upload, Upload]
    assert uploads[0].attempt == uploads[1].attempt
    assert uploads[0].payload != uploads[1].payload
    assert not np.array_equal(recordings[0].vectors[0], recordings[1].vectors[0])


def test_every_attempt_and_every_process_draws_new_keys(make_world) -> None:
    """Rounds, an attempt that failed, restarts; with several local steps each."""
    world, recording = make_world(UPDATE), Recording()
    world.start_all()
    desk = Desk(world)
    for _ in range(2):
        world.start(0, recording.noise, entropy=recording)
        desk.set_up()
        desk.round()
    dies = failing(MemoryError())
    world.start(0, lambda *arguments: (recording.noise(*arguments), dies(*arguments))[1], entropy=recording)
    desk.set_up()
    desk.ask(0, desk.request())
    desk.attempt += 1
    desk.round()
    assert len(recording.keys) == 3 * 5 + 1
    assert len(set(recording.keys)) == len(recording.keys)
    assert recording.keys == [key for purpose, key in recording.drawn if purpose == "noise"]
    assert len({vector.tobytes() for vector in recording.vectors}) == len(recording.vectors)


# ----------------------------------------------------------------------------------------------------------- never stored


def spellings(secret: bytes) -> list[bytes]:
    """As bytes, in hexadecimal and in base 64."""
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret).rstrip(b"=")[:-1]]


def vector_spellings(vector: NDArray[np.int64]) -> list[bytes]:
    """As integers and floats of every width and as text."""
    kinds = ["<i8", ">i8", "<i4", ">i4", "<f8", "<f4"]
    return [*(vector.astype(kind).tobytes() for kind in kinds), str(vector.tolist())[1:-1].encode()]


def found(folder: Path, log: str, recording: Recording) -> list[str]:
    """Where anything drawn or made of it stands, whole or a key's first half."""
    wanted = [part for purpose, key in recording.drawn if "secagg" not in purpose for part in spellings(key)]
    wanted += [part for _, key in recording.drawn for part in spellings(key[:16])]
    # the self mask, and what its shares are made with
    masks = [key for purpose, key in recording.drawn if purpose == "secagg/self mask"]
    wanted += [part for key in masks for at in range(0, len(key), 32) for part in spellings(key[at : at + 32])]
    wanted += [part for vector in recording.vectors for part in vector_spellings(vector)]
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [name for name, data in {**files, "log": log.encode()}.items() if any(part in data for part in wanted)]


@pytest.mark.parametrize("drop_outs", [0, 1])
def test_keys_and_noise_are_in_no_file_and_no_line_of_the_log(make_world, caplog, drop_outs: int) -> None:
    """After whole rounds, a failed attempt and a restart, with everything logged; looked for while it runs and afterwards."""
    caplog.set_level("DEBUG")
    world, recording = make_world(UPDATE, hospitals=4 + drop_outs, drop_outs=drop_outs), Recording()
    folder = world.folder / "Ahaus"
    world.start_all()
    world.start(0, recording.noise, entropy=recording)
    desk = Desk(world)
    desk.set_up()
    desk.round(lost=range(4, 4 + drop_outs))
    assert ("secagg/self mask" in dict(recording.drawn)) == bool(drop_outs)
    assert found(folder, caplog.text, recording) == []
    dies = failing(MemoryError())
    world.start(0, lambda *arguments: (recording.noise(*arguments), dies(*arguments))[1], entropy=recording)
    desk.set_up()
    desk.ask(0, desk.request())
    world.kill(0)
    assert found(folder, caplog.text, recording) == []
    # the control: each spelling of each is seen
    for number, part in enumerate([*spellings(recording.keys[0]), *vector_spellings(recording.vectors[-1])]):
        (folder / "planted").write_bytes(b"x" * number + part)
        assert found(folder, caplog.text, recording) == ["planted"]
    (folder / "planted").unlink()
    assert found(folder, recording.keys[1].hex(), recording) == ["log"]
