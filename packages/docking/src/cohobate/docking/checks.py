"""Are poses where they should be, and are they possible? PoseBusters, and RMSD with symmetry.

Needs the extra: ``pip install 'cohobate-docking[checks]'``.
"""

from __future__ import annotations

import csv
import importlib
import tempfile
from pathlib import Path
from typing import Any

from rdkit import Chem

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.docking.data.molecules import Problems, Record, read
from cohobate.docking.data.receptors import read_receptor
from cohobate.docking.metrics import molecule_rmsd
from cohobate.docking.vina import like


def check_poses(
    poses: Path,
    receptor: Path | None = None,
    reference: Path | None = None,
    out: Path = Path("poses.csv"),
) -> int | None:
    """Check poses by PoseBusters, and measure their RMSD from a reference.

    Args:
        poses: SDF or MOL2.
        receptor: The protein; without it only the molecules themselves are checked.
        reference: The true pose of the same molecule, in the same frame; needs the receptor.
        out: The table: one row a pose, one column a check.
    """
    problems = Problems()
    records = list(read(poses, problems))
    if not records:
        raise InputError(f"{poses}: no pose could be read")
    true = None if reference is None else next(iter(read(reference, problems)), None)
    if reference is not None and true is None:
        raise InputError(f"{reference}: no molecule could be read")
    table = _bust(records, receptor, true)
    for record, row in zip(records, table, strict=True):
        row["rmsd"] = "" if true is None else f"{_rmsd(true.molecule, record.molecule, poses):.3f}"
    with save_atomic(out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    for line in problems.lines():
        print(line)
    passed = sum(row["passed"] for row in table)
    text = f"{out}: {len(table)} poses, {passed} pass all checks, {len(problems.found)} unreadable"
    if true is not None:
        near = sum(float(row["rmsd"]) <= 2 for row in table)
        text += f", {near} within 2 Å"
    print(text)
    return None


def _bust(records: list[Record], receptor: Path | None, true: Record | None) -> list[dict]:
    """PoseBusters' checks of each pose; the distance itself is left to `_rmsd`."""
    try:
        posebusters: Any = importlib.import_module("posebusters")
    except ImportError:
        raise InputError(
            "posebusters is not installed: pip install 'cohobate-docking[checks]'"
        ) from None
    config = "mol" if receptor is None else "dock" if true is None else "redock"
    molecules = [record.molecule for record in records]
    with tempfile.TemporaryDirectory() as folder:
        protein = None
        if receptor is not None:
            protein = Path(folder) / "receptor.pdb"
            protein.write_text(read_receptor(receptor).make_pdb_string())
        busters = posebusters.PoseBusters(config=config)
        found = busters.bust(molecules, None if true is None else true.molecule, protein)
    table = []
    for record, checks in zip(records, found.to_dict("records"), strict=True):
        kept = {name: bool(value) for name, value in checks.items() if not name.startswith("rmsd")}
        table.append({"name": record.name, "passed": all(kept.values()), **kept})
    return table


def _rmsd(true: Chem.Mol, pose: Chem.Mol, path: Path) -> float:
    try:
        same = like(Chem.RemoveHs(true), Chem.RemoveHs(pose))
    except InputError:
        raise InputError(f"{path}: a pose is not the reference's molecule") from None
    return float(molecule_rmsd(Chem.RemoveHs(true), same)[0])
