"""``medfed-client calibrate``: a released model's chances, made right for this hospital by its own held-out patients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.client.local_folder import KeptCalibration, drop_calibration, keep_calibration, require_released
from medfed.client.site import Site
from medfed.errors import DataError
from medfed.models.calibration import FEWEST_OF_A_CLASS, fit_local
from medfed.models.loading import load
from medfed.models.records import Records
from medfed.study import Study
from medfed.wording import counted

Floats = NDArray[np.float64]


def held_out(site: Site, study: Study) -> tuple[Records, Records]:
    """(training, held-out) records of this hospital, as the federation parted them: by the keyed hash of the patient's id.

    Raises MF-310 where nobody is held out.
    """
    records = site.read_records(study)
    aside = site.holdout(records.patients)
    if not aside.any():
        raise DataError(310, "no patient is held out here", "set holdout in hospital.toml before a study begins")
    return records.subset(~aside), records.subset(aside)


def calibrate(site: Site, run: Path) -> tuple[KeptCalibration, Path | None]:
    """Fit, say what it brought, and where it lies: kept only if it helps patients that it was not fitted on; what was kept before
    of this model goes. Raises MF-310 for too few labelled records, MF-203 for a task without classes."""
    files = site.seams.files
    trained = load(run, files, site.config.policy.admit_code)
    require_released(trained, "calibrated")
    _, records = held_out(site, trained.study)
    chances = trained.predict(records.inputs)
    fitted = fit_local(trained.study.task, chances, records.labels)
    kept = KeptCalibration(
        format="medfed-calibration-1",
        model_sha256=trained.sha256,
        kind=fitted.kind,
        slope=fitted.slope,
        offset=fitted.offset,
        records=len(records.labels),
        patients=len(set(records.patients)),
        cross_entropy_before=_cross_entropy(chances, records.labels),
        cross_entropy_after=_crossed(trained.study, chances, records),
    )
    drop_calibration(files, site.folder, trained)
    if kept.cross_entropy_after >= kept.cross_entropy_before:
        return kept, None
    return kept, keep_calibration(files, site.folder, trained, kept)


def _cross_entropy(chances: Floats, labels: NDArray[np.int64]) -> float:
    own = chances[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(own, 1e-12, 1.0)).mean())


def _crossed(study: Study, chances: Floats, records: Records) -> float:
    """Cross-entropy of each half of the patients after the other half's calibration. Raises MF-310 where a half is too small."""
    _, patient = np.unique(np.array(records.patients, np.str_), return_inverse=True)
    for half in (0, 1):
        counts = np.bincount(records.labels[patient % 2 == half])
        if (counts >= FEWEST_OF_A_CLASS).sum() < 2:
            what = f"a half of the held-out patients has fewer than {FEWEST_OF_A_CLASS} records of each of two classes"
            raise DataError(310, what, "use the model as it is, or hold more patients out of studies to come")
    after = np.empty_like(chances)
    for half in (0, 1):
        judged = patient % 2 == half
        after[judged] = fit_local(study.task, chances[~judged], records.labels[~judged]).apply(chances[judged])
    return _cross_entropy(after, records.labels)


def in_words(found: KeptCalibration, path: Path | None) -> Iterator[str]:
    yield (
        f"{found.kind}: slope {found.slope:.3f}, offset {found.offset:+.3f}, from {counted(found.records, 'record')} of "
        f"{counted(found.patients, 'held-out patient')}."
    )
    yield f"Cross-entropy {found.cross_entropy_before:.4f} before, {found.cross_entropy_after:.4f} after (crosswise)."
    if path is None:
        yield "That does not help, so nothing is kept: predict uses the model's own chances."
    else:
        yield f"Kept in {path}: predict uses it from now on. It never leaves."
