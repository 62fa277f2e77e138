"""A ledger older than the outbox beside it was restored from a backup, or is a second copy: the hospital does not start."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from medfed_test_commands import Federation, call

from medfed.client.approval import caps_of
from medfed.client.cli import main
from medfed.client.ledger import Ledger
from medfed.client.startup_checks import check_outbox
from medfed.errors import PrivacyError
from medfed.identity import Identity
from medfed.wire import Upload, encode


class Hospital:
    """``north`` with an approved study; spends and writes replies as a round does, without training."""

    def __init__(self, federation: Federation) -> None:
        arguments = ["approve", federation.study, "--peers", *federation.peers, "--config", federation.config, "--yes"]
        assert call(main, arguments).status == 0
        self.config = federation.config
        self.site = federation.site()
        self.identity = self.site.identity()
        self.old = federation.folder / "backup.db"
        with self.ledger() as ledger:
            self.study = ledger.studies()[0].approval.study
        self.folder = self.site.study_folder(self.study)
        self.outbox = self.folder / "outbox.bin"

    def ledger(self) -> Ledger:
        return Ledger.open(self.site.seams.files, self.site.ledger_path, self.identity)

    def back_up(self) -> None:
        shutil.copy(self.site.ledger_path, self.old)

    def restore(self) -> None:
        shutil.copy(self.old, self.site.ledger_path)

    def upload(self, attempt: int) -> Upload:
        return Upload(self.study, bytes(16), 0, attempt, 0, bytes(64), bytes(104), bytes([attempt]) * 100)

    def store(self, upload: Upload, identity: Identity | None = None) -> bytes:
        reply = encode(upload, identity or self.identity)
        self.outbox.write_bytes(bytes(32) + reply)
        return hashlib.sha256(reply).digest()

    def send(self, attempt: int, *, seal: bool = True) -> None:
        """Debit, outbox, sealed row; without the last as where the process was killed before it."""
        with self.ledger() as ledger:
            ledger.reserve(self.study, 1, attempt, caps_of(self.site), 0.0)
            reply = self.store(self.upload(attempt))
            if seal:
                pad = hashlib.sha256(reply).digest()
                ledger.seal_and_release(self.study, attempt, bytes(32), pad, reply)

    def check(self) -> None:
        with self.ledger() as ledger:
            check_outbox(self.site.seams.files, self.folder, self.study, self.identity.public, ledger)


@pytest.fixture
def hospital(federation: Federation) -> Hospital:
    return Hospital(federation)


def test_ledger_restored_from_before_the_last_upload_stops_the_start(hospital: Hospital) -> None:
    hospital.send(1)
    hospital.back_up()
    hospital.send(2)
    newest = hospital.site.ledger_path.read_bytes()
    hospital.restore()
    outcome = call(main, ["run", hospital.config, "--once"])
    assert outcome.status == 4
    assert outcome.err.startswith("MF-405 ") and outcome.err.count("\n") == 1
    assert "attempt 2" in outcome.err and "its last is 1" in outcome.err
    hospital.site.ledger_path.write_bytes(newest)
    outcome = call(main, ["run", hospital.config, "--once"])
    assert "MF-405" not in outcome.err and outcome.status == 6  # it starts, and finds no coordinator


def test_ledger_that_went_another_way_stops_the_start(hospital: Hospital) -> None:
    """Attempt 2 is charged here too, for another reply: two copies of one hospital ran."""
    hospital.send(1)
    hospital.back_up()
    hospital.send(2)
    sent = hospital.outbox.read_bytes()
    hospital.restore()
    with hospital.ledger() as ledger:
        ledger.reserve(hospital.study, 1, 2, caps_of(hospital.site), 0.0)
        ledger.seal_and_release(hospital.study, 2, bytes(32), b"p" * 32, b"r" * 32)
    hospital.outbox.write_bytes(sent)
    with pytest.raises(PrivacyError, match="MF-405"):
        hospital.check()


def abandoned(hospital: Hospital) -> None:
    hospital.send(1, seal=False)
    with hospital.ledger() as ledger:
        ledger.abandon(hospital.study, 1, "interrupted")


def older_outbox(hospital: Hospital) -> None:
    hospital.send(1)
    with hospital.ledger() as ledger:
        ledger.acknowledge(hospital.study, 1)
        ledger.reserve(hospital.study, 2, 2, caps_of(hospital.site), 0.0)


IN_ORDER: dict[str, Callable[[Hospital], None]] = {
    "nothing sent": lambda hospital: None,
    "sent": lambda hospital: hospital.send(1),
    "killed before it was sealed": lambda hospital: hospital.send(1, seal=False),
    "abandoned": abandoned,
    "killed before the next was stored": older_outbox,
}


@pytest.mark.parametrize("name", IN_ORDER)
def test_outbox_of_a_charged_attempt_is_in_order(hospital: Hospital, name: str) -> None:
    IN_ORDER[name](hospital)
    hospital.check()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[32 + 5 + 32 + 16 + 2 + 3] ^= 0x40  # the attempt's last byte
    path.write_bytes(data)


NO_EVIDENCE: dict[str, Callable[[Hospital], object]] = {
    "empty": lambda hospital: hospital.outbox.write_bytes(b""),
    "shorter than its head": lambda hospital: hospital.outbox.write_bytes(b"x" * 31),
    "noise": lambda hospital: hospital.outbox.write_bytes(b"x" * 500),
    "torn": lambda hospital: torn(hospital.outbox),
    "altered": lambda hospital: altered(hospital.outbox),
    "a folder": lambda hospital: (hospital.outbox.unlink(), hospital.outbox.mkdir()),
    "another's": lambda hospital: hospital.store(hospital.upload(2), Identity.from_seed(bytes(32))),
    "of another study": lambda hospital: hospital.store(replace(hospital.upload(2), study_hash=bytes(32))),
}


@pytest.mark.parametrize("name", NO_EVIDENCE)
def test_outbox_that_proves_nothing_does_not_stop_the_start(hospital: Hospital, name: str) -> None:
    hospital.send(1)
    NO_EVIDENCE[name](hospital)
    hospital.check()


def test_outbox_of_an_uncharged_attempt_is_the_evidence(hospital: Hospital) -> None:
    """The positive control of the two above: the same frame, signed by this hospital for this study."""
    hospital.send(1)
    hospital.store(hospital.upload(2))
    with pytest.raises(PrivacyError, match="MF-405"):
        hospital.check()
