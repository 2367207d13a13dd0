"""Molecules and pockets as tensors, and batches of ragged complexes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator
from torch import Tensor

from cohobate.docking.data.molecules import largest_fragment
from cohobate.docking.data.receptors import Pocket

BITS = 1024
ELEMENTS = 119
TOPOLOGY = 8
POCKET_CHANNELS = 21 + 16
VERSION = "ecfp4-1024-2"
"""Changes whenever a molecule's features would; part of the key of cached libraries."""

_BONDS = {
    Chem.BondType.SINGLE: 1, Chem.BondType.DOUBLE: 2, Chem.BondType.TRIPLE: 3,
    Chem.BondType.AROMATIC: 4,
}  # fmt: skip
_MORGAN = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=BITS)

Batch = dict[str, Tensor]


def fingerprint(molecule: Chem.Mol) -> np.ndarray:
    """ECFP4 (BITS,), 0 or 1, uint8.

    Example:
        >>> int(fingerprint(Chem.MolFromSmiles("CCO")).sum())
        6
    """
    return _MORGAN.GetFingerprintAsNumPy(molecule)


def bit_vector(molecule: Chem.Mol) -> DataStructs.ExplicitBitVect:
    """ECFP4 as rdkit compares it."""
    return _MORGAN.GetFingerprint(molecule)


def parent(molecule: Chem.Mol) -> Chem.Mol:
    """What is scored of a molecule: its largest fragment, without hydrogens."""
    part = largest_fragment(molecule)
    return Chem.RemoveHs(part) if part.GetNumHeavyAtoms() < part.GetNumAtoms() else part


def atom_counts(molecule: Chem.Mol) -> np.ndarray:
    """Number of heavy atoms of each element (ELEMENTS,), float32."""
    numbers = [a.GetAtomicNum() for a in molecule.GetAtoms() if a.GetAtomicNum() > 1]
    return np.bincount(numbers, minlength=ELEMENTS).astype(np.float32)


def ligand_features(molecule: Chem.Mol) -> Batch:
    """Atoms and bonds of a molecule without hydrogens.

    Returns:
        element (A,), flags (A, 5: aromatic, in ring, charge, hydrogens, degree), topology (A, A:
        bonds between, at most `TOPOLOGY`), bond (A, A: 0 none, 1-3 order, 4 aromatic).
    """
    count = molecule.GetNumAtoms()
    flags = [
        [a.GetIsAromatic(), a.IsInRing(), a.GetFormalCharge(), a.GetTotalNumHs() / 4,
         a.GetDegree() / 4]
        for a in molecule.GetAtoms()
    ]  # fmt: skip
    bond = torch.zeros(count, count, dtype=torch.long)
    for b in molecule.GetBonds():
        kind = _BONDS.get(b.GetBondType(), 1)
        bond[b.GetBeginAtomIdx(), b.GetEndAtomIdx()] = kind
        bond[b.GetEndAtomIdx(), b.GetBeginAtomIdx()] = kind
    near = np.minimum(Chem.GetDistanceMatrix(molecule), TOPOLOGY)
    return {
        "element": torch.tensor([a.GetAtomicNum() for a in molecule.GetAtoms()]),
        "flags": torch.tensor(flags, dtype=torch.float32),
        "topology": torch.from_numpy(near).long(),
        "bond": bond,
    }


def automorphisms(molecule: Chem.Mol, most: int = 1000) -> np.ndarray:
    """Orders of the atoms that are the same molecule (K, A); without a pose, as it is (1, A).

    Args:
        molecule: Without hydrogens.
        most: At most so many.

    Example:
        >>> posed = Chem.MolFromMolBlock(Chem.MolToMolBlock(Chem.MolFromSmiles("CC(F)F")))
        >>> sorted(automorphisms(posed).tolist())
        [[0, 1, 2, 3], [0, 1, 3, 2]]
    """
    if not molecule.GetNumConformers():
        return np.arange(molecule.GetNumAtoms())[None]
    found = molecule.GetSubstructMatches(
        molecule, uniquify=False, useChirality=True, maxMatches=most
    )
    return np.array(found, dtype=np.int64)


