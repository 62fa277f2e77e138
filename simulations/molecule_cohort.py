"""Public sets of molecules (MoleculeNet), dealt to hospitals that stand for laboratories. Each molecule counts as a patient.

What is set aside to test on is of other scaffolds than what is trained on, as MoleculeNet has it: the rings of a molecule and
what links them (Bemis and Murcko 1996, doi 10.1021/jm9602928).
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError, DataError
from medfed.models.molecule_records import parsed
from medfed.seams import Files
from medfed.simulations.datasets import DATASETS, find
from medfed.simulations.extract import PATIENT_COLUMN, Cohort, Extract
from medfed.simulations.public_cohorts import deal

_DEALT = 5
_LIMIT_BYTES = 1 << 24
_TRAINING, _VALIDATION = 0.8, 0.1


def bbbp(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """Which of 2,039 molecules pass the blood-brain barrier; column ``p_np``."""
    return _molecules(files, "bbbp", ("p_np",), seed, hospitals)


def clintox(files: Files, seed: int, hospitals: int | None) -> Cohort:
    """1,487 drugs: whether approved, whether a trial failed for toxicity."""
    return _molecules(files, "clintox", ("FDA_APPROVED", "CT_TOX"), seed, hospitals)


def _molecules(files: Files, name: str, labels: Sequence[str], seed: int, hospitals: int | None) -> Cohort:
    (path,) = find(files, name)
    rows = _rows(files, path, ("smiles", *labels))
    kept = [row for row in rows if parsed(row["smiles"]) is not None]
    smiles = [row["smiles"] for row in kept]
    training, test = scaffold_split(smiles)
    columns = {
        PATIENT_COLUMN: tuple(f"{name}-{place:04d}" for place in range(len(kept))),
        "smiles": tuple(smiles),
        **{label: tuple(row[label] for row in kept) for label in labels},
    }
    count = _DEALT if hospitals is None else hospitals
    return Cohort(
        name,
        name,
        1e-5,
        deal(Extract(columns), training, test, count, seed),
        f"scaffolds: {len(training)} molecules of the commonest ones to train on, {len(test)} of the rarest to test on, those "
        f"between, a tenth, left out, as MoleculeNet has it; {len(rows) - len(kept)} SMILES that RDKit cannot read left out; "
        f"dealt to {count} hospitals by seed {seed}. Each molecule counts as a patient",
        DATASETS[name].source,
        seed,
    )


def _rows(files: Files, path: Path, wanted: Sequence[str]) -> list[dict[str, str]]:
    data = files.read(path, limit_bytes=_LIMIT_BYTES)
    if path.suffix == ".gz":
        with gzip.open(io.BytesIO(data)) as packed:
            data = packed.read(_LIMIT_BYTES)
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8", "replace"), newline="")))
    if not rows or not set(wanted) <= set(rows[0]):
        raise DataError(301, f"{path.name} is not the file it should be", "fetch it again")
    return rows


def scaffold_split(smiles: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, test), rows int64 of SMILES that parse: whole scaffolds, the commonest first, fill four fifths; the next
    tenth is for choosing settings and in neither.

    *Source* MoleculeNet (Wu et al. 2018, doi 10.1039/C7SC02664A) as DeepChem's ``ScaffoldSplitter`` does it, without handedness.
    """
    groups = _groups(smiles)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    ends = (_TRAINING * len(smiles), (_TRAINING + _VALIDATION) * len(smiles))
    for group in groups:
        if len(parts[0]) + len(group) <= ends[0]:
            parts[0].extend(group)
        elif len(parts[0]) + len(parts[1]) + len(group) <= ends[1]:
            parts[1].extend(group)
        else:
            parts[2].extend(group)
    return np.array(sorted(parts[0]), np.int64), np.array(sorted(parts[2]), np.int64)


def _groups(smiles: Sequence[str]) -> list[list[int]]:
    """Rows of one scaffold each: the largest group first, of equal ones that whose first row comes last."""
    try:
        from rdkit.Chem.Scaffolds import MurckoScaffold
    except ImportError as error:
        raise ConfigError(320, "rdkit is not installed", "pip install 'medfed[molecules]'") from error
    found: dict[str, list[int]] = {}
    for row, text in enumerate(smiles):
        scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=parsed(text), includeChirality=False)  # type: ignore[no-untyped-call]
        found.setdefault(str(scaffold), []).append(row)
    return sorted(found.values(), key=lambda group: (len(group), group[0]), reverse=True)
