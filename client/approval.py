"""A person's decision to take part: what a study asks in plain words, who else is in, what it costs; then the pin.

``review`` checks everything that can be checked without spending; ``approve`` writes the study's files and one ledger row.
Only what was approved here is ever answered, whatever the coordinator sends later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medfed.advance import first_state
from medfed.client.approved import Approved
from medfed.client.compute import Compute
from medfed.client.ledger import Approval, ApprovalOutlook, Caps, Ledger
from medfed.client.own_models import allowed_model
from medfed.client.site import Site
from medfed.client.trainer import number_patients
from medfed.errors import ConfigError, DataError, PrivacyError
from medfed.identity import fingerprint
from medfed.models import parameters
from medfed.models.records import Records
from medfed.privacy.plan import Plan, make_plan
from medfed.roster import Enrolment, Roster, load_enrolment, load_roster, require_small_delta
from medfed.study import Study, load_study

STUDY_NAME, ROSTER_NAME, MODEL_NAME = "study.toml", "roster.json", "first_model.safetensors"
MINIMUM_PATIENTS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Review:
    """A study that passed every check, and what the person who approves it should know."""

    study: Study
    roster: Roster
    position: int
    plan: Plan
    model_file: bytes
    records: Records
    unconfirmed: tuple[Enrolment, ...]
    holdout_patients: int
    training_patients: int


def caps_of(site: Site) -> Caps:
    """The two caps of this hospital's policy."""
    return site.config.policy.caps


def review(site: Site, study_path: Path, peer_paths: Sequence[Path], standing: Approval | None = None) -> Review:
    """Check a study and its attachments (which lie beside it) against this hospital's policy, data and confirmed peers.

    ``standing``: the approval that stands already, whose confirmed peers stay confirmed.
    Raises, with nothing spent or written: ``ConfigError`` for unreadable files, ``PrivacyError`` MF-120 expired, MF-124
    attachments of another hash, MF-130..149 policy, roster and epsilon, ``DataError`` MF-301/310.
    """
    files = site.seams.files
    study = load_study(files, study_path)
    require_not_expired(site, study)
    roster = checked_roster(site, study, study_path.parent / ROSTER_NAME)
    position = own_position(site, roster)
    model_file = read_first_model(site, study, study_path.parent / MODEL_NAME)
    model = allowed_model(study, site.config.policy)
    parameters.from_safetensors(model, model_file)
    plan = make_plan(study, parameters.count(model))
    site.config.policy.admit(study)
    check_claims(study, plan, roster.hospitals[position].nominal_patients)
    unconfirmed = unconfirmed_peers(site, study, roster, peer_paths, standing)
    records = site.read_records(study)
    training = require_patients_to_train(records.patients, site.holdout(records.patients))
    total = len(set(records.patients))
    return Review(study, roster, position, plan, model_file, records, unconfirmed, total - training, training)


def require_not_expired(site: Site, study: Study) -> None:
    """Raise MF-120 once the study's last day is over."""
    if study.expired(site.seams.clock.wall()):
        raise PrivacyError(120, f"study {study.study.name} expired on {study.study.expires}", "ask for a new one")


def read_first_model(site: Site, study: Study, path: Path) -> bytes:
    """The first model's file; MF-124 if the study pins another."""
    data = site.seams.files.read(path)
    if parameters.file_hash(data) != study.model.first_model_sha256:
        raise PrivacyError(124, f"{path.name} is not the study's first model", "ask the coordinator for its files anew")
    return data


def require_patients_to_train(patients: Sequence[str], held_out: Iterable[bool]) -> int:
    """How many of the records' patients train, MF-310 if too few."""
    training = len({patient for patient, out in zip(patients, held_out, strict=True) if not out})
    if training < MINIMUM_PATIENTS:
        raise DataError(310, f"fewer than {MINIMUM_PATIENTS} patients to train on", "check the data file and holdout")
    return training


