"""What comes from others, altered at random: each decoder refuses it by name or takes it, in bounded memory. Never anything else.

100 000 inputs, the same in every run: valid ones with bits flipped, cut, drawn out, with numbers at their extremes, spliced
from two, and noise. Checksums, names and signatures are made right again where the decoder would look no further otherwise.
Memory is what Python and numpy ask for; the libraries below them (safetensors, OpenSSL, Pillow) hold no more than their input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import logging
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from medfed import __version__, flower_pieces, wire
from medfed.advance import ModelState, first_state, parse_state, state_bytes
from medfed.client.approval import _read_study
from medfed.client.channel import trust
from medfed.client.policy import load_hospital
from medfed.client.sources.csv_table import read_table
from medfed.client.sources.images import MOST_PIXELS, read_images
from medfed.client.sources.series_table import read_series
from medfed.client.verify import verify
from medfed.errors import EnvironmentFault, MedfedError
from medfed.identity import Identity, check_node_key, check_public
from medfed.models import catalogue, parameters
from medfed.privacy.accounting import micro
from medfed.privacy.journal import Completed, check_journal, journal_hash, line_hash, write_journal
from medfed.privacy.mechanism import Mechanism
from medfed.privacy.page import page
from medfed.privacy.plan import Plan, make_plan
from medfed.privacy.secagg import aggregator, messages, party, transitions
from medfed.privacy.secagg.aggregator import Aggregator
from medfed.privacy.secagg.party import Party
from medfed.privacy.secagg.protocol import AggregatorConfig, SecaggConfig
from medfed.privacy.statement import (
    Ending,
    PrivacyFile,
    Statement,
    canonical,
    hospital_statement,
    parse_statement,
    sign_for_hospital,
    statement,
)
from medfed.roster import Roster, enrol, load_enrolment, load_roster
from medfed.server.mail import Envelope
from medfed.server.planning import TEMPLATES, load_task
from medfed.server.study_file import render
from medfed.study import Study, load_study
from medfed.witness import Head, Witness, item, newest, read_heads, signed_bytes

# isort: split
from flwr.proto.message_pb2 import ObjectTree

KIB, MIB = 1 << 10, 1 << 20
VECTORS = 4096
SEEDS = [bytes(31) + bytes([number]) for number in range(1, 6)]
COORDINATOR, *HOSPITALS = [Identity.from_seed(seed) for seed in SEEDS]
PUBLIC = [each.public for each in HOSPITALS]


# ------------------------------------------------------------------------------------------------------ altering at random

_EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 63,
    (1 << 64) - 1,
)
_NUMBERS = (
    *(b"0", b"-1", b"1", b"2.5", b"-0.0", b"1e999", b"-1e999", b"1e-400", b"NaN", b"nan", b"inf", b"Infinity", b"1e15"),
    *(b"%d" % (sign * (1 << bits)) for sign in (1, -1) for bits in (31, 32, 53, 63, 64, 200)),
    *(b"9" * 4000, b"9" * 6000, b"0x" + b"F" * 6000, b"0b" + b"1" * 20000, b"0o" + b"7" * 6000),
    *(b"true", b"null", b'""', b"[]", b"{}", b"[" * 3000, b'{"a":' * 3000, b"{a=" * 3000, b"2026-07-01", b"25:61:61"),
)
_STRINGS = (
    *(b'""', b'"\\u0000"', b'"\\ud800"', b'"\xff\xfe"', b'"' + b"x" * 5000 + b'"', b'"\xe2\x80\xae\xf0\x9f\x98\x80"'),
    *(
        b"0",
        b"-1",
        b"null",
        b"[]",
        b"{}",
        b'{"a": 1}',
        b'"',
        b"'''",
        b'"\\x"',
        b"\xef\xbb\xbf",
        b'"a"."b"',
        b"a." * 100,
    ),
)
_NUMBER = re.compile(rb"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])")
_STRING = re.compile(rb'"[^"\n]*"')

Alter = Callable[[random.Random, bytearray, bytes], bytes]


def _flip(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    return bytes(data[: rng.randrange(len(data))]) if rng.random() < 0.7 else bytes(data[rng.randrange(len(data)) :])


def _drop(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 2, 4, 16, 64))]
    return bytes(data)


def _extend(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    more = rng.choice((1, 2, 4, 64, 500))
    at = rng.choice((len(data), rng.randrange(len(data) + 1)))
    data[at:at] = rng.choice((bytes(more), rng.randbytes(more), bytes(data[:more])))
    return bytes(data)


def _number(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    """A field of 1, 2, 4 or 8 bytes at an extreme, or off by one."""
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(max(1, len(data) - width + 1))
    order = rng.choice(("big", "little"))
    old = int.from_bytes(data[at : at + width], order)
    value = rng.choice((*_EXTREMES, old + 1, old - 1, len(data), len(data) - at - width)) % (1 << 8 * width)
    data[at : at + width] = value.to_bytes(width, order)
    return bytes(data)


def _splice(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    return bytes(data[: rng.randrange(len(data) + 1)]) + other[rng.randrange(len(other) + 1) :]


def _noise(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    kept = rng.choice((0, 0, 4, 5, 16, 64))
    return bytes(data[:kept]) + rng.randbytes(rng.choice((0, 1, 7, 64, 300, 2000)))


def _whole(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    return bytes(data)


def _token(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    """Another number or text in the place of one."""
    pattern, replacements = rng.choice(((_NUMBER, _NUMBERS), (_STRING, _STRINGS)))
    places = list(pattern.finditer(bytes(data)))
    if places:
        start, end = rng.choice(places).span()
        data[start:end] = rng.choice(replacements)
    return bytes(data)


def _line(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    """A line, or what stands between commas, twice, elsewhere or gone."""
    separator = rng.choice((b"\n", b","))
    parts = bytes(data).split(separator)
    taken = parts.pop(rng.randrange(len(parts)))
    for _ in range(rng.choice((0, 1, 2))):
        parts.insert(rng.randrange(len(parts) + 1), taken)
    return separator.join(parts)


BINARY: tuple[Alter, ...] = (_flip, _flip, _cut, _drop, _extend, _number, _number, _number, _splice, _noise, _whole)
TEXT: tuple[Alter, ...] = (
    _flip,
    _cut,
    _drop,
    _extend,
    _splice,
    _noise,
    _whole,
    _line,
    _line,
    _token,
    _token,
    _token,
    _token,
)


def altered(valid: Sequence[bytes], count: int, seed: str, how: Sequence[Alter]) -> Iterator[bytes]:
    """``count`` inputs that follow from ``seed``: every valid one as it is, then altered ones."""
    rng = random.Random(seed)
    yield from valid[:count]
    for _ in range(count - len(valid)):
        data = bytearray(rng.choice(valid))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = bytearray(rng.choice(how)(rng, data or bytearray(1), rng.choice(valid)))
        yield bytes(data)


# --------------------------------------------------------------------------------------------------------------- the harness


@dataclasses.dataclass(frozen=True)
class Decoder:
    """``take`` reads one input; ``repair`` makes right again what was computed over it; ``limit``: bytes above the start.

    ``refuses``: False where what is malformed is left out and the rest is taken.
    """

    take: Callable[[bytes], object]
    valid: Sequence[bytes]
    count: int
    limit: int
    how: tuple[Alter, ...] = BINARY
    repair: Callable[[bytes], bytes] = bytes
    refuses: bool = True


def feed(name: str, decoder: Decoder) -> tuple[int, int]:
    """Number of inputs taken and refused. Fails at the first that raises anything else, or takes more memory."""
    taken = refused = 0
    assert not tracemalloc.is_tracing()
    for data in decoder.valid:  # what is made once a process is made here
        decoder.take(data)
    inputs = [decoder.repair(data) for data in altered(decoder.valid, decoder.count, name, decoder.how)]
    tracemalloc.start(1)
    try:
        for data in inputs:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                decoder.take(data)
                taken += 1
            except MedfedError as error:
                refused += 1
                assert "\n" not in str(error), error
            except Exception as error:
                pytest.fail(f"{name}: {type(error).__name__}: {error} at {len(data)} bytes {data[:2000]!r}")
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= decoder.limit, f"{name}: {peak} bytes of memory at {len(data)} bytes {data[:2000]!r}"
    finally:
        tracemalloc.stop()
    return taken, refused


class Memory:
    """A file system of a few named files."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.contents = contents

    def read(self, path: Path, *, limit_bytes: int = 1 << 30) -> bytes:
        if path.name not in self.contents:
            raise EnvironmentFault(606, f"{path.name} not found", "name the right file")
        if len(self.contents[path.name]) > limit_bytes:
            raise EnvironmentFault(609, f"{path.name} is larger than {limit_bytes} bytes", "name the right file")
        return self.contents[path.name]

    def exists(self, path: Path) -> bool:
        return path.name in self.contents

    def make_folder(self, path: Path) -> None:
        pass


