"""A trained run on files: poses as SDF, and screens of libraries."""

from __future__ import annotations

import csv
import hashlib
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
from cohobate.docking.aurobind.relax import relaxed
from cohobate.docking.aurobind.structure import best_poses
from cohobate.docking.aurobind.targets import tanimoto
from cohobate.docking.data.embeddings import ProteinEmbeddings
from cohobate.docking.data.features import (
    Complex,
    bit_vector,
    centroids,
    collate,
    fingerprint,
    pocket_features,
)
from cohobate.docking.data.molecules import Problems, largest_fragment, read
from cohobate.docking.data.receptors import Pocket, find_pocket, heavy_atoms, read_receptor
from cohobate.docking.plots import Scene, closest, pocket_view
from cohobate.docking.properties import Filters
from cohobate.docking.screen import Screened, first_molecules, screen

log = logging.getLogger("cohobate")

_PANELS, _SHOWN, _REACH = 6, 12, 6.0  # molecules in a picture; residues of each, and how near, Å


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
    model: Any, inputs: Sequence[Path], out: Path, site: Site, poses: int, steps: int, seed: int
) -> list[Path]:
    """Poses of all molecules of the files, one SDF for each file, best pose first.

    Beside each SDF stands a picture of the first molecules in the pocket.

    Raises:
        InputError: No molecule of a file can be read.
    """
    pocket = site.pocket()
    around = heavy_atoms(read_receptor(Path(site.receptor)), pocket)
    written = []
    for path in inputs:
        problems = Problems()
        target = out / f"{path.name.split('.')[0]}.poses.sdf"
        out.mkdir(parents=True, exist_ok=True)
        count = 0
        shown: list[Scene] = []
        with save_atomic(target) as temporary:
            with Chem.SDWriter(str(temporary)) as writer:
                for record in read(path, problems):
                    molecule = Chem.RemoveHs(largest_fragment(record.molecule))
                    if molecule.GetNumAtoms() == 0:
                        problems.add(path, record.place, "no heavy atom")
                        continue
                    best = _write(model, writer, molecule, record.name, pocket, poses, steps, seed)
                    if len(shown) < _PANELS:
                        shown.append(scene(best, pocket, around))
                    count += 1
            for line in problems.lines():
                log.warning("%s", line)
            if not count:
                raise InputError(f"{path}: no molecule could be read")
        log.info("%s: %d molecules, %d not readable", path, count, len(problems.found))
        pocket_view(shown, target.with_suffix(".png"))
        written.append(target)
    return written


def _write(
    model: Any,
    writer: Chem.SDWriter,
    molecule: Chem.Mol,
    name: str,
    pocket: Pocket,
    poses: int,
    steps: int,
    seed: int,
) -> Chem.Mol:
    """Write a molecule's poses; gives the best."""
    molecule.RemoveAllConformers()
    one = Complex("target", name, molecule, pocket)
    batch = {k: v.to(model.device) for k, v in collate([one.features()]).items()}
    x, scores = best_poses(model.network, batch, poses, steps, seed=seed)
    fitness = float(model.network(batch)[0])
    best = molecule
    for rank in range(poses):
        posed = relaxed(molecule, x[0, rank].cpu().double().numpy() + pocket.centre, seed)
        values = {
            "score": float(scores["ranking"][0, rank]), "pK_pred": fitness,
            "confidence": float(scores["ligand_plddt"][0, rank]),
        }  # fmt: skip
        for key, value in values.items():
            posed.SetProp(key, f"{value:.4f}")
        posed.SetIntProp("rank", rank + 1)
        posed.SetIntProp("seed", seed)
        posed.SetProp("_Name", name)
        writer.write(posed)
        best = posed if rank == 0 else best
    return best


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
    about = f"pK {posed.GetProp('pK_pred')}, confidence {posed.GetProp('confidence')}"
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
        protein = pocket_features(pocket)["embedding"].to(model.device)
        _same_embedding(model, pocket)
        self.fast = model.fast
        chosen = [molecules[i] for i in centroids(molecules, model.centroids)]
        bits = np.stack([fingerprint(m) for m in chosen])
        digest = hashlib.sha256(bits.astype(np.float32).tobytes())
        for name, tensor in model.fast.state_dict().items():
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        self.key = digest.hexdigest()
        plain = [Chem.RemoveHs(largest_fragment(m)) for m in chosen]
        with torch.no_grad():
            batch = collate([Complex("target", "", m, pocket).features() for m in plain])
            batch = {k: v.to(model.device) for k, v in batch.items()}
            prior = model.fast.prior_of(model.network.trunk(batch))
            targets = model.fast.target(protein.expand(len(prior), -1), prior)
        self.register_buffer("bits", torch.from_numpy(bits).float())
        self.register_buffer("targets", targets)

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


