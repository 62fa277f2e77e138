"""SMILES -> graphs and fingerprints: fixed shapes, faults by row and column, nothing of a cell in an error."""

from __future__ import annotations

import numpy as np
import pytest

from medfed.errors import DataError
from medfed.record_parts import ATOM_VALUES, Fingerprint, Molecule

pytest.importorskip("rdkit")

from medfed.models.molecule_records import encode_fingerprints, encode_graphs

GRAPH = Molecule(column="smiles", atoms=8, larger="refuse")
BITS = Fingerprint(column="smiles", bits=64, radius=2, center=0.0, scale=1.0)


def test_graph_holds_each_atom_and_both_ends_of_each_bond() -> None:
    (acid,) = encode_graphs(GRAPH, ["CC(=O)O"], [2])
    assert acid.shape == (8, ATOM_VALUES + 8)
    assert acid[:, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    bonds = acid[:, ATOM_VALUES:]
    assert np.array_equal(bonds, bonds.T)
    assert (bonds[0, 1], bonds[1, 2], bonds[1, 3]) == (1, 2, 1)
    assert np.count_nonzero(bonds) == 6
    # carbon, carbon, oxygen, oxygen
    assert acid[:4, 1].tolist() == [1, 1, 0, 0]
    assert acid[:4, 3].tolist() == [0, 0, 1, 1]


def test_aromatic_and_triple_bonds_have_kinds_of_their_own() -> None:
    benzene, nitrile = encode_graphs(GRAPH, ["c1ccccc1", "C#N"], [2, 3])
    assert set(benzene[:, ATOM_VALUES:][benzene[:, ATOM_VALUES:] > 0]) == {4}
    assert nitrile[0, ATOM_VALUES + 1] == 3


@pytest.mark.parametrize("cell", ["C1CC", "not a molecule", "", "C" * 5000])
def test_smiles_that_does_not_parse_is_refused_by_row_and_column(cell: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"MF-301 .*row 7, column smiles") as caught:
        encode_graphs(GRAPH, ["CCO", cell], [6, 7])
    assert cell == "" or cell not in str(caught.value)
    with pytest.raises(DataError, match=r"row 7, column smiles"):
        encode_fingerprints(BITS, ["CCO", cell], [6, 7])
    assert capfd.readouterr().err == ""


def test_larger_molecule_is_refused_or_cut_to_its_first_atoms() -> None:
    with pytest.raises(DataError, match=r"row 2, column smiles: value has more than 8 atoms"):
        encode_graphs(GRAPH, ["CCCCCCCCCO"], [2])
    cut = Molecule(column="smiles", atoms=8, larger="cut")
    longer, shorter = encode_graphs(cut, ["CCCCCCCCCO", "CCCCCCCC"], [2, 3])
    assert longer[:, 0].all()
    # the last atom has a neighbor that was cut off: its bonds are those within
    np.testing.assert_array_equal(longer[:, ATOM_VALUES:], shorter[:, ATOM_VALUES:])


def test_fingerprint_is_the_same_for_every_way_to_write_a_molecule() -> None:
    found = encode_fingerprints(BITS, ["OCC", "C(O)C", "CCN"], [2, 3, 4])
    assert found.shape == (3, 64)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()
    centered = Fingerprint(column="smiles", bits=64, radius=2, center=0.5, scale=0.5)
    np.testing.assert_allclose(encode_fingerprints(centered, ["OCC"], [2])[0], 2 * found[0] - 1)
