"""Enrolment documents and rosters: signed, complete, without doubles, and named by a hash that covers everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from medfed.errors import ConfigError, EnvironmentFault, MedfedError, PrivacyError, RemoteProtocolError
from medfed.identity import Identity, verify
from medfed.roster import Enrolment, Roster, enrol, load_enrolment, load_roster
from medfed.seams import SystemFiles

FILES = SystemFiles()
COORDINATOR = Identity.from_seed(b"\x63" * 32)


def node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1())
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


NODE_KEYS = [node_key() for _ in range(4)]
IDENTITIES = [Identity.from_seed(bytes([1 + n]) * 32) for n in range(4)]
ENTRIES = [enrol(IDENTITIES[n], f"Hospital {n}", NODE_KEYS[n], 100 + n) for n in range(4)]


def roster(*entries: Enrolment) -> Roster:
    return Roster(
        format="medfed-roster-1", coordinator=COORDINATOR.public.hex(), hospitals=list(entries or ENTRIES[:3])
    )


def signed_again(entry: Enrolment, identity: Identity, **changes: object) -> Enrolment:
    """A document whose own signature is right: enrolment as anybody can make it for himself."""
    values = entry.model_dump() | changes | {"identity": identity.public.hex()}
    return enrol(identity, values["hospital"], values["node_key"], values["nominal_patients"])


# --------------------------------------------------------------------------------------------------------- enrolment


def test_enrolment_reads_back_and_verifies(tmp_path: Path) -> None:
    path = tmp_path / "enrolment.json"
    path.write_bytes(ENTRIES[0].to_bytes())
    assert load_enrolment(FILES, path) == ENTRIES[0]
    assert ENTRIES[0].public == IDENTITIES[0].public


CHANGES = {
    "hospital": "Hospital X",
    "identity": IDENTITIES[1].public.hex(),
    "node_key": NODE_KEYS[3],
    "nominal_patients": 101,
    "signature": "00" * 64,
}


@pytest.mark.parametrize("field", CHANGES)
def test_enrolment_changed_in_any_field_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "enrolment.json"
    path.write_text(json.dumps(ENTRIES[0].model_dump() | {field: CHANGES[field]}))
    with pytest.raises(RemoteProtocolError) as caught:
        load_enrolment(FILES, path)
    assert caught.value.code == 110
    assert "enrolment.json" in caught.value.what


def test_every_field_but_the_signature_is_in_the_fingerprint() -> None:
    seen = {ENTRIES[0].fingerprint}
    for field in set(CHANGES) - {"signature"}:
        seen.add(ENTRIES[0].model_copy(update={field: CHANGES[field]}).fingerprint)
    assert len(seen) == len(CHANGES)
    assert set(CHANGES) | {"format"} == set(Enrolment.model_fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"more": 1},
        {"nominal_patients": 0},
        {"nominal_patients": "100"},
        {"nominal_patients": 1e3},
        {"hospital": ""},
        {"hospital": "a\u202eb"},
        {"hospital": "x" * 65},
        {"identity": "AB" * 32},
        {"identity": "ab" * 31},
        {"signature": ""},
        {"format": "medfed-enrolment-2"},
    ],
    ids=str,
)
def test_enrolment_of_another_form_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "enrolment.json"
    path.write_text(json.dumps(ENTRIES[0].model_dump() | changes))
    with pytest.raises(ConfigError) as caught:
        load_enrolment(FILES, path)
    assert caught.value.code == 201
    assert next(iter(changes)) in caught.value.what


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000, b'"' + b"x" * 100])
def test_file_that_is_no_document_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "enrolment.json"
    path.write_bytes(data)
    for load in (load_enrolment, load_roster):
        with pytest.raises(ConfigError, match="MF-201") as caught:
            load(FILES, path)
        assert "\n" not in str(caught.value)


def test_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "enrolment.json"
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(EnvironmentFault, match="MF-609"):
        load_enrolment(FILES, path)


NEUTRAL = (1).to_bytes(32, "little")  # of order 1: the signature (neutral, 0) verifies under it over all data


def test_enrolment_under_a_key_that_anybody_signs_for_is_refused(tmp_path: Path) -> None:
    forged = ENTRIES[0].model_copy(
        update={"hospital": "Nobody", "identity": NEUTRAL.hex(), "signature": (NEUTRAL + bytes(32)).hex()}
    )
    verify(forged.public, bytes.fromhex(forged.signature), forged._signed_bytes())  # the signature is not what stops it
    path = tmp_path / "enrolment.json"
    path.write_bytes(forged.to_bytes())
    with pytest.raises(RemoteProtocolError, match=r"enrolment\.json") as caught:
        load_enrolment(FILES, path)
    assert caught.value.code == 170
    path.write_bytes(roster(*ENTRIES[1:3], forged).to_bytes())
    with pytest.raises(RemoteProtocolError) as caught:
        load_roster(FILES, path)
    assert caught.value.code == 170


def test_roster_of_a_coordinator_that_anybody_signs_for_is_refused() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        roster().model_copy(update={"coordinator": NEUTRAL.hex()}).check()
    assert caught.value.code == 170


def test_node_key_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="MF-211"):
        enrol(IDENTITIES[0], "Hospital", "ssh-ed25519 AAAA", 10).check()


@pytest.mark.parametrize(("name", "patients"), [("", 10), ("a/b", 10), ("ok", 0), ("ok", -1), ("ok", 10**9)])
def test_enrolment_of_bad_values_is_not_written(name: str, patients: int) -> None:
    with pytest.raises(ConfigError, match="MF-203"):
        enrol(IDENTITIES[0], name, NODE_KEYS[0], patients)


# ------------------------------------------------------------------------------------------------------------ roster


def test_roster_reads_back_and_verifies(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_bytes(roster().to_bytes())
    loaded = load_roster(FILES, path)
    assert loaded == roster()
    assert loaded.hash() == roster().hash()
    assert loaded.identities == tuple(identity.public for identity in IDENTITIES[:3])
    assert loaded.nominal_patients == 100 + 101 + 102


def test_position_is_found_by_identity() -> None:
    assert [roster().position_of(identity.public) for identity in IDENTITIES[:3]] == [0, 1, 2]
    with pytest.raises(PrivacyError, match="MF-144"):
        roster().position_of(IDENTITIES[3].public)


def test_roster_hash_covers_order_and_every_entry() -> None:
    one, two, three, four = ENTRIES
    others = [
        roster(two, one, three),
        roster(one, two),
        roster(one, two, four),
        roster(one, two, three, four),
        roster(one, two, signed_again(three, IDENTITIES[2], nominal_patients=5)),
        roster(one, two, signed_again(three, IDENTITIES[2], node_key=NODE_KEYS[3])),
        roster(one, two, signed_again(three, IDENTITIES[2], hospital="Other")),
        roster().model_copy(update={"coordinator": IDENTITIES[3].public.hex()}),
    ]
    assert len({each.hash() for each in [roster(), *others]}) == len(others) + 1


@pytest.mark.parametrize(
    "double",
    [
        ENTRIES[0],
        signed_again(ENTRIES[3], IDENTITIES[3], hospital="Hospital 0"),
        signed_again(ENTRIES[3], IDENTITIES[3], node_key=NODE_KEYS[0]),
        signed_again(ENTRIES[0], IDENTITIES[0], hospital="Hospital 9", node_key=NODE_KEYS[3]),
    ],
    ids=["whole entry", "name", "node key", "identity"],
)
def test_hospital_listed_twice_is_refused(double: Enrolment) -> None:
    roster().check()
    with pytest.raises(PrivacyError) as caught:
        roster(*ENTRIES[:3], double).check()
    assert caught.value.code == 143


def test_roster_with_a_forged_entry_is_refused(tmp_path: Path) -> None:
    """The coordinator cannot give a hospital another key, or another size, by itself."""
    path = tmp_path / "roster.json"
    for field in CHANGES:
        forged = ENTRIES[2].model_copy(update={field: CHANGES[field]})
        path.write_bytes(roster(*ENTRIES[:2], forged).to_bytes())
        with pytest.raises(MedfedError) as caught:
            load_roster(FILES, path)
        assert caught.value.code in {110, 143}


@pytest.mark.parametrize("count", [0, 129])
def test_roster_of_a_wrong_size_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "roster.json"
    value = roster().model_dump()
    value["hospitals"] = [value["hospitals"][0]] * count
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="MF-201"):
        load_roster(FILES, path)
