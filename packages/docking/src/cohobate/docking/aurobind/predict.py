"""A trained run on files: poses as SDF, and the student on a target."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rdkit import Chem
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.core.runs import RunFolder, read_run_config
from cohobate.docking.aurobind.relax import relaxed
from cohobate.docking.aurobind.structure import best_poses
from cohobate.docking.aurobind.targets import tanimoto
from cohobate.docking.data.embeddings import ProteinEmbeddings
from cohobate.docking.data.features import (
    Complex,
    centroids,
    collate,
    fingerprint,
    parent,
    pocket_features,
)
from cohobate.docking.data.files import is_gzip
from cohobate.docking.data.module import ComplexData
from cohobate.docking.data.molecules import Problems, Record, read
from cohobate.docking.data.receptors import Pocket, crop, find_pocket, heavy_atoms, read_receptor
from cohobate.docking.plots import Scene, closest, pocket_view

log = logging.getLogger("cohobate")

_FITNESS = ("fitness", "preference", "student")  # the stages whose fitness head is trained
_PANELS, _SHOWN, _REACH = 6, 12, 6.0  # molecules in a picture; residues of each, and how near, Å


def at_least(least: int, **options: int | None) -> None:
    """Refuse options that are smaller.

    Raises:
        InputError: One is.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")


@dataclass(frozen=True)
class Trained:
    """What a run was trained with.

    Attributes:
        max_residues: Of its pockets.
        max_atoms: Heavy atoms of its largest molecules.
        source: Whose its labels are; empty where that is not known.
    """

    max_residues: int
    max_atoms: int
    source: str

    @staticmethod
    def of(model: Any) -> Trained:
        """Read it from the folder of a run.

        Raises:
            InputError: The folder cannot be read, or the run's file lacks the structure model.
        """
        known = {k: v.default for k, v in inspect.signature(ComplexData).parameters.items()}
        file, source = model.weights_file, ""
        if file is not None:
            if file.suffix == ".safetensors" and model.fast is not None:
                raise InputError(f"{file}: the student alone; the run's checkpoint is needed")
            known |= read_run_config(file.parent).get("data", {}).get("init_args", {})
            source = RunFolder(file.parent).info.get("data", "").partition(": ")[0]
        return Trained(known["max_residues"], known["max_atoms"], source)


def pocket_size(model: Any, max_residues: int | None) -> int:
    """Residues of a pocket: as asked for, else as in the run's training.

    Raises:
        InputError: None are asked for.
    """
    at_least(1, max_residues=max_residues)
    return max_residues or Trained.of(model).max_residues


@dataclass(frozen=True)
class Site:
    """Where to look in a receptor: exactly one of ligand, box and residues.

    Args:
        receptor: ``.pdb``, ``.cif`` or ``.pdbqt``, also ``.gz``.
        ligand: File of a reference ligand in the site.
        centre: Centre of a box, Å.
        size: Size of the box, Å.
        residues: ``A:123``.
        max_residues: The pocket is cut to the residues nearest to its centre.
        protein_embedding: ``.npz`` or ``.npy`` with the protein's embedding, for a student that was
            trained with such; of several arrays that with the receptor file's name, up to its dot.
    """

    receptor: Path
    ligand: Path | None = None
    centre: tuple[float, float, float] | None = None
    size: tuple[float, float, float] = (20.0, 20.0, 20.0)
    residues: list[str] | None = None
    max_residues: int = 32
    protein_embedding: Path | None = None

    def pocket(self) -> Pocket:
        """Read it.

        Raises:
            InputError: A file cannot be read, or nothing is there.
        """
        structure = read_receptor(Path(self.receptor))
        atoms = None
        if self.ligand is not None:
            problems = Problems()
            record = next(iter(read(Path(self.ligand), problems)), None)
            if record is None or not record.molecule.GetNumConformers():
                why = problems.lines()[0] if problems.found else "no coordinates"
                raise InputError(f"{self.ligand}: no reference ligand: {why}")
            atoms = record.molecule.GetConformer().GetPositions()
        box = None if self.centre is None else (self.centre, self.size)
        found = find_pocket(
            structure, ligand=atoms, box=box, residues=self.residues, source=str(self.receptor)
        )
        middle = atoms.mean(0) if atoms is not None else np.array(self.centre or found.centre)
        if self.protein_embedding is not None:
            proteins = ProteinEmbeddings(self.protein_embedding)
            found = replace(found, embedding=proteins.of_file(Path(self.receptor)))
        return found.nearest(middle, self.max_residues)