def of_file(read: Callable[[Any, Path], object]) -> Callable[[bytes], object]:
    """``read(files, path)`` as a decoder of the file's bytes."""
    return lambda data: read(Memory({"it.dat": data}), Path("it.dat"))


# -------------------------------------------------------------------------------------------------------------- what is valid

SIGNED_HEADS = tuple(
    item(position, Head(seq, bytes([seq]) * 32, each.sign(signed_bytes(seq, bytes([seq]) * 32))))
    for position, each in enumerate(HOSPITALS)
    for seq in (1, 2)
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of four hospitals that never was, right in all its signatures."""

    study: Study
    roster: Roster
    plan: Plan
    model: bytes
    state: ModelState

    @classmethod
    def make(cls, make_study: Callable[..., Study]) -> Run:
        keys = [ec.derive_private_key(number, ec.SECP384R1()).public_key() for number in range(1, 5)]
        documents = [
            enrol(each, f"House {place}", key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(), 10)
            for place, (each, key) in enumerate(zip(HOSPITALS, keys, strict=True))
        ]
        roster = Roster(format="medfed-roster-1", coordinator=COORDINATOR.public.hex(), hospitals=documents)
        changes = {
            "privacy.sampling_rate": 1.0,
            "cohort.roster_sha256": roster.hash().hex(),
            "cohort.fewest_survivors": 4,
            "cohort.most_hospitals": 4,
        }
        drafted = catalogue.build(make_study(changes))
        model = parameters.to_safetensors(drafted, np.linspace(-1, 1, parameters.count(drafted), dtype=np.float32))
        study = make_study({**changes, "model.first_model_sha256": parameters.file_hash(model)})
        state = first_state(parameters.from_safetensors(catalogue.build(study), model), study)
        return cls(study, roster, make_plan(study, parameters.count(drafted)), model, state)

    def journal(self) -> bytes:
        """Four attempts, of which the second was lost."""
        done = [
            Completed(number, attempt, bytes([number]) * 32, 100, (0, 1, 2, 3))
            for number, attempt in ((1, 1), (2, 3), (3, 4))
        ]
        said = wire.state_statement(self.study.hash(), 2, bytes([2]) * 32)
        signatures = [each.sign(said) for each in HOSPITALS]
        return write_journal(self.study.hash(), self.roster.hash(), (4, self.plan.attempts), done, signatures)

    def statement(self) -> Statement:
        model, journal = hashlib.sha256(self.model).digest(), journal_hash(self.journal())
        ending = Ending(4, bytes([3]) * 32, model, journal, (), {"medfed": __version__})
        return statement(self.study, self.roster, self.plan, ending)

    def signed(self, said: Statement) -> PrivacyFile:
        """``said`` under everybody's signature, however wrong it is."""
        head = Head(9, bytes(32), b"")
        charged = (4, micro(self.plan.epsilon_after(4)))
        mine = []
        for position, each in enumerate(HOSPITALS):
            row = dataclasses.replace(head, signature=each.sign(signed_bytes(head.seq, head.hash)))
            mine.append(sign_for_hospital(hospital_statement(said, self.roster, position, charged, row), each))
        return PrivacyFile(**said.model_dump(), coordinator_signature=said.sign(COORDINATOR).hex(), hospitals=mine)

    def folder(self) -> dict[str, bytes]:
        file = self.signed(self.statement())
        return {
            "privacy.json": file.to_bytes(),
            "privacy.md": page(file, self.roster).encode(),
            "study.json": self.study.canonical_bytes(),
            "study.toml": render(self.study).encode(),
            "roster.json": self.roster.to_bytes(),
            "journal.jsonl": self.journal(),
            "model.safetensors": self.model,
        }


@pytest.fixture(scope="module")
def run(make_study: Callable[..., Study]) -> Run:
    return Run.make(make_study)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What is left out is logged, a hundred thousand times here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def a_value(rule: object, rng: random.Random) -> object:
    """Some value of a message's field."""
    match rule:
        case wire._Unsigned(width):
            return rng.randrange(1 << 8 * width)
        case wire._Fixed(size):
            return rng.randbytes(size)
        case wire._Variable(limit):
            return rng.randbytes(rng.randrange(min(limit or 200, 200)))
        case wire._Items(limit, count):
            return tuple(rng.randbytes(rng.randrange(min(limit, 150))) for _ in range(rng.randrange(min(count, 4))))
    raise AssertionError(rule)


def frames(kinds: Sequence[type[wire.Message]]) -> list[bytes]:
    """Three frames of each kind."""
    rng = random.Random("frames")
    made = []
    for kind in kinds:
        for _ in range(3):
            values = {name: a_value(rule, rng) for name, rule in wire._LAYOUTS[kind]}
            values["study_hash"] = bytes(32)
            if "position" in values:
                values["position"] = 0
            made.append(wire.encode(kind(**values), HOSPITALS[0]))
    return made


def resigned(data: bytes) -> bytes:
    body = data[:-64]
    return body + HOSPITALS[0].sign(wire.enc(b"medfed/wire/v1", hashlib.sha256(body).digest()))


def the_heads(data: bytes) -> object:
    width = 2 + wire.HEAD_BYTES
    items = [data[start : start + width] for start in range(0, len(data), width)]
    return newest(read_heads(items, PUBLIC))


def relinked(data: bytes) -> bytes:
    """A journal whose chain is right again, where its lines are JSON."""
    head, lines = "0" * 64, []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            line = canonical_json(json.loads(line) | {"previous": head}) if line else line
        lines.append(line)
        head = line_hash(line)
    return b"\n".join(lines)


def canonical_json(values: object) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def recrc(data: bytes) -> bytes:
    """A PNG with the checksums of its parts made right."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def flower_records() -> list[bytes]:
    """A short frame, and one in three pieces: the records' bytes, each with its length before it."""
    with mock.patch.object(flower_pieces, "PIECE_BYTES", 64):
        whole = [flower_pieces.cut(bytes(range(size))) for size in (50, 150)]
    return [wire.enc(*(part.deflate() for part in content.values())) for content in whole]


def flower_frame(data: bytes) -> object:
    """The frame of records that hang below a message as medfed's do, each under the name that its bytes have."""
    parts, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    named = {hashlib.sha256(part).hexdigest(): part for part in parts}
    leaves = [ObjectTree(object_id=hashlib.sha256(part).hexdigest()) for part in parts]
    tree = ObjectTree(object_id="m", children=[ObjectTree(object_id="r", children=leaves)])
    with mock.patch.object(flower_pieces, "PIECE_BYTES", 64):
        return flower_pieces.Incoming(tree, 1000).take(named.get)


def certificate() -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(SEEDS[0])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    begin = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, begin, begin.replace(year=2036))
    return builder.add_extension(x509.BasicConstraints(True, 0), True).sign(key, None).public_bytes(Encoding.PEM)


