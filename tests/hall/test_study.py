"""The study: what it refuses, what its hash covers, and that nothing carrying a guarantee has a default."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medfed.errors import ConfigError, EnvironmentFault, PrivacyError
from medfed.seams import SystemFiles
from medfed.server.study_file import render
from medfed.study import Study, load_study
from medfed.wire import enc

FILES = SystemFiles()
Values = dict[str, dict[str, object]]
MakeStudy = Callable[..., Study]


def write(folder: Path, values: Values) -> Path:
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def changed(values: Values, path: str, value: object) -> Values:
    """A dotted key replaced, or removed where ``value`` is ``...``."""
    new = copy.deepcopy(values)
    *parents, key = path.split(".")
    table: object = new
    for parent in parents:
        table = table[int(parent)] if isinstance(table, list) else table[parent]
    if value is ...:
        del table[key]
    else:
        table[key] = value
    return new


def leaves(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


# -------------------------------------------------------------------------------------------------------------- hash


def test_study_from_its_file_is_the_study(tmp_path: Path, study_values: Values, make_study: MakeStudy) -> None:
    assert load_study(FILES, write(tmp_path, study_values)) == make_study()


def test_hash_is_the_published_one(make_study: MakeStudy) -> None:
    """A change here changes the name of every study ever approved: raise the format number instead."""
    study = make_study()
    assert study.hash() == hashlib.sha256(enc(b"medfed/study/v1", study.canonical_bytes())).digest()
    assert study.hash().hex() == "93f534eb5deca0f18427ca6e8bcf727ab986120061869a5587a5b3de75d10a1b"


def test_hash_does_not_see_order_comments_or_spelling_of_numbers(tmp_path: Path, study_values: Values) -> None:
    turned = {table: dict(reversed(list(rows.items()))) for table, rows in reversed(list(study_values.items()))}
    text = "# a comment\n" + tomli_w.dumps(turned).replace("clipping_norm = 1.0", "clipping_norm = 1  # as 1.0")
    path = tmp_path / "other.toml"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("delta = 0.001", "delta = 1e-3").encode())
    assert load_study(FILES, path).hash() == load_study(FILES, write(tmp_path, study_values)).hash()


def test_hash_covers_every_value(make_study: MakeStudy) -> None:
    """Each leaf of the canonical form changed alone gives another hash; a field left out of it would not."""
    study = make_study()
    dumped = json.loads(study.canonical_bytes())
    seen = {study.hash()}
    count = 0
    for path, value in leaves(dumped):
        twisted = copy.deepcopy(dumped)
        table = twisted
        for part in path[:-1]:
            table = table[part]
        table[path[-1]] = "other" if isinstance(value, str) else 7 if value is None else value + 1
        data = json.dumps(twisted, sort_keys=True, separators=(",", ":")).encode()
        seen.add(hashlib.sha256(enc(b"medfed/study/v1", data)).digest())
        count += 1
    assert len(seen) == count + 1
    assert count >= 45


def test_canonical_form_holds_every_field(make_study: MakeStudy) -> None:
    assert Study.model_validate_json(make_study().canonical_bytes()) == make_study()


@settings(max_examples=60, deadline=None)
@given(noise=st.floats(0.3, 10_000), delta=st.floats(1e-9, 0.01), rate=st.floats(1e-3, 1))
def test_canonical_form_keeps_every_bit_of_a_number(
    noise: float, delta: float, rate: float, make_study: MakeStudy
) -> None:
    changes = {"privacy.noise_multiplier": noise, "privacy.delta": delta, "privacy.sampling_rate": rate}
    study = make_study(changes)
    again = Study.model_validate_json(study.canonical_bytes())
    assert again.privacy == study.privacy
    assert again.hash() == study.hash()


# ---------------------------------------------------------------------------------------------------------- refusals

OUT_OF_RANGE: list[tuple[str, object]] = [
    ("study.format", 2),
    ("study.name", "a/b"),
    ("study.name", "x" * 65),
    ("study.name", "\u202enoitiuqni"),
    ("study.purpose", ""),
    ("study.expires", "tomorrow"),
    ("study.expires", "2024-02-30"),
    ("task.kind", "regression"),
    ("task.classes", 1),
    ("task.classes", 3),
    ("task.classes", True),
    ("task.class_weights", [1.0]),
    ("task.class_weights", [1.0, 0.0]),
    ("data.max_records_per_patient", 0),
    ("data.features", []),
    ("data.features.0.minimum", 120.0),
    ("data.features.0.scale", 0.0),
    ("data.features.0.scale", float("inf")),
    ("data.features.0.outside", "drop"),
    ("data.features.0.kind", "image"),
    ("data.features.2.levels", ["no"]),
    ("data.features.2.levels", ["no", "no"]),
    ("data.features.2.missing", "maybe"),
    ("data.features.1.name", "age"),
    ("data.features.1.name", "x\n"),
    ("model.name", "no-such-net"),
    ("model.hidden", [16]),
    ("model.first_model_sha256", "AB" * 32),
    ("model.first_model_sha256", "ab" * 31),
    ("training.aggregate", "weights"),
    ("training.rounds", 0),
    ("training.rounds", 1_000_000),
    ("training.rounds", 2.5),
    ("training.rounds", "3"),
    ("training.spare_attempts", -1),
    ("training.learning_rates", []),
    ("training.learning_rates", [[2, 0.5]]),
    ("training.learning_rates", [[1, 0.5], [1, 0.2]]),
    ("training.learning_rates", [[1, 0.5], [2.5, 0.2]]),
    ("training.learning_rates", [[1, 0.0]]),
    ("training.learning_rates", [[1, float("nan")]]),
    ("training.average_last_rounds", 4),
    ("training.server_step.momentum", 1.0),
    ("training.server_step.momentum", -0.1),
    ("training.server_step.kind", "sgd"),
    ("privacy.unit", "image"),
    ("privacy.adjacency", "replace-one"),
    ("privacy.mode", "central"),
    ("privacy.sampling_rate", 0.0),
    ("privacy.sampling_rate", 1.0000001),
    ("privacy.clipping_norm", 0.0),
    ("privacy.clipping_norm", 1e9),
    ("privacy.noise_multiplier", 0.0),
    ("privacy.noise_multiplier", -1.0),
    ("privacy.noise_multiplier", float("nan")),
    ("privacy.noise_multiplier", float("inf")),
    ("privacy.delta", 0.0),
    ("privacy.delta", 1.0),
    ("privacy.epsilon", 0.0),
    ("privacy.epsilon", 1000.0),
    ("quantization.ring_bits", 24),
    ("quantization.range", 0.0),
    ("cohort.hospitals", 2),
    ("cohort.hospitals", 129),
    ("cohort.colluders", 0),
    ("cohort.colluders", 3),
    ("cohort.fewest_survivors", 3),
    ("cohort.fewest_survivors", 5),
    ("cohort.most_hospitals", 3),
    ("cohort.roster_sha256", ""),
    ("deadlines.setup_s", 0.0),
    ("deadlines.round_s", float("inf")),
    ("deadlines.slot_s", 0.0),
]


@pytest.mark.parametrize(("path", "value"), OUT_OF_RANGE, ids=lambda value: str(value)[:30])
def test_value_out_of_range_is_one_clear_line(tmp_path: Path, study_values: Values, path: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(FILES, write(tmp_path, changed(study_values, path, value)))
    assert caught.value.code == 203
    assert "\n" not in str(caught.value)
    assert path.split(".")[0] in caught.value.what


GUARANTEES = [
    *(f"privacy.{name}" for name in ("unit", "adjacency", "mode", "sampling_rate", "clipping_norm")),
    *(f"privacy.{name}" for name in ("noise_multiplier", "delta", "epsilon")),
    *(f"cohort.{name}" for name in ("hospitals", "colluders", "fewest_survivors", "most_hospitals", "roster_sha256")),
    *(f"training.{name}" for name in ("rounds", "spare_attempts", "learning_rates", "aggregate", "server_step")),
    "training.average_last_rounds",
    "quantization.ring_bits",
    "quantization.range",
    "model.first_model_sha256",
    "data.max_records_per_patient",
    "data.features.0.minimum",
    "data.features.0.center",
    "data.features.0.outside",
    "study.expires",
    "deadlines.round_s",
]


@pytest.mark.parametrize("path", GUARANTEES)
def test_value_that_carries_a_guarantee_has_no_default(tmp_path: Path, study_values: Values, path: str) -> None:
    with pytest.raises(ConfigError, match="MF-203") as caught:
        load_study(FILES, write(tmp_path, changed(study_values, path, ...)))
    assert "missing" in caught.value.what


@pytest.mark.parametrize("table", ["study", "task", "data", "model", "training", "privacy", "cohort", "deadlines"])
def test_unknown_key_is_named(tmp_path: Path, study_values: Values, table: str) -> None:
    with pytest.raises(ConfigError, match="MF-202") as caught:
        load_study(FILES, write(tmp_path, changed(study_values, f"{table}.epsilom", 1)))
    assert "epsilom" in caught.value.what


@pytest.mark.parametrize("path", ["seed", "privacy.seed", "training.noise_seed", "study.Seed", "data.features.0.seed"])
def test_seed_anywhere_is_refused_as_randomness(tmp_path: Path, study_values: Values, path: str) -> None:
    with pytest.raises(PrivacyError) as caught:
        load_study(FILES, write(tmp_path, changed(study_values, path, 42)))
    assert caught.value.code == 133


COUPLING: list[tuple[str, object, str]] = [
    ("task.loss", "cox", "Cox's partial likelihood compares each patient with .*: use a discrete-time hazard model"),
    ("task.loss", "Cox partial likelihood", "use a discrete-time hazard model"),
    ("task.head", "cox", "Cox's partial likelihood .*: use a discrete-time hazard model .*head = .hazard"),
    ("task.kind", "cox", "use a discrete-time hazard model"),
    ("training.loss", "supervised-contrastive", "compares patients with each other: use a loss of each record alone"),
    ("task.loss", "triplet", "compares patients with each other"),
    ("task.loss", "focal", "a loss is not chosen by name, it must be each patient's own: remove it"),
    ("training.augmentation", "mixup", "makes one record of two patients: add altered copies .* of the same patient"),
    ("training.augmentation", ["flip", "CutMix"], "makes one record of two patients"),
    ("training.sampler", "weighted", "more often than epsilon counts: use task.class_weights"),
    ("privacy.sampler", {"kind": "class-balanced"}, "use task.class_weights"),
    ("training.local.sampler", "shuffle", "not drawn by independent coins.*privacy.sampling_rate"),
    ("training.shuffle", True, "not drawn by independent coins"),
    ("training.batch-size", 64, "not drawn by independent coins.*: use privacy.sampling_rate"),
    ("model.normalization", "batch", "statistics of a batch mix patients: .*GroupNorm"),
]


@pytest.mark.parametrize(("path", "value", "line"), COUPLING, ids=lambda value: str(value)[:24])
def test_key_that_would_couple_patients_is_refused_by_name(
    tmp_path: Path, study_values: Values, path: str, value: object, line: str
) -> None:
    values = copy.deepcopy(study_values)
    table = values
    for part in path.split(".")[:-1]:
        table = table.setdefault(part, {})
    table[path.split(".")[-1]] = value
    with pytest.raises(PrivacyError, match=rf"^MF-160 study\.toml: {path}: .*{line}") as caught:
        load_study(FILES, write(tmp_path, values))
    assert caught.value.exit_status == 3


def test_key_that_couples_nobody_is_only_unknown(tmp_path: Path, study_values: Values) -> None:
    for path, value in (("training.augment", "flip"), ("model.normalization", "group"), ("task.lossy", "cox")):
        with pytest.raises(ConfigError, match="MF-202"):
            load_study(FILES, write(tmp_path, changed(study_values, path, value)))


def test_missing_file_and_syntax_are_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="MF-606"):
        load_study(FILES, tmp_path / "study.toml")
    (tmp_path / "study.toml").write_text("[study]\nname = \n")
    with pytest.raises(ConfigError, match=r"MF-201 study\.toml not accepted at 2:8"):
        load_study(FILES, tmp_path / "study.toml")


def test_study_cannot_be_changed_after_reading(make_study: MakeStudy) -> None:
    with pytest.raises(ValidationError):
        make_study().privacy.noise_multiplier = 0.3  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------- local steps

LOCAL = {"steps": 4, "learning_rate": 0.1, "proximal": 0.5, "sum_range": 64.0}
UPDATE = {"training.aggregate": "update", "training.local": LOCAL}


def test_local_steps_count_as_events(make_study: MakeStudy) -> None:
    assert make_study().training.events_per_attempt == 1
    training = make_study(UPDATE).training
    assert (training.attempts, training.events_per_attempt) == (5, 4)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({**UPDATE, "privacy.mode": "distributed"}, "clipping does not bound how far one patient moves the weights"),
        ({"training.aggregate": "update"}, "needs [training.local]"),
        ({"training.local": LOCAL}, 'is for aggregate = "update"'),
        ({**UPDATE, "training.local": {**LOCAL, "sum_range": None}}, "training.local.sum_range is missing"),
        ({**UPDATE, "training.local": {**LOCAL, "learning_rate": 2.1}}, "would overshoot"),
        ({**UPDATE, "training.local": {**LOCAL, "steps": 0}}, "greater than or equal to 1"),
        ({**UPDATE, "training.local": {**LOCAL, "seed": 1}}, "Extra inputs"),
    ],
)
def test_local_steps_that_make_no_sense_are_refused(changes: Values, why: str, make_study: MakeStudy) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)):
        make_study(changes)


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "fedadagrad", "beta1": 0.0, "tau": 1e-3},
        {"kind": "fedyogi", "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
        {"kind": "fedadam", "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    ],
)
def test_adaptive_server_steps_have_no_defaults(rule: Values, make_study: MakeStudy) -> None:
    assert make_study({"training.server_step": rule}).training.server_step.kind == rule["kind"]
    for name in set(rule) - {"kind"}:
        with pytest.raises(ValidationError, match=name):
            make_study({"training.server_step": {key: value for key, value in rule.items() if key != name}})
    with pytest.raises(ValidationError, match="tau"):
        make_study({"training.server_step": {**rule, "tau": 0.0}})


def test_written_study_with_local_steps_reads_back(tmp_path: Path, make_study: MakeStudy) -> None:
    study = make_study(UPDATE)
    (tmp_path / "study.toml").write_text(render(study))
    assert load_study(FILES, tmp_path / "study.toml") == study
    assert study.hash() != make_study({**UPDATE, "training.local": {**LOCAL, "proximal": 0.0}}).hash()


# ------------------------------------------------------------------------------------------ steps and averages that came later

ADAM_BC = {"kind": "dp-adambc", "beta1": 0.9, "beta2": 0.999, "floor": 1e-8}
EMA = {"training.ema_decay": 0.99, "training.average_last_rounds": 1}


def test_keys_that_came_later_change_no_hash_where_they_are_unset(make_study: MakeStudy) -> None:
    """Studies approved before there were such keys are still the same studies."""
    assert make_study().hash().hex().startswith("93f534eb")
    assert make_study(UPDATE).hash().hex() == "f9c83846b4e87c06a34fc72488cca739b71082cd4c47d7e8a879c47801087734"
    assert make_study({"training.ema_decay": None}).hash() == make_study().hash()
    assert make_study({**UPDATE, "training.local": {**LOCAL, "step": None}}).hash() == make_study(UPDATE).hash()


@pytest.mark.parametrize(
    "changes",
    [
        EMA,
        {"training.server_step": ADAM_BC},
        {**UPDATE, "training.local": {**LOCAL, "step": ADAM_BC}},
        {**UPDATE, **EMA, "training.local": {**LOCAL, "step": {"kind": "momentum", "momentum": 0.5}}},
    ],
)
def test_later_keys_are_part_of_the_study_where_they_are_set(
    changes: Values, tmp_path: Path, make_study: MakeStudy
) -> None:
    study = make_study(changes)
    assert study.hash() not in (make_study().hash(), make_study(UPDATE).hash())
    assert Study.model_validate_json(study.canonical_bytes()) == study
    (tmp_path / "study.toml").write_text(render(study))
    assert load_study(FILES, tmp_path / "study.toml") == study


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({**EMA, "training.average_last_rounds": 2}, "ema_decay averages over all rounds"),
        ({**EMA, "training.ema_decay": 0.0}, "greater than 0"),
        ({**EMA, "training.ema_decay": 1.0}, "less than 1"),
        ({"training.server_step": {**ADAM_BC, "floor": 0.0}}, "greater than or equal to 0.000000000000000001"),
        ({"training.server_step": {**ADAM_BC, "floor": 1.5}}, "less than or equal to 1"),
        ({"training.server_step": {**ADAM_BC, "beta2": 1.0}}, "less than 1"),
        ({"training.server_step": {**ADAM_BC, "noise_variance": 0.0}}, "Extra inputs"),
        *(
            ({"training.server_step": {key: value for key, value in ADAM_BC.items() if key != name}}, name)
            for name in ("beta1", "beta2", "floor")
        ),
        ({**UPDATE, "training.server_step": ADAM_BC}, "use it in [training.local]"),
        ({**UPDATE, "training.local": {**LOCAL, "step": {"kind": "adam"}}}, "does not match any of the expected tags"),
    ],
)
def test_later_keys_that_make_no_sense_are_refused(changes: Values, why: str, make_study: MakeStudy) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)):
        make_study(changes)


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_how_far_local_momentum_leads(steps: int, momentum: float, make_study: MakeStudy) -> None:
    local = {**LOCAL, "steps": steps, "step": {"kind": "momentum", "momentum": momentum}}
    training = make_study({**UPDATE, "training.local": local}).training
    assert training.local is not None and training.local.noise_spread is not None
    way, shares = 0.0, [0.0] * steps  # by which each step's noise moves the weights in the end
    for place in range(steps):
        velocity = 0.0
        for number in range(steps):
            velocity = momentum * velocity + (number == place)
            shares[place] += velocity
    for _ in range(steps):
        way = momentum * way + 1.0
    assert training.local.noise_spread == pytest.approx(math.sqrt(sum(share * share for share in shares)))
    assert way <= training.local.longest_step <= steps


def test_what_dp_adambc_makes_of_noise_is_not_known_beforehand(make_study: MakeStudy) -> None:
    local = make_study({**UPDATE, "training.local": {**LOCAL, "step": ADAM_BC}}).training.local
    assert local is not None
    assert local.noise_spread is None
    assert local.longest_step == pytest.approx(1e4)


# --------------------------------------------------------------------------------------------------- derived numbers


def test_numbers_that_follow_from_a_study(make_study: MakeStudy) -> None:
    study = make_study()
    assert study.data.inputs == 3
    assert study.task.outputs == 1
    assert study.training.attempts == 5
    several = make_study({"task.kind": "multiclass", "task.classes": 4, "data.features.2.levels": ["a", "b", "c"]})
    assert several.task.outputs == 4
    assert several.data.inputs == 4


@pytest.mark.parametrize(
    ("wall_s", "over"),
    [(0.0, False), (1735689599.0, False), (1735689600.0, True), (4e9, True)],
)
def test_study_expires_when_its_last_day_is_over(wall_s: float, over: bool, make_study: MakeStudy) -> None:
    """2024-12-31 ends at 1735689600 s in UTC, whatever the machine's own time zone."""
    assert make_study({"study.expires": "2024-12-31"}).expired(wall_s) is over