def pocket_features(pocket: Pocket) -> Batch:
    """A pocket in its own frame: residue (P,), ca and side (P, 3), embedding (C,).

    The embedding is a protein language model's where the pocket has one. Else it needs none
    (POCKET_CHANNELS,): the share of each type of residue, and a histogram of the distances of side
    chains from the centre, 2 Å a bin.
    """
    centre = pocket.centre
    ca, side = pocket.ca - centre, pocket.side - centre
    share = np.bincount(pocket.types, minlength=21) / len(pocket.types)
    reach = np.clip(np.linalg.norm(side, axis=1) // 2, 0, 15).astype(int)
    spread = np.bincount(reach, minlength=16) / len(reach)
    embedding = np.concatenate((share, spread)) if pocket.embedding is None else pocket.embedding
    return {
        "residue": torch.from_numpy(pocket.types).long(),
        "ca": torch.from_numpy(ca).float(),
        "side": torch.from_numpy(side).float(),
        "embedding": torch.from_numpy(embedding).float(),
    }


@dataclass
class Complex:
    """A pocket, a molecule, and what is known of the pair.

    Attributes:
        target: Name of the target.
        name: Name of the molecule.
        molecule: Without hydrogens; with a conformer when the pose is known.
        pocket: Its pocket.
        label: pK, or NaN.
        weight: σ of the label; 1 when unknown.
        group: Name of those that its label is ranked among; the target's when empty.
    """

    target: str
    name: str
    molecule: Chem.Mol
    pocket: Pocket
    label: float = float("nan")
    weight: float = 1.0
    group: str = ""

    def features(self) -> Batch:
        """Everything as tensors; ``pose`` (A, 3) in the pocket frame, NaN when unknown."""
        count = self.molecule.GetNumAtoms()
        pose = np.full((count, 3), np.nan)
        if self.molecule.GetNumConformers():
            pose = self.molecule.GetConformer().GetPositions() - self.pocket.centre
        return {
            **ligand_features(self.molecule),
            **pocket_features(self.pocket),
            "pose": torch.from_numpy(pose).float(),
            "same": torch.from_numpy(automorphisms(self.molecule)),
            "label": torch.tensor(self.label, dtype=torch.float32),
            "sigma": torch.tensor(self.weight, dtype=torch.float32),
            "bits": torch.from_numpy(fingerprint(self.molecule)).float(),
            "counts": torch.from_numpy(atom_counts(self.molecule)),
        }


_SQUARE = ("topology", "bond")
_SINGLE = ("label", "sigma", "bits", "counts", "embedding", "index", "group")


def collate(samples: Sequence[Batch]) -> Batch:
    """Pad and stack; adds ``residue_mask`` (B, P) and ``atom_mask`` (B, A).

    Padding never changes a result: every network masks it.
    """
    batch: Batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key == "same":  # ragged both ways: orders are repeated, atoms that are not there stay
            size, most = max(v.shape[1] for v in values), max(len(v) for v in values)
            batch[key] = torch.arange(size).repeat(len(values), most, 1)
            for row, v in zip(batch[key], values, strict=True):
                row[:, : v.shape[1]] = v[torch.arange(most) % len(v)]
        elif key in _SQUARE:
            size = max(len(v) for v in values)
            padded = [torch.nn.functional.pad(v, (0, size - len(v)) * 2) for v in values]
            batch[key] = torch.stack(padded)
        elif key in _SINGLE:
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    for key, like in (("residue_mask", "residue"), ("atom_mask", "element")):
        ones = [torch.ones(len(sample[like])) for sample in samples]
        batch[key] = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    return batch


def centroids(molecules: Sequence[Chem.Mol], count: int, cutoff: float = 0.6) -> list[int]:
    """Cluster by ECFP4 and choose each cluster's centroid, the largest clusters first.

    Args:
        molecules: At most 20,000 are clustered by Butina, more by the leader algorithm.
        count: At most so many centroids.
        cutoff: Least Tanimoto similarity inside a cluster.

    Returns:
        Places in ``molecules``.
    """
    from rdkit.ML.Cluster import Butina
    from rdkit.SimDivFilters import rdSimDivPickers

    prints = [bit_vector(m) for m in molecules]
    if len(prints) > 20_000:
        picked = rdSimDivPickers.LeaderPicker().LazyBitVectorPick(prints, len(prints), 1 - cutoff)
        return list(picked)[:count]
    rows = [
        1 - s
        for i in range(1, len(prints))
        for s in DataStructs.BulkTanimotoSimilarity(prints[i], prints[:i])
    ]
    groups = Butina.ClusterData(rows, len(prints), 1 - cutoff, isDistData=True, reordering=True)
    chosen = []
    for group in sorted(groups, key=len, reverse=True)[:count]:
        own = [prints[i] for i in group]
        mean = [np.mean(DataStructs.BulkTanimotoSimilarity(p, own)) for p in own]
        chosen.append(group[int(np.argmax(mean))])
    return chosen
