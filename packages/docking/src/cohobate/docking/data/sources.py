"""Where complexes come from: embedded, the FEP benchmark's layout, PDBbind-style folders."""

from __future__ import annotations

import importlib.resources
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rdkit import Chem

from cohobate.core.errors import InputError
from cohobate.docking.data.bindingdb import bindingdb
from cohobate.docking.data.features import Complex
from cohobate.docking.data.files import table
from cohobate.docking.data.molecules import Problems, Record, has_pose, read
from cohobate.docking.data.receptors import Chain, Pocket, find_pocket, read_receptor, with_chains

KCAL_PER_PK = 1.3643
"""kcal/mol of binding free energy for one unit of pK at 298 K: RT ln 10."""


def embedded_folder() -> Path:
    """Poses and pockets in the wheel, written by ``cohobate-docking prepare``."""
    return Path(str(importlib.resources.files("cohobate.docking.data") / "embedded"))


def load(root: Path | None, problems: Problems) -> list[Complex]:
    """All complexes of a folder; its layout is recognised.

    Args:
        root: ``index.csv.gz`` and ``systems/`` (FEP benchmark); ``<target>.poses.sdf.gz`` (as
            ``prepare`` writes); or a folder of ``<id>/<id>_protein.pdb`` with
            ``<id>/<id>_ligand.sdf`` or ``.mol2`` and an ``affinities.csv`` with columns ``id`` and
            ``pK``, and where they are known ``error`` (σ of the pK) and ``target`` (name of the
            protein), PDBbind-style; or BindingDB's ``*.tsv`` with ``receptors.csv``. ``None`` is
            the embedded set. The last two have whole receptors; with any, ``sequences.csv``
            (target, sequence, and where there is one msa, a file) may name the chains, one a line.
        problems: Gets what could not be read.

    Raises:
        InputError: The folder has none of these layouts, or one of its tables is not as it should.
    """
    folder = embedded_folder() if root is None else Path(root)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / "index.csv.gz").exists():
        found = list(_fep(folder, problems))
    elif list(folder.glob("*.poses.sdf.gz")):
        found = list(_prepared(folder, problems))
    elif list(folder.glob("*/*_protein.pdb*")):
        found = list(_pdbbind(folder, problems))
    elif list(folder.glob("*.tsv")) and (folder / "receptors.csv").exists():
        found = list(bindingdb(folder, problems))
    else:
        raise InputError(
            f"{folder}: no complexes (index.csv.gz with systems/, *.poses.sdf.gz, "
            "<id>/<id>_protein.pdb with <id>/<id>_ligand.sdf, or *.tsv with receptors.csv)"
        )
    if not found:
        raise InputError(f"{folder}: no complex could be read")
    _name_chains(folder / "sequences.csv", found)
    return found


def _prepared(folder: Path, problems: Problems) -> Iterator[Complex]:
    """What ``prepare`` wrote; the label is the Vina score in units of pK."""
    for path in sorted(folder.glob("*.poses.sdf.gz")):
        target = path.name.removesuffix(".poses.sdf.gz")
        records = list(read(path, problems))
        if not records:
            continue
        pocket = _around(folder / f"{target}.pocket.pdb.gz", records)
        for record in records:
            score = record.row.get("vina_kcal_mol")
            if not isinstance(score, int | float):
                raise InputError(f"{path}: {record.place}: no number in vina_kcal_mol")
            yield Complex(target, record.name, _plain(record), pocket, -score / KCAL_PER_PK)


def _fep(folder: Path, problems: Problems) -> Iterator[Complex]:
    """The public FEP benchmark as converted: measured ΔG, modelled poses; target = protein."""
    labels: dict[str, tuple[str, float]] = {}
    path = folder / "index.csv.gz"
    for line, row in table(path):
        _needs(row, ("system", "index", "protein", "pK"), path)
        relative = row.get("relative_only", "").lower() not in ("", "0", "false")
        label = float("nan") if relative else _number(row["pK"], "pK", path, line)
        labels[f"{row['system']}:{row['index']}"] = (row["protein"], label)
    for path in sorted((folder / "systems").glob("*.ligands.sdf.gz")):
        system = path.name.removesuffix(".ligands.sdf.gz")
        records = list(read(path, problems))
        if not records:
            continue
        pocket = _around(path.with_name(f"{system}.pocket.pdb.gz"), records)
        for record in records:
            if record.name not in labels:
                problems.add(path, record.place, f"{record.name} is not in index.csv.gz")
                continue
            protein, label = labels[record.name]
            yield Complex(protein, record.name, _plain(record), pocket, label)


