"""Making a hospital's folder: keys, ledger, configuration, enrolment document."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from medfed.client.ledger import Ledger
from medfed.client.policy import HospitalConfig
from medfed.client.site import CONFIG_NAME, PATIENTS_KEY_BYTES, Site, load_site
from medfed.errors import ConfigError
from medfed.identity import create_identity, create_node_key
from medfed.model_choice import EXPERIMENTAL, ModelName
from medfed.roster import Enrolment, check_nominal_patients, enrol, load_enrolment
from medfed.seams import Seams
from medfed.task_choice import TaskKind
from medfed.toml_files import parse, quoted


@dataclass(frozen=True, slots=True)
class SiteOptions:
    """What ``medfed-client init`` is told. The caps have no defaults: a hospital decides them.

    ``images``, ``series``, ``events`` and ``record_column``: as in ``policy.DataSection``, for studies that read them.
    ``own_models``: packages whose code may make models here. ``experimental``: whether models that are not to be relied on
    yet are allowed.
    """

    name: str
    nominal_patients: int
    coordinator: str
    ca_certificate: str
    fingerprint: str | None
    proxy: str | None
    data: str
    patient_column: str
    holdout: float
    max_epsilon_study: float
    max_epsilon_lifetime: float
    lifetime_delta: float
    max_delta: float
    min_colluders: int
    images: str | None = None
    series: str | None = None
    events: str | None = None
    record_column: str | None = None
    own_models: tuple[str, ...] = ()
    experimental: bool = False


def init_site(seams: Seams, folder: Path, options: SiteOptions) -> Enrolment:
    """Lay out a new hospital's folder; refuses (MF-212) one that is in use, and writes nothing if an option is wrong."""
    text = _config_text(options)
    config_path = folder / CONFIG_NAME
    if seams.files.exists(config_path):
        raise ConfigError(212, f"{CONFIG_NAME} exists in this folder", "edit it, or name another folder")
    config = parse(text.encode(), CONFIG_NAME, HospitalConfig)
    check_nominal_patients(options.nominal_patients)
    site = Site(folder, config, seams)
    for path in (site.identity_path, site.node_key_path, site.patients_key_path, site.ledger_path, site.enrolment_path):
        if seams.files.exists(path):
            raise ConfigError(212, f"{path.name} exists in this folder", "name an empty folder")
    seams.files.make_folder(folder, private=True)
    identity = create_identity(seams.files, site.identity_path, seams.entropy)
    node_key = create_node_key(seams.files, site.node_key_path)
    seams.files.write(site.patients_key_path, seams.entropy.draw("patients", PATIENTS_KEY_BYTES), private=True)
    Ledger.create(seams.files, site.ledger_path, identity).close()
    document = enrol(identity, options.name, node_key, options.nominal_patients)
    seams.files.write(site.enrolment_path, document.to_bytes())
    seams.files.write(config_path, text.encode())  # last: its presence says that the folder is complete
    return document


def renew_enrolment(site: Site, nominal_patients: int) -> Enrolment:
    """A new document with another declared number of patients; same identity, same node key."""
    old = load_enrolment(site.seams.files, site.enrolment_path)
    document = enrol(site.identity(), site.config.hospital.name, old.node_key, nominal_patients)
    site.seams.files.write(site.enrolment_path, document.to_bytes())
    return document


