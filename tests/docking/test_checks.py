"""Poses against PoseBusters and a reference."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from rdkit import Chem

from cohobate.core.testing import assert_one_line, run_command
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


def test_bad_poses_are_one_line(poses):
    (poses / "empty.sdf").write_text("")
    words = ["check-poses", poses / "empty.sdf"]
    assert_one_line(run_command(*words, domain="docking"), "empty.sdf", "no pose")
