"""AutoDock Vina as the baseline."""

from __future__ import annotations

import gzip

import pytest

from cohobate.core.errors import InputError
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.metrics import molecule_rmsd
from cohobate.docking.vina import Box, Docker, as_pdbqt, conformer, like, target


def test_bad_receptors_are_one_line(tmp_path):
    box = Box((0, 0, 0), (20, 20, 20))
    with pytest.raises(InputError, match=r"no\.pdbqt: no such file"):
        Docker(tmp_path / "no.pdbqt", box)


def test_an_unknown_target_is_one_line():
    pytest.importorskip("dockstring")
    with pytest.raises(InputError, match=r"target XYZ: unknown; there is: .*CDK2"):
        target("XYZ")


def test_another_molecule_is_refused():
    from rdkit import Chem

    a, b = Chem.MolFromSmiles("CCO"), Chem.MolFromSmiles("CCN")
    with pytest.raises(InputError, match="docking changed the molecule"):
        like(a, conformer(b, 1))


@pytest.mark.slow
def test_imatinib_is_redocked(real):
    (record,) = read(real / "redock" / "1iep.ligand.sdf", Problems())
    receptor = gzip.decompress((real / "formats" / "1iep_receptor.pdbqt.gz").read_bytes())
    box = Box.read(real / "formats" / "1iep_receptor.box.txt")
    with as_pdbqt(receptor.decode()) as path:
        found = Docker(path, box, exhaustiveness=8, seed=1).dock(record.molecule, poses=3)
    assert found.scores[0] < -9
    assert molecule_rmsd(record.molecule, found.poses)[0] <= 2.0
