"""BindingDB tables: measured affinities without poses."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from rdkit import Chem

from cohobate.core.errors import InputError
from cohobate.docking.data.features import Complex
from cohobate.docking.data.files import reading, table
from cohobate.docking.data.molecules import Problems, largest_fragment, parse_smiles, reference
from cohobate.docking.data.receptors import Pocket, find_pocket, read_receptor, with_chains

MEASURES = ("Kd (nM)", "Ki (nM)", "IC50 (nM)")
"""Columns of an affinity, the first that is filled counts."""

_SMILES, _TARGET, _NUMBER = "Ligand SMILES", "Target Name", "BindingDB MonomerID"


def bindingdb(folder: Path, problems: Problems) -> Iterator[Complex]:
    """Complexes of ``*.tsv`` tables as BindingDB offers them, and ``receptors.csv`` beside them.

    Labels are 9 - log10 of the value in nM, the median where a molecule was measured several times.
    Bounds such as ``>10000`` are no values; they are listed as not readable.

    Args:
        folder: With tables and ``receptors.csv``: target (the table's ``Target Name``), receptor
            and ligand, a file of a reference ligand in the site.
        problems: Gets what could not be read.

    Raises:
        InputError: A table lacks a column, or a receptor cannot be read.
    """
    sites = _sites(folder / "receptors.csv")
    values: dict[tuple[str, str], list[float]] = {}
    names: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.tsv")):
        with (
            reading(path),
            path.open(newline="", encoding="utf-8-sig", errors="replace") as file,
        ):
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if missing := {_SMILES, _TARGET} - set(reader.fieldnames or ()):
                raise InputError(f"{path}: no column {min(missing)}")
            for line, row in enumerate(reader, 2):
                if row[_TARGET] not in sites:
                    continue
                value, why = _affinity(row)
                molecule = None
                if value is not None:
                    molecule, why = parse_smiles(row[_SMILES] or "")
                if value is None or molecule is None:
                    problems.add(path, f"line {line}", why)
                    continue
                key = (row[_TARGET], Chem.MolToSmiles(largest_fragment(molecule)))
                values.setdefault(key, []).append(value)
                names.setdefault(key, row.get(_NUMBER) or f"line {line}")
    for (target, smiles), found in values.items():
        molecule = Chem.MolFromSmiles(smiles)
        yield Complex(
            target, names[target, smiles], molecule, sites[target], statistics.median(found)
        )


def _affinity(row: dict[str, str]) -> tuple[float | None, str]:
    """pK, or why there is none."""
    for name in MEASURES:
        text = (row.get(name) or "").strip()
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            return None, f"{name} {text}: not a value"
        if value <= 0:
            return None, f"{name} {text}: not above 0"
        return 9 - math.log10(value), ""
    return None, f"no {', '.join(MEASURES)}"


def _sites(path: Path) -> dict[str, Pocket]:
    found = {}
    for line, row in table(path):
        if not all(row.get(k) for k in ("target", "receptor", "ligand")):
            raise InputError(f"{path}: line {line}: needs target, receptor and ligand")
        atoms = reference(path.parent / row["ligand"]).GetConformer().GetPositions()
        receptor = path.parent / row["receptor"]
        structure = read_receptor(receptor)
        pocket = find_pocket(structure, ligand=atoms, source=str(receptor))
        found[row["target"]] = with_chains(structure, pocket)
    return found


__all__ = ["bindingdb"]
