"""The roster: which hospitals take part, by keys that people have confirmed.

A hospital writes an *enrolment document* (signed by its identity), hands it to the coordinator and to the other
hospitals by a way of their own choosing, and reads its fingerprint to them. The coordinator puts the documents into one
*roster*; a position in it is a hospital's number in every message. A study pins the roster's hash. A roster only ever grows
at its end, so that positions stay what they are: one that the study's own begins is an *extension* of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.errors import ConfigError, PrivacyError, RemoteProtocolError
from medfed.identity import Identity, check_node_key, check_public, fingerprint, verify
from medfed.seams import Files
from medfed.study import Study
from medfed.wire import enc

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
HospitalName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")]

DocumentT = TypeVar("DocumentT", bound="_Document")

_LIMIT_BYTES = 1 << 20


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Enrolment(_Document):
    """One hospital's public keys and its declared, public number of patients; signed by the identity it names."""

    format: Literal["medfed-enrolment-1"]
    hospital: HospitalName
    identity: Hex32
    node_key: Annotated[str, Field(max_length=400)]
    nominal_patients: Annotated[int, Field(ge=1, le=100_000_000)]
    signature: Hex64

    @property
    def public(self) -> bytes:
        return bytes.fromhex(self.identity)

    @property
    def fingerprint(self) -> str:
        """What this hospital's people read out to the others: covers every field."""
        return fingerprint(self._signed_bytes())

    def _signed_bytes(self) -> bytes:
        return enc(
            b"medfed/enrolment/v1",
            self.hospital.encode(),
            self.public,
            self.node_key.encode(),
            self.nominal_patients.to_bytes(8, "big"),
        )

    def check(self) -> None:
        """Raise MF-110, MF-170 or MF-211 unless signature, identity and node key are good."""
        check_public(self.public)
        check_node_key(self.node_key)
        verify(self.public, bytes.fromhex(self.signature), self._signed_bytes())

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n").encode()


def check_nominal_patients(nominal_patients: int) -> None:
    """Raise MF-203 for a number of patients that no enrolment document may declare."""
    if not 1 <= nominal_patients <= 100_000_000:
        raise ConfigError(203, f"{nominal_patients} patients", "declare a whole number from 1 to 100000000")


def require_small_delta(delta: float, nominal_patients: int, remedy: str) -> None:
    """Raise ``PrivacyError`` MF-131 if ``delta`` exceeds a tenth of 1 in so many patients of one hospital."""
    if delta * nominal_patients > 0.1:
        raise PrivacyError(131, f"delta {delta:g} exceeds a tenth of 1 in {nominal_patients} patients", remedy)


def enrol(identity: Identity, hospital: str, node_key: str, nominal_patients: int) -> Enrolment:
    """Write and sign an enrolment document."""
    check_nominal_patients(nominal_patients)
    try:
        unsigned = Enrolment(
            format="medfed-enrolment-1",
            hospital=hospital,
            identity=identity.public.hex(),
            node_key=node_key,
            nominal_patients=nominal_patients,
            signature="0" * 128,
        )
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(203, f"{field} not usable", "names: letters, digits, space . _ - (at most 64)") from error
    return unsigned.model_copy(update={"signature": identity.sign(unsigned._signed_bytes()).hex()})


class Roster(_Document):
    """The coordinator's identity and the hospitals in the order of their positions 0, 1, ..."""

    format: Literal["medfed-roster-1"]
    coordinator: Hex32
    hospitals: Annotated[list[Enrolment], Field(min_length=1, max_length=128)]

    def canonical_bytes(self) -> bytes:
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def hash(self) -> bytes:
        """SHA-256 over the canonical bytes, 32 bytes; a study pins it."""
        return hashlib.sha256(enc(b"medfed/roster/v1", self.canonical_bytes())).digest()

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n").encode()

    def check(self) -> None:
        """Raise unless every document verifies, no name or key stands twice (MF-143) and every key is good (MF-170)."""
        check_public(bytes.fromhex(self.coordinator))
        for distinct in (
            [entry.hospital for entry in self.hospitals],
            [entry.identity for entry in self.hospitals],
            [entry.node_key for entry in self.hospitals],
        ):
            if len(set(distinct)) != len(distinct):
                raise PrivacyError(143, "a hospital is listed twice in the roster", "enrol each hospital once")
        for entry in self.hospitals:
            entry.check()

    def begins(self, digest: bytes, hospitals: int) -> bool:
        """Whether this coordinator's first ``hospitals`` hospitals are the roster whose hash ``digest`` is."""
        if hospitals > len(self.hospitals):
            return False
        return self.model_copy(update={"hospitals": self.hospitals[:hospitals]}).hash() == digest

    def extends(self, study: Study) -> bool:
        """Whether this is the roster that the study pins, or an extension of it."""
        return self.begins(bytes.fromhex(study.cohort.roster_sha256), study.cohort.hospitals)

    def patients_at_start(self, study: Study) -> int:
        """Declared patients of the hospitals that the study began with: the weights of updates are shares of these, whoever
        joins, so that a state is the same under every extension."""
        return self.patients_of(range(study.cohort.hospitals))

    @property
    def identities(self) -> tuple[bytes, ...]:
        """Ed25519 public keys by position."""
        return tuple(entry.public for entry in self.hospitals)

    def patients_of(self, positions: Iterable[int]) -> int:
        """Declared patients of these hospitals together. MF-111 for a position that is not in the roster."""
        found = list(positions)
        if any(position >= len(self.hospitals) for position in found):
            raise RemoteProtocolError(111, "a survivor is not in the roster", "refused")
        return sum(self.hospitals[position].nominal_patients for position in found)

    @property
    def nominal_patients(self) -> int:
        """The declared patients of all hospitals together: part of the public divisor."""
        return sum(entry.nominal_patients for entry in self.hospitals)

    def position_of(self, public: bytes) -> int:
        """Position of a hospital by its identity; MF-144 if it is not listed."""
        for position, entry in enumerate(self.hospitals):
            if entry.public == public:
                return position
        raise PrivacyError(144, "this hospital is not in the roster", "ask the coordinator to enrol it")


def load_enrolment(files: Files, path: Path) -> Enrolment:
    """Read and verify one enrolment document."""
    document = _parse(files, path, Enrolment)
    _checked(document, path)
    return document


def load_roster(files: Files, path: Path) -> Roster:
    """Read and verify a roster."""
    document = _parse(files, path, Roster)
    _checked(document, path)
    return document


def _checked(document: Enrolment | Roster, path: Path) -> None:
    try:
        document.check()
    except RemoteProtocolError as error:
        what = "a signature" if error.code == 110 else "an identity key"
        raise RemoteProtocolError(
            error.code, f"{what} in {path.name} does not verify", "ask for the file anew"
        ) from error


def _parse(files: Files, path: Path, kind: type[DocumentT]) -> DocumentT:
    try:
        return kind.model_validate_json(files.read(path, limit_bytes=_LIMIT_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(
            201, f"{path.name} is no {kind.__name__.lower()} document: {where} is wrong", "ask for it anew"
        ) from error
