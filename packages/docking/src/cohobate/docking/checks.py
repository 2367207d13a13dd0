"""Are poses where they should be, and are they possible? PoseBusters, and RMSD with symmetry.

Needs the extra: ``pip install 'cohobate-docking[checks]'``.
"""

from __future__ import annotations

import csv
import importlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem
from spyrmsd.exceptions import NonIsomorphicGraphs
from spyrmsd.rmsd import symmrmsd

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.docking.data import molecules
from cohobate.docking.data.molecules import Problems, Record, has_pose, read
from cohobate.docking.data.receptors import read_receptor


def check_poses(
    poses: Path,
    receptor: Path | None = None,
    reference: Path | None = None,
    out: Path = Path("poses.csv"),
) -> int | None:
    """Check poses by PoseBusters, and measure their RMSD from a reference.

    A check that cannot be made is blank in the table, and its pose does not pass.

    Args:
        poses: SDF, MOL2 or PDBQT, with 3-D coordinates; each model of a PDBQT is a pose.
        receptor: The protein; without it only the molecules themselves are checked.
        reference: The true pose of the same molecule, in the same frame; needs no receptor, and
            with one the identity of the molecules is checked too.
        out: The table: one row a pose, one column a check.
    """
    problems = Problems()
    records = []
    for record in read(poses, problems):
        if has_pose(record.molecule):
            records.append(record)
        else:
            problems.add(poses, record.place, f"{record.name} has no 3-D coordinates")
    if not records:
        why = f": {problems.lines()[0]}" if problems.found else ""
        raise InputError(f"{poses}: no pose could be read{why}")
    true = None if reference is None else molecules.reference(reference)
    unread = len(problems.found)
    table = _bust(records, receptor, true, poses, problems)
    for record, row in zip(records, table, strict=True):
        row["rmsd"] = "" if true is None else _rmsd(true, record, poses, problems)
    names = list(dict.fromkeys(name for row in table for name in row))
    with save_atomic(out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(table)
    _report(problems)
    passed = sum(row["passed"] for row in table)
    text = f"{out}: {len(table)} poses, {passed} pass all checks, {unread} unreadable"
    if true is not None:
        near = sum(row["rmsd"] != "" and float(row["rmsd"]) <= 2 for row in table)
        text += f", {near} within 2 Å"
    print(text)
    return None


def _report(problems: Problems) -> None:
    """One line for each place, or for each reason that holds for several."""
    counts = Counter((name, reason) for name, _, reason in problems.found)
    for name, place, reason in problems.found:
        if count := counts.pop((name, reason), 0):
            more = f" and {count - 1} more" if count > 1 else ""
            print(f"{name}: {place}{more}: {reason}")


def _bust(
    records: list[Record],
    receptor: Path | None,
    true: Chem.Mol | None,
    path: Path,
    problems: Problems,
) -> list[dict[str, Any]]:
    """PoseBusters' checks of each pose; blank where one cannot be made."""
    try:
        posebusters: Any = importlib.import_module("posebusters")
    except ImportError:
        raise InputError(
            "posebusters is not installed: pip install 'cohobate-docking[checks]'"
        ) from None
    busters = posebusters.PoseBusters(
        config="mol" if receptor is None else "dock" if true is None else "redock"
    )
    # The distance is left to `_rmsd`: this one cannot compare every pair of protonation states.
    modules = busters.config["modules"]
    busters.config["modules"] = [m for m in modules if m["function"] != "rmsd"]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        protein = None
        if receptor is not None:
            protein = Path(folder) / "receptor.pdb"
            protein.write_text(read_receptor(receptor).make_pdb_string())
        for record in records:
            try:
                (checks,) = busters.bust([record.molecule], true, protein).to_dict("records")
            except Exception as error:  # whatever rdkit raises about this molecule
                problems.add(path, record.place, f"PoseBusters cannot check it: {error}")
                checks = {}
            kept = {n: bool(v) if v in (True, False) else "" for n, v in checks.items()}
            passed = bool(kept) and all(v is True for v in kept.values())
            table.append({"name": record.name, "passed": passed, **kept})
    return table


def _rmsd(true: Chem.Mol, record: Record, path: Path, problems: Problems) -> str:
    """Symmetry-corrected RMSD, Å, by elements and bonds alone: protonation states may differ."""
    both = [Chem.RemoveHs(m) for m in (true, record.molecule)]
    places = [m.GetConformer().GetPositions() for m in both]
    numbers = [np.array([a.GetAtomicNum() for a in m.GetAtoms()]) for m in both]
    bonds = [Chem.GetAdjacencyMatrix(m) for m in both]
    try:
        if len(numbers[0]) != len(numbers[1]):
            raise NonIsomorphicGraphs
        return f"{symmrmsd(*places, *numbers, *bonds):.3f}"
    except NonIsomorphicGraphs:
        problems.add(path, record.place, "a pose is not the reference's molecule")
        return ""