def pictures() -> list[bytes]:
    from PIL import Image

    made = []
    for pixels in (np.arange(120, dtype=np.uint8).reshape(10, 12), np.arange(99, dtype=np.uint16).reshape(9, 11) * 600):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        made.append(out.getvalue())
    return made


TABLE = b'patient,age,"lac\ntate"\n1,50,2.5\r\n"2",60,\n3,,1e3\n'
HOSPITAL_TOML = b"""
hospital = { name = "Ahaus" }
coordinator = { address = "fl.example.org:9092", ca_certificate = "ca.crt", proxy = "http://proxy:3128" }
[data]
path = "patients.csv"
patient_column = "patient"
holdout = 0.25
[data.columns]
age = "Age (years)"
[policy]
max_epsilon_study = 8.0
max_epsilon_lifetime = 10.0
lifetime_delta = 1e-3
max_delta = 1e-3
min_noise_multiplier = 0.5
min_hospitals = 3
min_honest = 2
min_colluders = 1
modes = ["local"]
units = ["patient"]
tasks = ["binary"]
models = ["logistic-regression"]
max_sampling_rate = 1.0
max_attempts = 100
max_records_per_patient = 10
hours = "20:00-06:00"
"""
SERIES = b"record;hours;pulse\n1;0;60\n1;1.5;\n2;0;-7e2\n"


