"""Receptors from PDB, mmCIF and PDBQT, and the pocket in them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gemmi
import numpy as np

from cohobate.core.errors import InputError
from cohobate.docking.data.files import is_gzip, kind, reading

RESIDUES = (
    "ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE",
    "LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL",  # codespell:ignore ser
)  # fmt: skip
"""Types of residues by index; what is none of them has index 20."""

_PROTONATED = {
    "HID": "H", "HIE": "H", "HIP": "H", "HSD": "H", "HSE": "H", "HSP": "H", "CYX": "C",
    "CYM": "C", "ASH": "D", "GLH": "E", "LYN": "K",
}  # fmt: skip
_BACKBONE = {"N", "CA", "C", "O", "OXT"}
_AUTODOCK = {"A": "C", "OA": "O", "OS": "O", "NA": "N", "NS": "N", "SA": "S", "HD": "H", "HS": "H"}


class Chain(NamedTuple):
    """A whole chain of a protein.

    Attributes:
        sequence: In one-letter code.
        msa: File with its alignment, where there is one.
    """

    sequence: str
    msa: Path | None = None


@dataclass(frozen=True)
class Pocket:
    """Residues around a binding site, in the receptor's own frame.

    Attributes:
        types: Index in `RESIDUES`, 20 for another (P,).
        ca: Cα positions (P, 3), Å.
        side: Centroids of the side chains' heavy atoms, Cα where there are none (P, 3), Å.
        names: ``chain:number+insertion code`` of each residue.
        chains: The whole chains that line it; none where only the pocket is known.
        embedding: Of the whole protein, by a protein language model (C,), where there is one.
    """

    types: np.ndarray
    ca: np.ndarray
    side: np.ndarray
    names: tuple[str, ...]
    chains: tuple[Chain, ...] = ()
    embedding: np.ndarray | None = None

    @property
    def centre(self) -> np.ndarray:
        """Mean of the Cα positions (3,): the origin of the pocket frame."""
        return self.ca.mean(0)

    def nearest(self, point: np.ndarray, count: int) -> Pocket:
        """The ``count`` residues whose side chains are nearest to a point, in their order."""
        if len(self.types) <= count:
            return self
        near = np.sort(np.linalg.norm(self.side - point, axis=1).argsort(kind="stable")[:count])
        names = tuple(self.names[i] for i in near)
        return replace(
            self, types=self.types[near], ca=self.ca[near], side=self.side[near], names=names
        )


def read_receptor(path: Path, *, hydrogens: bool = False) -> gemmi.Structure:
    """Read a receptor: ``.pdb``, ``.cif``, ``.mmcif``, ``.pdbqt``, each also ``.gz``.

    Waters, hydrogens and alternative positions are left out.

    Args:
        path: The file.
        hydrogens: Keep them.

    Raises:
        InputError: The file is missing, damaged, of another kind, or has no protein.
    """
    with reading(path):
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if is_gzip(path) else raw).decode()
    suffix = kind(path)
    try:
        if suffix in (".pdb", ".ent"):
            structure = gemmi.read_pdb_string(text)
        elif suffix in (".cif", ".mmcif"):
            structure = gemmi.make_structure_from_block(gemmi.cif.read_string(text).sole_block())
        elif suffix == ".pdbqt":
            structure = gemmi.read_pdb_string(_as_pdb(text))
        else:
            raise InputError(f"{path}: a receptor is .pdb, .cif or .pdbqt (or that with .gz)")
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    structure.setup_entities()
    structure.remove_waters()
    if not hydrogens:
        structure.remove_hydrogens()
    structure.remove_alternative_conformations()
    structure.remove_empty_chains()
    if len(structure) == 0 or not any(_protein(r) for chain in structure[0] for r in chain):
        raise InputError(f"{path}: no amino acid with a Cα atom")
    return structure


def find_pocket(
    structure: gemmi.Structure,
    *,
    ligand: np.ndarray | None = None,
    cutoff: float = 8.0,
    box: tuple[Sequence[float], Sequence[float]] | None = None,
    residues: Sequence[str] | None = None,
    source: str = "receptor",
) -> Pocket:
    """The residues of a pocket; exactly one of ``ligand``, ``box`` and ``residues`` is given.

    Args:
        structure: From `read_receptor`.
        ligand: Positions of a reference ligand (A, 3), Å.
        cutoff: Residues with a heavy atom this near to the ligand, Å.
        box: Centre and size, Å: residues with a heavy atom inside.
        residues: ``A:123`` or ``123``, with insertion code ``A:123B``.
        source: Name for messages.

    Raises:
        InputError: The pocket has no residue, or a named one does not exist.
    """
    if sum(x is not None for x in (ligand, box, residues)) != 1:
        raise InputError(f"{source}: give the pocket by a ligand, a box, or residues")
    if ligand is not None and len(ligand) > 3 and not np.any(ligand[:, 2]):  # a drawing
        raise InputError(f"{source}: the reference ligand has no 3-D coordinates")
    if box is not None:
        check_box(*box, source)
    found: list[gemmi.Residue] = []
    names: list[str] = []
    wanted = None if residues is None else {str(name).strip() for name in residues}
    for chain in structure[0]:
        for residue in chain:
            if not _protein(residue):
                continue
            full = f"{chain.name}:{residue.seqid}".replace(" ", "")
            if wanted is not None:
                inside = bool({full, str(residue.seqid).strip()} & wanted)
                wanted -= {full}
            else:
                inside = _near(_positions(residue), ligand, cutoff, box)
            if inside:
                found.append(residue)
                names.append(full)
    missing = sorted(w for w in wanted or () if not any(n.endswith(f":{w}") for n in names))
    if missing:
        raise InputError(f"{source}: no residue {missing[0]}")
    if not found:
        what = "box" if ligand is None else "ligand"
        raise InputError(f"{source}: the pocket has no residue; is the {what} in its frame?")
    ca = np.array([r["CA"][0].pos.tolist() for r in found])
    side = np.array([_side(r) for r in found])
    types = np.array([RESIDUES.index(r.name) if r.name in RESIDUES else 20 for r in found])
    return Pocket(types, ca, side, tuple(names))


def check_box(centre: Sequence[float], size: Sequence[float], source: str) -> None:
    """Refuse a box that is none.

    Raises:
        InputError: The centre is not three numbers, or the size not three above 0.
    """
    numbers = np.array([*centre, *size], dtype=float)
    if numbers.shape != (6,) or not np.isfinite(numbers).all() or (numbers[3:] <= 0).any():
        raise InputError(
            f"{source}: a box has a centre of three numbers and a size of three above 0, Å; "
            f"not {tuple(centre)} and {tuple(size)}"
        )


def with_chains(structure: gemmi.Structure, pocket: Pocket) -> Pocket:
    """The pocket with the whole chains that line it, in the order of the file.

    A sequence is the file's SEQRES where it has one, else the residues that were resolved.
    Modified residues count as what they were made from.

    Args:
        structure: From `read_receptor`, of a file that holds whole chains.
        pocket: From `find_pocket`.
    """
    lining = {name.rpartition(":")[0] for name in pocket.names}
    found = []
    for chain in structure[0]:
        polymer = chain.get_polymer()
        if chain.name.replace(" ", "") not in lining or not len(polymer):
            continue
        entity = structure.get_entity_of(polymer)
        # Where positions were found to hold one of several residues, the first is taken.
        names = [gemmi.Entity.first_mon(n) for n in entity.full_sequence] if entity else []
        names = names or [r.name for r in polymer if _protein(r)]
        found.append(Chain("".join(map(_letter, names))))
    return replace(pocket, chains=tuple(found))


def crop(structure: gemmi.Structure, pocket: Pocket) -> str:
    """The pocket's residues as PDB text, for files people look at."""
    small = structure.clone()
    keep = set(pocket.names)
    for chain in small[0]:
        for number in reversed(range(len(chain))):
            if f"{chain.name}:{chain[number].seqid}".replace(" ", "") not in keep:
                del chain[number]
    small.remove_empty_chains()
    return small.make_pdb_string(gemmi.PdbWriteOptions(minimal=True))


