"""What a study cannot ask for, as it would couple patients: no such key exists, and whoever writes one is told why.

A clipped gradient belongs to one patient only where that patient's loss does not look at others (``models/separability``),
and epsilon is that of independent coins, one a patient. Other keys that do not exist are simply unknown (MF-202).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from medfed.display import shown
from medfed.errors import PrivacyError

_COX = "Cox's partial likelihood compares each patient with all others of the batch"
_HAZARD = (
    'use a discrete-time hazard model (task.kind = "survival", head = "hazard"), whose loss is each patient\'s own'
)
_CONTRAST = "a contrastive loss compares patients with each other"
_MIXES = "makes one record of two patients"
_FIXED = "batches that are not drawn by independent coins are not what epsilon is computed for"

COUPLING_KEYS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "loss": (
        ("cox", _COX, _HAZARD),
        ("contrast", _CONTRAST, "use a loss of each record alone"),
        ("triplet", _CONTRAST, "use a loss of each record alone"),
        ("", "a loss is not chosen by name, it must be each patient's own", "remove it: task.kind says which it is"),
    ),
    "head": (("cox", _COX, _HAZARD),),
    "kind": (("cox", _COX, _HAZARD),),
    "augmentation": (
        ("mixup", _MIXES, "add altered copies of a record as more records of the same patient"),
        ("cutmix", _MIXES, "add altered copies of a record as more records of the same patient"),
    ),
    "sampler": (
        ("weight", "a weighted sampler takes some patients more often than epsilon counts", "use task.class_weights"),
        ("balanced", "a weighted sampler takes some patients more often than epsilon counts", "use task.class_weights"),
        ("", _FIXED, "remove it: privacy.sampling_rate is each patient's chance"),
    ),
    "shuffle": (("", _FIXED, "remove it: privacy.sampling_rate is each patient's chance"),),
    "batch_size": (("", _FIXED, "use privacy.sampling_rate, each patient's chance"),),
    "normalization": (
        ("batch", "statistics of a batch mix patients", "remove it: models have GroupNorm or LayerNorm"),
    ),
}
"""Key -> (what its value contains, which promise that breaks, the way out); the first that fits is said."""


def refuse_coupling(values: Mapping[str, object], name: str) -> None:
    """Raise ``PrivacyError`` (MF-160) for a key of the file ``name`` that would couple patients, wherever it stands."""
    for path, key, value in _leaves(values, ""):
        for part, why, remedy in COUPLING_KEYS.get(key, ()):
            if part in str(value).lower():
                raise PrivacyError(160, f"{name}: {shown(path)}: {why}", remedy)


def _leaves(values: object, at: str) -> Iterator[tuple[str, str, object]]:
    """(dotted path, key, value) of every key; the values of tables inside it count as its own."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield f"{at}{key}", str(key).lower().replace("-", "_"), value
            yield from _leaves(value, f"{at}{key}.")
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, at)
