"""The data module: complexes split into parts, as batches or as lists of one target."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gemmi
import lightning.pytorch as pl
import numpy as np
import torch
from rdkit import Chem, RDConfig
from torch.utils.data import DataLoader, Dataset

from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler, ResumableLoader
from cohobate.docking.data import sources
from cohobate.docking.data.embeddings import ProteinEmbeddings
from cohobate.docking.data.features import Batch, Complex, collate
from cohobate.docking.data.molecules import Problems
from cohobate.docking.data.prepare import choose
from cohobate.docking.data.receptors import Chain

log = logging.getLogger("cohobate")
Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Split:
    """Which complexes are for what.

    Args:
        by: ``ligand``: no molecule of one part occurs in another; ``protein``: no target does.
        val: Share of the molecules (or targets) for validation.
        test: Share for test.
        seed: Of the split; not the run's, so that all seeds of a comparison share one.
    """

    by: Literal["ligand", "protein"] = "ligand"
    val: float = 0.15
    test: float = 0.3
    seed: int = 0

    def apply(self, complexes: Sequence[Complex]) -> dict[Part, list[int]]:
        """Places of each part.

        Raises:
            InputError: A part would be empty.
        """
        keys = [
            c.target if self.by == "protein" else Chem.MolToSmiles(c.molecule) for c in complexes
        ]
        names = sorted(set(keys))
        random.Random(self.seed).shuffle(names)
        test, val = round(self.test * len(names)), round(self.val * len(names))
        if min(test, val) < 1 or test + val >= len(names):
            raise InputError(
                f"split: {len(names)} of {self.by} do not give {test} for test, {val} for "
                "validation and at least one for training"
            )
        part: dict[str, Part] = dict.fromkeys(names, "train")
        for place, name in enumerate(names[: test + val]):
            part[name] = "test" if place < test else "val"
        found: dict[Part, list[int]] = {"train": [], "val": [], "test": []}
        for place, key in enumerate(keys):
            found[part[key]].append(place)
        return found


@dataclass(frozen=True)
class Lists:
    """Batches of one target each, for losses over a ranking.

    Args:
        size: Molecules in a list.
        width: Labels are binned by this many pK …
        most: … and at most so many random ones of a bin are kept.
        least: Targets with fewer labelled molecules are left out.
        close: Prefer close labels: a list is what stands around a random molecule in the order of
            labels.
    """

    size: int = 16
    width: float = 0.15
    most: int = 5
    least: int = 10
    close: bool = False

    def draw(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Places of one list, by the rule, from a target's labels (n,)."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(labels))
        bins = np.floor(labels[order] / self.width).astype(int)
        rank: np.ndarray = np.zeros(len(order), dtype=int)
        for value in np.unique(bins):
            own = bins == value
            rank[own] = np.arange(own.sum())
        kept = order[rank < self.most]
        if self.close:
            kept = kept[np.argsort(labels[kept], kind="stable")]
            first = rng.integers(len(kept)) - self.size // 2
            kept = kept[np.clip(first, 0, max(len(kept) - self.size, 0)) :]
        return kept[: self.size]


class _Complexes(Dataset[Batch]):
    """Features of complexes; what is hidden is NaN."""

    def __init__(self, complexes: Sequence[Complex]) -> None:
        self.complexes = complexes
        self.groups = {n: i for i, n in enumerate(sorted({c.group or c.target for c in complexes}))}
        self.no_pose: set[int] = set()
        self.no_label: set[int] = set()
        self._kept: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self.complexes)

    def __getitem__(self, place: int) -> Batch:
        place = int(place)
        if place not in self._kept:
            one = self.complexes[place]
            self._kept[place] = {
                **one.features(),
                "index": torch.tensor(place),
                "group": torch.tensor(self.groups[one.group or one.target]),
            }
        found = dict(self._kept[place])
        if place in self.no_pose:
            found["pose"] = torch.full_like(found["pose"], float("nan"))
        if place in self.no_label:
            found["label"] = torch.full_like(found["label"], float("nan"))
        return found


class _View(Dataset[Any]):
    """Places → samples, or lists of samples of one target."""

    def __init__(
        self, data: _Complexes, places: Sequence[Any], lists: Lists | None, pool: Sequence[int] = ()
    ) -> None:
        self.data, self.places, self.lists, self.pool = data, places, lists, list(pool)

    def __len__(self) -> int:
        return len(self.places) * (2 if self.pool else 1)

    def __getitem__(self, draw: int) -> Any:
        seed = getattr(draw, "seed", 0)
        if self.lists is not None:
            own = self.places[int(draw)]
            labels = np.array([self.data.complexes[i].label for i in own])
            return [self.data[own[i]] for i in self.lists.draw(labels, seed)]
        if draw >= len(self.places):  # half of every permutation is self-labelled
            return self.data[self.pool[seed % len(self.pool)]]
        return self.data[self.places[int(draw)]]


class ComplexData(pl.LightningDataModule):
    """Protein-ligand complexes for training and evaluation.

    Args:
        root: Folder of complexes (see `cohobate.docking.data.sources.load`); ``None`` is the
            embedded set, whose poses and labels are AutoDock Vina's.
        split: Which complexes are for what.
        posed: Share of the training complexes whose pose is shown.
        labelled: Share of the training complexes whose label is shown.
        unlabelled: Further molecules for each target, without pose or label; the student learns
            on them what the teacher thinks.
        unlabelled_from: SMILES file they are drawn from; default the NCI list in the rdkit wheel.
        protein_embeddings: ``.npz`` with an array for each target, by its name: embeddings of the
            residues (L, C) by a protein language model, or their mean (C,). The student sees them
            instead of the pocket's residue types and shape.
        max_residues: A pocket is cut to the residues nearest to its ligands' centre.
        max_atoms: Molecules with more heavy atoms are left out.
        batches: ``complexes`` with a pose, ``lists`` of one target each, or ``pairs``: half of them
            labelled, half not (all labelled where nothing is hidden).
        lists: How a list is drawn.
        batch_size: Complexes, or lists, a step.
        epoch_samples: Draws an epoch; default each once.
        max_identity: With a split by protein the model poses none for itself whose protein is more
            alike than this to a held-out one: share of the shorter chain that is identical, where
            chains are known. ``None`` keeps all.
        ic50_min_nM: The model poses none for itself whose label is below this …
        ic50_max_nM: … or above this, nM; with a limit, none without a label either.
        seed: Of order and draws; the command sets it to the run's.

    Raises:
        InputError: The folder has no complexes, or too few for the split.
    """

    def __init__(
        self,
        root: Path | None = None,
        split: Split = Split(),
        posed: float = 1.0,
        labelled: float = 1.0,
        unlabelled: int = 0,
        unlabelled_from: Path | None = None,
        protein_embeddings: Path | None = None,
        max_residues: int = 32,
        max_atoms: int = 48,
        batches: Literal["complexes", "lists", "pairs"] = "complexes",
        lists: Lists = Lists(),
        batch_size: int = 16,
        epoch_samples: int | None = None,
        max_identity: float | None = 0.6,
        ic50_min_nM: float | None = None,
        ic50_max_nM: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (0 < posed <= 1 and 0 < labelled <= 1):
            raise InputError(f"data: posed {posed:g} and labelled {labelled:g} are shares above 0")
        counts = {
            "max_residues": max_residues, "max_atoms": max_atoms, "batch_size": batch_size,
            "epoch_samples": epoch_samples, "lists.size": lists.size, "lists.most": lists.most,
        }  # fmt: skip
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InputError(f"data: {name} {count} is below 1")
        self.root, self.split, self.seed = root, split, seed
        self.posed, self.labelled = posed, labelled
        self.unlabelled, self.unlabelled_from = unlabelled, unlabelled_from
        self.proteins = ProteinEmbeddings(protein_embeddings) if protein_embeddings else None
        self.protein_channels = self.proteins.channels if self.proteins else None
        self.max_residues, self.max_atoms = max_residues, max_atoms
        self.batches, self.lists = batches, lists
        self.batch_size, self.epoch_samples = batch_size, epoch_samples
        self.max_identity = max_identity
        self.ic50_min_nM, self.ic50_max_nM = ic50_min_nM, ic50_max_nM
        self.problems = Problems()
        self.self_labelled: list[int] = []
        self._data: _Complexes | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, cut, split, hide."""
        if self._data is not None:
            return
        found = [
            c for c in sources.load(self.root, self.problems)
            if c.molecule.GetNumAtoms() <= self.max_atoms
        ]  # fmt: skip
        for places in sources.by_target(found).values():
            self._cut([found[i] for i in places])
        if self.proteins is not None:
            of = {name: self.proteins.of(name) for name in sorted({c.target for c in found})}
            for one in found:
                one.pocket = replace(one.pocket, embedding=of[one.target])
        self.parts = self.split.apply(found)
        held = {Chem.MolToSmiles(found[i].molecule) for p in ("val", "test") for i in self.parts[p]}
        targets = sources.by_target([found[i] for i in self.parts["train"]])
        extra = self._extra(found, targets, held)
        self.extra = list(range(len(found), len(found) + len(extra)))
        self._data = _Complexes([*found, *extra])
        train = list(self.parts["train"])
        random.Random(self.split.seed + 1).shuffle(train)
        self._data.no_pose = set(train[round(self.posed * len(train)) :])
        random.Random(self.split.seed + 2).shuffle(train)
        self._data.no_label = set(train[round(self.labelled * len(train)) :])
        if self.batches == "lists":
            self._lists()  # before anything is computed

    def _cut(self, own: list[Complex]) -> None:
        """One pocket for all of a target's molecules that share one frame."""
        frames: dict[int, list[Complex]] = {}
        for one in own:
            frames.setdefault(id(one.pocket), []).append(one)
        for group in frames.values():
            posed = [c.molecule for c in group if c.molecule.GetNumConformers()]
            atoms = [m.GetConformer().GetPositions().mean(0) for m in posed]
            middle = np.mean(atoms, 0) if atoms else group[0].pocket.centre
            pocket = group[0].pocket.nearest(middle, self.max_residues)
            for one in group:
                one.pocket = pocket

    def _extra(
        self, found: list[Complex], targets: dict[str, list[int]], held: set[str]
    ) -> list[Complex]:
        if not self.unlabelled:
            return []
        path = self.unlabelled_from or Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
        known = held | {Chem.MolToSmiles(found[i].molecule) for i in self.parts["train"]}
        fresh = choose(path, self.unlabelled, seed=1, without=known)
        pockets = {c.target: c.pocket for c in found}
        return [
            Complex(target, molecule.GetProp("_Name"), molecule, pockets[target])
            for target in targets
            for molecule in fresh
        ]

    def describe(self) -> str:
        """What the data is, in one line."""
        self.setup()
        counts = ", ".join(f"{len(v)} {k}" for k, v in self.parts.items())
        targets = len({c.target for c in self.data.complexes})
        source = (
            "poses and scores by AutoDock Vina (labels are Vina scores, not measurements)"
            if self.root is None or list(Path(self.root).glob("*.poses.sdf.gz"))
            else Path(self.root).name
        )
        more = f", {len(self.extra)} unlabelled pairs" if self.extra else ""
        poses, labels = len(self.places("train", pose=True)), len(self.places("train", label=True))
        more += (
            f"; training sees {poses} poses and {labels} labels "
            f"(data.posed {self.posed:g}, data.labelled {self.labelled:g})"
        )
        bad = f"; {len(self.problems.found)} records not readable" if self.problems.found else ""
        more += f", protein embeddings of {self.proteins.path.name}" if self.proteins else ""
        return f"{source}: {targets} targets, {counts} complexes by {self.split.by}{more}{bad}"

    @property
    def data(self) -> _Complexes:
        """All complexes' features by place."""
        assert self._data is not None
        return self._data

    def places(self, part: Part, *, pose: bool = False, label: bool = False) -> list[int]:
        """A part's complexes whose pose, or label, is shown."""
        found = self.parts[part]
        if pose:
            found = [
                i for i in found
                if i not in self.data.no_pose and self.data.complexes[i].molecule.GetNumConformers()
            ]  # fmt: skip
        if label:
            found = [
                i for i in found
                if i not in self.data.no_label and np.isfinite(self.data.complexes[i].label)
            ]  # fmt: skip
        return found

    def hidden_poses(self) -> list[int]:
        """Training complexes without a pose, or whose pose is not shown: self-distillation's.

        Those too near to a held-out protein, or out of the limits of affinity, are left out.
        """
        shown, labelled = (set(self.places("train", **{k: True})) for k in ("pose", "label"))
        found = [i for i in sorted(self.parts["train"]) if i not in shown]
        chains, near = {i: self.data.complexes[i].pocket.chains for i in found}, self._near_held()
        kept = [i for i in found if chains[i] not in near and self._wanted(i, i in labelled)]
        if len(kept) < len(found):
            log.info(
                "self-distillation: %d of %d complexes are left out: near to a held-out protein "
                "(data.max_identity), or out of data.ic50_min_nM and data.ic50_max_nM",
                len(found) - len(kept), len(found),
            )  # fmt: skip
        return kept

    def _near_held(self) -> set[tuple[Chain, ...]]:
        """Chains of the training proteins that are too near to a held-out one."""
        if self.split.by != "protein" or self.max_identity is None:
            return set()
        chains = {
            p: {self.data.complexes[i].pocket.chains for i in v} for p, v in self.parts.items()
        }
        held = {chain for own in chains["val"] | chains["test"] for chain in own}
        return {
            own for own in chains["train"]
            if any(identity(a, b) > self.max_identity for a in own for b in held)
        }  # fmt: skip

    def _wanted(self, place: int, labelled: bool) -> bool:
        if self.ic50_min_nM is None and self.ic50_max_nM is None:
            return True
        low, high = self.ic50_min_nM or 0.0, self.ic50_max_nM or np.inf
        return labelled and bool(low <= 10 ** (9 - self.data.complexes[place].label) <= high)

    def batches_of(self, places: Sequence[int], size: int = 16) -> Iterator[Batch]:
        """Complexes in order, for evaluation and for asking a teacher."""
        for start in range(0, len(places), size):
            yield collate([self.data[i] for i in places[start : start + size]])

    def train_dataloader(self) -> ResumableLoader:
        """Complexes with a pose, or lists of labelled ones."""
        if self.batches == "lists":
            view = self._lists()
        elif self.batches == "pairs":
            hidden = [i for i in self.parts["train"] if i in self.data.no_label]
            shown = self.places("train", label=True)
            view = _View(self.data, shown, None, [*hidden, *self.extra])
        else:
            view = _View(self.data, self.places("train", pose=True), None, self.self_labelled)
        if not len(view):
            raise InputError("data: no training complex has what this stage needs")
        sampler = EpochSampler(len(view), seed=self.seed, num_samples=self.epoch_samples)
        join = _join if self.batches == "lists" else collate
        return ResumableLoader(view, batch_size=self.batch_size, sampler=sampler, collate_fn=join)

    def _lists(self) -> _View:
        shown = self.places("train", label=True)
        if not shown:
            raise InputError("data: no training complex has a label, and lists are of labels")
        own: dict[str, list[int]] = {}
        for i in shown:
            one = self.data.complexes[i]
            own.setdefault(one.group or one.target, []).append(i)
        groups = [own[name] for name in sorted(own) if len(own[name]) >= self.lists.least]
        if not groups:
            raise InputError(
                f"data: no target has {self.lists.least} labelled molecules to train on "
                f"(the most are {max(map(len, own.values()))}; data.lists.least)"
            )
        return _View(self.data, groups, self.lists)

    def _plain(self, part: Part) -> DataLoader[Any]:
        view = _View(self.data, self.parts[part], None)
        return DataLoader(view, batch_size=self.batch_size, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation complexes."""
        return self._plain("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test complexes."""
        return self._plain("test")


@cache
def identity(a: Chain, b: Chain) -> float:
    """Share of the shorter of two chains that is identical in a global alignment by BLOSUM62.

    A chain counts as at least 30 residues long: short peptides are alike by chance.

    Example:
        >>> identity(Chain("A" * 20 + "W" * 20), Chain("A" * 20 + "G" * 20))
        0.5
    """
    # gemmi's matrix goes by three letters; it knows no J.
    first, second = (
        gemmi.expand_one_letter_sequence(c.sequence.replace("J", "X"), gemmi.ResidueKind.AA)
        for c in (a, b)
    )
    found = gemmi.align_string_sequences(first, second, [], gemmi.AlignmentScoring("b"))
    return found.match_count / max(min(len(a.sequence), len(b.sequence)), 30)


def _join(lists: list[list[Batch]]) -> Batch:
    """Several lists in one batch; ``list`` (B,) tells them apart."""
    batch = collate([sample for one in lists for sample in one])
    batch["list"] = torch.cat([torch.full((len(one),), i) for i, one in enumerate(lists)])
    return batch


__all__ = ["ComplexData", "Lists", "Split"]