def heavy_atoms(structure: gemmi.Structure, pocket: Pocket) -> list[tuple[str, np.ndarray]]:
    """Name, as in the file, and positions of the atoms (…, 3), Å, of each of a pocket's residues.

    Args:
        structure: From `read_receptor`, without hydrogens.
        pocket: Of that structure.
    """
    found = {
        f"{chain.name}:{residue.seqid}".replace(" ", ""): (residue.name, _positions(residue))
        for chain in structure[0]
        for residue in chain
        if _protein(residue)
    }
    return [found[name] for name in pocket.names]


def _protein(residue: gemmi.Residue) -> bool:
    return "CA" in residue and residue["CA"][0].element.name == "C" and "N" in residue


def _letter(name: str) -> str:
    own = gemmi.find_tabulated_residue(name).one_letter_code.strip().upper()
    return _PROTONATED.get(name) or own or "X"


def _positions(residue: gemmi.Residue) -> np.ndarray:
    return np.array([atom.pos.tolist() for atom in residue])


def _side(residue: gemmi.Residue) -> np.ndarray:
    own = [atom.pos.tolist() for atom in residue if atom.name not in _BACKBONE]
    return np.mean(own, 0) if own else np.array(residue["CA"][0].pos.tolist())


def _near(
    atoms: np.ndarray,
    ligand: np.ndarray | None,
    cutoff: float,
    box: tuple[Sequence[float], Sequence[float]] | None,
) -> bool:
    if ligand is not None:
        return bool((np.linalg.norm(atoms[:, None] - ligand, axis=-1) <= cutoff).any())
    assert box is not None
    return bool((np.abs(atoms - np.asarray(box[0])) <= np.asarray(box[1]) / 2).all(-1).any())


def _as_pdb(text: str) -> str:
    """PDBQT with elements where PDB has them: AutoDock's atom types stand in their place."""
    lines = []
    for line in text.splitlines():
        if line.startswith(("ATOM", "HETATM")):
            kind = line[77:79].strip()
            element = _AUTODOCK.get(kind, kind)
            lines.append(f"{line[:66]:<76}{element.upper():>2}")
        elif line.startswith(("TER", "END", "MODEL")):
            lines.append(line)
    return "\n".join(lines) + "\n"
