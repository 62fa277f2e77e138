"""A study as a file that people read: TOML with a comment at every line that needs one.

``render`` is checked against the parser: what it writes is the study it was given, to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from medfed.errors import LocalProtocolError
from medfed.study import Study
from medfed.toml_files import parse, quoted

_HEADS = {
    "study": "What this study is. Hospitals approve it by the hash of its contents (comments do not count).",
    "task": "What is predicted.",
    "data": "What a record must look like at every hospital. All constants are public.",
    "model": "Which model of medfed's catalogue, and the SHA-256 of its first weights' file.",
    "statistics": "Mean and scale of the numeric features, from one noised sum before round 1.",
    "training": "How it is trained.",
    "metrics": "How good the model is on held-out patients, from one noised sum of counts after the last round.",
    "privacy": "What the guarantee rests on.",
    "quantization": "The integer grid of the masked sums.",
    "cohort": "Who takes part: the roster's hash.",
    "deadlines": "Seconds.",
}
_TABLES = {
    "model.pretrained",
    "data.image",
    "data.volume",
    "data.series",
    "data.text",
    "data.molecule",
    "data.fingerprint",
    "data.events",
    "data.block",
    "data.mixed",
}
_NOTES = {
    "study.expires": "last day, UTC",
    "model.pretrained": "Weights that stay as they are, from an installed package of this hash (docs/transfer.md).",
    "model.pretrained.trained": "layers that are trained as they are; all others are frozen",
    "model.pretrained.adapters": "rank of what is trained beside each frozen linear layer",
    "data.max_records_per_patient": "more records of a patient are subsampled afresh each round",
    "data.image": "A grey image, 0 black and 1 white: (value - center) / scale.",
    "data.image.column": "of the table, names the file",
    "data.image.views": "files a cell names at most, parted by ;",
    "data.volume": "A volume, 0 lower and 1 upper: (value - center) / scale.",
    "data.volume.column": "of the table, names the NIfTI file",
    "data.volume.lower": "in the scanner's units",
    "data.volume.resize": "of a file of another size: refuse it, or average",
    "data.image.resize": "of a file of another size: refuse it, or average areas",
    "data.series": "Measurements over time, averaged within each step.",
    "data.series.fill": "of a step without a measurement: center (0), or forward (the last one)",
    "data.text": "A text, cut or padded to length tokens.",
    "data.text.column": "of the table",
    "data.molecule": "A molecule as a graph of atoms and bonds.",
    "data.molecule.column": "of the table, holds SMILES",
    "data.molecule.larger": "what becomes of a molecule of more atoms: refuse it, or cut it to its first ones",
    "data.fingerprint": "Which neighborhoods a molecule has, hashed to so many bits.",
    "data.fingerprint.column": "of the table, holds SMILES",
    "data.fingerprint.radius": "bonds",
    "data.events": "A history of coded events, the last of them.",
    "data.events.buckets": "how many different codes there are",
    "data.block": "Numbers of one kind in columns PREFIX1, PREFIX2, ...",
    "data.mixed": "A record has several of these parts.",
    "data.mixed.may_lack": "parts that a record may be without",
    "data.text.buckets": "how many different tokens there are",
    "training.aggregate": "gradient: one clipped sum a round; update: what private local steps came to",
    "training.local": "the hospitals' own private steps in a round, each of them counted",
    "statistics.noise_multiplier": "noise / sensitivity, of an event of all patients",
    "statistics.attempts": "most that may be made; all are counted",
    "statistics.least_scale": "no standard deviation is taken for less, in halves of a feature's range",
    "statistics.range": "a hospital's sum saturates beyond this, before the noise",
    "metrics.bins": "equal parts of 0 .. 1 that probabilities are counted in",
    "metrics.attempts": "most that may be made; all are counted",
    "metrics.noise_multiplier": "noise / sensitivity, of an event of held-out patients, who are in no other",
    "metrics.range": "a hospital's count in a cell saturates beyond this, before the noise",
    "training.spare_attempts": "rounds that may be lost; the noise is calibrated for rounds + spare_attempts",
    "training.learning_rates": "[from round, rate]",
    "training.average_last_rounds": "the released model is the mean over these rounds",
    "training.augmentation": "changed copies of each image, averaged before the clip: copies cost time, not privacy",
    "training.ema_decay": "the released model is the exponential moving average over all rounds",
    "privacy.unit": "who is protected: a patient with all records",
    "privacy.mode": "local: each hospital's own noise suffices; distributed: shares of noise add up in the sum",
    "privacy.sampling_rate": "chance of each patient to be in a round",
    "privacy.clipping_norm": "C: most that one patient can move a sum (L2)",
    "privacy.noise_multiplier": "noise / sensitivity",
    "privacy.epsilon": "claimed for all attempts together; every hospital recomputes it before approving",
    "quantization.range": "a hospital's sum saturates beyond this, before the noise; an update after it",
    "quantization.rounding": "nearest, or at random: right in the mean, for updates whose noise is in them already",
    "cohort.colluders": "how many hospitals may conspire with the coordinator without breaking the masks",
    "cohort.fewest_survivors": "no sum of fewer is ever opened; less than hospitals: a round can do without the others",
    "cohort.most_hospitals": "no sum of more: the ring and its grid are sized for so many",
    "deadlines.setup_s": "for all hospitals to join",
    "deadlines.round_s": "for all uploads of a round",
    "deadlines.slot_s": "uploads leave a whole number of slots after the request",
}


def render(study: Study) -> str:
    """The study's file. Raises ``LocalProtocolError`` if it would not read back as the same study."""
    lines = [f"# Study {study.study.name}, made by medfed-server study new.", ""]
    for name, table in study.model_dump(mode="json", exclude_none=True).items():
        lines += [f"# {_HEADS[name]}", *_table(name, table)]
    text = "\n".join(lines)
    if parse(text.encode(), "study.toml", Study) != study:
        raise LocalProtocolError(900, "a study could not be written as TOML", "please report this")
    return text


_Value = str | int | float | bool | list["_Value"] | dict[str, "_Value"]


def _table(path: str, table: dict[str, _Value]) -> Iterator[str]:
    """The table's own lines, then the tables inside it that stand apart; short ones stay inline."""
    yield f"[{path}]"
    yield from (
        _line(f"{path}.{key}", key, value) for key, value in table.items() if not _apart(f"{path}.{key}", value)
    )
    yield ""
    for key, value in table.items():
        inner = f"{path}.{key}"
        if isinstance(value, dict) and _apart(inner, value):
            yield f"# {_NOTES[inner]}"
            yield from _table(inner, value)
        for row in value if isinstance(value, list) else []:
            if isinstance(row, dict):
                yield from [f"[[{inner}]]", *(_line("", name, each) for name, each in row.items()), ""]


def _apart(path: str, value: _Value) -> bool:
    return path in _TABLES or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _line(path: str, key: str, value: _Value) -> str:
    note = _NOTES.get(path)
    text = f"{key} = {_toml(value)}"
    return f"{text}  # {note}" if note else text


def _toml(value: _Value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return quoted(value)
    return json.dumps(value)  # booleans and finite numbers are written alike in JSON and TOML
