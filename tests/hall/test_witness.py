"""Heads of ledgers: who can make one, what is believed, what is kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from medfed.errors import MedfedError, RemoteProtocolError
from medfed.identity import Identity
from medfed.seams import SystemFiles
from medfed.wire import HEAD_BYTES
from medfed.witness import NO_HEAD, Head, Witness, item, newest, read_heads, signed_bytes, with_heads

FILES = SystemFiles()
ONE, TWO = Identity.from_seed(b"\1" * 32), Identity.from_seed(b"\2" * 32)
IDENTITIES = (ONE.public, TWO.public)


def head(identity: Identity, seq: int, digest: bytes = b"d" * 32) -> Head:
    return Head(seq, digest, identity.sign(signed_bytes(seq, digest)))


def test_head_is_of_one_length_and_reads_back() -> None:
    for seq in (1, 255, 1 << 40):
        data = head(ONE, seq).to_bytes()
        assert len(data) == HEAD_BYTES == len(NO_HEAD)
        assert Head.from_bytes(data) == head(ONE, seq)
    for bad in (b"", data[:-1], data + b"\0", NO_HEAD):
        with pytest.raises(RemoteProtocolError, match="MF-103"):
            Head.from_bytes(bad)


def test_every_bit_of_a_head_is_signed() -> None:
    data = head(ONE, 7).to_bytes()
    for bit in range(8 * HEAD_BYTES):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert read_heads([b"\0\0" + bytes(flipped)], IDENTITIES) == ()
    assert read_heads([b"\0\0" + data], IDENTITIES) == ((0, head(ONE, 7)),)


def test_head_that_its_hospital_did_not_sign_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    true, others = item(1, head(TWO, 3)), item(0, head(TWO, 9))
    nobodys, cut = item(2, head(ONE, 9)), item(0, head(ONE, 9))[:-1]
    with caplog.at_level(logging.WARNING):
        found = read_heads([true, others, nobodys, cut, b"", item(0, None)], IDENTITIES)
    assert found == ((1, head(TWO, 3)),)
    assert "4 heads" in caplog.text  # the empty entry says that none is known


def test_newest_is_by_hospital() -> None:
    heads = [(0, head(ONE, 3)), (1, head(TWO, 9)), (0, head(ONE, 5)), (0, head(ONE, 4))]
    assert newest(heads) == {0: head(ONE, 5), 1: head(TWO, 9)}


def test_pads_are_bound_to_task_and_every_head() -> None:
    heads = (item(0, head(ONE, 3)), item(1, head(TWO, 3)))
    shown = [heads, heads[:1], heads[::-1], (), (item(0, head(ONE, 4)), heads[1]), (b"".join(heads),)]
    bound = {with_heads(task, each) for task in (bytes(32), b"t" * 32) for each in shown}
    assert len(bound) == 2 * len(shown)
    assert {len(each) for each in bound} == {32}


def test_witness_keeps_the_newest_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "witnesses.bin"
    witness = Witness(FILES, path)
    assert witness.items(IDENTITIES) == (item(0, None), item(1, None))
    for seq in (5, 9, 7):
        witness.keep(ONE.public, head(ONE, seq))
    witness.save()
    assert path.stat().st_mode & 0o777 == 0o600
    again = Witness(FILES, path)
    again.keep(ONE.public, head(ONE, 8))
    again.keep(TWO.public, head(TWO, 2))
    assert (again.head(ONE.public), again.head(TWO.public)) == (head(ONE, 9), head(TWO, 2))
    assert Witness(FILES, path).head(TWO.public) is None, "nothing is written before save"
    again.save()
    assert Witness(FILES, path).items(IDENTITIES) == (item(0, head(ONE, 9)), item(1, head(TWO, 2)))


def test_witness_writes_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "witnesses.bin"
    witness = Witness(FILES, path)
    witness.save()
    assert not path.exists()
    witness.keep(ONE.public, head(ONE, 5))
    witness.save()
    path.unlink()
    witness.keep(ONE.public, head(ONE, 5))
    witness.save()
    assert not path.exists()


def test_second_ledger_with_the_same_row_is_an_alarm_and_the_first_stays() -> None:
    witness = Witness(FILES, Path("/nowhere/witnesses.bin"))
    witness.keep(ONE.public, head(ONE, 5))
    with pytest.raises(RemoteProtocolError, match="MF-405"):
        witness.keep(ONE.public, head(ONE, 5, b"e" * 32))
    assert witness.head(ONE.public) == head(ONE, 5)


def test_entry_altered_on_disk_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "witnesses.bin"
    witness = Witness(FILES, path)
    witness.keep(ONE.public, head(ONE, 5))
    witness.keep(TWO.public, head(TWO, 6))
    witness.save()
    data = path.read_bytes()
    for changed in (data[:-1], data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]):
        path.write_bytes(changed)
        left = Witness(FILES, path)
        assert [left.head(public) is None for public in IDENTITIES].count(True) == 1
        assert "left out" in caplog.text
    path.write_bytes(b"another version" + data)
    with pytest.raises(MedfedError, match="MF-406"):
        Witness(FILES, path)