def predict_poses(
    model: Any,
    inputs: Sequence[Path],
    out: Path,
    site: Site,
    *,
    poses: int = 1,
    steps: int = 20,
    seed: int = 0,
    ode: bool = False,
) -> list[Path]:
    """Poses of all molecules of the files, one SDF for each file, best pose first.

    Beside each SDF stand a picture of the first molecules in the pocket, and the pocket itself.

    Raises:
        InputError: No molecule of a file can be posed, or two files would be written as one.
    """
    at_least(1, poses=poses, steps=steps)
    written = _targets(inputs, out)
    known = Trained.of(model)
    pocket = site.pocket()
    structure = read_receptor(Path(site.receptor))
    around = heavy_atoms(structure, pocket)
    source = known.source if model.stage in _FITNESS else ""
    if source:
        log.warning("pK_pred is on the scale of the run's labels: %s", source)
    for path, target in zip(inputs, written, strict=True):
        problems = Problems()
        count = 0
        shown: list[Scene] = []
        with save_atomic(target) as temporary:
            with Chem.SDWriter(str(temporary)) as writer:
                for record in read(path, problems):
                    try:
                        molecule = _posable(record, known.max_atoms)
                        found = _posed(model, molecule, pocket, poses, steps, seed, ode)
                    except InputError as error:
                        problems.add(path, record.place, str(error))
                        continue
                    for posed in found:
                        posed.SetProp("_Name", record.name)
                        if source:
                            posed.SetProp("pK_source", source)
                        writer.write(posed)
                    if len(shown) < _PANELS:
                        shown.append(scene(found[0], pocket, around))
                    count += 1
            for line in problems.lines():
                log.warning("%s", line)
            if not count:
                raise InputError(f"{path}: no molecule could be posed")
        log.info("%s: %d molecules, %d not posed", path, count, len(problems.found))
        pocket_view(shown, target.with_suffix(".png"), source and f"labels: {source}")
        with save_atomic(_pocket_file(target)) as temporary:
            temporary.write_text(crop(structure, pocket))
    return written


def _targets(inputs: Sequence[Path], out: Path) -> list[Path]:
    """The SDF of each file: its name without what says its kind."""
    found: dict[Path, Path] = {}
    for path in inputs:
        name = path.stem if is_gzip(path) else path.name
        target = out / f"{Path(name).stem}.poses.sdf"
        if target in found:
            raise InputError(f"{path}: its poses would overwrite those of {found[target]}")
        found[target] = path
    return list(found)


def _pocket_file(target: Path) -> Path:
    return target.with_name(f"{target.name.removesuffix('.poses.sdf')}.pocket.pdb")


def _posable(record: Record, most: int) -> Chem.Mol:
    """What is posed of a record.

    Raises:
        InputError: Nothing, or too much.
    """
    molecule = Chem.Mol(parent(record.molecule))
    count = molecule.GetNumAtoms()
    if count == 0:
        raise InputError("no heavy atom")
    if count > most:
        raise InputError(f"{count} heavy atoms; the run was trained on at most {most}")
    molecule.RemoveAllConformers()
    return molecule


def _posed(
    model: Any, molecule: Chem.Mol, pocket: Pocket, poses: int, steps: int, seed: int, ode: bool
) -> list[Chem.Mol]:
    """A molecule's poses with their tags, the best first.

    Raises:
        InputError: One cannot be relaxed.
    """
    one = Complex("target", "", molecule, pocket)
    batch = {k: v.to(model.device) for k, v in collate([one.features()]).items()}
    x, scores = best_poses(model.network, batch, poses, steps, seed=seed, ode=ode)
    fitness = float(model.network(batch)[0]) if model.stage in _FITNESS else None
    found = []
    for rank in range(poses):
        posed = relaxed(molecule, x[0, rank].cpu().double().numpy() + pocket.centre, seed)
        values = {
            "score": float(scores["ranking"][0, rank]), "pK_pred": fitness,
            "confidence": float(scores["ligand_plddt"][0, rank]),
        }  # fmt: skip
        for key, value in values.items():
            if value is not None:
                posed.SetProp(key, f"{value:.4f}")
        posed.SetIntProp("rank", rank + 1)
        posed.SetIntProp("seed", seed)
        found.append(posed)
    return found


