"""SMILES -> graphs of atoms and bonds, or fingerprints, by the study's contract. RDKit reads them; nothing is said of what a cell
holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfed.errors import ConfigError
from medfed.models.cells import MISSING, fault
from medfed.record_parts import ATOM_VALUES, Fingerprint, Molecule

if TYPE_CHECKING:
    from rdkit.Chem import Atom, Bond, Mol

LONGEST = 4096  # characters of a SMILES
SYMBOLS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I", "B", "Si")
_DEGREES = 6
_HYDROGENS = 5
_HYBRIDS = ("SP", "SP2", "SP3")
_RINGS = (3, 4, 5, 6)


def encode_graphs(contract: Molecule, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.float32]:
    """float32[n, atoms, ATOM_VALUES + atoms] as ``medfed.record_parts.Molecule`` documents.

    Raises: ``DataError`` MF-301 for a SMILES that is missing, does not parse or has too many atoms; ``ConfigError`` MF-320
    without RDKit.
    """
    encoded = np.zeros((len(cells), *contract.shape), np.float32)
    for index, (row, molecule) in enumerate(_molecules(contract.column, cells, rows)):
        if molecule.GetNumAtoms() > contract.atoms and contract.larger == "refuse":
            what = f"has more than {contract.atoms} atoms"
            raise fault(row, contract.column, what, "drop the row, or ask for a study of larger molecules")
        _fill(encoded[index], molecule, contract.atoms)
    return encoded


def encode_fingerprints(contract: Fingerprint, cells: Sequence[str], rows: Sequence[int]) -> NDArray[np.float32]:
    """float32[n, bits]. Raises as ``encode_graphs``."""
    _require_rdkit()
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=contract.radius, fpSize=contract.bits)
    encoded = np.zeros((len(cells), contract.bits), np.float64)
    for index, (_, molecule) in enumerate(_molecules(contract.column, cells, rows)):
        encoded[index] = generator.GetFingerprintAsNumPy(molecule)
    return ((encoded - contract.center) / contract.scale).astype(np.float32)


def parsed(smiles: str) -> Mol | None:
    """The molecule without hydrogens; None if it is no SMILES. RDKit's complaints, which cite it, go nowhere."""
    _require_rdkit()
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        return Chem.MolFromSmiles(smiles) if smiles.isascii() and len(smiles) <= LONGEST else None


def _molecules(column: str, cells: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, Mol]]:
    for row, cell in zip(rows, cells, strict=True):
        text = cell.strip()
        if text in MISSING:
            raise fault(row, column, "is missing", "drop rows without a molecule")
        molecule = parsed(text)
        if molecule is None or molecule.GetNumAtoms() == 0:
            raise fault(row, column, "is no SMILES that RDKit can read", "correct it or drop the row")
        yield row, molecule


def _fill(record: NDArray[np.float32], molecule: Mol, most: int) -> None:
    for place, atom in zip(range(most), molecule.GetAtoms(), strict=False):
        record[place, :ATOM_VALUES] = _atom(atom)
    for bond in molecule.GetBonds():
        first, second = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        if max(first, second) < most:
            kind = _bond_kind(bond)
            record[first, ATOM_VALUES + second] = record[second, ATOM_VALUES + first] = kind


def _bond_kind(bond: Bond) -> int:
    if bond.GetIsAromatic():
        return 4
    return {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3}.get(bond.GetBondType().name, 1)


def _atom(atom: Atom) -> list[float]:
    """That it is there, its element, heavy neighbors, hydrogens, charge, hybridization, rings, handedness, mass: 1 or 0 each."""
    rings = [atom.IsInRingSize(size) for size in _RINGS]
    charge = atom.GetFormalCharge()
    values = [
        True,
        *_one_of(atom.GetSymbol(), SYMBOLS),
        *_level(atom.GetDegree(), _DEGREES),
        *_level(atom.GetTotalNumHs(), _HYDROGENS),
        *(charge < 0, charge == 0, charge > 0),
        *_one_of(atom.GetHybridization().name, _HYBRIDS),
        atom.GetIsAromatic(),
        *(atom.IsInRing(), *rings, atom.IsInRing() and not any(rings)),
        atom.GetChiralTag().name.startswith("CHI_TETRAHEDRAL"),
    ]
    return [*(float(value) for value in values), atom.GetMass() / 100.0]


def _one_of(name: str, known: Sequence[str]) -> list[bool]:
    """One place for each name, one for any other."""
    return [*(name == each for each in known), name not in known]


def _level(number: int, levels: int) -> list[bool]:
    """0, 1, ...; the last place stands for all greater ones, too."""
    return [min(number, levels - 1) == level for level in range(levels)]


def _require_rdkit() -> None:
    try:
        import rdkit  # noqa: F401
    except ImportError as error:
        raise ConfigError(320, "rdkit is not installed", "pip install 'medfed[molecules]'") from error
