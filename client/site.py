"""A hospital's folder: its configuration, keys, data and ledger, as ``medfed-client init`` laid them out.

hospital.toml      what this hospital allows; sovereign over any study
identity.key       Ed25519, signs everything this hospital says
node.key           EC P-384, Flower's connection key
patients.key       secret of the keyed hashes of patient ids
enrolment.json     the public document to hand to the coordinator and the other hospitals
ledger.db          privacy spending; ledger.db.behind: a later row that others saw of it, which locks it
witnesses.bin      the newest heads of the peers' ledgers
studies/HASH/      one approved study: plan, roster, model state, outbox, final model
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.client.ledger import PatientIds
from medfed.client.policy import HospitalConfig
from medfed.client.sources.hospital_records import read_records
from medfed.errors import ConfigError, EnvironmentFault
from medfed.identity import Identity, load_identity
from medfed.models.records import Records
from medfed.seams import Seams
from medfed.study import Study
from medfed.toml_files import load

CONFIG_NAME = "hospital.toml"
PATIENTS_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Site:
    """One hospital's folder, opened."""

    folder: Path
    config: HospitalConfig
    seams: Seams

    @property
    def identity_path(self) -> Path:
        return self.folder / "identity.key"

    @property
    def node_key_path(self) -> Path:
        return self.folder / "node.key"

    @property
    def patients_key_path(self) -> Path:
        return self.folder / "patients.key"

    @property
    def enrolment_path(self) -> Path:
        return self.folder / "enrolment.json"

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledger.db"

    def study_folder(self, study_hash: bytes) -> Path:
        return self.folder / "studies" / study_hash.hex()

    def identity(self) -> Identity:
        return load_identity(self.seams.files, self.identity_path)

    def read_records(self, study: Study) -> Records:
        """All of this hospital's records, encoded by the study's contract. ``DataError`` MF-301 at the first fault."""
        return read_records(self.seams.files, self.folder, self.config.data, study)

    def keyed_hashes(self, patients: tuple[str, ...]) -> tuple[bytes, ...]:
        """HMAC-SHA256 of each patient id under this hospital's secret: tells patients apart, names nobody."""
        key = self._patients_key()
        return tuple(hmac.digest(key, b"medfed/patient/v1" + patient.encode(), hashlib.sha256) for patient in patients)

    def patient_ids(self) -> PatientIds:
        """What ``keyed_hashes`` are made by, for the ledger to hold on to: the key only as a commitment to it."""
        commitment = hmac.digest(self._patients_key(), b"medfed/patients-key/v1", hashlib.sha256)
        return PatientIds(commitment, self.config.data.patient_column)

    def holdout(self, patients: tuple[str, ...]) -> NDArray[np.bool_]:
        """Which records are set aside for evaluation and never train: bool[n], by a keyed hash of the patient id.

        All records of a patient fall on the same side, whatever file they come in.
        """
        key = self._patients_key()
        bar = self.config.data.holdout * 2.0**64
        digests = (hmac.digest(key, b"medfed/holdout/v1" + patient.encode(), hashlib.sha256) for patient in patients)
        return np.array([int.from_bytes(digest[:8], "big") < bar for digest in digests], np.bool_)

    def _patients_key(self) -> bytes:
        """Another key would make strangers of the same patients; the ledger knows it by ``patient_ids``."""
        key = self.seams.files.read_private(self.patients_key_path)
        if len(key) != PATIENTS_KEY_BYTES:
            raise EnvironmentFault(
                211, f"{self.patients_key_path.name} is not the key made here", "restore it from backup"
            )
        return key


def load_site(seams: Seams, config_path: Path) -> Site:
    """Open a hospital's folder by its ``hospital.toml``."""
    if not seams.files.exists(config_path):
        raise ConfigError(606, f"{config_path.name} not found", "run medfed-client init, or name it with --config")
    config = load(seams.files, config_path, HospitalConfig)
    return Site(config_path.resolve().parent, config, seams)