def checked_roster(site: Site, study: Study, path: Path) -> Roster:
    """The roster that the study pins, or an extension of it. Raises MF-124 for another, MF-149 if its coordinator is not the one
    confirmed here."""
    roster = load_roster(site.seams.files, path)
    if not roster.extends(study):
        raise PrivacyError(
            124,
            f"{path.name} is not the study's roster, nor one that only adds hospitals at its end",
            "ask the coordinator for its files anew",
        )
    confirmed = site.config.coordinator.identity
    if confirmed is not None and _digits(confirmed) != _digits(coordinator_fingerprint(roster)):
        raise PrivacyError(149, "the roster's coordinator is not the one in hospital.toml", "telephone; do not approve")
    return roster


def coordinator_fingerprint(roster: Roster) -> str:
    """What the coordinator's people read out."""
    return fingerprint(bytes.fromhex(roster.coordinator))


def _digits(text: str) -> str:
    return text.replace(" ", "").lower()


def own_position(site: Site, roster: Roster) -> int:
    """This hospital's place in the roster; its entry must be the document it signed."""
    own = load_enrolment(site.seams.files, site.enrolment_path)
    position = roster.position_of(own.public)
    if roster.hospitals[position] != own:
        raise PrivacyError(144, "the roster's entry for this hospital is not its own document", "enrol again")
    return position


def check_claims(study: Study, plan: Plan, nominal_patients: int) -> None:
    """Raise MF-135 if the study states too small an epsilon, MF-131 if its delta is too large for so many declared patients."""
    if plan.epsilon > study.privacy.epsilon:
        raise PrivacyError(
            135, f"the study states epsilon {study.privacy.epsilon:g}, it is {plan.epsilon:.4f}", "ask for a true one"
        )
    require_small_delta(study.privacy.delta, nominal_patients, "ask for a study with a smaller delta")


def unconfirmed_peers(
    site: Site, study: Study, roster: Roster, peer_paths: Sequence[Path], standing: Approval | None
) -> tuple[Enrolment, ...]:
    """The peers without a document this hospital received itself: each could be the coordinator's invention.

    Those confirmed in ``standing`` stay so. Raises MF-147 for more than the study's colluders in the whole roster, MF-148.
    """
    confirmed = {roster.position_of(site.identity().public)}
    if standing is not None:
        confirmed |= {
            place
            for place, entry in enumerate(approved_beginning(study, roster, standing))
            if entry.public not in standing.unconfirmed
        }
    for path in peer_paths:
        confirmed.add(_confirm(roster, load_enrolment(site.seams.files, path)))
    missing = [entry for place, entry in enumerate(roster.hospitals) if place not in confirmed]
    if len(missing) > study.cohort.colluders:
        names = ", ".join(entry.hospital for entry in missing)
        raise PrivacyError(
            147,
            f"{len(missing)} hospitals are unconfirmed ({names}), the study allows for {study.cohort.colluders} colluders",
            "get their enrolment documents from them and pass --peers",
        )
    return tuple(missing)


def approved_beginning(study: Study, roster: Roster, standing: Approval) -> tuple[Enrolment, ...]:
    """Those of the roster's hospitals that are in the approved one: its first. MF-125 if it does not begin with them."""
    for hospitals in range(study.cohort.hospitals, len(roster.hospitals) + 1):
        if roster.begins(standing.roster, hospitals):
            return tuple(roster.hospitals[:hospitals])
    raise PrivacyError(
        125,
        "this study is approved here with another roster, which this one does not begin with",
        "a roster only grows at its end: ask the coordinator for the latest, and telephone the others if this is it",
    )


def _confirm(roster: Roster, document: Enrolment) -> int:
    for place, entry in enumerate(roster.hospitals):
        if entry == document:
            return place
        if entry.public == document.public or entry.hospital == document.hospital:
            raise PrivacyError(
                148, f"the roster's {entry.hospital} is not the hospital you confirmed", "telephone it; do not approve"
            )
    raise PrivacyError(148, f"{document.hospital} is confirmed but not in the roster", "ask the coordinator")


def approve(site: Site, reviewed: Review, ledger: Ledger) -> ApprovalOutlook:
    """Pin the study: its files into this hospital's folder, then one ledger row. Raises MF-501 above a cap, MF-340 if
    patients are told apart by another key or column than in the studies before."""
    study, files = reviewed.study, site.seams.files
    folder = site.study_folder(study.hash())
    approval, patients = _ledger_approval(site, reviewed), snapshot(site, reviewed)
    ledger.preview(approval, patients, caps_of(site))
    files.make_folder(folder, private=True)
    files.write(folder / "study.json", study.canonical_bytes())
    files.write(folder / ROSTER_NAME, reviewed.roster.to_bytes())
    files.write(folder / MODEL_NAME, reviewed.model_file)
    return ledger.approve(approval, patients, caps_of(site))


