"""Numbers in sentences: one hospital, two hospitals; a study's attempts, each kind by its name; bounds, rounded to their side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context


def counted(number: int, one: str, many: str = "") -> str:
    """``1 hospital``, ``3 hospitals``; ``many`` where it is not ``one`` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def rounds_by_kind(rounds: Mapping[str, int]) -> str:
    """`` (20 of training, 1 of metrics)``, to follow their sum; nothing where all are of one kind."""
    if len(rounds) < 2:
        return ""
    return f" ({', '.join(f'{number} of {kind}' for kind, number in rounds.items())})"


def asked_attempts(rounds: int, spare_attempts: int, statistics: int, metrics: int) -> str:
    """``15 rounds, 3 spare attempts, 2 attempts at the metrics``: all that a study's list of attempts consists of."""
    parts = [counted(rounds, "round"), counted(spare_attempts, "spare attempt")]
    parts += [
        f"{counted(number, 'attempt')} at the {what}"
        for number, what in ((statistics, "statistics"), (metrics, "metrics"))
        if number
    ]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def rounded_up(value: float) -> str:
    """Four digits, rounded up: a bound never reads smaller than it is. Exact: of the shortest number that reads back the same."""
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(value))):.4g}"


def rounded_down(value: float) -> str:
    """The same rounded down: what is left never reads larger than it is."""
    return f"{float(Context(prec=4, rounding=ROUND_FLOOR).create_decimal(repr(value))):.4g}"


def times(value: float) -> str:
    """e^epsilon in few digits, rounded up; of large ones the power of ten above it."""
    if value > 20.0:
        return f"10^{math.ceil(value / math.log(10.0))}"
    factor = math.exp(value)
    return f"{math.ceil(factor * 100) / 100:.2f}" if factor < 100 else f"{math.ceil(factor):,}"


METRICS = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "auprc": "area under precision and recall",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "f1": "F1",
    "f1_macro": "mean F1 over classes",
    "f1_entity": "F1 of whole entities",
    "precision_entity": "precision of whole entities",
    "recall_entity": "recall of whole entities",
    "c_index": "C-index",
    "integrated_brier": "integrated Brier score",
    "error": "mean score of usual records",
    "effect_error": "error of each effect (root of the mean square)",
    "effect_gain": "gain over the unadjusted difference (0 is none, 1 is perfect)",
    "average_effect": "average effect",
    "average_effect_error": "error of the average effect",
    "unadjusted_error": "error of the unadjusted difference as average effect",
    "rank_of_effect": "rank correlation of the effect",
    "froc": "free-response score",
}
"""What people call a metric of ``models/tasks``."""


def named(metric: str) -> str:
    """A metric's name for people."""
    return METRICS.get(metric, metric.replace("_", " "))
