"""A second verifier of a run's folder, written from docs/privacy_statement.md alone: it imports nothing of medfed.

``python tests/verifier.py RUN`` prints each check and exits 0 if all hold, 4 if one does not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

ORDERS = [1.02, 1.05, *(n / 10 for n in range(11, 110)), *map(float, range(11, 65)), 72.0, 80.0, 88.0, 96.0, 112.0]
ORDERS += [128.0, 160.0, 192.0, 224.0, 256.0, 320.0, 384.0, 448.0, 512.0, 640.0, 768.0, 1024.0]


class Refused(Exception):
    """A check that does not hold."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(what)


def near(one: float, other: float, what: str) -> None:
    need(math.isclose(one, other, rel_tol=1e-6), f"{what} is {one}, recomputed {other}")


def enc(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(label: str, *parts: bytes) -> str:
    return hashlib.sha256(enc(label.encode(), *parts)).hexdigest()


def signed(public: str, signature: str, label: str, *parts: bytes) -> None:
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), enc(label.encode(), *parts))
    except InvalidSignature as error:
        raise Refused(f"signature over {label} does not verify") from error


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def written(path: Path) -> Any:
    """A document in the one form it is written in: no key twice, no number in another way."""
    data = path.read_bytes()
    value = json.loads(data)
    if (json.dumps(value, indent=1) + "\n").encode() != data:
        raise ValueError(f"{path.name} was edited")
    return value


class Folder:
    """The files of a run, read once."""

    def __init__(self, path: Path) -> None:
        self.model = (path / "model.safetensors").read_bytes()
        self.study_bytes = (path / "study.json").read_bytes()
        self.study_text = (path / "study.toml").read_text()
        self.study = json.loads(self.study_bytes)
        self.roster = written(path / "roster.json")
        self.journal = (path / "journal.jsonl").read_bytes()
        self.file = written(path / "privacy.json")
        self.said = {key: self.file[key] for key in self.file if key not in ("coordinator_signature", "hospitals")}


def check_study(run: Folder) -> None:
    need(run.said["format"] == "medfed-privacy-1", "another format")
    need(not any(stamp.startswith("NOT PRIVATE") for stamp in run.said["stamps"]), "stamped as not private")
    need(canonical(run.study) == run.study_bytes, "study.json is not canonical")
    need(digest("medfed/study/v1", run.study_bytes) == run.said["study_sha256"], "another study")
    need(tomllib.loads(run.study_text) == without_nulls(run.study), "study.toml and study.json differ")


def check_roster(run: Folder) -> None:
    hospitals, label = run.roster["hospitals"], "medfed/roster/v1"
    begun = run.roster | {"hospitals": hospitals[: run.study["cohort"]["hospitals"]]}
    need(digest(label, canonical(begun)) == run.study["cohort"]["roster_sha256"], "the study began with another roster")
    need(digest(label, canonical(run.roster)) == run.said["roster_sha256"], "another roster")
    apart = [len({one[name] for one in hospitals}) for name in ("hospital", "identity", "node_key")]
    need(apart == [len(hospitals)] * 3, "a hospital stands twice")
    for one in hospitals:
        parts = [one["hospital"].encode(), bytes.fromhex(one["identity"]), one["node_key"].encode()]
        parts.append(one["nominal_patients"].to_bytes(8, "big"))
        signed(one["identity"], one["signature"], "medfed/enrolment/v1", *parts)


def ascending(run: Folder, positions: list[int]) -> list[int]:
    need(positions == sorted(set(positions) & set(range(len(run.roster["hospitals"])))), "hospitals twice or unknown")
    need(len(positions) >= run.study["cohort"]["fewest_survivors"], "too few hospitals")
    return positions


def check_signatures(run: Folder) -> None:
    said, label = canonical(run.said), "medfed/privacy-statement/v1"
    signed(run.roster["coordinator"], run.file["coordinator_signature"], label, said)
    shared = {name: run.said[name] for name in ("study_sha256", "roster_sha256", "state_sha256", "model_sha256")}
    shared |= {"format": "medfed-hospital-statement-1", "statement_sha256": digest(label, said)}
    positions = ascending(run, [mine["position"] for mine in run.file["hospitals"]])
    for position, mine in zip(positions, run.file["hospitals"], strict=True):
        entry = run.roster["hospitals"][position]
        expected = shared | {"position": position, "hospital": entry["hospital"], "identity": entry["identity"]}
        need(all(mine[name] == value for name, value in expected.items()), f"{entry['hospital']} signed something else")
        unsigned = {key: value for key, value in mine.items() if key != "signature"}
        signed(mine["identity"], mine["signature"], "medfed/hospital-statement/v1", canonical(unsigned))
        head = (mine["ledger_seq"].to_bytes(8, "big"), bytes.fromhex(mine["ledger_sha256"]))
        signed(mine["identity"], mine["ledger_signature"], "medfed/ledger/head/v1", *head)


