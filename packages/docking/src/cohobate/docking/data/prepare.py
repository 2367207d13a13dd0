"""``cohobate-docking prepare``: dock a drug-like list with Vina into targets of known structure."""

from __future__ import annotations

import csv
import gzip
import math
import random
import time
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from rdkit import Chem, RDConfig
from rdkit.Chem import FilterCatalog, rdMolDescriptors
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.docking import vina
from cohobate.docking.data.files import reading, table
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.data.receptors import Chain, crop, find_pocket, read_receptor, with_chains

_RESIDUE_CUT = 8.0
_ORGANIC = {1, 6, 7, 8, 9, 16, 17, 35}


def prepare(
    out: Path,
    targets: list[str] = ["ADRB2", "CDK2", "ESR1", "F10", "HSP90AA1", "PARP1"],  # noqa: B006 (read only)
    library: Path | None = None,
    ligands: int = 60,
    exhaustiveness: int = 4,
    box: float | None = 20.0,
    seed: int = 0,
    minutes: float | None = None,
) -> int | None:
    """Dock a drug-like list into targets with Vina; write poses, scores, pockets and sequences.

    The receptors and the centres of their boxes come from the dockstring wheel, the molecules by
    default from the NCI list in the rdkit wheel, filtered to drug-like ones. What is already
    written is kept, so a stopped run goes on. The labels are Vina scores, not measurements.

    Args:
        out: Folder for ``<target>.poses.sdf.gz``, ``<target>.pocket.pdb.gz`` and ``sequences.csv``.
        targets: Names in dockstring.
        library: A SMILES file instead of the NCI list.
        ligands: Number of molecules, each docked into every target.
        exhaustiveness: Vina's independent searches.
        box: Edge of the search box in Å; null takes dockstring's own 30 Å.
        seed: Seed of choice and docking.
        minutes: Stop after so long; call again to go on.

    Raises:
        InputError: A target is unknown, an option is out of range, or the folder cannot be written.
    """
    if not targets or ligands < 1 or exhaustiveness < 1:
        raise InputError("prepare: needs at least one of targets, of ligands and of exhaustiveness")
    stop = math.inf if minutes is None else time.monotonic() + 60 * minutes
    molecules = choose(library or Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi", ligands, seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be a folder: {error.strerror}") from None
    bar = tqdm(total=len(targets) * len(molecules), unit="ligand")
    for name in targets:
        receptor, where = vina.target(name)
        if box is not None:
            where = vina.Box(where.centre, (box, box, box))
        path = out / f"{name}.poses.sdf.gz"
        done = _read(path)
        bar.update(len(done))
        left = [m for m in molecules if m.GetProp("_Name") not in done]
        docker = None
        for molecule in left:
            if time.monotonic() >= stop:
                _write(path, done, molecules)
                print(f"{out}: stopped; the same command goes on")
                return 1
            docker = docker or vina.Docker(
                receptor, where, exhaustiveness=exhaustiveness, seed=seed
            )
            try:
                done[molecule.GetProp("_Name")] = _posed(docker, molecule, name)
            except InputError as error:
                tqdm.write(f"{name}: {error}")
            bar.update()
        _write(path, done, molecules)
        if not done:
            raise InputError(f"{name}: none of the molecules could be docked")
        chains = _write_pocket(receptor, out / f"{name}.pocket.pdb.gz", list(done.values()))
        write_sequences(out / "sequences.csv", name, chains)
    return None


def choose(path: Path, count: int, seed: int, without: Collection[str] = ()) -> list[Chem.Mol]:
    """A seeded choice of drug-like molecules, no two of one SMILES.

    Args:
        path: SMILES file: SMILES, then a name.
        count: How many.
        seed: Of the choice.
        without: SMILES, as rdkit writes them, that are left out.

    Raises:
        InputError: The file has fewer.
    """
    found = [m for m in _all_drug_like(path) if Chem.MolToSmiles(m) not in without]
    if len(found) < count:
        raise InputError(f"{path}: {len(found)} drug-like molecules, {count} are wanted")
    return random.Random(seed).sample(found, count)


