"""Poses against PoseBusters and a reference."""

from __future__ import annotations

import csv
import gzip

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDepictor

from cohobate.core.testing import assert_one_line, run_command
from cohobate.docking import vina
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.data.sources import embedded_folder


@pytest.fixture
def poses(tmp_path):
    """A docked pose of the embedded set, and the same 5 Å away."""
    molecule = next(iter(read(embedded_folder() / "CDK2.poses.sdf.gz", Problems()))).molecule
    (tmp_path / "true.sdf").write_text(Chem.SDWriter.GetText(molecule))
    moved = Chem.Mol(molecule)
    place = moved.GetConformer()
    place.SetPositions(place.GetPositions() + np.array([3.0, 4.0, 0.0]))
    blocks = [Chem.SDWriter.GetText(m) for m in (molecule, moved)]
    (tmp_path / "poses.sdf").write_text("".join(blocks))
    return tmp_path


def test_poses_are_checked_against_a_reference(poses):
    pocket = embedded_folder() / "CDK2.pocket.pdb.gz"
    done = run_command(
        "check-poses", poses / "poses.sdf", "--receptor", pocket, "--reference",
        poses / "true.sdf", "--out", poses / "t.csv", domain="docking",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "2 poses, " in done.out
    assert "1 within 2 Å" in done.out
    rows = list(csv.DictReader((poses / "t.csv").read_text().splitlines()))
    assert [float(row["rmsd"]) for row in rows] == pytest.approx([0.0, 5.0], abs=1e-3)
    assert rows[0]["bond_lengths"] == "True"
    assert len(rows[0]) > 15


def check(*words) -> str:
    done = run_command("check-poses", *words, domain="docking")
    assert done.code == 0, done.err
    return done.out


def test_a_check_that_cannot_be_made_is_not_passed(poses, monkeypatch):
    """UFF has no parameters for calcium, so the energy of its conformers is not known."""
    calcium = Chem.MolFromSmiles("[Ca+2]")
    place = Chem.Conformer(1)
    place.SetPositions(np.ones((1, 3)))
    place.Set3D(True)
    calcium.AddConformer(place)
    (poses / "ca.sdf").write_text(Chem.SDWriter.GetText(calcium))
    assert "1 poses, 0 pass all checks" in check(poses / "ca.sdf", "--out", poses / "t.csv")
    (row,) = csv.DictReader((poses / "t.csv").read_text().splitlines())
    assert (row["passed"], row["internal_energy"], row["bond_lengths"]) == ("False", "", "True")


@pytest.mark.parametrize("suffix", ["smi", "sdf"])
def test_molecules_without_a_place_are_no_poses(poses, suffix):
    path = poses / f"flat.{suffix}"
    path.write_text("CCO a\n" if suffix == "smi" else Chem.MolToMolBlock(drawn("CCO")))
    words = ["check-poses", path, "--out", poses / "t.csv"]
    assert_one_line(run_command(*words, domain="docking"), path.name, "no 3-D coordinates")
    words = ["check-poses", poses / "true.sdf", "--reference", path]
    assert_one_line(run_command(*words, domain="docking"), path.name, "no 3-D coordinates")


def drawn(smiles: str) -> Chem.Mol:
    molecule = Chem.MolFromSmiles(smiles)
    rdDepictor.Compute2DCoords(molecule)
    return molecule


def test_a_reference_needs_no_receptor_and_may_have_another_charge(poses):
    charged = Chem.RWMol(next(iter(read(poses / "true.sdf", Problems()))).molecule)
    Chem.Kekulize(charged, clearAromaticFlags=True)
    atom = next(a for a in charged.GetAtoms() if a.GetSymbol() == "N")
    atom.SetFormalCharge(1)
    atom.SetNumExplicitHs(atom.GetTotalNumHs() + 1)
    (poses / "charged.sdf").write_text(Chem.MolToMolBlock(charged))
    words = ["--reference", poses / "charged.sdf", "--out", poses / "t.csv"]
    assert "1 within 2 Å" in check(poses / "poses.sdf", *words)
    (poses / "other.sdf").write_text(Chem.MolToMolBlock(vina.conformer(drawn("CCO"), 1)))
    words = ["--reference", poses / "other.sdf", "--out", poses / "t.csv"]
    out = check(poses / "poses.sdf", *words)
    assert "record 1 and 1 more: a pose is not the reference's molecule" in out
    assert "2 poses, 2 pass all checks, 0 unreadable, 0 within 2 Å" in out


def test_what_posebusters_cannot_check_is_one_line(poses, monkeypatch):
    import posebusters

    whole = posebusters.PoseBusters.bust

    def bust(self, molecules, *rest):
        if molecules[0].GetConformer().GetPositions()[0, 0] == first:
            raise Chem.KekulizeException("Can't kekulize mol.")
        return whole(self, molecules, *rest)

    true = next(iter(read(poses / "true.sdf", Problems()))).molecule
    first = true.GetConformer().GetPositions()[0, 0]
    monkeypatch.setattr(posebusters.PoseBusters, "bust", bust)
    out = check(poses / "poses.sdf", "--out", poses / "t.csv")
    assert "poses.sdf: record 1: PoseBusters cannot check it: Can't kekulize mol." in out
    assert "2 poses, 1 pass all checks" in out


def test_real_poses_and_references(real, poses):
    gold = real / "pose_checks" / "1G9V_RQ3__1G9V_RQ3_gold_redock.sdf.gz"
    few = b"$$$$\n".join(gzip.decompress(gold.read_bytes()).split(b"$$$$\n")[:2]) + b"$$$$\n"
    (poses / "gold.sdf").write_bytes(few)
    folder = real / "redock"
    check(
        poses / "gold.sdf", "--receptor", folder / "1g9v.protein.pdb.gz", "--reference",
        folder / "1g9v.ligand.sdf", "--out", poses / "t.csv",
    )  # fmt: skip
    table = list(csv.DictReader((poses / "t.csv").read_text().splitlines()))
    assert all(row["rmsd"] and row["molecular_formula"] for row in table)
    out = check(real / "formats" / "1iep_ligand_vina_out.pdbqt", "--out", poses / "t.csv")
    assert "4 poses" in out


def test_bad_poses_are_one_line(poses):
    (poses / "empty.sdf").write_text("")
    words = ["check-poses", poses / "empty.sdf"]
    assert_one_line(run_command(*words, domain="docking"), "empty.sdf", "no pose")