def check_model(run: Folder) -> None:
    need(hashlib.sha256(run.model).hexdigest() == run.said["model_sha256"], "another model")
    begin = 8 + int.from_bytes(run.model[:8], "little")
    tensors = [tensor for name, tensor in json.loads(run.model[8:begin]).items() if name != "__metadata__"]
    need(all(tensor["dtype"] == "F32" for tensor in tensors), "weights of another type")
    need(sum(math.prod(tensor["shape"]) for tensor in tensors) == run.said["parameters"], "another size")
    need(bool(np.isfinite(np.frombuffer(run.model, "<f4", offset=begin)).all()), "weights are not finite")


def check_journal(run: Folder) -> None:
    *lines, rest = run.journal.split(b"\n")
    need(rest == b"" and len(lines) >= 3, "the journal is cut short")
    read = list(map(json.loads, lines))
    hashes = ["0" * 64, *(digest("medfed/journal/v1", line) for line in lines)]
    for line, entry, link in zip(lines, read, hashes, strict=False):
        need(canonical(entry) == line and entry["previous"] == link, "the journal's chain is broken")
    need(hashes[-1] == run.said["journal_sha256"], "another journal")
    begin, *attempts, end = read
    need((begin["kind"], end["kind"]) == ("begin", "end"), "another first or last line")
    named = ("study_sha256", "roster_sha256", "attempts_approved")
    need(all(begin[name] == run.said[name] for name in named), "the journal is of another study")
    need([entry["attempt"] for entry in attempts] == list(range(1, run.said["attempts_used"] + 1)), "attempts differ")
    done = [entry for entry in attempts if entry["kind"] == "completed"]
    need({entry["kind"] for entry in attempts} <= {"completed", "lost"}, "the journal has another kind of line")
    need([entry["round"] for entry in done] == list(range(1, run.said["released_sums"] + 1)), "rounds are missing")
    need(done[-1]["state_sha256"] == run.said["state_sha256"], "the journal ends with another state")
    sums = [position for entry in done for position in ascending(run, entry["survivors"])]
    for mine in run.file["hospitals"]:
        need(sums.count(mine["position"]) <= mine["attempts_charged"], f"{mine['hospital']} charged less than its sums")
    study, before = bytes.fromhex(run.said["study_sha256"]), (len(done) - 1).to_bytes(4, "big")
    for place, (entry, text) in enumerate(zip(run.roster["hospitals"], end["signatures"], strict=True)):
        need((text != "") == (place in done[-1]["survivors"]), "signatures over the last state are missing")
        if text and len(done) > 1:
            signed(entry["identity"], text, "medfed/state/v1", study, before, bytes.fromhex(done[-2]["state_sha256"]))


def check_attempts(run: Folder) -> None:
    said, study = run.said, run.study
    need(said["released_sums"] <= said["attempts_used"] <= said["attempts_approved"], "more attempts than approved")
    needed = {part: (study.get(part) or {"attempts": 0})["attempts"] for part in ("statistics", "metrics")}
    rounds, spare = study["training"]["rounds"], study["training"]["spare_attempts"]
    need(said["attempts_approved"] == rounds + spare + sum(needed.values()), "another number of attempts approved")
    need(said["released_sums"] == rounds + sum(map(bool, needed.values())), "another number of sums")
    need(all(said[f"{part}_attempts"] == count for part, count in needed.items()), "another number of attempts at them")
    for mine in run.file["hospitals"]:
        charged, spent = mine["attempts_charged"], mine["epsilon_spent_micro"]
        need(0 <= charged <= said["attempts_used"], f"{mine['hospital']} charged {charged} attempts")
        bound = min(rdp_epsilon(study, said["parameters"], charged, distributed_shares(study)), said["epsilon_spent"])
        need(spent <= bound * 1e6 * (1 + 1e-6) + 1, f"{mine['hospital']} states too much")


def check_figures(run: Folder) -> None:
    said, privacy, cohort = run.said, run.study["privacy"], run.study["cohort"]
    for name in ("unit", "adjacency", "mode", "delta", "noise_multiplier", "clipping_norm", "sampling_rate"):
        need(said[name] == privacy[name], f"{name} is not the study's")
    steps = (run.study["training"].get("local") or {"steps": 1})["steps"]
    need(said["events_per_attempt"] == steps, "another number of events an attempt")
    need(all(said[name] == cohort[name] for name in ("colluders", "fewest_survivors")), "another cohort")
    need((said["study"], said["cohort"]) == (run.study["study"]["name"], cohort["hospitals"]), "another name or cohort")
    near(said["excess_noise"], cohort["hospitals"] / (shares := distributed_shares(run.study)), "excess_noise")
    words, whole, slack = said["parameters"], said["attempts_approved"], 1 + 1e-6
    near(said["epsilon_rdp"], rdp_epsilon(run.study, words, whole, shares), "epsilon_rdp")
    smaller = min(said[name] for name in ("epsilon_rdp", "epsilon_pld") if said[name] is not None)
    need(said["epsilon"] == smaller == said[f"epsilon_{said['accountant']}"], "not the smaller")
    need(said["epsilon"] <= privacy["epsilon"], "epsilon exceeds what the study says")
    most = min(said["epsilon"], rdp_epsilon(run.study, words, said["attempts_used"], shares))
    need(said["epsilon_spent"] <= most * slack, "epsilon_spent")
    need(said["epsilon_own_noise_alone"] <= rdp_epsilon(run.study, words, whole, 1) * slack, "epsilon of own noise")


