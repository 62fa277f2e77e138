"""What this hospital allows: ``hospital.toml``, and the refusal of every study that asks for more.

The file is sovereign. Nothing a study or the coordinator says can widen it, and nothing that carries a guarantee has a
default: a hospital that has not decided does not take part.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from medfed.client.ledger import Caps
from medfed.errors import PrivacyError
from medfed.health import HealthSection
from medfed.model_choice import ModelName, Own, PackageName
from medfed.seams import Files
from medfed.study import Study
from medfed.task_choice import TaskKind
from medfed.toml_files import StrictModel, load

Text = Annotated[str, Field(min_length=1, max_length=256)]
PathText = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
Host = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
Epsilon = Annotated[float, Field(gt=0, le=1000)]
MIN_HOSPITALS = 3


class HospitalSection(StrictModel):
    """Who this is. Identity, keys, ledger and outbox lie beside ``hospital.toml``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$", description="letters, digits, ._- ")]


class CoordinatorSection(StrictModel):
    """Where the coordinator is and how it is recognised. Paths are relative to the folder of ``hospital.toml``.

    ``proxy`` is an HTTP proxy for the outbound connection; ``identity`` the fingerprint (64 hex digits, blanks
    allowed) of the coordinator's key, read out over the telephone.
    """

    address: Annotated[str, Field(pattern=rf"^{Host}:[0-9]{{1,5}}$", description='"host:port"')]
    ca_certificate: PathText
    proxy: Annotated[str, Field(pattern=r"^https?://\S+$", max_length=512, description='"http://host:port"')] | None = (
        None
    )
    identity: Annotated[str, Field(pattern=r"^[0-9a-fA-F ]{64,79}$", description="64 hex digits")] | None = None

    @field_validator("address")
    @classmethod
    def _port(cls, address: str) -> str:
        if not 1 <= int(address.rpartition(":")[2]) <= 65535:
            raise ValueError("must end in a port from 1 to 65535")
        return address

    @field_validator("identity")
    @classmethod
    def _digits(cls, identity: str | None) -> str | None:
        plain = identity.replace(" ", "").lower() if identity else None
        if plain is not None and len(plain) != 64:
            raise ValueError("must have 64 hex digits")
        return plain


class DataSection(StrictModel):
    """Where the records are. Paths are relative to the folder of ``hospital.toml``.

    ``path``: the table, one row a record. ``images``: the folder of the image files that a column of the table names.
    ``series``: the table of measurements, each with its time in hours in ``time_column``. ``events``: the table of coded
    events, each with its date or day in ``event_time_column`` and its code in ``code_column``. ``vocabulary``: the
    file of a public vocabulary that a study of texts names. ``record_column`` stands in all
    tables and tells the records of a patient apart; without it a patient has one series. ``columns`` maps the study's name
    of a column (of either table) to the local one, where they differ. ``holdout`` is the share of patients, by a keyed hash
    of their id, that never train.
    """

    path: PathText
    patient_column: Text
    images: PathText | None = None
    series: PathText | None = None
    events: PathText | None = None
    vocabulary: PathText | None = None
    event_time_column: Text = "days"
    code_column: Text = "code"
    time_column: Text = "hours"
    record_column: Text | None = None
    columns: Annotated[dict[Text, Text], Field(default_factory=dict, max_length=10_000)]
    holdout: Annotated[float, Field(ge=0, le=0.5)] = 0.0

    @field_validator("columns")
    @classmethod
    def _one_to_one(cls, columns: dict[str, str]) -> dict[str, str]:
        if len(set(columns.values())) != len(columns):
            raise ValueError("names one local column twice")
        return columns


