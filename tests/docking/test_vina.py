"""AutoDock Vina as the baseline."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from rdkit import Chem

from cohobate.core.errors import InputError
from cohobate.docking import vina
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.data.prepare import prepare
from cohobate.docking.data.sources import load
from cohobate.docking.metrics import molecule_rmsd
from cohobate.docking.vina import Box, Docked, Docker, as_pdbqt, conformer, like, target


def test_bad_receptors_are_one_line(tmp_path):
    box = Box((0, 0, 0), (20, 20, 20))
    with pytest.raises(InputError, match=r"no\.pdbqt: no such file"):
        Docker(tmp_path / "no.pdbqt", box)


def test_an_unknown_target_is_one_line():
    pytest.importorskip("dockstring")
    with pytest.raises(InputError, match=r"target XYZ: unknown; there is: .*CDK2"):
        target("XYZ")


def test_another_molecule_is_refused():
    a, b = Chem.MolFromSmiles("CCO"), Chem.MolFromSmiles("CCN")
    with pytest.raises(InputError, match="docking changed the molecule"):
        like(a, conformer(b, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": []}, "at least one of targets"),
        ({"ligands": 0}, "at least one of targets"),
        ({"box": 0.0}, "a box has a centre"),
        ({"out": "file"}, "file: cannot be a folder: File exists"),
    ],
)
def test_bad_options_of_prepare_are_one_line(tmp_path, options, message):
    pytest.importorskip("dockstring")
    (tmp_path / "file").write_text("")
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(InputError, match=message):
        prepare(out, **{"ligands": 1, **options})


class Still:
    """A docker that leaves conformers where they are made: in the middle of the box."""

    def __init__(self, receptor, box, **options) -> None:
        self.centre = np.array(box.centre)

    def dock(self, molecule) -> Docked:
        pose = like(molecule, Chem.RemoveHs(conformer(molecule, 1)))
        place = pose.GetConformer()
        place.SetPositions(place.GetPositions() + self.centre)
        return Docked(pose, np.array([-7.0]))


def test_prepare_stops_goes_on_and_writes_what_is_read_again(tmp_path, monkeypatch):
    pytest.importorskip("dockstring")
    monkeypatch.setattr(vina, "Docker", Still)
    assert prepare(tmp_path, ["CDK2"], ligands=2, minutes=0.0) == 1
    assert not list(tmp_path.glob("*.csv"))
    assert prepare(tmp_path, ["CDK2"], ligands=2) is None
    assert prepare(tmp_path, ["ESR1"], ligands=2) is None
    own = load(tmp_path, Problems())
    embedded = {c.target: c.pocket.chains for c in load(None, Problems())}
    assert {c.target: c.pocket.chains for c in own} == {k: embedded[k] for k in ("CDK2", "ESR1")}
    assert len(own) == 4


@pytest.mark.slow
def test_imatinib_is_redocked(real):
    (record,) = read(real / "redock" / "1iep.ligand.sdf", Problems())
    receptor = gzip.decompress((real / "formats" / "1iep_receptor.pdbqt.gz").read_bytes())
    box = Box.read(real / "formats" / "1iep_receptor.box.txt")
    with as_pdbqt(receptor.decode()) as path:
        found = Docker(path, box, exhaustiveness=8, seed=1).dock(record.molecule, poses=3)
    assert found.scores[0] < -9
    assert molecule_rmsd(record.molecule, found.poses)[0] <= 2.0