# ----------------------------------------------------------------------------------------------------------- epsilon


def distributed_shares(study: dict[str, Any]) -> int:
    honest = int(study["cohort"]["fewest_survivors"] - study["cohort"]["colluders"])
    return honest if study["privacy"]["mode"] == "distributed" else 1


def exponent(bits: int, parties: int, value_range: float) -> int:
    bound = min(2**24 - 1, (2 ** (bits - 1) - 1) // parties)
    return max(e for e in range(-512, 513) if math.ldexp(value_range, e) <= bound)


def log_moments(rate: float, whole: Callable[[float], float]) -> dict[int, float]:
    """B(a) at whole orders."""
    table = {1: 0.0}
    for a in sorted({part(a) for a in ORDERS for part in (math.floor, math.ceil)})[1:]:
        terms = []
        for j in range(2, a + 1):
            ways = math.lgamma(a + 1) - math.lgamma(j + 1) - math.lgamma(a - j + 1)
            power = (j - 1) * whole(j)
            terms.append(
                ways + (a - j) * math.log1p(-rate) + j * math.log(rate) + power + math.log(-math.expm1(-power))
            )
        table[a] = float(np.logaddexp.reduce([0.0, *terms]))
    return table


@functools.cache
def divergence(rate: float, sigma: float, shares: int, reach: float, words: int) -> np.ndarray:
    """Of one event, at every order."""
    tau = 10 * sum(math.exp(-2 * math.pi**2 * sigma**2 * j / (j + 1)) for j in range(1, shares))
    v, w = (reach * factor / (math.sqrt(shares) * sigma) for factor in (1.0, min(math.sqrt(words), reach)))
    squared = min(v**2 + 2 * w * tau + tau**2 * words, (v + tau * math.sqrt(words)) ** 2)

    def whole(a: float) -> float:
        return min(a / 2 * v**2 + tau * words, a / 2 * squared)

    plain = np.array([whole(a) for a in ORDERS])
    if rate == 1.0:
        return plain
    table = log_moments(rate, whole)
    chords = [(1 - a % 1) * table[math.floor(a)] + a % 1 * table[math.ceil(a)] for a in ORDERS]
    return np.minimum(plain, np.array(chords) / (np.array(ORDERS) - 1))


def events(study: dict[str, Any], words: int, shares: int) -> Iterator[np.ndarray]:
    """Divergences of one training attempt, of all statistics, of all metrics; zeros where there are none."""
    bits, parties = study["quantization"]["ring_bits"], study["cohort"]["most_hospitals"]
    drawn, local = distributed_shares(study), study["training"].get("local")
    grid = (32, 1, local["sum_range"]) if local else (bits, parties, study["quantization"]["range"])

    def one(part: dict[str, Any], rate: float, norm: float, length: int, e: int) -> np.ndarray:
        reach = math.ldexp(norm, e) + math.sqrt(length)
        return divergence(rate, part["noise_multiplier"] * reach / math.sqrt(drawn), shares, reach, length)

    privacy, repeats = study["privacy"], local["steps"] if local else 1
    yield repeats * one(privacy, privacy["sampling_rate"], privacy["clipping_norm"], words, exponent(*grid))
    numeric = [feature["kind"] for feature in study["data"]["features"]].count("number")
    classes = 1 if study["task"]["kind"] == "binary" else study["task"]["classes"] + 1
    lengths = {"statistics": (2 * numeric + 1, 2 * numeric + 1), "metrics": (classes, 2 * classes)}
    for name, (squared, length) in lengths.items():
        part, total = study.get(name), np.zeros(len(ORDERS))
        if part is not None:
            e, size = exponent(bits, parties, part["range"]), length * part.get("bins", 1)
            total += part["attempts"] * one(part, 1.0, math.sqrt(squared), size, e)
        yield total


def rdp_epsilon(study: dict[str, Any], words: int, attempts: int, shares: int) -> float:
    """Epsilon of so many attempts with ``shares`` shares of noise in sight."""
    step, statistics, metrics = events(study, words, shares)
    most = study["training"]["rounds"] + study["training"]["spare_attempts"]
    total, delta = np.maximum(min(attempts, most) * step + statistics, metrics), study["privacy"]["delta"]
    figures = [
        0.0 if delta**2 > -math.expm1(-rho) else rho + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a, rho in zip(ORDERS, total.tolist(), strict=True)
    ]
    return max(0.0, min(figures))


def faults(path: Path) -> list[str]:
    """What is wrong with a run's folder; nothing if all holds."""
    try:
        run = Folder(path)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return [f"files: {type(error).__name__}"]
    found, signatures = [], (check_signatures, check_journal, check_attempts)
    for check in (check_study, check_roster, check_model, *signatures, check_figures):
        try:
            check(run)
        except (Refused, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            found.append(f"{check.__name__.removeprefix('check_')}: {error}")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    sys.stdout.write("\n".join(wrong or ["all checks hold"]) + "\n")
    sys.exit(4 if wrong else 0)
