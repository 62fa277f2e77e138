"""hospital.toml: sovereign, complete, and said in one line where it is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medfed.client.policy import HospitalConfig, Policy, load_hospital
from medfed.client.trainer import number_patients
from medfed.errors import ConfigError, ExitStatus, MedfedError, PrivacyError
from medfed.models.records import Records
from medfed.seams import SystemFiles
from medfed.study import Study
from medfed.toml_files import parse

GOOD = """
[hospital]
name = "St. Example"
[coordinator]
address = "trial.example.org:9092"
ca_certificate = "ca.pem"
[data]
path = "patients.csv"
patient_column = "id"
holdout = 0.25
[data.columns]
age = "Alter"
[policy]
max_epsilon_study = 2.0
max_epsilon_lifetime = 8
lifetime_delta = 1e-5
max_delta = 1e-3
min_noise_multiplier = 0.5
min_hospitals = 4
min_honest = 3
min_colluders = 1
tasks = ["binary"]
models = ["logistic-regression", "mlp"]
max_sampling_rate = 1.0
modes = ["local"]
units = ["patient"]
max_attempts = 50
max_records_per_patient = 10
"""

STUDY = f"""
[study]
format = 1
name = "heart"
purpose = "test"
expires = "2099-01-01"
[task]
kind = "binary"
label = "ill"
classes = 2
[data]
max_records_per_patient = 10
[[data.features]]
name = "age"
kind = "number"
unit = "years"
minimum = 0.0
maximum = 120.0
center = 50.0
scale = 10.0
outside = "refuse"
[model]
name = "logistic-regression"
hidden = []
first_model_sha256 = "{"0" * 64}"
[training]
aggregate = "gradient"
rounds = 40
spare_attempts = 10
learning_rates = [[1, 0.3]]
average_last_rounds = 1
[training.server_step]
kind = "momentum"
momentum = 0.9
[privacy]
unit = "patient"
adjacency = "add-remove"
mode = "local"
sampling_rate = 1.0
clipping_norm = 1.0
noise_multiplier = 0.5
delta = 1e-3
epsilon = 1.0
[quantization]
ring_bits = 32
range = 100.0
[cohort]
hospitals = 4
colluders = 1
fewest_survivors = 4
most_hospitals = 4
roster_sha256 = "{"0" * 64}"
[deadlines]
setup_s = 60.0
round_s = 60.0
"""


def policy() -> Policy:
    return parse(GOOD.encode(), "hospital.toml", HospitalConfig).policy


def study(old: str = "", new: str = "") -> Study:
    assert old in STUDY
    return parse(STUDY.replace(old, new).encode(), "study.toml", Study)


def test_good_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "hospital.toml").write_text(GOOD)
    config = load_hospital(SystemFiles(), tmp_path / "hospital.toml")
    assert config.data.columns == {"age": "Alter"}
    assert config.coordinator.proxy is None
    caps = config.policy.caps
    assert (caps.max_epsilon_study, caps.max_epsilon_lifetime, caps.lifetime_delta) == (2.0, 8.0, 1e-5)


def test_no_bound_has_a_default() -> None:
    keys = [line.split(" =")[0] for line in GOOD[GOOD.index("[policy]") :].splitlines() if "=" in line]
    assert set(keys) == set(Policy.model_fields) - {"hours", "own_models"}
    for key in keys:
        lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key} =")]
        with pytest.raises(ConfigError, match=rf"policy\.{key} is missing") as caught:
            parse("\n".join(lines).encode(), "hospital.toml", HospitalConfig)
        assert caught.value.code == 203


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("max_epsilon_study = 2.0", "max_epsilon_study = 9.0", 203),
        ("max_epsilon_study = 2.0", "max_epsilon_study = 0", 203),
        ("max_epsilon_lifetime = 8", "max_epsilon_lifetime = inf", 203),
        ("max_epsilon_lifetime = 8", 'max_epsilon_lifetime = "three"', 203),
        ("max_epsilon_lifetime = 8", "max_epsilom_lifetime = 8", 202),
        ("lifetime_delta = 1e-5", "lifetime_delta = 1", 203),
        ("min_hospitals = 4", "min_hospitals = 2", 203),
        ("min_colluders = 1", "min_colluders = 0", 203),
        ('modes = ["local"]', "modes = []", 203),
        ('units = ["patient"]', 'units = ["image"]', 203),
        ("holdout = 0.25", "holdout = 0.6", 203),
        ('"trial.example.org:9092"', '"trial.example.org"', 203),
        ('"trial.example.org:9092"', '"trial.example.org:0"', 203),
        ('"trial.example.org:9092"', '"trial.example.org:99999"', 203),
        ('"trial.example.org:9092"', '"https://trial.example.org:443"', 203),
        ('"ca.pem"', '"ca.pem"\nproxy = "proxy:3128"', 203),
        ('"ca.pem"', '"ca.pem"\nidentity = "abc"', 203),
        ('"ca.pem"', f'"ca.pem"\nidentity = "{"0" * 60}    "', 203),
        ('"St. Example"', '"St. \\u001B[31m"', 203),
        ('age = "Alter"', 'age = "Alter"\nolder = "Alter"', 203),
        ("[policy]", "[policies]", 202),
    ],
)
def test_wrong_value_is_refused(old: str, new: str, code: int) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace(old, new).encode(), "hospital.toml", HospitalConfig)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["10.0.0.7:9092", "[2001:db8::1]:443", "localhost:1"])
def test_addresses_of_every_kind_are_read(address: str) -> None:
    config = parse(GOOD.replace("trial.example.org:9092", address).encode(), "hospital.toml", HospitalConfig)
    assert config.coordinator.address == address


def test_fingerprint_is_read_as_people_write_it() -> None:
    spoken = " ".join(["ABCD"] * 16)
    text = GOOD.replace('"ca.pem"', f'"ca.pem"\nidentity = "{spoken}"')
    assert parse(text.encode(), "hospital.toml", HospitalConfig).coordinator.identity == "abcd" * 16


def test_study_at_every_bound_is_admitted() -> None:
    policy().admit(study())


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("noise_multiplier = 0.5", "noise_multiplier = 0.49", 130),
        ("delta = 1e-3", "delta = 1.1e-3", 131),
        ("spare_attempts = 10", "spare_attempts = 11", 132),
        ("rounds = 40", "rounds = 41", 132),
        ('mode = "local"', 'mode = "distributed"', 134),
        ('unit = "patient"', 'unit = "record"', 134),
        ("hospitals = 4\ncolluders = 1", "hospitals = 4\ncolluders = 2", 141),
        ("max_records_per_patient = 10", "max_records_per_patient = 11", 134),
        (
            "hospitals = 4\ncolluders = 1\nfewest_survivors = 4",
            "hospitals = 3\ncolluders = 1\nfewest_survivors = 3",
            140,
        ),
    ],
)
def test_study_beyond_a_bound_is_refused_by_name(old: str, new: str, code: int) -> None:
    with pytest.raises(PrivacyError) as caught:
        policy().admit(study(old, new))
    assert caught.value.code == code
    assert caught.value.exit_status is ExitStatus.POLICY
    assert "hospital.toml" in caught.value.remedy


def test_bounds_on_hospitals_hold_for_the_smallest_sum_that_is_ever_opened() -> None:
    """Of six hospitals five are in a sum and four of them honest: a roster of six is no comfort."""
    six = study(
        "hospitals = 4\ncolluders = 1\nfewest_survivors = 4\nmost_hospitals = 4",
        "hospitals = 6\ncolluders = 1\nfewest_survivors = 5\nmost_hospitals = 6",
    )
    policy().model_copy(update={"min_hospitals": 5, "min_honest": 4}).admit(six)
    for wanted, code in (({"min_hospitals": 6}, 140), ({"min_honest": 5}, 141)):
        with pytest.raises(PrivacyError) as caught:
            policy().model_copy(update=wanted).admit(six)
        assert caught.value.code == code


def test_record_level_needs_both_the_study_and_the_hospital() -> None:
    """Neither alone: the usual policy refuses such a study, and one that allows it changes no other study's unit."""
    by_record = study('unit = "patient"', 'unit = "record"')
    with pytest.raises(PrivacyError, match='MF-134 privacy unit "record" is not allowed here'):
        policy().admit(by_record)
    allowing = policy().model_copy(update={"units": ["patient", "record"]})
    allowing.admit(by_record)
    allowing.admit(study())
    assert study().privacy.unit == "patient"
    three = Records(np.zeros((3, 1), np.float32), np.zeros(3, np.int64), ("a", "a", "b"))
    assert number_patients(study(), three).count == 2
    assert number_patients(by_record, three).count == 3


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("08:00-18:30", ["08:00", "18:29"], ["07:59", "18:30", "00:00"]),
        ("20:00-06:00", ["20:00", "00:00", "05:59"], ["06:00", "19:59"]),
    ],
)
def test_hours_are_local_and_may_go_over_midnight(hours: str, inside: list[str], outside: list[str]) -> None:
    bounds = policy().model_copy(update={"hours": hours})
    for text in inside + outside:
        hour, minute = map(int, text.split(":"))
        wall = time.mktime((2026, 6, 15, hour, minute, 30, 0, 0, -1))
        assert bounds.is_within_hours(wall) is (text in inside), text
        assert policy().is_within_hours(wall)
        opens = bounds.next_opening(wall)
        assert (opens is None) is (text in inside), text
        if opens is not None:
            assert time.strftime("%H:%M:%S", time.localtime(opens)) == f"{hours[:5]}:00"
            assert 0 < opens - wall < 24 * 3600