@torch.no_grad()
def teacher_fitness(model: Any, molecules: Sequence[Chem.Mol], pocket: Pocket) -> Tensor:
    """Fitness (n,) by the structure model."""
    found = []
    for start in range(0, len(molecules), 16):
        batch = collate(
            [
                Complex("target", "", Chem.RemoveHs(largest_fragment(m)), pocket).features()
                for m in molecules[start : start + 16]
            ]
        )
        found.append(model.network({k: v.to(model.device) for k, v in batch.items()}).cpu())
    return torch.cat(found) if found else torch.zeros(0)


def screen_library(
    model: Any,
    library: Path,
    site: Site,
    out: Path,
    *,
    top: int,
    rescore: int,
    filters: Filters,
    known: Path | None,
    cache: Path,
    chunk: int = 8192,
    workers: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> Screened | None:
    """Student on all, structure model on the best, filters; writes the table and a picture.

    Args:
        model: A run of the last stage.
        library: The library.
        site: Receptor and pocket.
        out: Folder for ``ranking.csv``, ``problems.csv``, ``top.png``.
        top: How many molecules are kept.
        rescore: How many of them the structure model scores too.
        filters: Property limits; what fails is kept and marked.
        known: File of known actives for the similarity column.
        cache: Folder for encoded chunks.
        chunk: Rows of a chunk.
        workers: Further processes for fingerprints.
        accelerator: Lightning's.
        devices: Processes on each machine.
        num_nodes: Machines.

    Returns:
        What was found; None in every process but the first, which alone writes.
    """
    pocket = site.pocket()
    scorer = StudentScorer(model, pocket, first_molecules(library, 500))
    found = screen(
        library, scorer, cache=cache, state=out / "state.json", top=top, chunk=chunk,
        workers=workers, accelerator=accelerator, devices=devices, num_nodes=num_nodes,
    )  # fmt: skip
    if found is None:
        return None
    actives = [] if known is None else [bit_vector(r.molecule) for r in read(known, Problems())]
    molecules = [Chem.MolFromSmiles(smiles) for smiles, _ in found.top.rows]
    again = teacher_fitness(model, molecules[:rescore], pocket).tolist()
    table = [
        {
            "rank": 0, "name": name, "smiles": smiles, "student": float(score),
            "teacher": again[i] if i < len(again) else None,
            **filters.describe(molecules[i], actives),
        }
        for i, ((smiles, name), score) in enumerate(
            zip(found.top.rows, found.top.score, strict=True)
        )
    ]  # fmt: skip
    table.sort(key=lambda row: (row["teacher"] is None, -(row["teacher"] or row["student"])))
    for rank, row in enumerate(table, 1):
        row["rank"] = rank
    _table(out / "ranking.csv", table)
    bad = [dict(zip(("file", "place", "reason"), p, strict=True)) for p in found.problems.found]
    _table(out / "problems.csv", bad, ["file", "place", "reason"])
    _grid(out / "top.png", table[:12])
    return found


def _table(path: Path, table: list[dict[str, Any]], names: list[str] | None = None) -> None:
    with save_atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names or list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def _grid(path: Path, table: list[dict[str, Any]]) -> None:
    from rdkit.Chem import Draw

    picture = Draw.MolsToGridImage(
        [Chem.MolFromSmiles(row["smiles"]) for row in table], molsPerRow=4, subImgSize=(240, 200),
        legends=[f"{row['rank']}: {row['name']} ({row['student']:.2f})" for row in table],
        returnPNG=False,
    )  # fmt: skip
    with save_atomic(path) as temporary:
        picture.save(temporary, "PNG")


__all__ = ["Site", "StudentScorer", "predict_poses", "screen_library", "teacher_fitness"]
