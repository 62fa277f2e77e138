"""Writes ``tests/vectors/*secagg*.json`` anew: ``python tests/privacy/secagg/vector_tools/medfed_test_secagg_vectors.py``."""

import json
from pathlib import Path

import medfed_test_secagg_bad_cases as bad
import medfed_test_secagg_cases as good

VECTORS = Path(__file__).parents[3] / "vectors"
PROVENANCE = (
    "Written by the reference implementation in tests/privacy/secagg/vector_tools, from the text of medfed's secure "
    "aggregation design, sections 3 to 7. The format: docs/secure_aggregation.md."
)


def make_files():
    """Cases by the file's name."""
    rounds = [good.make_round(*row) for row in good.ROUNDS]
    strict, _, fast, _, slow, _ = rounds
    return {
        "secagg_pads.json": good.make_pads(),
        "secagg_shamir.json": good.make_shares(),
        "secagg_rounds.json": rounds,
        "bad_secagg_strict.json": bad.make_bad_strict(strict),
        "bad_secagg_recovery.json": bad.make_bad_fast(fast) + bad.make_bad_slow(slow),
    }


def to_text(cases):
    """One line a key: short, and a change is seen in a diff."""
    shown = [",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in case.items()) for case in cases]
    return (
        f'{{"provenance": {json.dumps(PROVENANCE)},\n"cases": [\n'
        + ",\n".join(f"{{{item}}}" for item in shown)
        + "]}\n"
    )


if __name__ == "__main__":
    for name, cases in make_files().items():
        (VECTORS / name).write_text(to_text(cases))