def _pdbbind(folder: Path, problems: Problems) -> Iterator[Complex]:
    """Complexes of a protein's file each; without names of targets all labels are one list."""
    known = _affinities(folder / "affinities.csv")
    for protein in sorted(folder.glob("*/*_protein.pdb*")):
        name = protein.parent.name
        ligands = [
            p for s in ("sdf", "mol2") if (p := protein.with_name(f"{name}_ligand.{s}")).exists()
        ]
        if not ligands:
            problems.add(protein, "folder", f"no {name}_ligand.sdf or .mol2")
            continue
        record = next((r for path in ligands for r in read(path, problems)), None)
        if record is None:
            continue
        try:
            pocket = _around(protein, [record], whole=True)
        except InputError as error:
            problems.add(protein, "pocket", str(error))
            continue
        label, sigma, target = known.get(name, (float("nan"), 1.0, ""))
        group = target or folder.name
        yield Complex(target or name, name, _plain(record), pocket, label, sigma, group)


def _affinities(path: Path) -> dict[str, tuple[float, float, str]]:
    """pK, its σ, and the target, empty when not named, by id."""
    found = {}
    for line, row in table(path) if path.exists() else ():
        _needs(row, ("id", "pK"), path)
        sigma = _number(row.get("error", ""), "error", path, line)
        if sigma <= 0:
            raise InputError(f"{path}: line {line}: error {sigma:g} is not above 0")
        known = 1.0 if math.isnan(sigma) else sigma
        found[row["id"]] = (_number(row["pK"], "pK", path, line), known, row.get("target", ""))
    return found


def _needs(row: dict[str, str], columns: tuple[str, ...], path: Path) -> None:
    missing = [name for name in columns if name not in row]
    if missing:
        raise InputError(f"{path}: no column {missing[0]} (it has: {', '.join(row)})")


def _number(text: str, column: str, path: Path, line: int) -> float:
    """A number, NaN where there is none."""
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.inf
    if math.isinf(value):
        raise InputError(f"{path}: line {line}: {column} {text[:40]} is no number")
    return value


def _name_chains(path: Path, complexes: list[Complex]) -> None:
    """Give pockets the chains that a table names for their target."""
    if not path.exists():
        return
    chains: dict[str, tuple[Chain, ...]] = defaultdict(tuple)
    for line, row in table(path):
        target, sequence, msa = (row.get(k, "") for k in ("target", "sequence", "msa"))
        if not (target and sequence.isascii() and sequence.isalpha()):
            raise InputError(f"{path}: line {line}: needs target and sequence, letters alone")
        file_of = (path.parent / msa).resolve() if msa else None
        if file_of is not None and not file_of.exists():
            raise InputError(f"{path}: line {line}: no alignment {file_of}")
        chains[target] += (Chain(sequence.upper(), file_of),)
    # A target's molecules go on sharing one pocket.
    named: dict[int, Pocket] = {}
    for one in complexes:
        if one.target in chains:
            new = replace(one.pocket, chains=chains[one.target])
            one.pocket = named.setdefault(id(one.pocket), new)


def by_target(complexes: list[Complex]) -> dict[str, list[int]]:
    """Places of each target's complexes, targets sorted."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, one in enumerate(complexes):
        found[one.target].append(place)
    return dict(sorted(found.items()))


def _around(path: Path, records: list[Record], *, whole: bool = False) -> Pocket:
    posed = [r.molecule.GetConformer().GetPositions() for r in records if has_pose(r.molecule)]
    if not posed:
        raise InputError(f"{path}: {records[0].name}: the ligand has no 3-D coordinates")
    structure = read_receptor(path)
    pocket = find_pocket(structure, ligand=np.concatenate(posed), cutoff=8.0, source=str(path))
    return with_chains(structure, pocket) if whole else pocket


def _plain(record: Record) -> Chem.Mol:
    """Without hydrogens, and without what is a drawing and no pose."""
    molecule = Chem.RemoveHs(record.molecule)
    if not has_pose(molecule):
        molecule.RemoveAllConformers()
    return molecule