# ---------------------------------------------------------------------------------------------------------------- the decoders


def _wire(run: Run) -> Decoder:
    return Decoder(
        lambda data: wire.decode(data, vector_limit_bytes=VECTORS),
        frames(wire.FROM_COORDINATOR + wire.FROM_HOSPITAL),
        34_000,
        64 * KIB,
    )


def _replies(run: Run) -> Decoder:
    """Signed by a hospital of the roster, whatever they say."""
    envelope = Envelope(bytes(32), tuple(PUBLIC), VECTORS)
    valid = frames(wire.FROM_HOSPITAL)
    return Decoder(lambda data: envelope.open(0, data), valid, 5000, 64 * KIB, repair=resigned)


def _heads(run: Run) -> Decoder:
    return Decoder(the_heads, [b"".join(SIGNED_HEADS), SIGNED_HEADS[0]], 2000, 64 * KIB, refuses=False)


def _witness(run: Run) -> Decoder:
    entries = [PUBLIC[int.from_bytes(each[:2], "big")] + each[2:] for each in SIGNED_HEADS]
    return Decoder(of_file(Witness), [b"medfed/heads/v1\n" + b"".join(entries)], 1000, 64 * KIB, refuses=False)


def _enrolment(run: Run) -> Decoder:
    valid = [each.to_bytes() for each in run.roster.hospitals]
    return Decoder(of_file(load_enrolment), valid, 4000, 128 * KIB, TEXT)