class ComputeSection(StrictModel):
    """What gradients of deep models may use. ``device``: ``auto`` is CUDA where it is usable, else the processor.

    ``memory_gib``: most of a GPU's memory that this process takes, and least that must be free when it starts. ``engine``: what
    takes gradients patient by patient; ``auto`` is medfed's own, where it knows all layers of a model. ``precision``: what it
    computes products and convolutions of deep models in; norms and sums are float32 or wider in any case.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,2})$")] = "auto"
    memory_gib: Annotated[float, Field(gt=0, le=4096)] | None = None
    engine: Literal["auto", "opacus"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"


class Policy(StrictModel):
    """The bounds, every one of which but ``hours`` and ``own_models`` must be set, and the gate: a study passes ``admit`` or is
    refused by name."""

    max_epsilon_study: Annotated[Epsilon, Field(description="most a study may cost one patient, at its own delta")]
    max_epsilon_lifetime: Annotated[Epsilon, Field(description="most all studies together may cost one patient")]
    lifetime_delta: Annotated[float, Field(gt=0, le=0.01, description="the delta of max_epsilon_lifetime")]
    max_delta: Annotated[float, Field(gt=0, le=0.01)]
    min_noise_multiplier: Annotated[float, Field(gt=0, le=10_000)]
    min_hospitals: Annotated[int, Field(ge=MIN_HOSPITALS, le=128)]
    min_honest: Annotated[int, Field(ge=2, le=127, description="least number of hospitals beyond the colluders")]
    min_colluders: Annotated[int, Field(ge=1, le=126, description="how many bad hospitals a study must allow for")]
    modes: Annotated[list[Literal["local", "distributed"]], Field(min_length=1, max_length=2)]
    units: Annotated[list[Literal["patient", "record"]], Field(min_length=1, max_length=2)]
    tasks: Annotated[list[TaskKind], Field(min_length=1, max_length=16)]
    models: Annotated[list[ModelName], Field(min_length=1, max_length=len(get_args(ModelName)))]
    max_sampling_rate: Annotated[float, Field(gt=0, le=1)]
    max_attempts: Annotated[int, Field(ge=1, le=110_000)]
    max_records_per_patient: Annotated[int, Field(ge=1, le=10_000)]

    own_models: Annotated[
        list[PackageName],
        Field(default_factory=list, max_length=64, description="packages whose code may make models here, by name"),
    ]
    hours: Annotated[
        Annotated[str, Field(pattern=rf"^{_TIME}-{_TIME}$")] | None,
        Field(description='such as "20:00-06:00", local time'),
    ] = None

    def is_within_hours(self, wall_s: float) -> bool:
        """Whether this hospital takes part at this time, seconds since 1970: local time, the first minute in, the last out;
        always without ``hours``. A span may go over midnight."""
        if self.hours is None:
            return True
        now = datetime.fromtimestamp(wall_s)
        minute = now.hour * 60 + now.minute
        start, end = (int(each[:2]) * 60 + int(each[3:]) for each in self.hours.split("-"))
        return start <= minute < end if start < end else minute >= start or minute < end

    def next_opening(self, wall_s: float) -> float | None:
        """When this hospital takes part again, seconds since 1970; None while it does."""
        if self.hours is None or self.is_within_hours(wall_s):
            return None
        now = datetime.fromtimestamp(wall_s)
        opens = now.replace(hour=int(self.hours[:2]), minute=int(self.hours[3:5]), second=0, microsecond=0)
        return (opens if opens > now else opens + timedelta(days=1)).timestamp()

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if self.max_epsilon_study > self.max_epsilon_lifetime:
            raise ValueError("max_epsilon_study must not exceed max_epsilon_lifetime")
        return self

    @property
    def caps(self) -> Caps:
        """The ledger's caps on epsilon, which ``Ledger.approve`` and ``Ledger.reserve`` hold a study to."""
        return Caps(self.max_epsilon_study, self.max_epsilon_lifetime, self.lifetime_delta)

    def admit(self, study: Study) -> None:
        """Raise ``PrivacyError`` for the first bound that ``study`` breaks.

        130 noise multiplier, 131 delta, 132 attempts or sampling rate, 134 mode, task, model, unit or record cap, 140
        too few hospitals, 141 colluders. Epsilon is not judged here: the ledger does (MF-501), over the whole account.
        """
        self._admit_noise(study)
        self._admit_kind(study)
        self._admit_cohort(study)

    def _admit_noise(self, study: Study) -> None:
        privacy, attempts = study.privacy, study.attempts
        # written so that a NaN is refused as well
        beside = [part.noise_multiplier for part in (study.statistics, study.metrics) if part is not None]
        multiplier = min([privacy.noise_multiplier, *(each or 0.0 for each in beside)])
        _need(
            multiplier >= self.min_noise_multiplier and multiplier < float("inf"),
            130,
            f"noise multiplier {multiplier:g} is below this hospital's {self.min_noise_multiplier:g}",
            "min_noise_multiplier",
        )
        _need(
            0 < privacy.delta <= self.max_delta,
            131,
            f"delta {privacy.delta:g} is above this hospital's {self.max_delta:g}",
            "max_delta",
        )
        _need(
            0 < privacy.sampling_rate <= self.max_sampling_rate,
            132,
            f"sampling rate {privacy.sampling_rate:g} is above this hospital's {self.max_sampling_rate:g}",
            "max_sampling_rate",
        )
        _need(
            1 <= attempts <= self.max_attempts,
            132,
            f"{attempts} attempts, {study.training.spare_attempts} of them spare, "
            f"are more than this hospital's {self.max_attempts}",
            "max_attempts",
        )

    def _admit_kind(self, study: Study) -> None:
        privacy, most = study.privacy, study.data.max_records_per_patient
        _need(privacy.mode in self.modes, 134, f'mode "{privacy.mode}" is not allowed here', "modes")
        task, model = study.task.kind, study.model.name
        _need(task in self.tasks, 134, f'tasks of kind "{task}" are not allowed here', "tasks")
        _need(model in self.models, 134, f'model "{model}" is not allowed here', "models")
        self.admit_code(study)
        _need(privacy.unit in self.units, 134, f'privacy unit "{privacy.unit}" is not allowed here', "units")
        copies = 1 if study.training.augmentation is None else study.training.augmentation.copies
        _need(
            1 <= most * copies <= self.max_records_per_patient,
            134,
            f"{most * copies} records per patient, changed copies counted, are more than this hospital's "
            f"{self.max_records_per_patient}",
            "max_records_per_patient",
        )

    @property
    def allowed_packages(self) -> list[str]:
        """Whose code may make models here; none unless models lists "own", too."""
        return self.own_models if "own" in self.models else []

    def admit_code(self, study: Study) -> None:
        """Raise MF-134 for a study whose model is code of a package that this hospital did not name. To be asked before the model
        is made: that runs the code."""
        if isinstance(study.model, Own):
            allowed = study.model.package in self.allowed_packages
            _need(allowed, 134, f"code of package {study.model.package} is not allowed here", "models and own_models")

    def _admit_cohort(self, study: Study) -> None:
        cohort = study.cohort
        _need(
            cohort.fewest_survivors >= self.min_hospitals,
            140,
            f"sums of {cohort.fewest_survivors} hospitals are of fewer than this hospital's {self.min_hospitals}",
            "min_hospitals",
        )
        _need(
            cohort.colluders >= self.min_colluders,
            141,
            f"the study allows for {cohort.colluders} colluding hospitals, this hospital wants {self.min_colluders}",
            "min_colluders",
        )
        _need(
            cohort.honest_survivors >= self.min_honest,
            141,
            f"{cohort.colluders} colluders leave {cohort.honest_survivors} honest hospitals of {cohort.fewest_survivors}, "
            f"this hospital wants {self.min_honest}",
            "min_honest",
        )


class HospitalConfig(StrictModel):
    """``hospital.toml``."""

    hospital: HospitalSection
    coordinator: CoordinatorSection
    data: DataSection
    policy: Policy
    health: HealthSection | None = None
    compute: ComputeSection = Field(default_factory=ComputeSection)


def hours_in_words(hours: str, next_opening: float | None) -> str:
    """``20:00-06:00, now closed until 2027-01-05 20:00 (local time)``; ``next_opening``: of ``Policy.next_opening``."""
    if next_opening is None:
        return f"{hours}, now open (local time)"
    return f"{hours}, now closed until {datetime.fromtimestamp(next_opening):%Y-%m-%d %H:%M} (local time)"


def load_hospital(files: Files, path: Path) -> HospitalConfig:
    """Read ``hospital.toml``; every fault is one ``ConfigError`` line (201, 202, 203)."""
    return load(files, path, HospitalConfig)


def _need(holds: bool, code: int, what: str, key: str | None) -> None:
    if not holds:
        remedy = f"ask for another study, or change {key} in hospital.toml" if key else "ask for a corrected study"
        raise PrivacyError(code, what, remedy)