def scene(posed: Chem.Mol, pocket: Pocket, around: list[tuple[str, np.ndarray]]) -> Scene:
    """A pose and the residues nearest to it, for a picture.

    Args:
        posed: With its properties, as written.
        pocket: Where it is.
        around: From `cohobate.docking.data.receptors.heavy_atoms`.
    """
    atoms = posed.GetConformer().GetPositions()
    distance, pairs = closest(atoms, [positions for _, positions in around])
    near = [i for i in distance.argsort(kind="stable")[:_SHOWN] if distance[i] < _REACH]
    chains = len({name.split(":")[0] for name in pocket.names}) > 1
    numbers = [name if chains else name.split(":")[1] for name in pocket.names]
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in posed.GetBonds()]
    about = f"confidence {posed.GetProp('confidence')}"
    if posed.HasProp("pK_pred"):
        about = f"pK {posed.GetProp('pK_pred')}, {about}"
    return Scene(
        f"{posed.GetProp('_Name')}\n{about}", atoms,
        [atom.GetSymbol() for atom in posed.GetAtoms()],
        np.array(bonds, dtype=np.int64).reshape(-1, 2),
        [f"{around[i][0]} {numbers[i]}" for i in near],
        np.stack((pocket.ca[near], pocket.side[near]), 1), pairs[near],
    )  # fmt: skip


class StudentScorer(nn.Module):
    """The fast student on one target, for `cohobate.docking.screen.screen`.

    Args:
        model: A run of the last stage.
        pocket: The target's.
        molecules: Molecules whose centroids the teacher looks at once, in this target.

    Raises:
        InputError: The run is of another stage, or was trained with another protein embedding.
    """

    bits: Tensor
    targets: Tensor

    def __init__(self, model: Any, pocket: Pocket, molecules: Sequence[Chem.Mol]) -> None:
        super().__init__()
        if model.fast is None:
            raise InputError(f"stage {model.stage}: screening needs a run of the last stage")
        _same_embedding(model, pocket)
        seen = pocket_features(pocket)
        protein = seen["embedding"].to(model.device)
        self.fast = model.fast
        molecules = [parent(m) for m in molecules]
        chosen = [molecules[i] for i in centroids(molecules, model.centroids)]
        bits = np.stack([fingerprint(m) for m in chosen])
        with torch.no_grad():
            batch = collate([Complex("target", "", m, pocket).features() for m in chosen])
            batch = {k: v.to(model.device) for k, v in batch.items()}
            prior = model.fast.prior_of(model.network.trunk(batch))
            targets = model.fast.target(protein.expand(len(prior), -1), prior)
        self.register_buffer("bits", torch.from_numpy(bits).float())
        self.key = _hash(self.bits, *model.fast.state_dict().values())
        self.register_buffer("targets", targets)
        self.target = _hash(*seen.values(), *self.buffers(), *model.network.state_dict().values())

    @torch.no_grad()
    def encode(self, bits: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The library tower's vectors, and the nearest centroid's number, (n, 2 width + 1)."""
        known = torch.from_numpy(bits).to(self.targets)
        tower = self.fast.library(known, torch.from_numpy(counts).to(known.device))
        nearest = tanimoto(known, self.bits).argmax(1) if len(known) else known.new_zeros(0)
        return torch.cat((tower, nearest[:, None].to(tower)), 1).cpu().numpy()

    @torch.no_grad()
    def score(self, codes: np.ndarray) -> np.ndarray:
        """Fitness (n,) by the student."""
        found = torch.from_numpy(np.asarray(codes, dtype=np.float32)).to(self.targets.device)
        target = self.targets[found[:, -1].long()]
        return self.fast.combine(found[:, :-1], target)[0].cpu().numpy()


def _same_embedding(model: Any, pocket: Pocket) -> None:
    """Refuse a target whose protein embedding is not of the kind the run was trained with."""
    wanted = model.protein_channels
    given = None if pocket.embedding is None else len(pocket.embedding)
    if wanted == given:
        return
    known = "the run was trained " + (
        "without a protein embedding" if wanted is None else
        f"with protein embeddings of {wanted} channels (data.protein_embeddings)"
    )  # fmt: skip
    has = "none: protein_embedding names its file" if given is None else f"one of {given} channels"
    raise InputError(f"{known}; this target has {has}")


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def teacher_fitness(model: Any, molecules: Sequence[Chem.Mol], pocket: Pocket) -> Tensor:
    """Fitness (n,) by the structure model."""
    found = []
    for start in range(0, len(molecules), 16):
        batch = collate(
            [
                Complex("target", "", parent(m), pocket).features()
                for m in molecules[start : start + 16]
            ]
        )
        found.append(model.network({k: v.to(model.device) for k, v in batch.items()}).cpu())
    return torch.cat(found) if found else torch.zeros(0)


__all__ = [
    "Site", "StudentScorer", "Trained", "at_least", "pocket_size", "predict_poses",
    "teacher_fitness",
]  # fmt: skip