def preview(site: Site, reviewed: Review, ledger: Ledger) -> ApprovalOutlook:
    """What ``approve`` would cost, without writing. Raises MF-501 above a cap."""
    return ledger.preview(_ledger_approval(site, reviewed), snapshot(site, reviewed), caps_of(site))


def snapshot(site: Site, reviewed: Review) -> tuple[bytes, ...]:
    """Keyed hashes of every patient in the data, held-out ones included: what the account is keyed by."""
    return tuple(sorted(set(site.keyed_hashes(reviewed.records.patients))))


def _ledger_approval(site: Site, reviewed: Review) -> Approval:
    study = reviewed.study
    return Approval(
        study=study.hash(),
        name=study.study.name,
        roster=reviewed.roster.hash(),
        first_model=bytes.fromhex(study.model.first_model_sha256 or ""),
        mechanism=reviewed.plan.mechanism,
        attempts=reviewed.plan.attempts,
        delta=study.privacy.delta,
        nominal_patients=reviewed.roster.hospitals[reviewed.position].nominal_patients,
        unconfirmed=tuple(entry.public for entry in reviewed.unconfirmed),
        approved_wall_s=site.seams.clock.wall(),
        ids=site.patient_ids(),
        stages=study.stages,
        holdout=pinned_holdout(site, study),
    )


def pinned_holdout(site: Site, study: Study) -> float | None:
    """The share of held-out patients, where the price counts on no patient being both held out and trained on."""
    return site.config.data.holdout if study.metrics is not None else None


def load_approved(site: Site, study_hash: bytes, ledger: Ledger) -> Approved:
    """What was approved under ``study_hash``, every pin checked again, with today's data; to be computed on the processor.

    Raises: MF-124 if a file changed, MF-340 if there are patients that were not in the approval's snapshot, if they are told
    apart by another key or column, or if who is held out changed under a study with metrics.
    """
    files, folder = site.seams.files, site.study_folder(study_hash)
    study = _read_study(files.read(folder / "study.json"), study_hash)
    roster = checked_roster(site, study, folder / ROSTER_NAME)
    if roster.hash() != ledger.approved(study_hash).approval.roster:
        raise PrivacyError(124, "the approved roster was changed on disk", "approve the study again")
    model_file = files.read(folder / MODEL_NAME)
    if parameters.file_hash(model_file) != study.model.first_model_sha256:
        raise PrivacyError(124, "the approved first model was changed on disk", "approve the study again")
    site.config.policy.admit(study)  # it may have been tightened since
    model = allowed_model(study, site.config.policy)
    first = first_state(parameters.from_safetensors(model, model_file), study)
    ledger.require_same_ids(site.patient_ids())
    records = site.read_records(study)
    if not ledger.patients(study_hash).issuperset(site.keyed_hashes(records.patients)):
        raise PrivacyError(340, "there are patients that were not in the data when it was approved", "restore the data")
    if ledger.approved(study_hash).approval.holdout != pinned_holdout(site, study):
        raise PrivacyError(340, "holdout changed since this study with metrics was approved", "set it as it was")
    held_out = site.holdout(records.patients)
    return Approved(
        study=study,
        roster=roster,
        # by key: a renewed enrolment document holds for studies to come
        position=roster.position_of(site.identity().public),
        plan=make_plan(study, parameters.count(model)),
        model=model,
        first=first,
        patients=number_patients(study, records.subset(~held_out)),
        holdout=records.subset(held_out),
        folder=folder,
        compute=Compute(),
    )


def _read_study(data: bytes, study_hash: bytes) -> Study:
    try:
        study = Study.model_validate_json(data)
    except ValueError as error:
        raise ConfigError(124, "the approved study was changed on disk", "approve it again") from error
    if study.hash() != study_hash:
        raise PrivacyError(124, "the approved study was changed on disk", "approve it again")
    return study
