"""Making a coordinator's folder: authority, certificate, identity, configuration; and the roster.

server.toml              where to listen, which study to run
identity.key             Ed25519, signs every request to hospitals
tls/                     the authority and the server's certificate
roster.json              the enrolled hospitals
studies/HASH/            checkpoints, final model and results of a run
runs/witnesses.bin       the newest heads of hospitals' ledgers
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medfed.errors import ConfigError, PrivacyError
from medfed.health import HealthSection
from medfed.identity import Identity, create_identity, load_identity
from medfed.roster import Enrolment, Roster, load_enrolment, load_roster
from medfed.seams import Seams
from medfed.server.certificates import (
    CertificateFiles,
    check_host_names,
    create_authority,
    create_server_certificate,
)
from medfed.toml_files import StrictModel, load

CONFIG_NAME, ROSTER_NAME, STUDY_NAME, MODEL_NAME = "server.toml", "roster.json", "study.toml", "first_model.safetensors"


def certificate_files(folder: Path) -> CertificateFiles:
    """Where a coordinator's TLS files lie."""
    tls = folder / "tls"
    return CertificateFiles(tls / "ca.crt", tls / "ca.key", tls / "server.crt", tls / "server.key")


class Listen(StrictModel):
    """The public port takes hospitals only; the admin port serves this machine only."""

    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Annotated[int, Field(ge=0, le=65535)]
    admin_port: Annotated[int, Field(ge=0, le=65535)]


class Run(StrictModel):
    study: Annotated[str, Field(min_length=1, max_length=4096)]


class Rehearsal(StrictModel):
    """Marks the statement of every run: its hospitals are simulated, whoever signed."""

    simulated: Literal[True]


class ServerConfig(StrictModel):
    """``server.toml``."""

    listen: Listen
    run: Run
    health: HealthSection | None = None
    rehearsal: Rehearsal | None = None

    @property
    def is_rehearsal(self) -> bool:
        """Whether everything this coordinator leaves is to be marked as a simulation."""
        return self.rehearsal is not None


@dataclass(frozen=True, slots=True)
class Office:
    """The coordinator's folder, opened."""

    folder: Path
    config: ServerConfig
    seams: Seams

    @property
    def certificates(self) -> CertificateFiles:
        return certificate_files(self.folder)

    @property
    def study_path(self) -> Path:
        return self.folder / self.config.run.study

    def identity(self) -> Identity:
        return load_identity(self.seams.files, self.folder / "identity.key")


def init_office(seams: Seams, folder: Path, names: Sequence[str], listen: Listen) -> Identity:
    """Lay out a new coordinator's folder; ``names`` are the host names and addresses hospitals will use.

    Raises, with nothing written: MF-212 if the folder is in use, MF-203 for a name that cannot be one.
    """
    if seams.files.exists(folder / CONFIG_NAME):
        raise ConfigError(212, f"{CONFIG_NAME} exists in this folder", "edit it, or name another folder")
    tls = certificate_files(folder)
    check_host_names(names)
    for path in (folder / "identity.key", tls.authority, tls.authority_key, tls.certificate, tls.key):
        if seams.files.exists(path):
            raise ConfigError(212, f"{path.name} exists in this folder", "name an empty folder")
    seams.files.make_folder(folder, private=True)
    seams.files.make_folder(folder / "tls", private=True)
    create_authority(seams.files, tls, seams.clock)
    create_server_certificate(seams.files, tls, names, seams.clock)
    identity = create_identity(seams.files, folder / "identity.key", seams.entropy)
    seams.files.write(folder / CONFIG_NAME, _config_text(listen).encode())
    return identity


def _config_text(listen: Listen) -> str:
    return f"""\
[listen]
host = {json.dumps(listen.host)}                 # the address hospitals' connections come in on
port = {listen.port}                      # open this port, and no other, to the hospitals
admin_port = {listen.admin_port}                # loopback only; never open it

[run]
study = {json.dumps("study/" + STUDY_NAME)}        # made by: medfed-server study new

# [health]                           # for probes (gRPC health service): says serving or not, and nothing else
# address = "127.0.0.1:8081"
"""


def load_office(seams: Seams, config_path: Path) -> Office:
    """Open a coordinator's folder by its ``server.toml``."""
    config = load(seams.files, config_path, ServerConfig)
    return Office(config_path.resolve().parent, config, seams)


def enroll(seams: Seams, folder: Path, paths: Sequence[Path]) -> Roster:
    """Put hospitals' documents into the roster. A hospital of the same name gets its entry replaced, others are added.

    Raises, with the roster unchanged: ``PrivacyError`` MF-143 for a hospital that is listed twice or under two names.
    """
    identity = load_identity(seams.files, folder / "identity.key")
    roster_path = folder / ROSTER_NAME
    entries: dict[str, Enrolment] = {}
    if seams.files.exists(roster_path):
        entries = {entry.hospital: entry for entry in load_roster(seams.files, roster_path).hospitals}
    given: dict[str, Enrolment] = {}
    for path in paths:
        document = load_enrolment(seams.files, path)
        if given.setdefault(document.hospital, document) != document:
            raise PrivacyError(143, f"two documents are of {document.hospital}", "enrol each hospital once")
    entries |= given
    if not 1 <= len(entries) <= 128:
        raise ConfigError(140, f"{len(entries)} hospitals", "a roster holds 1 to 128")
    roster = Roster(format="medfed-roster-1", coordinator=identity.public.hex(), hospitals=list(entries.values()))
    roster.check()
    seams.files.write(roster_path, roster.to_bytes())
    return roster
