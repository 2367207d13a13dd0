"""How good poses, rankings and screens are; the numbers are the libraries'."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from rdkit import Chem
from rdkit.ML.Scoring import Scoring
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import average_precision_score
from spyrmsd.rmsd import rmsd, symmrmsd

FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1)


def ranked(score: ArrayLike, label: ArrayLike, seed: int = 0) -> np.ndarray:
    """Labels (n,) by falling score; ties in an order drawn from the seed."""
    scores, labels = np.asarray(score, dtype=float), np.asarray(label)
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    return labels[shuffled[np.argsort(-scores[shuffled], kind="stable")]]


def enrichment(
    score: ArrayLike, label: ArrayLike, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> np.ndarray:
    """Enrichment factor at each fraction: hit rate among the first ``ceil(f n)`` over that of all.

    Args:
        score: Higher is better (n,).
        label: 1 for actives (n,).
        fractions: Parts of the list.
        seed: Of the order of ties.

    Example:
        >>> enrichment([4.0, 3.0, 2.0, 1.0], [1, 0, 0, 0], [0.25, 0.5]).tolist()
        [4.0, 2.0]
    """
    hits: np.ndarray = ranked(score, label, seed).astype(bool)
    if not hits.any():
        return np.full(len(fractions), math.nan)
    first = [math.ceil(f * len(hits)) for f in fractions]
    return np.array([hits[:n].mean() / hits.mean() for n in first])


def recovery(score: ArrayLike, label: ArrayLike, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The enrichment curve: what is found by how much of the list.

    Args:
        score: Higher is better (n,).
        label: 1 for actives (n,), at least one.
        seed: Of the order of ties.

    Returns:
        Share of the list (n + 1,) from 0 to 1, and share of the actives in it (n + 1,).

    Example:
        >>> recovery([4.0, 3.0, 2.0, 1.0], [1, 0, 1, 0])[1].tolist()
        [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    hits = ranked(score, label, seed).astype(bool)
    found = np.concatenate(([0], np.cumsum(hits)))
    return np.linspace(0, 1, len(found)), found / found[-1]


def screening(score: ArrayLike, label: ArrayLike, seed: int = 0) -> dict[str, float]:
    """Enrichment at 0.5, 1, 2, 5 and 10 %, BEDROC (20 and 80.5), ROC-AUC, average precision.

    Args:
        score: Higher is better (n,).
        label: 1 for actives (n,).
        seed: Of the order of ties.

    Returns:
        By name; all NaN where there are no actives or only actives.
    """
    hits: np.ndarray = ranked(score, label, seed).astype(bool)
    names = [f"ef{100 * f:g}" for f in FRACTIONS]
    if hits.all() or not hits.any():
        return dict.fromkeys([*names, "bedroc20", "bedroc80", "auc", "aupr"], math.nan)
    rows = hits[:, None].tolist()
    return {
        **dict(zip(names, enrichment(score, label, seed=seed).tolist(), strict=True)),
        "bedroc20": Scoring.CalcBEDROC(rows, 0, 20.0),
        "bedroc80": Scoring.CalcBEDROC(rows, 0, 80.5),
        "auc": Scoring.CalcAUC(rows, 0),
        "aupr": float(average_precision_score(hits, -np.arange(len(hits)))),
    }


def ranking(
    score: ArrayLike, label: ArrayLike, group: ArrayLike, least: int = 5
) -> dict[str, float]:
    """Spearman's ρ and Kendall's τ-b inside each target, averaged over targets.

    Args:
        score: (n,).
        label: (n,).
        group: Target of each (n,).
        least: Targets with fewer molecules are left out.

    Returns:
        ``spearman``, ``kendall``, ``targets`` (how many counted). A constant score counts as 0.
    """
    scores, labels, groups = (np.asarray(x) for x in (score, label, group))
    found = []
    for name in np.unique(groups):
        own = groups == name
        if own.sum() < least or np.ptp(labels[own]) == 0:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant input
            pair = (
                spearmanr(scores[own], labels[own]).statistic,
                kendalltau(scores[own], labels[own]).statistic,
            )
        found.append(np.nan_to_num(np.array(pair)))
    mean = np.mean(found, 0) if found else np.full(2, math.nan)
    return {"spearman": float(mean[0]), "kendall": float(mean[1]), "targets": float(len(found))}


def pose_rmsd(
    reference: np.ndarray,
    poses: np.ndarray,
    numbers: np.ndarray,
    adjacency: np.ndarray,
    *,
    symmetry: bool = True,
    superpose: bool = False,
) -> np.ndarray:
    """Heavy-atom RMSD of poses of one molecule, Å.

    Args:
        reference: (A, 3).
        poses: (P, A, 3), atoms in the same order.
        numbers: Atomic numbers (A,).
        adjacency: Bonds (A, A).
        symmetry: Whether equivalent atoms may change places.
        superpose: Whether to move each pose on the reference first; not for docking.

    Returns:
        (P,).
    """
    if not symmetry:
        return np.array([rmsd(reference, p, numbers, numbers, minimize=superpose) for p in poses])
    return np.array(
        symmrmsd(reference, list(poses), numbers, numbers, adjacency, adjacency, minimize=superpose)
    )


def molecule_rmsd(reference: Chem.Mol, poses: Chem.Mol) -> np.ndarray:
    """Symmetry-corrected RMSD (P,) of all conformers, without superposition, heavy atoms only.

    Both must have their atoms in the same order.
    """
    plain, posed = Chem.RemoveHs(reference), Chem.RemoveHs(poses)
    places = np.stack([c.GetPositions() for c in posed.GetConformers()])
    numbers = np.array([atom.GetAtomicNum() for atom in plain.GetAtoms()])
    adjacency = Chem.GetAdjacencyMatrix(plain)
    return pose_rmsd(plain.GetConformer().GetPositions(), places, numbers, adjacency)