def _roster(run: Run) -> Decoder:
    return Decoder(of_file(load_roster), [run.roster.to_bytes()], 2000, 256 * KIB, TEXT)


def _node_key(run: Run) -> Decoder:
    valid = [each.node_key.encode() for each in run.roster.hospitals]
    return Decoder(lambda data: check_node_key(data.decode("utf-8", "replace")), valid, 4000, 64 * KIB)


def _public(run: Run) -> Decoder:
    return Decoder(check_public, PUBLIC, 4500, 16 * KIB)


def _study(run: Run) -> Decoder:
    return Decoder(of_file(load_study), [render(run.study).encode()], 300, 8 * MIB, TEXT)


def _task(run: Run) -> Decoder:
    valid = [(TEMPLATES / f"{name}.toml").read_bytes() for name in ("example", "synthetic-series")]
    return Decoder(of_file(lambda files, path: load_task(files, str(path))), valid, 200, 8 * MIB, TEXT)


def _hospital(run: Run) -> Decoder:
    return Decoder(of_file(load_hospital), [HOSPITAL_TOML], 400, 8 * MIB, TEXT)


def _study_json(run: Run) -> Decoder:
    return Decoder(lambda data: _read_study(data, run.study.hash()), [run.study.canonical_bytes()], 1000, MIB, TEXT)


def _statement(run: Run) -> Decoder:
    return Decoder(parse_statement, [canonical(run.statement())], 1000, 256 * KIB, TEXT)


def _journal(run: Run) -> Decoder:
    said = run.statement()

    def check(data: bytes) -> None:
        named = {"journal_sha256": journal_hash(data).hex()}
        for sums in (0, 1 << 53):  # what a stranger's statement may say
            with pytest.raises(MedfedError):
                check_journal(data, said.model_copy(update={**named, "released_sums": sums}), PUBLIC)
        check_journal(data, said.model_copy(update=named), PUBLIC)

    return Decoder(check, [run.journal()], 2000, 256 * KIB, TEXT, relinked)


def _mechanism(run: Run) -> Decoder:
    part = Mechanism(0.5, 2.0, 1, 3.0, 4)
    whole = dataclasses.replace(part, repeats=2, once=(part,), aside=(part,), most=3)
    valid = [part.to_json().encode(), whole.to_json().encode()]
    return Decoder(lambda data: Mechanism.from_json(data.decode("utf-8", "replace")), valid, 4000, MIB, TEXT)


def _model(run: Run) -> Decoder:
    model = catalogue.build(run.study)
    how = (*BINARY, _token, _token, _token)
    return Decoder(lambda data: parameters.from_safetensors(model, data), [run.model], 4000, 64 * KIB, how)


def _state(run: Run) -> Decoder:
    valid = state_bytes(run.state)
    return Decoder(lambda data: parse_state(data, run.study, run.plan.words), [valid], 3500, 16 * KIB)