@lru_cache(maxsize=2)
def _all_drug_like(path: Path) -> list[Chem.Mol]:
    found: dict[str, Chem.Mol] = {}
    alerts = FilterCatalog.FilterCatalogParams()
    alerts.AddCatalog(FilterCatalog.FilterCatalogParams.FilterCatalogs.BRENK)
    catalogue = FilterCatalog.FilterCatalog(alerts)
    for record in read(path, Problems()):
        molecule = record.molecule
        if not drug_like(molecule) or catalogue.HasMatch(molecule):
            continue
        molecule.SetProp("_Name", record.name)
        found.setdefault(Chem.MolToSmiles(molecule), molecule)
    return sorted(found.values(), key=lambda m: m.GetProp("_Name"))


def drug_like(molecule: Chem.Mol) -> bool:
    """Whether a molecule is small, organic, neutral, and rather rigid; for embedded data.

    Example:
        >>> drug_like(Chem.MolFromSmiles("O=C(Nc1ccccc1)c1ccc(F)cc1"))
        True
        >>> drug_like(Chem.MolFromSmiles("CCO"))
        False
    """
    atoms = {atom.GetAtomicNum() for atom in molecule.GetAtoms()}
    return (
        "." not in Chem.MolToSmiles(molecule)
        and atoms <= _ORGANIC
        and all(atom.GetFormalCharge() == 0 for atom in molecule.GetAtoms())
        and 15 <= molecule.GetNumHeavyAtoms() <= 24
        and rdMolDescriptors.CalcNumRings(molecule) >= 2
        and rdMolDescriptors.CalcNumRotatableBonds(molecule) <= 4
        and 1.0 <= rdMolDescriptors.CalcCrippenDescriptors(molecule)[0] <= 5.0
        and rdMolDescriptors.CalcTPSA(molecule) <= 110
        and rdMolDescriptors.CalcNumHBD(molecule) <= 4
        and not Chem.FindMolChiralCenters(
            molecule, includeUnassigned=True, useLegacyImplementation=False
        )
    )


def _posed(docker: vina.Docker, molecule: Chem.Mol, name: str) -> Chem.Mol:
    found = docker.dock(molecule)
    pose = found.poses
    pose.SetProp("_Name", molecule.GetProp("_Name"))
    pose.SetProp("target", name)
    pose.SetProp("smiles", Chem.MolToSmiles(molecule))
    pose.SetProp("vina_kcal_mol", f"{found.scores[0]:.3f}")
    return pose


def _read(path: Path) -> dict[str, Chem.Mol]:
    if not path.exists():
        return {}
    with reading(path), gzip.open(path) as file:
        return {m.GetProp("_Name"): m for m in Chem.ForwardSDMolSupplier(file) if m is not None}


def _write(path: Path, done: dict[str, Chem.Mol], order: list[Chem.Mol]) -> None:
    """Write in the order of the list, so that a stopped and resumed run gives the same file."""
    blocks = [Chem.SDWriter.GetText(done[m.GetProp("_Name")]) for m in _known(done, order)]
    with save_atomic(path) as temporary:
        _gzip(temporary, "".join(blocks))


def _known(done: dict[str, Chem.Mol], order: list[Chem.Mol]) -> Iterator[Chem.Mol]:
    return (m for m in order if m.GetProp("_Name") in done)


def _write_pocket(receptor: Path, path: Path, poses: list[Chem.Mol]) -> tuple[Chain, ...]:
    """Write the residues around the poses; the whole chains that line them."""
    structure = read_receptor(receptor)
    atoms = np.concatenate([pose.GetConformer().GetPositions() for pose in poses])
    pocket = find_pocket(structure, ligand=atoms, cutoff=_RESIDUE_CUT, source=str(receptor))
    with save_atomic(path) as temporary:
        _gzip(temporary, crop(structure, pocket))
    return with_chains(structure, pocket).chains


def write_sequences(path: Path, target: str, chains: Sequence[Chain]) -> None:
    """Put a target's chains into a table (target, sequence); those of others stay."""
    known = [row for _, row in table(path)] if path.exists() else []
    rows = [(r["target"], r["sequence"]) for r in known if r.get("target") != target]
    rows += [(target, chain.sequence) for chain in chains]
    rows.sort(key=lambda row: row[0])
    with save_atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("target", "sequence"))
        writer.writerows(rows)


def _gzip(path: Path, text: str) -> None:
    """The same bytes every time: no name and no date inside."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(text.encode())
