"""Possible chemistry at a pose: what is written of what a network has placed atom by atom."""

from __future__ import annotations

import numpy as np
from rdkit import Chem, ForceField  # noqa: F401 - older versions learn MMFF's classes from it
from rdkit.Chem import rdForceFieldHelpers, rdMolAlign

from cohobate.core.errors import InputError
from cohobate.docking import vina


def relaxed(molecule: Chem.Mol, pose: np.ndarray, seed: int, pull: float = 20.0) -> Chem.Mol:
    """The molecule at a pose, with the bond lengths and stereo that its SMILES has.

    A network places atoms one by one. A conformer of the right chemistry is laid on them, pulled
    towards them by springs under MMFF94 and let go; the springs are weaker where they would turn a
    stereo centre or double bond over. Where no conformer can be made the atoms stay as they are.

    Args:
        molecule: Without hydrogens.
        pose: Positions (A, 3), Å.
        seed: Of the conformer.
        pull: Strength of the springs, kcal/mol/Å².

    Raises:
        InputError: MMFF94 fails on it.
    """
    count = molecule.GetNumAtoms()
    raw = Chem.Conformer(count)
    raw.SetPositions(pose)
    raw.Set3D(True)
    target = Chem.Mol(molecule)
    target.AddConformer(raw, assignId=True)
    try:
        start = vina.conformer(molecule, seed)
    except InputError:
        return target
    rdMolAlign.AlignMol(start, target, atomMap=[(i, i) for i in range(count)])
    wanted = _stereo(start)
    for strength in (pull, pull / 10, 0.0):
        made = Chem.Mol(start)
        try:
            _pull(made, pose, strength)
        except RuntimeError as error:  # such as for one atom alone
            raise InputError(f"cannot be relaxed: {str(error).strip().splitlines()[0]}") from None
        if _stereo(made) == wanted:
            break
    return Chem.RemoveHs(made)


def _pull(molecule: Chem.Mol, pose: np.ndarray, strength: float) -> None:
    """Minimise with a spring from each of the first atoms to its place; none where MMFF fails."""
    terms = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    if terms is None or strength == 0:
        return
    field = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, terms)
    for i, point in enumerate(pose.tolist()):
        spring = field.AddExtraPoint(*point, fixed=True) - 1
        field.MMFFAddDistanceConstraint(spring, i, False, 0.0, 0.0, strength)
    field.Initialize()
    field.Minimize(maxIts=500)
    rdForceFieldHelpers.MMFFOptimizeMolecule(molecule, maxIters=500)  # what the springs strained


def _stereo(molecule: Chem.Mol) -> str:
    """SMILES with the stereo of the coordinates."""
    seen = Chem.RemoveHs(molecule)
    Chem.AssignStereochemistryFrom3D(seen)
    return str(Chem.MolToSmiles(seen))