@pytest.mark.parametrize("hours", ["8-18", "24:00-06:00", "08:00", "08:00-18:60"])
def test_hours_in_another_form_are_refused(hours: str) -> None:
    text = GOOD.replace("[policy]", f'[policy]\nhours = "{hours}"')
    with pytest.raises(ConfigError, match=r'policy\.hours.*such as "20:00-06:00"'):
        parse(text.encode(), "hospital.toml", HospitalConfig)


def test_study_that_allows_for_too_few_colluders_is_refused() -> None:
    strict = policy().model_copy(update={"min_colluders": 2})
    with pytest.raises(PrivacyError) as caught:
        strict.admit(study())
    assert caught.value.code == 141


@pytest.mark.parametrize(
    ("part", "field", "value", "code"),
    [
        ("privacy", "noise_multiplier", float("nan"), 130),
        ("privacy", "noise_multiplier", float("inf"), 130),
        ("privacy", "noise_multiplier", -1.0, 130),
        ("privacy", "delta", float("nan"), 131),
        ("privacy", "delta", 0.0, 131),
        ("privacy", "sampling_rate", 0.0, 132),
        ("privacy", "sampling_rate", 1.5, 132),
        ("privacy", "sampling_rate", float("nan"), 132),
        ("training", "rounds", -20, 132),
        ("data", "max_records_per_patient", 0, 134),
        ("cohort", "colluders", 3, 141),
    ],
)
def test_values_that_a_study_file_cannot_hold_are_refused_all_the_same(
    part: str, field: str, value: float, code: int
) -> None:
    """The policy does not lean on the study's own validation: a study built without it is refused too."""
    whole = study()
    section = getattr(whole, part).model_copy(update={field: value})
    with pytest.raises(MedfedError) as caught:
        policy().admit(whole.model_copy(update={part: section}))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("narrowed", "code"),
    [
        ({"tasks": ["multiclass"]}, 134),
        ({"models": ["mlp", "cnn"]}, 134),
        ({"max_sampling_rate": 0.5}, 132),
        ({"min_honest": 4}, 141),
    ],
)
def test_narrowed_policy_refuses_what_it_allowed_before(narrowed: dict[str, object], code: int) -> None:
    policy().admit(study())
    with pytest.raises(PrivacyError) as caught:
        policy().model_copy(update=narrowed).admit(study())
    assert caught.value.code == code
    assert next(iter(narrowed)) in caught.value.remedy


def _floor_off(bounds: Policy) -> Policy:
    return bounds.model_copy(update={"min_noise_multiplier": 0.0001})


@pytest.mark.parametrize("switch", [lambda bounds: bounds, _floor_off])
def test_hostile_noise_is_stopped_by_the_floor_and_by_nothing_else(switch: Callable[[Policy], Policy]) -> None:
    """T12 with its control: with the floor off, the same study passes."""
    hostile = study("noise_multiplier = 0.5", "noise_multiplier = 0.3")
    bounds = switch(policy())
    if bounds.min_noise_multiplier < 0.3:
        bounds.admit(hostile)
    else:
        with pytest.raises(PrivacyError):
            bounds.admit(hostile)