def _total(run: Run) -> Decoder:
    return Decoder(run.plan.read_total, [bytes(run.plan.ring_words * run.plan.ring_bits // 8)], 1000, 16 * KIB)


def _pieces(run: Run) -> Decoder:
    return Decoder(flower_frame, flower_records(), 2500, 64 * KIB)


def _authority(run: Run) -> Decoder:
    return Decoder(of_file(trust), [certificate()], 1000, 64 * KIB, (*BINARY, _line))


def _table(run: Run) -> Decoder:
    columns = {"age": "age", "lactate": "lac\ntate"}
    return Decoder(
        of_file(lambda files, path: read_table(files, path, "patient", columns)), [TABLE], 3000, 512 * KIB, TEXT
    )


def _series(run: Run) -> Decoder:
    def read(files: Any, path: Path) -> object:
        return read_series(files, path, "record", "hours", {"pulse": "pulse"}, {"1": 0, "2": 1})

    return Decoder(of_file(read), [SERIES], 3000, 512 * KIB, TEXT)


def _images(run: Run) -> Decoder:
    def read(files: Any, path: Path) -> object:
        return list(read_images(files, Path("."), [path.name], [2], "film"))

    # all that memory is asked for is what the header, when it is no lie about the pixels, says: that is MOST_PIXELS * 2
    return Decoder(of_file(read), pictures(), 1500, 2 * MOST_PIXELS + MIB, repair=recrc)


def _verified(run: Run) -> Decoder:
    """A run's folder, one file of it altered; the statement under signatures that are right."""
    folder = run.folder()
    names = sorted(folder)
    valid = [bytes([place]) + folder[name] for place, name in enumerate(names)]

    def look(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        found = verify(Memory({**folder, name: data[1:]}), Path("."), None)
        if not found["verified"]:
            failed = [check for check in found["checks"] if not check["holds"]]
            raise MedfedError(194, f"{failed}".replace("\n", " "), "as it should be")

    return Decoder(look, valid, 100, 4 * MIB, TEXT)


def _signed_by_all(run: Run) -> Decoder:
    """A run's folder whose statement says anything, under the signatures of everybody, who are all of one mind."""
    folder = run.folder()

    def look(data: bytes) -> None:
        try:
            said = Statement.model_validate_json(data)
            file = run.signed(said)
        except ValidationError as error:
            raise MedfedError(194, "no statement", "as it should be") from error
        found = verify(Memory({**folder, "privacy.json": file.to_bytes()}), Path("."), None)
        if not found["verified"]:
            raise MedfedError(194, "not verified", "as it should be")

    return Decoder(look, [canonical(run.statement())], 150, 4 * MIB, (_token, _token, _line))


# ------------------------------------------------------------------------------------------------------- secure aggregation


class Counted:
    """Bytes that follow from how many were drawn before."""

    def __init__(self, name: str) -> None:
        self.name, self.draws = name, 0

    def draw(self, purpose: str, size_bytes: int) -> bytes:
        self.draws += 1
        return hashlib.shake_256(f"{self.name} {self.draws}".encode()).digest(size_bytes)


class Federation:
    """Five hospitals of which one may be lost; everything follows from ``name``."""

    def __init__(self, name: str) -> None:
        self.identities = [
            Identity.from_seed(hashlib.sha256(f"{name} {place}".encode()).digest()) for place in range(5)
        ]
        public = tuple(each.public for each in self.identities)
        self.config = AggregatorConfig(bytes(32), bytes(32), public, 1, 16, 32, fewest_survivors=4)
        self.parties = [
            Party(SecaggConfig(self.config, place), each.sign, Counted(f"{name} {place}"))
            for place, each in enumerate(self.identities)
        ]
        self.aggregator = Aggregator(self.config)
        self.vectors = [np.arange(16, dtype=np.int64) * (place + 1) - 20 for place in range(5)]
        self.uploads: list[bytes] = []

    def set_up(self) -> Federation:
        for each in self.parties:
            self.aggregator.add_offer(each.offer())
        return self

    def accept(self) -> Federation:
        for each in self.parties:
            each.accept(self.aggregator.offers())
            each.open_round(1, bytes(32))
        self.aggregator.open_round(1, bytes(32))
        return self

    def mask(self) -> Federation:
        self.uploads = [one.mask(each).payload for one, each in zip(self.parties, self.vectors, strict=True)]
        return self

    def upload(self, lost: int | None = None) -> Federation:
        for place, each in enumerate(self.uploads):
            if place != lost:
                self.aggregator.add_upload(each)
        return self

    def frozen(self) -> Federation:
        """After a loss."""
        self.set_up().accept().mask().upload(lost=2).aggregator.freeze()
        return self

    def voted(self) -> Federation:
        for place in self.frozen().aggregator.survivors:
            self.aggregator.add_vote(place, self.parties[place].vote(self.aggregator.survivors))
        return self

    def release(self, place: int) -> bytes:
        votes, boxes = self.aggregator.certificate(), self.aggregator.boxes_for(place)
        return self.parties[place].release(self.aggregator.survivors, votes, boxes)

    def sign(self, place: int, data: bytes) -> bytes:
        return self.identities[place % 5].sign(data)


def parts_of(data: bytes) -> list[bytes]:
    """What ``wire.enc`` joined; of anything else, something."""
    parts, at = [], 0
    while at < len(data) and len(parts) < 300:
        size = int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return parts


def _secagg_offers(run: Run) -> Decoder:
    """A setup's offers at a hospital, under signatures of whoever they name."""
    made = Federation("offers").set_up()
    state, offers = made.parties[0]._state, made.aggregator.offers()

    def resign(data: bytes) -> bytes:
        signed = [
            part[:-64] + made.sign(part[103], part[:-64]) if len(part) == 240 else part for part in parts_of(data)
        ]
        return wire.enc(*signed)

    def take(data: bytes) -> object:
        return party.step(state, transitions.Offers(tuple(parts_of(data))), entropy=b"", now=0.0)

    return Decoder(take, [wire.enc(*offers), wire.enc(*offers[:4])], 1000, 64 * KIB, repair=resign)


def _secagg_offer(run: Run) -> Decoder:
    made = Federation("offer")
    state = made.aggregator._state
    offers = [each.offer() for each in made.parties]
    return Decoder(
        lambda data: aggregator.step(state, transitions.Offered(data), entropy=b"", now=0.0), offers, 2000, 64 * KIB
    )


def _secagg_upload(run: Run) -> Decoder:
    """Under the signature of the hospital that it names."""
    made = Federation("upload").set_up().accept().mask()
    state, words_end, tail_end = made.aggregator._state, 52 + 64, -64

    def resign(data: bytes) -> bytes:
        if len(data) < 300:
            return data
        signed = messages.upload_signature_input(
            state.context,
            data[42],
            hashlib.sha256(data[52:words_end]).digest(),
            data[words_end + 32 : tail_end],
            data[words_end : words_end + 32],
        )
        return data[:tail_end] + made.sign(data[42], signed)

    def take(data: bytes) -> object:
        return aggregator.step(state, transitions.Uploaded(data), entropy=b"", now=0.0)

    return Decoder(take, made.uploads, 4000, 64 * KIB, repair=resign)


def _secagg_survivors(run: Run) -> Decoder:
    state = Federation("survivors").set_up().accept().mask().parties[0]._state

    def take(data: bytes) -> object:
        return party.step(state, transitions.Survivors(wire.read_positions(data)), entropy=b"", now=0.0)

    valid = [wire.pack_positions(each) for each in ((0, 1, 2, 3), (0, 2, 3, 4))]
    return Decoder(take, valid, 2000, 256 * KIB)


def _secagg_boxes(run: Run) -> Decoder:
    made = Federation("boxes").set_up().accept().mask().upload()
    made.aggregator.freeze()
    state = made.parties[0]._state

    def take(data: bytes) -> object:
        boxes = wire.read_numbered(tuple(parts_of(data)), 48)
        return party.step(state, transitions.Fast(boxes), entropy=b"", now=0.0)

    return Decoder(take, [wire.enc(*wire.numbered(made.aggregator.boxes_for(0)))], 2000, 64 * KIB)


def _secagg_certificate(run: Run) -> Decoder:
    made = Federation("certificate").voted()
    state, aggregated = made.parties[0]._state, made.aggregator

    def take(data: bytes) -> object:
        survivors, votes, boxes = [*parts_of(data), b"", b"", b""][:3]
        certificate = transitions.Certificate(
            wire.read_positions(survivors),
            wire.read_numbered(tuple(parts_of(votes)), 64),
            wire.read_numbered(tuple(parts_of(boxes)), 48),
        )
        return party.step(state, certificate, entropy=b"", now=0.0)

    votes, boxes = wire.numbered(aggregated.certificate()), wire.numbered(aggregated.boxes_for(0))
    valid = wire.enc(wire.pack_positions(aggregated.survivors), wire.enc(*votes), wire.enc(*boxes))
    return Decoder(take, [valid], 1500, 256 * KIB)


def _secagg_vote(run: Run) -> Decoder:
    made = Federation("vote").frozen()
    state = made.aggregator._state
    valid = [bytes([0, place]) + made.parties[place].vote(state.survivors) for place in state.survivors]

    def take(data: bytes) -> object:
        event = transitions.Voted(int.from_bytes(data[:2], "big"), data[2:])
        return aggregator.step(state, event, entropy=b"", now=0.0)

    return Decoder(take, valid, 2000, 64 * KIB)


def _secagg_release(run: Run) -> Decoder:
    """The last one of a round, under the signature of the hospital it is from: what it says may be anything."""
    made = Federation("release").voted()
    releases = {place: made.release(place) for place in made.aggregator.survivors}
    *others, last = releases
    for place in others:
        made.aggregator.add_release(place, releases[place])
    state = made.aggregator._state

    def resign(data: bytes) -> bytes:
        body = data[:-64]
        return body + made.sign(last, messages.release_signature_input(state.context, last, body))

    def take(data: bytes) -> object:
        after, effects = aggregator.step(state, transitions.Released(last, data), entropy=b"", now=0.0)
        if after.phase is transitions.AggregatorPhase.FAILED:
            raise MedfedError(187, "lost", "as it should be")
        return effects

    return Decoder(take, [releases[last]], 1000, 64 * KIB, repair=resign)


MAKERS: dict[str, Callable[[Run], Decoder]] = {
    name.removeprefix("_"): make
    for name, make in list(globals().items())
    if getattr(make, "__annotations__", {}).get("return") == "Decoder" and name != "Decoder"
}


@pytest.mark.parametrize("name", MAKERS)
def test_decoder_takes_anything(name: str, run: Run) -> None:
    decoder = MAKERS[name](run)
    taken, refused = feed(name, decoder)
    assert taken >= len(decoder.valid), "not even what is valid is taken"
    assert refused > decoder.count // 4 or not decoder.refuses, (
        "hardly anything is refused: nothing was altered that counts"
    )


def test_inputs_are_as_many_as_said_and_the_same_in_every_run(run: Run) -> None:
    assert sum(make(run).count for make in MAKERS.values()) >= 100_000
    valid = frames(wire.FROM_HOSPITAL)
    assert list(altered(valid, 500, "same", BINARY + TEXT)) == list(altered(valid, 500, "same", BINARY + TEXT))


def test_altered_messages_change_nothing() -> None:
    """A whole round of secure aggregation with altered messages before each right one: the sum comes out to the last bit."""
    made = Federation("whole").set_up()
    offers = made.aggregator.offers()

    def throw(name: str, valid: Sequence[bytes], take: Callable[[bytes], object]) -> None:
        for data in altered([*valid, wire.enc(*valid)], 150, name, BINARY):
            if data not in valid:
                with contextlib.suppress(MedfedError):
                    take(data)

    hospital, coordinator = made.parties[0], made.aggregator
    throw("offers", [wire.enc(*offers)], lambda data: hospital.accept(parts_of(data)))
    made.accept().mask()
    throw("upload", made.uploads, coordinator.add_upload)
    made.upload(lost=2)
    survivors = coordinator.freeze()
    assert survivors == (0, 1, 3, 4)
    votes = {place: made.parties[place].vote(survivors) for place in survivors[1:]}
    too_few = [wire.pack_positions(each) for each in ((0, 1, 2), (1, 3, 4), (0, 1, 3, 4, 4))]
    throw("survivors", too_few, lambda data: hospital.vote([*data]))  # numbers below 256, mostly none of the cohort
    votes[0] = hospital.vote(survivors)
    throw("vote", list(votes.values()), lambda data: coordinator.add_vote(1, data))
    for place, vote in votes.items():
        coordinator.add_vote(place, vote)
    releases = {place: made.release(place) for place in survivors}
    throw("release", list(releases.values()), lambda data: coordinator.add_release(3, data))
    for place, release in releases.items():
        coordinator.add_release(place, release)
    expected = sum(made.vectors[place] for place in survivors)
    assert coordinator.total().view(np.int32).tolist() == np.asarray(expected).tolist()


# ------------------------------------------------------------------------------------------------------------ planted faults


def test_planted_index_error_is_noticed(run: Run) -> None:
    """A position of the roster that is used before it is compared with its length."""
    decoder = _replies(run)

    def look_up(data: bytes) -> bytes:
        message = wire.decode(data, vector_limit_bytes=VECTORS)
        return PUBLIC[message.position]

    with pytest.raises(pytest.fail.Exception, match="IndexError"):
        feed("planted", dataclasses.replace(decoder, take=look_up, count=2000))


def test_planted_memory_is_noticed(run: Run) -> None:
    """Room that is made for as many bytes as a length announces, before they are there."""

    def make_room(data: bytes) -> bytes:
        if len(data) < 4:
            raise MedfedError(103, "short", "refused")
        return bytes(min(int.from_bytes(data[:4], "big"), 1 << 24))

    with pytest.raises(AssertionError, match="bytes of memory"):
        feed("planted", Decoder(make_room, [bytes(4) + b"body"], 2000, 64 * KIB))


def test_planted_line_break_is_noticed() -> None:
    """A peer's text in an error without being escaped."""

    def quote(data: bytes) -> None:
        if data != b"fine":
            raise MedfedError(103, data.decode("latin-1"), "refused")

    with pytest.raises(AssertionError):
        feed("planted", Decoder(quote, [b"fine"], 2000, 64 * KIB))