def _config_text(options: SiteOptions) -> str:
    proxy = '# proxy = "http://proxy.example:3128"' if options.proxy is None else f"proxy = {quoted(options.proxy)}"
    identity = '# identity = "..."' if options.fingerprint is None else f"identity = {quoted(options.fingerprint)}"
    images = _line("images", options.images, "images")
    series = _line("series", options.series, "series.csv")
    events = _line("events", options.events, "events.csv")
    record_column = _line("record_column", options.record_column, "stay")
    own_models = f"own_models = {_listed(options.own_models)}"
    return f"""\
# What this hospital allows. Sovereign: nothing a study or the coordinator says can widen it.

[hospital]
name = {quoted(options.name)}

[coordinator]
address = {quoted(options.coordinator)}          # host:port; the only connection this hospital makes
ca_certificate = {quoted(options.ca_certificate)}  # the authority of the coordinator's certificate (or a bundle)
{proxy}
{identity}  # its fingerprint as its people read it to you, checked at approval

[data]
path = {quoted(options.data)}                # one row a record
patient_column = {quoted(options.patient_column)}   # whose record it is; write ids alike: 001 and 1 are two people
holdout = {options.holdout}                    # share of patients set aside for this hospital's own evaluation
{images}                  # folder of grey PNG files that a column of the table names
{series}              # table of measurements over time: the patient, the time, one column a variable
# time_column = "hours"              # of that table: hours since the patient's or record's beginning
{events}              # table of coded events: the patient, the day, the code
# event_time_column = "days"         # of that table: a date (2024-03-31) or a number of days
# code_column = "code"
# vocabulary = "vocabulary.txt"      # copy of the public vocabulary that a study of texts names
{record_column}             # in both tables, where a patient has several records

[data.columns]                       # study's name = "name in this file", where they differ, as in
# age = "Age (years)"

[policy]
max_epsilon_study = {options.max_epsilon_study}          # a study may not cost a patient more, all attempts included
max_epsilon_lifetime = {options.max_epsilon_lifetime}       # all studies on these patients together, for ever
lifetime_delta = {options.lifetime_delta}         # the delta at which the lifetime is counted
max_delta = {options.max_delta}              # largest delta of a study
min_noise_multiplier = 0.5           # less noise than this is no protection worth the name
min_hospitals = 3                    # fewest hospitals in a sum
min_honest = 2                       # hospitals that must be left beyond those: the noise is shared among them
min_colluders = {options.min_colluders}                    # a study must withstand at least this many hospitals colluding
modes = ["local", "distributed"]     # local: this hospital's noise alone protects; distributed: shared noise
units = ["patient"]                  # "record" protects one record, not a person: add it only if you mean it
tasks = {_listed(get_args(TaskKind))}       # kinds of prediction
models = {_models(options)}
{own_models}       # packages of own models whose code may run here, with "own" among models (docs/own_models.md)
max_sampling_rate = 1.0              # largest chance of a patient to be in a step
max_attempts = 10000                 # most rounds and spare attempts of a study
max_records_per_patient = 1000       # largest cap a study may ask for
# hours = "20:00-06:00"              # takes part at these times only (local time); without it always

# [compute]                          # for images, series and texts; tables stay on the processor
# device = "auto"                    # a CUDA GPU where it is usable, else the processor; or "cpu", "cuda", "cuda:1"
# memory_gib = 8.0                   # most of the GPU's memory to take, and least that must be free
# engine = "auto"                    # whose gradients patient by patient: medfed's own where it can, else Opacus's; or "opacus"
# precision = "float32"              # "bfloat16": products in half the bits; norms and sums stay as they are

# [health]                           # for probes (gRPC health service): says serving or not, and nothing else
# address = "127.0.0.1:8081"
"""


def _models(options: SiteOptions) -> str:
    """Every model there is, to be struck out by hand; experimental ones and other people's code only where asked for."""
    left_out = {*(() if options.experimental else EXPERIMENTAL), *(() if options.own_models else ("own",))}
    return _listed(name for name in get_args(ModelName) if name not in left_out)


def _listed(names: Iterable[str]) -> str:
    return "[" + ", ".join(quoted(name) for name in names) + "]"


def _line(key: str, value: str | None, example: str) -> str:
    return f"# {key} = {quoted(example)}" if value is None else f"{key} = {quoted(value)}"


def open_site(seams: Seams, config_path: Path) -> Site:
    """An existing hospital's folder, with its document checked against its identity."""
    site = load_site(seams, config_path)
    document = load_enrolment(seams.files, site.enrolment_path)
    if document.public != site.identity().public:
        raise ConfigError(144, "enrolment.json is not of this identity", "restore both from the same backup")
    return site
