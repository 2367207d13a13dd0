"""AutoDock Vina through its Python wheel: the baseline, and what labels the embedded data.

Needs the extra: ``pip install 'cohobate-docking[vina]'``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from cohobate.core.errors import InputError
from cohobate.docking.data.files import reading
from cohobate.docking.data.receptors import check_box, read_receptor


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is not installed: pip install 'cohobate-docking[vina]'") from None


@dataclass(frozen=True)
class Box:
    """A search box.

    Attributes:
        centre: Å, (3,).
        size: Å, (3,).

    Raises:
        InputError: They are not finite, or the box has no volume.
    """

    centre: tuple[float, float, float]
    size: tuple[float, float, float]

    def __post_init__(self) -> None:
        check_box(self.centre, self.size, "box")

    @staticmethod
    def read(path: Path) -> Box:
        """Read ``center_x = ...`` and ``size_x = ...`` lines, as Vina's configuration has them.

        Raises:
            InputError: The file cannot be read, lacks one of the six numbers, or has no volume.
        """
        with reading(path):
            text = path.read_text(encoding="utf-8-sig")
        found = dict(re.findall(r"^\s*(\w+)\s*=\s*(-?[\d.]+(?:[eE][-+]?\d+)?)", text, re.MULTILINE))
        try:
            values = [float(found[f"{key}_{axis}"]) for key in ("center", "size") for axis in "xyz"]
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: not a box file, no number for {error}") from None
        check_box(values[:3], values[3:], str(path))
        return Box((values[0], values[1], values[2]), (values[3], values[4], values[5]))


@dataclass(frozen=True)
class Docked:
    """Poses of one molecule, best first.

    Attributes:
        poses: Molecule with one conformer a pose, without hydrogens.
        scores: Vina scores (P,), kcal/mol, lower is better.
    """

    poses: Chem.Mol
    scores: np.ndarray


class Docker:
    """Docks molecules into one receptor.

    Args:
        receptor: Prepared receptor, PDBQT.
        box: Where to search.
        exhaustiveness: Independent searches; Vina's own default is 8.
        seed: Same seed, same poses.
        cores: Threads.
    """

    def __init__(
        self, receptor: Path, box: Box, *, exhaustiveness: int = 8, seed: int = 0, cores: int = 1
    ) -> None:
        vina = _require("vina")
        _require("meeko")
        if not receptor.exists():
            raise InputError(f"{receptor}: no such file")
        # Vina takes seed 0 for a random one.
        self._vina = vina.Vina(sf_name="vina", cpu=cores, seed=seed + 1, verbosity=0)
        try:
            self._vina.set_receptor(str(receptor))
            self._vina.compute_vina_maps(center=list(box.centre), box_size=list(box.size))
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{receptor}: {_line(error)}") from None
        self.exhaustiveness, self.seed = exhaustiveness, seed

    def dock(self, molecule: Chem.Mol, poses: int = 1) -> Docked:
        """Dock a molecule from a fresh conformer.

        Args:
            molecule: With or without hydrogens and coordinates.
            poses: At most so many poses.

        Raises:
            InputError: No conformer can be made, or Vina refuses the molecule.
        """
        meeko = _require("meeko")
        ready = conformer(molecule, self.seed)
        try:
            setup = meeko.MoleculePreparation().prepare(ready)[0]
            text, good, why = meeko.PDBQTWriterLegacy.write_string(setup)
            if not good:
                raise InputError(f"{Chem.MolToSmiles(molecule)}: {_line(why)}")
            self._vina.set_ligand_from_string(text)
            self._vina.dock(exhaustiveness=self.exhaustiveness, n_poses=poses)
            scores = self._vina.energies(n_poses=poses)[:, 0]
            found = meeko.PDBQTMolecule(self._vina.poses(n_poses=poses), skip_typing=True)
            docked = meeko.RDKitMolCreate.from_pdbqt_mol(found)[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"{Chem.MolToSmiles(molecule)}: {_line(error)}") from None
        return Docked(like(molecule, Chem.RemoveHs(docked)), np.asarray(scores))


def conformer(molecule: Chem.Mol, seed: int) -> Chem.Mol:
    """One MMFF-relaxed ETKDG conformer with hydrogens.

    Raises:
        InputError: ETKDG finds none.
    """
    ready = Chem.AddHs(Chem.RemoveHs(molecule))
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = seed
    if rdDistGeom.EmbedMolecule(ready, parameters) < 0:
        parameters.useRandomCoords = True
        if rdDistGeom.EmbedMolecule(ready, parameters) < 0:
            raise InputError(f"{Chem.MolToSmiles(molecule)}: no 3-D conformer")
    with contextlib.suppress(ValueError, RuntimeError):  # atoms MMFF does not know: as embedded
        rdForceFieldHelpers.MMFFOptimizeMolecule(ready)
    return ready


def like(template: Chem.Mol, posed: Chem.Mol) -> Chem.Mol:
    """The template's own molecule (bonds, stereo, atom order) with the coordinates of ``posed``.

    Raises:
        InputError: They are not the same molecule.
    """
    plain = Chem.RemoveHs(template)
    match = posed.GetSubstructMatch(plain)
    if len(match) != plain.GetNumAtoms() or posed.GetNumAtoms() != plain.GetNumAtoms():
        raise InputError(f"{Chem.MolToSmiles(template)}: docking changed the molecule")
    result = Chem.Mol(plain)
    result.RemoveAllConformers()
    for found in posed.GetConformers():
        one = Chem.Conformer(plain.GetNumAtoms())
        one.SetPositions(found.GetPositions()[list(match)].astype(np.float64))
        result.AddConformer(one, assignId=True)
    return result


def prepared(receptor: Path) -> str:
    """A receptor as PDBQT text, by Meeko; residues it does not know are left out.

    Args:
        receptor: PDB with hydrogens, also ``.gz``; waters and alternative positions are left out.

    Raises:
        InputError: The file cannot be read, or Meeko refuses it.
    """
    meeko = _require("meeko")
    structure = read_receptor(receptor, hydrogens=True)
    structure.remove_ligands_and_waters()
    try:
        polymer = meeko.Polymer.from_pdb_string(
            structure.make_pdb_string(),
            meeko.ResidueChemTemplates.create_from_defaults(),
            meeko.MoleculePreparation(),
            allow_bad_res=True,
        )
        text, _ = meeko.PDBQTWriterLegacy.write_from_polymer(polymer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{receptor}: {_line(error)}") from None
    return str(text)


@contextlib.contextmanager
def as_pdbqt(text: str) -> Iterator[Path]:
    """A temporary file with this text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "receptor.pdbqt"
        path.write_text(text)
        yield path


def targets_folder() -> Path:
    """The prepared receptors and boxes in the ``dockstring`` wheel; its code is not run.

    Raises:
        InputError: It is not installed.
    """
    found = importlib.util.find_spec("dockstring")
    if found is None or not found.submodule_search_locations:
        raise InputError("dockstring is not installed: pip install 'cohobate-docking[vina]'")
    return Path(found.submodule_search_locations[0]) / "resources" / "targets"


def target(name: str) -> tuple[Path, Box]:
    """Receptor file and box of one of dockstring's 58 targets.

    Raises:
        InputError: There is no such target.
    """
    folder = targets_folder()
    receptor = folder / f"{name}_target.pdbqt"
    if not receptor.exists():
        known = sorted(p.name.removesuffix("_target.pdbqt") for p in folder.glob("*_target.pdbqt"))
        raise InputError(f"target {name}: unknown; there is: {', '.join(known)}")
    return receptor, Box.read(folder / f"{name}_conf.txt")


def _line(error: object) -> str:
    return " ".join(str(error).split())
