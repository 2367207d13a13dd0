"""Properties of molecules that buyers filter by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rdkit import Chem, DataStructs
from rdkit.Chem import Descriptors, rdMolDescriptors

from cohobate.docking.data.features import bit_vector
from cohobate.docking.data.molecules import largest_fragment


def esol(molecule: Chem.Mol) -> float:
    """log10 of the solubility in water in mol/L, by ESOL.

    References:
        Delaney, J. Chem. Inf. Comput. Sci. 2004, 44, 1000.

    Example:
        >>> round(esol(Chem.MolFromSmiles("c1ccccc1")), 2)
        -2.13
    """
    aromatic = sum(atom.GetIsAromatic() for atom in molecule.GetAtoms())
    share = aromatic / max(molecule.GetNumHeavyAtoms(), 1)
    return (
        0.16 - 0.63 * _logp(molecule) - 0.0062 * _weight(molecule)
        + 0.066 * rdMolDescriptors.CalcNumRotatableBonds(molecule) - 0.74 * share
    )  # fmt: skip


@dataclass(frozen=True)
class Filters:
    """Limits on what is offered; the defaults are the paper's.

    Args:
        weight: Least molecular weight, g/mol.
        logp: Largest cLogP.
        donors: Most hydrogen-bond donors.
        acceptors: Most hydrogen-bond acceptors.
        solubility: Least ESOL logS.
        similarity: Largest Tanimoto similarity to a known active.
    """

    weight: float = 200.0
    logp: float = 6.0
    donors: int = 4
    acceptors: int = 10
    solubility: float = -9.0
    similarity: float = 0.6

    def describe(
        self, molecule: Chem.Mol, known: list[DataStructs.ExplicitBitVect]
    ) -> dict[str, Any]:
        """Properties by name, the nearest similarity to ``known``, and whether all limits hold.

        Counter-ions do not count. Without known actives the similarity is ``None``, and no limit.
        """
        molecule = largest_fragment(molecule)
        values = {
            "weight": _weight(molecule), "logp": _logp(molecule),
            "donors": rdMolDescriptors.CalcNumHBD(molecule),
            "acceptors": rdMolDescriptors.CalcNumHBA(molecule), "logs": esol(molecule),
        }  # fmt: skip
        near = None
        if known:
            near = max(DataStructs.BulkTanimotoSimilarity(bit_vector(molecule), known))
        passed = (
            values["weight"] >= self.weight and values["logp"] <= self.logp
            and values["donors"] <= self.donors and values["acceptors"] <= self.acceptors
            and values["logs"] >= self.solubility and (near is None or near <= self.similarity)
        )  # fmt: skip
        return {**values, "similarity_to_known": near, "passed": passed}


def _logp(molecule: Chem.Mol) -> float:
    return float(rdMolDescriptors.CalcCrippenDescriptors(molecule)[0])


def _weight(molecule: Chem.Mol) -> float:
    return float(Descriptors.MolWt(molecule))  # type: ignore[attr-defined]
